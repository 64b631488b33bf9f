"""A file of json lines that several processes append to."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def append(path: str | Path, line: dict[str, Any], spare: str | Path | None = None) -> None:
    """Append one line, in one write, so that lines of several processes do not mix.

    If ``path`` cannot be written, as on a full disk, the line goes into ``spare``. If that fails
    too, the line is dropped, so that its writer continues.
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
    """All complete lines of the files that exist."""
    found = []
    for path in map(Path, paths):
        if not path.is_file():
            continue
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(text))
    return found
