"""``maskmoe movielens`` and ``maskmoe movielens explain``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens import EVERY_MODEL, MODELS, TOLERANCE, WIDTHS
from maskmoe_kernels.experiments.shared.arguments import (
    AlternativeCommands,
    Commands,
    add_command,
    add_common,
    add_existing,
    positive,
    share,
    sharpness,
    tolerance,
    usable,
)

# What needs pyarrow or figures is imported by the commands that run it.

_CHECKPOINTS = tuple(f"{name}.pt" for name in EVERY_MODEL)
_FIGURES = ("learning_curves", "hasse", "attribution", "attribution_chosen", "frontier",
            "sufficient", "contributions", "interactions")  # fmt: skip
_RESULTS = (*_CHECKPOINTS, "report.json", *(f"{name}.png" for name in _FIGURES))


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``movielens`` and its command ``explain``."""
    parser = add_command(
        commands,
        "movielens",
        _movielens,
        "train and compare three recommenders on MovieLens-1M (hours on one core)",
        "Train a content-based model, a black box and an interpretable one on MovieLens-1M, rank\n"
        "each user's last movie among 99 others, and show which expert decides or suffices.\n"
        "Writes report.json, figures and a checkpoint a model into --out, after every epoch.\n"
        "A folder that holds a run already is refused without --resume or --overwrite.\n"
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
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--explain",
        choices=tuple(MODELS),
        default="sufficient",
        help="sufficient: every expert learns from every sample, the one that sees all predicts, "
        "and the smallest that agrees with it explains; mixture: the paper's rule, by which "
        "experts share the decision (default: %(default)s)",
    )
    which.add_argument(
        "--models",
        nargs="+",
        choices=EVERY_MODEL,
        metavar="MODEL",
        help=f"which of {', '.join(EVERY_MODEL)} to train; interpretable is the mixture (default: "
        "the first two, and the one that --explain says)",
    )
    _add_training(parser)
    _add_mixing(parser)
    add_common(parser)
    inner = parser.add_subparsers(
        title="commands",
        description="Without a command, models are trained. Each command has its own --help.",
        metavar="COMMAND",
        action=AlternativeCommands,
    )
    _add_explain(inner)


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
        "--widths",
        choices=tuple(WIDTHS),
        default=None,
        help="equal: as many units for each expert, as in the paper; largest: more for the expert "
        "that sees all, fewer for the others (default: largest for sufficient, whose prediction is "
        "that expert's, else equal)",
    )
    add_existing(
        parser,
        "continue the run in --out after its last finished epoch, or start where there is none; "
        "finished models are only evaluated",
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
        "explain",
        _explain,
        "a user's recommendations, who decided on each, and why in words",
        "List a user's best unseen movies, or one movie, with the probability, the expert that\n"
        "decides, its share of the decision, and what it looked at in words. Of sufficient.pt:\n"
        "the smallest expert that suffices, and what each group adds to the log-odds.",
        "maskmoe movielens explain --data ml-1m.zip --checkpoint runs/ml/interpretable.pt --user 1",
    )
    _add_data(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="interpretable.pt or sufficient.pt, as `maskmoe movielens` writes it",
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
        help="of interpretable.pt: as in training; auto: the one in the report.json beside it, 1 "
        "where there is none (default: auto)",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="LOGODDS",
        help="of sufficient.pt: how far a smaller expert may be from the one that sees all "
        f"(default: {TOLERANCE:g})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write the explanation there, as json, "
        "and of sufficient.pt a picture of the first movie",
    )
    add_existing(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="MovieLens-1M: ml-1m.zip or the folder it unpacks to, from "
        "https://grouplens.org/datasets/movielens/1m/",
    )


# --- What the commands do ----------------------------------------------------------------


def _movielens(arguments: argparse.Namespace, console: Console) -> None:
    from maskmoe_kernels.experiments.movielens.train import Options, run_movielens
    from maskmoe_kernels.experiments.shared.existing import check_out

    models = arguments.models or MODELS[arguments.explain]
    power = arguments.sharpness
    if power is not None and arguments.models is None and arguments.explain != "mixture":
        raise DataError(
            f"--sharpness {power:g} is of the paper's mixture, which is not trained: give "
            "--explain mixture, too, or leave --sharpness out"
        )
    device = usable(arguments.device)
    check_out(arguments, _RESULTS, _CHECKPOINTS)
    options = Options(
        models=tuple(dict.fromkeys(models)),
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        embeddings=arguments.embeddings,
        widths=arguments.widths,
        device=device,
        resume=arguments.resume,
        sharpness=power,
        max_loss=arguments.max_loss,
    )
    run_movielens(arguments.data, arguments.out, options, arguments.negatives, console)


def _explain(arguments: argparse.Namespace, console: Console) -> None:
    from maskmoe_kernels.experiments.movielens.explain import explain, file_names
    from maskmoe_kernels.experiments.shared.existing import check_out

    if arguments.out is not None:
        check_out(arguments, file_names(arguments.user, arguments.item))
    explain(
        arguments.data,
        arguments.checkpoint,
        arguments.user,
        arguments.item,
        top=arguments.top,
        sharpness=arguments.sharpness,
        tolerance=arguments.tolerance,
        out=arguments.out,
        console=console,
    )
