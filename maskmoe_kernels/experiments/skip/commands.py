"""The commands ``maskmoe skip prepare | generate | train | evaluate | explain``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.arguments import (
    Commands,
    above_zero,
    add_command,
    add_common,
    add_device,
    natural,
    positive,
    seed,
    usable,
)
from maskmoe_kernels.experiments.skip.generator.settings import CHUNK, GeneratorSettings
from maskmoe_kernels.experiments.skip.settings import (
    MODELS,
    NORMALIZATIONS,
    PRECISIONS,
    Pace,
    Settings,
)

# Each command imports the modules that it needs, so that pyarrow and matplotlib stay optional.

#: Kind of model -> default number of layers.
_LAYERS = {"transformer": 3, "gru": 1}
_SETTINGS = (
    "model", "width", "heads", "batch_size", "seed", "precision", "confidence", "sharpness",
    "weighting", "normalize",
)  # fmt: skip


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``skip`` and its commands."""
    parser = commands.add_parser(
        "skip",
        help="skip prediction in music sessions: from csv to explained sessions",
        description="Skip prediction on the Music Streaming Sessions Dataset (section 4.3), or on\n"
        "generated sessions whose causes are known. Each command has its own --help.",
        epilog="example:\n"
        "  maskmoe skip generate --sessions 20000 --out runs/skip/csv\n"
        "  maskmoe skip prepare runs/skip/csv --out runs/skip/data\n"
        "  maskmoe skip train --data runs/skip/data --out runs/skip/model\n"
        "  maskmoe skip evaluate --data runs/skip/data --runs runs/skip/model \\\n"
        "      --causes runs/skip/csv --out runs/skip\n"
        "  maskmoe skip explain --data runs/skip/data --run runs/skip/model --out runs/skip",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prepare(inner)
    _add_generate(inner)
    _add_train(inner)
    _add_evaluate(inner)
    _add_explain(inner)


# --- Commands ----------------------------------------------------------------------------


def _prepare(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.skip.data.prepare import prepare

    made = prepare(
        arguments.sources,
        arguments.out,
        strict=arguments.strict,
        workers=arguments.workers,
        row_group=arguments.row_group,
        progress=console.is_terminal,
    )
    sizes = ", ".join(f"{count:,} {split}" for split, count in made.sessions.items())
    lines = [f"{made.tracks:,} tracks; sessions: {sizes}; left out: {made.dropped:,}"]
    for kind, count in made.counts.items():
        lines += [f"{kind}: {count:,}", *(f"  {text}" for text in made.examples.get(kind, []))]
    for line in [*lines, f"shards: {arguments.out}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _generate(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.skip.generator.generate import generate

    try:
        settings = GeneratorSettings(
            arguments.sessions, arguments.seed, arguments.tracks, arguments.chunk
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    generate(arguments.out, settings, workers=arguments.workers, progress=console.is_terminal)
    text = f"{settings.sessions:,} sessions and their causes: {arguments.out}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _train(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.shared.ranks import joined
    from maskmoe_kernels.experiments.skip import figures as skip_figures
    from maskmoe_kernels.experiments.skip import train as skip

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    layers = arguments.layers or _LAYERS[arguments.model.rpartition("-")[2]]
    given = {name: getattr(arguments, name) for name in _SETTINGS}
    settings = Settings(**given, layers=layers)
    pace = Pace(
        epochs=arguments.epochs,
        steps=arguments.steps,
        patience=arguments.patience,
        learning_rate=arguments.lr,
        least_rate=min(arguments.least_lr, arguments.lr),
        plateau=arguments.plateau,
        clip=arguments.clip,
        save_every=arguments.save_every,
    )
    means = skip.Means(arguments.workers, arguments.resume, arguments.compile)
    with joined(usable(arguments.device)) as ranks:
        _, run = skip.train(arguments.data, arguments.out, settings, pace, means, ranks, console)
    if not ranks.first:
        return
    missing = skip_figures.draw_curves({arguments.model: run.history}, arguments.out)
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in run.best.items())
    console.print(f"best epoch {run.best_epoch}: {metrics}", highlight=False)
    text = f"no figure: {missing}" if missing else f"checkpoint, report, figure: {arguments.out}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _evaluate(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.skip.evaluate import evaluate

    evaluate(
        arguments.data,
        arguments.out,
        arguments.runs,
        causes=arguments.causes,
        split=arguments.split,
        sharpness=arguments.sharpness,
        device=usable(arguments.device),
        console=console,
    )


def _explain(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.skip.explain import explain

    explain(
        arguments.data,
        arguments.run_folder,
        arguments.session,
        split=arguments.split,
        causes=arguments.causes,
        sharpness=arguments.sharpness,
        out=arguments.out,
        console=console,
    )


def _check_pyarrow() -> None:
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            "sessions are read and written with pyarrow, which is not installed. "
            'Run: pip install "maskmoe_kernels[data]"'
        ) from error


# --- Arguments ---------------------------------------------------------------------------


def _add_prepare(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "prepare",
        _prepare,
        "convert the official csv files to checked shards, once",
        "Convert log_*.csv and tf_*.csv to typed, checked shards of sessions, split 80-10-10.\n"
        "Rows that are wrong are counted and shown, and their sessions left out. What an earlier\n"
        "run finished is not done again.",
        "maskmoe skip prepare mssd/ --out runs/skip/data --workers 4",
        hint="; finished files are kept: run the same command to go on",
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="PATH", help="the csv files, or their folders"
    )
    _add_out(parser)
    parser.add_argument("--strict", action="store_true", help="stop at the first wrong row")
    _add_workers(parser, 1, "processes that convert files side by side (default: 1)")
    parser.add_argument(
        "--row-group", type=positive, default=2048, metavar="N",
        help="sessions that are read together (default: 2048)",
    )  # fmt: skip


def _add_generate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        "make sessions in the official format whose causes are known",
        "Generate sessions like the real ones, with one planted cause behind each label of the\n"
        "second half, so that the right expert is known: log_*.csv, tf_0.csv, causes_*.parquet.",
        "maskmoe skip generate --sessions 200000 --out runs/skip/csv",
        hint="; finished files are kept: run the same command to go on",
    )
    parser.add_argument("--sessions", type=positive, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--tracks", type=positive, default=50_000, metavar="N",
        help="how many tracks there are, from 2000 (default: 50000)",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=positive, default=CHUNK, metavar="N",
        help="sessions of a file (default: %(default)s)",
    )  # fmt: skip
    _add_workers(parser, 1, "processes that write files side by side (default: 1)")
    _add_out(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of everything (default: 0)")


def _add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a model on prepared sessions; goes on where it was stopped",
        "Train one model. Writes a checkpoint after every epoch and every --save-every steps, and\n"
        "goes on from the one in --out: a run that was killed ends with the weights of one that\n"
        "was not. Under torchrun the processes share each batch (gloo on CPUs, nccl on GPUs).",
        "maskmoe skip train --data runs/skip/data --out runs/skip/model\n"
        "  torchrun --nproc-per-node 4 -m maskmoe_kernels skip train --device cuda \\\n"
        "      --data runs/skip/data --out runs/skip/model",
        hint="; the last checkpoint is kept: run the same command to go on",
    )
    _add_data(parser)
    parser.add_argument(
        "--model", choices=MODELS, default=MODELS[0], metavar="MODEL",
        help=f"one of {', '.join(MODELS)} (default: %(default)s)",
    )  # fmt: skip
    _add_size(parser)
    _add_loss(parser)
    _add_pace(parser)
    _add_means(parser)
    add_common(parser)


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width", type=positive, default=16,
        help="units per expert; a black box has those of all eight (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", type=positive, default=1, help="per expert, likewise (default: 1)"
    )
    parser.add_argument(
        "--layers", type=positive, help="of each half (default: Transformer 3, GRU 1)"
    )


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss of the interpretable models")
    group.add_argument(
        "--confidence", choices=("abs", "square", "smooth"), default="abs",
        help="how sure an expert is of its logit, here and in predictions (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--sharpness", type=above_zero, default=1.0,
        help="power of the smaller experts' confidence (default: 1, the paper's rule)",
    )  # fmt: skip
    group.add_argument(
        "--weighting", choices=("selection", "deselection"), default="deselection",
        help="experts learn what they are selected for, or what no smaller one is sure of; the "
        "paper trains by deselection (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--normalize", choices=NORMALIZATIONS, default="batch",
        help="what the weights are divided by: nothing, their sum per track, or over the batch, as "
        "in the paper (default: %(default)s)",
    )  # fmt: skip


def _add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=positive, default=20, help="at most (default: 20)")
    parser.add_argument(
        "--steps",
        type=positive,
        help="of an epoch, after which the model is validated (default: a pass over the data)",
    )
    parser.add_argument(
        "--patience", type=positive, default=4,
        help="epochs without a better validation Acc before training stops (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", dest="batch_size", type=positive, default=128,
        help="sessions a step, over all processes (default: 128)",
    )  # fmt: skip
    parser.add_argument("--lr", type=above_zero, default=1e-4, help="of Adam (default: 1e-4)")
    parser.add_argument(
        "--least-lr", type=above_zero, default=1e-6,
        help="what it is reduced to at the least (default: 1e-6)",
    )  # fmt: skip
    parser.add_argument(
        "--plateau", type=natural, default=1,
        help="epochs without a better validation Acc before it is reduced (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--clip", type=above_zero, default=1.0,
        help="largest norm of all gradients together (default: 1)",
    )  # fmt: skip


def _add_means(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="float32",
        help="bfloat16: autocast, weights stay in float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--threads", type=positive, help="of each process (default: torch's)")
    _add_workers(parser, 0, "processes that prepare batches (default: 0, none of its own)")
    parser.add_argument(
        "--save-every", type=positive, default=500, metavar="STEPS",
        help="between checkpoints within an epoch (default: 500)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on from the checkpoint in --out, if there is one (default: yes)",
    )  # fmt: skip


def _add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "trained models and baselines in one table, and who decides",
        "Judge trained models and the baselines last and mean on the test sessions, beside the\n"
        "paper's table 2; show which expert decides and, for generated sessions, whether it is\n"
        "the right one. Writes evaluation.json and figures into --out.",
        "maskmoe skip evaluate --data runs/skip/data --runs runs/skip/model --out runs/skip",
    )
    _add_data(parser)
    parser.add_argument(
        "--runs", nargs="*", type=Path, default=[], metavar="DIR", help="of `maskmoe skip train`"
    )
    _add_judging(parser)
    _add_out(parser)
    add_device(parser)


def _add_explain(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "explain",
        _explain,
        "one session in words: which expert decides on each track, and how sure",
        "Judge the second half of one session, and tell for each track which expert decides, how\n"
        "sure it is and what it looked at. With --out, also draw the shares of all experts.",
        "maskmoe skip explain --data runs/skip/data --run runs/skip/model --out runs/skip",
    )
    _add_data(parser)
    parser.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="of `maskmoe skip train`, with an interpretable model",
    )
    parser.add_argument("--session", metavar="ID", help="which one (default: the split's first)")
    _add_judging(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write json and figure there")


def _add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--causes", type=Path, metavar="DIR",
        help="of `maskmoe skip generate`: where the causes of the sessions are known",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test",
        help="which sessions (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sharpness", type=above_zero,
        help="power of the smaller experts' confidence (default: as trained)",
    )  # fmt: skip


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="of `maskmoe skip prepare`"
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing"
    )


def _add_workers(parser: argparse.ArgumentParser, default: int, text: str) -> None:
    kind = positive if default else natural
    parser.add_argument("--workers", type=kind, default=default, metavar="N", help=text)
