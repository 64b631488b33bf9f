"""Masked linear layers of other packages, recognised by name: which they are, and which are plain.

A *plain* layer computes ``F.linear(x, weight * mask, bias)`` from its own parameters and buffers,
and nothing sees or changes that. Only a plain layer can be replaced.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import plain_tensor
from maskmoe_kernels.nn.interception import interceptor_of_class, interceptor_of_instance
from maskmoe_kernels.ops.checks import PLAIN

#: Module and name of each class, and the package that it is of.
ORIGINS = {
    ("zuko.nn", "MaskedLinear"): "zuko",
    ("nflows.transforms.made", "MaskedLinear"): "nflows",
    ("nflows.nn.nde.made", "MaskedLinear"): "nflows",
    ("pyro.nn.auto_reg_nn", "MaskedLinear"): "pyro",
}

# Hooks of a module beside those on its call, and what they see.
_OTHER_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_KNOWN_BUFFERS = {"mask", "degrees"}  # the second: nflows'


class ForeignLayer(NamedTuple):
    """A layer that another package's class, or a subclass of it, made."""

    name: str
    kind: str
    module: nn.Module
    origin: type[nn.Module]


def foreign_layers(model: nn.Module) -> list[ForeignLayer]:
    """Those in ``model``, each once, in the order of ``named_modules``."""
    found = []
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            kind = ORIGINS.get((cls.__module__, cls.__qualname__))
            if kind is not None:
                found.append(ForeignLayer(name, kind, module, cls))
                break
    return found


def why_not_plain(layer: ForeignLayer) -> str | None:
    """What keeps the layer from being replaced, in words; None if nothing does."""
    module = layer.module
    forward: object = layer.origin.forward
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    reason = interceptor_of_class(type(module), forward) or interceptor_of_instance(module)  # type: ignore[arg-type]
    if reason is not None:
        return reason
    if any(getattr(module, hooks) for hooks in _OTHER_HOOKS):
        return "a hook wants to see its state dict"
    return _odd_contents(module) or _odd_tensors(module)


def _odd_contents(module: nn.Module) -> str | None:
    parameters, buffers = module._parameters, module._buffers
    if set(parameters) != {"weight", "bias"}:
        return f"its parameters are {sorted(parameters)}, not weight and bias"
    if "mask" not in buffers or not set(buffers) <= _KNOWN_BUFFERS:
        return f"its buffers are {sorted(buffers)}, not mask"
    if module._modules:
        return f"it contains other modules, {sorted(module._modules)}"
    return None


def _odd_tensors(module: nn.Module) -> str | None:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    mask = module._buffers["mask"]
    if weight is None or type(weight) not in PLAIN or type(bias) not in PLAIN:
        return f"its weight is a {type(weight).__name__}, its bias a {type(bias).__name__}"
    if not isinstance(mask, Tensor) or weight.dim() != 2 or mask.shape != weight.shape:
        return "its mask does not have the shape of its weight"
    if weight.numel() == 0:
        return "its weight is empty"
    if weight.is_meta or not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is a {weight.dtype} {weight.layout} tensor on {weight.device}"
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a hook wants to see the gradient of a parameter"
        if not parameter.is_leaf or parameter.shape[0] != weight.shape[0]:
            return "its parameters do not fit together"
    try:
        values = plain_tensor("mask", mask)
    except LayoutError as error:
        return str(error)
    if values.dtype != torch.bool and not ((values == 0) | (values == 1)).all():
        return "its mask holds other numbers than zeros and ones"
    return None
