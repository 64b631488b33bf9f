"""Layer normalisation of each expert's own units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import block_sizes, check_kind
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.ops.checks import check_floats


class ExpertNorm(nn.Module):
    """Layer norm over each expert's own units; a norm over all units would mix subsets.

    For expert i with units u, ``y_u = (x_u - mean_i) / sqrt(var_i + eps) * weight_u + bias_u``;
    mean and (biased) variance are over the units of expert i.

    Args:
        family: The subsets, one expert each.
        width: Units per expert; an int, or one per expert. A single unit is its own mean, so an
            expert of width 1 gives its bias.
        eps: Added to the variance.
        elementwise_affine: Whether to learn ``weight`` and ``bias``.
        bias: Whether to learn ``bias``.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Attributes:
        weight: ``(units,)`` or ``None``.
        bias: ``(units,)`` or ``None``.

    Raises:
        LayoutError: A width that does not fit the family.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        family: SubsetFamily,
        width: Width,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_kind(SubsetFamily, family=family)
        self.widths = block_sizes("width", width, family.num_experts)
        self.features = sum(self.widths)
        self.eps = eps
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(self.features, device=device, dtype=dtype))
            self.register_parameter(name, value if wanted else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Ones and zeros, as ``nn.LayerNorm``."""
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``(*, units)`` to ``(*, units)``.

        Raises:
            LayoutError: The last dimension is not the experts' units.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            check_floats(x=x)
        if self.weight is not None and x.device != self.weight.device:
            check_floats(x=x, weight=self.weight)
        if x.dim() == 0 or x.shape[-1] != self.features:
            raise LayoutError(f"x must be (*, {self.features}), got {tuple(x.shape)}")
        y = self._normalised(x)
        if self.weight is None:
            return y
        if self.bias is None:
            return y * self.weight
        return torch.addcmul(self.bias, y, self.weight)

    def _normalised(self, x: Tensor) -> Tensor:
        width = self.widths[0]
        if all(other == width for other in self.widths):
            y = F.layer_norm(x.unflatten(-1, (len(self.widths), width)), (width,), eps=self.eps)
            return y.flatten(-2)
        parts = x.split_with_sizes(self.widths, -1)
        return torch.cat([F.layer_norm(part, part.shape[-1:], eps=self.eps) for part in parts], -1)

    def extra_repr(self) -> str:
        """Widths and switches, for ``print(layer)``."""
        return f"widths={self.widths}, eps={self.eps}, affine={self.weight is not None}"
