"""What a masked MLP reads, and the arguments that one call of its ops is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe_kernels._compat import any_autocast
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.ops.masked_linear.api import autocast
from maskmoe_kernels.ops.masked_mlp.checks import check_inputs, check_parameters
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

    def joined(self) -> Tensor:
        """All parts side by side, ``(*, in_features)``."""
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
    layouts: Sequence[Tensor]
    layout_ids: Sequence[int]
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
        if isinstance(inputs, Inputs):
            x, tables, ids = inputs.x, [*inputs.tables], [*inputs.ids]
            parts = [*inputs.order]
        else:
            x, tables, ids = inputs, [], []
            parts = [-inputs.shape[-1]] if inputs.dim() else []
        device = weights[0].device
        if any_autocast():
            (x,) = autocast(device.type, (x,))
            tables, weights, biases = (
                autocast(device.type, of) for of in (tables, weights, biases)
            )
        check_parameters(x, tables, weights, biases, chain.layouts)
        check_inputs(x, tables, ids, parts, chain.in_features)
        layouts, layout_ids = chain.serialized(device)
        return cls(
            x, tables, ids, parts, weights, biases, layouts, layout_ids, chain.out_features,
            activation or "none",
        )  # fmt: skip

    def with_tensors(self, x: Tensor | None, tensors: Sequence[Tensor]) -> MLPCall:
        """The same call of other tensors: tables, weights and biases, one after the other."""
        first = len(self.ids)
        last = first + len(self.layout_ids)
        return MLPCall(
            x, tensors[:first], self.ids, self.parts, tensors[first:last], tensors[last:],
            self.layouts, self.layout_ids, self.out_features, self.activation,
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
