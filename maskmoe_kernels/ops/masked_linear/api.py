"""The function that users call: checks, autocast, transforms, then one op."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from maskmoe_kernels._compat import (
    any_autocast,
    constant_in_trace,
    foreign_format,
    forward_mode,
    func_transforms,
    without_tracer,
)
from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.arguments import check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import registered_layout, serialized_layout
from maskmoe_kernels.ops.activations import activation_name
from maskmoe_kernels.ops.checks import PLAIN, check_linear, check_places, refuse_sharded
from maskmoe_kernels.ops.dispatch import LayoutHandle, check_backend, choose, warn_of_fallback
from maskmoe_kernels.ops.masked_linear import reference, torch_impl
from maskmoe_kernels.ops.masked_linear.autograd import (
    APPLY,
    MaskedLinearFunction,
    Run,
    direct_run,
    registered_run,
    unwatched,
)
from maskmoe_kernels.ops.masked_linear.schema import triton_kernels

# The op behind a backend; the reference has none. ``masked_linear`` is the device's own kernels.
OP_OF = {"native": "masked_linear", "triton": "masked_linear", "torch": "torch_linear"}


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear map over the present blocks, with routed gradients (eq. 14, section 3.4.2).

    Computes ``act(W x + b)``. Features that a unit may not see are never multiplied, so no
    value in them, NaN and Inf included, reaches it. The gradient to ``x`` walks
    ``layout.routes_grad`` only; the gradient to ``weight`` every present block.

    Args:
        x: Activations, ``(*, in_features)``.
        weight: Packed blocks, ``(layout.num_weights,)``; see ``layout.pack``.
        bias: ``(out_features,)`` or ``None``.
        layout: Which blocks exist and which route a gradient. (torch.compile makes a graph for
            each; a :class:`MaskedLinear` shares one among all.)
        activation: ``None``, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"gelu"``, ``"tanh"``
            or ``"silu"``.
        backend: ``None`` chooses the fastest; ``"reference"`` supports double backward.

    Returns:
        ``(*, out_features)``, in the dtype of ``x`` (under autocast, in its dtype).

    Raises:
        LayoutError: A shape, dtype or device that does not fit, or an unknown activation.
        BackendError: The named backend cannot run, forward-mode AD was asked for, or the
            parameters are DTensors.
    """
    name = activation_name(activation)
    if not isinstance(x, Tensor) or not isinstance(layout, BlockLayout):
        _refuse_kinds(x, layout)
    if any_autocast():
        x, weight, bias = autocast(x.device.type, (x, weight, bias))
    if type(weight) not in PLAIN or type(bias) not in PLAIN:
        refuse_sharded(x, weight, bias)
    if foreign_format() is not None:
        return _standard(x, weight, bias, layout, name, backend)
    check_linear(x, weight, bias, layout)
    compiling = is_compiling()
    runs = None if compiling else layout.caches.dispatch.get((backend, x.dtype, x.device))
    registered, direct = runs or _runs(backend, x, layout, keep=not compiling)
    if forward_mode():
        _refuse_forward_ad(x, weight, bias)
    if func_transforms():
        _refuse_transform(backend)
        registered = None
    if registered is None:
        plain = torch_impl.standard if is_dynamo_compiling() else reference.masked_linear
        return plain(x, weight, bias, layout, name)
    if direct is not None and unwatched(x, weight, bias):
        registered = direct
    apply = MaskedLinearFunction.apply if compiling else APPLY
    return _called(registered, apply, x, weight, bias, name)


def _called(
    run: Run, apply: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """What ``run`` computes, through autograd if a gradient is asked for."""
    y: Tensor
    if torch.is_grad_enabled() and (
        weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = apply(x, weight, bias, (run, activation))
    else:
        y = run.forward(x, weight, bias, *run.of_forward, activation, False)[0]
    return y


def _runs(
    backend: str | None, x: Tensor, layout: BlockLayout, keep: bool
) -> tuple[Run | None, Run | None]:
    """What such a call runs as an op (None: the reference), and as kernels called directly.

    The choice is the same for every call on a layout with these three: it is kept.
    """
    name = choose("masked_linear", backend, layout, (x,))
    registered = direct = None
    if name != "reference":
        op = "triton_linear" if name == "triton" and not x.is_cuda else OP_OF[name]
        serialized = serialized_layout(layout, x.device)
        registered = registered_run(op, serialized, layout.id, layout.out_features)
        if keep and name == "triton" and not x.is_meta:
            direct = direct_run(triton_kernels(), registered_layout(layout), registered)
    if keep:
        if backend is None:
            warn_of_fallback(name, layout, x)
        layout.caches.dispatch[backend, x.dtype, x.device] = registered, direct
    return registered, direct


def traced_masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    handle: LayoutHandle,
    layout: Callable[[], BlockLayout],
    activation: str | None,
    backend: str | None,
) -> Tensor:
    """:func:`masked_linear` for code that torch.compile traces: one graph serves all layouts.

    It reads tensors and no number of the layout, so shapes are checked by the op when it runs.

    Args:
        x: As there.
        weight: As there.
        bias: As there.
        handle: Of the layout.
        layout: Gives the layout itself, for what needs it: the reference, and other devices.
        activation: As there.
        backend: As there.
    """
    name = activation_name(activation)
    if any_autocast():
        x, weight, bias = autocast(x.device.type, (x, weight, bias))
    if handle.serialized.device != x.device or func_transforms() or forward_mode():
        return masked_linear(x, weight, bias, layout(), activation, backend)
    if type(weight) not in PLAIN or type(bias) not in PLAIN:
        refuse_sharded(x, weight, bias)
    if x.dim() == 0 or not x.is_floating_point():
        raise LayoutError(f"x must be floating-point, (*, in_features), got {x.dtype} {x.shape}")
    check_places(x, weight, bias)
    if foreign_format() is not None:
        return _standard(x, weight, bias, layout(), name, backend)
    chosen = choose("masked_linear", backend, handle, (x,))
    if chosen == "reference":
        return torch_impl.standard(x, weight, bias, layout(), name)
    op = "triton_linear" if chosen == "triton" and not x.is_cuda else OP_OF[chosen]
    _, layout_id, out_features = handle.numbers.shape
    run = registered_run(op, handle.serialized, layout_id, out_features)
    return _called(run, MaskedLinearFunction.apply, x, weight, bias, name)


def _standard(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    activation: str,
    backend: str | None,
) -> Tensor:
    """What TorchScript and ONNX record."""
    check_backend(backend)
    _warn_or_refuse_format(backend)
    if not is_dynamo_compiling():
        with without_tracer():  # which would make a tensor of each size
            check_linear(x, weight, bias, layout)
    return torch_impl.standard(x, weight, bias, layout, activation)


@constant_in_trace
def _warn_or_refuse_format(backend: str | None) -> None:
    where = foreign_format()
    if backend in ("native", "triton"):
        raise BackendError(
            f"backend {backend!r} has no operators in {where}; leave the choice open with "
            "backend=None, which records PyTorch's own, or use torch.export, which keeps the "
            "kernels"
        )
    if backend is None and where == "TorchScript":
        warnings.warn(
            "torch.jit.trace records masked_linear as PyTorch's own operators, which are slower "
            "than its kernels; torch.export keeps the kernels (backend='torch' says that you know)",
            stacklevel=5,
        )


def _refuse_kinds(x: object, layout: object) -> None:
    check_kind(Tensor, x=x)
    check_kind(BlockLayout, layout=layout)


def _refuse_transform(backend: str | None) -> None:
    """Under torch.func's transforms the reference runs, for which the ops have no rules."""
    if backend not in (None, "reference"):
        raise BackendError(
            f"backend {backend!r} does not support torch.func transforms; use "
            "backend='reference' or leave the choice open with backend=None"
        )
    if backend is None:
        _warn_of_transform()


@constant_in_trace
def _warn_of_transform() -> None:
    warnings.warn(
        "torch.func transforms run masked_linear on the reference backend, which is slow; "
        "pass backend='reference' to say that you know",
        stacklevel=4,
    )


def autocast(device: str, tensors: Iterable[Tensor | None]) -> list[Any]:
    """What torch's own linear does: every floating input but float64 goes to the autocast dtype."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [*tensors]
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        known = isinstance(t, Tensor)  # else a check after this one says so
        floats = known and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if floats else t

    return [None if t is None else cast(t) for t in tensors]


def _refuse_forward_ad(*inputs: Tensor | None) -> None:
    # Silence would be worse than an error: an op without a rule gives a zero tangent.
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise BackendError(
            "masked_linear has no forward-mode derivative: its gradient is routed, so it is not "
            "the derivative of the forward; use reverse mode (backward, torch.func.grad or vjp)"
        )
