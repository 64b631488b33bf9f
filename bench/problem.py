"""One layer to compute, the same for every contender: layout, weights, rows, gradient."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from bench.cases import DTYPES, Case
from maskmoe_kernels import BlockLayout
from maskmoe_kernels.layout.families import FAMILIES


class Problem:
    """Random values on a layout, the same for every contender.

    Contenders store weights in different ways. The *compact* form of a weight or its gradient is
    the one to compare: the matrices of the row blocks, each ``(units, visible features in
    ascending order)``, flat and one after another.

    Args:
        layout: Without interleaved units.
        batch: B.
        dtype: Of all values.
        device: Where they lie.
        seed: Of all values.
        tf32: May float32 products be computed in tf32?

    Raises:
        ValueError: The layout has interleaved units.
    """

    def __init__(
        self,
        layout: BlockLayout,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        tf32: bool = False,
    ) -> None:
        if layout.row_order is not None or layout.col_order is not None:
            raise ValueError("the benchmark measures layouts whose blocks lie one after another")
        self.layout, self.batch, self.dtype = layout, batch, dtype
        self.device = torch.device(device)
        self.tf32 = tf32
        #: Not torch's default generator: a failed CUDA graph capture may leave that one unusable.
        self.generator = torch.Generator(self.device).manual_seed(seed)
        #: Row block i reads these column blocks.
        self.sources: list[list[int]] = layout.row_blocks()
        #: Where the matrix of each row block starts in the compact form.
        self.starts = [0]
        for units, fan_in in zip(layout.row_sizes, layout.row_fan_in, strict=True):
            self.starts.append(self.starts[-1] + units * fan_in)
        #: Leaf in compact form, of normal values with variance 1 / fan-in.
        self.compact = self._weights().requires_grad_()
        self.bias = self._normal(layout.out_features).requires_grad_()
        self.x = self._normal(batch, layout.in_features).requires_grad_()
        self.grad = self._normal(batch, layout.out_features)
        #: Pairs of x and grad_y; there is one until ``make_sets``.
        self.sets: list[tuple[Tensor, Tensor]] = [(self.x, self.grad)]
        self.position = 0

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Problem:
        """The hidden layer of ``case``."""
        layout = FAMILIES[case.family]().hidden_layout(case.width, case.width)
        return cls(layout, case.batch, DTYPES[case.dtype], device, tf32=case.dtype == "tf32")

    def make_sets(self, cache: int) -> None:
        """Add sets, so that calls on all of them in turn read twice ``cache`` bytes of x.

        One set is enough where x alone exceeds the cache, or where ``cache`` is 0.
        """
        if self.x.nbytes >= cache:
            return
        for _ in range(1, -(-2 * cache // max(self.x.nbytes, 1))):
            x = self._normal(self.batch, self.layout.in_features).requires_grad_()
            self.sets.append((x, self._normal(self.batch, self.layout.out_features)))

    def select(self, k: int) -> None:
        """Let x and grad_y be those of set ``k``, modulo the number of sets."""
        self.position = k % len(self.sets)
        self.x, self.grad = self.sets[self.position]

    @property
    def width(self) -> int | None:
        """d, if every block is d by d; otherwise ``None``."""
        sizes = {*self.layout.row_sizes, *self.layout.col_sizes}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def is_hidden(self) -> bool:
        """Is it square in blocks, with the gradient routed on the diagonal?"""
        routes = self.layout.routes_grad
        square = routes.shape[0] == routes.shape[1]
        return square and bool((routes == torch.eye(len(routes), dtype=torch.bool)).all())

    def grad_of_first(self, rows: int) -> Tensor:
        """grad_y with zeros in all rows but the first ``rows``."""
        if rows >= self.batch:
            return self.grad
        return torch.cat([self.grad[:rows], torch.zeros_like(self.grad[rows:])])

    def row_matrices(self, compact: Tensor) -> list[Tensor]:
        """The matrices in a compact form, ``(units, fan-in)`` for each row block, as views."""
        shapes = zip(self.layout.row_sizes, self.layout.row_fan_in, strict=True)
        spans = pairwise(self.starts)
        return [compact[a:b].view(shape) for (a, b), shape in zip(spans, shapes, strict=True)]

    @cached_property
    def _positions(self) -> tuple[Tensor, Tensor | None]:
        # Of each weight in compact form: its position in the dense matrix, and in the packed weight
        # (None: packed is compact). Blocks lie in order, so dense positions ascend.
        packed = self.layout.weight_index(torch.device("cpu")).to(self.device)
        if bool((packed[1:] > packed[:-1]).all()):  # sorting 10^8 positions would take 30 s
            return packed, None
        position, order = packed.sort()
        return position, order

    @cached_property
    def packed(self) -> Tensor:
        """The weight as our layers hold it; a leaf."""
        packed, order = self.compact.detach().clone(), self._positions[1]
        if order is not None:
            packed[order] = self.compact.detach()
        return packed.requires_grad_()

    @cached_property
    def dense(self) -> Tensor:
        """The weight as ``(out, in)`` with zeros where blocks are absent; a leaf."""
        dense = self.compact.new_zeros(self.layout.out_features, self.layout.in_features)
        dense.view(-1)[self._positions[0]] = self.compact.detach()
        return dense.requires_grad_()

    @cached_property
    def mask(self) -> Tensor:
        """The mask as ``(out, in)`` zeros and ones of the problem's dtype."""
        return self.layout.mask().to(self.device, self.dtype)

    def from_packed(self, packed: Tensor) -> Tensor:
        """Compact form of a weight, or a gradient, as our layers hold it."""
        order = self._positions[1]
        return packed if order is None else packed[order]

    def from_dense(self, dense: Tensor) -> Tensor:
        """Compact form of a dense weight or gradient, without the absent entries."""
        return dense.reshape(-1)[self._positions[0]]

    def _normal(self, *shape: int) -> Tensor:
        return self._drawn(*shape).to(self.dtype)

    def _drawn(self, *shape: int) -> Tensor:
        # Drawn on the device: a billion values would take the host half a minute.
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _weights(self) -> Tensor:
        flat = self._drawn(self.starts[-1])
        for matrix in self.row_matrices(flat):
            matrix /= max(matrix.shape[1], 1) ** 0.5
        return flat.to(self.dtype)
