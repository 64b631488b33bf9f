"""The toy tasks (sections 3.3.1 and 4.1): clusters whose right attribution is known."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.shared import figures
from maskmoe_kernels.experiments.shared.files import claim
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models import InterpretableMLP
from maskmoe_kernels.ops.selection import mixture

SIGMA = 0.25
CONFIDENCES = ("abs", "square", "smooth")

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


@dataclass(frozen=True)
class ToyConfig:
    """How to train, and on how many fresh samples to evaluate.

    The loss is eq. 7 as the paper prints it: selection weights, not normalised. The authors'
    notebook weighs by ``"deselection"``, normalised per ``"sample"``; that gives the univariate
    experts less of the inner clusters (seeds 0 and 1, by ``square``: 0.896 and 0.868, against
    0.902 and 0.903).

    Attributes:
        confidence: Of the training weights.
        predict: Confidence of the figures; the table has all of ``CONFIDENCES``.
    """

    epochs: int = 30
    steps: int = 500
    batch: int = 256
    learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (16, 16)
    confidence: str = "abs"
    weighting: str = "selection"
    normalize: str | None = None
    predict: str = "square"
    test_samples: int = 20_000


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
    spread = torch.tensor([[SIGMA * (k in c.noisy) for k in range(inputs)] for c in clusters])
    which = torch.randint(len(clusters), (n,), generator=generator, device=device)
    noise = torch.randn(n, inputs, generator=generator, device=device)
    return center[which] + spread.to(device)[which] * noise, label[which], which


def train(
    task: str | ToyTask,
    seed: int = 0,
    config: ToyConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Console | None = None,
) -> tuple[InterpretableMLP, list[float], float]:
    """Train the experts; the same seed gives the same network on the same machine.

    The random state of the caller is left alone.

    Args:
        task: Which one.
        seed: Of initial weights and samples.
        config: How; the defaults of :class:`ToyConfig`.
        device: Where.
        progress: Console for the progress bar; ``None`` is quiet.

    Returns:
        The network, the mean loss of each epoch, and the seconds it took.
    """
    task, config = toy_task(task), config or ToyConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = InterpretableMLP(task.family, config.hidden).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    losses: list[float] = []
    started = time.perf_counter()
    with _progress(progress) as bar:
        job = bar.add_task(f"toy {task.name}", total=config.epochs, loss="-", speed="-")
        for epoch in range(1, config.epochs + 1):
            losses.append(_epoch(net, optimizer, task, config, generator))
            speed = epoch * config.steps * config.batch / (time.perf_counter() - started)
            bar.update(job, completed=epoch, loss=f"{losses[-1]:.4f}", speed=f"{speed:,.0f}")
    return net, losses, time.perf_counter() - started


def _epoch(
    net: InterpretableMLP,
    optimizer: torch.optim.Optimizer,
    task: ToyTask,
    config: ToyConfig,
    generator: torch.Generator,
) -> float:
    """``config.steps`` steps on fresh samples; their mean loss."""
    device = next(net.parameters()).device
    x, y, _ = sample(task, config.steps * config.batch, generator)
    batches = zip(x.to(device).split(config.batch), y.to(device).split(config.batch), strict=True)
    total = torch.zeros((), device=device)
    for inputs, target in batches:
        loss = net.gem_loss(inputs, target, config.confidence, config.weighting, config.normalize)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total / config.steps)  # the only wait for the device


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} epochs, loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} samples/s"),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
        disable=console is None,
        transient=True,
    )


@torch.no_grad()
def evaluate(
    net: InterpretableMLP, task: str | ToyTask, seed: int = 0, n: int = 20_000
) -> dict[str, dict[str, Any]]:
    """Accuracy and right attributions on ``n`` fresh samples, for each of ``CONFIDENCES``.

    Returns:
        For each confidence ``accuracy``, ``right_expert`` (kind of cluster to the share of its
        samples whose largest attribution is their cluster's own expert) and ``clusters`` (the
        same numbers for each cluster).
    """
    task = toy_task(task)
    x, y, which = sample(task, n, torch.Generator().manual_seed(seed + _TEST_STREAM))
    logits = net(x.to(next(net.parameters()).device)).cpu()
    own = torch.tensor([task.family.names.index(c.expert) for c in task.clusters])[which]
    kind = torch.tensor([task.kinds.index(c.kind) for c in task.clusters])[which]
    table = {}
    for confidence in CONFIDENCES:
        mixed = mixture(logits, task.family, confidence)
        correct = (mixed.probability > 0.5) == (y > 0.5)
        right = mixed.attribution.argmax(-1) == own
        table[confidence] = {
            "accuracy": _share(correct),
            "right_expert": {name: _share(right[kind == k]) for k, name in enumerate(task.kinds)},
            "clusters": [
                {
                    "center": list(cluster.center),
                    "label": cluster.label,
                    "expert": cluster.expert,
                    "accuracy": _share(correct[which == k]),
                    "right_expert": _share(right[which == k]),
                }
                for k, cluster in enumerate(task.clusters)
            ],
        }
    return table


def _share(hits: Tensor) -> float | None:
    return round(float(hits.double().mean()), 6) if len(hits) else None


def run(
    task: str | ToyTask,
    seed: int = 0,
    config: ToyConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Console | None = None,
) -> tuple[dict[str, Any], InterpretableMLP]:
    """Train and evaluate; see :func:`train`. Returns the report, ready for json, and the net."""
    task, config = toy_task(task), config or ToyConfig()
    net, losses, seconds = train(task, seed, config, device, progress)
    samples = config.epochs * config.steps * config.batch
    report = {
        "experiment": "toy",
        "task": task.name,
        "title": task.title,
        "seed": seed,
        "device": torch.device(device).type,
        "machine": machine(),
        "config": {**asdict(config), "hidden": list(config.hidden)},
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": round(seconds, 2),
        "samples_per_s": round(samples / max(seconds, 1e-9)),
        "losses": losses,
        "table": evaluate(net, task, seed, config.test_samples),
    }
    return report, net


def run_toy(
    task: str,
    seed: int,
    out: str | Path,
    device: torch.device | str = "cpu",
    *,
    config: ToyConfig | None = None,
    epochs: int | None = None,
    confidence: str | None = None,
    console: Console | None = None,
    draw: bool = True,
) -> dict[str, Any]:
    """Train, write ``report.json`` and the figures into ``out``, print the table.

    Args:
        task: ``"a"``, ``"b"`` or ``"c"``.
        seed: Of initial weights and samples.
        out: Folder; made if missing.
        device: Where to train.
        config: How to train; the defaults of :class:`ToyConfig`.
        epochs: Instead of ``config.epochs``.
        confidence: Instead of ``config.confidence``.
        console: For progress and table; ``None`` is quiet.
        draw: Draw the figures. Without matplotlib they are left out and the console says so.

    Returns:
        The report.

    Raises:
        OSError: ``out`` is no folder that can be written to.
    """
    config = config or ToyConfig()
    if epochs is not None:
        config = replace(config, epochs=epochs)
    if confidence is not None:
        config = replace(config, confidence=confidence)
    claim(out)
    report, net = run(task, seed, config, device, console)
    write_json(Path(out) / "report.json", report)
    missing = figures.obstacle() if draw else None
    if draw and missing is None:
        draw_figures(net, toy_task(task), config, Path(out), seed)
    if console is not None:
        print_report(report, console)
        if missing is not None:
            console.print(f"no figures: {missing}")
    return report


def run_seeds(
    task: str,
    seeds: Sequence[int],
    out: str | Path,
    device: torch.device | str = "cpu",
    *,
    config: ToyConfig | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """:func:`run_toy` for every seed, each in its folder ``seed_S``, and a report of all."""
    out = Path(out)
    reports = []
    for seed in seeds:
        folder = out / f"seed_{seed}"
        reports.append(run_toy(task, seed, folder, device, config=config, console=console))
    combined = combine(reports, command)
    write_json(out / "report.json", combined)
    if console is not None:
        print_report(combined, console)
    return combined


def combine(reports: Sequence[Mapping[str, Any]], command: str | None = None) -> dict[str, Any]:
    """One report of several seeds: each seed's numbers, and the worst and mean of them."""
    first = reports[0]
    shared = ("experiment", "task", "title", "device", "machine", "config", "parameters")
    own = ("seed", "seconds", "samples_per_s", "losses", "table")
    tables = [_numbers(report["table"]) for report in reports]
    summary = {
        confidence: {
            name: {
                "worst": min(table[confidence][name] for table in tables),
                "mean": round(sum(table[confidence][name] for table in tables) / len(tables), 6),
            }
            for name in tables[0][confidence]
        }
        for confidence in tables[0]
    }
    return {
        **{key: first[key] for key in shared},
        "command": command,
        "summary": summary,
        "seeds": [{key: report[key] for key in own} for report in reports],
    }


def _numbers(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy and right attributions of each confidence, flat."""
    return {
        confidence: {"accuracy": row["accuracy"], **row["right_expert"]}
        for confidence, row in table.items()
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Table of a report of :func:`run_toy`, or of several seeds (:func:`run_seeds`)."""
    runs = report.get("seeds", [report])
    kinds = list(runs[0]["table"][CONFIDENCES[0]]["right_expert"])
    samples = report["config"]["test_samples"]
    table = Table(
        title=f"Toy ({report['task']}): {report['title']}",
        caption=f"{samples:,} fresh samples; right expert: the largest attribution is that of "
        "the smallest subset that separates the sample's cluster",
    )
    table.add_column("confidence")
    table.add_column("seed", justify="right")
    for name in ("accuracy", *(f"right expert, {kind}" for kind in kinds)):
        table.add_column(name, justify="right")
    for confidence in runs[0]["table"]:
        for entry in runs:
            row = _numbers(entry["table"])[confidence]
            cells = ["-" if value is None else f"{value:.4f}" for value in row.values()]
            table.add_row(confidence, str(entry["seed"]), *cells)
        table.add_section()
    console.print(table)


@torch.no_grad()
def draw_figures(
    net: InterpretableMLP, task: ToyTask, config: ToyConfig, out: Path, seed: int = 0
) -> None:
    """Figure 5 (``panels.png``), ``plane.png`` and ``hasse.png`` of a trained net, in ``out``."""
    samples = partial(_sampled_plane, net, task, config.predict, seed)
    lattice = partial(_lattice_plane, net, task, config.predict)
    names = task.family.names
    about = f"Toy ({task.name}): {task.title}"
    planes = [samples(axes) for axes in task.planes]
    figures.toy_panels(planes, names, out / "panels.png", title=about)
    figures.toy_plane([lattice(axes) for axes in task.planes], names, out / "plane.png", about)
    figures.hasse(task.family, out / "hasse.png")


def _sampled_plane(
    net: InterpretableMLP, task: ToyTask, confidence: str, seed: int, axes: tuple[int, int]
) -> figures.Plane:
    x, y, which = sample(task, 6000, torch.Generator().manual_seed(seed + _TEST_STREAM))
    lies = torch.tensor([cluster.noisy == axes for cluster in task.clusters])[which]
    return _plane(net, task, confidence, axes, x[lies], y[lies])


def _lattice_plane(
    net: InterpretableMLP, task: ToyTask, confidence: str, axes: tuple[int, int], side: int = 240
) -> figures.Plane:
    # Inputs off the plane are zero, as they are in the samples.
    centers = torch.tensor([c.center for c in task.clusters if c.noisy == axes])[:, list(axes)]
    labels = torch.tensor([float(c.label) for c in task.clusters if c.noisy == axes])
    reach = float(centers.abs().max()) + 4 * SIGMA
    line = torch.linspace(-reach, reach, side)
    x = torch.zeros(side * side, len(task.clusters[0].center))
    x[:, list(axes)] = torch.cartesian_prod(line, line)
    plane = _plane(net, task, confidence, axes, x, torch.full((len(x),), float("nan")))
    return replace(plane, centers=centers, center_labels=labels)


def _plane(
    net: InterpretableMLP,
    task: ToyTask,
    confidence: str,
    axes: tuple[int, int],
    x: Tensor,
    y: Tensor,
) -> figures.Plane:
    logits = net(x.to(next(net.parameters()).device)).cpu()
    groups = list(task.family.groups)
    return figures.Plane(
        axes=(groups[axes[0]], groups[axes[1]]),
        points=x[:, list(axes)],
        labels=y,
        experts=torch.sigmoid(2 * logits),
        mixture=mixture(logits, task.family, confidence),
    )
