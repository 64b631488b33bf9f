"""``MaskedLinear``: ``torch.nn.Linear`` whose weights exist only where a mask says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from maskmoe_kernels._compat import parameters_of_any_size
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_integer, check_kind, plain_tensor
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.nn.packing import (
    degrees_mismatch,
    mask_mismatch,
    packing_mismatch,
    packing_state,
)
from maskmoe_kernels.nn.parametrized import Parametrizations, make_right, note_way_to_prune
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.nn.sharding import sharded_like, whole
from maskmoe_kernels.ops.activations import activation_name
from maskmoe_kernels.ops.dispatch import LayoutHandle, check_backend
from maskmoe_kernels.ops.masked_linear.api import masked_linear, traced_masked_linear


class MaskedLinear(Routed):
    """Linear layer over the true entries of a mask, with routed gradients (section 3.4.2).

    A drop-in for masked ``nn.Linear`` layers: the constructor takes a dense mask, dense
    checkpoints load, any leading shape works. Only visible weights are stored.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        mask: ``(out_features, in_features)`` bool, sparse or not: may output unit o see input
            feature f?
        bias: Whether to learn an additive bias.
        grad_mask: Where the gradient flows back to the input, inside ``mask``; ``None`` means
            wherever ``mask`` is true (an ordinary masked layer).
        activation: Fused into the layer; see :func:`masked_linear`.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    torch's tools see the packed weight, which has one dimension:

    - ``torch.nn.utils.parametrizations``: ``weight_norm`` is by unit and ``spectral_norm`` by the
      norm of the matrix, as of ``nn.Linear``; so are their older namesakes in ``torch.nn.utils``.
      (A layer cannot see the argument ``n_power_iterations`` of the newer one; set it on
      ``layer.parametrizations.weight[0].inner``.) ``orthogonal`` raises, for masked rows can
      hardly be orthogonal.
    - ``torch.nn.utils.prune``: unstructured methods choose among the visible weights. A mask of the
      matrix is packed first: ``custom_from_mask(layer, "weight", layer.layout.pack(mask))``;
      structured methods, which need a matrix, raise.
    - ``torch.nn.init``: what needs a fan-in raises; give it :meth:`row_weights`.
    - An optimizer that tells matrices from vectors by their dimensions (no weight decay for
      ``p.dim() < 2``, say) takes it for a vector: name the weight.

    Attributes:
        weight: Packed visible weights, ``(layout.num_weights,)``.
        bias: ``(out_features,)`` or ``None``.
        layout: The :class:`BlockLayout` of the mask.

    Raises:
        LayoutError: The mask is not ``(out_features, in_features)``, or holds no zeros and ones.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Tensor,
        bias: bool = True,
        *,
        grad_mask: Tensor | None = None,
        activation: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        mask = plain_tensor("mask", mask)
        check_integer("in_features", in_features)
        check_integer("out_features", out_features)
        if tuple(mask.shape) != (out_features, in_features):
            raise LayoutError(
                f"mask must be (out_features, in_features) = ({out_features}, {in_features}), got "
                f"{tuple(mask.shape)}"
            )
        layout = BlockLayout.from_mask(mask, grad_mask)
        self._build(layout, bias, activation, backend, device, dtype)

    def _build(
        self,
        layout: BlockLayout,
        bias: bool,
        activation: str | None,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_kind(BlockLayout, layout=layout)
        activation_name(activation)
        check_backend(backend)
        self.layout = layout
        self.in_features = layout.in_features
        self.out_features = layout.out_features
        self.activation = activation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(layout.num_weights, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(layout.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        self._make_handle()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations" and type(value) is nn.ModuleDict:  # as torch sets it
            value = Parametrizations(self.layout)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's."""
        super().register_parameter(name, param)
        if name == "weight" and "weight_orig" in self._parameters:
            note_way_to_prune()  # torch puts the weight back where pruning it has failed

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """As torch's."""
        make_right(hook, self)
        return super().register_forward_pre_hook(hook, **options)

    def _make_handle(self) -> None:
        # torch.compile finds it but cannot make it; so it exists before the first call, wherever
        # the parameters go.
        self._handle = LayoutHandle.of(self.layout, self.weight.device)

    def _unroute(self) -> None:
        self.layout = self.layout.unrouted()
        self._make_handle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .to(), to_empty()
        self._make_handle()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._make_handle()

    @classmethod
    def from_layout(
        cls,
        layout: BlockLayout,
        bias: bool = True,
        *,
        activation: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MaskedLinear:
        """A layer on ``layout``; the other arguments as in the constructor."""
        layer = cls.__new__(cls)
        layer._build(layout, bias, activation, backend, device, dtype)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Tensor,
        *,
        grad_mask: Tensor | None = None,
        activation: str | None = None,
        backend: str | None = None,
    ) -> MaskedLinear:
        """A copy of ``linear`` with the weights that ``mask`` leaves; see the constructor."""
        check_kind(nn.Linear, linear=linear)
        layer = cls(
            linear.in_features,
            linear.out_features,
            mask,
            linear.bias is not None,
            grad_mask=grad_mask,
            activation=activation,
            backend=backend,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(layer.layout.pack(linear.weight))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with zeros where the mask is false, without the activation.

        It computes the same on finite input; its gradient is neither masked nor routed.
        """
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(whole(self.bias))
        return linear

    def dense_weight(self) -> Tensor:
        """The weight as ``(out_features, in_features)`` with zeros where the mask is false.

        If it is sharded (FSDP2), it is gathered: all processes have to call this.
        """
        return self.layout.unpack(whole(self.weight))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``nn.Linear``'s initial scale, uniform in +-1/sqrt(fan-in), by true fan-in."""
        layout = self.layout
        with torch.device("cpu"):
            fan_in = torch.tensor(layout.row_fan_in, dtype=torch.float64)
            bound = torch.where(fan_in > 0, fan_in.rsqrt(), 0.0)
            per_weight = bound.repeat_interleave(torch.tensor(layout.weight_offsets).diff())
            per_unit = bound.repeat_interleave(torch.tensor(layout.row_sizes))
            if layout.row_order is not None:
                per_unit = per_unit[layout.row_order.argsort()]
        weight: Any = self.weight
        parametrized = "weight" not in self._parameters  # so each access computes it
        weight = torch.empty_like(weight) if parametrized else weight
        for parameter, scale in ((weight, per_weight), (self.bias, per_unit)):
            if parameter is not None:
                scale = scale.to(parameter.device, parameter.dtype)
                parameter.uniform_(-1, 1).mul_(sharded_like(scale, parameter))
        if parametrized:
            self.weight = weight

    def row_weights(self) -> list[Tensor]:
        """Views of the weight as matrices: ``(units, fan-in)`` of each row block that sees any.

        Units of a row block see the same features, in the order of the block's columns. So
        initializers that need a fan-in take the true one.

        Example:
            >>> for rows in layer.row_weights():
            ...     _ = nn.init.kaiming_uniform_(rows, nonlinearity="relu")
        """
        layout = self.layout
        offsets = layout.weight_offsets
        blocks = zip(offsets, offsets[1:], layout.row_sizes, strict=False)
        weight = self.weight.detach()
        return [weight[a:b].view(-1, units).t() for a, b, units in blocks if b > a]

    def forward(self, x: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        if is_dynamo_compiling():
            with parameters_of_any_size():
                weight, bias, handle = self.weight, self.bias, self._handle
                tensors = weight, bias, handle.serialized, handle.numbers
                sizes = [None if t is None else t.shape for t in tensors]  # they are read here
            del sizes
            return traced_masked_linear(
                x, weight, bias, handle, lambda: self.layout, self.activation, self.backend
            )
        return masked_linear(x, self.weight, self.bias, self.layout, self.activation, self.backend)

    def get_extra_state(self) -> Tensor:
        """What orders the packed weight, so that no checkpoint loads in another order."""
        return packing_state(self.layout.packing_id)

    def set_extra_state(self, state: Tensor) -> None:
        """Checked while loading; nothing to set."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch hands over a copy of the caller's dictionary, so entries may be replaced here.
        # A dense (out, in) weight, as nn.Linear saves it, is packed on the way in.
        expected = (self.out_features, self.in_features)
        key = prefix + "_extra_state"
        found = {name: state_dict.get(prefix + name) for name in _WEIGHTS}
        dense = {name: t for name, t in found.items() if t is not None and t.dim() == 2}
        for name, weight in dense.items():
            if tuple(weight.shape) == expected:
                packed = self.layout.pack(whole(weight))
                if name in _DIRECTIONS and not torch.equal(
                    self.layout.unpack(packed), whole(weight)
                ):
                    error_msgs.append(
                        f"mask mismatch for {prefix}{name}: the norms of the checkpoint are of "
                        "weights outside of this layer's mask, too; load a weight without "
                        "weight_norm, and register that afterwards."
                    )
                state_dict[prefix + name] = sharded_like(packed, self.weight)
            else:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: a dense weight must be (out_features, "
                    f"in_features) = {expected}, got {tuple(weight.shape)} from checkpoint."
                )
                state_dict[prefix + name] = self.weight.detach()
        if dense or all(value is None for value in found.values()):
            # Only a packed weight has to say how it is packed; one that does not is refused, as
            # torch refuses any missing key, unless strict=False.
            state_dict[key] = self.get_extra_state()
        else:
            reason = packing_mismatch(state_dict.get(key), self.layout.packing_id)
            if reason is not None:
                error_msgs.append(f"packing mismatch for {prefix}weight, by {key}: {reason}")
        # Layers that keep a dense weight (zuko's, nflows', pyro's) save their mask beside it.
        for name, mismatch in (("mask", mask_mismatch), ("degrees", degrees_mismatch)):
            value = state_dict.pop(prefix + name, None)
            reason = None if value is None else mismatch(value, self.layout.mask())
            if reason is not None:
                error_msgs.append(f"{name} mismatch for {prefix}{name}: {reason}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._make_handle()  # ``assign=True`` may have moved the parameters

    def extra_repr(self) -> str:
        """Sizes, blocks and density, for ``print(layer)``."""
        layout = self.layout
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocks={len(layout.row_sizes)}x"
            f"{len(layout.col_sizes)} ({layout.num_blocks} present), density={layout.density:.3f}"
        )
        if not layout.routes_all:
            text += f", routed={int(layout.routes_grad.sum())}"
        if self.activation is not None:
            text += f", activation={self.activation}"
        return text


#: A weight of which weight_norm takes the direction.
_DIRECTIONS = ("weight_v", "parametrizations.weight.original1")
#: Under which names a weight is saved: its own; and torch's, where it is pruned or parametrized.
_WEIGHTS = (
    "weight",
    "weight_orig",
    "weight_mask",
    "parametrizations.weight.original",
    *_DIRECTIONS,
)
