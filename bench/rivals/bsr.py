"""Rival 7: torch's own block-sparse matrix. It has no gradient for x, so forward only."""

from __future__ import annotations

import importlib
import warnings
from itertools import accumulate

import torch
from torch import Tensor

from bench.contender import Layer, Unavailable
from bench.problem import Problem
from bench.rivals.registry import register


@register
class Bsr(Layer):
    """``W.to_sparse_bsr((d, d)) @ x.T``, the matrix built beforehand."""

    name = "BSR"
    number = "7"
    note = "forward only; its output is a transposed view"
    exact = False
    phases = ("forward",)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        d = problem.width
        if d is None:
            raise Unavailable("needs blocks of one size")
        matrices = problem.row_matrices(problem.compact.detach())
        # The blocks that W.to_sparse_bsr((d, d)) would find; W itself may not fit into memory.
        blocks = [block for matrix in matrices for block in matrix.split(d, 1)]
        ends = [0, *accumulate(len(sources) for sources in problem.sources)]
        columns = [j for sources in problem.sources for j in sources]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
            self.weight = torch.sparse_bsr_tensor(
                torch.tensor(ends, device=problem.device),
                torch.tensor(columns, device=problem.device),
                torch.stack(blocks),
                size=(problem.layout.out_features, problem.layout.in_features),
                check_invariants=True,
            )
        if problem.device.type == "cuda":  # imports Triton and the compiler
            self.triton_ops = importlib.import_module("torch.sparse._triton_ops")
        self.bias = problem.bias.detach()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.element_size() == 2:  # addmm calls this kernel without a bias
            bias = self.bias.expand(-1, len(x))
            y: Tensor = self.triton_ops.bsr_dense_addmm(bias, self.weight, x.t())
            return y.t()
        # F.linear also takes this matrix, but at a fifteenth of the speed on a CPU.
        return torch.addmm(self.bias, self.weight, x.t()).t()

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("forward only")
