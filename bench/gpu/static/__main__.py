"""``python -m bench.gpu.static``: compile every launch for every GPU, without a GPU.

Runs the launch code on meta tensors, records what it would launch, compiles that for sm_80, sm_90
and sm_100 and prints registers, shared memory, spills and instructions. ``--check FILE...``
compares with the committed table of this version of Triton: its figures, and the rules that each
kernel is known to break. Without such a table, no kernel may break a rule. ``--write FILE`` writes
a table. ``--estimate`` sets bytes, products and occupancy of each shape against the data sheet of
an H200: an estimate, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read on import: kernels are compiled, not interpreted
os.environ["MASKMOE_TUNE"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from rich.console import Console
from rich.table import Table

from bench.gpu.static.estimate import estimates
from bench.gpu.static.launches import SHAPES
from bench.gpu.static.resources import ARCHITECTURES
from bench.gpu.static.tables import broken, committed, differences, table
from maskmoe_kernels.layout.families import FAMILIES


def main(words: list[str] | None = None) -> int:
    """Print the table; 1 where a kernel breaks a rule or differs from the committed table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="every configuration that may be tried")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--shapes", nargs="+", help="families, or shapes by name")
    parser.add_argument(
        "--check", type=Path, nargs="+", help="compare with the one that is of this Triton"
    )
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("--estimate", action="store_true", help="what bounds each step instead")
    given = parser.parse_args(words)
    if given.estimate:
        rows = estimates(given.shapes or list(FAMILIES), (16, 64), 65536)
        _print(rows, "An estimate from counts, compiled resources and an H200's data sheet")
        if given.write:
            note = estimates.__doc__ or ""
            known = {"triton": triton.__version__, "estimate": " ".join(note.split()), "rows": rows}
            given.write.write_text(json.dumps(known, indent=1) + "\n")
        return 0
    kept = given.shapes or list(FAMILIES)
    shapes = tuple(s for s in SHAPES if s.family in kept or s.name in kept)
    rows = table(shapes, tuple(given.arch or ARCHITECTURES), given.all)
    _print(rows, f"Compiled by Triton {triton.__version__}, not run")
    known = committed(given.check or ())
    wrong = broken(known, rows) + differences(known, rows)
    if given.write:
        made = {"triton": triton.__version__, "rows": rows}
        given.write.write_text(json.dumps(made, indent=1) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


def _print(rows: list[dict[str, Any]], title: str) -> None:
    shown = Table(title=title)
    columns = [name for name in rows[0] if name != "wrong"] if rows else []
    for name in columns:
        shown.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        style = "red" if row.get("wrong") else None
        shown.add_row(*(str(row[name]) for name in columns), style=style)
    Console(width=200).print(shown)


if __name__ == "__main__":
    sys.exit(main())
