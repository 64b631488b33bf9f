"""Ctrl-C while the command's modules are imported: a line, and no traceback.

Importing torch takes seconds, and the package imports it before any code of the command runs. This
module is therefore the first that the package imports. It changes nothing unless the process is the
command ``maskmoe`` or ``python -m maskmoe_kernels``; then it takes Ctrl-C from its import on until
:func:`restore`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

#: Exit status after Ctrl-C: 128 + SIGINT, as shells report it.
EXIT_STATUS = 130


def restore() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: the command catches it from here on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python finds the module, and imports its package first
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["maskmoe_kernels"]
    folder, name = os.path.split(program)
    return name in ("maskmoe", "maskmoe.exe") or (
        name == "__main__.py" and os.path.basename(folder) == "maskmoe_kernels"
    )


def _end(number: int, frame: FrameType | None) -> None:
    # A worker process of the command ends without a word: the command itself says it.
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None:
        os.write(2, b"interrupted\n")
    os._exit(EXIT_STATUS)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)
