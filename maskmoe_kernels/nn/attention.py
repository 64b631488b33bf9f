"""Multi-head attention whose heads belong to experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.arguments import block_sizes, check_kind
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.nn.routed import Routed
from maskmoe_kernels.nn.stacked import StackedLinear
from maskmoe_kernels.ops.checks import check_beside, check_floats


class MaskedMultiheadAttention(Routed):
    """``nn.MultiheadAttention`` in which each head belongs to one expert (section 3.4.3).

    Head h of expert i is ``softmax(q_h k_h^T / sqrt(d_h)) v_h``. The projections of expert i to q,
    k, v and the output read the units of all experts on subsets of S_i; the units of proper
    subsets are read behind a stop-gradient. So expert i's output is a function of S_i's features
    alone. Queries, keys and values of all experts are one masked product.

    With ``kv_family`` it joins two families: keys and values of expert x of ``family`` read
    expert y of ``kv_family`` iff S_y is a subset of S_x; the gradient goes to the same expert.

    The call, its shapes and masks are those of ``nn.MultiheadAttention``, with these choices:

    - A padded step is absent. Keys and values there are set to zero before anything is computed,
      so no value in them, NaN and infinity included, reaches another step or a gradient. If
      ``query is key``, the query is set to zero there too: the output at a padded step is then
      that of a zero vector, and means nothing. Only ``key_padding_mask`` makes a step absent;
      a step hidden by ``attn_mask`` is multiplied by zero.
    - If a query may see no step, its heads are zero and its output is the bias of the output
      projection, where torch gives NaN.

    Args:
        family: Experts of the query and of the output.
        width: Units per expert, of the query, the heads together and the output; an int, or one
            per expert.
        heads: Heads per expert; an int, or one per expert. The width must be a multiple.
        kv_family: Experts of key and value, if these come from elsewhere: from another family, or
            from another layer of the same family.
        kv_width: Units per expert of key and value; by default ``width``.
        dropout: Probability with which an attention weight is dropped in training.
        bias: Whether the projections have a bias.
        batch_first: Are inputs ``(batch, steps, units)`` instead of ``(steps, batch, units)``?
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Attributes:
        in_proj: q, k and v, if there is no ``kv_family``.
        q_proj: q, if there is one.
        kv_proj: k and v, if there is one.
        out_proj: The output projection W^o.

    Raises:
        LayoutError: Widths or heads that do not fit the family, a width that is not a multiple
            of its heads, families without a common group, ``kv_width`` without ``kv_family``.
    """

    def __init__(
        self,
        family: SubsetFamily,
        width: Width,
        heads: Width = 1,
        kv_family: SubsetFamily | None = None,
        kv_width: Width | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_kind(SubsetFamily, family=family)
        if kv_family is not None:
            check_kind(SubsetFamily, kv_family=kv_family)
            kv_width = width if kv_width is None else kv_width
            block_sizes("kv_width", kv_width, kv_family.num_experts)
        if kv_family is None and kv_width is not None:
            raise LayoutError(
                f"kv_width={kv_width!r} needs kv_family: in self-attention, keys and values are "
                "as wide as queries"
            )
        if not 0 <= dropout <= 1:
            raise LayoutError(f"dropout must be a probability, got {dropout!r}")
        self.family = family
        self.kv_family = kv_family
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dims = _head_dims(family, width, heads)
        self.num_heads = len(self.head_dims)
        own = family.hidden_layout(width, width)
        if kv_family is None:
            self.in_proj: StackedLinear | None = StackedLinear.repeat(
                own, 3, bias, runs=((0, 1), (1, 3), (1, 2), (2, 3)),
                backend=backend, device=device, dtype=dtype,
            )  # fmt: skip
            self.q_proj: MaskedLinear | None = None
            self.kv_proj: StackedLinear | None = None
        else:
            between = BlockLayout.between(
                family, kv_family, width, width if kv_width is None else kv_width
            )
            self.in_proj = None
            self.q_proj = MaskedLinear.from_layout(
                own, bias, backend=backend, device=device, dtype=dtype
            )
            self.kv_proj = StackedLinear.repeat(
                between, 2, bias, runs=((0, 2), (0, 1), (1, 2)),
                backend=backend, device=device, dtype=dtype,
            )  # fmt: skip
        self.out_proj = MaskedLinear.from_layout(
            own, bias, backend=backend, device=device, dtype=dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every expert; shapes with ``batch_first``, of N samples.

        Args:
            query: ``(N, L, units)``; without N for a single sample.
            key: ``(N, S, kv units)``.
            value: ``(N, S, kv units)``.
            key_padding_mask: ``(N, S)``; true, or minus infinity, where a step is padding. A
                float mask is added to the scores.
            need_weights: Whether to return the attention weights, which takes more time.
            attn_mask: ``(L, S)`` or ``(N * heads, L, S)``, heads expert by expert; true, or
                minus infinity, where a query may not see a step. A float mask is added.
            average_attn_weights: Average the weights over all heads, hence over all experts, or
                return each head's?
            is_causal: Says that ``attn_mask`` is the causal mask; it has to be given.

        Returns:
            Output ``(N, L, units)``, and the weights, ``(N, L, S)`` or ``(N, heads, L, S)``, or
            ``None``.

        Raises:
            LayoutError: Shapes or mask types that do not fit.
        """
        if is_causal and attn_mask is None:
            raise LayoutError("is_causal is a hint about attn_mask; pass the causal mask as well")
        check_floats(query=query, key=key, value=value)
        check_beside(query, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        shared = (query is key, key is value)
        batched = query.dim() == 3
        query, key, value = (self._batch_first(t, batched) for t in (query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        self._check(query, key, value, key_padding_mask, attn_mask)
        if key_padding_mask is not None:
            absent = _hidden(key_padding_mask).unsqueeze(-1)
            key = key.masked_fill(absent, 0)
            query = key if shared[0] else query
            value = key if shared[1] else value.masked_fill(absent, 0)
        projected = self._project(query, key, value, shared)
        q, k, v = (self._split_heads(t, scale=t is projected[0]) for t in projected)
        mask, nothing = _joined(key_padding_mask, attn_mask, q)
        heads, weights = self._attend(q, k, v, mask, nothing, need_weights)
        output: Tensor = self.out_proj(self._join_heads(heads))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if x.dim() != (3 if batched else 2):
            raise LayoutError(
                "query, key and value must all be (N, steps, units) or all (steps, units), got "
                f"one of {tuple(x.shape)}"
            )
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        batch, steps = key.shape[:2]
        if value.shape[:2] != key.shape[:2] or query.shape[0] != batch:
            raise LayoutError(
                "query must be (N, L, units), key and value (N, S, kv units), got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)} (batch first)"
            )
        pairs = (query.shape[1], steps)
        shapes = {
            "key_padding_mask": (padding, ((batch, steps),)),
            "attn_mask": (attn_mask, (pairs, (batch * self.num_heads, *pairs))),
        }
        for name, (mask, expected) in shapes.items():
            if mask is None:
                continue
            if tuple(mask.shape) not in expected:
                raise LayoutError(
                    f"{name} must be {' or '.join(map(str, expected))}, got {tuple(mask.shape)}"
                )
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise LayoutError(f"{name} must be bool or floating-point, got {mask.dtype}")

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, shared: tuple[bool, bool]
    ) -> tuple[Tensor, ...]:
        if self.in_proj is not None:
            if all(shared):
                return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
            q, joined, first = self.in_proj.run(query, 0, 1), self.in_proj, 1
        elif self.q_proj is not None and self.kv_proj is not None:
            q, joined, first = self.q_proj(query), self.kv_proj, 0
        if shared[1]:
            return q, *joined.run(key, first, first + 2).chunk(2, -1)
        return (
            q,
            joined.run(key, first, first + 1),
            joined.run(value, first + 1, first + 2),
        )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        nothing: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Heads ``(N, heads, L, widest head)`` and, if wanted, the weights."""
        drop = self.dropout if self.training else 0.0
        # Heads of different widths were scaled by _split_heads.
        scale = self.head_dims[0] ** -0.5 if self._uniform else 1.0
        weights = None
        if need_weights:
            weights = _weights(q * scale, k, mask, nothing)
            heads = F.dropout(weights, drop) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, drop, scale=scale)
            if nothing is not None:
                heads = heads.masked_fill(nothing, 0)
        return heads, weights

    @property
    def _uniform(self) -> bool:
        return min(self.head_dims) == max(self.head_dims)

    def _split_heads(self, x: Tensor, scale: bool) -> Tensor:
        """``(N, steps, units)`` to ``(N, heads, steps, widest head)``."""
        if self._uniform:
            heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dims[0]))
            return heads.transpose(1, 2)
        widest = max(self.head_dims)
        parts: Sequence[Tensor] = x.split_with_sizes(self.head_dims, -1)
        if scale:  # each head by its own sqrt(d): the call for all heads takes one scale
            parts = [part * part.shape[-1] ** -0.5 for part in parts]
        # Heads are padded with zeros to the widest one, which changes no score.
        return torch.stack([F.pad(part, (0, widest - part.shape[-1])) for part in parts], 1)

    def _join_heads(self, heads: Tensor) -> Tensor:
        """The inverse of :meth:`_split_heads`."""
        if self._uniform:
            return heads.transpose(1, 2).flatten(-2)
        parts = zip(heads.unbind(1), self.head_dims, strict=True)
        return torch.cat([part[..., :units] for part, units in parts], -1)

    def extra_repr(self) -> str:
        """Heads, for ``print(layer)``."""
        return f"heads={self.num_heads}, head_dims={self.head_dims}"


def _head_dims(family: SubsetFamily, width: Width, heads: Width) -> tuple[int, ...]:
    """Units of each head, expert by expert."""
    widths = block_sizes("width", width, family.num_experts)
    counts = block_sizes("heads", heads, family.num_experts)
    for name, units, count in zip(family.names, widths, counts, strict=True):
        if units % count:
            raise LayoutError(
                f"expert {name!r} has {units} units, which {count} heads cannot share evenly; "
                "choose a width that is a multiple of its heads"
            )
    return tuple(
        units // count for units, count in zip(widths, counts, strict=True) for _ in range(count)
    )


def _hidden(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == -torch.inf


def _joined(
    padding: Tensor | None, attn_mask: Tensor | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks as one for scaled_dot_product_attention, and which queries see no step.

    torch's kernels disagree about a softmax over no steps. So a query that sees none is given all
    of them, and its heads are set to zero afterwards.
    """
    masks = []
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if attn_mask is not None:
        own = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, q.shape[:2]) if own else attn_mask[None, None])
    if not masks:
        return None, None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        nothing = hidden.all(-1, keepdim=True)
        return ~hidden | nothing, nothing
    zero = q.new_zeros(())
    scores = [
        torch.where(mask, -torch.inf, zero) if mask.dtype == torch.bool else mask.to(q.dtype)
        for mask in masks
    ]
    added = scores[0] if len(scores) == 1 else scores[0] + scores[1]
    nothing = _hidden(added).all(-1, keepdim=True)
    return added.masked_fill(nothing, 0), nothing


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, nothing: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    weights = scores.softmax(-1)
    return weights if nothing is None else weights.masked_fill(nothing, 0)
