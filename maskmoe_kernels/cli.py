"""The ``maskmoe`` command: ``info``, and the commands of the experiments."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

import maskmoe_kernels as mk
from maskmoe_kernels import _interrupt
from maskmoe_kernels.errors import BackendError, DataError, LayoutError
from maskmoe_kernels.experiments.movielens import commands as movielens
from maskmoe_kernels.experiments.shared.arguments import Commands, add_command
from maskmoe_kernels.experiments.shared.denormals import denormals_flushed
from maskmoe_kernels.experiments.shared.output import (
    Column,
    open_console,
    print_line,
    print_picture,
    print_table,
)
from maskmoe_kernels.experiments.skip import commands as skip
from maskmoe_kernels.experiments.toy import commands as toy
from maskmoe_kernels.layout.draw import draw_layout
from maskmoe_kernels.layout.families import FAMILIES, family_named
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.dispatch import yes_or_why_not

# Modules of commands are light: what trains, draws or reads data is imported by the command that
# runs it. ``maskmoe info`` stays quick, and needs no extra.

_BAD_INPUT = 2
_USER_ERRORS = (LayoutError, BackendError, DataError, FloatingPointError, OSError)
_WIDTH = 16  # units per expert in the picture of a layer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``None`` takes the process's.

    Returns:
        0, or 2 after an ``error: ...`` line on stderr, or 130 after Ctrl-C.

    Raises:
        SystemExit: 2 for arguments that cannot be parsed, 0 after ``--help`` or ``--version``.
    """
    _interrupt.restore()
    hint = ""
    try:
        arguments = _parser().parse_args(argv)
        hint = arguments.hint
        command: Callable[[argparse.Namespace, Console], int | None] = arguments.run
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
            sys.stdout.reconfigure(errors="backslashreplace")
        with denormals_flushed():
            return command(arguments, open_console()) or 0
    except _USER_ERRORS as error:
        print_line(open_console(stderr=True), f"error: {error}", style="bold red")
        return _BAD_INPUT
    except KeyboardInterrupt:
        print_line(open_console(stderr=True), f"interrupted{hint}", style="yellow")
        return _interrupt.EXIT_STATUS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskmoe",
        description="Interpretable mixtures of restricted experts: every prediction says which\n"
        "groups of features decided it.",
        epilog="Each command has its own --help, with an example. Some have commands of their\n"
        "own: `maskmoe movielens explain` explains a user's recommendations.\n"
        "In a checkout, `python -m bench` measures the layers beside their best rivals.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maskmoe {mk.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_info(commands)
    for experiment in (toy, movielens, skip):
        experiment.add_to(commands)
    return parser


# --- info --------------------------------------------------------------------------------


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
        help=f"a family by name ({', '.join(FAMILIES)}, powersetN with N = 1 to 8 groups), or "
        "your own subsets, their groups joined by +",
    )


def _info(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.layout is not None:
        family = _family(arguments.layout)
        layout, names = family.hidden_layout(_WIDTH, _WIDTH), family.names
        width = console.width if console.is_terminal else None
        print_picture(console, draw_layout(layout, names, names, width=width))
        return
    facts = mk.info()
    versions = [
        row for name, value in facts.items() if name != "backends" for row in _fact(name, value)
    ]
    backends = []
    for name, entry in facts["backends"].items():
        reason = entry["unsupported_reason"]
        state = Text(yes_or_why_not(reason), "green" if reason is None else "yellow")
        backends.append((name, entry["description"], state))
    about = [Column("name", text=True), Column("value", text=True, prose=True)]
    print_table(console, f"maskmoe_kernels {mk.__version__}", about, versions)
    about = [
        Column("backend", text=True),
        Column("what it is", text=True, prose=True, optional=1),
        Column("runs here", text=True, prose=True),
    ]
    print_table(console, "Backends, fastest first", about, backends)


def _fact(name: str, value: object) -> list[tuple[str, str]]:
    """Rows of a fact: of a dict one for each of its keys, with the names of both."""
    if isinstance(value, dict) and "unsupported_reason" in value:
        return [(name.replace("_", " "), yes_or_why_not(value["unsupported_reason"]))]
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _fact(f"{name} {key}", inner)]
    if name in ("build cpu", "build cuda"):  # why it was not built
        return [(name, yes_or_why_not(None if value is None else str(value)))]
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return [(name.replace("_", " "), "none" if value in (None, "") else str(value))]


def _family(words: Sequence[str]) -> SubsetFamily:
    """A family by name, or of subsets written as ``a b a+b``."""
    if len(words) == 1 and "+" not in words[0]:
        return family_named(words[0])
    subsets = {word: word.split("+") for word in words}
    groups = dict.fromkeys((group for groups in subsets.values() for group in groups), 1)
    if "" in groups:
        raise LayoutError(f"expected subsets such as a b a+b, got {' '.join(words)!r}")
    if len(subsets) < len(words):
        raise LayoutError(f"a subset may appear once, got {' '.join(words)!r}")
    return SubsetFamily(groups, subsets)
