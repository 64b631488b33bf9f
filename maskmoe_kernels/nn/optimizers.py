"""Optimizers, when packed parameters replace dense ones: their state follows, or is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskmoe_kernels.errors import BackendError, LayoutError
from maskmoe_kernels.layout.arguments import check_kind
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.nn.sharding import sharded_like, whole

Hook = Callable[[Optimizer, dict[str, Any]], dict[str, Any]]
# They treat each weight by itself, so its place in a tensor does not matter.
_ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
}  # fmt: skip


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
        >>> handle = optimizer.register_load_state_dict_pre_hook(pack_optimizer_state(model))
        >>> model.load_state_dict(checkpoint["model"])
        <All keys matched successfully>
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


class Replacement(NamedTuple):
    """A parameter, the one in its place, and how a tensor of the one becomes one of the other."""

    old: nn.Parameter
    new: nn.Parameter
    carry: Callable[[Tensor], Tensor]


def check_optimizers(
    optimizers: Optimizer | Iterable[Optimizer], parameters: Iterable[nn.Parameter], function: str
) -> list[Optimizer]:
    """``optimizers`` as a list, after a check that no other optimizer holds ``parameters``.

    Raises:
        BackendError: An optimizer that was not passed holds one of them, so that it would go on
            with a weight that nobody uses; or one that was passed cannot follow.
    """
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    wanted = {id(parameter) for parameter in parameters}
    for optimizer in given:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise BackendError(f"optimizers must hold optimizers of torch.optim, got {name}")
        if name not in _ELEMENTWISE or not type(optimizer).__module__.startswith("torch.optim"):
            raise BackendError(
                f"{name} cannot follow {function}: it may not treat each weight by itself. Create "
                f"it after {function}"
            )
    held = [other for other in _holders(wanted) if all(other is not one for one in given)]
    if held:
        gc.collect()  # one that nobody uses may wait for it
        held = [other for other in _holders(wanted) if all(other is not one for one in given)]
    if held:
        raise BackendError(
            f"the {type(held[0]).__name__} that was created before {function} holds weights that "
            f"{function} replaces, and would not update their replacements. Pass it, as "
            f"{function}(model, optimizers=[optimizer]), or create it after {function}"
        )
    return given


def _holders(wanted: set[int]) -> list[Optimizer]:
    if not wanted:
        return []
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    return [
        optimizer
        for optimizer in optimizers
        if any(
            id(parameter) in wanted
            for group in getattr(optimizer, "param_groups", ())
            for parameter in group["params"]
        )
    ]


@torch.no_grad()
def carry_over(optimizers: Iterable[Optimizer], replacements: Iterable[Replacement]) -> None:
    """Put each new parameter in the place of the old one, in groups and in the state."""
    by_id: Mapping[int, Replacement] = {id(one.old): one for one in replacements}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [by_id[id(p)].new if id(p) in by_id else p for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in by_id]:
            one, state = by_id[id(old)], optimizer.state.pop(old)
            optimizer.state[one.new] = {
                name: one.carry(value)
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for name, value in state.items()
            }
