"""When two results are the same, and when one is as right as it has to be."""

import torch

from tests.fuzz.definition import SMALLEST

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor):
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def same_bits(a, b):
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


def hold(name, ours, plain, true, floor):
    """``|ours - true| <= 2 |PyTorch in the same precision - true| + floor``, or the same NaN.

    Where PyTorch overflows nothing is asked. Where ``floor`` is 0, a structural zero is.
    """
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        raise AssertionError(
            f"{name} is {ours.dtype} {tuple(ours.shape)}, not {plain.dtype} {tuple(plain.shape)}"
        )
    wide, theirs = ours.detach().double(), plain.detach().double()
    good = (wide - true).abs() <= 2 * (theirs - true).abs() + floor
    if good.all():
        return
    good |= (true.isfinite() & ~theirs.isfinite()) | torch.isinf(torch.as_tensor(floor))
    for other in (true, theirs):
        good |= (wide == other) | (wide.isnan() & other.isnan())
    for where in (~good).nonzero()[:1]:
        at = tuple(where.tolist())
        bound = floor[at] if isinstance(floor, torch.Tensor) and floor.dim() else floor
        raise AssertionError(
            f"{name}{list(at)} is {wide[at]:.9g}, the definition says {true[at]:.9g}, PyTorch "
            f"{theirs[at]:.9g}, the floor is {bound:.3g}; {int((~good).sum())} of {good.numel()} "
            "are off"
        )


def compare_values(name, ours, plain, true, off):
    info = torch.finfo(ours.dtype)
    floor = off.view(true.shape) + 4 * info.eps * true.abs() + 4 * info.smallest_normal * info.eps
    hold(name, ours, plain, true, limited(floor, true, info))


def compare_gradients(ours, plain, wanted, factor=1.0):
    """``factor``: of the loss; gradients may be made without it, in float32 at least."""
    for name, grad in ours.items():
        true, bound = factor * wanted[name][0], abs(factor) * wanted[name][1]
        info = torch.finfo(grad.dtype)
        least = info.smallest_normal * info.eps + abs(factor) * SMALLEST
        floor = bound + 4 * info.eps * true.abs() + 4 * least
        hold(f"gradient of {name}", grad, plain[name], true, limited(floor, true, info))


def limited(floor, true, info):
    """No NaN or Inf is within a floor, unless the truth is nearly too large for the type."""
    floor = floor.nan_to_num(1e300, 1e300).clamp(max=1e300)
    return floor.masked_fill(true.abs() > info.max / 4, torch.inf)


def same_twice(first, second):
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        if not same_bits(a, b):
            raise AssertionError(f"not the same bits twice, result {k}")


def must_raise(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")
