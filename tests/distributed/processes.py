"""Functions of a test that run in several processes of one group (gloo)."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_SECONDS = 120
_PRELOADED = (
    "maskmoe_kernels",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
)


def in_processes(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` in ``world`` processes, each of which is a rank; what they return.

    Args:
        world: Number of processes.
        folder: Where they meet.
        function: Of the module level, so that processes find it by name.
        args: Its arguments, as pickle takes them.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    # Processes forked from one that has imported all, and started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, __name__])
    meeting = Path(tempfile.mkdtemp(dir=folder))
    ranks = [
        context.Process(target=_rank, args=(rank, world, meeting, function, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in sorted(meeting.glob("error-*"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in ranks), [p.exitcode for p in ranks]
    return [torch.load(meeting / f"result-{rank}") for rank in range(world)]


def _rank(
    rank: int, world: int, meeting: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{meeting}/store", rank=rank, world_size=world)
        torch.save(function(*args), meeting / f"result-{rank}")
    except BaseException:
        (meeting / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
