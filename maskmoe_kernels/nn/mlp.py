"""Masked linear layers one after the other, run as one op where that can be done."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels._compat import transformed
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.nn.interception import (
    intercepting,
    interceptor_of_all,
    interceptor_of_class,
    interceptor_of_instance,
)
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.masked_mlp import api as networks
from maskmoe_kernels.ops.masked_mlp.api import Inputs, Layers

_LAYER_FORWARD = MaskedLinear.forward


class MaskedMLP(nn.Sequential):
    """``MaskedLinear`` layers with one activation between them and none after the last.

    As one op, a tile of rows goes through all layers while it is in the cache. Layers are modules
    all the same: who replaces one, or hooks one, gets them called one by one. ``print`` says which.

    Args:
        layouts: The units of one are the inputs of the next; as one op, block by block.
        activation: Of all layers but the last; see :func:`masked_linear`.
        bias: Whether the layers have biases.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: No layouts, units that are not the next layer's inputs, an unknown activation.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        activation: str | None = "relu",
        bias: bool = True,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        gap = _gap(layouts)
        last = len(layouts) - 1
        super().__init__(
            *(
                MaskedLinear.from_layout(
                    layout,
                    bias,
                    activation=None if k == last else activation,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
                for k, layout in enumerate(layouts)
            )
        )
        self.layouts = [*layouts]
        self._gap = gap
        self._too_fine = any(layout.too_fine for layout in layouts)

    def forward(self, x: Tensor | Inputs) -> Tensor:
        """Input ``(*, in_features)`` of the first layer to ``(*, out_features)`` of the last.

        :class:`Inputs` are gathered on the way: rows of embedding tables beside dense columns.
        """
        layers = self.fused(x)
        if layers is not None:
            return networks.masked_mlp(inputs_of(x), layers)
        return self.layered(x)

    def layered(self, x: Tensor | Inputs) -> Tensor:
        """The same, one layer after the other."""
        h = x.joined() if isinstance(x, Inputs) else x
        for layer in self:
            h = layer(h)
        return h

    def __getitem__(self, index: int | slice) -> Any:
        """A layer; or some of them, as a plain ``nn.Sequential``."""
        layers = [*self]
        return nn.Sequential(*layers[index]) if isinstance(index, slice) else layers[index]

    def obstacle(self) -> str | None:
        """Why the layers run one by one, in words for the user; None when they run as one op."""
        return self._parameters_or_obstacle([], [])

    def fused(self, x: Tensor | Inputs) -> Layers | None:
        """The layers for one op on ``x``; None: they run one by one."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        if transformed() or self._parameters_or_obstacle(weights, biases) is not None:
            return None
        given, like = x.x if isinstance(x, Inputs) else x, weights[0]
        fits = given is None or (given.dtype == like.dtype and given.device == like.device)
        if not fits and not torch.is_autocast_enabled(like.device.type):
            return None  # and the first layer says what is wrong
        activation = self[0].activation if len(weights) > 1 else None
        return Layers(weights, biases, self.layouts, activation or "none")

    def _parameters_or_obstacle(self, weights: list[Tensor], biases: list[Tensor]) -> str | None:
        """Puts each layer's weight and bias into the lists; or says what :meth:`obstacle` says."""
        layers = [*self]
        if len(layers) != len(self.layouts):
            return f"it was made with {len(self.layouts)} layers and has {len(layers)}"
        first, last = layers[0], layers[-1]
        for layer, layout in zip(layers, self.layouts, strict=True):
            if type(layer) is not MaskedLinear or layer.layout is not layout:
                return f"a layer is a {type(layer).__name__} that was not made here"
            seen_by = interceptor_of_instance(layer)
            if seen_by is not None:
                return seen_by
            if layer.backend not in (None, "native"):
                return f"backend {layer.backend!r} was asked for"
            if layer is not last and layer.activation != first.activation:
                return "layers differ in their activation"
            # Small networks feel a module's own look-up, which is for those whose parameters are
            # plain tensors now: a wrapper's views of its own, say.
            own: dict[str, Any] = layer._parameters
            both = "weight" in own and "bias" in own
            weight, bias = (own["weight"], own["bias"]) if both else (layer.weight, layer.bias)
            plain = type(weight) in PLAIN and type(bias) in PLAIN
            if not plain and intercepting(weight, bias):
                return "a parameter is of a class that wants to see torch's functions"
            weights.append(weight)
            if bias is not None:
                biases.append(bias)
        if len(biases) not in (0, len(weights)):
            return "some layers have a bias and some have none"
        if last.activation not in (None, "none"):
            return "the last layer has an activation"
        seen_by = interceptor_of_all() or interceptor_of_class(MaskedLinear, _LAYER_FORWARD)
        if seen_by is not None:
            return seen_by
        named = first.backend == "native"
        of = weights[0]
        return self._gap or networks.obstacle(of.dtype, of.device, named, self._too_fine)

    def extra_repr(self) -> str:
        """How the layers run, for ``print(net)``."""
        reason = self.obstacle()
        return "runs as one op" if reason is None else f"runs layer by layer: {reason}"


def inputs_of(x: Tensor | Inputs) -> Inputs:
    """``x`` as the parts of an input."""
    return x if isinstance(x, Inputs) else Inputs.of(x)


def _gap(layouts: Sequence[BlockLayout]) -> str | None:
    """Where the blocks of one layer are not those of the next, in words; None: nowhere.

    Raises:
        LayoutError: No layouts, or units that are not as many as the next layer's inputs.
    """
    if not layouts:
        raise LayoutError("layouts must hold at least one layout, got none")
    gap = None
    for k, (before, after) in enumerate(itertools.pairwise(layouts)):
        if before.out_features != after.in_features:
            raise LayoutError(
                f"layouts[{k}] has {before.out_features} units, layouts[{k + 1}] reads "
                f"{after.in_features}; they must be as many"
            )
        orders = before.row_order, after.col_order
        same = all(order is None for order in orders) or (
            orders[0] is not None and orders[1] is not None and torch.equal(orders[0], orders[1])
        )
        if not same or tuple(before.row_sizes) != tuple(after.col_sizes):
            gap = gap or f"the units of layer {k} are not cut into the blocks that the next reads"
    return gap
