"""Rival 4: one batched product for all experts with the same number of sources. No wasted FLOP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.contender import Layer, Unavailable
from bench.problem import Problem
from bench.rivals.registry import register


@dataclass(frozen=True)
class Bucket:
    """E experts of c sources each.

    Attributes:
        experts: Their indices, E of them.
        sources: Column blocks they read, expert after expert, ``(E * c,)`` int64.
        own: Position of each expert's own block among its c sources, ``(E,)`` int64.
    """

    experts: list[int]
    sources: Tensor
    own: Tensor


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, buckets: list[Bucket], back: Tensor | None, d: int, *values: Tensor
    ) -> Tensor:
        h = x.view(len(x), -1, d)
        weights, biases = values[::2], values[1::2]
        seen, outputs = [], []
        for bucket, weight, bias in zip(buckets, weights, biases, strict=True):
            # (E, B, c d) as a strided view, which the product reads without a copy.
            rows = h.index_select(1, bucket.sources).view(len(x), len(bucket.experts), -1)
            seen.append(rows.transpose(0, 1))
            outputs.append(torch.baddbmm(bias, seen[-1], weight).transpose(0, 1))
        ctx.save_for_backward(*seen, *weights)
        ctx.buckets, ctx.back, ctx.d = buckets, back, d
        y = torch.cat(outputs, 1)
        return (y if back is None else y.index_select(1, back)).view(len(x), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        count, d = len(ctx.buckets), ctx.d
        seen, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        by_expert = grad.view(len(grad), -1, d)
        if ctx.back is not None:
            by_expert = by_expert.index_select(1, ctx.back.argsort())
        parts = by_expert.split([len(bucket.experts) for bucket in ctx.buckets], 1)
        routed: list[Tensor] = []
        grads: list[Tensor] = []
        for bucket, part, rows, weight in zip(ctx.buckets, parts, seen, weights, strict=True):
            given = part.transpose(0, 1)
            blocks = weight.view(len(weight), -1, d, d)
            own = blocks[torch.arange(len(weight), device=weight.device), bucket.own]
            routed.append(torch.bmm(given, own.transpose(1, 2)).transpose(0, 1))
            grads += [torch.bmm(rows.transpose(1, 2), given), given.sum(1, keepdim=True)]
        grad_x = torch.cat(routed, 1)
        if ctx.back is not None:
            grad_x = grad_x.index_select(1, ctx.back)
        return grad_x.view(len(grad), -1), None, None, None, *grads


@register
class BucketedBmm(Layer):
    """Gather the sources of each bucket, ``baddbmm``; dX from the experts' own blocks."""

    name = "bucketed bmm"
    number = "4"
    note = "gathers every source; what it gathered is kept for the backward"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.width is None or not problem.is_hidden:
            raise Unavailable("needs blocks of one size and a gradient routed on the diagonal")
        self.width, device = problem.width, problem.device
        matrices = problem.row_matrices(problem.compact.detach())
        biases = problem.bias.detach().view(-1, 1, self.width)
        by_count: dict[int, list[int]] = {}
        for i, sources in enumerate(problem.sources):
            by_count.setdefault(len(sources), []).append(i)
        self.buckets: list[Bucket] = []
        parameters: list[Tensor] = []
        for experts in by_count.values():
            read = torch.tensor([problem.sources[i] for i in experts])
            own = torch.tensor([problem.sources[i].index(i) for i in experts])
            self.buckets.append(Bucket(experts, read.flatten().to(device), own.to(device)))
            # (E, c d, d): the layout that the product reads without a transposed copy.
            weight = torch.stack([matrices[i].t() for i in experts]).contiguous()
            parameters += [weight.requires_grad_(), biases[experts].requires_grad_()]
        self.parameters = tuple(parameters)
        order = torch.tensor([i for bucket in self.buckets for i in bucket.experts])
        in_order = bool((order.diff() > 0).all())
        self.back = None if in_order else order.argsort().to(device)

    @classmethod
    def memory(cls, problem: Problem) -> int:
        return super().memory(problem) + gathered_bytes(problem)

    def __call__(self, x: Tensor) -> Tensor:
        apply: Any = _Function.apply
        y: Tensor = apply(x, self.buckets, self.back, self.width, *self.parameters)
        return y

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        count = len(self.problem.layout.row_sizes)
        weights: list[Tensor] = [grads[0]] * count
        biases: list[Tensor] = [grads[0]] * count
        for bucket, weight, bias in zip(self.buckets, grads[::2], grads[1::2], strict=True):
            for i, one_weight, one_bias in zip(bucket.experts, weight, bias, strict=True):
                weights[i], biases[i] = one_weight.t().reshape(-1), one_bias.flatten()
        return torch.cat(weights), torch.cat(biases)


def gathered_bytes(problem: Problem) -> int:
    """Size of every expert's sources side by side."""
    return problem.batch * sum(problem.layout.row_fan_in) * problem.dtype.itemsize
