"""The routed gradient: one call forward, one backward.

What is called is a registered op; or, for kernels of a GPU, the kernels' own functions where nobody
watches the dispatcher. The dispatcher and what belongs to an op (its checks, its outputs that are
always tensors) take longer than a small layer's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels._compat import plain_call
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops.activations import NEEDS_INPUT
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.masked_linear.schema import BACKWARD, FORWARD


class Run(NamedTuple):
    """What a call runs, and what that is given between the tensors and the activation."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    of_forward: tuple[Any, ...]
    of_backward: tuple[Any, ...]


def registered_run(op: str, serialized: Tensor, layout: int, out_features: int) -> Run:
    """The registered op and its backward."""
    return Run(FORWARD[op], BACKWARD[op], (serialized, layout, out_features), (serialized, layout))


def direct_run(kernels: Any, layout: BlockLayout, registered: Run) -> Run:
    """The kernels of a GPU, for tensors that are :func:`unwatched`."""
    return Run(kernels.output, _direct_gradients, (layout,), (layout, kernels, registered))


def unwatched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Would the op's kernel get just these tensors, and nobody notice that it was called?"""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and type(bias) in PLAIN
        and plain_call(x)
        and not weight.is_neg()
        and (bias is None or not bias.is_neg())
    )


def _direct_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    layout: BlockLayout,
    kernels: Any,
    registered: Run,
    activation: str,
    *needs: bool,
) -> Any:
    # A hook may have given other tensors back than were saved.
    if unwatched(grad_y, weight) and type(x) in PLAIN and type(saved) in PLAIN:
        return kernels.gradients(grad_y, x, weight, saved, layout, activation, needs)
    return registered.backward(
        grad_y, x, weight, saved, *registered.of_backward, activation, *needs
    )


class MaskedLinearFunction(torch.autograd.Function):
    """y = act(W x + b) over present blocks; grad_x walks routed blocks only (section 3.4.2).

    grad_x is not the derivative of the forward wherever a block is present but not routed: the
    stop-gradient is work not done.

    What has no gradient comes as one argument: each argument takes time that small layers show.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fixed: tuple[Run, str]
    ) -> Tensor:
        """Output ``(*, out_features)``; keeps x, the weight and what the derivative needs."""
        (forward, _, given, _), activation = fixed
        y: Tensor
        y, z = forward(x, weight, bias, *given, activation, True)
        saved = z if activation in NEEDS_INPUT or activation == "none" else y
        ctx.save_for_backward(x, weight, saved, bias)
        ctx.fixed = fixed
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x, grad_weight and grad_bias, each only where needed."""
        x, weight, saved, bias = ctx.saved_tensors
        (_, backward, _, given), activation = ctx.fixed
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if saved is None:
            saved = grad_y  # which nobody reads
        graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad() if graph else nullcontext():
            grad_x, grad_weight, grad_bias = backward(
                grad_y, x, weight, saved, *given, activation, need_x, need_weight, need_bias
            )
        grads = (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
        )
        return (*(once(grads, grad_y, x, weight, bias) if graph else grads), None)


# Function.apply looks for torch.func's wrappers first, which takes a while; the front end has sent
# those to another backend already. torch 2.11 traces the name ``apply`` alone.
APPLY: Any = super(torch.autograd.Function, MaskedLinearFunction).apply


_ONCE = "this backend cannot differentiate masked_linear twice; pass backend='reference', which can"


def once(grads: Iterable[Tensor | None], *depends_on: Tensor | None) -> tuple[Tensor | None, ...]:
    """``grads`` under create_graph=True: they depend on all of these, and have to say so."""
    return tuple(None if g is None else differentiable_once(g, _ONCE, *depends_on) for g in grads)


def differentiable_once(grad: Tensor, refusal: str, *depends_on: Tensor | None) -> Tensor:
    """``grad``, marked as a function of ``depends_on`` whose derivative raises ``refusal``."""
    apply: Any = _NoDoubleBackward.apply
    marked: Tensor = apply(grad, refusal, *depends_on)
    return marked


class _NoDoubleBackward(torch.autograd.Function):
    # once_differentiable marks a gradient only if grad_y requires one: with a loss linear in y,
    # a gradient penalty would silently be a constant.

    @staticmethod
    def forward(ctx: Any, grad: Tensor, refusal: str, *depends_on: Tensor | None) -> Tensor:
        ctx.refusal = refusal
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise BackendError(ctx.refusal)
