"""The interpretable multi-layer perceptron (section 3.4)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.nn.linear import MaskedLinear


class InterpretableMLP(nn.Module):
    """All experts of a family as one network: expert i's logit is a function of S_i alone.

    Expert i's loss moves expert i's parameters alone, although larger experts read its units.

    Args:
        family: The subsets; the input is its groups side by side.
        hidden: Units per expert of each hidden layer; each entry an int, or one per expert.
        activation: Of the hidden layers; see :func:`masked_linear`.
        input_layout: First layer's layout if not ``family.input_layout(hidden[0])``, for
            instance one that routes the gradient to the smallest subsets only.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: A width or an ``input_layout`` that does not fit the family, or an
            ``input_layout`` through which an expert sees a group outside its subset.

    Example:
        >>> family = SubsetFamily.powerset({"a": 2, "b": 3})
        >>> net = InterpretableMLP(family, hidden=[16, 16])
        >>> net(torch.randn(5, 5)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        family: SubsetFamily,
        hidden: Sequence[Width] = (16, 16),
        activation: str | None = "relu",
        *,
        input_layout: BlockLayout | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        if not isinstance(hidden, Iterable) or isinstance(hidden, str):
            raise LayoutError(
                f"hidden must be a sequence with one entry per hidden layer, got {hidden!r}; write "
                f"[{hidden!r}] for a single layer"
            )
        widths: list[Width] = [*hidden, 1]
        default = family.input_layout(widths[0])
        if input_layout is not None:
            _refuse_unfit(input_layout, default)
        layouts = [default if input_layout is None else input_layout]
        layouts += [family.hidden_layout(a, b) for a, b in itertools.pairwise(widths)]
        last = len(layouts) - 1
        self.layers = nn.Sequential(
            *(
                MaskedLinear.from_layout(
                    layout,
                    activation=None if k == last else activation,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
                for k, layout in enumerate(layouts)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Input ``(*, family.in_features)`` to logits ``(*, H)``."""
        logits: Tensor = self.layers(x)
        return logits


def _refuse_unfit(given: BlockLayout, default: BlockLayout) -> None:
    shape = (default.out_features, default.in_features)
    if (given.out_features, given.in_features) != shape:
        raise LayoutError(
            f"input_layout must be (units of the first layer, input features) = {shape}, got "
            f"{(given.out_features, given.in_features)}"
        )
    beyond = (given.mask() & ~default.mask()).nonzero()
    if beyond.numel():
        raise LayoutError(
            f"input_layout lets {len(beyond)} weights see features outside their expert's subset, "
            f"the first at (unit, feature) {tuple(beyond[0].tolist())}; take away from "
            "family.input_layout(hidden[0]), add nothing to it"
        )
