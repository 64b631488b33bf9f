"""What a contender is: a way to compute the layer, or a floor that no layer can go below."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.counts import PHASES, count
from bench.problem import Problem


class Unavailable(Exception):
    """A contender cannot run here; the message says why, for the reader of the table."""


class Contender(ABC):
    """One way to compute a :class:`Problem`.

    Attributes:
        name: As in the tables.
        number: Its row in the table of rivals of ``bench/README.md``; ``""`` for ours.
        note: What a reader of its times has to know.
        exact: Does it compute the layer's function forward and its routed gradient backward?
        floor: Is it a lower bound of the time, not a layer?
        compiled: Does its first call compile something?
        phases: Which of ``PHASES`` it can be measured in.
        capturable: May a CUDA graph be captured of it?
        rotates: Does it read the problem's own x and grad_y in every call?
        gpu_only: Is it left out on a CPU?
    """

    name: ClassVar[str]
    number: ClassVar[str] = ""
    note: ClassVar[str] = ""
    exact: ClassVar[bool] = True
    floor: ClassVar[bool] = False
    compiled: ClassVar[bool] = False
    phases: ClassVar[tuple[str, ...]] = PHASES
    capturable: ClassVar[bool] = True
    rotates: ClassVar[bool] = True
    gpu_only: ClassVar[bool] = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @classmethod
    def flops(cls, problem: Problem) -> int:
        """Multiplications and additions of its longest phase, wasted ones included."""
        return count(problem)[cls.phases[-1]].flops

    @classmethod
    def memory(cls, problem: Problem) -> int:
        """Most bytes that it holds beside x, grad_y and the compact weight."""
        layout = problem.layout
        values = 3 * layout.num_weights + problem.batch * (layout.in_features + layout.out_features)
        return values * problem.dtype.itemsize

    @abstractmethod
    def forward(self) -> Any:
        """The output, without an autograd graph."""

    def graph(self) -> Any:
        """The autograd graph that ``backward`` needs; its time is not measured."""
        return None

    @abstractmethod
    def backward(self, graph: Any) -> Any:
        """Gradients of x and every parameter."""

    @abstractmethod
    def step(self) -> Any:
        """Forward and backward."""


class Layer(Contender):
    """A contender that is a function under autograd.

    Attributes:
        parameters: Leaves, beside x.
    """

    parameters: tuple[Tensor, ...] = ()

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``(B, in)`` to ``(B, out)``."""

    @abstractmethod
    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Gradients of ``parameters`` as those of the compact weight and of the bias."""

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self(self.problem.x)

    def graph(self) -> Tensor:
        return self(self.problem.x)

    def backward(self, graph: Tensor) -> tuple[Tensor, ...]:
        leaves = (self.problem.x, *self.parameters)
        return torch.autograd.grad(graph, leaves, self.problem.grad)

    def step(self) -> tuple[Tensor, ...]:
        return self.backward(self.graph())

    def results(self, rows: int) -> dict[str, Tensor]:
        """The output and the gradients it has, of the first ``rows`` rows.

        The whole batch runs, as it does when it is timed. grad_y is zero beyond ``rows``, so that
        gradients of the weights depend on these rows only.
        """
        x = self.problem.x
        if "step" not in self.phases:
            with torch.no_grad():
                return {"y": self(x)[:rows]}
        y = self(x)
        grad = self.problem.grad_of_first(rows)
        grad_x, *grads = torch.autograd.grad(y, (x, *self.parameters), grad)
        weight, bias = self.compact_grads(tuple(grads))
        found = {"y": y.detach()[:rows], "grad_x": grad_x[:rows]}
        return found | {"grad_weight": weight, "grad_bias": bias}


class DenseLayer(Layer):
    """A layer that holds the whole ``(out, in)`` weight."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.parameters = (problem.dense, problem.bias)

    @classmethod
    def flops(cls, problem: Problem) -> int:
        layout = problem.layout
        return 6 * problem.batch * layout.out_features * layout.in_features

    @classmethod
    def memory(cls, problem: Problem) -> int:
        # Weight, mask, their product, the gradient.
        layout = problem.layout
        whole = 4 * layout.out_features * layout.in_features
        rows = problem.batch * (layout.in_features + layout.out_features)
        return (whole + rows) * problem.dtype.itemsize

    def compact_grads(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.problem.from_dense(grads[0]), grads[1]


class Compiled(Layer):
    """A mixin before a layer: its call goes through ``torch.compile``.

    Attributes:
        mode: Of ``torch.compile``.
        most_experts: A graph of hundreds of products takes minutes to compile.
    """

    compiled = True
    mode: ClassVar[str | None] = None
    most_experts: ClassVar[int] = 16

    def __init__(self, problem: Problem) -> None:
        experts = len(problem.layout.row_sizes)
        if experts > self.most_experts:
            raise Unavailable(
                f"{experts} experts: compiled up to {self.most_experts}, more take minutes each"
            )
        if self.mode is not None and problem.device.type != "cuda":
            raise Unavailable(f"mode={self.mode!r} is for a GPU")
        super().__init__(problem)
        eager: Callable[[Tensor], Tensor] = super().__call__  # type: ignore[safe-super]
        self._compiled = torch.compile(eager, dynamic=False, mode=self.mode)

    def __call__(self, x: Tensor) -> Tensor:
        if self.mode is not None:  # the next call may overwrite the last output
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(x)


class CompiledGraphs(Compiled):
    """A mixin before a layer: ``torch.compile`` in a mode that replays CUDA graphs of its own.

    A forward overwrites the output of the one before it, so ``backward`` alone is not measured:
    there, several forwards run before their backwards.
    """

    mode = "reduce-overhead"
    phases = ("forward", "step")
    capturable = False
    gpu_only = True
