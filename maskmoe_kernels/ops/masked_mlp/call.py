"""What a masked MLP reads, and the arguments that one call of its ops is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskmoe_kernels._compat import any_autocast
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import check_kind, described
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.ops.dispatch import LayoutHandle
from maskmoe_kernels.ops.masked_linear.api import autocast
from maskmoe_kernels.ops.masked_mlp.checks import check_inputs, check_places, check_weights
from maskmoe_kernels.ops.masked_mlp.torch_impl import gather


@dataclass(frozen=True)
class Inputs:
    """The input of an MLP as parts that stand side by side: dense columns and embedding rows.

    Attributes:
        x: Columns, ``(*, columns)``, or ``None``.
        tables: Embeddings, ``(rows, width)`` each. All of their rows train. Where some should not
            (``padding_idx``), call the ``nn.Embedding`` and put what it returns into ``x``.
            ``maskmoe_kernels.nn.table_of(embedding)`` is the table of one that only looks up.
        ids: For each table the row of every sample, ``(*,)`` int64.
        order: The parts, from the left. ``p >= 0`` stands for the rows of table p, ``p < 0`` for
            the next ``-p`` columns of ``x``.

    Raises:
        LayoutError: A table that is not a tensor.
    """

    x: Tensor | None
    tables: Sequence[Tensor] = ()
    ids: Sequence[Tensor] = ()
    order: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.x is not None:
            check_kind(Tensor, x=self.x)
        for name, parts in (("tables", self.tables), ("ids", self.ids), ("order", self.order)):
            if isinstance(parts, (Tensor, str)) or not hasattr(parts, "__getitem__"):
                raise LayoutError(f"{name} must be a sequence, got {described(parts)}")
        for part in self.order:
            if not isinstance(part, (int, np.integer)):
                raise LayoutError(f"order must hold integers, got {part!r}")
        for t, rows in enumerate(self.ids):
            check_kind(Tensor, **{f"ids[{t}]": rows})
        for t, table in enumerate(self.tables):
            if not isinstance(table, Tensor):
                raise LayoutError(
                    f"tables[{t}] must be a tensor, got {type(table).__name__}; of an "
                    "nn.Embedding, pass maskmoe_kernels.nn.table_of(embedding)"
                )

    @property
    def shape(self) -> torch.Size:
        """Shape of the batch, ``(*,)``."""
        return self.ids[0].shape if self.x is None else self.x.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.ids[0].device if self.x is None else self.x.device

    def joined(self) -> Tensor:
        """All parts side by side, ``(*, in_features)``.

        Raises:
            LayoutError: Parts that do not fit each other.
        """
        check_inputs(self.x, self.tables, self.ids, self.order, None)
        for name, tensors in (("tables", self.tables), ("ids", self.ids)):
            for t, tensor in enumerate(tensors):
                if tensor.device != self.device:
                    raise LayoutError(
                        f"{name}[{t}] is on {tensor.device}, but {self.device} holds "
                        f"{'ids[0]' if self.x is None else 'x'}; move all to one device"
                    )
        return gather(self.x, self.tables, self.ids, self.order)


class MLPCall(NamedTuple):
    """The arguments of ``masked_mlp`` in the order of the op; see ``schema.py``.

    It is made once per call, by :meth:`of`, and everything after that reads it.
    """

    x: Tensor | None
    tables: Sequence[Tensor]
    ids: Sequence[Tensor]
    parts: Sequence[int]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    serialized: Sequence[Tensor]
    layouts: Sequence[int]
    out_features: int
    activation: str

    @classmethod
    def of(
        cls,
        inputs: Tensor | Inputs,
        weights: list[Tensor],
        biases: list[Tensor],
        chain: LayoutChain,
        activation: str | None = None,
    ) -> MLPCall:
        """A call of the layers of ``chain``, in the dtype of autocast where that is on.

        Args:
            inputs: ``(*, in_features)`` of the first layer, or its parts.
            weights: Packed, ``(layout.num_weights,)`` for each layout of the chain.
            biases: ``(layout.out_features,)`` each, or none at all.
            chain: The layers' layouts.
            activation: Of all layers but the last, which has none; see :func:`masked_linear`.

        Raises:
            LayoutError: A shape, dtype or device that does not fit.
            BackendError: The weights are DTensors and the input is not.
        """
        x, tables, ids, parts = _parts_of(inputs)
        device = weights[0].device
        if any_autocast():
            x, tables, weights, biases = _autocast(device.type, x, tables, weights, biases)
        check_places(x, tables, weights, biases)
        check_weights(weights, chain.layouts)
        check_inputs(x, tables, ids, parts, chain.in_features)
        serialized, layouts = chain.serialized(device)
        return cls(
            x, tables, ids, parts, weights, biases, serialized, layouts, chain.out_features,
            activation or "none",
        )  # fmt: skip

    @classmethod
    def traced(
        cls,
        inputs: Tensor | Inputs,
        weights: list[Tensor],
        biases: list[Tensor],
        handles: Sequence[LayoutHandle],
        activation: str | None = None,
    ) -> MLPCall:
        """:meth:`of` for code that torch.compile traces: one graph serves all layouts.

        It reads tensors and no number of a layout, so the op checks the shapes when it runs.

        Args:
            inputs: As there.
            weights: As there.
            biases: As there.
            handles: Of the layers' layouts.
            activation: As there.

        Raises:
            LayoutError: Dtypes or devices that differ, or parts that do not fit each other.
            BackendError: The weights are DTensors and the input is not.
        """
        x, tables, ids, parts = _parts_of(inputs)
        if any_autocast():
            device = weights[0].device.type
            x, tables, weights, biases = _autocast(device, x, tables, weights, biases)
        check_places(x, tables, weights, biases)
        check_inputs(x, tables, ids, parts, None)
        return cls(
            x, tables, ids, parts, weights, biases,
            [handle.serialized for handle in handles],
            [handle.numbers.shape[1] for handle in handles],
            handles[-1].numbers.shape[2],
            activation or "none",
        )  # fmt: skip

    def with_tensors(self, x: Tensor | None, tensors: Sequence[Tensor]) -> MLPCall:
        """The same call of other tensors: tables, weights and biases, one after the other."""
        first = len(self.ids)
        last = first + len(self.layouts)
        return MLPCall(
            x, tensors[:first], self.ids, self.parts, tensors[first:last], tensors[last:],
            self.serialized, self.layouts, self.out_features, self.activation,
        )  # fmt: skip

    def needs(self, needs: Sequence[bool]) -> tuple[bool, bool, bool]:
        """Does x need a gradient, a table, a parameter? ``needs`` has one entry per tensor."""
        first = 1 + len(self.ids)
        return needs[0], any(needs[1:first]), any(needs[first:])

    def gradients(self, found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """One gradient or None for x, each table, weight and bias, from those an op returned.

        Args:
            found: Of x if it needs one, of all tables if one does, of all parameters if one does.
            needs: Which of the tensors needs a gradient.
        """
        need_x, need_tables, need_parameters = self.needs(needs)
        rest = iter(found)
        grads: list[Tensor | None] = [next(rest) if need_x else None]
        for k, needed in enumerate(needs[1:]):
            grad = next(rest) if (need_tables if k < len(self.ids) else need_parameters) else None
            grads.append(grad if needed else None)
        return grads


def _parts_of(
    inputs: Tensor | Inputs,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[int]]:
    """The input as the first four arguments of the ops."""
    if isinstance(inputs, Inputs):
        return inputs.x, [*inputs.tables], [*inputs.ids], [*inputs.order]
    return inputs, [], [], [-inputs.shape[-1]] if inputs.dim() else []


def _autocast(
    device: str,
    x: Tensor | None,
    tables: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
    (x,) = autocast(device, (x,))
    return x, autocast(device, tables), autocast(device, weights), autocast(device, biases)
