"""The command ``python -m bench``: measure, compare, train, or measure the overhead of a call."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import rivals
from bench.arguments import parse
from bench.contender import Contender
from bench.device import LOST, check_device
from bench.layers import compare, overhead, pictures, results
from bench.layers.limits import Settings
from bench.layers.ratios import OURS
from bench.layers.run import Run
from bench.layers.suites import SUITES, Suite
from bench.layers.summary import print_summary
from bench.machine import machine
from bench.networks import (
    estimators,
    explanation_cost,
    flows,
    mlp_training,
    movielens_training,
    posthoc,
    shapley_truth,
    training,
    user_rows,
)
from maskmoe_kernels.errors import BackendError, DataError
from maskmoe_kernels.experiments.shared.denormals import denormals_flushed
from maskmoe_kernels.experiments.shared.existing import check_out
from maskmoe_kernels.experiments.shared.output import open_console, print_line
from maskmoe_kernels.files import claim

ERROR, INTERRUPTED = 2, 130


def main(words: Sequence[str], console: Console) -> int:
    """Run one command.

    Args:
        words: Its arguments, without the program's name.
        console: Where tables are printed.

    Returns:
        0; 1 where ours did not run, or became slower in a comparison; 3 where the GPU was lost,
        and a fresh process can continue with ``--resume``.

    Raises:
        DataError: A result file that cannot be used.
        BackendError: A device that does not exist.
        OSError: A file that cannot be read or written.
    """
    arguments = parse(words)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.command in _CPU_ONLY and arguments.device.partition(":")[0] != "cpu":
        what = _CPU_ONLY[arguments.command]
        raise BackendError(f"{what} on the CPU, got --device {arguments.device}; leave it out")
    if arguments.command != "compare":
        check_device(arguments.device)
        _check_out(arguments)
    return _COMMANDS[arguments.command](arguments, console)


def entry(words: Sequence[str]) -> int:
    """The exit status of the process: of :func:`main`, or after one line about its error."""
    hint = ""
    try:
        if parse(words).command == "run":
            hint = "; finished cases are kept: continue with --resume"
        return main(words, open_console())
    except (BackendError, DataError, OSError) as error:
        print_line(open_console(stderr=True), f"error: {error}", "bold red")
        return ERROR
    except KeyboardInterrupt:
        print_line(open_console(stderr=True), f"interrupted{hint}", "yellow")
        return INTERRUPTED


def _check_out(arguments: argparse.Namespace) -> None:
    """Name the folder of the results; what it holds already is not replaced unasked."""
    smoke = getattr(arguments, "smoke", False)
    if smoke and arguments.out is None:  # a folder for this alone
        arguments.out = claim("build/bench-smoke")
        return
    arguments.out = arguments.out or Path("runs/bench")
    names = [_FILES[getattr(arguments, "model", arguments.command)]]
    continued = arguments.command in ("run", "estimators")
    check_out(arguments, names, names if continued else ())


# --- Layers ------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, console: Console) -> int:
    name = "smoke" if arguments.smoke else arguments.suite or _default_suite(arguments.device)
    suite, out = SUITES[name], arguments.out
    settings = _settings(arguments, suite)
    path = out / results.NAME
    document = results.start(
        path, machine(arguments.device), {"suite": name, **asdict(settings)}, arguments.resume
    )
    run = Run(settings, contenders(arguments, suite), document, path, console)
    within = math.inf if arguments.within is None else arguments.within
    cases = suite.cases(arguments.families, arguments.widths, arguments.batch, arguments.dtypes)
    lost = run.measure(cases, within)
    no_pictures = pictures.draw(document, out)
    print_summary(document["summary"], console)
    if name == "smoke":
        _smoke_the_rest(document, arguments, out, console)
    written = " and two pictures" if no_pictures is None else f"; no pictures: {no_pictures}"
    print_line(console, f"results: {path}{written}")
    if lost:
        print_line(console, "the GPU no longer answers this process: go on with --resume", "red")
        return LOST
    return 1 if document["summary"]["failed"] else 0


def _default_suite(device: str) -> str:
    return "gpu-quick" if torch.device(device).type == "cuda" else "quick"


def _settings(arguments: argparse.Namespace, suite: Suite) -> Settings:
    return Settings(
        rounds=arguments.rounds or suite.rounds,
        budget=suite.budget if arguments.budget is None else arguments.budget,
        longest=suite.longest if arguments.longest is None else arguments.longest,
        memory=memory(arguments),
        compile=arguments.compile,
        device=arguments.device,
        slow=suite.slow,
    )


def contenders(arguments: argparse.Namespace, suite: Suite) -> list[type[Contender]]:
    """Ours and the named contenders; without names, all but those that the suite leaves out."""
    available = rivals.contenders(arguments.device)
    if arguments.contenders is None:
        return [kind for kind in available if kind.name not in suite.without]
    wanted = {OURS, *arguments.contenders}
    return [kind for kind in available if kind.name in wanted]


def memory(arguments: argparse.Namespace) -> float:
    """Bytes that a contender may take. All contenders of a case are in memory at once."""
    if arguments.memory is not None:
        return float(arguments.memory) * 1e9
    if torch.device(arguments.device).type == "cuda":
        return torch.cuda.mem_get_info(arguments.device)[0] / 3
    return 12e9


def _smoke_the_rest(
    document: dict[str, Any], arguments: argparse.Namespace, out: Path, console: Console
) -> None:
    """The other commands, on the run that was just measured."""
    print_line(console, "The run compared to itself:")
    compare.print_comparison(document, document, 1.1, console)
    training.run(
        movielens_training.SUBJECT, movielens_training.SMOKE, out, arguments.device, console
    )
    mlp_training.run(mlp_training.SMOKE, out, console, dtypes=("float32",))


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    first, second = results.load(arguments.first), results.load(arguments.second)
    return int(compare.print_comparison(first, second, arguments.threshold, console))


def _overhead(arguments: argparse.Namespace, console: Console) -> int:
    backend = arguments.backend or overhead.default_backend(arguments.device)
    effort = overhead.Effort(
        arguments.rows, arguments.rounds, arguments.calls, not arguments.no_compile
    )
    document = overhead.run(backend, arguments.device, effort, arguments.out, console)
    return 0 if any("host" in record for record in document["results"]) else 1


# --- Networks ----------------------------------------------------------------------------


def _train(arguments: argparse.Namespace, console: Console) -> int:
    module: Any = movielens_training
    if arguments.model == "mlp":
        module = mlp_training
    elif arguments.model == "skip":
        from bench.networks import skip_training as module  # needs pyarrow
    schedule = module.SMOKE if arguments.smoke else _schedule(arguments)
    out, device = arguments.out, arguments.device
    with denormals_flushed():  # for every model, as the experiments train
        if module is mlp_training:
            chosen = (arguments.networks, arguments.dtypes)
            mlp_training.run(schedule, out, console, device, *chosen)
        else:
            training.run(module.SUBJECT, schedule, out, device, console)
    return 0


def _schedule(arguments: argparse.Namespace) -> training.Schedule:
    return training.Schedule(
        batches=arguments.batch,
        rounds=arguments.rounds,
        compile=not arguments.no_compile,
        seconds=arguments.seconds,
    )


def _flows(arguments: argparse.Namespace, console: Console) -> int:
    names = [field.name for field in fields(flows.Grid)]
    given = {name: getattr(arguments, name) for name in names}
    document = flows.run(
        flows.SMOKE if arguments.smoke else flows.Grid(**given), arguments.out, console
    )
    return 0 if any("step" in record for record in document["results"]) else 1


def _shapley(arguments: argparse.Namespace, console: Console) -> int:
    if len(arguments.features) != len(arguments.seconds):
        raise DataError(
            f"--seconds must name one time for each of --features, got {arguments.seconds} for "
            f"{arguments.features}"
        )
    sizes = arguments.features, arguments.seconds, arguments.rows, arguments.budgets
    if arguments.smoke:
        sizes = [3], [0.1], 2, [10]
    shapley_truth.run(*sizes, arguments.out, console)
    return 0


def _explain(arguments: argparse.Namespace, console: Console) -> int:
    schedule = training.Schedule(arguments.batch, arguments.rounds, compile=False)
    sizes = arguments.groups, arguments.width, arguments.rows
    if arguments.smoke:
        sizes, schedule = (3, 2, 64), training.Schedule((16,), 2, compile=False, seconds=0.001)
    explanation_cost.run(*sizes, schedule, arguments.out, console)
    return 0


def _posthoc(arguments: argparse.Namespace, console: Console) -> int:
    sizes = arguments.epochs, arguments.samples, arguments.side
    posthoc.run(*((1, 40, 5) if arguments.smoke else sizes), arguments.out, console)
    return 0


def _estimators(arguments: argparse.Namespace, console: Console) -> int:
    grid = arguments.tables, arguments.models, arguments.splits, None
    if arguments.smoke:
        grid = ["wine"], [estimators.OURS, estimators.BOOSTED, estimators.LINEAR], 1, 2
    estimators.run(*grid, arguments.out, console, arguments.resume)
    return 0


def _users(arguments: argparse.Namespace, console: Console) -> int:
    grid = arguments.users, arguments.batch, arguments.rounds, arguments.warm
    if arguments.smoke:
        grid = [100, 1_000], 8, 2, 2
    user_rows.run(*grid, arguments.out, console)
    return 0


_CPU_ONLY = {
    "users": "tables of users are measured",
    "estimators": "estimators are compared",
    "flows": "flows are measured",
    "shapley": "Shapley values are compared",
    "explain": "explanations are measured",
    "posthoc": "explanations are compared",
}
#: What a command writes; of ``train``, by its model.
_FILES = {
    "run": results.NAME,
    "estimators": estimators.NAME,
    "flows": flows.FILE,
    "overhead": overhead.NAME,
    "shapley": shapley_truth.NAME,
    "explain": explanation_cost.FILE,
    "posthoc": posthoc.FILE,
    "users": user_rows.FILE,
    "movielens": movielens_training.SUBJECT.file,
    "skip": "skip_training.json",
    "mlp": mlp_training.FILE,
}
_COMMANDS = {
    "run": _run,
    "compare": _compare,
    "estimators": _estimators,
    "flows": _flows,
    "overhead": _overhead,
    "shapley": _shapley,
    "explain": _explain,
    "posthoc": _posthoc,
    "users": _users,
    "train": _train,
}
