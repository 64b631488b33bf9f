"""Optimizers follow when a parameter is replaced by another one that holds the same weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskmoe_kernels.errors import BackendError

# They treat each weight by itself, so its place in a tensor does not matter.
_ELEMENTWISE = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
}  # fmt: skip


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
