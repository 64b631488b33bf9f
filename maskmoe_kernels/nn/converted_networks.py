"""Networks of zuko, nflows and pyro whose converted layers hand their units on as they lie.

A layer alone puts its units into the original's order, its activation reads and writes them again,
and the next layer puts them into the order of its blocks. A network whose ``forward`` is known to
do nothing else with them can leave that out. ``convert_`` then makes its class a subclass of the
one that it had (``converted_class.py``). At each call it looks whether anything sees or changes the
call of a layer or of an activation (a hook, another layer in its place, a trace for others, ...);
if so, the ``forward`` that it had runs, on the layers as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskmoe_kernels._compat import needs_torch_operators
from maskmoe_kernels.layout.aligned import Place
from maskmoe_kernels.nn.converted import ConvertedLinear
from maskmoe_kernels.nn.converted_class import Rewritten, kind_for, rewrite_
from maskmoe_kernels.nn.interception import (
    interceptor,
    interceptor_of_all,
    interceptor_of_class,
    interceptor_of_instance,
)
from maskmoe_kernels.ops.checks import PLAIN

_NFLOWS = ("nflows.transforms.made", "nflows.nn.nde.made")
_LAYER_FORWARD = ConvertedLinear.forward
# What the kernels compute as torch does; of GELU and leaky ReLU, with torch's defaults.
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.gelu: "gelu",
    torch.tanh: "tanh",
    F.silu: "silu",
}
_MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.ReLU: ("relu", {}),
    nn.Tanh: ("tanh", {}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
}
_MODULE_FORWARDS = {cls: cls.forward for cls in _MODULES}


class Step(NamedTuple):
    """One layer of a network.

    Attributes:
        layer: The original, or what replaced it.
        place: Where it stands.
        activation: What is applied to its units before anything else; ``None``: nothing.
    """

    layer: nn.Module
    place: Place
    activation: Any


class _Network(Rewritten):
    @staticmethod
    def steps(network: Any) -> list[Step] | None:
        """The layers of a network, in the order in which they run; ``None``: it is no such one."""
        raise NotImplementedError

    def _steps_of(self, x: Any) -> list[Step] | None:
        """The steps, if layers can hand on what they compute from ``x``, with nobody to notice."""
        if not self._is_as_before():
            return None
        steps = self.steps(self)
        return steps if steps is not None and _runs_within(steps, x) else None


class _ConvertedSequential(_Network):
    """``nn.Sequential`` of layers with an activation between each two; zuko's ``MaskedMLP``."""

    @staticmethod
    def steps(network: Any) -> list[Step] | None:
        modules = [*network._modules.values()]
        if len(modules) < 3 or len(modules) % 2 == 0:
            return None
        return _chain(modules[::2], [*modules[1::2], None])

    def forward(self, input: Any) -> Any:
        """As the original's."""
        steps = self._steps_of(input)
        return super().forward(input) if steps is None else _run_chain(steps, input)


class _ConvertedARN(_Network):
    """pyro's ``ConditionalAutoRegressiveNN``."""

    replaces = "_forward"

    @staticmethod
    def steps(network: Any) -> list[Step] | None:
        layers = [*network.layers]
        return _chain(layers, [network.f] * (len(layers) - 1) + [None])

    def _forward(self, x: Any) -> Any:
        this: Any = self
        steps = self._steps_of(x)
        if steps is None:
            return super()._forward(x)  # type: ignore[misc]
        h = _run_chain(steps, x)
        if this.skip_layer is not None:
            h = h + this.skip_layer(x)
        if this.output_multiplier == 1:
            return h
        h = h.reshape([*x.size()[:-1], this.output_multiplier, this.input_dim])
        if this.count_params == 1:
            return h
        if this.all_ones:
            return torch.unbind(h, dim=-2)
        return tuple(h[..., part, :] for part in this.param_slices)


class _ConvertedMADE(_Network):
    """nflows' ``MADE`` of residual blocks, without context, batch norm and dropout."""

    @staticmethod
    def steps(network: Any) -> list[Step] | None:
        if not network.use_residual_blocks:
            return None
        # Every block adds to the units that the first layer wrote, width 1.
        steps = [Step(network.initial_layer, Place(0, 1), None)]
        for width, block in enumerate(network.blocks, 2):
            if _does_more(block):
                return None
            first, second = block.linear_layers
            steps.append(Step(first, Place(1, width), block.activation))
            steps.append(Step(second, Place(width, 1), None))
        return [*steps, Step(network.final_layer, Place(1, 0), None)]

    def forward(self, inputs: Any, context: Any = None) -> Any:
        """As the original's."""
        steps = None if context is not None else self._steps_of(inputs)
        if steps is None:
            return super().forward(inputs, context)
        first, *inside, last = steps
        h = _run(first, inputs)
        for one, other in zip(inside[::2], inside[1::2], strict=True):
            h = h + _run(other, _run(one, one.activation(h)))
        return _run(last, h)


def _does_more(block: Any) -> bool:
    """Does a block of nflows do more than two layers and their activations?"""
    origin: Any = next((c for c in type(block).__mro__ if c.__module__ in _NFLOWS), None)
    return (
        origin is None
        or origin.__qualname__ != "MaskedResidualBlock"
        or interceptor(block, origin.forward) is not None
        or block.use_batch_norm
        or len(block.linear_layers) != 2
        or (block.dropout.p > 0 and block.dropout.training)
        or interceptor_of_instance(block.dropout) is not None
    )


#: Module and name of each network's class to what it becomes.
_KINDS: dict[tuple[str, str], type[_Network]] = {
    ("torch.nn.modules.container", "Sequential"): _ConvertedSequential,
    ("pyro.nn.auto_reg_nn", "ConditionalAutoRegressiveNN"): _ConvertedARN,
    **{(module, "MADE"): _ConvertedMADE for module in _NFLOWS},
}


def networks(model: nn.Module) -> Iterator[tuple[nn.Module, list[Step]]]:
    """The modules of ``model`` that can hand units on, each with its steps."""
    for module in model.modules():
        kind = kind_for(module, _KINDS)
        if kind is None:
            continue
        steps = kind.steps(module)
        if steps is not None and all(_name_of(s.activation) is not None for s in steps):
            yield module, steps


def hand_on_(network: nn.Module) -> None:
    """Make ``network``, whose layers are converted, hand units on from now on."""
    rewrite_(network, _KINDS)


def as_before(network: Any, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a network that hands on computes, and what its layers one by one."""
    name = network.replaces
    found = getattr(network, name)(x), getattr(network.origin, name)(network, x)
    ours, theirs = (y if isinstance(y, tuple) else (y,) for y in found)
    return ours, theirs


# --- One call ------------------------------------------------------------------------------------


def _chain(layers: Sequence[nn.Module], activations: Sequence[Any]) -> list[Step]:
    """Layers one after the other."""
    last = len(layers) - 1
    return [
        Step(layer, Place(n, n + 1 if n < last else 0), activation)
        for n, (layer, activation) in enumerate(zip(layers, activations, strict=True))
    ]


def _runs_within(steps: list[Step], x: Any) -> bool:
    if (
        needs_torch_operators()
        or not isinstance(x, Tensor)
        or type(x) not in PLAIN
        or interceptor_of_all() is not None
        or interceptor_of_class(ConvertedLinear, _LAYER_FORWARD) is not None
    ):
        return False
    orders: dict[int, str | None] = {0: None}
    for layer, place, activation in steps:
        if type(layer) is not ConvertedLinear or layer.inner is None or layer.activation:
            return False
        inner, own = layer.inner, layer._parameters
        if (
            interceptor_of_instance(layer) is not None
            or _name_of(activation) is None
            or orders[place.reads] != inner.reads
            or orders.setdefault(place.writes, inner.writes) != inner.writes
            or (inner.writes is None) != (place.writes == 0)
            or "weight" not in own  # pruned, say
            or "bias" not in own
            or type(own["weight"]) not in PLAIN
            or type(own["bias"]) not in PLAIN
        ):
            return False
    return True


def _run_chain(steps: list[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = _run(step, x)
    return x


def _run(step: Step, x: Tensor) -> Tensor:
    layer: Any = step.layer
    y: Tensor = layer.within(x, layer.inner, _name_of(step.activation))
    return y


def _name_of(activation: Any) -> str | None:
    """What the kernels call an activation; ``None`` if they do not have it, or it is watched."""
    if activation is None:
        return "none"
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation) if isinstance(activation, Hashable) else None
    cls = type(activation)
    if cls not in _MODULES or interceptor_of_class(cls, _MODULE_FORWARDS[cls]):
        return None
    name, options = _MODULES[cls]
    same = all(getattr(activation, option) == value for option, value in options.items())
    return name if same and interceptor_of_instance(activation) is None else None
