"""Time every tile configuration of named layers on the GPU: ``python -m bench.gpu.tune``.

A case is ``FAMILY:D:B:DTYPE``, as in ``ncf4:64:65536:bfloat16``. Only kernels are timed: each
configuration is captured into a CUDA graph and replayed between two events, hot, and cold after
the cache was overwritten. ``--compile`` runs each configuration once, which fills Triton's cache;
several processes can do so at once. A json line for each configuration goes into ``--out`` when it
is measured; a part that is in the file already is not measured again. The line that is printed for
each part gives the time of the library's first choice, of the best of its own options, and of the
best of all.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.cases import DTYPES, Case
from bench.clock import HostClock, cache_bytes
from bench.device import LOST, check_device, is_lost
from bench.gpu.json_lines import append, read
from bench.precision import products
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.ops.masked_linear.triton import launch, tune
from maskmoe_kernels.ops.masked_linear.triton.configs import Config

ROUNDS, COLD_ROUNDS = 5, 7
REPLAYS = 10
#: Part to the gradients that it computes: of x, weight, bias. The activation is relu.
PARTS: dict[str, tuple[bool, bool, bool] | None] = {
    "forward": None,
    "x": (True, False, False),
    "w": (False, True, True),
    "xw": (True, True, True),
}
#: Which configurations: the library's first choice, its own options, or also a grid.
FIRST, OWN, WIDE = "first", "own", "wide"
Configs = Any  # a Config, or a pair of them for both gradients
Timer = Callable[[Callable[[], None]], dict[str, float]]


def grid(stages: int = 3) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, lanes, depth, warps and stages whose accumulators fit the registers."""
    for rows, lanes, depth, warps in itertools.product(
        (64, 128), (32, 64, 128), (16, 32, 64), (4, 8)
    ):
        if rows * lanes < 128 * 128 or warps == 8:
            yield rows, lanes, depth, warps, stages


def configs(own: Sequence[Configs], extent: str) -> list[Configs]:
    """The library's options, its first choice first; with ``WIDE``, then the rest of the grid."""
    if extent == FIRST:
        return [own[0]]
    found = [*own]
    for rows, lanes, depth, warps, stages in grid() if extent == WIDE else ():
        if isinstance(own[0], Config):
            found.append(Config(rows, lanes, depth, own[0].parts, warps, stages))
        else:  # both use the same tiles of columns
            first, second = own[0]
            config = Config(rows, lanes, depth, second.parts, warps, stages)
            found.append((replace(first, lanes=lanes, depth=depth), config))
    return [*dict.fromkeys(found)]


def described(config: Configs) -> list[dict[str, Any]]:
    """A configuration as it is written to json."""
    return [asdict(one) for one in ((config,) if isinstance(config, Config) else config)]


class Replays:
    """Microseconds of the kernels of a call, without launches: replays of its CUDA graph.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.flood = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], None]) -> dict[str, float]:
        """``us``, and ``cold_us`` after twice the size of the cache was overwritten."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            run()  # compiles
            with torch.cuda.graph(graph, stream=side):
                run()
        graph.replay()
        hot = [self._timed(graph, REPLAYS) for _ in range(ROUNDS)]
        cold = []
        for _ in range(COLD_ROUNDS):
            self.flood.zero_()
            cold.append(self._timed(graph, 1))
        return {"us": round(median(hot), 2), "cold_us": round(median(cold), 2)}

    def _timed(self, graph: torch.cuda.CUDAGraph, replays: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / replays


def host(run: Callable[[], None]) -> dict[str, float]:
    """Microseconds of one call by the host's clock, for a rehearsal."""
    return {"us": round(1e6 * HostClock().seconds(run), 2)}


def once(run: Callable[[], None]) -> dict[str, float]:
    """Compile only, without a time."""
    run()
    return {}


@contextmanager
def chosen_by(choose: Callable[..., Configs]) -> Iterator[None]:
    """Replace :func:`tune.choose` by ``choose``, and restore it afterwards."""
    before = tune.choose
    tune.choose = choose
    try:
        yield
    finally:
        tune.choose = before


def measure(
    case: Case, part: str, extent: str, timer: Timer, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Yield one record for each configuration of ``part`` of ``case``, when it is measured.

    A record holds ``case``, ``part``, ``own`` (is it one of the library's own options?), ``config``
    and the times of ``timer``, or the ``error`` of a configuration that does not fit.
    """
    layout = FAMILIES[case.family]().hidden_layout(case.width, case.width)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(DTYPES[case.dtype])

    x, weight = drawn(case.batch, layout.in_features), drawn(layout.num_weights)
    bias, grad = drawn(layout.out_features), drawn(case.batch, layout.out_features)
    needs = PARTS[part]
    asked: list[tuple[Sequence[Configs], Callable[[Configs], None]]] = []

    def choose(kind: str, _layout: Any, _x: Any, _p: Any, options: Any, run: Any) -> Configs:
        own = options()
        if needs is None or kind != "forward":
            asked.append((own, run))
        return own[0]

    with chosen_by(choose), products(tf32=case.dtype == "tf32"):
        y, _ = launch.forward(x, weight, bias, layout, "relu", True)
        if needs is not None:
            launch.backward(grad, x, weight, y, layout, "relu", needs)
        for own, run in asked:
            for config in configs(own, extent):
                record = {
                    "event": "config",
                    "case": str(case),
                    "part": part,
                    "own": config in own,
                    "config": described(config),
                }
                try:
                    record |= timer(partial(run, config))
                except Exception as error:  # it does not fit
                    record["error"] = " ".join(str(error).split())[:200]
                yield record


def summary_line(records: Sequence[dict[str, Any]]) -> str:
    """The library's first choice, the best of its own options, the best of all."""
    timed = [r for r in records if "us" in r]
    if not timed:
        return f"{len(records)} configurations, none timed"
    first = f"model {records[0]['us']:.1f} us" if "us" in records[0] else "model does not run"
    own = [r for r in timed if r["own"]]
    best_own = _best("own best", own) if own else "no own runs"
    return f"{first} | {best_own} | {_best(f'best of {len(records)}', timed)}"


def _best(label: str, records: Sequence[dict[str, Any]]) -> str:
    best = min(records, key=lambda r: r["us"])
    cuts = ["x".join(str(value) for value in config.values()) for config in best["config"]]
    return f"{label} {best['us']:.1f} us ({' and '.join(cuts)})"


def parse_case(text: str) -> Case:
    """``ncf4:64:65536:bfloat16``."""
    family, *numbers = text.split(":")
    dtype = numbers.pop() if numbers else ""
    if (
        family not in FAMILIES
        or dtype not in DTYPES
        or len(numbers) != 2
        or not all(n.isascii() and n.isdigit() and int(n) for n in numbers)
    ):
        raise argparse.ArgumentTypeError(
            f"expected FAMILY:D:B:DTYPE, as in ncf4:64:65536:bfloat16, got {text!r}"
        )
    return Case(family, int(numbers[0]), int(numbers[1]), dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("cases", nargs="+", type=parse_case, metavar="FAMILY:D:B:DTYPE")
    add("--parts", nargs="+", choices=PARTS, default=["forward", "xw"], help="default: forward xw")
    add("--configs", choices=(FIRST, OWN, WIDE), default=WIDE, help="default: %(default)s")
    add("--compile", action="store_true", help="compile, time nothing")
    add("--device", default="cuda", help="default: %(default)s")
    add("--out", type=Path, required=True, metavar="FILE", help="json lines")
    return parser


def main(words: Sequence[str]) -> int:
    """Time the cases.

    Returns:
        0; 1 where the device cannot be used; 3 where a configuration lost the GPU: start again.
    """
    given = _parser().parse_args(words)
    try:
        check_device(given.device)
    except BackendError as error:
        print(error)
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    timer = once if given.compile else Replays(device) if device.type == "cuda" else host
    for case, part in itertools.product(given.cases, given.parts):
        known = [r for r in read(given.out) if (r["case"], r["part"]) == (str(case), part)]
        if known:  # measured by an earlier process, or one that lost the GPU there
            continue
        records = []
        for record in measure(case, part, given.configs, timer, given.device):
            append(given.out, record)
            records.append(record)
            if "error" in record and is_lost(given.device):
                return LOST
        print(f"{case}, {part}: {summary_line(records)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
