"""Masked MLPs as functions: logits, the mixture of them, or the GEM loss with its gradients.

Each runs one op. :mod:`maskmoe_kernels.ops.dispatch` says whether there are kernels for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels.ops.checks import check_name
from maskmoe_kernels.ops.masked_mlp.autograd import (
    APPLY,
    APPLY_LOSS,
    LOSSES,
    MaskedMLPFunction,
    MaskedMLPLossFunction,
    run,
)
from maskmoe_kernels.ops.masked_mlp.call import MLPCall
from maskmoe_kernels.ops.masked_mlp.schema import FORWARD, MIXTURE
from maskmoe_kernels.ops.triton_support.limits import CONFIDENCES


def masked_mlp(call: MLPCall) -> Tensor:
    """All layers of a masked MLP in one pass (eq. 14, section 3.4.2).

    With ``h_0`` the input and L layers, ``h_k = act(W_k h_{k-1} + b_k)`` and the result is
    ``W_L h_{L-1} + b_L``, every W masked. Values and gradients are those of :func:`masked_linear`
    layer after layer, up to rounding: in 16-bit types, activations between layers are float32.

    On CUDA, products of float32 follow ``torch.set_float32_matmul_precision``, which each call
    reads, backward included. ``"medium"`` is one TF32 product (11 bits of either factor).
    ``"high"`` and ``"highest"`` are three TF32 products, whose error is that of float32 times a
    factor of a few; IEEE float32 would not run on the tensor cores. The last layer, activations and
    sums are float32. The CPU ignores the setting.

    Args:
        call: The input, the parameters and the layouts.

    Returns:
        Logits, ``(*, out_features)`` of the last layer, in the dtype of the weights.

    Raises:
        BackendError: What the CUDA kernels refuse before a launch.
    """
    if _wants_gradient(call):
        compiling = torch.compiler.is_compiling()
        apply: Any = MaskedMLPFunction.apply if compiling else APPLY
        result: Tensor = apply(
            call, not compiling, call.x, *call.tables, *call.weights, *call.biases
        )
        return result
    logits: Tensor = run(FORWARD, *call, False)[0]
    return logits


def masked_mlp_mixture(
    call: MLPCall, is_proper_subset: Tensor, confidence: str, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture of an MLP's logits (eq. 1); see :func:`mixture`. It has no derivative.

    Args:
        call: The input, the parameters and the layouts; the last layer has one unit per expert.
        is_proper_subset: ``family.strict``, ``(H, H)`` bool.
        confidence: By name.
        sharpness: See :func:`selection`.

    Returns:
        Probability ``(*,)``, selection ``(*, H)`` and attribution ``(*, H)``, float32.

    Raises:
        LayoutError: An unknown confidence.
        BackendError: What the CUDA kernels refuse before a launch.
    """
    check_name("confidence", confidence, CONFIDENCES)
    found: tuple[Tensor, Tensor, Tensor] = run(
        MIXTURE, *call[:8], call.activation, is_proper_subset, confidence, float(sharpness)
    )
    return found


def masked_mlp_gem(
    call: MLPCall,
    target: Tensor,
    is_proper_subset: Tensor,
    confidence: str,
    sharpness: float,
    weighting: str,
    normalize: str | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The GEM loss of an MLP's logits (eq. 4, eq. 7), computed with its gradients in one pass.

    Args:
        call: The input, the parameters and the layouts; the last layer has one unit per expert.
        target: y in {0, 1}, ``(*,)``.
        is_proper_subset: ``family.strict``, ``(H, H)`` bool.
        confidence: By name.
        sharpness: See :func:`selection`.
        weighting: See :func:`gem_loss`.
        normalize: See :func:`gem_loss`.
        mask: ``(*,)`` bool, true where a sample counts, or ``None``.
        sample_weight: ``(*,)``, with the mean 1 over these samples, or ``None``.

    Returns:
        Scalar, float32.

    Raises:
        LayoutError: An unknown confidence.
        BackendError: What the CUDA kernels refuse before a launch.
    """
    check_name("confidence", confidence, CONFIDENCES)
    options = is_proper_subset, confidence, float(sharpness), weighting, normalize or "none"
    return _loss("gem", call, target, mask, sample_weight, *options)


def masked_mlp_expert_loss(
    call: MLPCall,
    target: Tensor,
    kind: str,
    outputs: int | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss of every expert on every sample, with its gradients in one pass.

    Args:
        call: The input, the parameters and the layouts; the last layer has ``outputs`` units per
            expert, side by side.
        target: Classes ``(*,)``, or numbers ``(*,)`` or ``(*, outputs)``.
        kind: ``"multiclass"`` or ``"regression"``; see :func:`expert_loss`.
        outputs: Of an expert; ``None``: one.
        mask: ``(*,)`` bool, true where a sample counts, or ``None``.
        sample_weight: ``(*,)``, with the mean 1 over these samples, or ``None``.

    Returns:
        Scalar, float32.
    """
    options = kind, call.out_features, 1 if outputs is None else outputs
    return _loss("expert_loss", call, target, mask, sample_weight, *options)


def _loss(
    name: str,
    call: MLPCall,
    target: Tensor,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    *options: Any,
) -> Tensor:
    times = None if sample_weight is None else sample_weight.float()
    objective = target.float(), mask, times, *options
    if _wants_gradient(call):
        compiling = torch.compiler.is_compiling()
        apply: Any = MaskedMLPLossFunction.apply if compiling else APPLY_LOSS
        result: Tensor = apply(
            call, name, objective, compiling, call.x, *call.tables, *call.weights, *call.biases
        )
        return result
    loss: Tensor = run(LOSSES[name], *call[:8], call.activation, *objective, *[False] * 3)[0]
    return loss


def _wants_gradient(call: MLPCall) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensor in (call.x, *call.tables, *call.weights, *call.biases):
        if tensor is not None and tensor.requires_grad:
            return True
    return False
