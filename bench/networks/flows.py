"""Normalizing flows of zuko, nflows and pyro, before and after ``mk.convert_``.

Both models of a case are in one process, with the same weights; rounds are interleaved, and the
median of their ratios is told, for the speed of a shared machine drifts between rounds. *Forward*
is the log-likelihood of a batch without a graph, *step* the gradients of its mean. With one thread,
times are the process's own, whatever else the machine does. Where nothing was replaced, nothing is
measured.

The layers before ``convert_`` are timed alone, too. *Outside* is the share of a phase before that
is spent elsewhere (in transforms, activations, the loss): 1 / outside times as fast is a limit to
all that can be done to layers. *Bound* is how many times as fast a phase would be if each replaced
layer took the share of its time that its mask leaves of its weights, and all else as long as
before: splines and activations that are computed faster, too, exceed it.

*Page faults* (a call's median) tell of memory that the process gave back to the system and asks for
again. Which call has to do so depends on what lay where before: a step of a large spline flow
varies by a tenth and more. With ``MALLOC_TRIM_THRESHOLD_=16000000000
MALLOC_MMAP_THRESHOLD_=33554432`` in the environment glibc keeps its memory, before and after alike,
but for blocks of more than 32 MiB.
"""

from __future__ import annotations

import copy
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import maskmoe_kernels as mk
from bench.clock import own_clock
from bench.machine import machine
from bench.statistics import geometric_mean, quartiles
from maskmoe_kernels.experiments.shared.output import (
    Column,
    print_line,
    print_record,
    print_table,
)
from maskmoe_kernels.experiments.shared.report import write_json

FILE = "flows.json"
TRANSFORMS = 3
BEFORE, AFTER, LAYERS = "before", "after", "layers before"
PHASES = ("forward", "step")
LogLikelihood = Callable[[nn.Module, Tensor], Tensor]


def _zuko(kind: str, features: int, hidden: int) -> nn.Module:
    import zuko

    flow: nn.Module = getattr(zuko.flows, kind)(
        features, 0, transforms=TRANSFORMS, hidden_features=(hidden, hidden)
    )
    return flow


def _nflows(features: int, hidden: int) -> nn.Module:
    from nflows.flows import MaskedAutoregressiveFlow

    flow: nn.Module = MaskedAutoregressiveFlow(features, hidden, TRANSFORMS, 2)
    return flow


def _nflows_splines(features: int, hidden: int) -> nn.Module:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import (
        CompositeTransform,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        ReversePermutation,
    )

    steps: list[nn.Module] = []
    for _ in range(TRANSFORMS):
        spline = MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, hidden, num_bins=8, tails="linear", tail_bound=5.0
        )
        steps += [ReversePermutation(features), spline]
    flow: nn.Module = Flow(CompositeTransform(steps), StandardNormal([features]))
    return flow


def _pyro(features: int, hidden: int) -> nn.Module:
    from pyro.nn import ConditionalAutoRegressiveNN

    return ConditionalAutoRegressiveNN(features, 4, [hidden, hidden])  # type: ignore[no-any-return]


def _affine(network: nn.Module, x: Tensor) -> Tensor:
    """Of pyro's network, as one affine autoregressive transform uses it."""
    mean, log_scale = network(x, context=x[:, :4])
    return (-0.5 * ((x - mean) * torch.exp(-log_scale)).square() - log_scale).sum(-1)


#: Name -> how to make it from features and hidden units, and its log-likelihood.
NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], LogLikelihood]] = {
    "zuko MAF": (lambda f, h: _zuko("MAF", f, h), lambda model, x: model().log_prob(x)),
    "zuko NSF": (lambda f, h: _zuko("NSF", f, h), lambda model, x: model().log_prob(x)),
    "nflows MAF": (_nflows, lambda model, x: model.log_prob(x)),  # type: ignore[operator]
    "nflows NSF": (_nflows_splines, lambda model, x: model.log_prob(x)),  # type: ignore[operator]
    "pyro ARN": (_pyro, _affine),
}


class Sample(NamedTuple):
    """Of one call, the mean of some that were timed together."""

    seconds: float
    page_faults: float


Samples = dict[tuple[str, str], list[Sample]]


@dataclass(frozen=True)
class Grid:
    """What is measured, and for how long.

    Attributes:
        longest: Seconds; a case whose call takes longer is left out.
        budget: Seconds of rounds a case.
        force: Replace every layer.
    """

    networks: Sequence[str] = tuple(NETWORKS)
    features: Sequence[int] = (16, 64, 256)
    hidden: Sequence[int] = (64, 512, 1024)
    batch: Sequence[int] = (256, 2048)
    rounds: int = 5
    budget: float = 0.3
    longest: float = 1.0
    compile: bool = False
    force: bool = False


SMOKE = Grid(features=(4,), hidden=(8,), batch=(16,), rounds=2, budget=0.0, force=True)


def run(grid: Grid, out: Path, console: Console) -> dict[str, Any]:
    """Measure every case and print; write ``FILE`` into ``out`` after each."""
    document: dict[str, Any] = {"machine": machine("cpu"), "grid": asdict(grid), "results": []}
    for network in grid.networks:
        for features in grid.features:
            for hidden in grid.hidden:
                for batch in grid.batch:
                    case = {"network": network, "features": features, "hidden": hidden}
                    record = measure(case | {"batch": batch}, grid)
                    document["results"].append(record)
                    document["summary"] = summary(document["results"])
                    write_json(out / FILE, document)
                    print_record(console, *_in_words(record))
    show(document, console)
    print_line(console, f"results: {out / FILE}")
    return document


def measure(case: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Milliseconds of forward and step, before and after, and what was replaced."""
    make, log_likelihood = NETWORKS[case["network"]]
    torch.manual_seed(0)
    try:
        before = make(case["features"], case["hidden"])
    except ImportError as error:
        return case | {"unavailable": f"{error.name} is not installed"}
    except ValueError as error:  # pyro: fewer hidden units than features
        return case | {"unavailable": str(error)}
    after = copy.deepcopy(before)
    report = mk.convert_(after, batch=case["batch"], force=grid.force)
    count = sum(r.converted for r in report)
    if count == 0 and not report.splines:
        return case | {"converted": f"0/{len(report)}", "unavailable": "nothing gains, as before"}
    x = torch.randn(case["batch"], case["features"])
    record = case | {"compiled": grid.compile, "converted": f"{count}/{len(report)}"}
    record["splines"] = len(report.splines)
    record["difference"] = _difference(before, after, log_likelihood, x)
    models = {BEFORE: before, AFTER: after}
    if grid.compile:
        torch.compiler.reset()  # or dynamo gives up after the first cases
    calls = {
        (phase, name): _call(model, log_likelihood, x, phase, grid.compile)
        for phase in PHASES
        for name, model in models.items()
    }
    replaced = {before.get_submodule(r.name): r.density for r in report if r.converted}
    if replaced and not grid.compile:
        calls |= _layers_alone([*replaced], lambda: log_likelihood(before, x))
    samples = _sample(calls, grid)
    if samples is None:
        return record | {"unavailable": f"a call takes more than {grid.longest:g} s"}
    absent = _absent(replaced) if replaced else 0.0
    return record | {phase: _found(samples, phase, absent) for phase in PHASES}


def _found(samples: Samples, phase: str, absent: float) -> dict[str, Any]:
    """What a record says of a phase. ``absent``: the share of all weights that masks leave out."""
    of = {name: samples[phase, name] for name in (BEFORE, AFTER)}
    times = {name: quartiles([one.seconds for one in some]) for name, some in of.items()}
    found: dict[str, Any] = {f"{name}_ms": [1e3 * q for q in times[name]] for name in of}
    before = times[BEFORE][1]
    rounds = zip(of[BEFORE], of[AFTER], strict=True)
    found["times_as_fast_rounds"] = [*quartiles([b.seconds / a.seconds for b, a in rounds])]
    found["times_as_fast"] = found["times_as_fast_rounds"][1]
    found["page_faults"] = {
        name: statistics.median(one.page_faults for one in some) for name, some in of.items()
    }
    if (phase, LAYERS) in samples:
        layers = quartiles([s.seconds for s in samples[phase, LAYERS]])[1]
        found["layers_before_ms"] = 1e3 * layers
        found["outside"] = max(0.0, 1 - layers / before)
        found["bound"] = before / (before - absent * layers)
    return found


def _absent(density_of: dict[nn.Module, float]) -> float:
    """The share of all weights that the masks leave out."""
    sizes = {layer: layer.weight.numel() for layer in density_of}  # type: ignore[union-attr, operator]
    present = sum(density_of[layer] * size for layer, size in sizes.items())
    return 1 - present / sum(sizes.values())


def _layers_alone(
    layers: Sequence[nn.Module], run_model: Callable[[], object]
) -> dict[tuple[str, str], Callable[[], object]]:
    """Both phases of ``layers``, on what they are given in the model, and of nothing else."""
    given: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)
        given.append((layer, x, torch.randn_like(y)))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    run_model()
    for handle in handles:
        handle.remove()

    def forward() -> None:
        with torch.no_grad():
            for layer, x, _ in given:
                layer(x)

    def step() -> None:
        for layer, x, grad_y in given:
            for tensor in (x, *layer.parameters()):
                tensor.grad = None
            layer(x).backward(grad_y)

    return {("forward", LAYERS): forward, ("step", LAYERS): step}


def _difference(
    before: nn.Module, after: nn.Module, log_likelihood: LogLikelihood, x: Tensor
) -> float:
    """Largest difference of a log-likelihood, relative to the largest."""
    with torch.no_grad():
        expected, actual = (log_likelihood(model, x) for model in (before, after))
    return float((expected - actual).abs().max() / expected.abs().max())


def _call(
    model: nn.Module, log_likelihood: LogLikelihood, x: Tensor, phase: str, compiled: bool
) -> Callable[[], object]:
    def loss() -> Tensor:
        return -log_likelihood(model, x).mean()

    computed: Callable[[], Tensor] = torch.compile(loss, dynamic=False) if compiled else loss
    parameters = [*model.parameters()]

    def forward() -> None:
        with torch.no_grad():
            computed()

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        computed().backward()

    return forward if phase == "forward" else step


def _sample(calls: dict[tuple[str, str], Callable[[], object]], grid: Grid) -> Samples | None:
    """A sample a round of each call; None where calls take too long."""
    repeats = {}
    for key, call in calls.items():
        call()
        once = _timed(call, 1).seconds
        if once > grid.longest:
            return None
        repeats[key] = max(1, round(3e-3 / once))
    samples: Samples = {key: [] for key in calls}
    order, start, done = random.Random(0), time.perf_counter(), 0
    while done < grid.rounds or time.perf_counter() - start < grid.budget:
        for key in order.sample([*calls], len(calls)):
            if repeats[key] > 1:  # a short call: the caches hold this model's data then
                calls[key]()
            samples[key].append(_timed(calls[key], repeats[key]))
        done += 1
    return samples


def _timed(call: Callable[[], object], repeats: int) -> Sample:
    clock = own_clock()
    faults, start = _page_faults(), clock()
    for _ in range(repeats):
        call()
    return Sample((clock() - start) / repeats, (_page_faults() - faults) / repeats)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Times as fast: geometric mean and worst of forward and step, and of steps from hidden 512."""
    measured = [r for r in results if "step" in r]
    chosen = {
        "forward": [r["forward"]["times_as_fast"] for r in measured],
        "step": [r["step"]["times_as_fast"] for r in measured],
        "step, hidden >= 512": [r["step"]["times_as_fast"] for r in measured if r["hidden"] >= 512],
    }
    return {
        name: {"mean": geometric_mean(values), "worst": min(values), "cases": len(values)}
        for name, values in chosen.items()
        if values
    }


def _in_words(record: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """A case, and what was found: titles of :func:`print_record`."""
    fields = {name: str(record[name]) for name in ("features", "hidden", "batch")}
    if "unavailable" in record:
        return record["network"], fields | {"not measured:": record["unavailable"]}
    for phase in PHASES:
        fields[phase] = f"{record[phase]['times_as_fast']:.2f}x as fast"
        if "bound" in record[phase]:
            bound, outside = record[phase]["bound"], record[phase]["outside"]
            fields[phase] += f" (bound {bound:.2f}, outside {outside:.0%})"
    replaced = {name: str(record[name]) for name in ("converted", "splines")}
    return record["network"], fields | replaced


def show(document: dict[str, Any], console: Console) -> None:
    """Print the summary as a table."""
    if not document["summary"]:
        print_line(console, "No case was measured.", "yellow")
        return
    columns = [Column("phase", text=True), Column("mean"), Column("worst"), Column("cases")]
    rows = [
        [name, f"{of['mean']:.2f}", f"{of['worst']:.2f}", str(of["cases"])]
        for name, of in document["summary"].items()
    ]
    print_table(console, "Flows: times as fast after mk.convert_", columns, rows)
