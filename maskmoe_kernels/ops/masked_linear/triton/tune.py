"""Which of a few configurations is fastest here: measured once, kept on disk.

The choice for (kind, layout, dtype, precision, log2 of the rows) is made by the first call and
stays as long as the layout, so that a call gives the same bits again. ``MASKMOE_TUNE=0`` always
takes the model's first choice; so does a call that a CUDA graph captures. Measured choices are
kept in ``MASKMOE_CACHE`` (default: ``maskmoe_kernels`` in the user's cache folder), a file for each
GPU and each version of torch, Triton and this package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.masked_linear.triton.products import products_of
from maskmoe_kernels.ops.triton_support import INTERPRETED
from maskmoe_kernels.ops.triton_support.device import is_capturing

_T = TypeVar("_T")
_ROUNDS = 7
# A sample lasts about this long, in milliseconds: shorter ones measure the launch.
_SAMPLE = 0.2


def choose(
    kind: str,
    layout: BlockLayout,
    rows: Tensor,
    precision: str,
    options: Callable[[], Sequence[_T]],
    run: Callable[[_T], None],
) -> _T:
    """The configuration for this call.

    Args:
        kind: What is computed.
        layout: Of the layer.
        rows: The input, ``(rows, features)``.
        precision: How its products are taken.
        options: The configurations, the model's first choice first.
        run: Computes with one of them; called again and again when it is measured.
    """
    key = f"{kind} {layout.id} {rows.dtype} {precision} {rows.shape[0].bit_length()}"
    known = products_of(layout).chosen
    chosen: _T | None = known.get((key, rows.device))
    if chosen is None:
        choices = options()
        if len(choices) == 1 or not _may_measure():
            chosen = choices[0]
        else:
            chosen = _recalled(key, rows.device, choices) or _measured(key, rows, choices, run)
        known[key, rows.device] = chosen
    return chosen


def _may_measure() -> bool:
    return not INTERPRETED and os.environ.get("MASKMOE_TUNE", "1") != "0" and not is_capturing()


def _measured(key: str, rows: Tensor, choices: Sequence[_T], run: Callable[[_T], None]) -> _T:
    times = microseconds(choices, run)
    best = min(range(len(choices)), key=times.__getitem__)
    _record(key, rows.device, choices[best])
    return choices[best]


def microseconds(choices: Sequence[_T], run: Callable[[_T], None]) -> list[float]:
    """The median time of each choice, in interleaved rounds on the current stream."""
    counts = []
    for choice in choices:
        run(choice)  # compiles
        counts.append(max(1, round(_SAMPLE / max(_elapsed(choice, run, 1), 1e-3))))
    samples: list[list[float]] = [[] for _ in choices]
    for _ in range(_ROUNDS):
        for k, choice in enumerate(choices):
            samples[k].append(_elapsed(choice, run, counts[k]) * 1e3 / counts[k])
    return [median(times) for times in samples]


def _elapsed(choice: _T, run: Callable[[_T], None], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run(choice)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


# --- On disk -------------------------------------------------------------------------------


def cache_file(device: torch.device) -> Path:
    """Where the choices for ``device`` are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [importlib.metadata.version(package) for package in ("torch", "triton")]
    text = repr([name, *versions, _source()])
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MASKMOE_CACHE") or Path(home) / "maskmoe_kernels")
    return folder / f"tune-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _source() -> str:
    # Other kernels have other times: the version of this package, to the byte.
    digest = hashlib.sha256()
    for name in ("kernels.py", "tile_products.py", "configs.py", "activations.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _recalled(key: str, device: torch.device, choices: Sequence[_T]) -> _T | None:
    stored = _read(cache_file(device)).get(key)
    # What the model no longer proposes was stored by another one.
    return next((choice for choice in choices if _fields(choice) == stored), None)


def _record(key: str, device: torch.device, choice: _T) -> None:
    file = cache_file(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = _read(file) | {key: _fields(choice)}
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(known, out, indent=0, sort_keys=True)
            Path(part).replace(file)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError:
        pass  # a read-only home: measure again in the next process


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _fields(choice: Any) -> Any:
    if isinstance(choice, tuple):
        return [_fields(part) for part in choice]
    return dataclasses.asdict(choice)
