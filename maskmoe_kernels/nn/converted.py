"""``ConvertedLinear``: a masked layer of zuko, nflows or pyro as one of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from maskmoe_kernels.layout.aligned import Inner
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.ops.dispatch import LayoutHandle
from maskmoe_kernels.ops.masked_linear.api import masked_linear, traced_masked_linear


class ConvertedLinear(MaskedLinear):
    """A :class:`MaskedLinear` in the place of another package's layer, which it keeps aside.

    *The function* is the same, but that a NaN or infinity in an input or weight that the mask
    leaves out no longer reaches a unit. The second derivative needs ``backend="reference"``, which
    is slow.

    *What is shared*: the bias is the same parameter. ``weight`` holds copies of the visible
    weights, packed; the dense weight stays aside with the rest of the original layer, for
    :func:`revert_`. ``.grad``, ``requires_grad`` and the training mode are carried over.

    *State dicts* have the same names ``weight`` (packed, ``(num_weights,)``) and ``bias``; ``mask``
    and ``degrees`` are gone, ``_extra_state`` says how the weight is packed. Checkpoints of the
    original model load, except for weights that the mask leaves out. To save one that the original
    model can load, call :func:`revert_` first.

    *Optimizers* that hold a replaced weight have to be passed to ``convert_`` and ``revert_``: they
    follow, with their state. One that is created afterwards needs nothing.

    Attributes:
        original: The layer that it replaced, in a tuple, so that it is no submodule.
        inner: What it computes where its network leaves units in block order, if that does so.
    """

    original: tuple[nn.Module]
    inner: Inner | None = None

    @classmethod
    def of(
        cls, module: nn.Module, layout: BlockLayout, backend: str | None, inner: Inner | None = None
    ) -> Self:
        """What replaces ``module``; the bias is shared, visible weights are gathered."""
        weight: Any = module.weight
        # On "meta": no memory, and no draw from a random generator.
        layer = cls.__new__(cls)
        layer._build(layout, False, None, backend, "meta", None)
        with torch.inference_mode(False):
            layer.weight = nn.Parameter(layout.pack(weight.detach()), weight.requires_grad)
            if weight.grad is not None:
                layer.weight.grad = layout.pack(weight.grad.detach())
        layer.register_parameter("bias", module._parameters["bias"])
        layer.__dict__["original"] = (module,)
        layer.inner = inner
        layer._make_handle()
        layer.train(module.training)
        return layer

    @property
    def mask(self) -> Tensor:
        """The original's mask, ``(out_features, in_features)``."""
        mask: Tensor = self.original[0].mask  # type: ignore[assignment]
        return mask

    @property
    def degrees(self) -> Tensor:
        """The original's degrees, ``(out_features,)``, if it is a layer of nflows."""
        degrees: Tensor = self.original[0].degrees  # type: ignore[assignment]
        return degrees

    def within(self, x: Tensor, inner: Inner, activation: str | None) -> Tensor:
        """The activation of what it computes inside its network.

        Args:
            x: ``(*, in_features)``, in the order that ``inner`` reads.
            inner: The layer's own.
            activation: As of :func:`masked_linear`.

        Returns:
            ``(*, out_features)``, in the order that ``inner`` writes.
        """
        bias: Tensor | None = self.bias
        if bias is not None and self._order is not None:
            bias = bias.index_select(0, self._order)
        if is_dynamo_compiling():
            return traced_masked_linear(
                x, self.weight, bias, self._inner, lambda: inner.layout, activation, self.backend
            )
        return masked_linear(x, self.weight, bias, inner.layout, activation, self.backend)

    def _make_handle(self) -> None:
        super()._make_handle()
        # As the handle, these exist before the first call, for torch.compile.
        inner, order, device = self.inner, self.layout.row_order, self.weight.device
        self._inner: Any = None if inner is None else LayoutHandle.of(inner.layout, device)
        self._order: Tensor | None = None
        if inner is not None and inner.writes is not None and order is not None:
            self._order = self.layout.table("row_order", device, order.clone)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_inner", "_order")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedLinear:
        original = self.original[0]
        original._parameters["bias"] = None  # it is moved with this layer
        original._apply(fn, recurse)
        super()._apply(fn, recurse)
        original._parameters["bias"] = self.bias
        return self

    @torch.no_grad()
    def restored(self) -> nn.Module:
        """The original with this layer's weights; those that the mask leaves out are as before."""
        module = self.original[0]
        dense: Any = module._parameters["weight"]
        if dense.dtype != self.weight.dtype or dense.device != self.weight.device:
            dense.data = dense.data.to(self.weight)  # a checkpoint was loaded with assign=True
        index = self.layout.weight_index(dense.device)
        values = dense.data.reshape(-1).index_copy(0, index, self.weight.detach())
        dense.copy_(values.view(dense.shape))
        dense.grad = None if self.weight.grad is None else self.layout.unpack(self.weight.grad)
        dense.requires_grad_(self.weight.requires_grad)
        module._parameters["bias"] = self._parameters["bias"]
        return module.train(self.training)
