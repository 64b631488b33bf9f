"""Launches: which tables, which configuration, how much workspace; then the kernels.

Workspace beside the outputs, from torch's allocator: the routed weights once more (transposed, for
grad_x); the weights in the order of the tiles, where they are packed; grad_z, where it is formed
first; float32 partial sums of grad_W and grad_b, at most ``configs.WORKSPACE`` bytes; and where
small batches meet long row blocks, float32 partial sums of those rows' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.activations import NEEDS_INPUT, grad_before
from maskmoe_kernels.ops.masked_linear.triton import kernels, tune
from maskmoe_kernels.ops.masked_linear.triton.configs import (
    Config,
    gradient_options,
    item_features,
    registers,
    split_k_chunks,
)
from maskmoe_kernels.ops.masked_linear.triton.operands import Packing, Transposed, forming
from maskmoe_kernels.ops.masked_linear.triton.products import Pair, Product, products_of
from maskmoe_kernels.ops.masked_linear.triton.tiles import Tiles
from maskmoe_kernels.ops.triton_support import INTERPRETED
from maskmoe_kernels.ops.triton_support.device import has_tma, is_current, on, processors
from maskmoe_kernels.ops.triton_support.launcher import Launch

_C = TypeVar("_C")
#: torch's float32_matmul_precision to that of a float32 product here.
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# Sums of split-K chunks that a program of ``total`` loads at a time, and most of one entry.
_LOADED, _TOGETHER = 4096, 64


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output and, if ``keep`` and the derivative needs it, the pre-activation (else empty)."""
    y, z = output(x, weight, bias, layout, activation, keep)
    return y, x.new_empty(0) if z is None else z


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    layout: BlockLayout,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x over routed blocks, grad_weight over present blocks, grad_bias; empty if unneeded."""
    found = gradients(grad_y, x, weight, saved, layout, activation, needs)
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if g is None else g for g in found)
    return grad_x, grad_weight, grad_bias


def output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`forward`, with ``None`` for what is not kept."""
    pair = products_of(layout)
    y = x.new_empty((*x.shape[:-1], layout.out_features))
    z = torch.empty_like(y) if keep and activation in NEEDS_INPUT else None
    if not y.numel():
        return y, z
    x, rows, stride = _matrix(x, layout.in_features)
    if bias is not None:
        bias = bias.contiguous()
    given = (x, weight.contiguous(), bias, y, z)
    precision = precision_of(x.dtype)
    tma = _aligned(x, stride)
    case = (activation, bias is None, z is None, precision, rows, stride, tma, x.dtype, x.device)
    job: Any = pair.jobs.get(case)
    if job is not None and is_current(x.get_device()):
        job(*given)
        return y, z
    with on(x.device):
        if job is None:
            matrix = x.reshape(rows, -1)

            def options() -> list[Config]:
                return pair.forward.options(matrix, precision, tma=tma and has_tma(x.device))

            def made(config: Config) -> _Forward:
                return _Forward(pair.forward, config, given, rows, stride, activation, precision)

            kind = "forward" if tma else "forward, unaligned"
            job = _chosen(kind, layout, matrix, precision, options, made, given)
            pair.keep(case, job)
        job(*given)
    return y, z


def gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    layout: BlockLayout,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`backward`, with ``None`` for what is not needed."""
    need_x, need_weight, need_bias = needs
    pair = products_of(layout)
    empty = not x.numel()
    new = x.new_zeros if empty else x.new_empty
    grad_x = new(x.shape) if need_x else None
    grad_weight = new(layout.num_weights) if need_weight else None
    grad_bias = new(layout.out_features) if need_bias else None
    if empty:
        return grad_x, grad_weight, grad_bias
    grads = grad_y.contiguous()
    kept = grads if activation == "none" else saved.contiguous()
    if need_bias and not need_weight:  # there is no product to sum it beside
        grad_bias = grad_before(grads, kept, activation).reshape(-1, layout.out_features).sum(0)
    if not need_x and not need_weight:
        return grad_x, grad_weight, grad_bias
    matrix, rows, stride = _matrix(x, layout.in_features)
    given = (grads, kept, matrix, weight, grad_x, grad_weight, grad_bias)
    precision = precision_of(x.dtype)
    tma = _aligned(grads, layout.out_features)
    case = (activation, needs, precision, rows, stride, tma, x.dtype, x.device)
    job: Any = pair.jobs.get(case)
    if job is not None and is_current(x.get_device()):
        job(*given)
        return grad_x, grad_weight, grad_bias
    with on(x.device):
        if job is None:
            matrix = matrix.reshape(rows, -1)

            def options() -> list[tuple[Config, Config]]:
                of_weight = pair.forward.options(matrix, precision, gradient=True)
                can = tma and has_tma(x.device)
                of_x = pair.transposed.options(matrix, precision, tma=can)
                return gradient_options(of_weight, of_x, x.dtype, layout.out_features)

            def made(config: tuple[Config, Config]) -> _Backward:
                return _Backward(pair, config, matrix, stride, activation, needs, precision)

            kind = f"backward of {'x' * need_x}{'w' * need_weight}{'' if tma else ', unaligned'}"
            job = _chosen(kind, layout, matrix, precision, options, made, given)
            pair.keep(case, job)
        job(*given)
    return grad_x, grad_weight, grad_bias


def precision_of(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are taken: ``tl.dot``'s input precision."""
    if dtype == torch.float32:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    return "exact" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def _matrix(x: Tensor, features: int) -> tuple[Tensor, int, int]:
    """Rows of neighbouring features: where they lie, how many, and from one to the next."""
    if x.is_contiguous():
        return x, x.numel() // features, features
    x = x.reshape(-1, features)
    if x.stride(1) != 1 or x.stride(0) < 0:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)


def _aligned(matrix: Tensor, stride: int) -> bool:
    """Can a tensor descriptor name ``matrix``, whose rows begin ``stride`` apart?"""
    return not (matrix.data_ptr() | stride * matrix.element_size()) & 15


def _chosen(
    kind: str,
    layout: BlockLayout,
    rows: Tensor,
    precision: str,
    options: Callable[[], Sequence[_C]],
    made: Callable[[_C], Callable[..., None]],
    given: tuple[Tensor | None, ...],
) -> Callable[..., None]:
    """The job made for the configuration that ``tune`` chooses."""
    jobs: dict[_C, Callable[..., None]] = {}

    def job(config: _C) -> Callable[..., None]:
        if config not in jobs:
            jobs[config] = made(config)
        return jobs[config]

    chosen = tune.choose(kind, layout, rows, precision, options, lambda config: job(config)(*given))
    return job(chosen)


class _Forward:
    """One kernel over all parts; where parts are of split tiles, another that adds them up."""

    def __init__(
        self,
        product: Product,
        config: Config,
        given: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
        rows: int,
        stride: int,
        activation: str,
        precision: str,
    ) -> None:
        x, _, bias, y, z = given
        out, device = y.shape[-1], x.device
        row_tiles = triton.cdiv(rows, config.rows)
        t = product.tiles(config, device, row_tiles)
        self._packing = packing = Packing(product, config, t, device, rows, stride)
        parts = packing.parts.shape[0]
        epilogue: dict[str, Any] = {
            "ACT": activation, "BIAS": bias is not None, "KEEP": z is not None
        }  # fmt: skip
        self._device = device.index
        self._no_sums = x.new_empty(0, dtype=torch.float32)
        self._sums = t.num_slots * rows * t.lanes
        self._multiply = Launch(
            kernels.forward, (row_tiles * triton.cdiv(parts, config.parts),),
            packing.parts, t.tiles, t.units, t.features, packing.features, t.bases, t.strides,
            rows, stride, out, parts,
            **epilogue, SPLIT=t.num_slots > 0, M=config.rows, N=t.lanes, K=t.depth,
            PARTS=config.parts, SHARED=t.shared, PACKED=packing.is_on, TMA=packing.tma,
            FEATURE_GRAIN=t.feature_grain, PACKED_GRAIN=packing.grain,
            UNIT_GRAIN=t.unit_grain, WEIGHT_GRAIN=t.weight_grain,
            PRECISION=precision, num_warps=config.warps, num_stages=config.stages,
            maxnreg=registers(
                t, config.rows * t.lanes, config.warps, x.dtype, packed=config.packed
            ),
            described=packing.described,
        )  # fmt: skip
        self._reduce = Launch(
            kernels.reduce_parts, (triton.cdiv(rows, 16), t.splits.shape[0]),
            t.splits, t.units, rows, out,
            **epilogue, M=16, N=t.lanes, UNIT_GRAIN=t.unit_grain,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None
    ) -> None:
        if z is None:
            z = y  # which is not written as such
        sums = self._no_sums
        if self._sums:
            sums = x.new_empty(self._sums, dtype=torch.float32)
        packed = self._packing(weight)
        blocks = self._packing.blocks(x, packed)
        self._multiply(self._device, x, weight, packed, bias, y, z, sums, *blocks)
        if self._sums:
            self._reduce(self._device, sums, bias, y, z)


class _Backward:
    """One kernel for all gradients, or one for each; another adds up the split-K chunks of rows.

    Before them, where the configuration says so, grad_z is formed once: into memory of its own.
    """

    def __init__(
        self,
        pair: Pair,
        config: tuple[Config, Config],
        x: Tensor,
        stride: int,
        activation: str,
        needs: tuple[bool, bool, bool],
        precision: str,
    ) -> None:
        w, of_x = config
        need_x, need_weight, need_bias = needs
        layout, device, rows = pair.forward.layout, x.device, x.shape[0]
        self._device, self._nothing, self._need_x = device.index, x.new_empty(0), need_x
        self._form = forming(rows * layout.out_features, activation) if w.formed else None
        activation = "none" if w.formed else activation
        t, xt = pair.forward.tiles(w, device), pair.transposed.tiles(of_x, device)
        packing = Packing(pair.transposed, of_x, xt, device, rows, layout.out_features)
        self._packing = packing
        # Packed tiles of one row block each have no use for the weights as they come.
        in_order = need_x and (xt.shared or not of_x.packed)
        self._index = pair.index(device) if in_order else None
        self._transposed = Transposed(x, stride, layout, w.transposed and need_weight)
        features = w.features or item_features(layout, t, x.dtype, precision)
        items = pair.forward.items(w, features, device)
        sums = layout.num_weights, layout.out_features
        apart, bias = w.apart and need_weight and need_x, need_bias and need_weight
        count, split_k_rows = 1, rows
        if need_weight:
            alone = apart or not need_x
            count, split_k_rows = _split_k(rows, len(items), sum(sums), processors(device), alone)
        self._sums = [count * entries for entries in sums] if count > 1 else []
        # Derivatives that are formed on the way take registers: shorter steps.
        hungry = activation != "none" and (t.shared or activation in NEEDS_INPUT)
        step = max(16, w.rows // (2 if hungry else 1))

        def multiply(of_weight: bool, of_input: bool) -> Launch:
            num_items, parts = len(items) * of_weight, len(packing.parts) * of_input
            warps, limit = _resources(
                config, t, xt, features, x.dtype, activation, of_weight, of_input
            )
            of_rows = triton.cdiv(split_k_rows, of_x.rows) * triton.cdiv(parts, of_x.parts)
            return Launch(
                kernels.backward, (count * (num_items + of_rows),),
                items, t.tiles, t.units, t.features, t.bases, t.strides,
                packing.parts, xt.tiles, xt.units, xt.features, packing.features, xt.bases,
                xt.strides, rows, split_k_rows, self._transposed.stride, layout.in_features,
                layout.out_features, layout.num_weights, num_items, parts,
                ACT=activation, BIAS=bias, PRECISION=precision, R=step, F=features,
                TRANSPOSED=self._transposed.is_on, OF_W=of_weight, OF_X=of_input,
                **_tiles_of_weight(t), **_tiles_of_x(xt, of_x, packing),
                TMA=packing.tma and of_input, maxnreg=limit, num_warps=warps,
                described=packing.described if of_input else (),
                num_stages=of_x.stages if of_x.tma and not of_weight else w.stages,
            )  # fmt: skip

        kinds = [(True, False), (False, True)] if apart else [(need_weight, need_x)]
        self._multiply = [(*kind, multiply(*kind)) for kind in kinds]
        self._total = _summing(sums, count, bias)

    def __call__(
        self,
        grad_y: Tensor,
        saved: Tensor,
        x: Tensor,
        weight: Tensor,
        grad_x: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> None:
        xt = weight if self._index is None else weight.index_select(0, self._index)
        packed = self._packing(weight) if self._need_x else weight
        if grad_x is None:
            grad_x = self._nothing
        if grad_weight is None:
            grad_weight = self._nothing
        if grad_bias is None:
            grad_bias = self._nothing
        if self._form is not None:
            formed = torch.empty_like(grad_y)
            self._form(self._device, grad_y, saved, formed)
            grad_y = saved = formed
        of_weight, of_bias = grad_weight, grad_bias
        if self._sums:
            of_weight = x.new_empty(self._sums[0], dtype=torch.float32)
            of_bias = x.new_empty(self._sums[1], dtype=torch.float32)
        for is_of_weight, is_of_input, multiply in self._multiply:
            of = (grad_y, saved, x)
            if is_of_weight and self._transposed.is_on:
                of = self._transposed(grad_y, x)
            blocks = self._packing.blocks(grad_y, packed) if is_of_input else (None, None)
            multiply(self._device, *of, xt, packed, grad_x, of_weight, of_bias, *blocks)
        if self._sums:
            self._total(self._device, of_weight, of_bias, grad_weight, grad_bias)


def _tiles_of_weight(t: Tiles) -> dict[str, Any]:
    """What the backward kernel knows of the tiles of grad_W when it is compiled."""
    return {
        "N": t.lanes, "K": t.depth, "SHARED": t.shared, "FEATURE_GRAIN": t.feature_grain,
        "UNIT_GRAIN": t.unit_grain, "WEIGHT_GRAIN": t.weight_grain,
    }  # fmt: skip


def _tiles_of_x(t: Tiles, config: Config, packing: Packing) -> dict[str, Any]:
    """What the backward kernel knows of the tiles of grad_x when it is compiled."""
    return {
        "XM": config.rows, "XN": t.lanes, "XK": t.depth, "XPARTS": config.parts,
        "XSHARED": t.shared, "XPACKED": packing.is_on, "XFEATURE_GRAIN": t.feature_grain,
        "PACKED_GRAIN": packing.grain,
        "XUNIT_GRAIN": t.unit_grain, "XWEIGHT_GRAIN": t.weight_grain,
    }  # fmt: skip


def _resources(
    config: tuple[Config, Config],
    t: Tiles,
    xt: Tiles,
    features: int,
    dtype: torch.dtype,
    activation: str,
    of_weight: bool,
    of_input: bool,
) -> tuple[int, int | None]:
    """Warps of a backward kernel, and its limit of registers a thread."""
    _, of_x = config
    of_w, of_rows = features * t.lanes * of_weight, of_x.rows * xt.lanes * of_input
    formed = activation == "none"
    # The derivative of 128 rows takes more warps.
    high = of_input and of_x.rows >= 128 and not (of_x.packed and formed)
    warps = 8 if of_w >= 8192 or high else of_x.warps
    if not of_input:
        return warps, None
    return warps, registers(xt, max(of_w, of_rows), warps, dtype, not formed, of_x.packed)


def _summing(sums: tuple[int, int], count: int, bias: bool) -> Launch:
    """The launch that adds up ``count`` split-K chunks of so many sums."""
    together = min(_TOGETHER, triton.next_power_of_2(count))
    size = _LOADED // together
    return Launch(
        kernels.total, (triton.cdiv(sum(sums), size),), *sums, count,
        BIAS=bias, SIZE=size, TOGETHER=together,
    )  # fmt: skip


def _split_k(rows: int, items: int, sums: int, count: int, alone: bool) -> tuple[int, int]:
    """Number of split-K chunks on ``count`` multiprocessors, and rows of each."""
    chunks = split_k_chunks(rows, items, sums, count, alone)
    size = rows if chunks == 1 else -(-triton.cdiv(rows, chunks) // 128) * 128
    return triton.cdiv(rows, size), size
