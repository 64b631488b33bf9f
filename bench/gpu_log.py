"""The lab's file of json lines: appended to by several processes, whole after any of them ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(path: str | Path, line: dict[str, Any]) -> None:
    """One line, in one write: those of several processes do not mix."""
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8")
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def read(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines; what a power cut left of the last one is dropped."""
    found = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
