"""``MaskedGRU`` and its cell: blind in value and in padding, isolated, equal to plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from maskmoe_kernels import BlockLayout, LayoutError, MaskedLinear, SubsetFamily
from maskmoe_kernels.nn import MaskedGRU, MaskedGRUCell
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated
from maskmoe_kernels.testing.strategies import families
from tests.arrival import assert_arrives
from tests.nn import per_expert
from tests.nn.per_expert import POISON, fewer, gradients, same_bits, seeds, widths

ONE = SubsetFamily({"a": 5}, {"all": ["a"]})
CUBE = SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})


@st.composite
def modules(draw, dtype=torch.float64, max_experts=4):
    """One or two layers with ragged widths, steps last."""
    family = draw(families(max_experts))
    torch.manual_seed(draw(seeds))
    return MaskedGRU(
        family,
        draw(widths(family)),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        batch_first=True,
        dtype=dtype,
    )


several_lengths = st.lists(st.integers(0, 3), min_size=2, max_size=2)


def inputs(module, batch=2, steps=3, dtype=torch.float64):
    x = torch.randn(batch, steps, module.input_size, dtype=dtype)
    hx = torch.randn(module.num_layers, batch, module.hidden_size, dtype=dtype)
    return x.requires_grad_(), hx.requires_grad_()


# --- One plain unit per expert ---------------------------------------------------------------


@fewer
@given(modules(), several_lengths, seeds)
def test_equals_plain_experts(module, lengths, seed):
    x, hx = inputs(module)
    leaves = [x, hx, *module.parameters()]
    # Output and last state side by side: one gradient judges both.
    expected, ours = (
        torch.cat([output, last.transpose(0, 1)], 1)
        for output, last in (
            per_expert.gru(module, x, hx, lengths),
            module(x, hx, lengths=torch.tensor(lengths)),
        )
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, leaves, seed), gradients(expected, leaves, seed))


@pytest.mark.parametrize("start", [False, True])
def test_input_of_other_groups(start):
    """The second half of a session: fewer groups, in another order, the same experts."""
    groups = {"c": 4, "a": 1}
    torch.manual_seed(0)
    sees = torch.tensor([[group in s for group in groups] for s in CUBE.subsets.values()])
    module = MaskedGRU(
        CUBE, 2, batch_first=True, dtype=torch.float64,
        input_layout=BlockLayout([2] * 7, list(groups.values()), sees),
    )  # fmt: skip
    x, hx = inputs(module, 1)
    hx = hx if start else torch.zeros_like(hx)
    expected = per_expert.gru(module, x, hx, [3], groups)
    torch.testing.assert_close(module(x, hx if start else None), expected)


@given(families(5), st.booleans(), seeds)
def test_cell_equals_plain_experts(family, bias, seed):
    torch.manual_seed(seed)
    cell = MaskedGRUCell(family, 3, bias, dtype=torch.float64)
    x = torch.randn(2, family.in_features, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(2, cell.hidden_size, dtype=torch.float64, requires_grad=True)
    whole = MaskedGRU(family, 3, bias=bias, batch_first=True, dtype=torch.float64)
    whole.cells[0] = cell
    expected = per_expert.gru(whole, x[:, None], hx[None], [1, 1])[0][:, 0]
    torch.testing.assert_close(cell(x, hx), expected)
    leaves = [x, hx, *cell.parameters()]
    torch.testing.assert_close(
        gradients(cell(x, hx), leaves, seed), gradients(expected, leaves, seed)
    )
    assert torch.equal(cell(x), cell(x, torch.zeros_like(hx)))


# --- One expert that sees everything is torch's module -----------------------------------------


def twins(layers=1, bias=True, batch_first=False):
    torchs = nn.GRU(5, 4, layers, bias, batch_first, dtype=torch.float64)
    ours = MaskedGRU(ONE, 4, layers, bias, batch_first, dtype=torch.float64)
    for k, cell in enumerate(ours.cells):
        for gates, name in ((cell.input_gates, "ih"), (cell.hidden_gates, "hh")):
            state = {"weight": getattr(torchs, f"weight_{name}_l{k}")}  # dense, as torch has it
            if bias:
                state["bias"] = getattr(torchs, f"bias_{name}_l{k}")
            gates.load_state_dict(state)
    return ours, torchs


def compare(ours, torchs, call, leaves, seed):
    """Values, and gradients to the leaves and to the weights, of output and last state."""
    results = []
    for module in (ours, torchs):
        output, last = module(*call)
        output = output.data if isinstance(output, PackedSequence) else output
        parameters = dict(module.named_parameters())
        for value in (output, last):
            grads = gradients(value, [*leaves, *parameters.values()], seed)
            named = dict(zip(parameters, grads[len(leaves) :], strict=True))
            for k in range(ours.num_layers) if module is ours else ():
                for gates, name in (("input_gates", "ih"), ("hidden_gates", "hh")):
                    layout = getattr(ours.cells[k], gates).layout
                    weight = named.pop(f"cells.{k}.{gates}.weight")
                    named[f"weight_{name}_l{k}"] = layout.unpack(weight)
                    if f"cells.{k}.{gates}.bias" in named:
                        named[f"bias_{name}_l{k}"] = named.pop(f"cells.{k}.{gates}.bias")
            results.append((value, grads[: len(leaves)], named))
    torch.testing.assert_close(results[:2], results[2:])


@fewer
@given(st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_one_expert_is_gru(layers, bias, batch_first, start, seed):
    torch.manual_seed(seed)
    ours, torchs = twins(layers, bias, batch_first)
    shape = (3, 4, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(layers, shape[0 if batch_first else 1], 4, dtype=torch.float64)
    hx.requires_grad_()
    call, leaves = ((x, hx), [x, hx]) if start else ((x,), [x])
    compare(ours, torchs, call, leaves, seed)
    single = (x[0], hx[:, 0]) if start else (x[0],)  # steps, without a batch
    compare(ours, torchs, single, leaves, seed)


@fewer
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.booleans(),
    st.integers(1, 2), seeds,
)  # fmt: skip
def test_one_expert_is_packed_gru(lengths, start, in_order, layers, seed):
    torch.manual_seed(seed)
    ours, torchs = twins(layers)
    lengths = sorted(lengths, reverse=True) if in_order else lengths
    rows = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in lengths]
    hx = torch.randn(layers, len(rows), 4, dtype=torch.float64, requires_grad=True)
    packed = pack_sequence(rows, enforce_sorted=in_order)
    call, leaves = ((packed, hx), [*rows, hx]) if start else ((packed,), rows)
    compare(ours, torchs, call, leaves, seed)
    ours_packed, torchs_packed = ours(*call)[0], torchs(*call)[0]
    assert torch.equal(ours_packed.batch_sizes, torchs_packed.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(ours_packed, name), getattr(torchs_packed, name)
        assert a is b is None or torch.equal(a, b)


def test_one_expert_is_gru_cell():
    torch.manual_seed(0)
    torchs = nn.GRUCell(5, 4, dtype=torch.float64)
    ours = MaskedGRUCell(ONE, 4, dtype=torch.float64)
    ours.input_gates.load_state_dict({"weight": torchs.weight_ih, "bias": torchs.bias_ih})
    ours.hidden_gates.load_state_dict({"weight": torchs.weight_hh, "bias": torchs.bias_hh})
    x, hx = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    for call in ((x, hx), (x,), (x[0], hx[0])):
        torch.testing.assert_close(ours(*call), torchs(*call))
        grads = [gradients(m(*call), [x, hx]) for m in (ours, torchs)]
        torch.testing.assert_close(*grads)


# --- Padding ---------------------------------------------------------------------------------


@fewer
@given(modules(), several_lengths.filter(all), seeds)
def test_lengths_mask_and_packing_agree(module, lengths, seed):
    x, hx = inputs(module)
    there = torch.tensor(lengths)
    results = [
        module(x, hx, lengths=there),
        module(x, hx, padding_mask=torch.arange(3) >= there[:, None]),
    ]
    packed, last = module(pack_padded_sequence(x, there, True, False), hx)
    results.append((pad_packed_sequence(packed, True, total_length=3)[0], last))
    leaves = [x, hx, *module.parameters()]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(gradients(a, leaves, seed), gradients(b, leaves, seed))


@given(modules(), st.lists(st.booleans(), min_size=5, max_size=5))
def test_padding_anywhere_is_as_if_the_step_were_not(module, padded):
    x, hx = inputs(module, 1, 5)
    hidden = torch.tensor(padded)
    output, last = module(x, hx, padding_mask=hidden[None])
    shorter, end = module(x[:, ~hidden], hx)
    torch.testing.assert_close(output[:, ~hidden], shorter)
    torch.testing.assert_close(last, end)
    assert not output[:, hidden].any()
    if hidden.all():
        assert torch.equal(last, hx)


@given(modules(dtype=torch.float32), several_lengths, st.sampled_from(POISON), seeds)
def test_padding_changes_nothing(module, lengths, poison, seed):
    torch.manual_seed(seed)
    x, hx = (t.detach() for t in inputs(module, dtype=torch.float32))
    padded = (torch.arange(3) >= torch.tensor(lengths)[:, None])[..., None]
    poison = min(poison, torch.finfo(torch.float32).max) if poison == 1e300 else poison

    def outcome(fill):
        leaves = [x.masked_fill(padded, fill).requires_grad_(), *module.parameters()]
        output, last = module(leaves[0], hx, lengths=torch.tensor(lengths))
        return [output, last, *gradients(output, leaves, seed), *gradients(last, leaves, seed)]

    clean, spoilt = outcome(0.5), outcome(poison)
    assert all(same_bits(a, b) for a, b in zip(clean, spoilt, strict=True))
    assert all(t.isfinite().all() for t in spoilt)


# --- What stays true of every module ---------------------------------------------------------


@fewer
@given(modules(dtype=torch.float32, max_experts=4))
def test_experts_are_blind_outside_their_subset(module):
    x, hx = (t.detach() for t in inputs(module, 2, 2, torch.float32))
    sizes = torch.tensor(module.cells[0].hidden_gates.layout.col_sizes)
    visible = module.family.visible_features().repeat_interleave(sizes, 0)
    lengths = torch.tensor([1, 2])
    assert_blind(lambda t: module(t, hx, lengths=lengths)[0], x, visible)
    # What the first of two steps saw is in the state of the last.
    later = x[0, 1].expand(module.input_size, -1)
    assert_arrives(lambda t: module(torch.stack([t, later], 1))[0][:, 1], x[0, 0], visible)
    # The first state of a strict subset is seen, but not trained.
    states = module.family.inclusion.repeat_interleave(sizes, 0).repeat_interleave(sizes, 1)
    assert_blind(lambda t: module(x, t.expand(module.num_layers, 2, -1))[0][:, -1], hx[0], states)
    one = x[:1].expand(module.hidden_size, -1, -1)
    assert_arrives(
        lambda t: module(one, t.expand(module.num_layers, *t.shape))[0][:, -1], hx[0, 0], states
    )


class Judged(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        sizes = module.cells[0].hidden_gates.layout.col_sizes
        layout = module.family.hidden_layout(sizes, 1)
        self.head = MaskedLinear.from_layout(layout, dtype=torch.float64)

    def forward(self, x, hx):
        return self.head(self.module(x, hx)[0])


@fewer
@given(modules(max_experts=6))
def test_each_loss_moves_its_own_expert(module):
    assert_gradient_isolated(Judged(module), inputs(module), module.family)


# --- A torch module --------------------------------------------------------------------------


def test_copies_saves_and_takes_empty_batches():
    torch.manual_seed(0)
    module, fresh = (MaskedGRU(CUBE, 3, 2, batch_first=True) for _ in range(2))
    x = torch.randn(2, 4, 6)
    assert not torch.equal(module(x)[0], fresh(x)[0])
    fresh.load_state_dict(module.state_dict())
    for other in (fresh, copy.deepcopy(module)):
        assert torch.equal(module(x)[0], other(x)[0])
    output, last = module(x[:0], lengths=torch.zeros(0, dtype=torch.int64))
    assert output.shape == (0, 4, 21)
    assert last.shape == (2, 0, 21)
    output, last = module(x[:, :0])
    assert output.shape == (2, 0, 21)
    assert not last.any()


def test_autocast_and_half_stay_close():
    torch.manual_seed(0)
    module = MaskedGRU(CUBE, 3, 2, batch_first=True)
    x, hx = torch.randn(2, 4, 6), torch.randn(2, 2, 21)
    expected, _ = module(x, hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = module(x, hx, lengths=torch.tensor([4, 4]))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=3e-2)
    output, _ = copy.deepcopy(module).bfloat16()(x.bfloat16(), hx.bfloat16())
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=3e-2)


def test_compiles_whole():
    torch._dynamo.reset()
    module = MaskedGRU(SubsetFamily.powerset({"a": 1, "b": 1}), 3, batch_first=True)
    x, lengths = torch.randn(2, 2, 2, requires_grad=True), torch.tensor([2, 1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ours, theirs = (m(x, lengths=lengths)[0] for m in (compiled, module))
    torch.testing.assert_close(ours, theirs)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(
        gradients(ours, leaves), gradients(theirs, leaves), rtol=1e-4, atol=1e-5
    )


def test_dropout_lies_between_layers():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6)
    one, two = (MaskedGRU(CUBE, 3, layers, dropout=0.5) for layers in (1, 2))
    assert torch.equal(one(x)[0], one(x)[0])
    assert not torch.equal(two(x)[0], two(x)[0])
    two.eval()
    assert torch.equal(two(x)[0], two(x)[0])


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match="bidirectional=True is not available"):
        MaskedGRU(CUBE, 3, bidirectional=True)
    with pytest.raises(LayoutError, match="num_layers must be at least 1, got 0"):
        MaskedGRU(CUBE, 3, 0)
    with pytest.raises(LayoutError, match="dropout must be a probability, got 2"):
        MaskedGRU(CUBE, 3, dropout=2)
    with pytest.raises(LayoutError, match="one row block per expert"):
        MaskedGRU(CUBE, 3, input_layout=CUBE.input_layout(2))
    module = MaskedGRU(CUBE, 3, batch_first=True)
    x = torch.zeros(2, 4, 6)
    with pytest.raises(LayoutError, match=r"\(N, T, 6\) or \(T, 6\), got \(2, 4, 5\)"):
        module(x[..., :5])
    with pytest.raises(LayoutError, match=r"hx must be \(1, 2, 21\), got \(1, 3, 21\)"):
        module(x, torch.zeros(1, 3, 21))
    with pytest.raises(LayoutError, match=r"lengths must be \(2,\) integers, got torch\.float32"):
        module(x, lengths=torch.ones(2))
    with pytest.raises(LayoutError, match=r"padding_mask must be bool \(2, 4\)"):
        module(x, padding_mask=torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(LayoutError, match="given twice"):
        module(x, lengths=torch.ones(2).long(), padding_mask=torch.zeros(2, 4).bool())
    with pytest.raises(LayoutError, match="a PackedSequence has its lengths"):
        module(pack_sequence([x[0]]), lengths=torch.ones(1).long())
