"""Masked linear layers that follow each other, run as one op where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskmoe_kernels._compat import needs_torch_operators, parameters_of_any_size
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.nn.interception import (
    intercepting,
    interceptor_of_all,
    interceptor_of_class,
    interceptor_of_instance,
)
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.ops.checks import PLAIN
from maskmoe_kernels.ops.dispatch import computed_dtype, note_gpu_bytes, reason_against
from maskmoe_kernels.ops.masked_mlp.api import masked_mlp
from maskmoe_kernels.ops.masked_mlp.call import Inputs, MLPCall

_LAYER_FORWARD = MaskedLinear.forward


class MaskedMLP(Routed, nn.Sequential):
    """``MaskedLinear`` layers with one activation between them and none after the last.

    With x the input and L layers, every W masked (eq. 14)::

        h_0 = x
        h_k = act(W_k h_{k-1} + b_k)    for k = 1 .. L - 1
        y   = W_L h_{L-1} + b_L

    Where possible the layers run as one op, in which a tile of rows goes through all of them while
    it is in the cache. They are modules all the same: if one is replaced or hooked, they are called
    one by one. ``print(mlp)`` says which.

    Args:
        layouts: Of each layer; the units of one are the inputs of the next. To run as one op, they
            have to be cut into the same blocks there.
        activation: Of all layers but the last; see :func:`masked_linear`.
        bias: Whether the layers have biases.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Attributes:
        layouts: As given, as a tuple.

    Raises:
        LayoutError: No layouts, units that are not the next layer's inputs, an unknown activation.

    Example:
        >>> family = SubsetFamily.powerset({"a": 2, "b": 3})
        >>> mlp = MaskedMLP([family.input_layout(8), family.hidden_layout(8, 1)], "tanh")
        >>> mlp(torch.randn(7, 5)).shape
        torch.Size([7, 3])
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
        chain = LayoutChain(layouts)
        super().__init__(
            *(
                MaskedLinear.from_layout(
                    layout,
                    bias,
                    activation=activation if k < len(chain) - 1 else None,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
                for k, layout in enumerate(layouts)
            )
        )
        self.layouts = chain.layouts
        self._chain = chain
        self._serialize()

    def _serialize(self) -> None:
        # torch.compile finds serialized layouts but cannot make them; so they exist before the
        # first call, wherever the parameters go.
        first = next(self.parameters(), None)
        if first is not None:
            self._chain.serialized(first.device)
            if first.is_cuda:
                note_gpu_bytes(self._chain)

    def _unroute(self) -> None:
        self._chain = LayoutChain([layout.unrouted() for layout in self.layouts])
        self.layouts = self._chain.layouts
        self._serialize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedMLP:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .to(), to_empty()
        self._serialize()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._serialize()

    def forward(self, x: Tensor | Inputs) -> Tensor:
        """Input ``(*, in_features)`` of the first layer to ``(*, out_features)`` of the last.

        :class:`Inputs` are gathered on the way: rows of embedding tables beside dense columns.

        Raises:
            LayoutError: A shape, dtype or device that does not fit.
            BackendError: A named backend that cannot run; see :func:`masked_linear`.
        """
        call = self.fused(x)
        return self.layered(x) if call is None else masked_mlp(call)

    def layered(self, x: Tensor | Inputs) -> Tensor:
        """What :meth:`forward` returns, computed by calling one layer after the other."""
        h = x.joined() if isinstance(x, Inputs) else x
        for layer in self:
            h = layer(h)
        return h

    def __getitem__(self, index: int | slice) -> Any:
        """A layer; or some of them, as a plain ``nn.Sequential``."""
        layers = [*self]
        return nn.Sequential(*layers[index]) if isinstance(index, slice) else layers[index]

    def unsupported_reason(self) -> str | None:
        """Why the layers run one by one, in words for the user; None if they run as one op."""
        found = self._arguments()
        return found if isinstance(found, str) else None

    def fused(self, x: Tensor | Inputs) -> MLPCall | None:
        """A call of one op on ``x`` that stands for all layers; None if they run one by one.

        Raises:
            LayoutError: A shape, dtype or device that does not fit.
        """
        # AOTInductor cannot call an op with an empty list, and other formats do not know it.
        if needs_torch_operators():
            return None
        tracing = torch.compiler.is_dynamo_compiling()
        found = self._arguments(tracing)
        if isinstance(found, str):
            return None
        weights, biases, activation = found
        if not isinstance(x, (Tensor, Inputs)):
            return None  # the first layer says so
        given, like = x.x if isinstance(x, Inputs) else x, weights[0]
        fits = given is None or (given.dtype == like.dtype and given.device == like.device)
        if not fits and not torch.is_autocast_enabled(like.device.type):
            return None  # the first layer says what does not fit
        if tracing:
            layers: list[Any] = [*self._modules.values()]
            handles = [layer._handle for layer in layers]
            return MLPCall.traced(x, weights, biases, handles, activation)
        return MLPCall.of(x, weights, biases, self._chain, activation)

    def _arguments(self, tracing: bool = False) -> tuple[list[Tensor], list[Tensor], str] | str:
        """Weights, biases and activation of the layers as one op; or why they are not one."""
        layers: list[Any] = [*self._modules.values()]
        if len(layers) != len(self._chain):
            return f"it was made with {len(self._chain)} layers and has {len(layers)}"
        if tracing:
            _read_sizes(layers)
        first, last = layers[0], layers[-1]
        backend: str | None = None
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for k, layer in enumerate(layers):
            if type(layer) is not MaskedLinear or not (
                self._has_layout(layer, k) if tracing else layer.layout is self.layouts[k]
            ):
                return f"a layer is a {type(layer).__name__} that was not made here"
            reason = interceptor_of_instance(layer)
            if reason is not None:
                return reason
            if layer.backend is not None and backend in (None, "native"):
                backend = layer.backend
            if layer is not last and layer.activation != first.activation:
                return "layers differ in their activation"
            # ``layer.weight`` takes much longer than this look-up. It is for layers whose
            # parameters a wrapper has replaced by plain tensors, views of its own say.
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
        reason = (
            interceptor_of_all()
            or interceptor_of_class(MaskedLinear, _LAYER_FORWARD)
            or self._reason_against_kernels(backend, weights, tracing)
        )
        if reason is not None:
            return reason
        return weights, biases, (first.activation if first is not last else None) or "none"

    def _has_layout(self, layer: MaskedLinear, k: int) -> bool:
        """Is ``layer`` on the k-th layout? Traces compare tensors, so that one graph serves all."""
        serialized = layer._handle.serialized
        return serialized is self._chain.serialized(serialized.device)[0][k]

    def _reason_against_kernels(
        self, backend: str | None, weights: list[Tensor], tracing: bool
    ) -> str | None:
        chain, like = self._chain, weights[0]
        if tracing:  # a trace guards on what it finds in a cache
            return reason_against("masked_mlp", "native", backend, chain, weights)
        key = backend, computed_dtype(like), like.device
        if key not in chain.dispatch_cache:
            if like.is_cuda:  # parameters may have come here without a move of the module
                note_gpu_bytes(chain)
            reason = reason_against("masked_mlp", "native", backend, chain, weights)
            chain.dispatch_cache[key] = reason
        return chain.dispatch_cache[key]

    def extra_repr(self) -> str:
        """How the layers run, for ``print(mlp)``."""
        reason = self.unsupported_reason()
        return "runs as one op" if reason is None else f"runs layer by layer: {reason}"


def _read_sizes(layers: Iterable[Any]) -> None:
    """Let parameters and layouts have dynamic sizes in the trace that calls this."""
    with parameters_of_any_size():
        for layer in layers:
            if type(layer) is MaskedLinear:
                handle = layer._handle
                for tensor in (*layer._parameters.values(), handle.serialized, handle.numbers):
                    sizes = None if tensor is None else tensor.shape
    del sizes
