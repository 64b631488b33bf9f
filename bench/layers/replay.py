"""A contender's forward and step, each captured as a CUDA graph: one launch a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.contender import Contender, Unavailable
from bench.device import capture
from bench.layers.reference_error import error_limit

#: Values of an output: with more, the work hides the launches, and what graphs hold is gigabytes.
MOST_VALUES = 1 << 28


class Replayed(Contender):
    """Replays what ``inner`` launches, into the tensors of the capture.

    Raises:
        Unavailable: ``inner`` cannot be captured, or a replay gives another result.
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
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)  # to be overwritten
        self.replays[phase]()
        for one, other in zip(_tensors(captured), expected, strict=True):
            _refuse_difference(one, other, error_limit(self.problem))

    def forward(self) -> None:
        self.replays["forward"]()

    def backward(self, graph: Any) -> None:
        raise NotImplementedError("a step is captured as a whole")

    def step(self) -> None:
        self.replays["step"]()


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
