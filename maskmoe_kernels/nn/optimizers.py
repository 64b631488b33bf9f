"""The state of an optimizer, after dense layers were replaced by packed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.nn.sharding import sharded_like, whole

Hook = Callable[[Optimizer, dict[str, Any]], dict[str, Any]]


def pack_optimizer_state(model: nn.Module) -> Hook:
    """A hook with which an optimizer loads the state of dense layers into packed ones.

    A checkpoint of a model whose masked layers kept dense ``(out, in)`` weights holds averages of
    that shape. ``load_state_dict`` of torch takes them for a packed weight, too, and the next
    ``step`` fails. With the hook they are packed, as :class:`MaskedLinear` packs the weight itself,
    and what cannot be packed is refused. Parameters have to be in the same order in both models.

    Args:
        model: Has the layers whose parameters the optimizer is given.

    Returns:
        For ``optimizer.register_load_state_dict_pre_hook``. It raises LayoutError if a state has
        neither the shape of its packed weight nor that of the dense one.

    Example:
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> optimizer.register_load_state_dict_pre_hook(pack_optimizer_state(model))
        >>> model.load_state_dict(checkpoint["model"])
        >>> optimizer.load_state_dict(checkpoint["optimizer"])
    """
    check_kind(nn.Module, model=model)

    def hook(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        layers = {
            id(layer.weight): (f"{name}.weight" if name else "weight", layer)
            for name, layer in model.named_modules()
            if isinstance(layer, MaskedLinear)
        }
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        state = dict(state_dict["state"])
        for parameter, number in zip(parameters, saved, strict=False):  # torch compares the lengths
            if id(parameter) in layers and number in state:
                name, layer = layers[id(parameter)]
                state[number] = {
                    key: _packed(value, layer, f"{key} of {name}")
                    for key, value in state[number].items()
                }
        return {**state_dict, "state": state}

    return hook


def _packed(value: Any, layer: MaskedLinear, named: str) -> Any:
    shape = layer.weight.shape
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape == shape:
        return value
    dense = (layer.out_features, layer.in_features)
    if tuple(value.shape) != dense:
        raise LayoutError(
            f"the optimizer's {named} is {tuple(value.shape)}; it must be {tuple(shape)}, or "
            f"{dense} as of a dense weight. Leave that parameter's entry out of state_dict['state']"
            ", and the optimizer begins anew for it"
        )
    return sharded_like(layer.layout.pack(whole(value)), layer.weight)
