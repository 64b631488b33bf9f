"""The session Transformers: blind in value and in padding, isolated, equal to plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import BlockLayout, LayoutError, SubsetFamily, gem_loss, mixture
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.models import (
    InterpretableTransformer,
    Transformer,
    half_layout,
)
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated
from tests.arrival import assert_arrives
from tests.models.sessions import batch, first_layer, halves, side_by_side, spoilt
from tests.nn import per_expert
from tests.nn.per_expert import POISON, fewer, gradients, same_bits, seeds

ONE = SubsetFamily({"a": 5, "b": 2}, {"all": ["a", "b"]})
CUBE = SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})
SECOND = {"c": 2, "a": 1}
PAIR = SubsetFamily({"a": 1, "b": 1}, {"a": ["a"], "b": ["b"], "both": ["a", "b"]})


@st.composite
def models(draw, max_experts=4, dtype=torch.float64):
    family, second, width, first = draw(halves(max_experts))
    torch.manual_seed(draw(seeds))
    inner = draw(st.sampled_from([None, 2]))
    return InterpretableTransformer(
        family, second, width, 1, 1, inner, first_groups=first, dtype=dtype
    )


# --- Who sees what: the two halves -----------------------------------------------------------


def test_sessions_of_the_paper():
    family, second = skip_sessions()
    assert (family.num_experts, family.in_features) == (8, 73)
    assert second == {"position": 2, "popularity": 3, "music": 26}
    assert all("position" in groups for groups in family.subsets.values())
    assert [len(groups) - 1 for groups in family.subsets.values()] == [1, 1, 1, 1, 2, 2, 3, 4]
    model = InterpretableTransformer(family, second, layers=1)
    assert model(*batch(model, dtype=torch.float32)).shape == (3, 4, 8)


def test_halves_join_by_the_whole_subsets():
    """Two experts whose parts in B are equal do not read each other, in any layer."""
    family, second = skip_sessions()
    model = InterpretableTransformer(family, second, width=4, layers=1)
    rule = torch.tensor(
        [
            [{*inner} <= {*outer} for inner in family.subsets.values()]
            for outer in family.subsets.values()
        ]
    )
    joined = BlockLayout.between(family, family, 4, 4)
    assert torch.equal(joined.present, rule)
    assert torch.equal(joined.routes_grad, torch.eye(8, dtype=torch.bool))
    block = model.decoder[0]
    for layer in (block.attention.in_proj, block.cross.q_proj, block.cross.kv_proj, model.head):
        layout = layer.layout
        times = len(layout.row_sizes) // 8
        assert torch.equal(layout.present, rule.repeat(times, 1))
        assert torch.equal(layout.routes_grad, torch.eye(8, dtype=torch.bool).repeat(times, 1))
    seen = half_layout(family, second, 4).present
    assert seen[0].tolist() == seen[1].tolist() == [True, False, False]
    data = batch(model, seed=1, dtype=torch.float32)
    before, context = model(*data), slice(2, 15)
    data[0][..., context] += 1
    moved = (model(*data) != before).flatten(0, 1).any(0)
    assert moved.tolist() == ["context" in groups for groups in family.subsets.values()]


@fewer
@given(models(max_experts=3, dtype=torch.float32), seeds)
def test_experts_are_blind_in_both_halves(model, seed):
    data = batch(model, 2, (3, 3), seed, torch.float32)
    run, visible = side_by_side(model, data[2:])
    assert_blind(run, torch.cat(data[:2], -1), visible)
    unpadded, _ = side_by_side(model, ())
    sample = torch.cat(data[:2], -1)[0, 0]
    assert_arrives(lambda t: unpadded(t[:, None])[:, 0], sample, visible)


@fewer
@given(models(dtype=torch.float32), st.sampled_from(POISON), seeds)
def test_padding_changes_nothing(model, poison, seed):
    data = batch(model, 2, (3, 3), seed, torch.float32)
    poison = min(poison, torch.finfo(torch.float32).max) if poison == 1e300 else poison
    outcomes = []
    for fill in (0.5, poison):
        logits = model(*spoilt(data, fill))
        outcomes.append([logits, *gradients(logits, model.parameters(), seed)])
    assert all(same_bits(a, b) for a, b in zip(*outcomes, strict=True))
    assert all(t.isfinite().all() for t in outcomes[1])


@fewer
@given(models(max_experts=6), seeds)
def test_each_loss_moves_its_own_expert(model, seed):
    assert_gradient_isolated(model, batch(model, seed=seed), model.family)


# --- One plain Transformer per expert --------------------------------------------------------


def feedforward(layers, x, family):
    for k, layer in enumerate(layers):
        layout = layer.layout
        parts, reading = x.split(list(layout.col_sizes), -1), per_expert.reads(family)
        dense = layer.dense_weight()
        x = torch.cat(per_expert.linear(dense, layer.bias, parts, layout.row_sizes, reading), -1)
        x = F.leaky_relu(x) if k == 0 and len(layers) > 1 else x
    return x


def plain(model, first, second, first_padding, second_padding):
    """The definition, layer by layer; steps that are padding are hidden from every attention."""
    family = model.family

    def attend(module, norm, x, key, padding):
        return per_expert.norm(norm, x + per_expert.attention(module, x, key, key, padding)[0])

    def think(block, x):
        return per_expert.norm(
            block.feedforward_norm, x + feedforward(block.feedforward, x, family)
        )

    memory = first_layer(model.first_input, first, family, model.first_groups)
    for block in model.encoder:
        memory = attend(block.attention, block.attention_norm, memory, memory, first_padding)
        memory = think(block, memory)
    x = first_layer(model.second_input, second, family, model.second_groups)
    for block in model.decoder:
        x = attend(block.attention, block.attention_norm, x, x, second_padding)
        x = attend(block.cross, block.cross_norm, x, memory, first_padding)
        x = think(block, x)
    return feedforward([model.head], x, family)


@fewer
@given(models(max_experts=3), seeds)
def test_equals_plain_experts(model, seed):
    data = batch(model, 2, (3, 3), seed)
    there = ~data[3]
    leaves = [x.requires_grad_() for x in data[:2]] + list(model.parameters())
    ours, expected = model(*data)[there], plain(model, *data)[there]
    torch.testing.assert_close(ours, expected)
    if expected.numel():
        torch.testing.assert_close(gradients(ours, leaves, seed), gradients(expected, leaves, seed))


# --- One expert that sees everything is the black box ------------------------------------------


def twins(layers=2):
    torch.manual_seed(0)
    ours = InterpretableTransformer(ONE, {"b": 3}, 6, 2, layers, 5, dtype=torch.float64)
    torchs = Transformer(7, 3, 6, 2, layers, 5, dtype=torch.float64)

    def copy_linear(to, weight, bias):
        to.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})

    def copy_attention(to, source):
        weight, bias = source.in_proj_weight, source.in_proj_bias
        if to.in_proj is not None:
            copy_linear(to.in_proj, weight, bias)
        else:
            copy_linear(to.q_proj, weight[:6], bias[:6])
            copy_linear(to.kv_proj, weight[6:], bias[6:])
        copy_linear(to.out_proj, source.out_proj.weight, source.out_proj.bias)

    for parameter in torchs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name in ("first_input", "second_input", "head"):
        layer = getattr(torchs, name)
        copy_linear(getattr(ours, name), layer.weight, layer.bias)
    for mine, its in zip(
        [*ours.encoder, *ours.decoder], [*torchs.encoder, *torchs.decoder], strict=True
    ):
        copy_attention(mine.attention, its.self_attn)
        mine.attention_norm.load_state_dict(its.norm1.state_dict())
        if hasattr(mine, "cross"):
            copy_attention(mine.cross, its.multihead_attn)
            mine.cross_norm.load_state_dict(its.norm2.state_dict())
        last = its.norm3 if hasattr(mine, "cross") else its.norm2
        mine.feedforward_norm.load_state_dict(last.state_dict())
        for layer, source in zip(mine.feedforward, (its.linear1, its.linear2), strict=True):
            copy_linear(layer, source.weight, source.bias)
    return ours, torchs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_is_the_black_box(padded, training):
    ours, torchs = (model.train(training) for model in twins())
    data = batch(ours, 5, seed=3)
    if padded:
        data[2][:, 0] = False  # torch has no answer where nothing can be seen
        data[3][:, 0] = False
    else:
        data = (*data[:2], None, None)
    leaves = [x.requires_grad_() for x in data[:2]]
    there = ~data[3] if padded else torch.ones(5, 4, dtype=torch.bool)
    a, b = ours(*data)[there].squeeze(-1), torchs(*data)[there]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(a, leaves), gradients(b, leaves))
    # Sums over all units, so that no packing matters: each layer's own gradient.
    mine = [p.sum() for p in gradients(a, ours.head.parameters())]
    torch.testing.assert_close(mine, [p.sum() for p in gradients(b, torchs.head.parameters())])


def test_black_box_is_as_wide_as_the_experts():
    model = Transformer(73, 31)
    assert model.head.in_features == 128 == 8 * 16
    data = batch(model, dtype=torch.float32)
    data[2][0] = data[3][1] = True  # nothing to see in one half
    logits = model(*data)
    assert logits.shape == (3, 4)
    assert logits.isfinite().all()
    torch.testing.assert_close(model.predict(*data), logits.sigmoid())
    for fill in (torch.nan, torch.inf):
        assert torch.equal(model(*spoilt(data, fill)), logits)


# --- A torch module --------------------------------------------------------------------------


def small(layers=1, **options):
    torch.manual_seed(0)
    return InterpretableTransformer(CUBE, SECOND, 4, 2, layers, **options)


def test_predicts_with_attribution():
    model = small()
    data = batch(model, dtype=torch.float32)
    for options in ({}, {"confidence": "square", "sharpness": 2.0}):
        ours = model.predict(*data, **options)
        expected = mixture(model(*data), CUBE, **options)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)
    assert not ours.probability.requires_grad
    assert ours.probability.shape == (3, 4)
    torch.testing.assert_close(ours.attribution.sum(-1), torch.ones(3, 4))


def test_learns():
    """A label that the context of A decides: the loss falls, and the experts that see it know."""
    torch.manual_seed(0)
    model = InterpretableTransformer(PAIR, {"b": 1}, 8, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first, second = torch.randn(64, 3, 2), torch.randn(64, 3, 1)
    target = (first[:, -1, :1] > 0).float().expand(64, 3)
    first[:, :-1] = first[:, -1:]
    losses = []
    for _ in range(60):
        loss = gem_loss(model(first, second), target, model.family, normalize="sample")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    right = ((model(first, second) > 0) == target[..., None].bool()).float().mean((0, 1))
    assert right[0] > 0.95
    assert right[1] < 0.8


def test_compiles_whole():
    torch._dynamo.reset()
    model = InterpretableTransformer(PAIR, {"b": 1}, 4, 2, 1)
    data = batch(model, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*data), model(*data)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        gradients(ours, model.parameters()), gradients(theirs, model.parameters()),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("make", [small, lambda: Transformer(6, 3, 8, 2, 1)])
def test_autocast_copies_and_empty_batches(make):
    model = make()
    data = batch(model, dtype=torch.float32)
    expected = model(*data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(*data)
    torch.testing.assert_close(low.float(), expected, rtol=5e-2, atol=5e-2)
    fresh = make()
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model)):
        assert torch.equal(other(*data), expected)
    if isinstance(model, InterpretableTransformer):  # torch's attention refuses an empty mask
        assert model(*(t[:0] for t in data)).shape == (0, 4, 7)
    torch.testing.assert_close(model(*data[:2]), model(*data[:2], *(t & False for t in data[2:])))


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match=r"second_groups names \['d'\]"):
        InterpretableTransformer(CUBE, {"a": 1, "d": 2})
    with pytest.raises(LayoutError, match=r"first_groups names \['d'\]"):
        InterpretableTransformer(CUBE, {"a": 1}, first_groups={"d": 2})
    with pytest.raises(LayoutError, match="second_groups must hold integers"):
        InterpretableTransformer(CUBE, {})
    with pytest.raises(LayoutError, match="layers must be at least 1, got 0"):
        small(0)
    with pytest.raises(LayoutError, match="width=10 must be a multiple of heads=4"):
        Transformer(6, 3, 10, 4)
    model = small()
    first, second, *padding = batch(model, dtype=torch.float32)
    with pytest.raises(LayoutError, match=r"second must be \(B, T, 3\)"):
        model(first, second[..., :2])
    with pytest.raises(LayoutError, match=r"as many sessions as the other half"):
        model(first, second[:2])
    with pytest.raises(LayoutError, match=r"first_padding must be bool \(3, 3\), got torch\.int64"):
        model(first, second, padding[0].long())
    with pytest.raises(LayoutError, match=r"second_padding must be bool \(3, 4\)"):
        model(first, second, *padding[:1], padding[1][:, :2])
