"""Assertions for your own models: blindness, isolated gradients, agreement with the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.testing.oracle import dense_algebra, dense_oracle

# Put into the features that an output may not see. The last one is an ordinary number.
_FILLS = (float("nan"), float("inf"), float("-inf"), 1e38, -3.0)
_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.enable_grad()  # gradients are judged wherever the caller stands
def assert_blind(
    module: Callable[[Tensor], Tensor], x: Tensor, visible: Tensor, *, seed: int = 0
) -> None:
    """Nothing in an unseen feature may reach an output, forward or backward, bit for bit.

    For each distinct row of ``visible``, every unseen feature of ``x`` is filled with NaN, +Inf,
    -Inf, 1e38 (the dtype's largest value if that is smaller) and an ordinary number. The outputs
    of that row must keep every bit. For a random cotangent on them, the gradient to ``x`` must
    be zero at unseen features and keep every bit at seen ones.

    One thing is forgiven. Other outputs read the filled features, and an activation such as tanh
    turns their zero cotangent into 0 * NaN on the way back. So with a non-finite fill, or one
    that may overflow, the gradient may be NaN at features that such an output reads; the
    ordinary number then decides.

    Args:
        module: Maps ``(*, in)`` to ``(*, out)``; random layers draw the same each time.
        x: Input, ``(*, in)``, finite, at least one row.
        visible: Entry (o, f): may output o see feature f? ``(out, in)``, bool.
        seed: Of the cotangent.

    Raises:
        AssertionError: An output or a gradient depends on a feature it may not see.
        LayoutError: Arguments that do not fit each other.
    """
    x = _checked_input(x).detach()
    if visible.dtype != torch.bool or visible.dim() != 2 or visible.shape[1] != x.shape[-1]:
        raise LayoutError(
            f"visible must be bool (out, in) with in={x.shape[-1]}, got {visible.dtype} "
            f"{tuple(visible.shape)}"
        )
    visible = visible.to(x.device)
    patterns, which = torch.unique(visible, dim=0, return_inverse=True)
    for k, pattern in enumerate(patterns):
        units = (which == k).nonzero().squeeze(1)
        # Features whose gradient another output may spoil: it reads them and a filled one.
        spoilers = visible[(visible & ~pattern).any(1)]
        forgiven = spoilers.any(0)
        plain = _run(module, x, units, visible.shape[0], seed)
        for fill in _FILLS if not pattern.all() else ():
            value = min(fill, torch.finfo(x.dtype).max) if math.isfinite(fill) else fill
            filled = _run(module, x.masked_fill(~pattern, value), units, visible.shape[0], seed)
            _compare(plain, filled, pattern, units, value, forgiven)
        # Last: an output that depends on the unseen is the clearer complaint.
        _refuse_unseen_gradient(plain.grad_x, pattern, units, "with x as given", None)


@dataclass
class _Result:
    y: Tensor  # (rows, units)
    grad_x: Tensor | None  # (rows, in)


def _checked_input(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0 or not x.numel():
        shown = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise LayoutError(f"x must be a floating-point (*, in) tensor with rows, got {shown}")
    if not x.isfinite().all():
        raise LayoutError("x must be finite: the assertion itself fills in NaN and Inf")
    return x


def _run(
    module: Callable[[Tensor], Tensor], x: Tensor, units: Tensor, out: int, seed: int
) -> _Result:
    x = x.clone().requires_grad_()
    # Every run starts from the caller's random state and gives it back.
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        y = module(x)
    if y.shape != (*x.shape[:-1], out):
        raise LayoutError(
            f"module must map {tuple(x.shape)} to {(*x.shape[:-1], out)}, as visible has {out} "
            f"rows; it gave {tuple(y.shape)}"
        )
    chosen = y[..., units].reshape(-1, len(units))
    grad_x = None
    if chosen.requires_grad:
        cotangent = _normal(chosen.shape, chosen, seed)
        (grad_x,) = torch.autograd.grad(chosen, x, cotangent, allow_unused=True)
    return _Result(chosen.detach(), None if grad_x is None else grad_x.reshape(-1, x.shape[-1]))


def _normal(shape: torch.Size, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _compare(
    plain: _Result,
    filled: _Result,
    pattern: Tensor,
    units: Tensor,
    value: float,
    forgiven: Tensor,
) -> None:
    what = f"with {value:g} in every unseen feature"
    for row, k in _different_bits(plain.y, filled.y):
        raise AssertionError(
            f"output {units[k]} depends on features it may not see ({_listing(~pattern)}): {what} "
            f"it changes from {plain.y[row, k]:.9g} to {filled.y[row, k]:.9g} in row {row}. Look "
            "for a product that multiplies unseen values by zero, or a normalisation over units "
            "of different subsets."
        )
    if plain.grad_x is None or filled.grad_x is None:
        return
    pardon = forgiven if not abs(value) < 1e3 else torch.zeros_like(forgiven)
    _refuse_unseen_gradient(filled.grad_x, pattern, units, what, pardon)
    before, after = plain.grad_x, filled.grad_x
    for row, f in _different_bits(before, after):
        if pattern[f] and not (pardon[f] and after[row, f].isnan()):
            raise AssertionError(
                f"the gradient of outputs {_listing_of(units)} to feature {f}, which they see, "
                f"depends on features they may not see ({_listing(~pattern)}): {what} it changes "
                f"from {before[row, f]:.9g} to {after[row, f]:.9g} in row {row}. Look at the "
                "backward: which value of another expert does it multiply?"
            )


def _refuse_unseen_gradient(
    grad_x: Tensor | None, pattern: Tensor, units: Tensor, what: str, pardon: Tensor | None
) -> None:
    if grad_x is None:
        return
    wrong = (grad_x != 0) & ~pattern
    if pardon is not None:
        wrong &= ~(pardon & grad_x.isnan())
    for row, f in wrong.nonzero()[:1].tolist():
        raise AssertionError(
            f"the gradient of outputs {_listing_of(units)} to feature {f}, which they may not "
            f"see, is {grad_x[row, f]:.9g} instead of 0 in row {row}, {what}. Look for a path "
            "from that feature that a mask or a detach should have cut."
        )


def _different_bits(a: Tensor, b: Tensor) -> list[list[int]]:
    as_integer = _AS_INTEGER[a.element_size()]
    differ = a.contiguous().view(as_integer) != b.contiguous().view(as_integer)
    found: list[list[int]] = differ.nonzero().tolist()
    return found


def _listing(chosen: Tensor) -> str:
    return _listing_of(chosen.nonzero().squeeze(1))


def _listing_of(indices: Tensor) -> str:
    shown = ", ".join(map(str, indices[:6].tolist()))
    return shown if len(indices) <= 6 else f"{shown}, ... ({len(indices)} in all)"


@torch.enable_grad()
def assert_gradient_isolated(
    net: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    family: SubsetFamily,
    *,
    shared: Collection[str] = (),
    seed: int = 0,
) -> None:
    """Expert i's loss moves expert i's parameters only (section 3.4.2).

    The loss of expert i is a random-weighted sum of ``logits[..., i]``. No element of a
    parameter may receive a gradient from two experts. In a masked layer with one row block per
    expert, expert i may move row block i only, weights and bias; where the layer's units are
    interleaved, so that its blocks are in an order of their own, no row block may be moved by
    two experts.

    Args:
        net: Maps ``x`` to logits ``(*, H)``.
        x: Input, or a tuple of the inputs ``net`` takes.
        family: Its experts, in the order of the logits.
        shared: Names of parameters, as in ``net.named_parameters()``, that several experts may
            move, such as an embedding table that belongs to nobody.
        seed: Of the loss's weights.

    Raises:
        AssertionError: An expert moves a parameter that is not its own.
        LayoutError: Logits that do not fit the family or carry no gradient, or an unknown name
            in ``shared``.
    """
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if unknown := sorted(set(shared) - set(dict(net.named_parameters()))):
        raise LayoutError(f"shared names {unknown}, but net has {sorted(named)}")
    named = {name: p for name, p in named.items() if name not in shared}
    logits = net(*x) if isinstance(x, tuple) else net(x)
    if logits.dim() == 0 or logits.shape[-1] != family.num_experts or not logits.numel():
        raise LayoutError(
            f"net must give logits (*, {family.num_experts}) of at least one row, one per "
            f"expert, got {tuple(logits.shape)}"
        )
    if not logits.requires_grad or not named:
        raise LayoutError("no parameter to judge: the logits require no gradient, or all is shared")
    weights = _normal(logits.shape, logits, seed)
    owners = {name: torch.full_like(p, -1, dtype=torch.int64) for name, p in named.items()}
    rows = dict(_row_blocks(net, family.num_experts))
    for i in range(family.num_experts):
        grads = torch.autograd.grad(
            logits[..., i], list(named.values()), weights[..., i],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for (name, owner), grad in zip(owners.items(), grads, strict=True):
            if grad is not None:
                _claim(name, owner, grad, i, family.names)
                if name in rows:
                    _check_rows(name, rows[name], grad, i, family.names)


@dataclass
class _Rows:
    block: Tensor  # row block of each element of the parameter
    owner: list[int]  # expert of each row block, -1: not known yet


def _row_blocks(net: nn.Module, experts: int) -> Iterator[tuple[str, _Rows]]:
    # By what a layer has, not by its class: this floor lies below the modules.
    for prefix, module in net.named_modules():
        layout = getattr(module, "layout", None)
        if not isinstance(layout, BlockLayout) or len(layout.row_sizes) != experts:
            continue
        number = torch.arange(experts)
        unit = number.repeat_interleave(torch.tensor(layout.row_sizes))
        if layout.row_order is not None:
            unit = unit[layout.row_order.argsort()]
        blocks = {
            "weight": number.repeat_interleave(torch.tensor(layout.weight_offsets).diff()),
            "bias": unit,
        }
        owner = [-1] * experts if layout.row_order is not None else list(range(experts))
        for name, block in blocks.items():
            parameter = getattr(module, name, None)
            if isinstance(parameter, Tensor) and parameter.shape == block.shape:
                yield f"{prefix}.{name}" if prefix else name, _Rows(block, owner)


def _claim(name: str, owner: Tensor, grad: Tensor, i: int, names: list[str]) -> None:
    moved = grad != 0
    for where in (moved & (owner >= 0)).nonzero()[:1]:
        index = tuple(where.tolist())
        other = names[int(owner[index])]
        raise AssertionError(
            f"parameter {name!r}: element {index} is moved by the loss of expert {other!r} and by "
            f"that of expert {names[i]!r} (gradient {grad[index]:.6g}). Look for a missing detach "
            "between experts, or name the parameter in shared if it belongs to nobody."
        )
    owner[moved] = i


def _check_rows(name: str, rows: _Rows, grad: Tensor, i: int, names: list[str]) -> None:
    block = rows.block.to(grad.device)
    for b in block[grad != 0].unique().tolist():
        if rows.owner[b] == -1:
            rows.owner[b] = i
        if rows.owner[b] != i:
            index = int(((block == b) & (grad != 0)).nonzero()[0])
            raise AssertionError(
                f"parameter {name!r}: the loss of expert {names[i]!r} moves row block {b}, which "
                f"belongs to expert {names[rows.owner[b]]!r}, at element {index} (gradient "
                f"{grad[index]:.6g}). Look at the layout's routes_grad: only the diagonal may "
                "route between experts."
            )


@torch.enable_grad()
def assert_close_to_oracle(
    op: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str | None = None,
    *,
    seed: int = 0,
) -> None:
    """Hold ``op`` to :func:`dense_oracle`: the output and every gradient, element by element.

    ``|ours - ref| <= 2 |PyTorch in the same precision - ref| + floor``, where ``floor`` is four
    roundings of the sum of the absolute values that make up the element. What is zero by
    structure must be exactly zero. The cotangent is random, and zero within rounding of a kink
    of the activation, where the sign of z is luck.

    Args:
        op: Called as ``op(x, weight, bias, layout, activation)``; gives ``(*, out)``.
        x: ``(*, in_features)``; its strides are kept.
        weight: ``(layout.num_weights,)``.
        bias: ``(out_features,)`` or ``None``.
        layout: See :func:`dense_oracle`.
        activation: See :func:`dense_oracle`.
        seed: Of the cotangent.

    Raises:
        AssertionError: A value further from the oracle than the rule allows.
        LayoutError: Arguments that do not fit the layout.
    """
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    double = [t.detach().double().requires_grad_() for t in inputs]
    reference = dense_oracle(*_three(double), layout, activation)
    floors = _Floors(*_three([t.detach().abs() for t in double]), layout, x.dtype)
    with torch.no_grad():
        z = dense_oracle(*_three(double), layout)
    cotangent = _normal(reference.shape, x, seed)
    if activation in ("relu", "leaky_relu"):
        cotangent = cotangent.masked_fill(z.abs() <= 4 * floors.output, 0)
    ours = op(*_three(inputs), layout, activation)
    if ours.shape != reference.shape or ours.dtype != x.dtype:
        raise AssertionError(
            f"op gave {ours.dtype} {tuple(ours.shape)}, expected {x.dtype} {tuple(reference.shape)}"
        )
    plain = dense_algebra(*_three(inputs), layout, activation)
    grads = [
        _gradients(y, at, cotangent)
        for y, at in ((ours, inputs), (plain, inputs), (reference, double))
    ]
    _hold("output", ours, plain, reference, floors.output)
    names = ["grad_x", "grad_weight", "grad_bias"][: len(inputs)]
    bounds = floors.gradients(cotangent.double(), activation)
    for name, mine, theirs, ref in zip(names, *grads, strict=True):
        _hold(name, mine, theirs, ref, bounds[name])


def _gradients(y: Tensor, inputs: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    if not y.requires_grad:  # nothing is routed and there is no weight
        return tuple(map(torch.zeros_like, inputs))
    return torch.autograd.grad(y, inputs, cotangent.to(y.dtype), materialize_grads=True)


def _three(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None


class _Floors:
    """Four roundings of the sum of absolute values behind each element."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: BlockLayout,
        dtype: torch.dtype,
    ) -> None:
        info = torch.finfo(dtype)
        self.rounding, self.smallest = 4 * info.eps, 4 * info.smallest_normal * info.eps
        self.x, self.layout = x, layout
        self.dense = layout.unpack(weight)
        self.magnitude = x @ self.dense.t()
        if bias is not None:
            self.magnitude = self.magnitude + bias
        self.output = self._floor(self.magnitude)

    def _floor(self, magnitude: Tensor) -> Tensor:
        # Exactly zero where nothing was added up: a structural zero.
        return torch.where(magnitude == 0, 0.0, magnitude * self.rounding + self.smallest)

    def gradients(self, cotangent: Tensor, activation: str | None) -> dict[str, Tensor]:
        grad_z = cotangent.abs()
        if activation not in (None, "none"):
            grad_z = grad_z * (1.2 + self.magnitude)  # slope, and the rounding of z it is taken at
        routed = self.dense * self.layout.grad_mask().to(self.dense)
        rows = grad_z.reshape(-1, self.layout.out_features)
        grad_w = rows.t() @ self.x.reshape(-1, self.layout.in_features)
        return {
            "grad_x": self._floor(grad_z @ routed),
            "grad_weight": self._floor(self.layout.pack(grad_w)),
            "grad_bias": self._floor(rows.sum(0)),
        }


def _hold(name: str, ours: Tensor, plain: Tensor, reference: Tensor, floor: Tensor) -> None:
    error = (ours.double() - reference).abs()
    bound = 2 * (plain.double() - reference).abs() + floor
    for where in (~(error <= bound)).nonzero()[:1]:
        index = tuple(where.tolist())
        kind = "a structural zero" if floor[index] == 0 else f"allowed error {bound[index]:.3g}"
        raise AssertionError(
            f"{name}{list(index)} is {ours[index]:.9g}, the float64 oracle says "
            f"{reference[index]:.9g} ({kind}); PyTorch in {ours.dtype} gives {plain[index]:.9g}. "
            f"{int((~(error <= bound)).sum())} of {error.numel()} elements are off."
        )
