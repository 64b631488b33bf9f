"""Every private API of torch that the package uses, each checked on torch 2.11 and 2.13.

Nothing else in the package names a private attribute of torch: a new release of torch is checked
here. (Triton's private launcher is in ``ops/triton_support/launcher.py``, with its versions.) The
package's lowest layer holds this module, because layouts need it as well as ops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# 2.11, 2.13.
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

# 2.11, 2.13. Called when a module or global hook exists: torch.nn's own fast paths ask it.
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

# 2.11, 2.13. What ``weight_norm`` and ``spectral_norm`` of ``parametrizations`` register.
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralParametrization
from torch.nn.utils.parametrizations import _WeightNorm as WeightNormParametrization

# 2.11, 2.13. Leaves every mode of torch.overrides and of the dispatcher, FakeTensorMode included.
from torch.utils._python_dispatch import _disable_current_modes

# 2.11, 2.13. Instances are constants of a trace, compared by ``==``.
from torch.utils._pytree import register_constant

__all__ = [
    "DISABLED_TORCH_FUNCTION",
    "MODULE_CALL",
    "MODULE_CALL_IMPL",
    "SpectralParametrization",
    "WeightNormParametrization",
    "any_autocast",
    "assert_async",
    "constant_in_trace",
    "foreign_format",
    "forward_mode",
    "func_transforms",
    "has_any_global_hook",
    "is_batched",
    "is_exporting",
    "is_fake",
    "keeps_graph",
    "needs_torch_operators",
    "outside_of_modes",
    "parameters_of_any_size",
    "plain_call",
    "register_constant",
    "register_flops",
    "transformed",
    "without_autocast",
    "without_tracer",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_trace(function: Function) -> Function:
    """A trace calls ``function`` while it is made, and takes its result for a constant.

    The same as ``torch.compiler.assume_constant_result``, which would import the compiler, and
    with it Triton. (2.11, 2.13: the attribute that it sets.)
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


# --- Modes and transforms ------------------------------------------------------------------------

#: Is autocast on for any device? (2.11, 2.13)
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


# torch.compile does not show the transforms of a trace to the code that it traces, but it does to a
# function that the trace calls as a constant.
@constant_in_trace
def func_transforms() -> bool:
    """Is a torch.func transform active? (2.11, 2.13)"""
    return torch._C._are_functorch_transforms_active()


@constant_in_trace
def forward_mode() -> bool:
    """Is forward-mode AD active? (2.11, 2.13)"""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Is a torch.func transform or forward-mode AD active? The fused ops have rules for neither."""
    return func_transforms() or forward_mode()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The dtypes of the tensors count, under autocast too. It knows no meta device (2.11, 2.13)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_batched(tensor: Tensor) -> bool:
    """Does a batch of ``torch.func.vmap`` or of ``is_grads_batched`` hide in it? (2.11, 2.13)

    Not in a tensor of a trace.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Is it a tensor of a trace, without values? (2.11, 2.13)"""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def outside_of_modes() -> ExitStack:
    """What runs in this context makes plain tensors, whatever mode is active.

    No fake tensors of a trace; no nodes of torch.jit.trace; no wrappers of torch.func; no inference
    tensors, which a later backward could not save; no subclasses that a torch function mode makes.
    (2.11, 2.13)
    """
    stack = ExitStack()
    if torch._C._are_functorch_transforms_active():
        stack.enter_context(temporarily_clear_interpreter_stack())
    stack.enter_context(without_tracer())
    stack.enter_context(_disable_current_modes())
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(torch.inference_mode(False))
    return stack


@contextmanager
def without_tracer() -> Iterator[None]:
    """torch.jit.trace records nothing of what runs in this context. (2.11, 2.13)"""
    state = _traced()
    if state is None:
        yield
        return
    _set_traced(None)
    try:
        yield
    finally:
        _set_traced(state)


#: In a backward: will the graph be kept for another one? (2.11, 2.13)
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


#: An assertion on the device, for which no call waits. (2.11, 2.13)
assert_async: Callable[[Tensor, str], None] = torch._assert_async


# --- Who sees a call -----------------------------------------------------------------------------

#: ``__torch_function__`` of a class that does not want to see torch's functions. (2.11, 2.13)
DISABLED_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl

#: What torch made ``nn.Module.__call__``; others may replace it after this import. (2.11, 2.13)
MODULE_CALL, MODULE_CALL_IMPL = nn.Module._wrapped_call_impl, nn.Module._call_impl

# 2.11, 2.13. Looked up once: a look-up takes a measurable part of a small layer's call.
_keys = torch._C._dispatch_keys
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_profiled = torch._C._autograd._profiler_enabled
_traced = torch._C._get_tracing_state
_set_traced: Callable[[Any], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]


def plain_call(x: Tensor) -> bool:
    """Is ``x`` values in memory, and does no mode, profiler or tracer watch the dispatcher?

    Then a function that an op would call may be called without the op.
    """
    return (
        _keys(x).raw_repr() in _dense(x.device)
        and not _dispatch_modes()
        and not _function_modes()
        and not _profiled()
        and _traced() is None
    )


@cache
def _dense(device: torch.device) -> frozenset[int]:
    """The dispatch keys of a plain tensor: no negation that is still to come, no wrapper."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


@constant_in_trace
def is_exporting() -> bool:
    """Is this a trace of ``torch.export``?

    (2.11, 2.13: the flag behind ``torch.compiler.is_exporting``, which in 2.11 is true in every
    trace.)
    """
    return bool(torch.compiler._is_exporting_flag)


@constant_in_trace
def foreign_format() -> str | None:
    """Where a trace goes that knows torch's own operators alone, if it does: TorchScript or ONNX.

    (2.11, 2.13)
    """
    state = _traced()
    if state is None and not torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return None  # asking further would take longer than a small layer
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        return "ONNX"
    return None if state is None else "TorchScript"


def needs_torch_operators() -> bool:
    """Has the call to consist of torch's own operators: for a transform, an export or a trace?"""
    return transformed() or is_exporting() or foreign_format() is not None


# --- torch.compile -------------------------------------------------------------------------------


@constant_in_trace
def parameters_of_any_size() -> Any:
    """A context for traced code: sizes of tensors first read in it are dynamic if they change.

    Dynamo gives each size of a parameter a graph of its own, and stops after eight. In this context
    it treats a parameter as any other tensor: static at first, and a second size makes it dynamic.
    That holds with ``torch.compile(dynamic=True)`` too, whose sizes are dynamic from the start: it
    takes sizes that are equal by chance for one, a batch and a layer's width say, and would compile
    for that batch alone. (2.11, 2.13: the proxy is what ``torch._dynamo.patch_dynamo_config``
    returns, which refuses these options.)
    """
    from torch._dynamo import config, decorators

    options = {"force_parameter_static_shapes": False, "assume_static_by_default": True}
    return decorators.DynamoConfigPatchProxy(config.patch(options))


# --- FLOP formulas -------------------------------------------------------------------------------

_FLOP_COUNTER = "torch.utils.flop_counter"


class _FlopFormulas(MetaPathFinder):
    """Registers formulas when torch's FLOP counter is imported, by whomever.

    That module imports Triton, for a third of the time that torch itself takes: importing this
    package must not import it.
    """

    def __init__(self) -> None:
        self.formulas: list[tuple[Any, Callable[..., int], bool]] = []

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The spec that Python finds, whose loader registers the formulas, too."""
        if name != _FLOP_COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load: Callable[[ModuleType], None] = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            for op, formula, raw in self.formulas:
                module.register_flop_formula(op, get_raw=raw)(formula)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


_flop_formulas = _FlopFormulas()
sys.meta_path.insert(0, _flop_formulas)


def register_flops(op: Any, formula: Callable[..., int], raw: bool = False) -> None:
    """``torch.utils.flop_counter.register_flop_formula``, as soon as that module is imported.

    Args:
        op: As of ``torch.ops.maskmoe``.
        formula: FLOPs from the op's arguments.
        raw: It takes tensors; else their shapes.
    """
    counter = sys.modules.get(_FLOP_COUNTER)
    if counter is None:
        _flop_formulas.formulas.append((op, formula, raw))
    else:
        counter.register_flop_formula(op, get_raw=raw)(formula)
