"""Arguments of layouts and families, checked: what is returned is what the rest relies on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError

_HOW_TO_MAKE = {
    "Tensor": "; torch.as_tensor makes one of an array or a list",
    "BlockLayout": "; BlockLayout.from_mask makes one of a mask",
}


def described(value: object) -> str:
    """What an argument is, for an error: shape, dtype and device of a tensor, else its class."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype} on {value.device}"
    return "None" if value is None else type(value).__name__


def check_kind(expected: type, **given: object) -> None:
    """Raise LayoutError for the first of the arguments that is no ``expected``."""
    for name, value in given.items():
        if not isinstance(value, expected):
            how = _HOW_TO_MAKE.get(expected.__name__, "")
            raise LayoutError(f"{name} must be a {expected.__name__}, got {described(value)}{how}")


def check_integer(argument: str, value: int, least: int | None = None) -> None:
    """Raise LayoutError unless ``value`` is an integer, and not below ``least``."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex):
        raise LayoutError(f"{argument} must be an integer, got {value!r:.80}")
    if least is not None and value < least:
        raise LayoutError(f"{argument} must be at least {least}, got {value}")


def block_sizes(
    argument: str, sizes: int | Sequence[int], count: int | None = None
) -> tuple[int, ...]:
    """``sizes`` as ``count`` integers of at least 1; an int is repeated.

    ``None`` for ``count``: as many as there are, which an int does not say.

    Raises:
        LayoutError: Not integers, below 1, none at all, or not ``count`` of them.
    """
    try:
        if isinstance(sizes, (str, bool)):
            raise TypeError
        if count is None:
            if not isinstance(sizes, (Sequence, Tensor, np.ndarray)):
                raise LayoutError(
                    f"{argument} must be a sequence of integers, got {described(sizes)}"
                )
            count = len(sizes)
        listed = (
            [operator.index(size) for size in sizes]
            if isinstance(sizes, (Sequence, Tensor, np.ndarray))
            else [operator.index(sizes)] * count
        )
    except TypeError:
        raise LayoutError(
            f"{argument} must be an integer or a sequence of integers, got {sizes!r}"
        ) from None
    if len(listed) != count:
        raise LayoutError(f"{argument} must have {count} entries, got {len(listed)}: {listed}")
    if not listed or min(listed) < 1:
        raise LayoutError(f"{argument} must hold integers of at least 1, got {listed}")
    return tuple(listed)


def plain_tensor(argument: str, value: Tensor) -> Tensor:
    """``value`` as a dense tensor on the CPU, sparse tensors and nested sequences included.

    Raises:
        LayoutError: ``value`` is no tensor of numbers whose values are known.
    """
    if not isinstance(value, Tensor):
        try:  # as_tensor would follow ``with torch.device("meta")``
            return torch.tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise LayoutError(
                f"{argument} must be a tensor or an array of numbers, got {value!r:.80}"
            ) from None
    kinds = {
        "a nested tensor": value.is_nested,
        "a quantized tensor": value.is_quantized,
        "a meta tensor, which has no values": value.is_meta,
        "a complex tensor": value.is_complex(),
    }
    for kind, given in kinds.items():
        if given:
            raise LayoutError(f"{argument} must be a plain tensor of numbers, got {kind}")
    value = value.detach()
    return (value if value.layout == torch.strided else value.to_dense()).cpu()


def bool_matrix(argument: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """``value`` as a bool matrix of its own, ``(row blocks, column blocks)``.

    Raises:
        LayoutError: Another dtype or shape.
    """
    matrix = plain_tensor(argument, value)
    if matrix.dtype != torch.bool or tuple(matrix.shape) != shape:
        raise LayoutError(
            f"{argument} must be a bool matrix of row blocks x column blocks, {shape}, got "
            f"{matrix.dtype} {tuple(matrix.shape)}"
        )
    return matrix.clone(memory_format=torch.contiguous_format)


def refuse_absent_routes(routed: Tensor, present: Tensor, what: str) -> None:
    """Raise LayoutError where a gradient is routed through what is absent."""
    wrong = (routed & ~present).nonzero()
    if wrong.numel():
        raise LayoutError(
            f"a gradient cannot flow through an absent {what}, but {len(wrong)} are routed and "
            f"absent, the first at (row, column) {tuple(wrong[0].tolist())}"
        )


def permutation(argument: str, order: Tensor | None, size: int) -> Tensor | None:
    """``order`` as int64; None where it moves nothing.

    Raises:
        LayoutError: Not a permutation of ``size`` numbers.
    """
    if order is None:
        return None
    order = plain_tensor(argument, order).to(torch.int64)
    if not torch.equal(order.sort().values, torch.arange(size, device="cpu")):
        raise LayoutError(f"{argument} must be a permutation of 0..{size - 1}")
    if torch.equal(order, torch.arange(size, device="cpu")):
        return None
    return order.clone()
