"""What a command does about results that its folder holds already: nothing without being asked.

The rule is the same for all commands, as are the arguments (:func:`.arguments.add_existing`). A
folder with results of an earlier run is refused. With ``--resume`` the run in it is continued, if
it has the same settings. With ``--overwrite`` the command starts again and replaces them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.files import claim

_SHOWN = 4


def check_out(
    arguments: argparse.Namespace, results: Sequence[str], continued: Sequence[str] = ()
) -> None:
    """Check that a command may write its results to ``--out``.

    Args:
        arguments: With ``out`` and what :func:`.arguments.add_existing` adds.
        results: Patterns of the names of files that the command writes.
        continued: Those of them from which ``--resume`` continues.

    Raises:
        DataError: The folder cannot be written to, or holds results that are neither to be
            continued nor to be replaced.
    """
    out: Path = arguments.out
    try:
        claim(out)
    except OSError as error:
        raise DataError(f"--out {error}") from error
    found = _found(out, results)
    if not found or arguments.overwrite:
        return
    names = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    ways = "--overwrite to start again and replace them, or another folder"
    if not continued:
        raise DataError(f"--out {out}: holds results already ({names}). Give {ways}")
    if not arguments.resume:
        ways = f"--resume to continue that run, {ways}"
        raise DataError(f"--out {out}: holds a run already ({names}). Give {ways}")
    if not _found(out, continued):
        raise DataError(
            f"--out {out}: holds results ({names}), but no {' or '.join(continued)} from which "
            f"--resume could continue. Give {ways}"
        )


def _found(folder: Path, patterns: Sequence[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
