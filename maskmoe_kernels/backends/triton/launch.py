"""Launches: which tables, which configuration, how much workspace; then the kernels.

Workspace beside the outputs, from torch's allocator: the routed weights once more (turned, for
grad_x); float32 partial sums of grad_W and grad_b, at most ``configs.WORKSPACE`` bytes; and where
small batches meet long row blocks, float32 partial sums of those rows' outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from maskmoe_kernels.backends import grouped
from maskmoe_kernels.backends.activations import NEEDS_INPUT, grad_before
from maskmoe_kernels.backends.triton import INTERPRETED, kernels, tune
from maskmoe_kernels.backends.triton.configs import (
    Config,
    gradient_options,
    item_features,
    registers,
    slabs,
)
from maskmoe_kernels.backends.triton.device import on, processors
from maskmoe_kernels.backends.triton.limits import DTYPES
from maskmoe_kernels.backends.triton.products import Pair, Product, products_of
from maskmoe_kernels.layout.blocks import BlockLayout

#: torch's float32_matmul_precision to that of a float32 product here.
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# Entries of grad_W that a program of ``total`` sums.
_TOTAL = 1024


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output and, if ``keep`` and the derivative needs it, the pre-activation (else empty)."""
    if x.dtype not in DTYPES or not products_of(layout).fits:
        return grouped.forward(x, weight, bias, layout, activation, keep)
    y = x.new_empty(*x.shape[:-1], layout.out_features)
    z = torch.empty_like(y) if keep and activation in NEEDS_INPUT else x.new_empty(0)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        product = products_of(layout).forward
        job = _Forward(product, _matrix(x), weight.contiguous(), bias, y, z, activation)
        with on(x.device):
            precision = precision_of(x.dtype)
            job.run(tune.choose("forward", layout, job.x, precision, job.options, job.run))
    return y, z


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
    if x.dtype not in DTYPES or not products_of(layout).fits:
        return grouped.backward(grad_y, x, weight, saved, layout, activation, needs)
    pair = products_of(layout)
    need_x, need_weight, need_bias = needs
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight = x.new_empty(layout.num_weights if need_weight else 0)
    grad_bias = x.new_empty(layout.out_features if need_bias else 0)
    rows, given = _matrix(x), _matrix(grad_y).contiguous()
    kept = given if activation == "none" else _matrix(saved).contiguous()
    if not rows.shape[0]:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    if need_bias and not need_weight:  # there is no product to sum it beside
        grad_bias = grad_before(given, kept, activation).sum(0)
    if need_x or need_weight:
        turned = pair.turn(weight) if need_x else weight
        sums = (grad_weight, grad_bias) if need_weight else None
        job = _Backward(pair, rows, given, kept, turned, grad_x, sums, activation)
        with on(x.device):
            kind = f"backward of {'x' * need_x}{'w' * need_weight}"
            precision = precision_of(x.dtype)
            job.run(tune.choose(kind, layout, rows, precision, job.options, job.run))
    return grad_x, grad_weight, grad_bias


def precision_of(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are taken: ``tl.dot``'s input precision."""
    if dtype == torch.float32:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    return "exact" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def _matrix(t: Tensor) -> Tensor:
    """``(rows, features)`` with neighbouring features; rows may have any stride."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 and t.stride(0) >= 0 else t.contiguous()


@dataclass
class _Forward:
    product: Product
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    y: Tensor
    z: Tensor
    activation: str

    def options(self) -> list[Config]:
        return self.product.options(self.x, precision_of(self.x.dtype))

    def run(self, config: Config) -> None:
        rows = self.x.shape[0]
        row_tiles = triton.cdiv(rows, config.rows)
        t = self.product.tiles(config, self.x.device, row_tiles)
        parts = t.parts.shape[0]
        partial = self.x.new_empty(t.num_slots * rows * t.lanes, dtype=torch.float32)
        out = self.y.shape[-1]
        epilogue = {
            "ACT": self.activation,
            "BIAS": self.bias is not None,
            "KEEP": self.z.numel() > 0,
        }
        kernels.forward[(row_tiles * triton.cdiv(parts, config.parts),)](
            self.x, self.weight, self.bias, self.y, self.z, partial, t.parts, t.tiles, t.units,
            t.features, t.bases, t.strides, rows, self.x.stride(0), out, parts,
            **epilogue, SPLIT=t.num_slots > 0, M=config.rows, N=t.lanes, K=t.depth,
            PARTS=config.parts, SHARED=t.shared, FEATURE_GRAIN=t.feature_grain,
            UNIT_GRAIN=t.unit_grain, WEIGHT_GRAIN=t.weight_grain,
            PRECISION=precision_of(self.x.dtype), num_warps=config.warps, num_stages=config.stages,
            maxnreg=registers(config.rows * t.lanes, config.warps, self.x.dtype)
            if t.shared
            else None,
        )  # fmt: skip
        if t.num_slots:
            kernels.finish[(triton.cdiv(rows, 16), t.splits.shape[0])](
                partial, self.bias, self.y, self.z, t.splits, t.units, rows, out,
                **epilogue, M=16, N=t.lanes, UNIT_GRAIN=t.unit_grain,
            )  # fmt: skip


@dataclass
class _Backward:
    pair: Pair
    x: Tensor
    grad_y: Tensor
    saved: Tensor
    turned_weight: Tensor
    grad_x: Tensor
    grad_w: tuple[Tensor, Tensor] | None  # of the weights, and of the bias or empty
    activation: str

    def options(self) -> list[tuple[Config, Config]]:
        precision = precision_of(self.x.dtype)
        of_weight = self.pair.forward.options(self.x, precision, gradient=True)
        of_x = self.pair.turned.options(self.grad_y, precision)
        return gradient_options(of_weight, of_x, self.x.dtype)

    def run(self, config: tuple[Config, Config]) -> None:
        if config[0].apart and self.grad_w and self.grad_x.numel():
            replace(self, grad_x=self.grad_x.new_empty(0)).run(config)
            replace(self, grad_w=None).run(config)
            return
        w, of_x = config
        device, rows = self.x.device, self.x.shape[0]
        precision = precision_of(self.x.dtype)
        layout = self.pair.forward.layout
        t, turned = self.pair.forward.tiles(w, device), self.pair.turned.tiles(of_x, device)
        features = item_features(layout, t, self.x.dtype, precision)
        items = self.pair.forward.items(w, features, device)
        num_items = items.shape[0] if self.grad_w else 0
        parts = turned.parts.shape[0] if self.grad_x.numel() else 0
        entries = layout.num_weights + layout.out_features
        count = slabs(rows, num_items, entries, processors(device)) if num_items else 1
        slab_rows = rows if count == 1 else _up(triton.cdiv(rows, count), 128)
        count = triton.cdiv(rows, slab_rows)
        outputs = self.grad_w or (self.grad_x, self.grad_x)
        sums = outputs
        if count > 1:
            partial = self.x.new_empty(count * entries, dtype=torch.float32)
            sums = partial.split([count * layout.num_weights, count * layout.out_features])
        bias = outputs[1].numel() > 0 and self.grad_w is not None
        # Shared tiles, and derivatives with exponentials, take registers: shorter steps; and the
        # derivative of 128 rows, more warps.
        step = max(16, w.rows // (2 if t.shared or self.activation in NEEDS_INPUT else 1))
        many = (num_items > 0 and features * t.lanes >= 8192) or (parts > 0 and of_x.rows >= 128)
        of_rows = triton.cdiv(slab_rows, of_x.rows) * triton.cdiv(parts, of_x.parts)
        warps = 8 if many else of_x.warps
        largest = max(features * t.lanes * (num_items > 0), of_x.rows * turned.lanes * (parts > 0))
        kernels.backward[(count * (num_items + of_rows),)](
            self.grad_y, self.saved, self.x, self.turned_weight, self.grad_x, *sums,
            items, t.tiles, t.units, t.features, t.bases, t.strides,
            turned.parts, turned.tiles, turned.units, turned.features, turned.bases, turned.strides,
            rows, slab_rows, self.x.stride(0), layout.in_features, layout.out_features,
            layout.num_weights, num_items, parts,
            ACT=self.activation, BIAS=bias, PRECISION=precision,
            R=step, F=features, N=t.lanes, K=t.depth, SHARED=t.shared,
            FEATURE_GRAIN=t.feature_grain, UNIT_GRAIN=t.unit_grain, WEIGHT_GRAIN=t.weight_grain,
            XM=of_x.rows, XN=turned.lanes, XK=turned.depth, XPARTS=of_x.parts,
            XSHARED=turned.shared, XFEATURE_GRAIN=turned.feature_grain,
            XUNIT_GRAIN=turned.unit_grain, XWEIGHT_GRAIN=turned.weight_grain,
            OF_W=num_items > 0, OF_X=parts > 0,
            num_warps=warps, num_stages=w.stages,
            maxnreg=registers(largest, warps, self.x.dtype, True)
            if parts and turned.shared
            else None,
        )  # fmt: skip
        if count > 1:
            kernels.total[(triton.cdiv(entries, _TOTAL),)](
                *sums, *outputs, layout.num_weights, layout.out_features, count,
                BIAS=bias, SIZE=_TOTAL,
            )  # fmt: skip


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
