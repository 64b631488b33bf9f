"""Generated sessions, prepared, few enough to train on in a test; and a run that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.generator.generate import generate
from maskmoe_kernels.experiments.skip.generator.settings import GeneratorSettings

ROOT = Path(__file__).resolve().parents[3]

# Runs the command, and kills itself with SIGKILL: "step:K" within its K-th step, "save:K" when half
# of its K-th checkpoint is written.
_KILLED = """
import os, signal, sys
import torch
from maskmoe_kernels.cli import main
from maskmoe_kernels.experiments.shared.trainer import Trainer

what, _, when = sys.argv[1].partition(":")
calls = {"step": 0, "save": 0}

def count(name):
    calls[name] += 1
    return name == what and calls[name] == int(when)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

step, save = Trainer._step, torch.save

def killed_step(self, batch):
    step(self, batch)
    if count("step"):
        die()

def killed_save(obj, file):
    save(obj, file)
    if count("save"):
        os.truncate(file.name, os.path.getsize(file.name) // 2)
        die()

Trainer._step, torch.save = killed_step, killed_save
sys.exit(main(sys.argv[2:]))
"""


def write_sessions(folder: Path, sessions: int = 300) -> tuple[Path, Path]:
    """Generated csv files with their causes, and their shards."""
    generate(folder / "csv", GeneratorSettings(sessions, seed=5, tracks=2_000, chunk=100))
    prepare([folder / "csv"], folder / "data", row_group=32)
    return folder / "csv", folder / "data"


def command(words: Sequence[str], kill: str | None = None, processes: int = 1) -> int:
    """Exit status of ``maskmoe`` in a process of its own, or in several under torchrun.

    Args:
        words: Its arguments.
        kill: When it kills itself, ``"step:K"`` or ``"save:K"``.
        processes: More than one: torchrun's.
    """
    start = [sys.executable, "-m", "maskmoe_kernels"]
    if kill is not None:
        start = [sys.executable, "-c", _KILLED, kill]
    elif processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        start = [sys.executable, *torchrun, str(processes), "-m", "maskmoe_kernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*start, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    if run.returncode > 0:
        raise AssertionError(run.stdout + run.stderr)
    return run.returncode
