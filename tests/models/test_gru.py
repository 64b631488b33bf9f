"""The session GRUs: blind in value and in padding, isolated, equal to plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import LayoutError, SubsetFamily, mixture
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.models import GRU, InterpretableGRU
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated
from tests.arrival import assert_arrives
from tests.models.sessions import batch, halves, side_by_side, spoilt
from tests.nn import per_expert
from tests.nn.per_expert import POISON, fewer, gradients, same_bits, seeds

ONE = SubsetFamily({"a": 5, "b": 2}, {"all": ["a", "b"]})
CUBE = SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})
SECOND = {"c": 2, "a": 1}


@st.composite
def models(draw, max_experts=4, dtype=torch.float64):
    family, second, width, first = draw(halves(max_experts))
    torch.manual_seed(draw(seeds))
    layers = draw(st.integers(1, 2))
    return InterpretableGRU(family, second, width, layers, first_groups=first, dtype=dtype)


# --- Who sees what ---------------------------------------------------------------------------


@fewer
@given(models(max_experts=3, dtype=torch.float32), seeds)
def test_experts_are_blind_in_both_halves(model, seed):
    data = batch(model, 2, (2, 2), seed, torch.float32)
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
    assert_gradient_isolated(model, batch(model, 2, (2, 3), seed), model.family)


def test_experts_with_equal_parts_in_the_second_half_stay_apart():
    family, second = skip_sessions()
    torch.manual_seed(0)
    model = InterpretableGRU(family, second)
    data = batch(model, dtype=torch.float32, tail=True)
    before = model(*data)
    assert before.shape == (3, 4, 8)
    data[0][..., 2:15] += 1  # context, which {position, interaction} does not contain
    moved = (model(*data) != before).flatten(0, 1).any(0)
    assert moved.tolist() == ["context" in groups for groups in family.subsets.values()]


# --- One plain network per expert ------------------------------------------------------------


@fewer
@given(models(max_experts=3), seeds)
def test_equals_plain_experts(model, seed):
    data = batch(model, 2, (2, 3), seed, tail=True)
    there = ~data[3]
    lengths = [(~padding).sum(1).tolist() for padding in data[2:]]
    leaves = [x.requires_grad_() for x in data[:2]] + list(model.parameters())
    start = torch.zeros(model.encoder.num_layers, 2, model.encoder.hidden_size).double()
    _, state = per_expert.gru(model.encoder, data[0], start, lengths[0], model.first_groups)
    states, _ = per_expert.gru(model.decoder, data[1], state, lengths[1], model.second_groups)
    head = model.head
    parts, reading = states.split(list(head.layout.col_sizes), -1), per_expert.reads(model.family)
    sizes = head.layout.row_sizes
    expected = per_expert.linear(head.dense_weight(), head.bias, parts, sizes, reading)
    expected, ours = torch.cat(expected, -1)[there], model(*data)[there]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, leaves, seed), gradients(expected, leaves, seed))


# --- One expert that sees everything is the black box ------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_one_expert_is_the_black_box(layers, padded):
    torch.manual_seed(0)
    ours = InterpretableGRU(ONE, {"b": 3}, 6, layers, dtype=torch.float64)
    torchs = GRU(7, 3, 6, layers, dtype=torch.float64)
    for mine, its in ((ours.encoder, torchs.encoder), (ours.decoder, torchs.decoder)):
        for cell, layer in zip(mine.cells, its, strict=True):
            cell.input_gates.load_state_dict(
                {"weight": layer.weight_ih_l0.detach(), "bias": layer.bias_ih_l0.detach()}
            )
            cell.hidden_gates.load_state_dict(
                {"weight": layer.weight_hh_l0.detach(), "bias": layer.bias_hh_l0.detach()}
            )
    ours.head.load_state_dict(torchs.head.state_dict())
    data = batch(ours, 5, tail=True)
    data[2][2] = padded  # a session without a first half: the decoder starts from zeros
    data = data if padded else (*data[:2], None, None)
    there = ~data[3] if padded else torch.ones(5, 4, dtype=torch.bool)
    leaves = [x.requires_grad_() for x in data[:2]]
    a, b = ours(*data)[there].squeeze(-1), torchs(*data)[there]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(a, leaves), gradients(b, leaves))


def test_black_box_is_as_wide_as_the_experts():
    torch.manual_seed(0)
    model = GRU(73, 31, layers=2)
    assert model.head.in_features == 128 == 8 * 16
    data = batch(model, dtype=torch.float32, tail=True)
    logits = model(*data)
    assert logits.shape == (3, 4)
    torch.testing.assert_close(model.predict(*data), logits.sigmoid())
    for fill in (torch.nan, torch.inf):
        assert torch.equal(model(*spoilt(data, fill)), logits)


# --- A torch module --------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return InterpretableGRU(CUBE, SECOND, 3, 2)


def test_predicts_with_attribution():
    model = small()
    data = batch(model, dtype=torch.float32)
    for a, b in zip(model.predict(*data), mixture(model(*data), CUBE), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize("make", [small, lambda: GRU(6, 3, 8, 2)])
def test_autocast_copies_and_empty_batches(make):
    model = make()
    data = batch(model, dtype=torch.float32, tail=True)
    expected = model(*data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(*data)
    torch.testing.assert_close(low.float(), expected, rtol=5e-2, atol=3e-2)
    fresh = make()
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model)):
        assert torch.equal(other(*data), expected)
    if isinstance(model, InterpretableGRU):  # nn.GRU itself refuses an empty batch
        assert model(*(t[:0] for t in data)).shape == (0, 4, 7)


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match=r"second_groups names \['d'\]"):
        InterpretableGRU(CUBE, {"d": 2})
    with pytest.raises(LayoutError, match="num_layers must be at least 1, got 0"):
        InterpretableGRU(CUBE, SECOND, 3, 0)
    with pytest.raises(LayoutError, match="layers must be at least 1, got 0"):
        GRU(6, 3, layers=0)
    model = small()
    first, second, *padding = batch(model, dtype=torch.float32)
    with pytest.raises(LayoutError, match=r"first must be \(B, T, 6\)"):
        model(first[..., :2], second)
    with pytest.raises(LayoutError, match=r"second_padding must be bool \(3, 4\)"):
        model(first, second, padding[0], padding[0])
