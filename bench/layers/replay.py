"""A contender's forward and step as CUDA graphs, captured by hand: one launch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.layers.contender import Contender, Unavailable
from bench.layers.truth import worst

#: Beyond so many rows the launches are hidden behind the work.
MOST_ROWS = 1024
WARM_UP = 3


class Replayed(Contender):
    """Replays what ``inner`` launches; its results lie where the capture put them.

    Raises:
        Unavailable: ``inner`` cannot be captured, or replays something else than it computes.
    """

    name = "replayed"
    phases: tuple[str, ...] = ("forward", "step")  # type: ignore[misc]

    def __init__(self, inner: Contender) -> None:
        super().__init__(inner.problem)
        if not inner.capturable:
            raise Unavailable(f"{inner.name} makes CUDA graphs itself")
        self.inner = inner
        self.replays: dict[str, Callable[[], Any]] = {}
        self.phases = tuple(phase for phase in type(self).phases if phase in inner.phases)
        for phase in self.phases:
            self._capture(phase)

    def _capture(self, phase: str) -> None:
        call = getattr(self.inner, phase)
        self.replays[phase], captured = capture(call, self.problem.device)
        expected = _tensors(call())
        for tensor in _tensors(captured):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)  # nothing old may pass
        self.replays[phase]()
        for one, other in zip(_tensors(captured), expected, strict=True):
            _refuse_difference(one, other, worst(self.problem))

    def forward(self) -> None:
        self.replays["forward"]()

    def backward(self, graph: Any) -> None:
        raise NotImplementedError("a step is captured as a whole")

    def step(self) -> None:
        self.replays["step"]()


def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """``call`` as a replay, and the results that a replay overwrites."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # allocations, handles and tuning: none may be captured
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
    return graph.replay, captured


def _tensors(results: Any) -> list[Tensor]:
    found = (results,) if isinstance(results, Tensor) else results or ()
    return [t.detach() for t in found if isinstance(t, Tensor)]


def _refuse_difference(replayed: Tensor, expected: Tensor, limit: float) -> None:
    if not expected.is_floating_point():
        return
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((replayed - expected).abs().max()) if expected.numel() else 0.0
    if not error <= limit * scale:
        raise Unavailable(f"its CUDA graph replays a result that is off by {error:.1e}")
