"""Selection and mixture: one kernel forward, one backward; a program owns whole rows.

::

    alpha_i = g_i A_i,  A_i = prod over j in omega(i) of (1 - g_j)
    grad_z_k = (dL/dalpha_k A_k) g_k' + log(1 - g_k)' sum over supersets i of k of dL/dA_i A_i

A tile is rows x all experts (a power of two of them), in registers. The products walk only the
experts that lie in another one's subset: such an expert's 1 - g is read back from the output (where
each was put after it was computed once) and multiplied into its supersets by a select, so
that nothing, NaN included, passes to the others. Each output is written by one program: no atomics.

::

    logits  read once      alpha  written (through L2: 1 - g, then alpha)
    A       written for a backward; share and probability for a mixture
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.ops.selection.triton.confidence import (
    exp_negative,
    known_parts,
    probabilities,
    sharpened_slopes,
    slopes,
)
from maskmoe_kernels.ops.triton_support import unsupported_reason
from maskmoe_kernels.ops.triton_support.device import on
from maskmoe_kernels.ops.triton_support.limits import CONFIDENCES, MAX_EXPERTS

#: Name, jit function, signature, constexprs, warps, stages: what compiles one kernel.
Variant = tuple[str, Any, dict[str, str], dict[str, Any], int, int]

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Tile(NamedTuple):
    """Rows and (padded) experts of a tile, and the warps that hold it."""

    rows: int
    experts: int
    warps: int


def tile_of(experts: int) -> Tile:
    """8 elements a thread: more would spill. 8 rows share each row of the tables, at 1024 four."""
    padded = max(triton.next_power_of_2(experts), 4)
    elements = min(max(1024, 8 * padded), 4096)
    return Tile(elements // padded, padded, elements // 256)


@triton.jit
def place(tile, rows, experts, R: tl.constexpr, HB: tl.constexpr):
    """Row (R, 1) in 64 bits, expert (1, HB), which of both exist, and the offset in (rows, H)."""
    row = (tl.zeros((R, 1), tl.int64) + tile) * R + tl.arange(0, R)[:, None]
    expert = tl.arange(0, HB)[None, :]
    return row, expert, (row < rows) & (expert < experts), row * experts + expert


@triton.jit
def load_logits(logits, row, expert, tile_mask, row_stride, expert_stride):
    """Logits of a tile in float32, 0 where there are none; strides are in elements."""
    at = row * row_stride + expert.to(tl.int64) * expert_stride
    return tl.load(logits + at, mask=tile_mask, other=0.0).to(tl.float32)


@triton.jit
def known_expert(named, experts):
    """The expert that a table names; the table comes from whoever wrote the program."""
    return tl.minimum(tl.maximum(named, 0), experts - 1)


@triton.jit
def products(
    rest,
    scratch,
    row,
    at,
    tile_mask,
    rows,
    experts,
    subset_experts,
    supersets_of,
    count,
    HB: tl.constexpr,
):
    """A_i, the product of 1 - g over omega(i), ``(R, HB)``.

    ``subset_experts`` (count,) names the experts whose subset lies inside another one's; row n of
    ``supersets_of`` (count, H) says inside whose.
    """
    tl.store(scratch + at, rest, mask=tile_mask)
    tl.debug_barrier()  # the rows are this program's own, but other threads read them
    expert = tl.arange(0, HB)
    product = tl.full(rest.shape, 1.0, tl.float32)
    for n in range(count):
        j = known_expert(tl.load(subset_experts + n), experts)
        factor = tl.load(scratch + row * experts + j, mask=row < rows, other=1.0)
        inside = tl.load(supersets_of + n * experts + expert, mask=expert < experts, other=0) != 0
        product *= tl.where(inside[None, :], factor, 1.0)
    tl.debug_barrier()  # what is stored next may lie over the scratch
    return product


@triton.jit
def selection_forward(
    logits, alpha, product, share, probability, subset_experts, supersets_of, has_superset, rows,
    row_stride, expert_stride, experts, count, sharpness, CONFIDENCE: tl.constexpr, SHARP:
    tl.constexpr, KEEP: tl.constexpr, MIX: tl.constexpr, R: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """alpha, with KEEP also A, with MIX also share and probability (eq. 1)."""
    row, expert, tile_mask, at = place(tl.program_id(0), rows, experts, R, HB)
    z = load_logits(logits, row, expert, tile_mask, row_stride, expert_stride)
    is_sharpened = tl.load(has_superset + expert, mask=expert < experts, other=0) != 0
    g, rest = known_parts(z, is_sharpened, sharpness, CONFIDENCE, SHARP)
    factor = products(
        rest, alpha, row, at, tile_mask, rows, experts, subset_experts, supersets_of, count, HB
    )
    own = tl.where(expert < experts, g * factor, 0.0)
    tl.store(alpha + at, own, mask=tile_mask)
    if KEEP:
        tl.store(product + at, factor, mask=tile_mask)
    if MIX:
        total = tl.sum(own, 1)[:, None]
        nobody = total == 0
        part = tl.where(nobody, 1.0 / experts, own / tl.where(nobody, 1.0, total))
        tl.store(share + at, part, mask=tile_mask)
        p, _ = probabilities(z, exp_negative(-2 * tl.abs(z)))
        mixed = tl.sum(tl.where(expert < experts, part * p, 0.0), 1)[:, None]
        # Shares may sum to 1 and a rounding. A select: a minimum would drop NaN.
        tl.store(probability + row, tl.where(mixed > 1, 1.0, mixed), mask=row < rows)


@triton.jit
def selection_backward(
    logits, alpha, product, grad_alpha, grad_product, grad_logits, superset_experts, subsets_of,
    has_superset, rows, row_stride, expert_stride, experts, count, sharpness, CONFIDENCE:
    tl.constexpr, SHARP: tl.constexpr, OWN: tl.constexpr, PRODUCT: tl.constexpr, R: tl.constexpr,
    HB: tl.constexpr,
):  # fmt: skip
    """grad_logits from grad_alpha (OWN), from that of the products (PRODUCT), or from both.

    ``superset_experts`` (count,) names the experts that have a subset inside theirs, row n of
    ``subsets_of`` (count, H) says whose. Where alpha is NaN, no gradient passes, neither to
    that expert nor to its subsets.
    """
    row, expert, tile_mask, at = place(tl.program_id(0), rows, experts, R, HB)
    z = load_logits(logits, row, expert, tile_mask, row_stride, expert_stride)
    unknown = z != z
    z = tl.where(unknown, 0.0, z)
    slope, log_slope = slopes(z, CONFIDENCE)
    if SHARP:
        g, rest = known_parts(z, unknown, 1.0, CONFIDENCE, False)
        sharp, sharp_rest = known_parts(z, tile_mask, sharpness, CONFIDENCE, True)
        slope_s, log_slope_s = sharpened_slopes(
            g, rest, sharp, sharp_rest, slope, log_slope, sharpness
        )
        is_sharpened = tl.load(has_superset + expert, mask=expert < experts, other=0) != 0
        slope = tl.where(is_sharpened, slope_s, slope)
        log_slope = tl.where(is_sharpened, log_slope_s, log_slope)
    total = tl.zeros((R, HB), tl.float32)
    column = tl.arange(0, HB)
    for n in range(count):
        i = known_expert(tl.load(superset_experts + n), experts)
        one = row * experts + i
        moved = tl.zeros((R, 1), tl.float32)
        if OWN:
            a = tl.load(alpha + one, mask=row < rows, other=0.0)
            grad = tl.load(grad_alpha + one, mask=row < rows, other=0.0)
            moved += tl.where(a == a, grad * a, 0.0)
        if PRODUCT:
            a = tl.load(product + one, mask=row < rows, other=0.0)
            grad = tl.load(grad_product + one, mask=row < rows, other=0.0)
            moved += tl.where(a == a, grad * a, 0.0)
        inside = tl.load(subsets_of + n * experts + column, mask=column < experts, other=0) != 0
        total += tl.where(inside[None, :], moved, 0.0)
    result = total * log_slope
    if OWN:
        a = tl.load(product + at, mask=tile_mask, other=0.0)
        grad = tl.load(grad_alpha + at, mask=tile_mask, other=0.0)
        result += tl.where((a == a) & ~unknown, grad * a * slope, 0.0)
    result = tl.where(unknown, 0.0, result)
    tl.store(grad_logits + at, result.to(grad_logits.dtype.element_ty), mask=tile_mask)


def forward(
    logits: Tensor,
    subset_experts: Tensor,
    supersets_of: Tensor,
    has_superset: Tensor,
    confidence: str,
    sharpness: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """alpha and, if ``keep``, the products over omega(i) (else empty), float32 like ``logits``."""
    alpha = logits.new_empty(logits.shape, dtype=torch.float32)
    product = torch.empty_like(alpha) if keep else alpha.new_empty(0)
    outputs = (alpha, product, alpha, alpha)
    flags = {"KEEP": keep, "MIX": False}
    _forward(
        logits, outputs, (subset_experts, supersets_of, has_superset), confidence, sharpness, flags
    )
    return alpha, product


def mixture(
    logits: Tensor,
    subset_experts: Tensor,
    supersets_of: Tensor,
    has_superset: Tensor,
    confidence: str,
    sharpness: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability ``(*,)``, alpha and attribution ``(*, H)``, float32."""
    alpha = logits.new_empty(logits.shape, dtype=torch.float32)
    share, probability = torch.empty_like(alpha), alpha.new_empty(logits.shape[:-1])
    outputs = (alpha, alpha, share, probability)
    flags = {"KEEP": False, "MIX": True}
    _forward(
        logits, outputs, (subset_experts, supersets_of, has_superset), confidence, sharpness, flags
    )
    return probability, alpha, share


def _forward(
    logits: Tensor,
    outputs: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    confidence: str,
    sharpness: float,
    flags: dict[str, bool],
) -> None:
    z, tile = rows_of(logits), tile_of(logits.shape[-1])
    if not z.numel():
        return
    with on(z.device):
        selection_forward[(triton.cdiv(z.shape[0], tile.rows),)](
            z, *outputs, *tables, z.shape[0], *z.stride(), z.shape[1], len(tables[0]),
            float(sharpness), CONFIDENCE=confidence, SHARP=sharpness != 1, **flags, R=tile.rows,
            HB=tile.experts, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip


def backward(
    grad_alpha: Tensor | None,
    grad_product: Tensor | None,
    logits: Tensor,
    alpha: Tensor,
    product: Tensor,
    superset_experts: Tensor,
    subsets_of: Tensor,
    has_superset: Tensor,
    confidence: str,
    sharpness: float,
) -> Tensor:
    """grad_logits ``(*, H)``, in their dtype; a gradient that is None counts as 0."""
    z, tile = rows_of(logits), tile_of(logits.shape[-1])
    grad = logits.new_empty(logits.shape)
    if not z.numel() or (grad_alpha is None and grad_product is None):
        return grad.zero_()
    given = [alpha if g is None else g.contiguous() for g in (grad_alpha, grad_product)]
    with on(z.device):
        selection_backward[(triton.cdiv(z.shape[0], tile.rows),)](
            z, alpha, product, *given, grad, superset_experts, subsets_of, has_superset, z.shape[0],
            *z.stride(), z.shape[1], len(superset_experts), float(sharpness), CONFIDENCE=confidence,
            SHARP=sharpness != 1, OWN=grad_alpha is not None, PRODUCT=grad_product is not None,
            R=tile.rows, HB=tile.experts, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    return grad


def rows_of(logits: Tensor) -> Tensor:
    """``(rows, H)`` with the strides it has; copied only where no such view exists.

    Raises:
        BackendError: The kernels do not run on this device.
    """
    reason = None if logits.is_cuda else unsupported_reason(logits.device)
    if reason is not None:
        raise BackendError(
            f"the Triton kernels cannot run: {reason}; move the logits to one, or set "
            "TRITON_INTERPRET=1 before the first import to try the kernels slowly on the CPU"
        )
    return logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])


def variants(every: bool = False) -> Iterator[Variant]:
    """What the launchers above can launch.

    By default every tile with every confidence and each of the other switches' combinations in
    turn; with ``every`` all combinations.
    """
    flags = [(False, False), (True, False), (False, True)]
    yield from _variants_of(selection_forward, ("KEEP", "MIX"), flags, every)
    flags = [(True, False), (False, True), (True, True)]
    yield from _variants_of(selection_backward, ("OWN", "PRODUCT"), flags, every)


def _variants_of(
    kernel: Any, names: tuple[str, ...], flags: Sequence[tuple[bool, ...]], every: bool
) -> Iterator[Variant]:
    switches = [
        (dtype, {"SHARP": sharp, **dict(zip(names, flag, strict=True))})
        for dtype, sharp, flag in itertools.product(POINTERS, (False, True), flags)
    ]
    integers = {"rows", "row_stride", "experts", "count"}
    tables = {
        "subset_experts": "*i32",
        "superset_experts": "*i32",
        "supersets_of": "*u8",
        "subsets_of": "*u8",
        "has_superset": "*i1",
    }
    for dtype, constexprs, tile in combinations_of(switches, every):
        types = {"logits": POINTERS[dtype], "grad_logits": POINTERS[dtype], "sharpness": "fp32"}
        types |= tables | dict.fromkeys(integers, "i32")
        yield variant(kernel, types, constexprs, tile)


def combinations_of(
    switches: list[tuple[torch.dtype, dict[str, Any]]], every: bool
) -> Iterator[tuple[torch.dtype, dict[str, Any], Tile]]:
    """Tiles and confidences times ``switches``, or with one of these each, in turn."""
    sizes = [2**n for n in range(2, MAX_EXPERTS.bit_length())]
    for turn, (size, name) in enumerate(itertools.product(sizes, CONFIDENCES)):
        # A step that shares no factor with the number of switches meets all of them.
        chosen = switches if every else [switches[turn * 7 % len(switches)]]
        for dtype, constexprs in chosen:
            yield dtype, {"CONFIDENCE": name, **constexprs}, tile_of(size)


def variant(kernel: Any, types: dict[str, str], constexprs: dict[str, Any], tile: Tile) -> Variant:
    """One configuration; arguments that ``types`` does not name are float32 pointers."""
    constexprs = {**constexprs, "R": tile.rows, "HB": tile.experts, "expert_stride": 1}
    signature = {
        name: "constexpr" if name in constexprs else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    shown = [f"{key}={value}" for key, value in constexprs.items() if key.isupper()]
    name = f"{kernel.__name__}[{types['logits'][1:]}, {', '.join(shown)}]"
    return name, kernel, signature, constexprs, tile.warps, 1
