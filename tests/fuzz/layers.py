"""Random masked linear layers against their definition: values, gradients, blindness, bits.

Layouts come from a pool that the seed draws, of which a case takes one. So cases share layouts and
what is kept for them (plans, compiled panels, chosen routes), as layers of a model do; numbers and
everything else are a case's own.
"""

import pickle
from functools import lru_cache

import torch
import torch.nn.functional as F

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import deserialize, serialize
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_linear import reference
from maskmoe_kernels.testing.agreement import _Floors
from maskmoe_kernels.testing.oracle import dense_algebra, dense_oracle
from tests.fuzz.cases import (
    Draw,
    as_view,
    draw_family,
    draw_isa,
    flushes,
    on_threads,
    run_cases,
)
from tests.fuzz.compare import hold, same_bits

POOL = 400
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("native", "native", None, "torch", "reference")
ACTIVATIONS = (None, "relu", "leaky_relu", "gelu", "tanh", "silu")
# Their derivative at a non-finite z times a zero cotangent is zero, not NaN.
FLAT = (None, "relu", "leaky_relu")
FILLS = (torch.nan, torch.inf, -torch.inf, 1e38)
NAMES = ("x", "weight", "bias")


def run(cases: int, seed: int = 0, start: int = 0) -> None:
    """Check ``cases`` cases from number ``start`` on; raise on the first fault."""
    run_cases(check, cases, seed, start)


def check(seed, number):
    """One layer on one batch."""
    case = Case(seed, number)
    if case.backend == "native" and case.refused:
        refuses(case)
        return
    first = case.call()
    case.compare(first)
    kept = [t.clone() for t in case.tensors()]
    again = case.call()
    if not all(map(same_bits, first, again)):
        raise AssertionError(f"not the same bits twice: {case}")
    with torch.no_grad(), on_threads(case.threads):
        if not same_bits(case.output(*case.inputs), first[0]):
            raise AssertionError(f"other bits without a graph: {case}")
    if not all(map(same_bits, kept, case.tensors())):
        raise AssertionError(f"an input was changed: {case}")
    if case.blind is not None:
        case.check_blindness()


def refuses(case):
    try:
        case.call()
    except mk.BackendError:
        return
    raise AssertionError(f"a backend that cannot run ran: {case}")


# --- Layouts -------------------------------------------------------------------------------------


class Judge:
    """The definition on one layout, in any precision; fast for what is finite.

    It is held to ``dense_oracle`` when it is made.
    """

    def __init__(self, layout):
        self.layout = layout
        self.mask, self.routed = layout.mask(), layout.grad_mask()
        for other in (deserialize(serialize(layout)), pickle.loads(pickle.dumps(layout))):
            if other != layout or other.id != layout.id or other.packing_id != layout.packing_id:
                raise AssertionError(f"a copy of {layout} is another")
        self.index = layout.weight_index(torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        shapes = (3, layout.in_features), (layout.num_weights,), (layout.out_features,)
        x, weight, bias, cotangent = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in (*shapes, (3, layout.out_features))
        )
        ours = self.finite(x, weight, bias, cotangent, "tanh")
        theirs = self.any(x, weight, bias, cotangent, "tanh", dense_oracle)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def dense(self, weight):
        layout = self.layout
        flat = weight.new_zeros(layout.out_features * layout.in_features)
        flat[self.index] = weight
        return flat.view(layout.out_features, layout.in_features)

    def finite(self, x, weight, bias, cotangent, activation):
        """Output and gradients to x, weight and bias, where absent weights meet finite values."""
        dense = self.dense(weight)
        z = F.linear(x, dense, bias)
        y, grad_z = z, cotangent
        if activation is not None:
            with torch.enable_grad():
                y = reference.ACTIVATIONS[activation](z.requires_grad_())
            (grad_z,) = torch.autograd.grad(y, z, cotangent)
        grad_x = grad_z @ (dense * self.routed)
        grad_weight = (grad_z.t() @ x).view(-1)[self.index]
        return y.detach(), grad_x, grad_weight, grad_z.sum(0)

    def any(self, x, weight, bias, cotangent, activation, definition=dense_algebra):
        """The same by ``definition``, where unseen values are not touched."""
        bias = weight.new_zeros(self.layout.out_features) if bias is None else bias
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = definition(*leaves, self.layout, activation)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)


@lru_cache(maxsize=2 * POOL)
def judge(seed, index):
    """Number ``index`` of the pool of ``seed``."""
    draw = Draw(seed, index, stream=1)
    return Judge(draw.pick((_input, _hidden, _between, _mask, _mask, _direct))(draw))


def _input(draw):
    family = draw_family(draw)
    widths = draw.sizes(family.num_experts, (1, 2, 3, 7))
    return family.input_layout(widths, strict=draw.chance(0.5))


def _hidden(draw):
    family = draw_family(draw)
    return family.hidden_layout(*(draw.sizes(family.num_experts, (1, 2, 3, 9)) for _ in range(2)))


def _between(draw):
    rows, cols = draw_family(draw), draw_family(draw)  # x0 is a group of both
    return mk.BlockLayout.between(rows, cols, draw.upto(4, 1), draw.sizes(cols.num_experts, (1, 5)))


def _mask(draw):
    rows, cols = (draw.pick((1, 2, 3, 7, 8, 15, 17, 33)) for _ in range(2))
    kind = draw.pick(("made", "random", "interleaved", "striped", "full", "none"))
    if kind == "made":
        degrees = (torch.from_numpy(draw.bits.integers(0, 5, size)) for size in (rows, cols))
        mask = next(degrees)[:, None] > next(degrees)
    elif kind == "interleaved":
        few = draw.flags((min(rows, 3), min(cols, 4)))
        mask = few[torch.arange(rows) % len(few)][:, torch.arange(cols) % few.shape[1]]
    elif kind == "striped":
        mask = torch.arange(rows)[:, None] % 3 >= torch.arange(cols) % 4
    else:
        mask = draw.flags((rows, cols), {"random": 0.4, "full": 1.1, "none": -1.0}[kind])
    if draw.chance(0.3):
        mask = mask & draw.flags((rows, 1), 0.7) & draw.flags((1, cols), 0.7)
    routed = None
    if draw.chance(0.5):
        routed = mask & draw.flags(draw.pick(((rows, cols), (rows, 1), (1, cols))))
    layout = mk.BlockLayout.from_mask(mask, routed)
    if not torch.equal(layout.mask(), mask) or (
        routed is not None and not torch.equal(layout.grad_mask(), routed)
    ):
        raise AssertionError(f"from_mask gives another mask, {layout}")
    return layout


def _direct(draw):
    rows, cols = (draw.sizes(draw.upto(4, 1), (1, 2, 7, 16, 33)) for _ in range(2))
    state = torch.from_numpy(draw.bits.integers(0, 3, (len(rows), len(cols))))
    orders = [draw.order(sum(of)) if draw.chance(0.3) else None for of in (rows, cols)]
    return mk.BlockLayout(
        rows, cols, state > 0, state > 1, row_order=orders[0], col_order=orders[1]
    )


# --- A case --------------------------------------------------------------------------------------


def numbers(draw, dtype, *shape):
    """Values of one kind: ordinary, tiny, huge, whole ones with zeros of both signs, zeros."""
    kind = draw.pick(("ordinary",) * 6 + ("wide", "whole", "tiny", "huge", "zero"))
    if kind == "tiny" and flushes(dtype):
        kind = "ordinary"
    values = draw.normal(*shape)
    if kind == "wide":
        values *= 10.0 ** draw.normal(*shape)
    elif kind == "whole":
        values = values.round()  # -0.0 among them
    elif kind == "zero":
        values *= draw.pick((0.0, -0.0))
    elif kind in ("tiny", "huge"):
        info = torch.finfo(dtype)
        values *= info.smallest_normal if kind == "tiny" else info.max**0.5
    return values.to(dtype)


def leading(draw):
    if draw.chance(0.02):
        return (draw.pick((100, 300, 1000, 2000)),)
    few = (0, 1, 1, 2, 3, 5, 8, 9, 16, 17, 33)
    rows = (draw.pick(few),)
    return draw.pick(((), rows, rows, rows, rows, (2, 3), (2, 1, 4)))


class Case:
    """What is drawn for one number, and the checks of it."""

    def __init__(self, seed, number):
        draw = Draw(seed, number)
        draw_isa(draw)
        self.judge = judge(seed, draw.upto(POOL - 1))
        self.layout = layout = self.judge.layout
        self.dtype, self.backend = draw.pick(DTYPES), draw.pick(BACKENDS)
        self.refused = self.dtype == torch.float64 or native.UNSUPPORTED_REASON is not None
        self.activation = draw.pick(ACTIVATIONS)
        shape = leading(draw)
        # Threads for few rows have nothing to share, and cost more than the rest of the case.
        self.threads = draw.pick((1, 2, 4)) if sum(shape) > 50 or draw.chance(0.01) else 1
        x = numbers(draw, self.dtype, *shape, layout.in_features)
        weight = numbers(draw, self.dtype, layout.num_weights)
        bias = numbers(draw, self.dtype, layout.out_features) if draw.chance(0.8) else None
        self.blind = self._blind_units(draw) if draw.chance(0.4) else None
        # NaN and infinities anywhere: seen, or where some units see them.
        self.spoilt = draw.chance(0.15) and x.numel() > 0
        if self.spoilt:
            x[draw.flags(x.shape, 0.1)] = draw.pick(FILLS[:3])
        self.inputs = [None if t is None else as_view(draw, t) for t in (x, weight, bias)]
        self.needs = [t is not None and draw.chance(0.7) for t in self.inputs]
        self.module = draw.chance(0.2)
        cotangent = draw.normal(*shape, layout.out_features).to(self.dtype)
        self.cotangent = as_view(draw, cotangent)
        if self.activation in ("relu", "leaky_relu"):
            self._keep_away_from_kinks()

    def __str__(self):
        shapes = [None if t is None else (*t.shape, t.stride()) for t in self.inputs]
        return (
            f"{self.layout}, {self.dtype}, backend {self.backend}, {self.activation}, {shapes}, "
            f"gradients {self.needs}, {self.threads} threads"
        )

    def tensors(self):
        return [t for t in (*self.inputs, self.cotangent) if t is not None]

    def _blind_units(self, draw):
        """Features to spoil and the units that see none of them; None: all see some."""
        unit = draw.upto(self.layout.out_features - 1)
        features = ~self.judge.mask[unit] & draw.flags(self.layout.in_features)
        blind = ~(self.judge.mask & features).any(1)
        return (features, blind, draw.pick(FILLS)) if features.any() else None

    def _floors(self):
        flat = self.inputs[0].reshape(-1, self.layout.in_features)
        wide = [None if t is None else t.double().abs() for t in (flat, *self.inputs[1:])]
        return _Floors(*wide, self.layout, self.dtype)

    def _keep_away_from_kinks(self):
        """No cotangent where z is within rounding of 0: there, its sign is luck."""
        x, weight, bias = (None if t is None else t.double() for t in self.inputs)
        z = dense_oracle(x, weight, bias, self.layout)
        near = ~(z.abs() > 4 * self._floors().output.view(z.shape))
        if z.dim() > 1 and self.cotangent.stride(0) == 0:  # all rows are the first
            self.cotangent[:1].masked_fill_(near.any(0, keepdim=True), 0)
        else:
            self.cotangent.masked_fill_(near, 0)

    def output(self, x, weight, bias):
        if not self.module:
            return mk.masked_linear(x, weight, bias, self.layout, self.activation, self.backend)
        layer = mk.MaskedLinear.from_layout(
            self.layout, bias is not None, activation=self.activation, backend=self.backend,
            dtype=self.dtype,
        )  # fmt: skip
        state = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(layer, state, (x,))

    def call(self, x=None, cotangent=None):
        """Output and the gradients that are asked for, None for the others."""
        given = [self.inputs[0] if x is None else x, *self.inputs[1:]]
        leaves = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(given, self.needs, strict=True)
        ]
        with on_threads(self.threads):
            y = self.output(*leaves)
            if y.requires_grad != any(self.needs):
                raise AssertionError(f"y.requires_grad is {y.requires_grad}: {self}")
            if y.requires_grad:
                y.backward(self.cotangent if cotangent is None else cotangent)
        for name, leaf, needed in zip(NAMES, leaves, self.needs, strict=True):
            grad = None if leaf is None else leaf.grad
            if (grad is not None) != needed:
                raise AssertionError(f"the gradient of {name} is {grad}: {self}")
        return [y.detach(), *(None if t is None else t.grad for t in leaves)]

    def compare(self, found):
        """Hold output and gradients to the definition."""
        if not found[0].is_contiguous():
            raise AssertionError(f"y has strides {found[0].stride()}: {self}")
        out = self.layout.out_features
        x = self.inputs[0].reshape(-1, self.layout.in_features)
        given = (x, *self.inputs[1:], self.cotangent.reshape(-1, out))
        wide = [None if t is None else t.double() for t in given]
        of = self.judge.any if self.spoilt else self.judge.finite
        true, plain = of(*wide, self.activation), of(*given, self.activation)
        floors = self._floors()
        bounds = floors.gradients(wide[3], self.activation)
        bounds = [floors.output, *(bounds[f"grad_{name}"] for name in NAMES)]
        for k in (2, 3):  # long sums, whose terms may all be the same, and be rounded alike
            bounds[k] = bounds[k] * (1 + len(x) / 32)
        # What is nearly too large for the dtype may be infinite on one way and not on another.
        overflow = torch.finfo(self.dtype).max * torch.finfo(self.dtype).eps
        wider = 16 if self.dtype == torch.float64 else 1  # the definition rounds as well
        for name, ours, theirs, ref, floor in zip(
            ("y", *NAMES), found, plain, true, bounds, strict=True
        ):
            if ours is not None:
                floor = wider * floor.masked_fill(~(floor < overflow), torch.inf)
                flat = ours.reshape(theirs.shape)
                try:
                    hold(name, flat, theirs, ref, floor)
                except AssertionError as error:
                    raise AssertionError(f"{error}: {self}") from None

    def check_blindness(self):
        """What lies in features that a unit does not see changes no bit of what is its own."""
        features, blind, fill = self.blind
        plain = self.inputs[0].masked_fill(features, 1.0)  # with the strides of the other
        spoilt = self.inputs[0].masked_fill(features, min(fill, torch.finfo(self.dtype).max))
        cotangent = self.cotangent.masked_fill(~blind, 0)
        before, after = self.call(plain, cotangent), self.call(spoilt, cotangent)
        alike = [(before[0][..., blind], after[0][..., blind], "y")]
        if self.activation in FLAT and not self.spoilt:
            # Zero cotangents of units that see them; their z, here and now, may be infinite.
            weights = self.layout.pack(blind[:, None].expand(self.judge.mask.shape).contiguous())
            alike.append((before[1], after[1], "x"))
            alike.append((*(None if g is None else g[weights] for g in (before[2], after[2])), "w"))
            alike.append((before[3], after[3], "bias"))
        for a, b, name in alike:
            if not same_bits(a, b):
                raise AssertionError(f"{fill} in unseen features changes {name}: {self}")
        if fill != fill and spoilt.numel() and not self.spoilt:
            seen = (self.judge.mask & features).any(1)
            clean = before[0].isfinite()
            if not torch.equal(after[0].isnan() & clean, seen.expand_as(clean) & clean):
                raise AssertionError(f"NaN is not where it is seen: {self}")
