"""Runs independent tasks, in several processes if that is wanted, with a progress bar each."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from maskmoe_kernels.experiments.shared.progress import OpenBar

Task = TypeVar("Task")
Result = TypeVar("Result")
#: A task and what is called with its progress, to its result; a function of a module.
Work = Callable[[Task, Callable[[int], None]], Result]


def run_all(
    tasks: Sequence[Task],
    work: Work[Task, Result],
    bars: Sequence[tuple[str, int | None]],
    workers: int,
    open_bar: OpenBar,
) -> list[Result]:
    """The results of all tasks, in order.

    Args:
        tasks: The tasks.
        work: What is done with each.
        bars: Name and total of the progress bar of each task.
        workers: Processes; with 1, or a single task, this one alone.
        open_bar: Opens a progress bar.
    """
    if len(tasks) > 1 and workers > 1:
        return _in_processes(tasks, work, bars, workers, open_bar)
    return [work(task, open_bar(*bar)) for task, bar in zip(tasks, bars, strict=True)]


def _in_processes(
    tasks: Sequence[Task],
    work: Work[Task, Result],
    bars: Sequence[tuple[str, int | None]],
    workers: int,
    open_bar: OpenBar,
) -> list[Result]:
    # Spawn, do not fork: the threads of pyarrow and torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    done = context.Array(ctypes.c_int64, len(tasks))  # progress of each task, in shared memory
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_set_done, initargs=(done,)
    ) as pool:
        running: list[Future[Result]] = [
            pool.submit(_counted, work, task, i) for i, task in enumerate(tasks)
        ]
        advance = [open_bar(*bar) for bar in bars]
        shown = [0] * len(tasks)
        try:
            waiting: set[Future[Result]] = set(running)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2)
                for i, count in enumerate(done[:]):
                    advance[i](count - shown[i])
                    shown[i] = count
                for task in finished:
                    task.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [task.result() for task in running]


_done: Any = None  # in a worker process: the progress of each task


def _set_done(done: Any) -> None:
    global _done
    _done = done


def _counted(work: Work[Task, Result], task: Task, number: int) -> Result:
    def advance(count: int) -> None:
        _done[number] += count

    return work(task, advance)
