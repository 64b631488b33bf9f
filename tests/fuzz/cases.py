"""What the fuzzers share: seeded cases, drawn families, views of tensors."""

from contextlib import contextmanager

import numpy as np
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops import native
from tests.ops.runners import OF_BFLOAT16


class Fault(AssertionError):
    """A case that went wrong, by seed and number."""


def run_cases(check, cases, seed, start):
    """``check(seed, number)`` for ``cases`` numbers from ``start``; the first fault is a Fault.

    Threads and instruction set, which cases choose for the process, are given back.
    """
    threads, isa = torch.get_num_threads(), native.isa()
    torch.set_num_threads(1)
    try:
        for number in range(start, start + cases):
            try:
                check(seed, number)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise Fault(f"case {number} of seed {seed}: {what}") from error
    finally:
        torch.set_num_threads(threads)
        if isa is not None:
            native.set_isa(isa)


class Draw:
    """Random choices of one case: a function of seed, number and ``stream`` alone."""

    def __init__(self, seed, number, stream=0):
        self.bits = np.random.Generator(np.random.Philox(key=[seed, number], counter=stream << 32))

    def pick(self, options):
        return options[self.bits.integers(len(options))]

    def upto(self, most, least=0):
        """An integer from ``least`` to ``most``, both included."""
        return int(self.bits.integers(least, most + 1))

    def chance(self, probability):
        return bool(self.bits.random() < probability)

    def sizes(self, count, options):
        return [int(self.pick(options)) for _ in range(count)]

    def flags(self, shape, probability=0.5):
        return torch.from_numpy(self.bits.random(shape) < probability)

    def normal(self, *shape):
        """Standard normal, float64."""
        return torch.from_numpy(np.asarray(self.bits.standard_normal(shape)))

    def order(self, size):
        return torch.from_numpy(self.bits.permutation(size))


def draw_isa(draw, but=()):
    """One of the instruction sets here, except those whose names begin with one of ``but``."""
    if isas := [isa for isa in native.isas() if not isa.startswith(tuple(but))]:
        native.set_isa(draw.pick(isas))


def flushes(dtype):
    """Are denormals zeros to the instruction set that is used?"""
    return dtype == torch.bfloat16 and (native.isa() or "").startswith(OF_BFLOAT16)


@contextmanager
def on_threads(count):
    """With ``count`` threads; what judges runs on one, which costs small cases least."""
    if count == 1:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


WIDTHS = (1, 1, 2, 3, 5, 7, 16)


def draw_family(draw, most=8):
    """Power sets, chains, antichains, twin groups, anything; with the empty subset or not."""
    kind = draw.pick(("powerset", "chain", "antichain", "any", "any", "together"))
    count = draw.upto(3 if kind == "powerset" else 5, least=1)
    if kind == "powerset":
        subsets = list(range(1, 2**count))
    elif kind == "chain":
        subsets = [2**k - 1 for k in range(1, count + 1)]
    elif kind == "antichain":
        subsets = [2**k for k in range(count)]
    else:
        subsets = [draw.upto(2**count - 1, least=1) for _ in range(draw.upto(most, least=1))]
    if kind == "together":  # every second group is the twin of the one before it
        subsets = [sum(3 << 2 * n for n in range(count) if bits >> n & 1) for bits in subsets]
        count *= 2
    subsets = list(dict.fromkeys(subsets))[:most]
    if draw.chance(0.3):
        subsets.insert(draw.upto(len(subsets)), 0)
    subsets = [subsets[k] for k in draw.order(len(subsets))]
    groups = {f"x{n}": width for n, width in enumerate(draw.sizes(count, WIDTHS))}
    members = [[f"x{n}" for n in range(count) if bits >> n & 1] for bits in subsets]
    return mk.SubsetFamily(groups, {f"e{i}": inside for i, inside in enumerate(members)})


def as_view(draw, tensor):
    """The values of ``tensor``, which may lie in memory in many ways; some repeat themselves."""
    kind = draw.pick(("plain", "plain", "offset", "sliced", "second", "transposed", "expanded"))
    if kind == "offset":  # of less than a vector, so that nothing is aligned
        shift = draw.upto(7, least=1)
        return torch.cat([tensor.new_zeros(shift), tensor.flatten()])[shift:].view_as(tensor)
    if tensor.dim() == 0:
        return tensor
    if kind == "sliced":
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    if kind == "second":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "expanded" and tensor.dim() > 1 and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor
