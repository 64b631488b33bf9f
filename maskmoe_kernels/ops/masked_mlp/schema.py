"""Registered ops of masked MLPs: schemas, implementations, fakes and the FLOP formula.

Arguments that every op takes:

- ``x``, ``tables``, ``ids``, ``parts``: the input, in parts side by side. A part ``p >= 0`` is the
  rows of ``tables[p]`` at ``ids[p]``; a part ``p < 0`` is the next ``-p`` columns of ``x``.
- ``weights``, ``biases``: one tensor per layer; ``biases`` may be empty.
- ``serialized``, ``layouts``: the serialized layout of each layer, and its id. The first describes
  the layer in full, so an exported program works in a process that never built the layout.
- ``activation``: of all layers but the last, which has none.

The C++ extension registers kernels of the ``masked_mlp`` ops for the CPU and for CUDA;
of ``masked_mlp_expert_loss`` for the CPU only.
``torch_mlp`` is ``masked_mlp`` in PyTorch, on any device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import register_flops
from maskmoe_kernels.ops.masked_mlp import torch_impl

_LIBRARY = torch.library.Library("maskmoe", "FRAGMENT")
# Widths and ids of layouts are SymInts: torch.compile then traces the same for all layouts.
_INPUT = "Tensor? x, Tensor[] tables, Tensor[] ids, SymInt[] parts"
_PARAMETERS = "Tensor[] weights, Tensor[] biases"
_LAYOUTS = "Tensor[] serialized, SymInt[] layouts"
_NEEDS = "bool need_x, bool need_tables, bool need_weights"
_CONFIDENCE = "str confidence, float sharpness"
_MLPS = ("masked_mlp", "torch_mlp")


def _schemas() -> list[str]:
    schemas = []
    for name in _MLPS:
        schemas += [
            f"{name}({_INPUT}, {_PARAMETERS}, {_LAYOUTS}, SymInt out_features, str activation, "
            "bool keep) -> (Tensor, Tensor)",
            f"{name}_backward(Tensor grad_logits, {_INPUT}, {_PARAMETERS}, Tensor saved, "
            f"{_LAYOUTS}, str activation, {_NEEDS}) -> Tensor[]",
        ]
    return [
        *schemas,
        f"masked_mlp_mixture({_INPUT}, {_PARAMETERS}, {_LAYOUTS}, str activation, "
        f"Tensor is_proper_subset, {_CONFIDENCE}) -> (Tensor, Tensor, Tensor)",
        f"masked_mlp_gem({_INPUT}, {_PARAMETERS}, {_LAYOUTS}, str activation, Tensor target, "
        f"Tensor? mask, Tensor? sample_weight, Tensor is_proper_subset, {_CONFIDENCE}, "
        f"str weighting, str normalize, {_NEEDS}) -> Tensor[]",
        f"masked_mlp_expert_loss({_INPUT}, {_PARAMETERS}, {_LAYOUTS}, str activation, "
        "Tensor target, Tensor? mask, Tensor? sample_weight, str kind, SymInt out_features, "
        f"int outputs, {_NEEDS}) -> Tensor[]",
    ]


for _schema in _schemas():
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _single_products() -> bool:
    """Are float32 products of the CUDA kernels to be one TF32 product each?"""
    return torch.get_float32_matmul_precision() == "medium"


# The CUDA kernels call this op at every call. As an argument, the setting would be a constant of a
# trace.
_LIBRARY.define("single_products() -> bool")
_LIBRARY.impl("single_products", _single_products, "CompositeExplicitAutograd")


# --- Fakes ---------------------------------------------------------------------------------------


def _batch_shape(x: Tensor | None, ids: list[Tensor]) -> torch.Size:
    return ids[0].shape if x is None else x.shape[:-1]


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, ids, _, weights = args[:5]
    out_features, keep = args[8], args[10]
    saved = torch.library.get_ctx().new_dynamic_size() if keep else 0
    width = torch.library.get_ctx().new_dynamic_size() if keep else 0
    return (
        weights[0].new_empty(*_batch_shape(x, ids), out_features),
        weights[0].new_empty((saved, width), dtype=torch.float32),
    )


def _gradients_fake(
    x: Tensor | None,
    tables: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    need_x, need_tables, need_weights = needs
    like = [x] * (need_x and x is not None) + tables * need_tables
    like += [*weights, *biases] * need_weights
    return [t.new_empty(t.shape, dtype=dtype) for t in like if t is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    _, x, tables, _, _, weights, biases = args[:7]
    return _gradients_fake(x, tables, weights, biases, args[-3:])


def _mixture_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, ids, _, weights = args[:5]
    shape, is_proper_subset = _batch_shape(x, ids), args[9]
    alpha = weights[0].new_empty(*shape, is_proper_subset.shape[0], dtype=torch.float32)
    return alpha.new_empty(shape), alpha, torch.empty_like(alpha)


def _loss_fake(*args: Any) -> list[Tensor]:
    x, tables, _, _, weights, biases = args[:6]
    loss = weights[0].new_empty((), dtype=torch.float32)
    grads = _gradients_fake(x, tables, weights, biases, args[-3:], dtype=torch.float32)
    return [loss, *grads]


def _flops(x: Any, tables: Any, ids: Any, parts: Any, weights: Any, *args: Any, **_: Any) -> int:
    rows = math.prod(map(int, ids[0] if x is None else x[:-1]))
    return 2 * rows * sum(int(weight[0]) for weight in weights)  # present blocks alone


for _name in _MLPS:
    _LIBRARY.impl(_name, torch_impl.forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name + "_backward", torch_impl.backward, "CompositeExplicitAutograd")
    torch.library.register_fake("maskmoe::" + _name, _forward_fake, lib=_LIBRARY)
    torch.library.register_fake(f"maskmoe::{_name}_backward", _backward_fake, lib=_LIBRARY)
for _name in ("masked_mlp_gem", "masked_mlp_expert_loss"):
    torch.library.register_fake("maskmoe::" + _name, _loss_fake, lib=_LIBRARY)
torch.library.register_fake("maskmoe::masked_mlp_mixture", _mixture_fake, lib=_LIBRARY)
register_flops(torch.ops.maskmoe.masked_mlp, _flops)

# Looking an op up on torch.ops takes as long as a small layer.
FORWARD = torch.ops.maskmoe.masked_mlp.default
BACKWARD = torch.ops.maskmoe.masked_mlp_backward.default
MIXTURE = torch.ops.maskmoe.masked_mlp_mixture.default
GEM = torch.ops.maskmoe.masked_mlp_gem.default
EXPERT_LOSS = torch.ops.maskmoe.masked_mlp_expert_loss.default
