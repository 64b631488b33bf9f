"""The command: ``python -m bench``, which is also ``maskmoe bench``."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import results, rivals
from bench.arguments import parse
from bench.layers import compare, pictures
from bench.layers.contender import Contender, Unavailable
from bench.layers.harness import measure
from bench.layers.limits import Settings
from bench.layers.ratios import OURS
from bench.layers.summary import print_summary, summarize
from bench.layers.table import print_result
from bench.lost import LOST, is_lost
from bench.networks import mlp_training as network_training
from bench.networks import training
from bench.precision import products
from bench.roofs import Roofs, measure_roofs
from bench.shapes import DTYPES, SUITES, Case, Suite
from maskmoe_kernels.errors import BackendError, DataError
from maskmoe_kernels.experiments.shared.denormals import denormals_flushed
from maskmoe_kernels.experiments.shared.files import claim


def main(argv: Sequence[str] | None, program: str, console: Console) -> int:
    """Measure, compare or train.

    Args:
        argv: Arguments without the program's name.
        program: Its name, for the help.
        console: Where tables go.

    Returns:
        0; 1 where ours did not run, or became slower in a comparison; 3 where the GPU was lost,
        and a fresh process can go on with ``--resume``.

    Raises:
        DataError: A result file that cannot be used.
        BackendError: A device that is none.
        OSError: A file that cannot be read or written.
    """
    kind, arguments = parse(argv or [], program)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if getattr(arguments, "out", None) is not None:
        claim(arguments.out)
    return _COMMANDS[kind](arguments, console)


# --- Run ---------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, console: Console) -> int:
    check_device(arguments.device)
    on_gpu = torch.device(arguments.device).type == "cuda"
    name = arguments.suite or ("gpu-quick" if on_gpu else "quick")
    name = "smoke" if arguments.smoke else name
    out = arguments.out or Path("build/bench-smoke" if arguments.smoke else "runs/bench")
    suite = SUITES[name]
    settings = Settings(
        rounds=arguments.rounds or suite.rounds,
        budget=suite.budget if arguments.budget is None else arguments.budget,
        longest=suite.longest if arguments.longest is None else arguments.longest,
        memory=_memory(arguments),
        compile=arguments.compile,
        device=arguments.device,
        slow=suite.slow,
    )
    kinds = _contenders(arguments, suite)
    cases = suite.cases(arguments.families, arguments.widths, arguments.batch, arguments.dtypes)
    path = out / results.NAME
    here = results.machine(arguments.device)
    written = {"suite": name, **asdict(settings)}
    document = results.start(path, here, written, arguments.resume)
    within = math.inf if arguments.within is None else arguments.within
    lost = _measure_all(cases, settings, kinds, document, path, within, console)
    missing = pictures.draw(document, out)
    print_summary(document["summary"], console)
    if name == "smoke":
        _smoke_the_rest(document, arguments, out, console)
    console.print(
        f"{path} and two pictures" if missing is None else f"{path}; no pictures: {missing}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if lost:
        console.print("the GPU no longer answers this process: go on with --resume", style="red")
        return LOST
    return 1 if document["summary"]["failed"] else 0


def _contenders(arguments: argparse.Namespace, suite: Suite) -> list[type[Contender]]:
    """Ours, and who is asked for; else all but those that the suite leaves out."""
    there = rivals.contenders(arguments.device)
    if arguments.contenders is None:
        return [kind for kind in there if kind.name not in suite.without]
    wanted = {OURS, *arguments.contenders}
    return [kind for kind in there if kind.name in wanted]


def _memory(arguments: argparse.Namespace) -> float:
    """Bytes that a contender may take: all of them are there at once."""
    if arguments.memory is not None:
        return float(arguments.memory) * 1e9
    if torch.device(arguments.device).type == "cuda":
        return torch.cuda.mem_get_info(arguments.device)[0] / 3
    return 12e9


def _measure_all(
    cases: Sequence[Case],
    settings: Settings,
    kinds: Sequence[type[Contender]],
    document: dict[str, Any],
    path: Path,
    within: float,
    console: Console,
) -> bool:
    """Every case that is not in ``document`` yet, begun ``within`` seconds; written after each.

    Returns:
        Whether the GPU was lost: after a bad access no kernel runs in this process any more.
    """
    small = document["settings"]["suite"] == "smoke"
    done = results.finished(document)
    open_cases = [c for c in cases if c not in done and str(c) not in document["skipped"]]
    if len(open_cases) < len(cases):
        kept = len(cases) - len(open_cases)
        console.print(f"{kept} of {len(cases)} cases are done already", highlight=False)
    document["summary"] = summarize(document["results"])
    started = time.perf_counter()
    for k, case in enumerate(open_cases):
        if time.perf_counter() - started > within:
            left = f"{len(open_cases) - k} cases left out: {within:g} s have passed (--within)"
            console.print(left, style="yellow", highlight=False)
            break
        if case.dtype not in document["roofs"]:
            with products(tf32=case.dtype == "tf32"):
                roofs = measure_roofs(DTYPES[case.dtype], settings.device, small)
            document["roofs"][case.dtype] = asdict(roofs)
        roofs = Roofs(**document["roofs"][case.dtype])
        try:
            result = measure(case, settings, roofs.gflops, kinds)
        except (Unavailable, MemoryError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if is_lost(settings.device):
                reason = f"{results.GPU_LOST} {reason}"
            document["skipped"][str(case)] = reason
            console.print(f"{case}: skipped: {reason}", markup=False, highlight=False)
        else:
            document["results"].append(result)
            print_result(result, console)
        document["summary"] = summarize(document["results"])
        results.save(path, document)
        spent = time.perf_counter() - started
        console.print(f"{k + 1} of {len(open_cases)} cases, {spent:.0f} s\n", highlight=False)
        if is_lost(settings.device):
            return True
    return False


def _smoke_the_rest(
    document: dict[str, Any], arguments: argparse.Namespace, out: Path, console: Console
) -> None:
    """The other commands on what was just measured."""
    console.print("The run compared to itself:")
    compare.print_comparison(document, document, 1.1, console)
    training.run(training.SMOKE, out, arguments.device, console)
    network_training.run(network_training.SMOKE, out, console, dtypes=("float32",))


# --- Compare and train -------------------------------------------------------------------


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    a, b = results.load(arguments.first), results.load(arguments.second)
    return int(compare.print_comparison(a, b, arguments.threshold, console))


def _train(arguments: argparse.Namespace, console: Console) -> int:
    check_device(arguments.device)
    subject, smoke = training.SUBJECT, training.SMOKE
    if arguments.model == "skip":
        from bench.networks import skip_training  # which needs pyarrow

        subject, smoke = skip_training.SUBJECT, skip_training.SMOKE
    plan = (
        smoke
        if arguments.smoke
        else training.Plan(
            batches=arguments.batch,
            rounds=arguments.rounds,
            compile=not arguments.no_compile,
            seconds=arguments.seconds,
        )
    )
    out = arguments.out or Path("build/bench-smoke" if arguments.smoke else "runs/bench")
    with denormals_flushed():  # for all, as the experiments train
        if arguments.model == "networks":
            chosen = (arguments.networks, arguments.dtypes)
            network_training.run(plan, out, console, arguments.device, *chosen)
        else:
            training.run(plan, out, arguments.device, console, subject)
    return 0


def check_device(device: str) -> None:
    """Raise BackendError unless torch can use ``device`` here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"--device {device} cannot be used here: {reason}") from error


_COMMANDS = {"run": _run, "compare": _compare, "train": _train}


def entry(words: list[str]) -> int | str:
    """The exit status of ``python -m bench``: :func:`main`, or its error in one line."""
    try:
        return main(words, "python -m bench", Console())
    except (BackendError, DataError, OSError) as error:
        return f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        return "interrupted; what was measured is kept: go on with --resume"
