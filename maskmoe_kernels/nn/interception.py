"""Does anything see or change the call of a module?

A fused path computes what ``module(x)`` would, from the module's parameters and without its call.
So it may replace the call only if that is known to run one ``forward`` and nothing else: no hooks,
no replaced or wrapped methods, no subclass with a ``forward`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from maskmoe_kernels._compat import (
    DISABLED_TORCH_FUNCTION,
    MODULE_CALL,
    MODULE_CALL_IMPL,
    has_any_global_hook,
)
from maskmoe_kernels.ops.checks import PLAIN

_TORCH_FUNCTION: Any = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def interceptor(module: nn.Module, forward: Callable[..., Any]) -> str | None:
    """What sees or changes ``module(x)`` besides ``forward``, in words; None if nothing does.

    Args:
        module: The module whose call is to be left out.
        forward: The function of its class that the fused path replaces.
    """
    return (
        interceptor_of_all()
        or interceptor_of_class(type(module), forward)
        or interceptor_of_instance(module)
    )


def interceptor_of_all() -> str | None:
    """The same for all modules: global hooks."""
    return "a global hook wants to see each module" if has_any_global_hook() else None


def interceptor_of_class(cls: type[nn.Module], forward: Callable[..., Any]) -> str | None:
    """The same for the modules of one class: methods that are neither ``forward`` nor torch's."""
    if cls.forward is not forward:
        return f"{cls.__name__} has a forward of its own"
    if cls.__call__ is not MODULE_CALL or cls._call_impl is not MODULE_CALL_IMPL:
        return f"{cls.__name__} has a call of its own"
    return None


def interceptor_of_instance(module: nn.Module) -> str | None:
    """The same for one module: its hooks, and methods that were replaced on it alone."""
    # One dictionary and plain look-ups: each takes a measurable part of a small MLP's call.
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return f"a hook wants to see each call of a {type(module).__name__}"
    if (
        "forward" in own
        or "_call_impl" in own
        or "_slow_forward" in own  # which torch.jit.trace calls
        or "_compiled_call_impl" in own  # which module.compile() sets
    ):
        return f"the call of a {type(module).__name__} was replaced"
    return None


def intercepting(*tensors: Tensor | None) -> bool:
    """Does the class of one tensor see torch's functions, and so the op of each layer?"""
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            sees: Any = getattr(type(tensor), "__torch_function__", DISABLED_TORCH_FUNCTION)
            if sees is not DISABLED_TORCH_FUNCTION and sees.__func__ is not _TORCH_FUNCTION:
                return True
    return False
