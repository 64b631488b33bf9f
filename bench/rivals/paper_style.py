"""Rival 1: one ``Linear`` per expert over its concatenated, detached sources."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contender import Compiled, CompiledGraphs, Layer
from bench.problem import Problem
from bench.rivals.registry import register


@register
class PaperStyle(Layer):
    """``Linear(cat([h_i, *[h_j.detach()]]))`` for each expert.

    On any other layout an expert's input is detached wherever its block routes no gradient.
    """

    name = "paper style"
    number = "1"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        layout = problem.layout
        self.widths = list(layout.col_sizes)
        routed = layout.routes_grad.tolist()
        self.sources = [
            [(j, routed[i][j]) for j in sources] for i, sources in enumerate(problem.sources)
        ]
        matrices = problem.row_matrices(problem.compact.detach())
        biases = problem.bias.detach().split(list(layout.row_sizes))
        self.weights = [matrix.requires_grad_() for matrix in matrices]
        self.biases = [bias.requires_grad_() for bias in biases]
        self.parameters = (*self.weights, *self.biases)

    @classmethod
    def flops(cls, problem: Problem) -> int:
        # Autograd computes the gradient of all sources, and drops that of the detached ones.
        return 6 * problem.batch * problem.layout.num_weights

    def __call__(self, x: Tensor) -> Tensor:
        h = x.split(self.widths, 1)
        held = [part.detach() for part in h]
        outputs = []
        for sources, weight, bias in zip(self.sources, self.weights, self.biases, strict=True):
            seen = [h[j] if routed else held[j] for j, routed in sources]
            whole = seen[0] if len(seen) == 1 else torch.cat(seen, 1)
            outputs.append(F.linear(whole, weight, bias))
        return torch.cat(outputs, 1)

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        count = len(self.weights)
        return torch.cat([g.reshape(-1) for g in grads[:count]]), torch.cat(grads[count:])


@register
class PaperStyleCompiled(Compiled, PaperStyle):
    """The same under ``torch.compile``."""

    name = "paper style, compiled"


@register
class PaperStyleReduceOverhead(CompiledGraphs, PaperStyle):
    """The same under ``torch.compile(mode="reduce-overhead")``."""

    name = "paper style, reduce-overhead"


@register
class PaperStyleMaxAutotune(CompiledGraphs, PaperStyle):
    """The same under ``torch.compile(mode="max-autotune")``."""

    name = "paper style, max-autotune"
    mode = "max-autotune"
