"""The arguments of the command: a run, ``compare`` or ``train``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from bench import rivals
from bench.networks import mlp_training as network_training
from bench.networks import training
from bench.shapes import DTYPES
from maskmoe_kernels.layout.families import FAMILIES


def parse(argv: Sequence[str], program: str) -> tuple[str, argparse.Namespace]:
    """Which of ``run``, ``compare`` and ``train``, and its arguments.

    Raises:
        SystemExit: 2 for arguments that cannot be parsed, 0 after ``--help``.
    """
    words = list(argv)
    kind = words.pop(0) if words[:1] in (["compare"], ["train"]) else "run"
    return kind, _PARSERS[kind](program).parse_args(words)


def _parser(program: str, text: str, *examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=program,
        description=text,
        epilog="\n  ".join(["example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run_parser(program: str) -> argparse.ArgumentParser:
    parser = _parser(
        program,
        "Our layers beside the best that can be written without them: interleaved rounds on every\n"
        "case of a suite. Writes bench.json, after each case, and two pictures into --out.\n"
        f"See also `{program} compare --help` and `{program} train --help`.",
        f"{program} --suite quick --out runs/bench",
        f"{program} compare runs/before/bench.json runs/bench/bench.json",
        f"{program} train --batch 256",
    )
    add = parser.add_argument
    families = ", ".join(FAMILIES)
    suites = ("quick", "full", "gpu-quick", "gpu")
    add("--suite", choices=suites, help="default: quick, on a GPU gpu-quick")
    add("--smoke", action="store_true", help="tiny cases of everything: does it run?")
    add(
        "--families",
        nargs="+",
        choices=FAMILIES,
        metavar="NAME",
        help=f"instead of the suite's: {families}",
    )
    add("--widths", nargs="+", type=_positive, metavar="D", help="units an expert")
    add("--batch", nargs="+", type=_positive, metavar="B", help="rows")
    add("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    add(
        "--contenders",
        nargs="+",
        choices=sorted({kind.name for kind in rivals.GPU}),
        metavar="NAME",
        help="ours and these only: 'best dense' QuACK ..., as the tables call them",
    )
    add("--rounds", type=_positive, metavar="N", help="least rounds a case")
    add("--budget", type=_seconds, metavar="S", help="seconds of rounds a case")
    add(
        "--longest",
        type=_seconds,
        metavar="S",
        help="leave out what would take longer than this at the rate of torch's own GEMM",
    )
    add(
        "--memory",
        type=_seconds,
        metavar="GB",
        help="leave out what needs more (default: 12; on a GPU, a third of what is free)",
    )
    add("--within", type=_seconds, metavar="S", help="begin no case after so many seconds")
    add(
        "--compile",
        action="store_true",
        help="the torch.compile variants too, up to 16 experts: tens of seconds each",
    )
    add("--resume", action="store_true", help="keep the cases that --out holds")
    return _with_common(parser)


def _compare_parser(program: str) -> argparse.ArgumentParser:
    parser = _parser(
        f"{program} compare",
        "What became slower or faster between two results. A change counts where our time, its\n"
        "ratio to the floor and its ratio to the best rival all say so and the quartiles lie\n"
        "apart. Exit status 1: something became slower.",
        f"{program} compare runs/before/bench.json runs/bench/bench.json",
    )
    parser.set_defaults(threads=None)
    add = parser.add_argument
    add("first", type=Path, metavar="FIRST", help="bench.json of the earlier run")
    add("second", type=Path, metavar="SECOND", help="bench.json of the later run")
    add(
        "--threshold",
        type=_ratio,
        default=1.1,
        metavar="X",
        help="a change below this ratio is none (default: %(default)g)",
    )
    return parser


def _train_parser(program: str) -> argparse.ArgumentParser:
    parser = _parser(
        f"{program} train",
        "Samples a second of training a model of ours and its black box on random inputs of the\n"
        "real sizes: MovieLens (and paper style); skip: the Transformers, in sessions; networks:\n"
        "whole networks in one pass, and layer by layer. Writes training.json, skip_training.json\n"
        "or networks.json into --out.",
        f"{program} train --batch 256",
    )
    add = parser.add_argument
    models = ("movielens", "skip", "networks")
    # fmt: off
    add("--model", choices=models, default=models[0], help="default: %(default)s")
    add(
        "--batch", nargs="+", type=_positive, metavar="B",
        help="samples (default: movielens 256 4096, skip 128, networks 4096 65536)",
    )
    add("--rounds", type=_positive, default=15, metavar="N", help="default: %(default)s")
    add(
        "--seconds", type=_seconds, default=training.Plan.seconds, metavar="S",
        help="of a sample (default: %(default)g)",
    )
    add(
        "--networks", nargs="+", choices=network_training.NAMES, metavar="NAME",
        default=network_training.NAMES,
        help=f"of --model networks: {', '.join(network_training.NAMES)}",
    )
    add(
        "--dtypes", nargs="+", choices=network_training.DTYPES, metavar="DTYPE",
        default=tuple(network_training.DTYPES),
        help=f"of --model networks, in this order: {', '.join(network_training.DTYPES)}",
    )
    # fmt: on
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--smoke", action="store_true", help="tiny: does it run?")
    return _with_common(parser)


def _with_common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--threads", type=_positive, metavar="N", help="of torch (default: its own choice)")
    add("--out", type=Path, metavar="DIR", help="default: runs/bench")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    return _number(text, 0)


def _ratio(text: str) -> float:
    return _number(text, 1)


def _number(text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from {least}, got {text!r}")
    return value


_PARSERS = {"run": _run_parser, "compare": _compare_parser, "train": _train_parser}
