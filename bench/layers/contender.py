"""What a contender is: something that computes the layer, or a floor nobody can go below."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.layers.counts import PHASES, count
from bench.layers.problem import Problem


class Unavailable(Exception):
    """A contender cannot run here; the message says why, for the reader of the table."""


class Contender(ABC):
    """One way to compute a :class:`Problem`.

    Attributes:
        name: As in the tables.
        number: Its row in the table of rivals of ``bench/README.md``; ``""`` for ours.
        note: What a reader has to know about its times.
        exact: Does it compute the layer's function forward and its routed gradient backward?
        floor: Is it a limit and no layer?
        compiled: Does its first call compile something?
        phases: Which of ``PHASES`` it can be measured in.
        capturable: May a CUDA graph be captured of it?
        rotates: Does it read the problem's own x and grad_y in every call?
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

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @classmethod
    def flops(cls, problem: Problem) -> int:
        """What its longest phase multiplies and adds, waste included."""
        return count(problem)[cls.phases[-1]].flops

    @classmethod
    def memory(cls, problem: Problem) -> int:
        """Bytes it holds at most beside x, grad_y and the compact weight."""
        layout = problem.layout
        values = 3 * layout.num_weights + problem.batch * (layout.in_features + layout.out_features)
        return values * problem.dtype.itemsize

    @abstractmethod
    def forward(self) -> Any:
        """The output, without a graph for the gradient."""

    def graph(self) -> Any:
        """What ``backward`` needs; not timed."""
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
        """Output and gradients as far as it has them, from a grad_y of zeros beyond ``rows``.

        The whole batch runs, as it does on the clock; the truth needs the first ``rows`` alone.
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
    """Mixed in before a layer: its call goes through ``torch.compile``.

    Attributes:
        mode: Of ``torch.compile``.
    """

    compiled = True
    mode: ClassVar[str | None] = None
    #: A graph of hundreds of products takes minutes to compile.
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
        if self.mode is not None:  # what the last call gave may be overwritten now
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(x)


class CompiledGraphs(Compiled):
    """Mixed in before a layer: ``torch.compile`` in a mode that replays CUDA graphs of its own.

    Its outputs live until the next call, so several forwards cannot wait for their backward.
    """

    mode = "reduce-overhead"
    phases = ("forward", "step")
    capturable = False
