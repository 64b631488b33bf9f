"""What a training step would launch on a GPU: every launch, recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.layout.serialized import registered_layout
from maskmoe_kernels.ops.masked_linear.triton import kernels, launch, operands, products
from maskmoe_kernels.ops.selection.triton import gem_kernels, selection_kernels

#: Multiprocessors that the launch code sees: those of an H200.
PROCESSORS = 132
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INTEGERS = {torch.int32: "i32", torch.int64: "i64"}


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


#: One shape for each kind of tile configuration; a head of single units; a small batch.
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
    """One kernel, with all that its compilation depends on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    grid: int
    registers: int | None = None  # the limit of a thread

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
    """Takes the place of a kernel and records its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._record(grid, args, options)

    def _record(
        self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
        registers = options.pop("maxnreg", None)
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | options
        signature, constants, aligned = {}, {}, []
        for k, name in enumerate(self.kernel.arg_names):
            value = given[name]
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + (_TYPES | _INTEGERS)[value.dtype]
                aligned.append(k)
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
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


def launches(shape: Shape, every: bool = False, tma: bool = True) -> Iterator[Launch]:
    """Yield the launches of a training step of ``shape``.

    Args:
        shape: A layer.
        every: In every configuration that would be measured.
        tma: Has the GPU a tensor memory accelerator?
    """
    layout, dtype = shape.layout, getattr(torch, shape.dtype)
    recorded: list[Launch] = []
    real, real_count, real_tma = launch.kernels, products.processors, launch.has_tma
    launch.has_tma = lambda device: tma
    before = torch.get_float32_matmul_precision()
    names = [name for name in vars(kernels) if hasattr(getattr(kernels, name), "arg_names")]
    launch.kernels = operands.kernels = SimpleNamespace(
        **{name: _Recorder(getattr(kernels, name), recorded) for name in names}
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
        launch.kernels = operands.kernels = real
        launch.tune.choose, launch.has_tma = choose, real_tma
        products.processors = launch.processors = real_count
        torch.set_float32_matmul_precision(before)
    yield from recorded


def _all_of(kind: str, layout: Any, rows: Any, precision: str, options: Any, run: Any) -> Any:
    choices = options()
    for choice in choices[1:]:
        run(choice)
    return choices[0]


def objectives() -> Iterator[Launch]:
    """Yield the launches of the fused objectives, for a few and for many experts."""
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
