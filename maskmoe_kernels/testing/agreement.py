"""Agreement with the oracle: the output and every gradient, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind, described
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.checks import check_floats
from maskmoe_kernels.testing.oracle import dense_algebra, dense_oracle


def random_cotangent(shape: torch.Size, like: Tensor, seed: int) -> Tensor:
    """Normal numbers in the dtype of ``like``, on its device: ones would hide permutations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


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
    if not callable(op):
        raise LayoutError(f"op must be a function, got {described(op)}")
    check_floats(x=x, weight=weight)
    if bias is not None:
        check_floats(x=x, bias=bias)
    check_kind(BlockLayout, layout=layout)
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    double = [t.detach().double().requires_grad_() for t in inputs]
    reference = dense_oracle(*_three(double), layout, activation)
    floors = _Floors(*_three([t.detach().abs() for t in double]), layout, x.dtype)
    with torch.no_grad():
        z = dense_oracle(*_three(double), layout)
    cotangent = random_cotangent(reference.shape, x, seed)
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
