"""``python -m bench.gpu_tune``: every way to cut named layers for the GPU, each timed alone.

Kernel time only: each way is captured into a CUDA graph and replayed (``--replays`` times between
two events), so that launches cost nothing. ``--compile`` only compiles, into Triton's cache, for
several processes at once. A json line for each way, as it is measured.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.gpu_log import append
from bench.precision import products
from bench.shapes import DTYPES, FAMILIES, Case
from maskmoe_kernels.backends.triton import launch, tune
from maskmoe_kernels.backends.triton.configs import Config

ROUNDS = 5
#: What each is cut for, the network's activation being relu.
PARTS = {"forward": None, "x": (True, False, False), "w": (False, True, True), "xw": (True,) * 3}


def ways(first: Config, wide: bool) -> Iterator[Config]:
    """Other cuts beside the model's: ``wide``, all of a grid; else none."""
    yield first
    if not wide:
        return
    for rows, lanes, depth, warps in itertools.product(
        (64, 128), (32, 64, 128), (16, 32, 64), (4, 8)
    ):
        if rows * lanes < 16384 or warps == 8:
            yield Config(rows, lanes, depth, first.parts, warps, 3)


def captured(run: Callable[[], None], replays: int) -> float:
    """Microseconds of one ``run``: the median over rounds of replays of a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / replays)
    return median(times)


def measure(case: Case, part: str, wide: bool, replays: int) -> Iterator[dict[str, Any]]:
    """One record for each way to cut ``part`` of ``case``."""
    layout = FAMILIES[case.family]().hidden_layout(case.width, case.width)
    dtype = DTYPES[case.dtype]
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    x, weight, bias = (
        drawn(case.batch, layout.in_features), drawn(layout.num_weights),
        drawn(layout.out_features),
    )  # fmt: skip
    found: list[dict[str, Any]] = []

    def choose(kind: str, _: Any, rows: Any, precision: str, options: Any, run: Any) -> Any:
        own = options()
        pairs = isinstance(own[0], tuple)
        grid: list[Any] = [*own]
        for config in ways(own[0][1] if pairs else own[0], wide):
            grid.append((replace(own[0][0], lanes=config.lanes, depth=config.depth), config)
                        if pairs else config)  # fmt: skip
        best, least = own[0], float("inf")
        for k, config in enumerate(dict.fromkeys(grid)):
            record: dict[str, Any] = {
                "event": "way", "case": str(case), "part": part, "own": k < len(own),
                "config": [asdict(c) for c in (config if pairs else (config,))],
            }  # fmt: skip
            try:
                if replays:
                    record["us"] = round(captured(lambda c=config: run(c), replays), 2)
                    if record["us"] < least:
                        best, least = config, record["us"]
                else:
                    run(config)
            except Exception as error:  # what does not fit is not a way
                record["error"] = " ".join(str(error).split())[:200]
            found.append(record)
        return best

    before, tune.choose = tune.choose, choose
    try:
        y, z = launch.forward(x, weight, bias, layout, "relu", True)
        if PARTS[part] is not None:
            found.clear()
            launch.backward(
                torch.randn_like(y), x, weight, z if z.numel() else y, layout, "relu", PARTS[part]
            )
    finally:
        tune.choose = before
    yield from found


def main(words: Sequence[str]) -> int:
    """Time the cases; the best ways are printed last."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tune", description=__doc__)
    add = parser.add_argument
    add("cases", nargs="+", metavar="FAMILY:D:B:DTYPE")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--wide", action="store_true", help="a grid of cuts beside those of the model")
    add("--replays", type=int, default=10)
    add("--compile", action="store_true", help="compile, time nothing")
    add("--out", type=Path, required=True, help="json lines")
    given = parser.parse_args(words)
    for text in given.cases:
        family, width, batch, dtype = text.split(":")
        case = Case(family, int(width), int(batch), dtype)
        for part in given.parts:
            with products(tf32=case.dtype == "tf32"):
                records = list(
                    measure(case, part, given.wide, 0 if given.compile else given.replays)
                )
            for record in records:
                append(given.out, record)
            timed = sorted((r for r in records if "us" in r), key=lambda r: r["us"])
            own = [r["us"] for r in timed if r["own"]]
            if timed:
                print(case, part, "model", records[0].get("us"), "own best", min(own), "best",
                      timed[0]["us"], timed[0]["config"][-1], flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
