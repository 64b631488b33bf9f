"""Reports: what was measured and on which machine, as json that is never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.files import replacing

#: Key of the checksum in a sealed object.
_SEAL = "checksum"


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented json; see :func:`replacing` for what is guaranteed.

    Raises:
        ValueError: ``obj`` holds a NaN or an infinity, which json cannot represent.
        TypeError: ``obj`` holds an object that json cannot represent.
        OSError: It cannot be written.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as file:
        # Python decodes a file name that is not UTF-8 to surrogates; json can escape them.
        file.write(text.encode("utf-8", "backslashreplace"))


def read_json(path: str | Path, remedy: str, seal: bool = True) -> dict[str, Any]:
    """Read the object in a json file, and verify its checksum if :func:`sealed` made one.

    Args:
        path: Of the file.
        remedy: What to do about a damaged one, for the error.
        seal: Whether to verify the checksum, if there is one.

    Raises:
        DataError: It cannot be read, is no json object, or its checksum is of another content.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: expected a json file, got {error.strerror}. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected json, got {error}. {remedy}") from error
    if not isinstance(content, dict):
        got = type(content).__name__
        raise DataError(f"{path}: expected a json object, got {got}. {remedy}")
    if seal:
        check_seal(content, path, remedy)
    return content


def sealed(obj: Mapping[str, Any]) -> dict[str, Any]:
    """``obj`` with a checksum of its content, which :func:`check_seal` verifies."""
    return {**obj, _SEAL: _digest(obj)}


def check_seal(obj: Mapping[str, Any], path: Path, remedy: str) -> None:
    """Verify the checksum of a sealed object; an object without one passes.

    Raises:
        DataError: The content has another checksum; the message names ``path``.
    """
    if _SEAL in obj and obj[_SEAL] != _digest(obj):
        raise DataError(
            f"{path}: expected what its checksum is of, got another content; the file is damaged "
            f"or was changed. {remedy}"
        )


def _digest(obj: Mapping[str, Any]) -> str:
    content = {key: value for key, value in obj.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def machine() -> dict[str, Any]:
    """The machine that the numbers of a report are from: processor, threads, versions, GPU."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
