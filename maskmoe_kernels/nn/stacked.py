"""Several masked linear maps of one input as one product."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.nn.interception import interceptor
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.ops.masked_linear.api import masked_linear


class StackedLinear(MaskedLinear):
    """``count`` maps with the layout of one, side by side: one product computes all of them.

    The queries, keys and values of an attention, or the gates of a recurrent unit. Make one with
    :meth:`repeat`. The output is map after map, each ``layout.out_features`` wide; so is the
    bias, and the packed weight.
    """

    _rows: int  # row blocks of one map
    _units: int  # its output units
    # Runs of maps that were asked for, as layouts of their own: (first, last) to layout.
    _runs: Mapping[tuple[int, int], BlockLayout] = MappingProxyType({})

    @classmethod
    def repeat(
        cls,
        layout: BlockLayout,
        count: int,
        bias: bool = True,
        *,
        runs: tuple[tuple[int, int], ...] = (),
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StackedLinear:
        """``count`` maps on ``layout``.

        Args:
            layout: Of one map.
            count: Number of maps.
            bias: Whether to learn an additive bias.
            runs: ``(first, last)`` pairs; maps first to last - 1 can then be had from :meth:`run`.
            backend: See :func:`masked_linear`.
            device: Where to create the parameters.
            dtype: Floating-point type of the parameters.

        Raises:
            LayoutError: The layout's output units are interleaved.
        """
        layer = cls.__new__(cls)
        layer._build(_repeated(layout, count), bias, None, backend, device, dtype)
        layer._rows = len(layout.row_sizes)
        layer._units = layout.out_features
        layer._runs = {(a, b): _repeated(layout, b - a) for a, b in runs}
        layer._make_handle()
        return layer

    def _make_handle(self) -> None:
        super()._make_handle()
        for layout in self._runs.values():
            serialized_layout(layout, self.weight.device)

    def _unroute(self) -> None:
        self._runs = {of: layout.unrouted() for of, layout in self._runs.items()}
        super()._unroute()

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        """Maps ``first`` to ``last - 1`` alone: ``(*, (last - first) * layout.out_features)``.

        Where a hook or a replaced method wants to see the call, all maps are computed by one.
        """
        if interceptor(self, _FORWARD) is not None:
            y: Tensor = self(x)
            return y[..., first * self._units : last * self._units]
        offsets = self.layout.weight_offsets
        weight = self.weight[offsets[first * self._rows] : offsets[last * self._rows]]
        bias = None
        if self.bias is not None:
            bias = self.bias[first * self._units : last * self._units]
        return masked_linear(x, weight, bias, self._runs[first, last], None, self.backend)


_FORWARD = StackedLinear.forward


def _repeated(layout: BlockLayout, count: int) -> BlockLayout:
    if layout.row_order is not None:
        raise LayoutError(
            f"layout must have its output units block after block to be stacked, got {layout}"
        )
    return BlockLayout(
        layout.row_sizes * count,
        layout.col_sizes,
        layout.present.repeat(count, 1),
        layout.routes_grad.repeat(count, 1),
        col_order=layout.col_order,
    )
