"""Training whole networks in one pass, beside the same layer by layer and two rivals.

Random inputs, GEM loss (the black box: cross-entropy), backward, fused Adam. For each step the file
also holds the number of bytes that it moves through memory, and the time that its products and its
bytes take at the peak rates of this machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from bench.machine import machine
from bench.networks import movielens_training as movielens
from bench.networks import training
from bench.networks.training import (
    BLACK_BOX,
    MOVIELENS_1M,
    OURS,
    PAPER,
    Make,
    Schedule,
    Subject,
    Trainer,
)
from bench.peak_rates import PeakRates, measure_peak_rates
from bench.rivals.paper_style_mlp import PaperStyleMLP
from maskmoe_kernels import InterpretableMLP, SubsetFamily, gem_loss
from maskmoe_kernels.experiments.shared.output import print_line
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.models import InterpretableNCF, NCFSizes

FILE = "mlp_training.json"
LAYERED = "layer by layer"
NOTES = {
    OURS: "all layers, loss and backward in one pass",
    LAYERED: "the same network, our layers one after the other",
    BLACK_BOX: "torch's own layers of the same total width: another model, with one logit",
    PAPER: "the same network, one nn.Linear an expert over detached sources",
}
#: "toy" and the others: family, units an expert of each hidden layer.
NETWORKS: dict[str, tuple[Callable[[], SubsetFamily], Sequence[int]]] = {
    "toy": (FAMILIES["toy3"], (16, 16)),
    "spotify8": (FAMILIES["spotify8"], (16, 16, 16)),
    "powerset4": (lambda: SubsetFamily.powerset(dict.fromkeys("abcd", 32)), (32, 32, 32)),
}
NAMES = ("toy", "movielens", "spotify8", "powerset4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = (4096, 65536)
SMOKE = Schedule((64,), rounds=3, compile=False, seconds=0.02, sizes=NCFSizes(50, 40))


@dataclass(frozen=True)
class Counts:
    """The FLOPs of a step, and the bytes that it must move through memory.

    Attributes:
        flops: Multiplications and additions of present and routed blocks.
        bytes: In one pass: the input, each weight and each gradient, once.
        bytes_layered: Layer by layer: also every activation, five times.
    """

    flops: int
    bytes: int
    bytes_layered: int


def count(net: InterpretableMLP, batch: int, size: int) -> Counts:
    """Counts of a step of ``net``, without a gradient of the input; values have ``size`` bytes."""
    layouts = net.layers.layouts
    weights = sum(layout.num_weights + layout.out_features for layout in layouts)
    routed = sum(layout.num_routed_weights for layout in layouts[1:])
    hidden = sum(layout.out_features for layout in layouts)
    once = batch * layouts[0].in_features + batch + 2 * weights
    return Counts(
        2 * batch * (2 * weights + routed), size * once, size * (once + 5 * batch * hidden)
    )


class Data:
    """Random rows and labels for one network."""

    def __init__(
        self, features: int, batch: int, dtype: torch.dtype, device: str, steps: int = 4
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)  # on the host, drawing takes seconds
        drawn: dict[str, Any] = {"generator": generator, "device": device}
        self.batch = batch
        self.x = torch.randn(steps * batch, features, **drawn).to(dtype)
        self.target = torch.randint(2, (steps * batch,), **drawn).float()

    def step(self, k: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of step ``k``; they repeat."""
        start = k * self.batch % len(self.x)
        return self.x[start : start + self.batch], self.target[start : start + self.batch]


def trainer(name: str, network: str, data: Data, compiled: bool) -> Trainer:
    """A trainer of one of ``NOTES``."""
    model = build(name, network, data.x.device.type).to(data.x)
    return Trainer(data, model, loss_of(name, model), compiled)


def backend(name: str, device: str) -> str | None:
    """The backend of a model: on a GPU, float32 runs in one pass only where that is named."""
    return "native" if name == OURS and device != "cpu" else None


def build(name: str, network: str, device: str = "cpu") -> nn.Module:
    """One of ``NOTES``, from the same seed."""
    family, hidden = NETWORKS[network][0](), NETWORKS[network][1]
    torch.manual_seed(0)
    if name == BLACK_BOX:
        widths = [family.in_features, *(family.num_experts * width for width in hidden)]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
    ours = InterpretableMLP(family, hidden, backend=backend(name, device))
    return PaperStyleMLP(ours) if name == PAPER else ours


def loss_of(name: str, model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of rows and labels."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        if name == OURS:
            return model.gem_loss(x, target, weighting="deselection")
        if name == BLACK_BOX:
            return F.binary_cross_entropy_with_logits(model(x)[:, 0].float(), target)
        logits = model.layers.layered(x) if name == LAYERED else model(x)
        return gem_loss(logits, target, model.family, weighting="deselection")

    return loss


def movielens_trainer(name: str, data: movielens.Data, sizes: NCFSizes, compiled: bool) -> Trainer:
    """A trainer of the MovieLens model, in the dtype of ``data.numeric``."""
    kind = OURS if name == LAYERED else name
    which = backend(name, data.numeric.device.type)
    model: Any = movielens.build(kind, sizes, which).to(data.numeric)

    def layered(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
        inputs = model.inputs(users, items, data.codes[users], data.numeric[items])
        logits = model.experts.layers.layered(inputs)
        return gem_loss(logits, target, model.family, **movielens.OPTIONS)

    loss = layered if name == LAYERED else movielens.loss_of(model, data)
    return Trainer(data, model, loss, compiled)


def subject(network: str, dtype: torch.dtype) -> Subject:
    """One network in one dtype."""

    def prepare(batch: int, schedule: Schedule, device: str) -> Make:
        if network == "movielens":
            samples = movielens.Data(schedule.sizes, batch, device, steps=4)
            samples.numeric = samples.numeric.to(dtype)
            sizes = schedule.sizes
            return lambda name, compiled: movielens_trainer(name, samples, sizes, compiled)
        data = Data(NETWORKS[network][0]().in_features, batch, dtype, device)
        return lambda name, compiled: trainer(name, network, data, compiled)

    title = f"{network}, {str(dtype)[6:]}"
    return Subject(title, FILE, NOTES, BATCHES, prepare, compiled=(OURS, BLACK_BOX))


def bound(network: str, batch: int, dtype: torch.dtype, rates: PeakRates) -> dict[str, Any]:
    """Counts of a step, and the microseconds that they take at the peak rates."""
    net = InterpretableNCF(MOVIELENS_1M).experts if network == "movielens" else build(OURS, network)
    counts = count(net, batch, dtype.itemsize)  # type: ignore[arg-type]
    return {
        **vars(counts),
        "products_us": counts.flops / rates.gflops / 1e3,
        "bytes_us": counts.bytes / rates.gbs / 1e3,
        "bytes_layered_us": counts.bytes_layered / rates.gbs / 1e3,
    }


def run(
    schedule: Schedule,
    out: Path,
    console: Console,
    device: str = "cpu",
    networks: Sequence[str] = NAMES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """Measure every network, dtype and batch, and print; write the file into ``out`` after each."""
    document: dict[str, Any] = {"machine": machine(device)}
    document |= {"results": [], "ratios": [], "bounds": []}
    for name in dtypes:
        small = schedule.sizes is not MOVIELENS_1M
        rates = measure_peak_rates(DTYPES[name], device, small)
        for network, batch in itertools.product(networks, schedule.batches or BATCHES):
            of = {"network": network, "dtype": name}
            measured = training.measure(subject(network, DTYPES[name]), batch, schedule, device)
            ratios = training.ratios(measured)
            training.show({"results": measured, "ratios": ratios}, f"{network}, {name}", console)
            document["results"] += [{**of, **record} for record in measured]
            document["ratios"] += [{**of, **ratio} for ratio in ratios]
            document["bounds"].append(
                {**of, "batch": batch, **bound(network, batch, DTYPES[name], rates)}
            )
            write_json(out / FILE, document)
    print_line(console, f"results: {out / FILE}")
    return document
