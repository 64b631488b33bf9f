"""What bounds each training step on an H200, from counts and its data sheet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from bench.counts import count
from bench.gpu.static.launches import Shape, launches
from bench.gpu.static.resources import resources
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.masked_linear.triton import products


def estimates(families: list[str], widths: tuple[int, ...], batch: int) -> list[dict[str, Any]]:
    """What bounds each step on an H200 by its data sheet, from counts and compiled resources.

    ``floor bytes`` cross device memory if each value does once; ``cache bytes`` are what the tiles
    ask of the caches; ``padded`` is products taken / products needed. ``floor us`` is the slower
    of floor bytes at 4.8 TB/s and needed FLOPs at 989 TFLOP/s. No time here was measured.
    """
    rows = []
    known: dict[tuple[object, ...], dict[str, Any]] = {}
    for family in families:
        for width in widths:
            shape = Shape(family, width, batch)
            layout = shape.layout
            problem = SimpleNamespace(layout=layout, batch=batch, dtype=torch.bfloat16)
            step = count(problem)["step"]
            row: dict[str, Any] = {"shape": shape.name}
            taken = cached = 0
            for launch in launches(shape):
                name, constants = launch.kernel.__name__, dict(launch.constants)
                if name not in ("forward", "backward"):
                    continue
                if launch.key not in known:
                    known[launch.key] = resources(launch.compile(90))
                row[f"{name} blocks a processor"] = _resident(known[launch.key], launch.warps)
                products_, bytes_ = _work(layout, constants, name, batch)
                taken, cached = taken + products_, cached + bytes_
            row |= {
                "floor bytes": step.bytes,
                "cache bytes": cached,
                "padded": round(2 * taken / step.flops, 2),
                "floor us": round(max(step.bytes / 4.8e6, step.flops / 989e6), 1),
                "bound": "memory" if step.bytes / 4.8e12 > step.flops / 989e12 else "products",
            }
            rows.append(row)
    return rows


def _work(layout: BlockLayout, constants: dict[str, Any], name: str, batch: int) -> tuple[int, int]:
    """Products of the tiles, and bytes that they load and store, in bfloat16."""
    pair = products.products_of(layout)
    tiles = pair.forward.cut(constants["N"], constants["K"])
    if name == "forward":
        entries = batch * tiles.chunk_walks * tiles.depth
        return entries * tiles.lanes, 2 * (entries + batch * layout.out_features)
    transposed = pair.transposed.cut(constants["XN"], constants["XK"])
    of_x = batch * transposed.chunk_walks * transposed.depth
    items = tiles.weight_items(constants["F"]).shape[0]
    of_w = batch * items * (constants["F"] + 2 * tiles.lanes)
    taken = of_x * transposed.lanes + batch * items * constants["F"] * tiles.lanes
    return taken, 2 * (2 * of_x + batch * layout.in_features + of_w)


def _resident(found: dict[str, Any], warps: int) -> int:
    """Thread blocks that a multiprocessor of sm_90 holds, by registers, shared memory and warps."""
    registers = -(-found["registers"] // 8) * 8 * 32 * warps
    return min(65_536 // registers, 233_472 // (found["shared"] + 1024), 64 // warps, 32)
