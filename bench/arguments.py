"""The arguments of ``python -m bench`` and of its commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import rivals
from bench.cases import DTYPES
from bench.layers.suites import SUITES
from bench.networks import flows, mlp_training
from bench.networks.estimators import BOOSTED, EBM, LINEAR, OURS, TABLES
from bench.networks.training import Schedule
from maskmoe_kernels.experiments.shared.arguments import add_existing
from maskmoe_kernels.layout.families import FAMILIES

PROGRAM = "python -m bench"
MODELS = ("movielens", "skip", "mlp")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; ``command`` is ``"run"`` unless another command is named.

    Raises:
        SystemExit: 2 for arguments that cannot be parsed, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, **_texts(
        "Our layers beside the best that can be written without them: interleaved rounds on every\n"
        "case of a suite. Writes bench.json, after each case, and two pictures into --out.",
        f"{PROGRAM} --suite quick --out runs/bench",
        f"{PROGRAM} compare runs/before/bench.json runs/bench/bench.json",
        f"{PROGRAM} train --batch 256",
    ))  # fmt: skip
    _add_cases(parser)
    _add_effort(parser)
    _add_common(parser, "keep the cases that --out holds, and measure the rest")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="other commands")
    _add_compare(commands)
    _add_train(commands)
    _add_flows(commands)
    _add_overhead(commands)
    _add_shapley(commands)
    _add_estimators(commands)
    _add_explain(commands)
    _add_posthoc(commands)
    _add_users(commands)
    parser.set_defaults(command="run")
    return parser.parse_args(words)


# --- Measuring layers --------------------------------------------------------------------


def _add_cases(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    add = parser.add_argument
    suites = [name for name in SUITES if name != "smoke"]
    add("--suite", choices=suites, help="default: quick, on a GPU gpu-quick")
    add("--smoke", action="store_true", help="tiny cases of everything: does it run?")
    families = f"instead of the suite's: {', '.join(FAMILIES)}"
    add("--families", nargs="+", choices=FAMILIES, metavar="NAME", help=families)
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


def _add_effort(parser: argparse.ArgumentParser) -> None:
    """How long and how much is measured."""
    add = parser.add_argument
    add("--rounds", type=_positive, metavar="N", help="minimum number of rounds a case")
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


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("compare", help="two results: what became slower", **_texts(
        "What became slower or faster between two results. A change counts where our time, its\n"
        "ratio to the floor and its ratio to the best rival all say so and the quartiles lie\n"
        "apart. Exit status 1: something became slower.",
        f"{PROGRAM} compare runs/before/bench.json runs/bench/bench.json",
    ))  # fmt: skip
    add = parser.add_argument
    add("first", type=Path, metavar="FIRST", help="bench.json of the earlier run")
    add("second", type=Path, metavar="SECOND", help="bench.json of the later run")
    add(
        "--threshold",
        type=_ratio,
        default=1.1,
        metavar="X",
        help="ignore a change below this ratio (default: %(default)g)",
    )


def _add_shapley(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("shapley", help="Shapley values against the truth", **_texts(
        "Shapley values of correlated Gaussians, whose closed form is known: ours, learned from\n"
        "samples, beside shap and shapiq on the true function, where they are installed. Error\n"
        "and seconds a row. Writes shapley_truth.json into --out.",
        f"{PROGRAM} shapley --features 4 6 --seconds 10 60",
    ))  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add(
        "--features", nargs="+", type=_positive, default=[4, 6, 8], metavar="N",
        help="default: 4 6 8",
    )
    add(
        "--seconds", nargs="+", type=_seconds, default=[10.0, 60.0, 240.0], metavar="S",
        help="of training, one for each of --features (default: 10 60 240)",
    )
    add("--rows", type=_positive, default=50, metavar="N", help="to explain (default: %(default)s)")
    add(
        "--budgets", nargs="+", type=_positive, default=[10, 100, 1000], metavar="N",
        help="samples that a rival draws for a coalition (default: 10 100 1000)",
    )
    # fmt: on
    add("--smoke", action="store_true", help="a tiny case: does it run?")
    _add_common(parser)


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("explain", help="what explanations cost", **_texts(
        "Shapley values, interactions, Moebius coefficients and sufficient experts of a power set\n"
        "of groups, beside the forward pass that makes their logits; and steps of training with\n"
        "uniform weights, beside the paper's weights and a list of networks. Writes\n"
        "explanation_cost.json into --out.",
        f"{PROGRAM} explain --groups 8 --rows 65536",
    ))  # fmt: skip
    add = parser.add_argument
    add("--groups", type=_positive, default=8, metavar="N", help="default: %(default)s")
    add("--width", type=_positive, default=16, metavar="D", help="units (default: %(default)s)")
    add("--rows", type=_positive, default=65536, metavar="B", help="default: %(default)s")
    batch = "samples a step of training (default: 256 1024)"
    add("--batch", nargs="+", type=_positive, metavar="B", help=batch)
    add("--rounds", type=_positive, default=7, metavar="N", help="default: %(default)s")
    add("--smoke", action="store_true", help="a tiny case: does it run?")
    _add_common(parser)


def _add_posthoc(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("posthoc", help="the toy, explained post hoc and by us", **_texts(
        "The toy task, whose causes are known: a black box explained by LIME, KernelSHAP,\n"
        "integrated gradients and DeepLift, where lime, shap and captum are installed, beside the\n"
        "paper's mixture and ours. Writes posthoc.json and posthoc.png into --out.",
        f"{PROGRAM} posthoc --threads 1",
    ))  # fmt: skip
    add = parser.add_argument
    add("--epochs", type=_positive, default=30, metavar="N", help="default: %(default)s")
    add("--samples", type=_positive, default=1000, metavar="N", help="default: %(default)s")
    side = "points along an axis of the picture (default: %(default)s)"
    add("--side", type=_positive, default=61, metavar="N", help=side)
    add("--smoke", action="store_true", help="a tiny case: does it run?")
    _add_common(parser)


def _add_estimators(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("estimators", help="estimators on real tables", **_texts(
        "Our estimators beside EBM, HistGradientBoosting and linear models on tables that\n"
        "scikit-learn and statsmodels ship: held-out score and seconds of the processor, one\n"
        "thread. Writes estimators.json into --out.",
        f"{PROGRAM} estimators --tables diabetes fair --splits 2",
    ))  # fmt: skip
    add = parser.add_argument
    add("--tables", nargs="+", choices=[*TABLES], default=[*TABLES], help="default: all")
    models = [OURS, EBM, BOOSTED, LINEAR]
    add("--models", nargs="+", choices=models, default=models, help="default: all")
    add("--splits", type=_positive, default=3, metavar="N", help="default: %(default)s")
    add("--smoke", action="store_true", help="one small table, without EBM: does it run?")
    _add_common(parser, resume="make the fits that estimators.json lacks")


def _add_overhead(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("overhead", help="what a call costs beside its kernels", **_texts(
        "What a call of one backend costs beside its kernels: the same functions called plainly,\n"
        "as the registered op, as torch.library's custom_op and triton_op, and through\n"
        "masked_linear; eager and under torch.compile. Writes overhead.json into --out.",
        f"{PROGRAM} overhead --rows 64",
    ))  # fmt: skip
    add = parser.add_argument
    add("--backend", choices=("torch", "triton"), help="default: triton on a GPU, else torch")
    add("--rows", type=_positive, default=256, metavar="B", help="default: %(default)s")
    add("--rounds", type=_positive, default=20, metavar="N", help="default: %(default)s")
    add("--calls", type=_positive, default=50, metavar="N", help="a sample; default: %(default)s")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    _add_common(parser)


# --- Training networks -------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train", help="samples a second of training a model", **_texts(
        "Samples a second of training a model of ours and its black box on random inputs of the\n"
        "real sizes: MovieLens (and paper style); skip: the Transformers, in sessions; mlp: whole\n"
        "networks in one pass, and layer by layer. Writes movielens_training.json,\n"
        "skip_training.json or mlp_training.json into --out.",
        f"{PROGRAM} train --batch 256",
    ))  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    add(
        "--batch", nargs="+", type=_positive, metavar="B",
        help="samples (default: movielens 256 4096, skip 128, mlp 4096 65536)",
    )
    add("--rounds", type=_positive, default=15, metavar="N", help="default: %(default)s")
    add(
        "--seconds", type=_seconds, default=Schedule.seconds, metavar="S",
        help="of a sample (default: %(default)g)",
    )
    add(
        "--networks", nargs="+", choices=mlp_training.NAMES, metavar="NAME",
        default=mlp_training.NAMES, help=f"of --model mlp: {', '.join(mlp_training.NAMES)}",
    )
    add(
        "--dtypes", nargs="+", choices=mlp_training.DTYPES, metavar="DTYPE",
        default=tuple(mlp_training.DTYPES),
        help=f"of --model mlp, in this order: {', '.join(mlp_training.DTYPES)}",
    )
    # fmt: on
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--smoke", action="store_true", help="tiny: does it run?")
    _add_common(parser)


def _add_users(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("users", help="training with few and with many users", **_texts(
        "What a training step of the interpretable GRU costs with embeddings of few and of many\n"
        "users, by sparse and by dense gradients, in seconds of the process. Writes\n"
        "user_rows.json into --out.",
        f"{PROGRAM} users --users 10000 1000000 --threads 1",
    ))  # fmt: skip
    add = parser.add_argument
    sizes = [10_000, 100_000, 1_000_000]
    text = f"rows of the table (default: {' '.join(map(str, sizes))})"
    add("--users", nargs="+", type=_positive, default=sizes, metavar="N", help=text)
    batch = "sessions a step (default: %(default)s)"
    add("--batch", type=_positive, default=256, metavar="B", help=batch)
    add("--rounds", type=_positive, default=30, metavar="N", help="default: %(default)s")
    warm = "steps before those that are measured (default: %(default)s)"
    add("--warm", type=_positive, default=300, metavar="N", help=warm)
    add("--smoke", action="store_true", help="tiny: does it run?")
    _add_common(parser)


def _add_flows(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("flows", help="flows before and after mk.convert_", **_texts(
        "Normalizing flows of zuko, nflows and pyro before and after mk.convert_: log-likelihood\n"
        "without a graph, and with its gradients. Writes flows.json into --out, after each case.",
        f"{PROGRAM} flows --networks 'zuko MAF' --features 64 --hidden 512 --threads 1",
    ))  # fmt: skip
    add, grid = parser.add_argument, flows.Grid()
    names = f"default: all; {', '.join(flows.NETWORKS)}"
    add("--networks", nargs="+", choices=flows.NETWORKS, default=grid.networks, metavar="NAME",
        help=names)  # fmt: skip
    for name, letter, text in (
        ("features", "F", "of a sample"),
        ("hidden", "H", "units a hidden layer"),
        ("batch", "B", "rows"),
    ):
        default = getattr(grid, name)
        add(f"--{name}", nargs="+", type=_positive, metavar=letter, default=default,
            help=f"{text} (default: {' '.join(map(str, default))})")  # fmt: skip
    add("--rounds", type=_positive, default=grid.rounds, metavar="N", help="default: %(default)s")
    add("--budget", type=_seconds, default=grid.budget, metavar="S", help="seconds a case")
    add(
        "--longest",
        type=_seconds,
        default=grid.longest,
        metavar="S",
        help="seconds; cases whose call takes longer are left out (default: %(default)s)",
    )
    add("--compile", action="store_true", help="both through torch.compile: a minute a case")
    add("--force", action="store_true", help="replace layers that do not gain, too")
    add("--smoke", action="store_true", help="tiny: does it run?")
    _add_common(parser)


# --- Shared ------------------------------------------------------------------------------


def _texts(description: str, *examples: str) -> dict[str, Any]:
    return {
        "description": description,
        "epilog": "\n  ".join(["example:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add_common(parser: argparse.ArgumentParser, resume: str | None = None) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--threads", type=_positive, metavar="N", help="of torch (default: its own choice)")
    add("--out", type=Path, metavar="DIR", help="default: runs/bench")
    add_existing(parser, resume)


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
