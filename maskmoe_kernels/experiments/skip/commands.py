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
    add_existing,
    positive,
    seed,
    usable,
)
from maskmoe_kernels.experiments.shared.output import (
    print_line,
    print_record,
    print_written,
)
from maskmoe_kernels.experiments.skip.generator.settings import (
    CHUNK,
    FEWEST_TRACKS,
    KINDS,
    GeneratorSettings,
)
from maskmoe_kernels.experiments.skip.settings import (
    MODELS,
    Settings,
    weighting_of,
)
from maskmoe_kernels.experiments.skip.train_arguments import add_training, add_workers

# Each command imports the modules that it needs, so that pyarrow and matplotlib stay optional and
# other commands start quickly. The settings are light and imported here, for their defaults.

#: What ``evaluate`` writes.
_EVALUATION = (
    "evaluation.json", "subsets.png", "learning_curves.png", "attribution-*.png", "causes-*.png",
)  # fmt: skip
#: Kind of model -> default number of layers.
_LAYERS = {"transformer": 3, "gru": 1}
#: The arguments that are fields of :class:`Settings`.
_SETTINGS = (
    "model", "width", "heads", "batch_size", "seed", "precision", "confidence", "sharpness",
    "weighting", "normalize", "embeddings",
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
    from maskmoe_kernels.experiments.shared.existing import check_out
    from maskmoe_kernels.experiments.skip.data.prepare import prepare
    from maskmoe_kernels.experiments.skip.data.records import LOGS_FOLDER, MANIFEST
    from maskmoe_kernels.experiments.skip.data.sources import find_tables
    from maskmoe_kernels.experiments.skip.schema.parse import read_schema

    schema = read_schema(arguments.schema)
    logs = find_tables(arguments.sources, schema, arguments.out)["events"]
    records = f"{LOGS_FOLDER}/*.json"
    steps = ("checked/*.json", "sorted/*.json", "*/tracks.json")
    check_out(arguments, (MANIFEST, records), (MANIFEST, records))
    if arguments.overwrite:  # without its record, a file is converted again
        for pattern in (MANIFEST, records, *steps):
            for path in arguments.out.glob(pattern):
                path.unlink(missing_ok=True)
    files = f"{len(logs):,} log file{'s' * (len(logs) != 1)}"
    print_line(console, f"preparing {files}, into {arguments.out}")
    made = prepare(
        arguments.sources,
        arguments.out,
        schema,
        strict=arguments.strict,
        workers=arguments.workers,
        row_group=arguments.row_group,
        console=console,
    )
    sizes = ", ".join(f"{count:,} {split}" for split, count in made.sessions.items())
    lines = [f"{made.tracks:,} tracks; sessions: {sizes}; left out: {made.dropped:,}"]
    for kind, count in made.counts.items():
        lines += [f"{kind}: {count:,}", *(f"  {text}" for text in made.examples.get(kind, []))]
    for line in [*lines, f"shards: {arguments.out}"]:
        print_line(console, line)


def _generate(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.shared.existing import check_out
    from maskmoe_kernels.experiments.skip.generator.generate import SETTINGS, generate, remove

    try:
        settings = GeneratorSettings(
            arguments.sessions,
            arguments.seed,
            arguments.tracks,
            arguments.chunk,
            arguments.kind,
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    check_out(arguments, (SETTINGS,), (SETTINGS,))
    if arguments.overwrite:
        remove(arguments.out)
    print_line(console, f"generating {settings.chunks:,} log files, into {arguments.out}")
    generate(arguments.out, settings, workers=arguments.workers, console=console)
    print_line(console, f"{settings.sessions:,} sessions and their causes: {arguments.out}")


def _train(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.shared.existing import check_out
    from maskmoe_kernels.experiments.shared.ranks import joined
    from maskmoe_kernels.experiments.skip import figures as skip_figures
    from maskmoe_kernels.experiments.skip import train as skip
    from maskmoe_kernels.experiments.skip.pace import Pace
    from maskmoe_kernels.experiments.skip.runs import CHECKPOINT, REPORT

    device = usable(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    layers = arguments.layers or _LAYERS[arguments.model.rpartition("-")[2]]
    given = {name: getattr(arguments, name) for name in _SETTINGS}
    given["weighting"] = weighting_of(arguments.explain, arguments.weighting)
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
    with joined(device) as ranks:
        if ranks.first:  # which alone writes
            check_out(arguments, (CHECKPOINT, REPORT, "learning_curves.png"), (CHECKPOINT,))
        _, run = skip.train(arguments.data, arguments.out, settings, pace, means, ranks, console)
    if not ranks.first:
        return
    missing = skip_figures.draw_curves({arguments.model: run.history}, arguments.out)
    metrics = {f"validation {name}": f"{value:.4f}" for name, value in run.best.items()}
    print_record(console, f"best epoch {run.best_epoch}", metrics)
    print_written(console, "checkpoint, report", "figure", arguments.out, missing)


def _evaluate(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.shared.existing import check_out
    from maskmoe_kernels.experiments.skip.evaluate import evaluate

    device = usable(arguments.device)
    check_out(arguments, _EVALUATION)
    evaluate(
        arguments.data,
        arguments.out,
        arguments.runs,
        causes=arguments.causes,
        split=arguments.split,
        sharpness=arguments.sharpness,
        device=device,
        console=console,
    )


def _explain(arguments: argparse.Namespace, console: Console) -> None:
    _check_pyarrow()
    from maskmoe_kernels.experiments.shared.existing import check_out
    from maskmoe_kernels.experiments.skip.explain import explain, file_name

    def check(session: str | None) -> None:
        if arguments.out is not None:
            names = [] if session is None else [f"{file_name(session)}.*"]
            check_out(arguments, names)

    check(None)  # can anything be written there, before long work
    explain(
        arguments.data,
        arguments.run_folder,
        arguments.session,
        split=arguments.split,
        causes=arguments.causes,
        sharpness=arguments.sharpness,
        out=arguments.out,
        console=console,
        check=check,
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
        "convert the files of a log to checked shards, once",
        "Convert log_*.csv and tf_*.csv to typed, checked shards of sessions, split 80-10-10; or\n"
        "the files of another log, csv, parquet or arrow, as --schema declares it.\n"
        "Invalid rows are counted and shown, and their sessions left out. With --resume, files\n"
        "that an earlier run converted are not converted again unless they changed.",
        "maskmoe skip prepare mssd/ --out runs/skip/data --workers 4",
        hint="; finished files are kept: run the same command with --resume to go on",
    )
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="PATH", help="the files, or their folders"
    )
    _add_out(parser)
    parser.add_argument(
        "--schema", default="mssd", metavar="NAME",
        help="what the files hold: mssd, users, or a TOML file of your own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first invalid row")
    add_workers(parser, 1, "processes that convert files in parallel (default: 1)")
    parser.add_argument(
        "--row-group", type=positive, default=2048, metavar="N",
        help="sessions that are read together (default: %(default)s)",
    )  # fmt: skip
    add_existing(
        parser, "keep what an earlier run converted in --out, and convert new and changed files"
    )


def _add_generate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        "generate sessions in the official format whose causes are known",
        "Generate sessions with the statistics of the real ones, and with one known cause for\n"
        "each label of the second half, so that the right expert is known. Writes log_*.csv,\n"
        "tf_0.csv and causes_*.parquet.",
        "maskmoe skip generate --sessions 200000 --out runs/skip/csv",
        hint="; finished files are kept: run the same command with --resume to go on",
    )
    parser.add_argument(
        "--kind", choices=KINDS, default=KINDS[0],
        help="mssd: the format of the Music Streaming Sessions Dataset; users: sessions of known "
        "users, ten of each, for `prepare --schema users` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sessions", type=positive, required=True, metavar="N", help="number of sessions"
    )
    parser.add_argument(
        "--tracks", type=positive, default=GeneratorSettings.tracks, metavar="N",
        help=f"number of tracks, from {FEWEST_TRACKS} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=positive, default=CHUNK, metavar="N",
        help="sessions of a file (default: %(default)s)",
    )  # fmt: skip
    add_workers(parser, 1, "processes that write files in parallel (default: 1)")
    _add_out(parser)
    add_existing(parser, "keep the sessions of the same settings in --out, and write the rest")
    parser.add_argument("--seed", type=seed, default=0, help="of all random numbers (default: 0)")


def _add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a model on prepared sessions, and resume an interrupted run",
        "Train one model. Writes a checkpoint after every epoch and every --save-every steps.\n"
        "A folder that holds a run already is refused without --resume or --overwrite. A run that\n"
        "was killed and resumed ends with the same weights. Under torchrun the processes share\n"
        "each batch (gloo on CPUs, nccl on GPUs).",
        "maskmoe skip train --data runs/skip/data --out runs/skip/model\n"
        "  torchrun --nproc-per-node 4 -m maskmoe_kernels skip train --device cuda \\\n"
        "      --data runs/skip/data --out runs/skip/model",
        hint="; the last checkpoint is kept: run the same command with --resume to go on",
    )
    _add_data(parser)
    parser.add_argument(
        "--model", choices=MODELS, default=MODELS[0], metavar="MODEL",
        help=f"one of {', '.join(MODELS)} (default: %(default)s)",
    )  # fmt: skip
    add_training(parser)
    add_common(parser)


def _add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate trained models and baselines, and show which experts decide",
        "Evaluate trained models and the baselines last and mean on the test sessions, beside the\n"
        "paper's table 2. Show which expert decides and, for generated sessions, whether it is\n"
        "the right one. Writes evaluation.json and figures into --out.",
        "maskmoe skip evaluate --data runs/skip/data --runs runs/skip/model --out runs/skip",
    )
    _add_data(parser)
    parser.add_argument(
        "--runs", nargs="*", type=Path, default=[], metavar="DIR",
        help="folders of `maskmoe skip train`",
    )  # fmt: skip
    _add_judging(parser)
    _add_out(parser)
    add_existing(parser)
    add_device(parser)


def _add_explain(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "explain",
        _explain,
        "explain one session in words: which expert decides on each track, and why",
        "Predict the second half of one session, and say for each track which expert decides, its\n"
        "probability and what it sees. With --out, also draw the shares of all experts.",
        "maskmoe skip explain --data runs/skip/data --run runs/skip/model --out runs/skip",
    )
    _add_data(parser)
    parser.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of `maskmoe skip train` with an interpretable model",
    )
    parser.add_argument("--session", metavar="ID", help="its id (default: the first of the split)")
    _add_judging(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write json and figure there")
    add_existing(parser)


def _add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--causes", type=Path, metavar="DIR",
        help="folder of `maskmoe skip generate`, if the sessions are generated",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="test",
        help="the split to use (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sharpness", type=above_zero,
        help="power of the confidence of smaller experts (default: as trained)",
    )  # fmt: skip


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR",
        help="folder of `maskmoe skip prepare`",
    )  # fmt: skip


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing"
    )
