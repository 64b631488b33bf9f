"""A task of the GPU lab: a process that also runs alone; and where the lab writes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS = "tests/bench/gpu/faults.py"
#: Seconds that a phase of a test may take before its process ends and another continues after it.
TEST_SECONDS = 60.0
REHEARSED_SECONDS = 3.0


@dataclass(frozen=True)
class Lab:
    """Where and how the lab runs.

    Attributes:
        work: The folder of all files.
        rehearsal: Does it run on the CPU, with tiny shapes and planted faults?
        seconds: The time limit of all tasks together.
    """

    work: Path
    rehearsal: bool
    seconds: float

    @property
    def device(self) -> str:
        """The value of ``--device``."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def lines(self) -> Path:
        """The file with a json line for each test and process."""
        return self.work / "lab.jsonl"

    @property
    def spare(self) -> Path:
        """The file for lines that cannot be written to ``lines``: in memory, where possible."""
        memory = Path("/dev/shm")
        folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
        return folder / f"maskmoe-lab-{os.getpid()}.jsonl"


@dataclass(frozen=True)
class Task:
    """A process that starts in the checkout.

    Attributes:
        name: Unique in its command.
        words: The program and its arguments.
        variables: Environment variables to add.
        seconds: Its time limit; ``None``: that of the lab.
        until: Seconds after the start of the lab when it is ended, or no longer started.
        tries: How often it may start: once more if it lost the GPU, was ended by a signal, or by
            the timeout of a test.
        again: Arguments that are added from the second start on.
        alone: Must no other task run at the same time? For timing.
        refusals: Texts in its output that say that the machine, not the code, made it fail.
    """

    name: str
    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    until: float | None = None
    tries: int = 1
    again: Sequence[str] = ()
    alone: bool = False
    refusals: Sequence[str] = ()

    def line(self) -> str:
        """The command as it would be typed."""
        words = ["python3" if word == sys.executable else word for word in self.words]
        return " ".join([*(f"{k}={v}" for k, v in self.variables.items()), *map(_quoted, words)])


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " *[]|^$()") else word


def python(name: str, *words: str, **options: object) -> Task:
    """A task that runs this Python."""
    return Task(name, [sys.executable, *words], **options)  # type: ignore[arg-type]


def pytest(lab: Lab, name: str, *words: str, shards: int = 1, **variables: str) -> list[Task]:
    """Tasks that run tests, split into ``shards``."""
    plugin = [
        "-p",
        "bench.gpu.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        "--device",
        lab.device,
    ]
    tasks = []
    for k in range(shards):
        shown = name if shards == 1 else f"{name} {k + 1}/{shards}"
        seconds = REHEARSED_SECONDS if words[0] == FAULTS else TEST_SECONDS
        given = {
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_PROFILE": "lab",
            "MASKMOE_TUNE": "0",
            "MASKMOE_SHARD": f"{k}/{shards}",
            "MASKMOE_TEST_SECONDS": f"{seconds:g}",
            **variables,
        }
        call = ["-m", "pytest", *plugin, *words]
        tasks.append(python(shown, *call, variables=given, tries=8, seconds=0.9 * lab.seconds))
    return tasks


def nvidia(tool: str) -> str | None:
    """The path of a tool of the CUDA toolkit, on ``PATH`` or not; ``None`` if it is missing."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    more = os.pathsep.join(f"{folder}/bin" for folder in folders)
    return shutil.which(tool) or shutil.which(tool, path=more)
