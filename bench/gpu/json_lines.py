"""The lab's file of json lines: appended to by several processes, whole after any of them ends."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def append(path: str | Path, line: dict[str, Any], spare: str | Path | None = None) -> None:
    """One line, in one write: those of several processes do not mix.

    Where ``path`` takes none, on a full disk, it goes into ``spare``; where that takes none either
    it is dropped: who wrote it has work to go on with.
    """
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    for each in (path, spare):
        if each is None:
            continue
        with suppress(OSError):
            _write(each, data)
            return


def _write(path: str | Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, data) < len(data):
            raise OSError("the disk is full")
    finally:
        os.close(file)


def read(*paths: str | Path) -> list[dict[str, Any]]:
    """All whole lines of the files that are there; what is left of a line cut off is dropped."""
    found = []
    for path in map(Path, paths):
        if not path.is_file():
            continue
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(text))
    return found
