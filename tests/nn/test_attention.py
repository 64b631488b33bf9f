"""``MaskedMultiheadAttention``: blind in value and in padding, isolated, equal to plain PyTorch."""

import copy
import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskmoe_kernels import BlockLayout, LayoutError, MaskedLinear, SubsetFamily
from maskmoe_kernels.nn import MaskedMultiheadAttention
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated
from maskmoe_kernels.testing.strategies import families
from tests.arrival import assert_arrives
from tests.nn import per_expert
from tests.nn.per_expert import POISON, fewer, gradients, same_bits, seeds

ONE = SubsetFamily({"a": 5}, {"all": ["a"]})
CUBE = SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})
SQUARE = SubsetFamily.powerset({"a": 1, "b": 1})
MASKS = ("none", "bool", "float")
ATTN_MASKS = (*MASKS, "bool per head", "float per head")


def masks(kind, attn_kind, batch, heads, queries, keys, seed):
    """A key padding mask and an attention mask; of each kind, and with rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(kind, *shape):
        if kind == "none":
            return None
        hidden = torch.rand(shape, generator=generator) < 0.4
        if "bool" in kind:
            return hidden
        added = torch.randn(shape, generator=generator, dtype=torch.float64)
        return added.masked_fill(hidden, -torch.inf)

    shape = (batch * heads, queries, keys) if "head" in attn_kind else (queries, keys)
    return draw(kind, batch, keys), draw(attn_kind, *shape)


@st.composite
def modules(draw, dtype=torch.float64, max_experts=6, batch_first=True):
    """Self-attention, or attention to another family, with ragged widths and heads."""
    family = draw(families(max_experts))
    kv_family = draw(st.sampled_from([None, family, "other"]))
    kv_family = draw(families(max_experts)) if kv_family == "other" else kv_family
    counts = st.lists(st.integers(1, 2), min_size=family.num_experts, max_size=family.num_experts)
    heads = draw(st.one_of(st.integers(1, 2), counts))
    each = heads if isinstance(heads, list) else [heads] * family.num_experts
    dims = draw(st.one_of(st.integers(1, 3).map(lambda d: [d] * len(each)), counts))
    torch.manual_seed(draw(seeds))
    return MaskedMultiheadAttention(
        family,
        [count * d for count, d in zip(each, dims, strict=True)],
        heads,
        kv_family,
        None if kv_family is None else draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=batch_first,
        dtype=dtype,
    )


def features(module):
    """Units of the query, and of key and value."""
    own = module.out_proj.in_features
    return own, own if module.kv_proj is None else module.kv_proj.in_features


def inputs(module, batch=2, queries=3, keys=4, dtype=torch.float64):
    """Query, key, value: three different tensors."""
    own, others = features(module)
    shapes = [(batch, queries, own), (batch, keys, others), (batch, keys, others)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


# --- One plain attention per expert -----------------------------------------------------------


@fewer
@given(modules(), st.sampled_from(MASKS), st.sampled_from(ATTN_MASKS), st.booleans(), seeds)
def test_equals_plain_experts(module, kind, attn_kind, together, seed):
    query, key, value = inputs(module)
    if together:
        value = key
        if module.in_proj is not None:
            query = key
    padding, attn_mask = masks(
        kind, attn_kind, 2, module.num_heads, query.shape[1], key.shape[1], seed
    )
    plain = [query, key, value]
    if padding is not None:  # zeros, so that rows of padding agree as well
        absent = (padding if padding.dtype == torch.bool else padding == -torch.inf)[..., None]
        plain[1:] = [t.masked_fill(absent, 0) for t in plain[1:]]
        plain[0] = plain[1] if query is key else query
    expected, weights = per_expert.attention(module, *plain, padding, attn_mask)
    leaves = {id(t): t for t in (query, key, value)}.values()
    leaves = [*leaves, *module.parameters()]
    wanted = gradients(expected, leaves, seed)
    for need_weights, average in ((False, True), (True, True), (True, False)):
        output, got = module(query, key, value, padding, need_weights, attn_mask, average)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradients(output, leaves, seed), wanted)
        if need_weights:
            torch.testing.assert_close(got, weights.mean(1) if average else weights)
            again = gradients(weights.mean(1) if average else weights, leaves, seed)
            torch.testing.assert_close(gradients(got, leaves, seed), again)
        else:
            assert got is None


# --- One expert that sees everything is torch's module -----------------------------------------


def twins(heads=3, bias=True, batch_first=True, kv_width=None):
    torch.manual_seed(0)
    ours = MaskedMultiheadAttention(
        ONE, 12, heads, None if kv_width is None else ONE, kv_width, bias=bias,
        batch_first=batch_first, dtype=torch.float64,
    )  # fmt: skip
    torchs = nn.MultiheadAttention(
        12, heads, bias=bias, batch_first=batch_first, kdim=kv_width, vdim=kv_width,
        dtype=torch.float64,
    )  # fmt: skip
    for parameter in torchs.parameters():
        nn.init.normal_(parameter, std=0.4)
    state = torchs.state_dict()
    if kv_width is None:
        ours.in_proj.load_state_dict({"weight": state["in_proj_weight"]}, strict=False)
        pairs = [(ours.in_proj, "in_proj_bias", slice(None))]
    else:
        ours.q_proj.load_state_dict({"weight": state["q_proj_weight"]}, strict=False)
        both = torch.cat([state["k_proj_weight"], state["v_proj_weight"]])
        ours.kv_proj.load_state_dict({"weight": both}, strict=False)
        pairs = [
            (ours.q_proj, "in_proj_bias", slice(12)),
            (ours.kv_proj, "in_proj_bias", slice(12, None)),
        ]
    ours.out_proj.load_state_dict({"weight": state["out_proj.weight"]}, strict=False)
    if bias:
        for layer, name, part in [*pairs, (ours.out_proj, "out_proj.bias", slice(None))]:
            layer.bias.data.copy_(state[name][part])
    return ours, torchs


def weight_gradients(module, output, seed):
    """Dense gradients of q, k and v's weight together, and of the output's."""
    if isinstance(module, nn.MultiheadAttention):
        joined = module.in_proj_weight
        leaves = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        leaves = [joined] if joined is not None else leaves
        *parts, out = gradients(output, [*leaves, module.out_proj.weight], seed)
        sizes = [part.numel() for part in parts]
        return torch.cat([part.flatten() for part in parts]), out.flatten(), sum(sizes)
    layers = [module.in_proj] if module.in_proj is not None else [module.q_proj, module.kv_proj]
    layers.append(module.out_proj)
    grads = gradients(output, [layer.weight for layer in layers], seed)
    *parts, out = (
        layer.layout.unpack(grad).flatten() for layer, grad in zip(layers, grads, strict=True)
    )
    return torch.cat(parts), out, sum(part.numel() for part in parts)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@fewer
@given(
    st.sampled_from(MASKS), st.sampled_from(ATTN_MASKS), st.booleans(), st.booleans(),
    st.sampled_from([None, 7]), seeds,
)  # fmt: skip
def test_one_expert_is_multihead_attention(kind, attn_kind, bias, batch_first, kv_width, seed):
    ours, torchs = twins(bias=bias, batch_first=batch_first, kv_width=kv_width)
    query, key, value = inputs(ours)
    padding, attn_mask = masks(kind, attn_kind, 2, 3, 3, 4, seed)
    # torch gives NaN to a query that sees nothing, so every query sees one step.
    if padding is not None:
        padding[:, 1] = 0
    if attn_mask is not None:
        attn_mask[..., 1] = 0
    if not batch_first:
        query, key, value = (
            t.detach().transpose(0, 1).requires_grad_() for t in (query, key, value)
        )
    leaves = (query, key, value)
    for need_weights, average in ((False, True), (True, True), (True, False)):
        call = (*leaves, padding, need_weights, attn_mask, average)
        (a, weights_a), (b, weights_b) = ours(*call), torchs(*call)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(weights_a, weights_b)
        torch.testing.assert_close(gradients(a, leaves, seed), gradients(b, leaves, seed))
        torch.testing.assert_close(
            weight_gradients(ours, a, seed), weight_gradients(torchs, b, seed)
        )


@pytest.mark.parametrize("kind", MASKS)
def test_one_expert_is_self_attention(kind):
    ours, torchs = twins()
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    padding, _ = masks(kind, "none", 3, 3, 5, 5, 1)
    keep = torch.ones(3, 5, dtype=torch.bool)
    if padding is not None:
        padding[:, 0] = 0
        keep = padding == 0 if kind == "bool" else padding > -torch.inf
    # At padded steps the output means nothing, and ours does not look at them.
    a, b = (module(x, x, x, padding)[0][keep] for module in (ours, torchs))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(a, [x]), gradients(b, [x]))
    torch.testing.assert_close(weight_gradients(ours, a, 0), weight_gradients(torchs, b, 0))


def test_one_expert_unbatched_and_causal():
    ours, torchs = twins(batch_first=False)
    x = torch.randn(5, 12, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    hidden = torch.tensor([False, False, True, False, True])
    for mask, padding in itertools.product((causal, causal == -torch.inf), (None, hidden)):
        keep = ~hidden if padding is not None else slice(None)
        for need in (False, True):
            options = {"need_weights": need, "attn_mask": mask, "is_causal": True}
            if padding is not None and mask.dtype != torch.bool:
                options["key_padding_mask"] = (
                    torch.zeros(5).double().masked_fill(hidden, -torch.inf)
                )
            elif padding is not None:
                options["key_padding_mask"] = padding
            (a, wa), (b, wb) = ours(x, x, x, **options), torchs(x, x, x, **options)
            assert a.shape == (5, 12)
            torch.testing.assert_close(a[keep], b[keep])
            if need:
                torch.testing.assert_close(wa[keep], wb[keep])
    longer = torch.randn(2, 5, 12, dtype=torch.float64)  # steps come first here
    torch.testing.assert_close(ours(longer, longer, longer), torchs(longer, longer, longer))


# --- What stays true of every module ---------------------------------------------------------


@fewer
@given(modules(dtype=torch.float32, max_experts=4), st.booleans())
def test_experts_are_blind_to_what_lies_outside(module, need_weights):

    def of_sequences(*rows, need_weights=need_weights):
        """The output of the second of two steps, for each row as that step."""
        count = max(len(row) for row in rows if row.dim() == 2)
        steps = [row.expand(count, -1)[:, None] for row in rows]
        finite = [torch.cat([s.nan_to_num(), s], 1) for s in steps]
        return module(*finite, need_weights=need_weights)[0][:, 1]

    own = module.out_proj.layout.mask()
    x = torch.randn(2, 3, module.out_proj.in_features)
    if module.in_proj is not None:
        assert_blind(lambda t: module(t, t, t, need_weights=need_weights)[0], x, own)
        assert_blind(lambda t: module(t, x, x, need_weights=need_weights)[0], x, own)
        assert_arrives(lambda t: of_sequences(t, t, t), x[0, 0], own)
        # torch's attention on the CPU makes numbers of a NaN query, unless weights are asked for.
        alone = functools.partial(of_sequences, need_weights=True)
        assert_arrives(lambda t: alone(t, x[0, 0], x[0, 0]), x[0, 0], own)
        return
    # Unit o reads expert j's units of another family iff its own expert includes S_j.
    other = torch.randn(2, 3, module.kv_proj.in_features)
    widths = module.out_proj.layout.row_sizes
    between = BlockLayout.between(
        module.family, module.kv_family, widths, module.kv_proj.layout.col_sizes
    ).mask()
    assert_blind(lambda t: module(x, t, t, need_weights=need_weights)[0], other, between)
    assert_arrives(lambda t: of_sequences(x[0, 0], t, t), other[0, 0], between)
    assert_arrives(lambda t: of_sequences(x[0, 0], other[0, 0], t), other[0, 0], between)


@given(modules(dtype=torch.float32), st.sampled_from(POISON), st.booleans(), st.booleans(), seeds)
def test_padding_changes_nothing(module, poison, need_weights, as_float, seed):
    torch.manual_seed(seed)
    query, key, value = (t.detach() for t in inputs(module, keys=5, dtype=torch.float32))
    padding = torch.rand(2, 5) < 0.5
    mask = torch.zeros(2, 5).masked_fill(padding, -torch.inf) if as_float else padding
    poison = min(poison, torch.finfo(torch.float32).max) if poison == 1e300 else poison

    def outcome(fill, together):
        filled = [t.masked_fill(padding[..., None], fill).requires_grad_() for t in (key, value)]
        call = (query.clone().requires_grad_(), *filled)
        if together:  # self-attention, or one tensor for key and value
            call = (filled[0] if module.in_proj is not None else call[0], filled[0], filled[0])
        output, _ = module(*call, mask, need_weights)
        leaves = {id(t): t for t in (*call, *module.parameters())}.values()
        return [output, *gradients(output, leaves, seed)]

    for together in (False, True):
        clean, spoilt = outcome(0.5, together), outcome(poison, together)
        assert all(same_bits(a, b) for a, b in zip(clean, spoilt, strict=True))
        assert all(t.isfinite().all() for t in spoilt)


class Judged(nn.Module):
    """Attention with a head on top: one logit per expert."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        widths = attention.out_proj.layout.row_sizes
        self.head = MaskedLinear.from_layout(
            attention.family.hidden_layout(widths, 1), dtype=torch.float64
        )

    def forward(self, query, key):
        own = self.attention.in_proj is not None
        return self.head(self.attention(key if own else query, key, key)[0])


@given(modules(max_experts=8))
def test_each_loss_moves_its_own_expert(module):
    query, key, _ = inputs(module)
    assert_gradient_isolated(Judged(module), (query, key), module.family)


def test_gradient_reaches_the_own_state_only():
    module = MaskedMultiheadAttention(CUBE, 4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 3, 28, dtype=torch.float64, requires_grad=True)
    output, _ = module(x, x, x)
    for i, part in enumerate(output.split(4, -1)):
        (grad,) = gradients(part, [x])
        moved = grad.view(2, 3, 7, 4).any(-1).flatten(0, 1).any(0)
        assert moved.tolist() == [j == i for j in range(7)]


# --- A query that sees nothing ---------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["padding", "attn_mask", "float", "no steps"])
def test_who_sees_nothing_gets_the_bias(kind, need_weights):
    module = MaskedMultiheadAttention(CUBE, 4, batch_first=True)
    x = torch.randn(2, 3, 28, requires_grad=True)
    everything = torch.ones(2, 3, dtype=torch.bool)
    options = {
        "padding": {"key_padding_mask": everything},
        "attn_mask": {"attn_mask": torch.ones(3, 3, dtype=torch.bool)},
        "float": {"key_padding_mask": torch.full((2, 3), -torch.inf)},
        "no steps": {},
    }[kind]
    key = x[:, :0] if kind == "no steps" else x
    output, weights = module(x, key, key, need_weights=need_weights, **options)
    assert torch.equal(output, module.out_proj.bias.expand(2, 3, 28))
    if need_weights:
        assert not weights.any()
    grads = gradients(output, [x, *module.parameters()])
    assert not grads[0].any()
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[-1].any()


# --- A torch module --------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(4, 2), ([4, 2, 3], [2, 1, 3])], ids=["uniform", "ragged"])
def test_compiles_whole(widths):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = MaskedMultiheadAttention(SQUARE, *widths, batch_first=True)
    x = torch.randn(3, 5, module.out_proj.in_features, requires_grad=True)
    other = torch.randn(3, 4, module.out_proj.in_features, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for call in ((x, x, x), (x, other, other)):
        padding = torch.rand(call[1].shape[:2]) < 0.5
        ours, theirs = (
            m(*call, key_padding_mask=padding, need_weights=False)[0] for m in (compiled, module)
        )
        torch.testing.assert_close(ours, theirs)
        leaves = [x, *module.parameters()]
        torch.testing.assert_close(
            gradients(ours, leaves), gradients(theirs, leaves), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_autocast_stays_close(need_weights, as_float):
    torch.manual_seed(0)
    module = MaskedMultiheadAttention(CUBE, 4, 2, batch_first=True)
    x = torch.randn(3, 5, 28)
    mask = torch.rand(3, 5) < 0.3
    mask = torch.zeros(3, 5).masked_fill(mask, -torch.inf) if as_float else mask
    expected, _ = module(x, x, x, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(x, x, x, mask, need_weights)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=3e-2)
    low = copy.deepcopy(module).bfloat16()
    output, _ = low(*[x.bfloat16()] * 3, mask, need_weights)
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=5e-2)


def test_copies_saves_and_takes_empty_batches():
    torch.manual_seed(0)
    module, fresh = (MaskedMultiheadAttention(CUBE, 4, batch_first=True) for _ in range(2))
    x = torch.randn(2, 3, 28)
    assert not torch.equal(module(x, x, x)[0], fresh(x, x, x)[0])
    fresh.load_state_dict(module.state_dict())
    for other in (fresh, copy.deepcopy(module)):
        assert torch.equal(module(x, x, x)[0], other(x, x, x)[0])
    padding, causal = torch.ones(0, 3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    for need in (False, True):
        output, weights = module(*[x[:0]] * 3, padding, need, causal)
        assert output.shape == (0, 3, 28)
        assert weights is None or weights.shape == (0, 3, 3)


def test_dropout_in_training_only():
    torch.manual_seed(0)
    module = MaskedMultiheadAttention(CUBE, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 3, 28)
    for need in (False, True):
        module.train()
        assert not torch.equal(
            module(x, x, x, need_weights=need)[0], module(x, x, x, need_weights=need)[0]
        )
        module.eval()
        assert torch.equal(
            module(x, x, x, need_weights=need)[0], module(x, x, x, need_weights=need)[0]
        )


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match="expert 'a' has 5 units, which 2 heads"):
        MaskedMultiheadAttention(CUBE, 5, 2)
    with pytest.raises(LayoutError, match="kv_width=3 needs kv_family"):
        MaskedMultiheadAttention(CUBE, 4, kv_width=3)
    with pytest.raises(LayoutError, match=r"dropout must be a probability, got 1\.5"):
        MaskedMultiheadAttention(CUBE, 4, dropout=1.5)
    module = MaskedMultiheadAttention(CUBE, 4, batch_first=True)
    x = torch.zeros(2, 3, 28)
    with pytest.raises(LayoutError, match="pass the causal mask as well"):
        module(x, x, x, is_causal=True)
    with pytest.raises(LayoutError, match=r"key_padding_mask must be \(2, 3\), got \(2, 4\)"):
        module(x, x, x, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(LayoutError, match=r"attn_mask must be \(3, 3\) or \(14, 3, 3\)"):
        module(x, x, x, attn_mask=torch.zeros(2, 3, 3, dtype=torch.bool))
    with pytest.raises(LayoutError, match=r"bool or floating-point, got torch\.int64"):
        module(x, x, x, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(LayoutError, match=r"\(2, 3, 28\), \(1, 3, 28\)"):
        module(x, x[:1], x[:1])
    with pytest.raises(LayoutError, match="all be"):
        module(x, x[0], x[0])
