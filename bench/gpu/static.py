"""What can be known of the GPU kernels without a GPU: every launch recorded, compiled, judged.

``python -m bench.gpu.static`` runs the launch code on meta tensors, keeps what it would launch,
compiles that for sm_80, sm_90 and sm_100 and prints registers, shared memory, spills and
instructions. ``--check FILE...`` compares with the committed table of this version of Triton: its
figures, and which rules each kernel was known to break; where there is none, no kernel may break
one. ``--write FILE`` makes a table, ``--estimate`` sets bytes, products and occupancy of each shape
against the data sheet of an H200: an estimate, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # this module judges what a GPU would run
os.environ["MASKMOE_TUNE"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.layers.counts import count
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.layout.serialized import registered_layout
from maskmoe_kernels.ops.masked_linear.triton import kernels, launch, products
from maskmoe_kernels.ops.selection.triton import gem_kernels, selection_kernels

ARCHITECTURES = (80, 90, 100)
#: Shared memory of a block at most, in bytes (CUDA's table of compute capabilities).
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
#: Bytes a thread that a kernel may keep in memory: a value or two, parked across the loop. Where
#: registers are limited, half as many accesses in each step of it.
PARKED = 16
#: Multiprocessors that the launch code is told of: an H200's.
PROCESSORS = 132
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INTEGERS = {torch.int32: "i32", torch.int64: "i64"}
_TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_WIDE = re.compile(r"mul\.lo\.s64|mul\.wide\.s32|mad\.lo\.s64|mad\.wide\.s32")


@dataclass(frozen=True)
class Shape:
    """A layer whose launches are in the table."""

    family: str
    width: int
    batch: int
    dtype: str = "bfloat16"
    precision: str = "highest"
    activation: str = "relu"
    head: bool = False

    @property
    def name(self) -> str:
        kind = {"medium": "tf32", "high": "3xtf32"}.get(self.precision, self.dtype)
        extra = (" head" if self.head else "") + (
            f" {self.activation}" if self.activation != "relu" else ""
        )
        return f"{self.family} d={self.width} B={self.batch} {kind}{extra}"

    @property
    def layout(self) -> BlockLayout:
        return FAMILIES[self.family]().hidden_layout(self.width, 1 if self.head else self.width)


#: Each way that the rules cut the listed shapes, once; a head of single units; small batches.
SHAPES = (
    Shape("powerset4", 64, 65536),
    Shape("toy3", 16, 65536),
    Shape("powerset6", 16, 65536, activation="gelu"),
    Shape("powerset4", 128, 65536, "float16"),
    Shape("powerset6", 16, 65536, head=True),
    Shape("pairs22", 7, 65536),
    Shape("chain16", 64, 16),
    Shape("powerset4", 64, 65536, "float32"),
    Shape("powerset4", 64, 65536, "float32", "medium"),
    Shape("powerset4", 64, 65536, "float32", "high"),
)


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that it is compiled for."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    grid: int
    registers: int | None = None  # at most, a thread

    @property
    def key(self) -> tuple[object, ...]:
        return (
            self.kernel.__name__, self.signature, self.constants, self.aligned, self.warps,
            self.stages, self.registers,
        )  # fmt: skip

    def compile(self, architecture: int) -> Any:
        source = ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={(k,): [["tt.divisibility", 16]] for k in self.aligned},
        )
        return triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": self.warps, "num_stages": self.stages}
            | ({} if self.registers is None else {"maxnreg": self.registers}),
        )


class _Recorder:
    """Stands in for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._keep(grid, args, options)

    def _keep(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
        registers = options.pop("maxnreg", None)
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | options
        signature, constants, aligned = {}, {}, []
        for k, name in enumerate(self.kernel.arg_names):
            value = given[name]
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + (_TYPES | _INTEGERS)[value.dtype]
                aligned.append(k)
            elif name in options or value is None or value == 1:
                signature[name] = "constexpr"
                constants[name] = value
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(k)
        programs = 1
        for size in grid:
            programs *= size
        self.launches.append(
            Launch(
                self.kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned),
                warps, stages, programs, registers,
            )
        )  # fmt: skip


def launches(shape: Shape, every: bool = False) -> Iterator[Launch]:
    """What a training step of ``shape`` launches; ``every``: with every proposed configuration."""
    layout, dtype = shape.layout, getattr(torch, shape.dtype)
    kept: list[Launch] = []
    real, real_count = launch.kernels, products.processors
    before = torch.get_float32_matmul_precision()
    names = [name for name in vars(kernels) if hasattr(getattr(kernels, name), "arg_names")]
    launch.kernels = SimpleNamespace(
        **{name: _Recorder(getattr(kernels, name), kept) for name in names}
    )
    products.processors = launch.processors = lambda device: PROCESSORS
    registered_layout(layout).caches.derived.clear()
    torch.set_float32_matmul_precision(shape.precision)
    choose = launch.tune.choose
    if every:
        launch.tune.choose = _all_of
    products.forget()
    try:
        with torch.device("meta"):
            x = torch.empty(shape.batch, layout.in_features, dtype=dtype)
            weight = torch.empty(layout.num_weights, dtype=dtype)
            bias = torch.empty(layout.out_features, dtype=dtype)
            y, z = launch.forward(x, weight, bias, layout, shape.activation, True)
            saved = z if z.numel() else y
            needs = (True, True, True)
            launch.backward(y, x, weight, saved, layout, shape.activation, needs)
    finally:
        launch.kernels, launch.tune.choose = real, choose
        products.processors = launch.processors = real_count
        torch.set_float32_matmul_precision(before)
    yield from kept


def _all_of(kind: str, layout: Any, rows: Any, precision: str, options: Any, run: Any) -> Any:
    choices = options()
    for choice in choices[1:]:
        run(choice)
    return choices[0]


def facts(compiled: Any) -> dict[str, Any]:
    """Resources and instructions of a compiled kernel."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        code = subprocess.run(
            [_CUOBJDUMP, "--dump-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled": stack + local,
        **_of_loop(code),
        "shared": compiled.metadata.shared,
        "tensor": len(_TENSOR_CORES.findall(ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "async copies": ptx.count("cp.async.c"),
        "64-bit products": len(_WIDE.findall(ptx)),
    }


def _of_loop(code: str) -> dict[str, int]:
    """What the loop with loads in flight does in each step, by the disassembly; else of all code.

    ``parked`` are accesses to spilled values, ``stalls`` are waits for all products of a step, and
    ``barriers`` are those of the block.
    """
    lines = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    bodies = []
    for at, text in lines:
        back = _BRANCH.search(text)
        if back is not None and int(back[1], 16) < at:
            body = [other for k, other in lines if int(back[1], 16) <= k <= at]
            if any("LDGSTS" in other for other in body):
                bodies.append(body)
    body = min(bodies, key=len, default=[text for _, text in lines])

    def times(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in body)

    return {
        "parked": times(r"\b(LDL|STL)\b"),
        "stalls": times(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0"),
        "barriers": times(r"\bBAR\.SYNC"),
    }


def complaints(launch_: Launch, found: dict[str, Any], architecture: int) -> list[str]:
    """What a hot kernel may not do."""
    constants = dict(launch_.constants)
    wrong = []
    # What repairs rows is off the way, and parks what it likes.
    if found["spilled"] > PARKED and (launch_.registers is None or found["parked"] > PARKED // 2):
        wrong.append(f"spills {found['spilled']} bytes, {found['parked']} accesses a step")
    if found["shared"] > SHARED[architecture]:
        wrong.append(f"{found['shared']} bytes of shared memory, of {SHARED[architecture]}")
    if launch_.kernel.__name__ not in ("forward", "backward"):
        return wrong
    if not found["64-bit products"]:
        wrong.append("no 64-bit product in its offsets")
    exact = constants["PRECISION"] == "ieee" and dict(launch_.signature)["x"] == "*fp32"
    if not exact and not found["tensor"]:
        wrong.append("no tensor-core instruction")
    tall = constants.get("M", constants.get("XM", 0)) >= 64
    if architecture == 90 and tall and not exact and not found["wgmma"]:
        wrong.append("no wgmma, though its tiles have 64 rows")
    return wrong


def objectives() -> Iterator[Launch]:
    """The fused objectives for a few and for many experts."""
    for name, kernel, signature, constants, warps, stages in (
        *selection_kernels.variants(),
        *gem_kernels.variants(),
    ):
        if "CONFIDENCE=abs" in name and constants["HB"] in (4, 64):
            pointers = [k for k, kind in enumerate(signature.values()) if kind.startswith("*")]
            yield Launch(
                kernel, tuple(signature.items()), tuple(constants.items()), tuple(pointers),
                warps, stages, 0,
            )  # fmt: skip


def table(shapes: tuple[Shape, ...], architectures: tuple[int, ...], every: bool) -> list[dict]:
    """One row a distinct kernel and architecture."""
    rows, seen = [], set()
    named = [(shape.name, kept) for shape in shapes for kept in launches(shape, every)]
    named += [(f"up to {dict(kept.constants)['HB']} experts", kept) for kept in objectives()]
    for name, kept in named:
        if kept.key in seen:
            continue
        seen.add(kept.key)
        for architecture in architectures:
            found = facts(kept.compile(architecture))
            rows.append(
                {
                    "shape": name,
                    "kernel": kept.kernel.__name__,
                    "cut": cut_of(kept),
                    "arch": f"sm_{architecture}",
                    **found,
                    "wrong": complaints(kept, found, architecture),
                }
            )
    return rows


def cut_of(kept: Launch) -> str:
    """The configuration in short."""
    constants = dict(kept.constants)
    names = ("M", "R", "F", "N", "K", "SHARED", "SPLIT", "PARTS", "XM", "XN", "XK", "XSHARED", "HB")
    parts = [
        f"{name}={int(constants[name]) if constants[name] < 1 << 20 else 'all'}"
        for name in names
        if name in constants
    ]
    return " ".join([*parts, f"warps={kept.warps}", f"stages={kept.stages}"])


def main(words: list[str] | None = None) -> int:
    """Print the table; 1 where a kernel breaks a rule or differs from the committed table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.static", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration that may be tried")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--shapes", nargs="+", help="families to keep")
    parser.add_argument(
        "--check", type=Path, nargs="+", help="compare with the one that is of this Triton"
    )
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("--estimate", action="store_true", help="what bounds each step instead")
    given = parser.parse_args(words)
    if given.estimate:
        rows = estimates(given.shapes or list(FAMILIES), (16, 64), 65536)
        _print(rows, "An estimate from counts, compiled resources and an H200's data sheet")
        if given.write:
            note = estimates.__doc__ or ""
            known = {"triton": triton.__version__, "estimate": " ".join(note.split()), "rows": rows}
            given.write.write_text(json.dumps(known, indent=1) + "\n")
        return 0
    shapes = tuple(s for s in SHAPES if not given.shapes or s.family in given.shapes)
    rows = table(shapes, tuple(given.arch or ARCHITECTURES), given.all)
    _print(rows, f"Compiled by Triton {triton.__version__}, not run")
    known = committed(given.check or ())
    wrong = broken(known, rows) + differences(known, rows)
    if given.write:
        made = {"triton": triton.__version__, "rows": rows}
        given.write.write_text(json.dumps(made, indent=1) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


def estimates(families: list[str], widths: tuple[int, ...], batch: int) -> list[dict[str, Any]]:
    """What bounds each step on an H200 by its data sheet, from counts and compiled resources.

    ``floor bytes`` cross device memory if each value does once; ``cache bytes`` are what the tiles
    ask of the caches; ``padded`` is products taken / products needed. ``floor us`` is the slower
    of floor bytes at 4.8 TB/s and needed FLOPs at 989 TFLOP/s. No time here was measured.
    """
    rows = []
    resources: dict[tuple[object, ...], dict[str, Any]] = {}
    for family in families:
        for width in widths:
            shape = Shape(family, width, batch)
            layout = shape.layout
            problem = SimpleNamespace(layout=layout, batch=batch, dtype=torch.bfloat16)
            step = count(problem)["step"]
            row: dict[str, Any] = {"shape": shape.name}
            taken = cached = 0
            for kept in launches(shape):
                name, constants = kept.kernel.__name__, dict(kept.constants)
                if name not in ("forward", "backward"):
                    continue
                if kept.key not in resources:
                    resources[kept.key] = facts(kept.compile(90))
                row[f"{name} blocks a processor"] = _resident(resources[kept.key], kept.warps)
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
    """Products that the tiles take, and bytes that they load and store, in bfloat16."""
    pair = products.products_of(layout)
    tiles = pair.forward.cut(constants["N"], constants["K"])
    if name == "forward":
        entries = batch * tiles.chunk_walks * tiles.depth
        return entries * tiles.lanes, 2 * (entries + batch * layout.out_features)
    turned = pair.transposed.cut(constants["XN"], constants["XK"])
    of_x = batch * turned.chunk_walks * turned.depth
    items = tiles.weight_items(constants["F"]).shape[0]
    of_w = batch * items * (constants["F"] + 2 * tiles.lanes)
    taken = of_x * turned.lanes + batch * items * constants["F"] * tiles.lanes
    return taken, 2 * (2 * of_x + batch * layout.in_features + of_w)


def _resident(found: dict[str, Any], warps: int) -> int:
    """Blocks that fit into a processor of sm_90 at once, by registers, shared memory, warps."""
    registers = -(-found["registers"] // 8) * 8 * 32 * warps
    return min(65_536 // registers, 233_472 // (found["shared"] + 1024), 64 // warps, 32)


def committed(files: Sequence[Path]) -> dict[str, dict[str, Any]] | None:
    """The rows of the table that is of this Triton, by what they are of; None if there is none."""
    for file in files:
        known = json.loads(file.read_text())
        if known["triton"] == triton.__version__:
            return {_key(row): row for row in known["rows"]}
    return None


def _key(row: dict[str, Any]) -> str:
    return " ".join(row[name] for name in ("shape", "kernel", "cut", "arch"))


def broken(known: dict[str, dict[str, Any]] | None, rows: list[dict[str, Any]]) -> list[str]:
    """The rules that ``rows`` break, but for those that the committed table breaks alike."""
    return [
        f"{_key(row)}: {rule}"
        for row in rows
        for rule in row["wrong"]
        if rule not in (known or {}).get(_key(row), {"wrong": []})["wrong"]
    ]


def differences(known: dict[str, dict[str, Any]] | None, rows: list[dict[str, Any]]) -> list[str]:
    """Where ``rows`` differ from the committed table, if there is one of this Triton."""
    worse = []
    for row in rows if known is not None else ():
        key = _key(row)
        if key not in known:
            worse.append(f"{key}: not in the committed table; write it anew")
            continue
        for name in (
            "registers",
            "spilled",
            "parked",
            "stalls",
            "barriers",
            "shared",
            "tensor",
            "wgmma",
            "async copies",
        ):
            if row[name] != known[key][name]:
                worse.append(f"{key}: {name} {known[key][name]} -> {row[name]}")
    return worse


def _print(rows: list[dict[str, Any]], title: str) -> None:
    shown = Table(title=title)
    columns = [name for name in rows[0] if name != "wrong"] if rows else []
    for name in columns:
        shown.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        style = "red" if row.get("wrong") else None
        shown.add_row(*(str(row[name]) for name in columns), style=style)
    Console(width=200).print(shown)


if __name__ == "__main__":
    sys.exit(main())
