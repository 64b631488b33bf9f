"""Gated recurrent units whose gates are masked by inclusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import (
    block_sizes,
    check_integer,
    check_kind,
    described,
)
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.nn.interception import interceptor
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.nn.stacked import StackedLinear
from maskmoe_kernels.ops.checks import check_beside, check_floats


class MaskedGRUCell(Routed):
    """``nn.GRUCell`` of all experts: one masked product of the input, one of the state.

    With h the experts' states side by side, x the input and masked maps W, U (torch's equations)::

        r = sigmoid(W_r x + b_r + U_r h + c_r)
        z = sigmoid(W_z x + b_z + U_z h + c_z)
        n = tanh(W_n x + b_n + r * (U_n h + c_n))
        h' = (1 - z) * n + z * h

    Expert i's gates read the states of all experts on subsets of S_i, those of proper subsets
    behind a stop-gradient.

    Args:
        family: The subsets, one expert each.
        hidden_size: Units per expert; an int, or one per expert.
        bias: Whether to learn b and c.
        input_layout: Of one gate's W, if not ``family.input_layout(hidden_size)``: experts by
            whatever the input holds. It decides what an expert sees.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Attributes:
        input_gates: W_r, W_z and W_n, in this order.
        hidden_gates: U_r, U_z and U_n.

    Raises:
        LayoutError: A width or an ``input_layout`` that does not fit.
    """

    def __init__(
        self,
        family: SubsetFamily,
        hidden_size: Width,
        bias: bool = True,
        *,
        input_layout: BlockLayout | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_kind(SubsetFamily, family=family)
        if input_layout is not None:
            check_kind(BlockLayout, input_layout=input_layout)
        widths = block_sizes("hidden_size", hidden_size, family.num_experts)
        if input_layout is None:
            input_layout = family.input_layout(widths)
        elif input_layout.row_sizes != widths:
            raise LayoutError(
                f"input_layout must have one row block per expert, of {list(widths)} units, got "
                f"{input_layout}"
            )
        self.hidden_size = sum(widths)
        self.input_size = input_layout.in_features
        hidden_layout = family.hidden_layout(widths, widths)
        self.input_gates, self.hidden_gates = (
            StackedLinear.repeat(layout, 3, bias, backend=backend, device=device, dtype=dtype)
            for layout in (input_layout, hidden_layout)
        )

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Next state ``(*, hidden_size)`` from input ``(*, input_size)`` and state, or zeros."""
        check_floats(input=input)
        if hx is not None:
            check_floats(input=input, hx=hx)
        gates = self.input_gates(input)
        if hx is None:
            hx = gates.new_zeros(*gates.shape[:-1], self.hidden_size)
        return self.step(*self.split(gates), hx.to(gates.dtype))

    def split(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Gates ``(*, 3 * hidden_size)`` as (r and z, n)."""
        both, new = gates.split_with_sizes((2 * self.hidden_size, self.hidden_size), -1)
        return both, new

    def step(self, both: Tensor, new: Tensor, state: Tensor) -> Tensor:
        """Next state, from what :attr:`input_gates` made of the input, as :meth:`split` has it."""
        state_both, state_new = self.split(self.hidden_gates(state))
        reset, update = (both + state_both).sigmoid().chunk(2, -1)
        return torch.lerp(torch.addcmul(new, reset, state_new).tanh(), state, update)


_CELL_FORWARD = MaskedGRUCell.forward


class MaskedGRU(Routed):
    """``nn.GRU`` of all experts: blind outside their subset, and each trained by its own loss.

    One masked product computes the gates' input for a whole sequence; each step is another masked
    product and element-wise functions. See :class:`MaskedGRUCell` for the equations. If a hook,
    say, sees or changes the call of a cell, the cell is called step by step instead.

    A padded step is absent, whatever it holds: the state does not change there, and the output is
    zero.

    Args:
        family: The subsets, one expert each.
        hidden_size: Units per expert; an int, or one per expert.
        num_layers: Layers, each reading the states of the one before.
        bias: See :class:`MaskedGRUCell`.
        batch_first: Is the input ``(batch, steps, features)`` instead of
            ``(steps, batch, features)``?
        dropout: Probability with which a unit between two layers is dropped in training.
        bidirectional: Not available.
        input_layout: Of the first layer; see :class:`MaskedGRUCell`.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: As :class:`MaskedGRUCell`; fewer than one layer; ``bidirectional``.
    """

    def __init__(
        self,
        family: SubsetFamily,
        hidden_size: Width,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        input_layout: BlockLayout | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bidirectional:
            raise LayoutError(
                "bidirectional=True is not available; run a second MaskedGRU on the reversed "
                "sequence"
            )
        check_kind(SubsetFamily, family=family)
        check_integer("num_layers", num_layers, 1)
        block_sizes("hidden_size", hidden_size, family.num_experts)
        if not 0 <= dropout <= 1:
            raise LayoutError(f"dropout must be a probability, got {dropout!r}")
        layouts = [input_layout]
        layouts += [family.hidden_layout(hidden_size, hidden_size)] * (num_layers - 1)
        cells = [
            MaskedGRUCell(
                family, hidden_size, bias, input_layout=layout, backend=backend, device=device,
                dtype=dtype,
            )
            for layout in layouts
        ]  # fmt: skip
        self.cells = nn.ModuleList(cells)
        self.family = family
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.input_size = cells[0].input_size
        self.hidden_size = cells[0].hidden_size

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """States of every step, and the last; shapes with ``batch_first``, of N samples.

        Args:
            input: ``(N, T, input_size)``; without N for a single sample; or packed.
            hx: State to start from, ``(num_layers, N, hidden_size)``, or zeros.
            lengths: Steps of each sample that are not padding, ``(N,)`` integers on any device;
                they are not read back, so more than T counts as T.
            padding_mask: Instead of ``lengths``: ``(N, T)`` bool, true where a step is padding,
                at the end or anywhere else.

        Returns:
            Output ``(N, T, hidden_size)``, zero at padded steps (or packed, if the input is),
            and each sample's last state ``(num_layers, N, hidden_size)``.

        Raises:
            LayoutError: Shapes or types that do not fit, or padding given twice.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None or padding_mask is not None:
                raise LayoutError("a PackedSequence has its lengths; pass no other padding")
            return self._packed(input, hx)
        check_floats(input=input)
        if hx is not None:
            check_floats(input=input, hx=hx)
        batched = input.dim() == 3
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise LayoutError(
                f"input must be (N, T, {self.input_size}) or (T, {self.input_size}), got "
                f"{tuple(input.shape)}"
            )
        if not batched:
            input = input.unsqueeze(1)
            hx = hx if hx is None else hx.unsqueeze(1)
            lengths = lengths if lengths is None else lengths.reshape(1)
            padding_mask = padding_mask if padding_mask is None else padding_mask.unsqueeze(0)
        elif self.batch_first:
            input = input.transpose(0, 1)
        padded = _padded(input, lengths, padding_mask)
        output, last = self._layers(input, hx, padded)
        if not batched:
            return output.squeeze(1), last.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output, last

    def _packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        # Padded in the order of the packing, longest first, so that what comes out can be packed
        # with the very indices that came in.
        plain = PackedSequence(input.data, input.batch_sizes)
        x, lengths = pad_packed_sequence(plain)
        if hx is not None and input.sorted_indices is not None:
            hx = hx.index_select(1, input.sorted_indices)
        padded = _padded(x, lengths, None)
        output, last = self._layers(x, hx, padded)
        if input.unsorted_indices is not None:
            last = last.index_select(1, input.unsorted_indices)
        data = pack_padded_sequence(output, lengths).data
        return (
            PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices),
            last,
        )

    def _layers(self, x: Tensor, hx: Tensor | None, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """All layers over ``x`` (T, N, input_size), with ``padded`` (T, N, 1) true at padding."""
        expected = (self.num_layers, x.shape[1], self.hidden_size)
        if hx is not None and tuple(hx.shape) != expected:
            raise LayoutError(f"hx must be {expected}, got {tuple(hx.shape)}")
        last = []
        for k, cell in enumerate(self.cells):
            if k > 0:
                x = F.dropout(x, self.dropout, self.training)
            elif padded is not None:
                x = x.masked_fill(padded, 0)
            x, state = _run(cell, x, None if hx is None else hx[k], padded)  # type: ignore[arg-type]
            last.append(state)
        return x, torch.stack(last)

    def extra_repr(self) -> str:
        """Sizes, for ``print(layer)``."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def _run(
    cell: MaskedGRUCell, x: Tensor, state: Tensor | None, padded: Tensor | None
) -> tuple[Tensor, Tensor]:
    if interceptor(cell, _CELL_FORWARD) is None:
        gates = cell.input_gates(x)
        state = gates.new_zeros(x.shape[1], cell.hidden_size) if state is None else state
        state = state.to(gates.dtype)
        step: Callable[..., Tensor] = cell.step
        inputs = [*zip(*(part.unbind(0) for part in cell.split(gates)), strict=True)]
    else:
        state = x.new_zeros(x.shape[1], cell.hidden_size) if state is None else state
        step, inputs = cell, [(x_t,) for x_t in x.unbind(0)]
    outputs = []
    for t, of_step in enumerate(inputs):
        after = step(*of_step, state)
        state = after if padded is None else torch.where(padded[t], state.to(after.dtype), after)
        outputs.append(state)
    if not outputs:
        return state.new_zeros(0, x.shape[1], cell.hidden_size), state
    output = torch.stack(outputs)
    return output if padded is None else output.masked_fill(padded, 0), state


def _padded(x: Tensor, lengths: Tensor | None, padding_mask: Tensor | None) -> Tensor | None:
    """Where a step of ``x`` (T, N, input_size) is padding, ``(T, N, 1)``, or None."""
    steps, batch = x.shape[:2]
    if lengths is not None and padding_mask is not None:
        raise LayoutError("padding is given twice; pass lengths or padding_mask")
    if lengths is not None:
        check_kind(Tensor, lengths=lengths)
        if lengths.is_meta and not x.is_meta:
            raise LayoutError(f"lengths must have values, got {described(lengths)}")
        if tuple(lengths.shape) != (batch,) or lengths.is_floating_point():
            raise LayoutError(
                f"lengths must be ({batch},) integers, got {lengths.dtype} {tuple(lengths.shape)}"
            )
        step = torch.arange(steps, device=x.device)[:, None, None]
        return step >= lengths.to(x.device)[:, None]
    if padding_mask is not None:
        check_beside(x, padding_mask=padding_mask)
        if tuple(padding_mask.shape) != (batch, steps) or padding_mask.dtype != torch.bool:
            raise LayoutError(
                f"padding_mask must be bool {(batch, steps)}, got {padding_mask.dtype} "
                f"{tuple(padding_mask.shape)}"
            )
        return padding_mask.t().unsqueeze(-1)
    return None
