"""What the commands have in common: how a command is added, and its common arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from maskmoe_kernels.errors import BackendError

Commands = argparse._SubParsersAction


class AlternativeCommands(argparse._SubParsersAction):  # type: ignore[type-arg]  # no generic when run
    """Commands in place of their parent's own work: what the parent requires is not needed."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for action in parser._actions:
            action.required = False
        super().__call__(parser, namespace, values, option_string)


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, Console], int | None],
    summary: str,
    text: str,
    example: str,
    hint: str = "",
) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        commands: Where to add it.
        name: Of the command.
        run: What it does; its result is the process's, ``None`` is 0.
        summary: A line for the list of commands.
        text: Its description.
        example: A command line or more.
        hint: What to say after an interruption.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, hint=hint)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """``--out``, ``--seed`` and ``--device``."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write; made if missing"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of everything random, from 0 (default: 0)"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device", default="cpu", help="where to train: cpu, cuda, cuda:1, ... (default: cpu)"
    )


def add_existing(parser: argparse.ArgumentParser, resume: str | None = None) -> None:
    """``--overwrite``, and ``--resume`` where a run can be continued.

    Args:
        parser: Of the command.
        resume: What ``--resume`` does, for the help; ``None``: the command has none.
    """
    group = parser.add_mutually_exclusive_group()
    if resume is not None:
        group.add_argument("--resume", action="store_true", help=resume)
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="start again and replace the results in --out; without it they are never replaced",
    )


def usable(device: str) -> str:
    """``device``, if torch can use it here.

    Raises:
        BackendError: It cannot.
    """
    try:
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"--device {device} cannot be used here: {reason}") from error
    return device


# Types of arguments: each turns text into a value, or raises an error that quotes the text.


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def natural(text: str) -> int:
    """A whole number from 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number in [0, 2^32): seeds are multiplied and added to, and torch takes 64 bits."""
    if not (text.isascii() and text.isdigit()) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number in [0, 2^32), got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def sharpness(text: str) -> float | None:
    """A finite number above 0, or ``None`` for "auto"."""
    value = _number(text)
    if text == "auto":
        return None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected 'auto' or a number above 0, got {text!r}")
    return value


def tolerance(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
