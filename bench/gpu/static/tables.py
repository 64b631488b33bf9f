"""The table of all compiled kernels, and its comparison with the committed one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton

from bench.gpu.static.launches import SHAPES, Launch, Shape, launches, objectives
from bench.gpu.static.resources import broken_rules, resources

#: Columns that must be as in the committed table.
COMPARED = (
    "registers",
    "spilled",
    "parked",
    "stalls",
    "barriers",
    "shared",
    "tensor",
    "wgmma",
    "async copies",
)


def table(shapes: tuple[Shape, ...], architectures: tuple[int, ...], every: bool) -> list[dict]:
    """One row for each distinct kernel and architecture: of ``shapes``, and of the objectives.

    What several shapes launch is the first one's, whether or not that is among them.
    """
    rows = []
    left_out = {shape.name for shape in SHAPES if shape not in shapes}
    for architecture in architectures:
        seen = set()
        for name, launch in _named(every, architecture):
            if launch.key in seen:
                continue
            seen.add(launch.key)
            if name in left_out:
                continue
            found = resources(launch.compile(architecture))
            rows.append(
                {
                    "shape": name,
                    "kernel": launch.kernel.__name__,
                    "cut": _configuration(launch),
                    "arch": f"sm_{architecture}",
                    **found,
                    "wrong": broken_rules(launch, found, architecture),
                }
            )
    return rows


def _named(every: bool, architecture: int) -> Iterator[tuple[str, Launch]]:
    for shape in SHAPES:
        for launch in launches(shape, every, tma=architecture >= 90):
            yield shape.name, launch
    for launch in objectives():
        yield f"up to {dict(launch.constants)['HB']} experts", launch


def _configuration(launch: Launch) -> str:
    """The configuration in short."""
    constants = dict(launch.constants)
    names = "M R F N K SHARED PACKED SPLIT PARTS XM XN XK XSHARED XPACKED TMA OF_W OF_X HB".split()
    parts = [
        f"{name}={int(constants[name]) if constants[name] < 1 << 20 else 'all'}"
        for name in names
        if name in constants
    ]
    return " ".join([*parts, f"warps={launch.warps}", f"stages={launch.stages}"])


def committed(files: Sequence[Path]) -> dict[str, dict[str, Any]] | None:
    """Rows of the table of this version of Triton, by shape and kernel; None if there is none."""
    for file in files:
        known = json.loads(file.read_text())
        if known["triton"] == triton.__version__:
            return {_key(row): row for row in known["rows"]}
    return None


def _key(row: dict[str, Any]) -> str:
    return " ".join(row[name] for name in ("shape", "kernel", "cut", "arch"))


def broken(known: dict[str, dict[str, Any]] | None, rows: list[dict[str, Any]]) -> list[str]:
    """The rules that ``rows`` break, without those that the committed table breaks too."""
    return [
        f"{_key(row)}: {rule}"
        for row in rows
        for rule in row["wrong"]
        if rule not in (known or {}).get(_key(row), {"wrong": []})["wrong"]
    ]


def differences(known: dict[str, dict[str, Any]] | None, rows: list[dict[str, Any]]) -> list[str]:
    """Where ``rows`` differ from the committed table, if there is one of this Triton."""
    worse = []
    for row in rows if known is not None else ():
        key = _key(row)
        if key not in known:
            worse.append(f"{key}: not in the committed table; write it anew")
            continue
        for name in COMPARED:
            if row[name] != known[key][name]:
                worse.append(f"{key}: {name} {known[key][name]} -> {row[name]}")
    return worse
