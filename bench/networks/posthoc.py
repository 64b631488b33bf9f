"""The toy task, whose causes are known, explained post hoc and by experts: ``bench posthoc``.

A black box is explained by LIME (lime), KernelSHAP (shap), integrated gradients and DeepLift
(captum), where these are installed. Experts explain themselves: by the paper's mixture; by the
smallest expert that suffices; by Shapley values, those two of the same network.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from bench.machine import machine
from maskmoe_kernels import shapley
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table
from maskmoe_kernels.experiments.shared.plot_style import canvas, save, unsupported_reason
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.experiments.toy import train as toy
from maskmoe_kernels.experiments.toy.data import SIGMA, ToyTask, held_out, sample, toy_task
from maskmoe_kernels.experiments.toy.evaluate import SUFFICIENT, SURE, explained
from maskmoe_kernels.experiments.toy.figures import expert_handles, mixed_colours

FILE, PICTURE = "posthoc.json", "posthoc.png"
_PACKAGES = ("lime", "shap", "captum")
#: Samples that LIME draws around a point, and rows that KernelSHAP takes for absent features.
_LIME_DRAWS, _BACKGROUND = 300, 100
#: From points ``(n, 2)`` to the shares of x1, of x2 and of both, ``(n, 3)``.
Explain = Callable[[Tensor], Tensor]


def run(
    epochs: int, samples: int, side: int, out: Path, console: Console, seed: int = 0
) -> dict[str, Any]:
    """Train, explain, print the table; write ``posthoc.json`` and ``posthoc.png``.

    Args:
        epochs: Of every network, of 500 steps of 256 samples.
        samples: Fresh ones, on which explanations are compared with the known cause.
        side: Points along each axis of the picture.
        out: Folder of the results.
        console: Where the table goes.
        seed: Of weights and samples.
    """
    task = toy_task("b")
    x, y, which = held_out(task, samples, seed)
    own = torch.tensor([task.family.names.index(c.expert) for c in task.clusters])[which]
    inner = torch.tensor([c.kind == "inner" for c in task.clusters])[which]
    line = torch.linspace(-2 - 4 * SIGMA, 2 + 4 * SIGMA, side)
    lattice = torch.cartesian_prod(line, line)
    print_line(console, f"training three networks, {epochs} epochs each")
    planes = {"known cause": F.one_hot(_known(task, lattice), 3).float()}
    records = []
    for name, predict, explain in _methods(task, epochs, seed):
        print_line(console, f"explaining: {name}")
        start = time.perf_counter()
        shares = explain(x)
        seconds = (time.perf_counter() - start) / samples
        accuracy = float(((predict(x) > 0) == (y > 0.5)).float().mean())
        records.append(
            {
                "name": name,
                "accuracy": accuracy,
                "seconds": seconds,
                **_agreement(shares, own, inner),
            }
        )
        planes[name] = explain(lattice)
    document = {
        "machine": machine("cpu"),
        "versions": {name: _version(name) for name in _PACKAGES},
        "task": task.name,
        "samples": samples,
        "epochs": epochs,
        "seed": seed,
        "methods": records,
    }
    write_json(out / FILE, document)
    missing = unsupported_reason()
    if missing is None:
        _draw(planes, float(line[-1]), task, out / PICTURE)
    _print(document, console)
    picture = "; no picture" if missing is not None else f" and {PICTURE}"
    print_line(console, f"results: {out / FILE}{picture}")
    return document


def _known(task: ToyTask, points: Tensor) -> Tensor:
    """The cause of the nearest cluster, ``(n,)``."""
    centers = torch.tensor([cluster.center for cluster in task.clusters])
    own = torch.tensor([task.family.names.index(cluster.expert) for cluster in task.clusters])
    return own[torch.cdist(points, centers).argmin(-1)]


# --- Who explains ---------------------------------------------------------------------------------


def _methods(
    task: ToyTask, epochs: int, seed: int
) -> Iterator[tuple[str, Callable[[Tensor], Tensor], Explain]]:
    """Name, log-odds of a prediction, and explanation."""
    black_box = _black_box(task, epochs, seed)

    @torch.no_grad()
    def log_odds(x: Tensor) -> Tensor:
        return black_box(x.float())[:, 0]

    for name, attribute in _post_hoc(black_box, log_odds, task, seed):
        yield name, log_odds, functools.partial(_shares_by, attribute)
    uniform = toy.ToyConfig(epochs=epochs, predict=SUFFICIENT, weighting="uniform")
    for config in (toy.ToyConfig(epochs=epochs), uniform):
        net, _, _ = toy.train(task, seed, config)
        logits = torch.no_grad()(net)
        name = "ours: who suffices" if config.predict == SUFFICIENT else "paper's mixture"
        yield name, *_by_rule(logits, task, config.predict)
    predict, _ = _by_rule(logits, task, SUFFICIENT)

    def by_shapley(x: Tensor) -> Tensor:
        return shares_of(shapley(logits(x).clamp(-SURE / 2, SURE / 2), task.family, 0.0))

    yield "ours: Shapley", predict, by_shapley


def _by_rule(
    logits: Callable[[Tensor], Tensor], task: ToyTask, rule: str
) -> tuple[Callable[[Tensor], Tensor], Explain]:
    """Prediction, above 0 for label 1, and explanation of experts by a rule."""
    return (
        lambda x: explained(logits(x), task.family, rule).probability - 0.5,
        lambda x: explained(logits(x), task.family, rule).attribution,
    )


def shares_of(values: Tensor) -> Tensor:
    """Contributions of x1 and x2 as shares of x1, x2 and both, ``(n, 3)``.

    Equal contributions are due to both, one alone to its input: between them linear.
    """
    size = values.abs()
    lead = (size[:, 0] - size[:, 1]) / size.sum(-1).clamp(min=1e-12)
    return torch.stack([lead.clamp(min=0), (-lead).clamp(min=0), 1 - lead.abs()], -1).float()


def _shares_by(attribute: Explain, x: Tensor) -> Tensor:
    return shares_of(attribute(x))


def _black_box(task: ToyTask, epochs: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
        net = nn.Sequential(*parts)
    config = toy.ToyConfig()
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs * config.steps):
        x, y, _ = sample(task, config.batch, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(x)[:, 0], y).backward()
        optimizer.step()
    return net.eval()


def _post_hoc(
    net: nn.Module, log_odds: Callable[[Tensor], Tensor], task: ToyTask, seed: int
) -> Iterator[tuple[str, Explain]]:
    """Contributions of x1 and x2 to the log-odds, ``(n, 2)``, by what is installed."""
    background = sample(task, 2000, torch.Generator().manual_seed(seed + 1))[0].double().numpy()

    def model(rows: Any) -> Any:
        return log_odds(torch.as_tensor(rows)).double().numpy()

    if importlib.util.find_spec("lime"):
        yield "LIME", _lime(model, background, seed)
    if importlib.util.find_spec("shap"):
        import shap

        kernel = shap.KernelExplainer(model, background[:_BACKGROUND])
        yield (
            "KernelSHAP",
            lambda x: torch.as_tensor(kernel.shap_values(x.double().numpy(), silent=True)),
        )
    if importlib.util.find_spec("captum"):
        from captum.attr import DeepLift, IntegratedGradients

        for name, kind in (("IntegratedGradients", IntegratedGradients), ("DeepLift", DeepLift)):
            yield name, functools.partial(_of_captum, kind(net))


def _of_captum(method: Any, x: Tensor) -> Tensor:
    """Against the middle of the plane, where the labels are as likely."""
    found: Tensor = method.attribute(x, torch.zeros_like(x), target=0)
    return found.detach()


def _lime(model: Callable[[Any], Any], background: Any, seed: int) -> Explain:
    from lime.lime_tabular import LimeTabularExplainer

    of = LimeTabularExplainer(
        background,
        mode="regression",
        feature_selection="none",
        discretize_continuous=False,
        random_state=seed,
    )

    def explain(x: Tensor) -> Tensor:
        found = []
        for row in x.double().numpy():
            told = of.explain_instance(row, model, num_features=2, num_samples=_LIME_DRAWS)
            weights = dict(next(iter(told.local_exp.values())))
            found.append([weights.get(0, 0.0), weights.get(1, 0.0)])
        return torch.tensor(found)

    return explain


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- How well, and what it looks like -------------------------------------------------------------


def _agreement(shares: Tensor, own: Tensor, inner: Tensor) -> dict[str, float]:
    """How often the largest share is that of the known cause; and that with the best threshold.

    ``best`` calls an input the cause wherever its share is at least t, for the t that agrees most
    often: as if the cause were known when the threshold is chosen.
    """

    def rates(answer: Tensor) -> tuple[float, float]:
        right = (answer == own).float()
        return float(right[inner].mean()), float(right[~inner].mean())

    alone, which = shares[:, :2].max(-1)
    both = torch.full_like(which, 2)
    tried = [rates(torch.where(alone >= t, which, both)) for t in torch.linspace(0, 1.01, 102)]
    best = max(tried, key=sum)
    plain = rates(shares.argmax(-1))
    return {"inner": plain[0], "outer": plain[1], "best_inner": best[0], "best_outer": best[1]}


def _print(document: Mapping[str, Any], console: Console) -> None:
    columns = [
        Column("explained by", text=True),
        Column("accuracy"),
        Column("right, inner"),
        Column("right, outer"),
        Column("best threshold", optional=1),
        Column("s / sample"),
    ]
    rows = [
        [
            one["name"],
            f"{one['accuracy']:.3f}",
            f"{one['inner']:.3f}",
            f"{one['outer']:.3f}",
            f"{one['best_inner']:.3f}, {one['best_outer']:.3f}",
            f"{one['seconds']:.2g}",
        ]
        for one in document["methods"]
    ]
    print_table(
        console,
        "Toy (b): whose explanation names the known cause?",
        columns,
        rows,
        "right: the largest share is that of the smallest subset that separates the sample's "
        "cluster. best threshold: inner and outer, if the cause were known when it is chosen.",
    )


def _draw(planes: Mapping[str, Tensor], reach: float, task: ToyTask, path: Path) -> None:
    columns = 4
    rows = -(-len(planes) // columns)
    figure = canvas(3.1 * columns, 3.3 * rows + 1.6)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (name, shares) in zip(axes, planes.items(), strict=False):
        side = round(len(shares) ** 0.5)
        image = mixed_colours(shares).view(side, side, 3).transpose(0, 1).numpy()
        ends = (-reach, reach, -reach, reach)
        ax.imshow(image, origin="lower", extent=ends, interpolation="nearest")
        for cluster in task.clusters:
            x, y = cluster.center
            ax.text(
                x, y, str(cluster.label), color="white", ha="center", va="center", weight="bold"
            )
        ax.set_title(name, fontsize=11)
        ax.set_xlabel("x1", fontsize=9)
        ax.set_ylabel("x2", fontsize=9)
        ax.tick_params(labelsize=8)
    for ax in axes[len(planes) :]:
        ax.set_visible(False)
    figure.suptitle(
        "Toy (b): which input is the cause? Numbers are the clusters' labels.\n"
        "The first panel has the cause of the nearest cluster; the others should look like it",
        fontsize=13,
    )
    handles = expert_handles(task.family.names, "due to {}")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)
