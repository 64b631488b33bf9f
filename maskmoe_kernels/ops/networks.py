"""Whole networks as registered ops: all layers, or loss and all gradients, in one pass.

A tile of rows goes through every layer while its activations stay in the cache. As gradients are
routed within an expert only, its loss and its backward can follow at once (``masked_mlp_gem``):
then the input alone is read, and gradients alone are written.

The input of a network is made of *parts*, side by side: ``p >= 0`` is a row of ``tables[p]``, the
one that ``ids[p]`` names; ``p < 0`` are the next ``-p`` columns of ``x``.

``masked_mlp`` without kernels is ``layered_mlp``, layer after layer by the fastest op that runs it;
``masked_mlp_gem`` and ``masked_mlp_mixture`` have kernels or are not called: see :func:`obstacle`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maskmoe_kernels.backends import choice, native
from maskmoe_kernels.backends.activations import NEEDS_INPUT
from maskmoe_kernels.backends.triton.limits import CONFIDENCES, DTYPES
from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.plan import layout_of, plan_of
from maskmoe_kernels.ops.autograd import BACKWARD, FORWARD, differentiable_once
from maskmoe_kernels.ops.checks import PLAIN, check_count, check_parts, refuse_sharded
from maskmoe_kernels.ops.functional import OP_OF, autocast

_LIBRARY = torch.library.Library("maskmoe", "FRAGMENT")
_INPUT = "Tensor? x, Tensor[] tables, Tensor[] ids, int[] parts"
_LAYERS = "Tensor[] weights, Tensor[] biases"
_PLANS = "Tensor[] plans, int[] layouts"
_NEEDS = "bool need_x, bool need_tables, bool need_weights"
OPS = ("masked_mlp", "layered_mlp")
_SCHEMAS = (
    *(
        schema
        for name in OPS
        for schema in (
            f"{name}({_INPUT}, {_LAYERS}, {_PLANS}, SymInt out_features, str activation, "
            "bool keep) -> (Tensor, Tensor)",
            f"{name}_backward(Tensor grad_logits, {_INPUT}, {_LAYERS}, Tensor saved, {_PLANS}, "
            f"str activation, {_NEEDS}) -> Tensor[]",
        )
    ),
    f"masked_mlp_mixture({_INPUT}, {_LAYERS}, {_PLANS}, str activation, Tensor strict, "
    "str confidence, float sharpness) -> (Tensor, Tensor, Tensor)",
    f"masked_mlp_gem({_INPUT}, {_LAYERS}, {_PLANS}, str activation, Tensor target, Tensor? mask, "
    "Tensor strict, str confidence, float sharpness, str weighting, str normalize, "
    f"{_NEEDS}) -> Tensor[]",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_ONCE = (
    "a fused network cannot be differentiated twice; build the network with backend='reference', "
    "which can"
)


def _single_products() -> bool:
    """Is a float32 product of the CUDA kernels to be one TF32 product?"""
    return torch.get_float32_matmul_precision() == "medium"


# The CUDA kernels ask at every call: as an argument, it would be a constant of a trace.
_LIBRARY.define("single_products() -> bool")
_LIBRARY.impl("single_products", _single_products, "CompositeExplicitAutograd")


# --- Layer after layer ---------------------------------------------------------------------------


def _gather(
    x: Tensor | None, tables: Sequence[Tensor], ids: Sequence[Tensor], parts: Sequence[int]
) -> Tensor:
    columns, start = [], 0
    for part in parts:
        if part >= 0:
            columns.append(_rows(tables[part], ids[part]))
        elif x is not None:
            columns.append(x[..., start : start - part])
            start -= part
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``table`` by ``ids`` ``(*,)``: ``(*, width)``; what they get is added in one order.

    Backward of an index adds in any order on the CPU, that of ``index_select`` in any on a GPU.
    """
    if ids.is_cuda:
        return F.embedding(ids, table)
    return table.index_select(0, ids.reshape(-1)).view(*ids.shape, table.shape[1])


def _summed(grad: Tensor, ids: Tensor, count: int) -> Tensor:
    """The gradient of a table of ``count`` rows from that of :func:`_rows`, in one order."""
    if ids.is_cuda:
        summed: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, count, -1, False)
        return summed
    flat = grad.reshape(-1, grad.shape[-1])
    return grad.new_zeros(count, flat.shape[1]).index_add_(0, ids.reshape(-1), flat)


def _linear_op(x: Tensor, layout: BlockLayout) -> str:
    """The op that runs a layer: the C++ kernels refuse some dtypes and layouts."""
    return OP_OF[choice.choose(None, x, layout)]


def _through(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    plans: Sequence[Tensor],
    layouts: Sequence[int],
    activation: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of every layer and the logits; and what each layer's derivative needs."""
    outputs, saved = [h], []
    last = len(layouts) - 1
    for k, (weight, plan, layout) in enumerate(zip(weights, plans, layouts, strict=True)):
        act = "none" if k == last else activation
        of = layout_of(layout, plan)
        y, z = FORWARD[_linear_op(outputs[-1], of)](
            outputs[-1], weight, biases[k] if biases else None, plan, layout, of.out_features, act,
            True,
        )  # fmt: skip
        outputs.append(y)
        saved.append(z if act in NEEDS_INPUT or act == "none" else y)
    return outputs, saved


def _layered(
    x: Tensor | None,
    tables: list[Tensor],
    ids: list[Tensor],
    parts: list[int],
    weights: list[Tensor],
    biases: list[Tensor],
    plans: list[Tensor],
    layouts: list[int],
    out_features: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    check_parts(x, tables, ids, parts, weights, biases, len(layouts))
    with torch.no_grad():
        h = _gather(x, tables, ids, parts)
        logits = _through(h, weights, biases, plans, layouts, activation)[0][-1]
    check_count("out_features", out_features, logits.shape[-1])
    return logits, logits.new_empty((0, 0), dtype=torch.float32)


def _layered_backward(
    grad_logits: Tensor,
    x: Tensor | None,
    tables: list[Tensor],
    ids: list[Tensor],
    parts: list[int],
    weights: list[Tensor],
    biases: list[Tensor],
    saved: Tensor,
    plans: list[Tensor],
    layouts: list[int],
    activation: str,
    need_x: bool,
    need_tables: bool,
    need_weights: bool,
) -> list[Tensor]:
    check_parts(x, tables, ids, parts, weights, biases, len(layouts))
    h = _gather(x, tables, ids, parts)
    outputs, before = _through(h, weights, biases, plans, layouts, activation)
    grad, last = grad_logits, len(layouts) - 1
    grads: list[tuple[Tensor, Tensor]] = []
    for k in reversed(range(len(layouts))):
        op = _linear_op(outputs[k], layout_of(layouts[k], plans[k]))
        grad, *of_layer = BACKWARD[op](
            grad, outputs[k], weights[k], before[k], plans[k], layouts[k],
            "none" if k == last else activation, k > 0 or need_x or need_tables, need_weights,
            need_weights and bool(biases),
        )  # fmt: skip
        grads.insert(0, (of_layer[0], of_layer[1]))
    result = _input_grads(grad, x, tables, ids, parts, need_x, need_tables)
    if need_weights:
        result += [weight for weight, _ in grads]
        result += [bias for _, bias in grads] if biases else []
    return result


def _input_grads(
    grad: Tensor,
    x: Tensor | None,
    tables: list[Tensor],
    ids: list[Tensor],
    parts: list[int],
    need_x: bool,
    need_tables: bool,
) -> list[Tensor]:
    if not need_x and not need_tables:
        return []
    of_x, start = [grad[..., :0]], 0
    summed: dict[int, Tensor] = {}
    for part in parts:
        width = -part if part < 0 else tables[part].shape[1]
        columns = grad[..., start : start + width]
        start += width
        if part < 0:
            of_x.append(columns)
        elif need_tables:
            summed[part] = _summed(columns, ids[part], len(tables[part]))
    of_tables = [
        summed[t] if t in summed else torch.zeros_like(table) for t, table in enumerate(tables)
    ]
    return [torch.cat(of_x, -1)] * (need_x and x is not None) + of_tables * need_tables


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, ids, _, weights = args[:5]
    shape = ids[0].shape if x is None else x.shape[:-1]
    saved = torch.library.get_ctx().new_dynamic_size() if args[-1] else 0
    width = torch.library.get_ctx().new_dynamic_size() if args[-1] else 0
    return (
        weights[0].new_empty(*shape, args[8]),
        weights[0].new_empty((saved, width), dtype=torch.float32),
    )


def _grads_fake(
    x: Tensor | None,
    tables: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    need_x: bool,
    need_tables: bool,
    need_weights: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    like = [x] * (need_x and x is not None) + tables * need_tables
    like += [*weights, *biases] * need_weights
    return [t.new_empty(t.shape, dtype=dtype) for t in like if t is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    _, x, tables, _, _, weights, biases = args[:7]
    return _grads_fake(x, tables, weights, biases, *args[-3:])


def _mixture_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, ids, _, weights = args[:5]
    shape = ids[0].shape if x is None else x.shape[:-1]
    alpha = weights[0].new_empty(*shape, args[-3].shape[0], dtype=torch.float32)
    return alpha.new_empty(shape), alpha, torch.empty_like(alpha)


def _gem_fake(*args: Any) -> list[Tensor]:
    x, tables, _, _, weights, biases = args[:6]
    loss = weights[0].new_empty((), dtype=torch.float32)
    needs = args[-3], args[-2], args[-1]
    return [loss, *_grads_fake(x, tables, weights, biases, *needs, dtype=torch.float32)]


for _name in OPS:
    _LIBRARY.impl(_name, _layered, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name + "_backward", _layered_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("maskmoe::" + _name, _fake, lib=_LIBRARY)
    torch.library.register_fake(f"maskmoe::{_name}_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_fake("maskmoe::masked_mlp_gem", _gem_fake, lib=_LIBRARY)
torch.library.register_fake("maskmoe::masked_mlp_mixture", _mixture_fake, lib=_LIBRARY)

_MLP = torch.ops.maskmoe.masked_mlp.default
_MLP_BACKWARD = torch.ops.maskmoe.masked_mlp_backward.default
_MIXTURE = torch.ops.maskmoe.masked_mlp_mixture.default
_GEM = torch.ops.maskmoe.masked_mlp_gem.default


def _run(op: Any, *args: Any) -> Any:
    """``op(*args)``; what the CUDA kernels refuse before a launch is a BackendError."""
    try:
        return op(*args)
    except RuntimeError as error:
        found = re.search(r"maskmoe: (the fused mlp [^\n]*)", str(error))
        if found is None:
            raise
        raise BackendError(f"{found[1]} (leave the choice to backend=None)") from None


def _flops(x: Any, tables: Any, ids: Any, parts: Any, weights: Any, *args: Any, **_: Any) -> int:
    rows = math.prod(map(int, ids[0] if x is None else x[:-1]))
    return 2 * rows * sum(int(weight[0]) for weight in weights)


register_flop_formula(torch.ops.maskmoe.masked_mlp)(_flops)


# --- The front end -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a network's input is made of, side by side.

    Attributes:
        x: Columns, ``(*, columns)``, or ``None``.
        tables: Embeddings, ``(rows, width)`` each. All of their rows train: where some should not
            (``padding_idx``), call the ``nn.Embedding`` and put what it returns into ``x``.
            ``maskmoe_kernels.nn.table_of(embedding)`` is the table of one that only looks up.
        ids: A row for every sample, ``(*,)`` int64, one tensor a table.
        order: ``p >= 0``: table p; ``p < 0``: the next ``-p`` columns of ``x``.

    Raises:
        LayoutError: A table that is no tensor.
    """

    x: Tensor | None
    tables: Sequence[Tensor] = ()
    ids: Sequence[Tensor] = ()
    order: Sequence[int] = ()

    def __post_init__(self) -> None:
        for t, table in enumerate(self.tables):
            if not isinstance(table, Tensor):
                raise LayoutError(
                    f"tables[{t}] must be a tensor, got {type(table).__name__}; of an "
                    "nn.Embedding, pass maskmoe_kernels.nn.table_of(embedding)"
                )

    @classmethod
    def of(cls, x: Tensor) -> Inputs:
        """``x`` alone."""
        return cls(x, order=(-x.shape[-1],) if x.dim() else ())

    @property
    def shape(self) -> torch.Size:
        """Of the batch, ``(*,)``."""
        return self.ids[0].shape if self.x is None else self.x.shape[:-1]

    def joined(self) -> Tensor:
        """All parts side by side, ``(*, in_features)``."""
        return _gather(self.x, self.tables, self.ids, self.order)


@dataclass(frozen=True)
class Layers:
    """Weights of all layers, one after the other; the last has no activation.

    Attributes:
        weights: Packed, ``(layouts[k].num_weights,)``.
        biases: ``(layouts[k].out_features,)`` each, or none at all.
        layouts: The units of one are the inputs of the next.
        activation: Of all layers but the last; see :func:`masked_linear`.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    layouts: Sequence[BlockLayout]
    activation: str = "none"


def obstacle(
    dtype: torch.dtype, device: torch.device, named: bool, too_fine: bool = False
) -> str | None:
    """Why no network runs as one op on such weights, in words for the user; None when they do.

    Args:
        dtype: Of the weights.
        device: Of the weights.
        named: Was the backend ``"native"`` asked for?
        too_fine: Is one of the layouts; see :attr:`BlockLayout.too_fine`.
    """
    if dtype not in DTYPES:
        return f"the weights are {dtype}; fused networks compute in float32, bfloat16 and float16"
    if device.type == "cuda":
        if native.CUDA_OBSTACLE is None and not named:
            return "its CUDA kernels have yet to meet a GPU; name them with backend='native'"
        return native.CUDA_OBSTACLE
    if device.type != "cpu":
        return f"the weights are on {device}; fused networks run on the CPU and on NVIDIA GPUs"
    return native.OBSTACLE or (choice.TOO_FINE if too_fine else None)


def masked_mlp(parts: Inputs, layers: Layers) -> Tensor:
    """All layers on one input: logits ``(*, out_features of the last layer)``.

    The same function and gradients as :func:`masked_linear` layer after layer, up to rounding: in
    16-bit types, activations between layers stay in float32.

    On CUDA, float32 follows ``torch.set_float32_matmul_precision``, which each call reads, that of
    the backward too: ``"medium"`` is one TF32 product (11 bits of either factor); ``"high"`` and
    ``"highest"`` are 3xTF32, of float32's accuracy up to a factor of a few, as IEEE float32
    would leave the tensor cores. The last layer, activations and sums are float32. The CPU ignores
    the setting.

    Args:
        parts: The input.
        layers: The network; see :func:`obstacle` for what can run.

    Raises:
        LayoutError: A shape, dtype or device that does not fit.
    """
    parts, layers = _autocast(parts, layers)
    _check(parts, layers)
    fixed, tensors, wants_grad = _given(parts, layers)
    if wants_grad:
        apply: Any = _MaskedMLP.apply if torch.compiler.is_compiling() else _APPLY
        result: Tensor = apply(fixed, parts.x, *tensors)
        return result
    logits: Tensor = _logits(fixed, parts.x, tensors, keep=False)[0]
    return logits


def masked_mlp_mixture(
    parts: Inputs, layers: Layers, strict: Tensor, confidence: str, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability ``(*,)``, alpha and attribution ``(*, H)``, float32; see :func:`mixture`.

    It has no derivative. Arguments and errors as for :func:`masked_mlp_gem`.
    """
    parts, layers = _prepared(parts, layers, confidence)
    fixed, tensors, _ = _given(parts, layers)
    network = fixed.network(parts.x, tensors)
    found: tuple[Tensor, Tensor, Tensor] = _run(
        _MIXTURE, *network, strict, confidence, float(sharpness)
    )
    return found


def masked_mlp_gem(
    parts: Inputs,
    layers: Layers,
    target: Tensor,
    strict: Tensor,
    confidence: str,
    sharpness: float,
    weighting: str,
    normalize: str | None,
    mask: Tensor | None,
) -> Tensor:
    """The loss of generalised EM over a network's logits, its gradients computed with it.

    Args:
        parts: The input.
        layers: The network; its last layer has a unit an expert.
        target: y in {0, 1}, ``(*,)``.
        strict: ``family.strict``, ``(H, H)``.
        confidence: By name.
        sharpness: See :func:`selection`.
        weighting: ``"selection"`` or ``"deselection"``.
        normalize: See :func:`gem_loss`.
        mask: ``(*,)`` bool, true where a sample counts, or ``None``.

    Returns:
        Scalar, float32.

    Raises:
        LayoutError: A shape, dtype or device that does not fit.
    """
    parts, layers = _prepared(parts, layers, confidence)
    fixed, tensors, wants_grad = _given(parts, layers)
    loss_of = (
        target.float(), mask, strict, confidence, float(sharpness), weighting, normalize or "none",
    )  # fmt: skip
    if wants_grad:
        apply: Any = _MaskedMLPGem.apply if torch.compiler.is_compiling() else _APPLY_GEM
        result: Tensor = apply(fixed, loss_of, parts.x, *tensors)
        return result
    network = fixed.network(parts.x, tensors)
    loss: Tensor = _run(_GEM, *network, *loss_of, False, False, False)[0]
    return loss


@dataclass(frozen=True)
class _Fixed:
    """What a call is given besides the tensors that may have a gradient."""

    ids: list[Tensor]
    order: list[int]
    tables: int
    layers: int
    plans: list[Tensor]
    numbers: list[int]
    out_features: int
    activation: str

    def inputs(self, x: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The first six arguments of an op."""
        tables, rest = [*tensors[: self.tables]], tensors[self.tables :]
        weights, biases = [*rest[: self.layers]], [*rest[self.layers :]]
        return x, tables, self.ids, self.order, weights, biases

    def network(self, x: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The first nine: the inputs, then what the layers are."""
        return *self.inputs(x, tensors), self.plans, self.numbers, self.activation

    def needs(self, x: bool, tensors: Sequence[bool]) -> tuple[bool, bool, bool]:
        """Which of the three kinds of gradients are needed."""
        return x, any(tensors[: self.tables]), any(tensors[self.tables :])

    def spread(self, grads: list[Tensor], x: bool, tensors: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of x and of all tensors, from those that an op returned."""
        need_x, need_tables, need_weights = self.needs(x, tensors)
        found = iter(grads)
        result: list[Tensor | None] = [next(found) if need_x else None]
        for k, needed in enumerate(tensors):
            grad = next(found) if (need_tables if k < self.tables else need_weights) else None
            result.append(grad if needed else None)
        return result


def _given(parts: Inputs, layers: Layers) -> tuple[_Fixed, list[Tensor], bool]:
    """What is fixed, the tensors that may have a gradient besides x, and whether any wants one."""
    device = layers.weights[0].device
    fixed = _Fixed(
        [*parts.ids],
        [*parts.order],
        len(parts.tables),
        len(layers.weights),
        [plan_of(layout, device) for layout in layers.layouts],
        [layout.id for layout in layers.layouts],
        layers.layouts[-1].out_features,
        layers.activation,
    )
    tensors = [*parts.tables, *layers.weights, *layers.biases]
    wanted = any(t.requires_grad for t in (parts.x, *tensors) if t is not None)
    return fixed, tensors, torch.is_grad_enabled() and wanted


def _logits(
    fixed: _Fixed, x: Tensor | None, tensors: Sequence[Tensor], keep: bool
) -> tuple[Tensor, Tensor]:
    *inputs, activation = fixed.network(x, tensors)
    found: tuple[Tensor, Tensor] = _run(_MLP, *inputs, fixed.out_features, activation, keep)
    return found


class _MaskedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fixed: _Fixed, x: Tensor | None, *tensors: Tensor) -> Tensor:
        logits: Tensor
        # How much it keeps is for the kernels to know; a trace has to know it, so there: nothing.
        keep = not torch.compiler.is_compiling()
        logits, saved = _logits(fixed, x, tensors, keep)
        ctx.save_for_backward(saved, x, *tensors)
        ctx.fixed = fixed
        return logits

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        saved, x, *tensors = ctx.saved_tensors
        fixed: _Fixed = ctx.fixed
        need_x, *need = ctx.needs_input_grad[1:]
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if graph else nullcontext():
            found = _run(
                _MLP_BACKWARD,
                grad_logits, *fixed.inputs(x, tensors), saved, fixed.plans, fixed.numbers,
                fixed.activation,
                *fixed.needs(need_x, need),
            )  # fmt: skip
        grads = fixed.spread(found, need_x, need)
        if graph:
            grads = [
                None if g is None else differentiable_once(g, _ONCE, grad_logits, x, *tensors)
                for g in grads
            ]
        return (None, *grads)


class _MaskedMLPGem(torch.autograd.Function):
    """The gradients come with the loss, in float32; backward has them scaled, and rounded once."""

    @staticmethod
    def forward(
        ctx: Any, fixed: _Fixed, loss_of: tuple[Any, ...], x: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        need_x, *need = ctx.needs_input_grad[2:]
        loss: Tensor
        loss, *grads = _run(
            _GEM,
            *fixed.network(x, tensors), *loss_of,
            *fixed.needs(need_x, need),
        )  # fmt: skip
        ctx.fixed, ctx.dtype = fixed, tensors[0].dtype
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*grads)
        else:  # nothing is computed from the inputs again: they need not be saved, only known
            ctx.grads, ctx.depends_on = grads, (x, *tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        fixed: _Fixed = ctx.fixed
        need_x, *need = ctx.needs_input_grad[2:]
        if torch.compiler.is_compiling():
            scaled = [(grad * grad_loss).to(ctx.dtype) for grad in ctx.saved_tensors]
            return (None, None, *fixed.spread(scaled, need_x, need))
        if ctx.grads is None:
            raise RuntimeError(
                "this loss went backward before, and its gradients were freed; specify "
                "retain_graph=True where it does so the first time"
            )
        depends_on = ctx.depends_on
        graph = torch.is_grad_enabled()
        with torch.no_grad() if graph else nullcontext():
            grads = fixed.spread(_scaled(ctx, grad_loss), need_x, need)
        if graph:
            grads = [
                None if g is None else differentiable_once(g, _ONCE, grad_loss, *depends_on)
                for g in grads
            ]
        return (None, None, *grads)


# As in ops/autograd.py; :meth:`MaskedMLP.fused` has sent torch.func's wrappers elsewhere.
_APPLY: Any = super(torch.autograd.Function, _MaskedMLP).apply
_APPLY_GEM: Any = super(torch.autograd.Function, _MaskedMLPGem).apply


def _scaled(ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(grad_loss) or functorch.is_legacy_batchedtensor(grad_loss)
    # Where nobody asks again, what is not scaled is given away, and what is, is overwritten.
    scales = again or batched or grad_loss.is_cuda or grad_loss.item() != 1
    grads: list[Tensor] = [*ctx.grads] if again else ctx.grads
    if not again:
        ctx.grads = ctx.depends_on = None
    if not scales and ctx.dtype == torch.float32:
        return grads
    for k, grad in enumerate(grads):  # one by one: tables may be large
        if scales:
            grad = grad * grad_loss if again or batched else grad.mul_(grad_loss)
        grads[k] = grad.to(ctx.dtype)
    return grads


def _prepared(parts: Inputs, layers: Layers, confidence: str) -> tuple[Inputs, Layers]:
    if confidence not in CONFIDENCES:
        raise LayoutError(f"confidence must be one of {list(CONFIDENCES)}, got {confidence!r}")
    parts, layers = _autocast(parts, layers)
    _check(parts, layers)
    return parts, layers


def _autocast(parts: Inputs, layers: Layers) -> tuple[Inputs, Layers]:
    device = layers.weights[0].device.type
    if not torch._C._is_any_autocast_enabled():
        return parts, layers
    (x,) = autocast(device, (parts.x,))
    tables, weights, biases = (
        autocast(device, of) for of in (parts.tables, layers.weights, layers.biases)
    )
    return (
        Inputs(x, tables, parts.ids, parts.order),
        Layers(weights, biases, layers.layouts, layers.activation),
    )


def _check(parts: Inputs, layers: Layers) -> None:
    # Networks can be so small that looking twice would show.
    x, first = parts.x, layers.layouts[0].in_features
    dtype, device = layers.weights[0].dtype, layers.weights[0].device
    for tensor in (x, *parts.tables, *layers.weights, *layers.biases):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            _explain(parts, layers)
    for layout, weight in zip(layers.layouts, layers.weights, strict=True):
        if type(weight) not in PLAIN:
            refuse_sharded(x, weight)
        if weight.numel() != layout.num_weights or weight.dim() != 1:
            layout.check_weight(weight)
    if not parts.tables:
        if x is None or x.dim() == 0 or x.shape[-1] != first:
            got = None if x is None else tuple(x.shape)
            raise LayoutError(f"x must be (*, in_features) with in_features={first}, got {got}")
        return
    named = sorted(part for part in parts.order if part >= 0)
    if named != [*range(len(parts.tables))] or len(parts.ids) != len(parts.tables):
        raise LayoutError(
            f"order must name each of {len(parts.tables)} tables once, and each needs its ids; got "
            f"order {tuple(parts.order)} and {len(parts.ids)} ids"
        )
    columns = -sum(part for part in parts.order if part < 0)
    given = 0 if x is None else x.shape[-1]
    widths = [parts.tables[part].shape[1] for part in parts.order if part >= 0]
    if columns != given or columns + sum(widths) != first:
        raise LayoutError(
            f"the parts of the input must have in_features={first} columns in all, got {columns} "
            f"of an x with {given} and tables with {widths}"
        )
    shape = parts.shape
    for t, ids in enumerate(parts.ids):
        if ids.dtype != torch.int64 or ids.shape != shape:
            raise LayoutError(
                f"ids[{t}] must be {tuple(shape)} int64, one row of the table for every sample, "
                f"got {tuple(ids.shape)} {ids.dtype}"
            )


def _explain(parts: Inputs, layers: Layers) -> None:
    like = layers.weights[0]
    named = [("x", parts.x)] if parts.x is not None else []
    named += [(f"tables[{t}]", table) for t, table in enumerate(parts.tables)]
    named += [(f"weights[{k}]", weight) for k, weight in enumerate(layers.weights)]
    named += [(f"biases[{k}]", bias) for k, bias in enumerate(layers.biases)]
    for name, tensor in named:
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise LayoutError(
                f"{name} is {tensor.dtype} on {tensor.device} but weights[0] is {like.dtype} on "
                f"{like.device}; move all to one dtype and device"
            )
