"""FLOPs and bytes that each phase needs at least."""

from __future__ import annotations

from dataclasses import dataclass

from bench.problem import Problem

PHASES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Counts:
    """The least work of a phase.

    Attributes:
        flops: Multiplications and additions of present blocks.
        bytes: Each value read once and each result written once.
    """

    flops: int
    bytes: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.flops + other.flops, self.bytes + other.bytes)


def count(problem: Problem) -> dict[str, Counts]:
    """Counts of each of ``PHASES``.

    Forward reads x, W and b and writes y. Backward reads x, grad_y and the routed part of W and
    writes grad_x, grad_W and grad_b. A step is forward, then backward: grad_y is known only after
    y, so x is read twice.
    """
    layout, batch = problem.layout, problem.batch
    weights, routed = layout.num_weights, layout.num_routed_weights
    x, y = batch * layout.in_features, batch * layout.out_features
    size = problem.dtype.itemsize
    forward = Counts(2 * batch * weights, size * (x + weights + layout.out_features + y))
    backward = Counts(
        2 * batch * (weights + routed),
        size * (x + y + routed + x + weights + layout.out_features),
    )
    return {"forward": forward, "backward": backward, "step": forward + backward}
