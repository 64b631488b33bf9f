"""The registered ops with their gradients.

Backward computes the forward again, so only the arguments are kept. A gradient that is to be
differentiated itself, and a batch of gradients, are composed from PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskmoe_kernels._compat import is_batched
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.splines import reference, schema
from maskmoe_kernels.ops.splines.reference import SplineForm


def takes(bins: int, form: SplineForm) -> bool:
    """Do the kernels compute such splines, of float32 on a CPU?"""
    if native.UNSUPPORTED_REASON is not None or not 1 <= bins <= schema.MAX_BINS:
        return False
    least, most = (0.0, 0.0) if form.squashed else (schema.LEAST, schema.MOST_FIXED / bins)
    return (
        1e-6 <= form.bound <= 1e6
        and schema.LEAST <= form.slope < 1
        and least <= form.width <= most
        and least <= form.height <= most
    )


def rational_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, form: SplineForm
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.rational_quadratic`, of what :func:`takes`, differentiable."""
    apply: Any = _RationalQuadratic.apply
    y, log_slope = apply(*_flat(x, widths, heights, derivatives), *form)
    return y.view(x.shape), log_slope.view(x.shape)


def rational_quadratic_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, form: SplineForm
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.rational_quadratic_inverse`, of what :func:`takes`, differentiable."""
    apply: Any = _Inverse.apply
    x, log_slope = apply(*_flat(y, widths, heights, derivatives), *form)
    return x.view(y.shape), log_slope.view(y.shape)


def _flat(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    rows = (u.reshape(x.numel(), u.shape[-1]) for u in parameters)
    return x.reshape(-1).contiguous(), *(u if u.stride(-1) == 1 else u.contiguous() for u in rows)


class _RationalQuadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.maskmoe.rational_quadratic(*args)
        ctx.save_for_backward(*args[:4])
        ctx.form = SplineForm(*args[4:])
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if _to_compose(*grads):
            return _composed(reference.rational_quadratic, ctx, *grads)
        return (*_gradients(*grads, *ctx.saved_tensors, *ctx.form), *_NO_GRADIENTS)


class _Inverse(torch.autograd.Function):
    """x with f(x; u) = y, so dx = (dy - df/du du) / f'(x); and l(x; u) = log f'(x)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, log_slope = torch.ops.maskmoe.rational_quadratic_inverse(*args)
        ctx.save_for_backward(*args[:4], x, log_slope)
        ctx.form = SplineForm(*args[4:])
        ctx.set_materialize_grads(False)
        return x, log_slope

    @staticmethod
    def backward(ctx: Any, grad_x: Any, grad_log: Tensor | None) -> tuple[Tensor | None, ...]:
        if _to_compose(grad_x, grad_log):
            return _composed(reference.rational_quadratic_inverse, ctx, grad_x, grad_log)
        _, *parameters, x, log_slope = ctx.saved_tensors
        of = (x, *parameters, *ctx.form)
        if grad_log is not None:
            moved = _gradients(None, grad_log, *of)[0]  # grad_log dl/dx
            grad_x = moved if grad_x is None else grad_x + moved
        grad_y = grad_x * torch.exp(-log_slope)
        _, *grads = _gradients(-grad_y, grad_log, *of)
        return (grad_y, *grads, *_NO_GRADIENTS)


_NO_GRADIENTS = (None,) * len(SplineForm._fields)


def _gradients(grad_y: Tensor | None, grad_log_slope: Tensor | None, *of: Any) -> list[Tensor]:
    """Gradients of x, widths, heights and derivatives; ``of``: they, and the form's."""
    dense = (None if g is None else g.contiguous() for g in (grad_y, grad_log_slope))
    grad_x, grad = torch.ops.maskmoe.rational_quadratic_backward(*dense, *of)
    return [grad_x, *grad.split([u.shape[1] for u in of[1:4]], 1)]


def _to_compose(*grads: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False  # a compiled backward is not differentiated
    return torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in grads)


def _composed(
    function: Callable[..., Any], ctx: Any, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function``, which have gradients themselves under create_graph=True."""
    given, needed = ctx.saved_tensors[:4], ctx.needs_input_grad[:4]
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not graph:
            given = [u.detach().requires_grad_(need) for u, need in zip(given, needed, strict=True)]
        results = function(*given, ctx.form)
        chosen = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in chosen],
                [u for u, need in zip(given, needed, strict=True) if need],
                [g for _, g in chosen],
                create_graph=graph,
            )
        )
    return (*(next(found) if need else None for need in needed), *_NO_GRADIENTS)
