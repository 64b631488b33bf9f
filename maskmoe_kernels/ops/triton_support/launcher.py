"""A launch that comes again: what Triton finds out about its arguments is found out once.

Triton's own launch looks at every argument of every call: is a pointer aligned, is an integer one
or divisible by 16. Where a job comes again, only the addresses of some tensors are new; which of
them are aligned is then all that there is to find out.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

# Versions whose launcher is known to take what is given to it here.
_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class Launch:
    """``kernel`` on ``grid``, with everything but its first arguments, which are tensors.

    It belongs to one device, and to tensors of the same dtypes in every call; ``None`` stays
    ``None``.

    Args:
        kernel: What Triton's ``jit`` made of a function.
        grid: One to three sizes.
        described: That many of the first arguments, the last ones, are tensor descriptors.
        fixed: The arguments after the first tensors, as far as they are given by position.
        options: The other arguments, and Triton's own.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], *fixed: Any, described: int = 0, **options: Any
    ) -> None:
        self._kernel, self._grid, self._fixed, self._options = kernel, grid, fixed, options
        self._sizes = (*grid, 1, 1)[:3]
        self._described = described
        # What the launcher wants after the addresses, and what Triton compiled, by alignment.
        self._rest: tuple[Any, ...] = ()
        self._compiled: dict[tuple[bool, ...], tuple[Any, int, Any]] = {}

    def __call__(self, device: int | None, *tensors: Any) -> None:
        """Launch on the current stream of ``device``, which is the current one."""
        described: tuple[Any, ...] = ()
        plain = tensors
        if self._described:
            plain, described = tensors[: -self._described], tensors[-self._described :]
        addresses = [0 if t is None else t.data_ptr() for t in plain]
        aligned: tuple[bool, ...] = ()  # all of them
        if reduce(or_, addresses) & 15:
            aligned = tuple([address & 15 == 0 for address in addresses])
        found = self._compiled.get(aligned)
        if found is None or _watched(self._kernel):
            self._ordinary(aligned, tensors)
            return
        run, function, metadata = found
        run(
            *self._sizes, driver.active.get_current_stream(device), function, metadata,
            None, None, None, *addresses, *described, *self._rest,
        )  # fmt: skip

    def _ordinary(self, aligned: tuple[bool, ...], tensors: tuple[Any, ...]) -> None:
        compiled = self._kernel[self._grid](*tensors, *self._fixed, **self._options)
        if _KNOWN and isinstance(compiled, CompiledKernel) and not _watched(self._kernel):
            names = self._kernel.arg_names[len(tensors) + len(self._fixed) :]
            rest = (*self._fixed, *(self._options[name] for name in names))
            self._rest = tuple(v.data_ptr() if isinstance(v, Tensor) else v for v in rest)
            kept = compiled.run, compiled.function, compiled.packed_metadata
            self._compiled[aligned] = kept


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
