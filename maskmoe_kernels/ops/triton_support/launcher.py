"""A launch that comes again: what Triton finds out about its arguments is found out once.

Triton's own launch looks at every argument of every call: is a pointer aligned, is an integer one
or divisible by 16. Where a job comes again, only the addresses of some tensors are new; which of
them are aligned is then all that there is to find out. With the C++ extension, NVIDIA's driver is
called directly: Triton's own last step is Python code, which makes every tensor descriptor anew.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce
from operator import or_
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from maskmoe_kernels.ops import native

# Versions whose launcher is known to take what is given to it here, and whose kernels take their
# parameters in the order of ``_parameters``.
_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
# Of cuda.h, in the order of csrc/common/kernel_launch.h.
_DRIVER = (
    "cuLaunchKernel", "cuTensorMapEncodeTiled", "cuCtxGetCurrent", "cuCtxSetCurrent",
    "cuGetErrorString",
)  # fmt: skip
_MAP_BYTES = 128


class Launch:
    """``kernel`` on ``grid``, with everything but its first arguments, which are tensors.

    It belongs to one device, and to tensors of the same dtypes in every call; ``None`` stays
    ``None``.

    Args:
        kernel: What Triton's ``jit`` made of a function.
        grid: One to three sizes.
        described: How the kernel reads the last of the tensors, by tensor descriptors.
        fixed: The arguments after the tensors, as far as they are given by position.
        options: The other arguments, and Triton's own.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *fixed: Any,
        described: Sequence[Described] = (),
        **options: Any,
    ) -> None:
        self._kernel, self._grid, self._fixed, self._options = kernel, grid, fixed, options
        self._sizes = (*grid, 1, 1)[:3]
        self._described = tuple(described)
        # What Triton's launcher wants after the tensors; by alignment, what launches with addresses
        # alone, and what Triton compiled.
        self._rest: tuple[Any, ...] = ()
        self._direct: dict[tuple[bool, ...], Callable[..., None]] = {}
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, device: int | None, *tensors: Any) -> None:
        """Launch on the current stream of ``device``, which is the current one."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        aligned: tuple[bool, ...] = ()  # all of them
        if reduce(or_, addresses) & 15:
            aligned = tuple([address & 15 == 0 for address in addresses])
        direct = self._direct.get(aligned)
        if direct is None or _watched(self._kernel):
            self._by_triton(device, aligned, tensors, addresses)
        else:
            direct(driver.active.get_current_stream(device), *addresses)

    def _by_triton(
        self,
        device: int | None,
        aligned: tuple[bool, ...],
        tensors: tuple[Any, ...],
        addresses: Sequence[int],
    ) -> None:
        plain = len(tensors) - len(self._described)
        described = [of(t) for of, t in zip(self._described, tensors[plain:], strict=True)]
        found = self._compiled.get(aligned)
        if found is None or _watched(self._kernel):
            given = (*tensors[:plain], *described, *self._fixed)
            found = self._kernel[self._grid](*given, **self._options)
            if _KNOWN and isinstance(found, CompiledKernel) and not _watched(self._kernel):
                direct = self._prepared(found, tensors)
                if direct is not None:
                    self._direct[aligned] = direct
                names = self._kernel.arg_names[len(given) :]
                rest = (*self._fixed, *(self._options[name] for name in names))
                self._rest = tuple(v.data_ptr() if isinstance(v, Tensor) else v for v in rest)
                self._compiled[aligned] = found  # which owns what is launched
            return
        found.run(
            *self._sizes, driver.active.get_current_stream(device), found.function,
            found.packed_metadata, None, None, None, *addresses[:plain], *described, *self._rest,
        )  # fmt: skip

    def _prepared(
        self, compiled: CompiledKernel, tensors: Sequence[Any]
    ) -> Callable[..., None] | None:
        """What launches ``compiled`` on a stream, given addresses; None where that is Triton's."""
        functions, module = _driver_functions(), native.extension()
        if functions is None or module is None or not _is_plain(compiled):
            return None
        names = self._kernel.arg_names
        values = dict(zip(names[len(tensors) :], self._fixed, strict=False)) | self._options
        found = _parameters(compiled, names[: len(tensors)], values, self._described)
        if found is None:
            return None
        warps, _, shared = compiled.packed_metadata
        shape = (compiled.function, *self._sizes, 32 * warps, shared)
        return partial(module.launch, module.prepare_launch(functions, shape, *found))


class Described:
    """A matrix whose blocks a kernel reads by a tensor descriptor.

    Triton's own class checks what it is given in every call; here, the caller has checked it once.

    Args:
        rows: Of the matrix.
        columns: Side by side.
        stride: From one row to the next: a multiple of 16 bytes, and so are addresses.
        block: Rows and columns of a block.
    """

    def __init__(self, rows: int, columns: int, stride: int, block: tuple[int, int]) -> None:
        self._fixed = {
            "shape": [rows, columns], "strides": [stride, 1], "block_shape": [*block]
        }  # fmt: skip

    def __call__(self, matrix: Tensor) -> Any:
        """The descriptor of ``matrix``."""
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(self._fixed, base=matrix)
        return made

    def sizes(self) -> list[bytes]:
        """Shape and strides, as parameters that stand after the descriptor."""
        shape, strides = self._fixed["shape"], self._fixed["strides"]
        return [
            *(struct.pack("<i", size) for size in shape),
            *(struct.pack("<q", stride) for stride in strides),
        ]

    def encoding(self, of: Mapping[str, Any]) -> tuple[Any, ...]:
        """How the driver names a block, after address and parameter (see kernel_launch.h).

        Args:
            of: What Triton noted of the descriptor when it compiled the kernel.
        """
        (rows, columns), stride = self._fixed["shape"], self._fixed["strides"][0]
        block_rows, block_columns = of["block_size"]
        size = of["elem_size"]
        return (
            TMA_DTYPE_DEVICE_TO_HOST[of["elem_type"]], of["swizzle"], columns, rows, stride * size,
            block_columns, block_rows,
            _driver_version() <= 13010 and ((rows - 1) * stride + columns - 1) * size < 128 * 1024,
        )  # fmt: skip


def _is_plain(compiled: CompiledKernel) -> bool:
    """Needs a launch of ``compiled`` nothing but its parameters?"""
    of = compiled.metadata
    asked = (
        "launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size",
        "gsan",
    )  # fmt: skip
    return compiled.packed_metadata[1] == 1 and not any(getattr(of, name, 0) for name in asked)


def _parameters(
    compiled: CompiledKernel,
    given: Sequence[str],
    values: Mapping[str, Any],
    described: Sequence[Described],
) -> tuple[list[bytes], list[int], list[tuple[Any, ...]]] | None:
    """What ``prepare_launch`` takes: parameters, places of the ``given``, descriptors.

    None where a parameter is of a kind that is not known here.
    """
    parameters: list[bytes] = []
    places = [-1] * len(given)
    maps: list[tuple[Any, ...]] = []
    metadata = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for name, kind in compiled.src.signature.items():
        place = given.index(name) if name in given else -1
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            value = 0 if place >= 0 else values[name]
            if place >= 0:
                places[place] = len(parameters)
            address = value.data_ptr() if isinstance(value, Tensor) else value
            parameters.append(struct.pack("<Q", address))
        elif kind in ("i32", "i64"):
            parameters.append(struct.pack("<i" if kind == "i32" else "<q", values[name]))
        elif kind.startswith("tensordesc") and (of := next(metadata, None)) is not None:
            matrix = described[place - len(given)]
            maps.append((place, len(parameters), *matrix.encoding(of)))
            parameters += [bytes(_MAP_BYTES), *matrix.sizes()]
        else:
            return None
    parameters += [bytes(8), bytes(8)]  # scratch memory of the kernel and of a profiler: none
    return parameters, places, maps


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@cache
def _driver_functions() -> tuple[int, ...] | None:
    """Addresses of the driver's functions that a launch needs; None without a driver."""
    if _library() is None:
        return None
    return tuple(
        ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value or 0 for name in _DRIVER
    )


@cache
def _driver_version() -> int:
    version = ctypes.c_int()
    _library().cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _watched(kernel: Any) -> bool:
    """Does anything look at launches, or change what is compiled for them?"""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )
