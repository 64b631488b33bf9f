"""The ``maskmoe`` command: ``info``, ``toy``, ``movielens``, ``skip``, ``bench``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import maskmoe_kernels as mk
from maskmoe_kernels.errors import BackendError, DataError, LayoutError
from maskmoe_kernels.experiments.shared.arguments import (
    Commands,
    add_command,
    add_common,
    positive,
    share,
    sharpness,
    usable,
)
from maskmoe_kernels.experiments.skip import commands as skip
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.draw import draw_layout
from maskmoe_kernels.layout.subsets import SubsetFamily

# The experiments, and with them figures and tables of data, are imported by the commands that
# run them: ``maskmoe info`` stays quick, and needs no extra.

_BAD_INPUT, _INTERRUPTED = 2, 130
_USER_ERRORS = (LayoutError, BackendError, DataError, FloatingPointError, OSError)
_MODELS = ("content", "black-box", "interpretable")


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers below 1e-38 count as zero, in this thread and in those that it starts.

    Adam's averages of weights that have no gradient for long shrink to such numbers and stay there;
    each costs a hundred cycles a step.
    """
    before = int(torch.tensor(1e-40).view(torch.int32)) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``None`` takes the process's.

    Returns:
        0, or 1 where a benchmark found something slower or broken, or 2 after an ``error: ...``
        line on stderr, or 130 after Ctrl-C.

    Raises:
        SystemExit: 2 for arguments that cannot be parsed, 0 after ``--help`` or ``--version``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    rest: list[str] = []
    if words[:1] == ["bench"]:  # which reads its own words
        words, rest = words[:1], words[1:]
    if words[:2] == ["movielens", "explain"]:
        words[:2] = ["movielens explain"]
    arguments = _parser().parse_args(words, argparse.Namespace(words=rest))
    command: Callable[[argparse.Namespace, Console], int | None] = arguments.run
    measures = words[:1] == ["bench"]  # as a process finds it
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with nullcontext() if measures else denormals_flushed():
            return command(arguments, Console()) or 0
    except _USER_ERRORS as error:
        text = " ".join(str(error).split())
        _stderr().print(f"error: {text}", style="bold red")
        return _BAD_INPUT
    except KeyboardInterrupt:
        _stderr().print(f"interrupted{arguments.hint}", style="yellow")
        return _INTERRUPTED


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


# --- Commands ----------------------------------------------------------------------------


def _info(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.layout is not None:
        layout, names = _named_layout(arguments.layout)
        console.print(
            draw_layout(layout, names, names), markup=False, highlight=False, soft_wrap=True
        )
        return
    facts = mk.info()
    versions = Table(title=f"maskmoe_kernels {mk.__version__}", show_header=False)
    for name, value in facts.items():
        if name != "backends":
            versions.add_row(name, "none" if value is None else str(value))
    backends = Table("backend", "what it is", "runs here", title="Backends, fastest first")
    for name, entry in facts["backends"].items():
        obstacle = entry["obstacle"]
        state = "[green]yes[/]" if obstacle is None else f"[yellow]no:[/] {_plain(obstacle)}"
        backends.add_row(name, _plain(entry["description"]), state)
    console.print(versions, backends)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _named_layout(words: Sequence[str]) -> tuple[BlockLayout, list[str]]:
    """Hidden layout of a family by name, or of subsets written as ``a b a+b``."""
    family, width = _family(words), 16
    return family.hidden_layout(width, width), family.names


def _family(words: Sequence[str]) -> SubsetFamily:
    name = words[0] if len(words) == 1 else ""
    if name == "ncf4":
        words = ["content", "content+user", "content+item", "content+user+item"]
    elif name == "toy3":
        words = ["x1", "x2", "x1+x2"]
    elif name.startswith("powerset") and name[8:].isdigit():
        count = int(name[8:])
        if not 1 <= count <= 8:
            raise LayoutError(f"powersetN draws 1 to 8 groups, got {count}")
        return SubsetFamily.powerset({f"x{k}": 1 for k in range(1, count + 1)})
    subsets = {word: word.split("+") for word in words}
    groups = dict.fromkeys((group for groups in subsets.values() for group in groups), 1)
    if "" in groups:
        raise LayoutError(f"expected subsets such as a b a+b, got {' '.join(words)!r}")
    if len(subsets) < len(words):
        raise LayoutError(f"a subset may appear once, got {' '.join(words)!r}")
    return SubsetFamily(groups, subsets)


def _toy(arguments: argparse.Namespace, console: Console) -> None:
    from maskmoe_kernels.experiments.toy.train import run_toy

    run_toy(
        task=arguments.task,
        seed=arguments.seed,
        out=arguments.out,
        device=usable(arguments.device),
        epochs=arguments.epochs,
        console=console,
    )
    console.print(f"report and figures: {arguments.out}", markup=False, highlight=False)


def _movielens(arguments: argparse.Namespace, console: Console) -> None:
    from maskmoe_kernels.experiments.movielens.train import Options, run_movielens

    options = Options(
        models=tuple(dict.fromkeys(arguments.models)),
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        embeddings=arguments.embeddings,
        device=usable(arguments.device),
        resume=arguments.resume,
        sharpness=arguments.sharpness,
        max_loss=arguments.max_loss,
    )
    run_movielens(arguments.data, arguments.out, options, arguments.negatives, console)


def _explain(arguments: argparse.Namespace, console: Console) -> None:
    from maskmoe_kernels.experiments.movielens.explain import explain

    explain(
        arguments.data,
        arguments.checkpoint,
        arguments.user,
        arguments.item,
        top=arguments.top,
        sharpness=arguments.sharpness,
        out=arguments.out,
        console=console,
    )


def _bench(arguments: argparse.Namespace, console: Console) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench" / "command.py").is_file():
        raise BackendError(
            "the benchmark lives in a checkout of maskmoe_kernels and is not part of the installed "
            "package: clone the repository and run `make setup && .venv/bin/maskmoe bench` there"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    command = importlib.import_module("bench.command")
    code: int = command.main(arguments.words, "maskmoe bench", console)
    return code


# --- Arguments ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskmoe",
        description="Interpretable mixtures of restricted experts: every prediction says which "
        "groups of features decided it.",
        epilog="Each command has its own --help, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"maskmoe {mk.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_info(commands)
    _add_toy(commands)
    _add_movielens(commands)
    _add_explain(commands)
    skip.add_to(commands)
    _add_bench(commands)
    return parser


def _add_info(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "info",
        _info,
        "versions, backends, and a picture of a family of experts",
        "Show versions and which backends can run here, or why one cannot. With --layout, draw\n"
        "which expert reads which in a hidden layer, and where the gradient is stopped.",
        "maskmoe info --layout user item user+item",
    )
    parser.add_argument(
        "--layout",
        nargs="+",
        metavar="NAME",
        help="ncf4 (the MovieLens experts), toy3, powersetN (N = 1..8 groups), or your own "
        "subsets, their groups joined by +",
    )


def _add_toy(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "toy",
        _toy,
        "train on clusters whose right explanation is known (half a minute)",
        "Train the experts {x1}, {x2}, {x1, x2} on Gaussian clusters and show which expert\n"
        "decides where. Writes report.json and the figures into --out.",
        "maskmoe toy --task b --out runs/toy",
    )
    parser.add_argument(
        "--task",
        choices=("a", "b", "c"),
        default="b",
        help="a: four clusters, one input is enough for each; b: four more that need both "
        "inputs; c: four inputs, XOR on the last two (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=positive, help="passes of 500 steps of 256 samples (default: 30)"
    )
    add_common(parser)


def _add_movielens(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "movielens",
        _movielens,
        "train and compare three recommenders on MovieLens-1M (hours on one core)",
        "Train a content-based model, a black box and the interpretable mixture on MovieLens-1M;\n"
        "rank each user's last movie among 99 others, and show which expert decides. Writes\n"
        "report.json, figures and one checkpoint a model into --out, after every epoch.\n"
        "`maskmoe movielens explain --help` tells how to explain a user's recommendations.",
        "maskmoe movielens --data ml-1m.zip --out runs/ml\n"
        "  maskmoe movielens --data ml-1m.zip --out runs/ml --resume    # after an interruption",
        hint="; every finished epoch is kept: run the same command with --resume to go on",
    )
    _add_data(parser)
    parser.add_argument(
        "--negatives",
        type=Path,
        metavar="FILE",
        help="the 99 other movies of each user: lines of (user,movie) and 99 ids, tab-separated, "
        "gzipped or not (default: drawn, by --seed)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=_MODELS,
        default=_MODELS,
        metavar="MODEL",
        help=f"which of {', '.join(_MODELS)} (default: all)",
    )
    _add_training(parser)
    _add_mixing(parser)
    add_common(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs",
        type=positive,
        default=20,
        help="most passes over the data, each with 4 fresh negatives a positive (default: 20)",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        default=5,
        help="epochs without a better validation NDCG@10 before a model stops (default: 5)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=256, help="samples a step (default: 256)"
    )
    parser.add_argument(
        "--embeddings",
        choices=("shared", "strict"),
        default="shared",
        help="shared: every expert that reads an embedding trains it, as the authors do; strict: "
        "only the smallest subsets with that group do (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoints in --out; finished models are only evaluated",
    )


def _add_mixing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sharpness",
        type=sharpness,
        default=None,
        metavar="auto|X",
        help="power of the smaller experts' confidence: 1 is the paper's rule, larger leaves more "
        "to the largest expert; auto: the smallest that loses at most --max-loss on validation "
        "items (default: auto)",
    )
    parser.add_argument(
        "--max-loss",
        type=share,
        default=0.01,
        metavar="LOSS",
        help="what auto may lose of HR@10 and of NDCG@10, each between 0 and 1 (default: 0.01)",
    )


def _add_explain(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "movielens explain",
        _explain,
        "a user's recommendations, who decided on each, and why in words",
        "List a user's best unseen movies, or one movie, with the probability, the expert that\n"
        "decides, its share of the decision, and what it looked at in words.",
        "maskmoe movielens explain --data ml-1m.zip --checkpoint runs/ml/interpretable.pt --user 1",
    )
    _add_data(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="interpretable.pt, as `maskmoe movielens` writes it",
    )
    parser.add_argument("--user", type=int, required=True, metavar="ID", help="id in users.dat")
    parser.add_argument("--item", type=int, metavar="ID", help="one movie's id in movies.dat")
    parser.add_argument(
        "--top", type=positive, default=10, metavar="N", help="how many movies (default: 10)"
    )
    parser.add_argument(
        "--sharpness",
        type=sharpness,
        default=None,
        metavar="auto|X",
        help="as in training; auto: the one in the report.json beside the checkpoint, 1 where "
        "there is none (default: auto)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write the explanation there, as json"
    )


def _add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    add_command(
        commands,
        "bench",
        _bench,
        "our layers beside the best rivals; compare results; training speed (in a checkout)",
        "Interleaved rounds of our layers and their rivals on many shapes. `maskmoe bench --help`\n"
        "in a checkout lists the options.",
        "maskmoe bench --suite quick --out runs/bench",
        hint="; every finished case is kept: run the same command with --resume to go on",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="MovieLens-1M: ml-1m.zip or the folder it unpacks to, from "
        "https://grouplens.org/datasets/movielens/1m/",
    )
