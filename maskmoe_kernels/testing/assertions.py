"""Assertions for your own models: blindness, isolated gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind, described
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.testing.agreement import random_cotangent
from maskmoe_kernels.testing.undisturbed import Undisturbed, undisturbed

#: Put into the features that an output may not see. The last one is an ordinary number.
FILLS = (math.nan, math.inf, -math.inf, 1e38, -3.0)
_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Fills = Sequence[float] | Mapping[int, Sequence[float]]


@torch.enable_grad()  # gradients are judged wherever the caller stands
def assert_blind(
    module: Callable[[Tensor], Any],
    x: Tensor,
    visible: Tensor,
    *,
    output: Callable[[Any], Tensor] | None = None,
    fills: Fills = FILLS,
    seed: int = 0,
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

    Every run starts from the same state (buffers, modes, random numbers), and afterwards the model
    is as it was before the call.

    Args:
        module: Maps ``(*, in)`` to ``(*, out)``, or to something that contains such a tensor.
        x: Input, ``(*, in)``, finite, at least one row.
        visible: Entry (o, f): may output o see feature f? ``(out, in)``, bool, tensor or array.
        output: Takes the tensor ``(*, out)`` out of what ``module`` returns, where that is a
            tuple, a dictionary or another structure: ``output=lambda returned: returned[0]``.
        fills: The values that unseen features are filled with, one after the other; or column to
            such values, for columns that hold codes (of an embedding, say), the others as by
            default. At least one of them has to change ``x`` at each unseen feature.
        seed: Of the cotangent.

    Raises:
        AssertionError: An output or a gradient depends on a feature it may not see.
        LayoutError: Arguments that do not fit each other; or two runs on the same input differ,
            so that nothing can be said.
    """
    x = _checked_input(module, x).detach()
    visible = _checked_visible(visible, x)
    per_run = _fills_of(fills, x)
    patterns, which = torch.unique(visible, dim=0, return_inverse=True)
    with undisturbed(module) as state:
        run = _Run(module, output, visible.shape[0], seed, state)
        run.check_repeatable(x)
        for k, pattern in enumerate(patterns):
            units = (which == k).nonzero().squeeze(1)
            # Features whose gradient another output may spoil: it reads them and a filled one.
            spoilers = visible[(visible & ~pattern).any(1)]
            forgiven = spoilers.any(0)
            plain = run(x, units)
            _check_fills(per_run, x, pattern)
            for values in per_run if not pattern.all() else ():
                filled = run(torch.where(pattern, x, values), units, values[~pattern])
                _compare(plain, filled, pattern, units, values, forgiven)
            # Last: an output that depends on the unseen is the clearer complaint.
            _refuse_unseen_gradient(plain.grad_x, pattern, units, "with x as given", None)


@dataclass
class _Result:
    y: Tensor  # (rows, units)
    grad_x: Tensor | None  # (rows, in)


def _checked_input(module: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    if not callable(module):
        raise LayoutError(f"module must be a function or a module, got {described(module)}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0 or not x.numel():
        shown = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise LayoutError(f"x must be a floating-point (*, in) tensor with rows, got {shown}")
    if x.is_meta:
        raise LayoutError("x must have values, got a tensor on the meta device")
    if not x.isfinite().all():
        raise LayoutError("x must be finite: the assertion itself fills in NaN and Inf")
    return x


def _checked_visible(visible: Any, x: Tensor) -> Tensor:
    try:
        matrix = torch.as_tensor(visible)
    except (TypeError, ValueError, RuntimeError):
        raise LayoutError(
            f"visible must be a bool matrix (out, in), got {type(visible).__name__}"
        ) from None
    if matrix.dtype != torch.bool or matrix.dim() != 2 or matrix.shape[1] != x.shape[-1]:
        raise LayoutError(
            f"visible must be bool (out, in) with in={x.shape[-1]}, got {matrix.dtype} "
            f"{tuple(matrix.shape)}"
        )
    if matrix.is_meta:
        raise LayoutError("visible must have values, got a tensor on the meta device")
    return matrix.to(x.device)


def _fills_of(fills: Fills, x: Tensor) -> list[Tensor]:
    """For each run, the value of every column, ``(in,)``; columns of fewer values repeat them."""
    columns = x.shape[-1]
    by_column: list[Sequence[float]] = [FILLS] * columns
    if isinstance(fills, Mapping):
        for column, values in fills.items():
            if column not in range(columns):
                raise LayoutError(f"fills names column {column!r}, but x has {columns}")
            by_column[column] = values
    else:
        by_column = [fills] * columns
    if not all(len(values) for values in by_column):
        raise LayoutError("fills must have at least one value for each column")
    top = torch.finfo(x.dtype).max
    table = [
        [min(max(v, -top), top) if math.isfinite(v) else v for v in values] for values in by_column
    ]
    runs = max(map(len, table))
    return [x.new_tensor([values[n % len(values)] for values in table]) for n in range(runs)]


def _check_fills(per_run: list[Tensor], x: Tensor, pattern: Tensor) -> None:
    changed = torch.stack([(x.reshape(-1, x.shape[-1]) != values).any(0) for values in per_run])
    for column in (~changed.any(0) & ~pattern).nonzero()[:1].flatten().tolist():
        raise LayoutError(
            f"fills leave column {column} as it is in every row of x: what it might leak cannot "
            "be seen; give another value for it"
        )


@dataclass
class _Run:
    """Runs of a module, each from the same state, and what some outputs and their gradient are."""

    module: Callable[[Tensor], Any]
    output: Callable[[Any], Tensor] | None
    out: int
    seed: int
    state: Undisturbed

    def __call__(self, x: Tensor, units: Tensor, filled_with: Tensor | None = None) -> _Result:
        self.state.restore()
        x = x.clone().requires_grad_()
        try:
            y = self.module(x)
        except Exception as error:
            if filled_with is None:
                raise
            shown = sorted({f"{value:g}" for value in filled_with.tolist()})[:6]
            raise LayoutError(
                f"module raised {type(error).__name__} with {', '.join(shown)} in its unseen "
                f"features ({error}). If a column holds codes, name the ones to fill in: "
                "fills={column: [0, 1]}; if module checks its input, leave the check out here"
            ) from error
        y = self._checked_output(y, x)
        chosen = y[..., units].reshape(-1, len(units))
        grad_x = None
        if chosen.requires_grad:
            cotangent = random_cotangent(chosen.shape, chosen, self.seed)
            (grad_x,) = torch.autograd.grad(chosen, x, cotangent, allow_unused=True)
        grad_x = None if grad_x is None else grad_x.reshape(-1, x.shape[-1])
        return _Result(chosen.detach().clone(), grad_x)

    def _checked_output(self, returned: Any, x: Tensor) -> Tensor:
        y = returned if self.output is None else self.output(returned)
        if not isinstance(y, Tensor):
            raise LayoutError(
                f"the output to judge must be a tensor, got {_described(y)}; say which with "
                "output=lambda returned: returned[0], for instance"
            )
        if y.shape != (*x.shape[:-1], self.out):
            raise LayoutError(
                f"module must map {tuple(x.shape)} to {(*x.shape[:-1], self.out)}, as visible has "
                f"{self.out} rows; it gave {tuple(y.shape)}"
            )
        return y

    def check_repeatable(self, x: Tensor) -> None:
        """Raise LayoutError if two runs on ``x`` differ: then a difference is no leak."""
        every = torch.arange(self.out, device=x.device)
        first, second = self(x, every), self(x, every)
        what = "output" if next(iter(_different_bits(first.y, second.y)), None) else None
        if what is None and first.grad_x is not None and second.grad_x is not None:
            what = "gradient" if _different_bits(first.grad_x, second.grad_x) else None
        if what is not None:
            raise LayoutError(
                f"two runs of module on the same x differ in the {what}, so a difference would "
                "show no leak: it has state that moves or random numbers of its own, which are "
                "not a module's buffer or generator. Hold them still inside the function that "
                "you pass, or judge in eval mode"
            )


def _described(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a tensor {tuple(returned.shape)}"
    if isinstance(returned, Mapping):
        inner = ", ".join(f"{key!r}: {_described(value)}" for key, value in returned.items())
        return f"a {type(returned).__name__} of {{{inner}}}"
    if isinstance(returned, (tuple, list)):
        return f"a {type(returned).__name__} of ({', '.join(map(_described, returned))})"
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        names = [field.name for field in dataclasses.fields(returned)]
        return f"a {type(returned).__name__} with {', '.join(names)}"
    return f"a {type(returned).__name__}"


def _compare(
    plain: _Result,
    filled: _Result,
    pattern: Tensor,
    units: Tensor,
    values: Tensor,
    forgiven: Tensor,
) -> None:
    shown = sorted({f"{value:g}" for value in values[~pattern].tolist()})
    what = f"with {', '.join(shown[:6])} in every unseen feature"
    for row, k in _different_bits(plain.y, filled.y):
        raise AssertionError(
            f"output {units[k]} depends on features it may not see ({_listing(~pattern)}): {what} "
            f"it changes from {plain.y[row, k]:.9g} to {filled.y[row, k]:.9g} in row {row}. Look "
            "for a product that multiplies unseen values by zero, or a normalisation over units "
            "of different subsets."
        )
    if plain.grad_x is None or filled.grad_x is None:
        return
    ordinary = bool((values[~pattern].abs() < 1e3).all())
    pardon = torch.zeros_like(forgiven) if ordinary else forgiven
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
    output: Callable[[Any], Tensor] | None = None,
    shared: Collection[str] = (),
    seed: int = 0,
) -> None:
    """Expert i's loss moves expert i's parameters only (section 3.4.2).

    The loss of expert i is a random-weighted sum of ``logits[..., i]``. No element of a
    parameter may receive a gradient from two experts. In a masked layer with one row block per
    expert, expert i may move row block i only, weights and bias; where the layer's units are
    interleaved, so that its blocks are in an order of their own, no row block may be moved by
    two experts.

    A weight of zero (of a head that starts at zero, say) and a dead unit let no gradient pass, so
    a missing detach behind them does not show. So ``net`` is judged twice: with its parameters as
    they are, and with random numbers added to them. Afterwards it is as it was before the call.

    Args:
        net: Maps ``x`` to logits ``(*, H)``, or to something that contains them.
        x: Input, or a tuple of the inputs ``net`` takes.
        family: Its experts, in the order of the logits.
        output: Takes the logits out of what ``net`` returns; see :func:`assert_blind`.
        shared: Names of parameters, as in ``net.named_parameters()``, that several experts may
            move, such as an embedding table that belongs to nobody.
        seed: Of the loss's weights, and of what is added to the parameters.

    Raises:
        AssertionError: An expert moves a parameter that is not its own.
        LayoutError: Logits that do not fit the family or carry no gradient, an unknown name in
            ``shared``, or an expert whose loss moves nothing, so that nothing can be said of it.
    """
    check_kind(nn.Module, net=net)
    check_kind(SubsetFamily, family=family)
    for part in x if isinstance(x, tuple) else (x,):
        check_kind(Tensor, x=part)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if unknown := sorted(set(shared) - set(dict(net.named_parameters()))):
        raise LayoutError(f"shared names {unknown}, but net has {sorted(named)}")
    judged = {name: p for name, p in named.items() if name not in shared}
    rows = dict(_row_blocks(net, family.num_experts))
    with undisturbed(net) as state:
        for add in (False, True):
            state.restore()
            if add:
                _add_noise(net, seed)
            returned = net(*x) if isinstance(x, tuple) else net(x)
            logits = _checked_logits(returned if output is None else output(returned), family)
            if not logits.requires_grad or not judged:
                raise LayoutError(
                    "no parameter to judge: the logits require no gradient, or all is shared"
                )
            _judge(logits, judged, rows, family, seed, still=not add)


def _add_noise(net: nn.Module, seed: int) -> None:
    # In place of the values: modules that keep a parameter elsewhere see the change, too.
    for n, parameter in enumerate(net.parameters()):
        if parameter.is_floating_point() and parameter.numel():
            noise = random_cotangent(parameter.shape, parameter, seed + 1 + n)
            size = parameter.data.double().square().mean().sqrt()
            parameter.data += noise * float(0.1 * size if 0 < size < math.inf else 0.1)


def _checked_logits(logits: Any, family: SubsetFamily) -> Tensor:
    if not isinstance(logits, Tensor):
        raise LayoutError(
            f"net must give logits, a tensor, got {_described(logits)}; say which with "
            "output=lambda returned: returned[0], for instance"
        )
    if logits.dim() == 0 or logits.shape[-1] != family.num_experts or not logits.numel():
        raise LayoutError(
            f"net must give logits (*, {family.num_experts}) of at least one row, one per "
            f"expert, got {tuple(logits.shape)}"
        )
    return logits


def _judge(
    logits: Tensor,
    named: dict[str, nn.Parameter],
    rows: dict[str, _Rows],
    family: SubsetFamily,
    seed: int,
    still: bool,
) -> None:
    """``still``: an expert whose loss moves nothing may do so with other values."""
    weights = random_cotangent(logits.shape, logits, seed)
    owners = {name: torch.full_like(p, -1, dtype=torch.int64) for name, p in named.items()}
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
        reached = [grad for grad in grads if grad is not None]
        if not still and reached and not any(grad.any() for grad in reached):
            raise LayoutError(
                f"the loss of expert {family.names[i]!r} moves no parameter, with random numbers "
                "added to them neither: whether its gradient is isolated cannot be seen. Give "
                "rows of x on which its units are not all dead"
            )


@dataclass
class _Rows:
    block: Tensor  # row block of each element of the parameter
    owner: list[int]  # expert of each row block, -1: not known yet


def _row_blocks(net: nn.Module, experts: int) -> Iterator[tuple[str, _Rows]]:
    # By what a layer has, not by its class: this package lies below the modules.
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
