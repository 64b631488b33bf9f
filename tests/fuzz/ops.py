"""A fuzzer of the registered ops: honest calls with arguments spoilt.

Exported programs name ops and bring tensors, and whoever loads one runs what a stranger wrote. So a
call may raise whatever it likes, but no argument may crash the process, take memory without end,
hang, or change what a later honest call on the same layouts computes.

Cases run in a child process, which says before each which one it is: a crash has a number.
"""

import gc
import mmap
import os
import random
import resource
import signal
import struct
from functools import cache

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialize, serialized_layout
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops import triton_support as triton

CPU = torch.device("cpu")
OPS = torch.ops.maskmoe
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
#: Beyond what the process has already: more is a bomb. (A sanitizer reserves terabytes.)
ROOM = 3 << 30
SLOW = 0.001  # share of cases that Triton's interpreter runs, some a second
SECONDS = 120  # a case that takes longer hangs
HUGE = [2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1]
EDGES = [0, 1, -1, 2, 7, -7, 31, 32, 33, 63, 64, 255, 1 << 20]
#: (float, what is not a float) views and casts of tensors.
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


class Fault(AssertionError):
    """A case that went wrong, by seed and number."""


# --- Honest calls ----------------------------------------------------------------------------


@cache
def layouts():
    """Layouts of all kinds, among them one that only claims to be large."""
    family = mk.SubsetFamily.powerset({"a": 3, "b": 5, "c": 2})
    made = [
        family.input_layout(4),
        family.hidden_layout(4, 3),
        family.hidden_layout([1, 7, 33, 16, 17, 2, 40], [33, 1, 20, 16, 3, 9, 18]),
        mk.BlockLayout([2, 3], [4, 1], torch.tensor([[1, 0], [1, 1]]).bool()),
    ]
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
    rows, cols = (torch.arange(3).repeat(n)[torch.randperm(3 * n, generator=g)] for n in (6, 9))
    made.append(mk.BlockLayout.from_mask(mask[rows][:, cols]))
    return made


@cache
def large():
    """Plans and ids of layouts that hold no weight, and units that nobody can compute."""
    most = 2**31 - 1
    none = torch.zeros(1, 1, dtype=torch.bool)
    made = [mk.BlockLayout([most], [4], none), mk.BlockLayout([4], [most], none)]
    return [(serialize(layout), layout.id) for layout in made]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@cache
def linear_calls():
    calls = []
    for number, layout in enumerate(layouts()):
        for activation in ("none", "relu", "gelu"):
            fixed = {"plan": serialized_layout(layout, CPU), "layout": layout.id}
            x, grad = normal(5, layout.in_features), normal(5, layout.out_features)
            weight, bias = normal(layout.num_weights), normal(layout.out_features)
            forward = {
                "x": x, "weight": weight, "bias": bias if number % 2 else None, **fixed,
                "out_features": layout.out_features, "activation": activation, "keep": True,
            }  # fmt: skip
            y, z = OPS.masked_linear(*forward.values())
            backward = {
                "grad_y": grad, "x": x, "weight": weight,
                "saved": z if activation == "gelu" else y, **fixed, "activation": activation,
                "need_x": True, "need_weight": True, "need_bias": True,
            }  # fmt: skip
            for name in ("masked_linear", "torch_linear", "triton_linear"):
                calls += [(name, forward), (name + "_backward", backward)]
    return calls


def mlps():
    """Inputs and parameters, plans and ids of MLPs, with and without tables."""
    family = mk.SubsetFamily.powerset({"a": 3, "b": 5, "c": 2})
    torch.manual_seed(0)
    for hidden, tables in (([5, 6], True), ([4], False), ([], False)):
        net = mk.InterpretableMLP(family, hidden)
        weights, biases = (
            [getattr(layer, name).detach().clone() for layer in net.layers]
            for name in ("weight", "bias")
        )
        inputs = {"x": normal(6, 10), "tables": [], "ids": [], "parts": [-10]}
        if tables:
            inputs = {
                "x": normal(6, 3), "tables": [normal(9, 3), normal(4, 4)],
                "ids": [torch.arange(6), torch.arange(6) % 4], "parts": [0, -2, 1, -1],
            }  # fmt: skip
        plans = {
            "plans": [serialized_layout(layer.layout, CPU) for layer in net.layers],
            "layouts": [layer.layout.id for layer in net.layers],
        }
        yield family, net, {**inputs, "weights": weights, "biases": biases}, plans


@cache
def mlp_calls():
    calls = []
    kept = []  # MLPs: their layouts have to live as long as the calls
    for family, net, inputs, plans in mlps():
        kept.append(net)
        needs = {"need_x": True, "need_tables": True, "need_weights": True}
        strict = {"strict": family.strict.clone(), "confidence": "abs", "sharpness": 1.0}
        for activation in ("relu", "silu"):
            forward = {
                **inputs, **plans, "out_features": 7, "activation": activation, "keep": True
            }  # fmt: skip
            _, saved = OPS.masked_mlp(*forward.values())
            backward = {
                "grad_logits": normal(6, 7), **inputs, "saved": saved, **plans,
                "activation": activation, **needs,
            }  # fmt: skip
            for name in ("masked_mlp", "torch_mlp"):
                calls += [(name, forward), (name + "_backward", backward)]
            whole = {**inputs, **plans, "activation": activation}
            calls.append(("masked_mlp_mixture", {**whole, **strict}))
            loss = {
                "target": (torch.arange(6) % 2).float(),
                "mask": torch.arange(6) > 0,
                "sample_weight": torch.arange(6).float(),
            }
            names = {"weighting": "selection", "normalize": "expert"}
            calls.append(("masked_mlp_gem", {**whole, **loss, **strict, **names, **needs}))
            kind = {"kind": "regression", "out_features": 7, "outputs": 1}
            calls.append(("masked_mlp_expert_loss", {**whole, **loss, **kind, **needs}))
    return calls, kept


@cache
def objective_calls():
    """The ops on logits; they have Triton kernels only."""
    if triton.unsupported_reason(CPU) is not None:
        return []
    family = mk.SubsetFamily.powerset({"a": 3, "b": 5, "c": 2})
    strict = family.strict

    def tables(relation, listed, of):
        return {listed: relation.any(1).nonzero().flatten().int(),
                of: relation[relation.any(1)].to(torch.uint8)}  # fmt: skip

    up, down = tables(strict.T, "smaller", "above"), tables(strict, "bigger", "below")
    larger, options = {"larger": family.has_larger}, {"confidence": "abs", "sharpness": 2.0}
    logits = normal(5, 7)
    forward = {"logits": logits, **up, **larger, **options}
    alpha, product = OPS.selection(*forward.values(), True)
    backward = {
        "grad_alpha": normal(5, 7), "grad_product": None, "logits": logits, "alpha": alpha,
        "product": product, **down, **larger, **options,
    }  # fmt: skip
    loss = {
        "logits": logits, "target": (torch.arange(5) % 2).float(), "mask": None,
        "sample_weight": None, **up, **larger, **options,
        "weighting": "selection", "normalize": "expert",
    }  # fmt: skip
    return [
        ("selection", {**forward, "keep": True}), ("selection_backward", backward),
        ("mixture", forward), ("gem_loss", loss),
    ]  # fmt: skip


@cache
def spline_calls():
    if native.UNSUPPORTED_REASON is not None:
        return []
    calls = []
    zuko, nflows = (0.0, 0.0, True), (1e-3, 2e-3, False)
    for elements, bins, form in ((1, 1, zuko), (7, 2, nflows), (21, 8, zuko), (21, 8, nflows)):
        of = {
            "x": normal(elements), "widths": normal(elements, bins),
            "heights": normal(elements, bins) / 2, "derivatives": normal(elements, bins - 1),
            "bound": 3.0, "slope": 1e-3,
            **dict(zip(("width", "height", "squashed"), form, strict=True)),
        }  # fmt: skip
        grads = {"grad_y": normal(elements), "grad_log_slope": -normal(elements)}
        calls += [
            ("rational_quadratic", of),
            ("rational_quadratic_inverse", of),
            ("rational_quadratic_backward", {**grads, **of}),
        ]
    return calls


# --- Corruption ------------------------------------------------------------------------------


def spoilt(draw, name, value):
    """Something else in place of an argument."""
    if isinstance(value, torch.Tensor):
        plan = name in ("plan", "plans") and draw.random() < 0.7
        return spoilt_plan(draw, value) if plan else spoilt_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        others = [layout.id for layout in layouts()] + [number for _, number in large()]
        return draw.choice([value + 1, value - 1, -value, *EDGES, *HUGE, *others])
    if isinstance(value, float):
        return draw.choice([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-300, 1e300])
    if isinstance(value, str):
        return draw.choice(["", "none", "gelu", "rare", "batch", "x" * 10000, value.upper(), "\0"])
    if isinstance(value, list):
        return spoilt_list(draw, name, value)
    assert value is None
    return draw.choice([torch.zeros(0), normal(5), torch.ones(5, 7), torch.zeros(()), True])


def spoilt_list(draw, name, values):
    how = draw.randrange(8)
    if how == 0 or not values:
        return [] if values else [draw.choice([torch.zeros(2, 2), 0, -1])]
    if how == 1:
        return values[:-1]
    if how == 2:
        return [*values, draw.choice(values)]
    if how == 3:
        return draw.sample(values, len(values))
    if how == 4:
        return values * draw.choice([2, 20])
    k = draw.randrange(len(values))
    return [*values[:k], spoilt(draw, name, values[k]), *values[k + 1 :]]


def spoilt_plan(draw, plan):
    """A plan that was tampered with, or that of another layout."""
    how = draw.randrange(8)
    if how == 0:
        return serialized_layout(draw.choice(layouts()), CPU)
    if how == 1:
        return draw.choice(large())[0].clone()
    if how == 2:
        return plan[: draw.randrange(plan.numel())].clone()
    if how == 3:
        return torch.cat([plan, plan[: draw.randrange(9)]])
    if how == 4:
        return plan.clone()  # the truth, from a stranger
    changed = plan.clone()
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(draw.choice([5, plan.numel()]))
        old = int(changed[at])
        new = [*EDGES, *HUGE, old + 1, old - 1, old ^ 1 << draw.randrange(63)]
        changed[at] = draw.choice(new)
    return changed


def spoilt_tensor(draw, t):
    ways = ["dtype", "view", "shape", "stride", "device", "sparse", "values", "one"]
    how = draw.choice(ways + ["freed"] * draw.frees)
    if how == "dtype":
        return t.to(draw.choice(DTYPES))
    if how == "view":  # the same bytes as another type: 255 as a bool
        raw = torch.full_like(t, 255, dtype=torch.uint8) if draw.random() < 0.5 else t
        return raw.contiguous().view(draw.choice(DTYPES[:-1]))
    if how == "shape":
        return reshaped(draw, t)
    if how == "stride":
        return strided(draw, t)
    if how == "device":
        return t.to("meta")
    if how == "sparse":
        return t.to_sparse() if draw.random() < 0.5 or t.dim() != 2 else t.to_sparse_csr()
    if how == "freed":  # as sharded training leaves a parameter
        freed = t.clone()
        freed.untyped_storage().resize_(draw.choice([0, 4]))
        return freed
    if how == "values":
        of = t.clone()
        if of.numel() and t.is_floating_point():
            of.view(-1)[draw.randrange(of.numel())] = draw.choice([torch.nan, torch.inf, -1e38])
        elif of.numel() and t.dtype != torch.bool:
            bad = [v for v in [*EDGES, *HUGE] if torch.iinfo(t.dtype).min <= v]
            bad = [v for v in bad if v <= torch.iinfo(t.dtype).max]
            of.view(-1)[draw.randrange(of.numel())] = draw.choice(bad)
        return of
    return t.new_zeros(draw.choice([(), (0,), (1,), (0, 0), (1, 0), (3, 2)]))


def reshaped(draw, t):
    how = draw.randrange(7)
    if how == 0:
        return t.unsqueeze(draw.randint(0, t.dim()))
    if how == 1:
        return t.reshape(-1)
    if how == 2 and t.dim():
        d = draw.randrange(t.dim())
        return t.narrow(d, 0, draw.randint(0, t.size(d))).clone()
    if how == 3 and t.dim():
        return torch.cat([t, t], draw.randrange(t.dim()))
    if how == 4 and t.dim():
        return t.transpose(0, -1)
    if how == 5:
        return t.reshape([1] * draw.choice([3, 20, 63]) + list(t.shape))
    return t.reshape(-1)[: draw.choice([0, 1, 2])]


def strided(draw, t):
    """Rows that overlap, lie apart, or are one and the same; many, where memory is bounded."""
    how = draw.randrange(5)
    if how == 0 or not t.numel():
        return t.new_zeros((1,) * t.dim()).expand(t.shape)
    if how == 1 and t.dim():
        return torch.stack([t, t], -1)[..., 0]
    if how == 2:
        return t.as_strided(t.shape, [draw.choice([0, 1])] * t.dim())
    if how == 3 and t.dim() and draw.many:
        many = draw.choice([2**12, 2**33, 2**40])
        return t.reshape(-1)[:1].expand(many, *t.shape[1:]) if t.dim() == 1 else (
            t[:1].expand(many, *t.shape[1:]))  # fmt: skip
    return t.clone().as_strided(t.shape, t.stride(), 0).flip(0) if t.dim() else t.clone()


# --- One case --------------------------------------------------------------------------------


@cache
def all_calls():
    """Ops by name with their honest calls. The interpreter of Triton is slow: it gets its share."""
    compiled = [*linear_calls(), *mlp_calls()[0], *spline_calls()]
    slow = [call for call in compiled if call[0].startswith("triton")]
    fast = [call for call in compiled if not call[0].startswith("triton")]
    if triton.unsupported_reason(CPU) is not None:
        slow = []  # without its interpreter the op refuses what is on the CPU
    return fast, [*slow, *objective_calls()]


def called(name, arguments):
    """All tensors that an op returns; it may change none of its arguments."""
    with torch.no_grad():
        found = getattr(OPS, name)(*arguments.values())
    return list(found) if isinstance(found, (tuple, list)) else [found]


@cache
def truth(name, number):
    fast, slow = all_calls()
    return called(*(fast + slow)[number])


def check(seed, number):
    """Raises where the case has a fault; crashes where it has a worse one."""
    draw = random.Random(f"{seed} {number}")
    fast, slow = all_calls()
    some_slow = slow and draw.random() < SLOW
    k = len(fast) + draw.randrange(len(slow)) if some_slow else draw.randrange(len(fast))
    name, honest = (fast + slow)[k]
    expected = truth(name, k)
    spoilt_names = draw.sample(sorted(honest), min(draw.choice([1, 1, 1, 2, 2, 3]), len(honest)))
    # PyTorch itself crashes where memory was freed under a tensor; compiled kernels look first.
    draw.many = not SANITIZED and not some_slow
    draw.frees = name.startswith(("masked", "rational")) and len(spoilt_names) == 1
    arguments = dict(honest)
    try:
        for argument in spoilt_names:
            arguments[argument] = spoilt(draw, argument, honest[argument])
        for found in called(name, arguments):
            if found.device == CPU and found.numel() < 1 << 24:
                found.double().sum() if not found.is_complex() else found.abs().sum()
    except Exception:  # an error is an answer
        arguments = None
    del arguments
    again = called(name, honest)
    for a, b in zip(expected, again, strict=True):
        if a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
            raise Fault(f"{name} with {spoilt_names} spoilt changed an honest call")


# --- Children --------------------------------------------------------------------------------


def run(cases, seed=0, start=0):
    """Try ``cases`` cases from number ``start``, each a function of ``seed`` and its number.

    Raises:
        Fault: The first case with a fault.
    """
    all_calls()
    gc.freeze()
    at = mmap.mmap(-1, 8)  # which case is on
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            _work(range(start, start + cases), seed, at)
            code = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        told = said.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return
    number = struct.unpack("q", at[:])[0]
    if os.WIFSIGNALED(status):
        told = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    raise Fault(f"case {number} of seed {seed}: {told or f'the process left with {status}'}")


def _work(numbers, seed, at):
    torch.set_num_threads(1)
    if not SANITIZED:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM,) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in numbers:
        at[:] = struct.pack("q", number)
        signal.alarm(SECONDS)
        check(seed, number)
    signal.alarm(0)
