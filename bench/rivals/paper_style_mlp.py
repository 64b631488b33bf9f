"""Rival 1 as a whole network: a list of ``nn.Linear`` an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels import BlockLayout, InterpretableMLP
from maskmoe_kernels.models import InterpretableNCF


class PaperStyleMLP(nn.Module):
    """The same function and the same weights as an :class:`InterpretableMLP` with relu.

    The activations of each expert stay one tensor from the input to the logit, so nothing is
    concatenated but what an expert reads.

    Args:
        model: Whose weights to take.
    """

    def __init__(self, model: InterpretableMLP) -> None:
        super().__init__()
        self.family = model.family
        self.group_sizes = [*model.family.groups.values()]
        self.layers = nn.ModuleList()  # of a list each
        self.sources: list[list[list[tuple[int, bool]]]] = []
        layers: Any = model.layers
        for layer in layers:
            layout: BlockLayout = layer.layout
            routed = layout.routes_grad.tolist()
            sources = layout.row_blocks()
            self.sources.append([[(j, routed[i][j]) for j in of] for i, of in enumerate(sources)])
            self.layers.append(_linears(layout, layer.dense_weight().detach(), layer.bias.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, H)`` of ``(B, family.in_features)``."""
        return self.of_groups(x.split(self.group_sizes, -1))

    def of_groups(self, groups: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, H)`` of every group's features."""
        h = [*groups]
        last = len(self.sources) - 1
        layer: Any
        for k, (layer, sources) in enumerate(zip(self.layers, self.sources, strict=True)):
            held = [part.detach() for part in h]
            seen = [
                torch.cat([h[j] if routed else held[j] for j, routed in of], -1)
                if len(of) > 1
                else h[of[0][0]]
                for of in sources
            ]
            h = [linear(x) for linear, x in zip(layer, seen, strict=True)]
            if k < last:
                h = [torch.relu(part) for part in h]
        return torch.cat(h, -1)


class PaperStyleNCF(nn.Module):
    """The same function and the same weights as an :class:`InterpretableNCF`.

    Args:
        model: Whose weights to take.
    """

    def __init__(self, model: InterpretableNCF) -> None:
        super().__init__()
        self.inputs, self.family = model.inputs, model.family
        self.experts = PaperStyleMLP(model.experts)

    def forward(self, user: Tensor, item: Tensor, codes: Tensor, numeric: Tensor) -> Tensor:
        """Logits ``(B, 4)``; arguments as :class:`InterpretableNCF`."""
        inputs: Any = self.inputs
        groups = [inputs.content(codes, numeric), inputs.user(user), inputs.item(item)]
        return self.experts.of_groups(groups)


def _linears(layout: BlockLayout, weight: Tensor, bias: Tensor) -> nn.ModuleList:
    """One ``nn.Linear`` a row block, over its sources side by side."""
    linears = nn.ModuleList()
    rows = zip(
        weight.split(list(layout.row_sizes)),
        bias.split(list(layout.row_sizes)),
        layout.row_blocks(),
        strict=True,
    )
    for own, own_bias, sources in rows:
        parts = own.split(list(layout.col_sizes), 1)
        kept = torch.cat([parts[j] for j in sources], 1)
        linear = nn.Linear(kept.shape[1], len(kept))
        linear.weight = nn.Parameter(kept.clone())
        linear.bias = nn.Parameter(own_bias.clone())
        linears.append(linear)
    return linears
