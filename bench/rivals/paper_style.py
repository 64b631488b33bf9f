"""Rival 1: one ``Linear`` per expert over its concatenated, detached sources."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels import BlockLayout


class PaperStyle:
    """``Linear(cat([h_i, *[h_j.detach()]]))`` for each expert."""

    name = "paper style"
    note = ""

    def __init__(self, layout: BlockLayout, dense: Tensor, bias: Tensor) -> None:
        self.layout = layout
        self.sizes = list(layout.row_sizes)
        self.sources = layout.row_blocks()
        blocks = dense.split(self.sizes)
        self.weights = []
        for rows, sources in zip(blocks, self.sources, strict=True):
            parts = rows.split(list(layout.col_sizes), 1)
            kept = torch.cat([parts[j] for j in sources], 1)
            self.weights.append(kept.detach().requires_grad_())
        self.biases = [b.clone().requires_grad_() for b in bias.split(self.sizes)]
        self.parameters = (*self.weights, *self.biases)

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, in)`` to ``(B, out)``."""
        h = x.split(list(self.layout.col_sizes), 1)
        held = [part.detach() for part in h]
        outputs = [
            F.linear(torch.cat([h[j] if j == i else held[j] for j in sources], 1), w, b)
            for i, (sources, w, b) in enumerate(
                zip(self.sources, self.weights, self.biases, strict=True)
            )
        ]
        return torch.cat(outputs, 1)

    def dense_grad(self) -> Tensor:
        """Gradient of the weight as ``(out, in)``."""
        dense = self.weights[0].new_zeros(self.layout.out_features, self.layout.in_features)
        columns = self.layout.col_offsets
        for i, sources in enumerate(self.sources):
            start, stop = self.layout.row_offsets[i : i + 2]
            widths = [self.layout.col_sizes[j] for j in sources]
            for j, part in zip(sources, self.weights[i].grad.split(widths, 1), strict=True):
                dense[start:stop, columns[j] : columns[j + 1]] = part
        return dense
