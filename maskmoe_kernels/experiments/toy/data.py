"""The toy tasks (sections 3.3.1 and 4.1): clusters whose right attribution is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily

SIGMA = 0.25

# Test samples come from a stream of their own, so that the training length does not move them.
_TEST_STREAM = 1_000_003


@dataclass(frozen=True)
class Cluster:
    """One Gaussian of a task.

    Attributes:
        center: Mean, one value per input.
        label: 0 or 1.
        expert: Smallest subset that separates this cluster from those of the other label.
        kind: Name under which clusters are reported together.
        noisy: Inputs that vary, with standard deviation ``SIGMA``; the others stay at the mean.
    """

    center: tuple[float, ...]
    label: int
    expert: str
    kind: str
    noisy: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class ToyTask:
    """Clusters of equal probability and the family of experts that explains them.

    Attributes:
        name: ``"a"``, ``"b"`` or ``"c"``.
        title: What the task asks, in a line.
        family: The experts.
        clusters: The Gaussians.
        planes: Pairs of inputs in which samples are drawn.
    """

    name: str
    title: str
    family: SubsetFamily
    clusters: tuple[Cluster, ...]
    planes: tuple[tuple[int, int], ...] = ((0, 1),)

    @property
    def kinds(self) -> list[str]:
        """Kinds of clusters, in order."""
        return list(dict.fromkeys(cluster.kind for cluster in self.clusters))


def _tasks() -> dict[str, ToyTask]:
    plane = SubsetFamily({"x1": 1, "x2": 1}, {"x1": ["x1"], "x2": ["x2"], "x1+x2": ["x1", "x2"]})
    apart = SubsetFamily(
        {"x0": 1, "x1": 1, "x2": 1, "x3": 1}, {"x0": ["x0"], "x1": ["x1"], "x2+x3": ["x2", "x3"]}
    )
    # Left and right differ in the first input, top and bottom in the second.
    cross = [((-1.0, 0.0), 0, 0), ((1.0, 0.0), 1, 0), ((0.0, 1.0), 1, 1), ((0.0, -1.0), 0, 1)]
    xor = [((-1.0, -1.0), 0), ((1.0, -1.0), 1), ((-1.0, 1.0), 1), ((1.0, 1.0), 0)]
    inner = tuple(Cluster(at, label, ("x1", "x2")[axis], "inner") for at, label, axis in cross)
    outer = tuple(Cluster((2 * x, 2 * y), label, "x1+x2", "outer") for (x, y), label in xor)
    first = tuple(
        Cluster((*at, 0.0, 0.0), label, ("x0", "x1")[axis], "univariate")
        for at, label, axis in cross
    )
    last = tuple(Cluster((0.0, 0.0, *at), label, "x2+x3", "xor", (2, 3)) for at, label in xor)
    tasks = (
        ToyTask("a", "four clusters, each separable by one input", plane, inner),
        ToyTask("b", "four inner clusters and an outer XOR", plane, inner + outer),
        ToyTask("c", "a cross on x0, x1; XOR on x2, x3", apart, first + last, ((0, 1), (2, 3))),
    )
    return {task.name: task for task in tasks}


TASKS: dict[str, ToyTask] = _tasks()


def toy_task(task: str | ToyTask) -> ToyTask:
    """The task of that name.

    Raises:
        LayoutError: No such task.
    """
    if isinstance(task, ToyTask):
        return task
    if task not in TASKS:
        raise LayoutError(f"task must be one of {list(TASKS)}, got {task!r}")
    return TASKS[task]


def sample(
    task: str | ToyTask, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``n`` samples, each from a cluster chosen uniformly.

    Returns:
        x ``(n, inputs)`` float32; label y ``(n,)`` float32 in {0, 1}; index of the cluster
        ``(n,)`` int64. All on the generator's device.
    """
    clusters = toy_task(task).clusters
    device = torch.device("cpu") if generator is None else generator.device
    inputs = len(clusters[0].center)
    center = torch.tensor([c.center for c in clusters], dtype=torch.float32, device=device)
    label = torch.tensor([c.label for c in clusters], dtype=torch.float32, device=device)
    deviation = torch.tensor([[SIGMA * (k in c.noisy) for k in range(inputs)] for c in clusters])
    which = torch.randint(len(clusters), (n,), generator=generator, device=device)
    noise = torch.randn(n, inputs, generator=generator, device=device)
    return center[which] + deviation.to(device)[which] * noise, label[which], which


def held_out(task: str | ToyTask, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``n`` samples that training with this seed does not see; returns as :func:`sample`."""
    return sample(task, n, torch.Generator().manual_seed(seed + _TEST_STREAM))
