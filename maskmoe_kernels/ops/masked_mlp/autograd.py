"""Gradients of masked MLPs: one registered op forward, and one backward or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import is_batched, keeps_graph
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.ops.masked_linear.autograd import differentiable_once
from maskmoe_kernels.ops.masked_mlp.call import MLPCall
from maskmoe_kernels.ops.masked_mlp.schema import BACKWARD, EXPERT_LOSS, FORWARD, GEM
from maskmoe_kernels.ops.masked_mlp.torch_impl import backward as layers_backward

_ONCE = "a fused MLP cannot be differentiated twice; build it with backend='reference', which can"


def run(op: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)``.

    Raises:
        BackendError: What the CUDA kernels refuse before a launch.
    """
    try:
        return op(*args)
    except RuntimeError as error:
        found = re.search(r"maskmoe: (the fused [^\n]*)", str(error))
        if found is None:
            raise
        raise BackendError(f"{found[1]} (leave the choice to backend=None)") from None


class MaskedMLPFunction(torch.autograd.Function):
    """Logits of all layers. Gradients go where :class:`MaskedLinearFunction` routes them."""

    @staticmethod
    def forward(ctx: Any, call: MLPCall, keep: bool, x: Tensor | None, *tensors: Tensor) -> Tensor:
        """Logits ``(*, out_features)``.

        With ``keep``, the kernels may return activations for backward. How many, only they know,
        and a trace needs the size: traces pass False, and backward computes all again.
        """
        logits: Tensor
        logits, saved = run(FORWARD, *call.with_tensors(x, tensors), keep)
        ctx.save_for_backward(saved, x, *tensors)
        ctx.call = call.with_tensors(None, ())  # saved tensors are freed by backward, ctx is not
        return logits

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the tables, the weights and the biases, each only where needed."""
        saved, x, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None, None, *_backward(ctx, grad_logits, saved, x, tensors, needs)
        with torch.no_grad():
            grads = _backward(ctx, grad_logits, saved, x, tensors, needs)
        return None, None, *_once(grads, grad_logits, x, *tensors)


def _backward(
    ctx: Any,
    grad_logits: Tensor,
    saved: Tensor,
    x: Tensor | None,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    call = ctx.call.with_tensors(x, tensors)
    # For a batch of gradients torch repeats the ops of layers, but none that returns a list.
    op = layers_backward if is_batched(grad_logits) else BACKWARD
    found = run(
        op, grad_logits, *call[:6], saved, call.serialized, call.layouts, call.activation,
        *call.needs(needs),
    )  # fmt: skip
    grads: list[Tensor | None] = call.gradients(found, needs)
    return grads


#: The ops that compute a loss and its gradients.
LOSSES = {"gem": GEM, "expert_loss": EXPERT_LOSS}


class MaskedMLPLossFunction(torch.autograd.Function):
    """A loss of a masked MLP.

    One op computes the loss and, in float32, its gradients. Backward multiplies them by the
    gradient of the loss and rounds them once to the dtype of the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: MLPCall,
        name: str,
        objective: tuple[Any, ...],
        compiling: bool,
        x: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            name: The op, one of ``LOSSES``.
            objective: What it takes between activation and needs.
        """
        if compiling:  # autograd traces the gradients of its own arguments only
            call = call.with_tensors(x, tensors)
        needs = call.needs(ctx.needs_input_grad[4:])
        loss: Tensor
        loss, *grads = run(LOSSES[name], *call[:8], call.activation, *objective, *needs)
        ctx.dtype, ctx.compiling = call.weights[0].dtype, compiling
        if compiling:
            ctx.call = call.with_tensors(None, ())
            ctx.save_for_backward(*grads)
        else:
            # Backward reads no input, so none is saved: a later change of one in place is allowed.
            ctx.call, ctx.grads = call, grads
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the tables, the weights and the biases, each only where needed."""
        call: MLPCall = ctx.call
        needs = ctx.needs_input_grad[4:]
        if ctx.compiling:
            scaled = [(grad * grad_loss).to(ctx.dtype) for grad in ctx.saved_tensors]
            return None, None, None, None, *call.gradients(scaled, needs)
        if ctx.grads is None:
            raise RuntimeError(
                "this loss went backward before, and its gradients were freed; specify "
                "retain_graph=True where it does so the first time"
            )
        if not torch.is_grad_enabled():
            return None, None, None, None, *call.gradients(_scaled(ctx, grad_loss), needs)
        with torch.no_grad():
            grads = call.gradients(_scaled(ctx, grad_loss), needs)
        tensors = call.x, *call.tables, *call.weights, *call.biases
        return None, None, None, None, *_once(grads, grad_loss, *tensors)


def _scaled(ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """The gradients times ``grad_loss``, in the dtype of the weights."""
    again, batched = keeps_graph(), is_batched(grad_loss)
    # Backward may run again only if the graph is retained. If it is not, the caller gets the
    # gradients themselves: as they are if grad_loss is 1, else scaled in place.
    scales = again or batched or grad_loss.is_cuda or grad_loss.item() != 1
    grads: list[Tensor] = [*ctx.grads] if again else ctx.grads
    if not again:
        ctx.grads = ctx.call = None
    if not scales and ctx.dtype == torch.float32:
        return grads
    for k, grad in enumerate(grads):  # one by one: tables may be large
        if scales:
            grad = grad * grad_loss if again or batched else grad.mul_(grad_loss)
        grads[k] = grad.to(ctx.dtype)
    return grads


def _once(grads: Sequence[Tensor | None], *depends_on: Tensor | None) -> list[Tensor | None]:
    """``grads`` under create_graph=True: a derivative of one raises."""
    return [None if g is None else differentiable_once(g, _ONCE, *depends_on) for g in grads]


# Function.apply first looks for wrappers of torch.func, which takes as long as a small layer. The
# callers have excluded them already; see MaskedMLP.fused. A trace knows the name ``apply`` alone.
APPLY: Any = super(torch.autograd.Function, MaskedMLPFunction).apply
APPLY_LOSS: Any = super(torch.autograd.Function, MaskedMLPLossFunction).apply
