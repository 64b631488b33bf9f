"""The CUDA kernels of fused MLPs, run by the host emulator."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.layout.chain import LayoutChain
from maskmoe_kernels.ops import native
from maskmoe_kernels.testing import strategies
from tests.ops import host_emulator
from tests.ops.cuda_cases import (
    ACTIVATIONS,
    CONFIDENCES,
    DTYPES,
    MLPS,
    NORMALIZE,
    POWER,
    TOY,
    away_from_kinks,
    check,
    check_blind,
    check_gem,
    check_isolated,
    check_mixture,
    check_order,
    cotangent_of,
    names,
    targets,
)
from tests.ops.cuda_mlps import draw
from tests.ops.host_emulator import configure

REASON = host_emulator.unsupported_reason()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("default_device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_every_mlp(name, dtype):
    activation = ACTIVATIONS[list(MLPS).index(name) % len(ACTIVATIONS)]
    check(MLPS[name](130, activation, dtype), 130)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    check(MLPS["ragged"](70, activation, dtype, seed=3), 70)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 63, 64, 65, 200, (3, 0), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_rows(rows, dtype):
    check(MLPS["ncf"](rows, "gelu", dtype), rows)


@pytest.mark.parametrize("blocks", [1, 2, 100])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_every_number_of_blocks_and_height_of_tiles(blocks, multiprocessors):
    """Rows have the same bits however they are cut; sums over rows differ by rounding."""
    net = MLPS["powerset"](300, "tanh")
    expected = net.forward()
    configure(blocks, multiprocessors)
    assert torch.equal(net.forward(), expected)
    check(net, 300)


@given(strategies.families(max_experts=8), st.data())
def test_drawn_mlps(family, data):
    widths = st.lists(
        st.sampled_from([1, 2, 7, 15, 16, 17, 40]),
        min_size=family.num_experts,
        max_size=family.num_experts,
    )
    hidden = data.draw(st.lists(widths, max_size=3))
    rows = data.draw(st.integers(0, 40))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    dtype = data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 999))
    alone = data.draw(st.booleans())
    configure(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 1000])), alone=alone)
    check(draw(family, hidden, rows, activation, dtype, bias=seed % 2 == 0, seed=seed), rows)


@pytest.mark.parametrize("name", ["ragged", "ncf", "permuted", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(name, dtype):
    """Between barriers no thread waits for another: last to first gives the same bits."""
    check_order(MLPS[name](150, "gelu", dtype), 150)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["toy", "eight"])
def test_it_does_not_matter_what_stays_in_shared_memory(name, dtype):
    """No partial gradient, those of biases, some blocks' or all: the same bits."""
    net = MLPS[name](150, "relu", dtype)
    target, _ = targets(150)
    configure(multiprocessors=1000, shared=512)
    with pytest.raises(RuntimeError, match="bytes of shared memory") as refusal:
        net.gem(target)
    least = int(re.search(r"needs (\d+) bytes", str(refusal.value))[1])
    found = []
    for more in [*range(0, 40_000, 4000), host_emulator.SHARED - least]:
        configure(multiprocessors=1000, shared=least + more)
        found.append(net.gem(target)[1])
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["toy", "ncf", "eight"])
def test_what_a_network_is_said_to_take_is_what_it_takes(name, dtype, monkeypatch):
    """The bytes that decide whether a network gets these kernels unasked."""
    monkeypatch.setattr(native, "CUDA_UNSUPPORTED_REASON", None)
    net = MLPS[name](20, "gelu", dtype)
    needed = native.mlp_bytes(LayoutChain(net.layouts))[dtype == torch.float32]
    configure(multiprocessors=1000, shared=needed)
    target, _ = targets(20)
    net.gem(target)
    configure(multiprocessors=1000, shared=needed - 1)
    with pytest.raises(RuntimeError, match=f"needs {needed} bytes"):
        net.gem(target)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_what_is_needed(needs):
    net = MLPS["ncf"](70, "silu")
    cotangent = cotangent_of(net, 70)
    everything = net.backward(cotangent)
    wanted = [needs[0]] + [needs[1]] * 4 + [needs[2]] * 6
    expected = [grad for grad, want in zip(everything, wanted, strict=True) if want]
    some = net.backward(cotangent, needs)
    assert len(some) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(some, expected, strict=True))
    loss, grads = net.gem((torch.arange(70) % 2).float(), needs=needs)
    assert loss.shape == ()
    assert len(grads) == len(expected)


def test_x_as_it_lies():
    """A slice of a wider matrix, a transposed one, and one of higher dimension."""
    net = MLPS["powerset"](64, "relu")
    expected = net.forward()
    wide = torch.full((64, 50), torch.nan)
    wide[:, 9 : 9 + 34] = net.x
    for x in (wide[:, 9 : 9 + 34], net.x.t().contiguous().t(), net.x.reshape(4, 16, 34)):
        other = net.with_leaves([x, *net.leaves[1:]])
        assert torch.equal(other.forward().reshape(64, -1), expected)
        grads = other.backward(cotangent_of(net, 64).reshape(*x.shape[:-1], -1))
        assert grads[0].shape == x.shape
        plain = net.backward(cotangent_of(net, 64))
        assert torch.equal(grads[0].reshape(64, -1), plain[0])


def test_rows_that_lie_far_apart(tmp_path):
    """Row 2 of x begins beyond element 2^31 (of a file with holes: nothing is that large)."""
    net = MLPS["toy"](3, "relu", torch.float16)
    step = 2**30 + 2**29
    file = np.memmap(tmp_path / "x", dtype=np.float16, mode="w+", shape=(2 * step + 5,))
    x = torch.from_numpy(file).as_strided((3, 5), (step, 1))
    x.copy_(net.x)
    far = net.with_leaves([x, *net.leaves[1:]])
    assert torch.equal(far.forward(), net.forward())
    cotangent = cotangent_of(net, 3)
    for a, b in zip(far.backward(cotangent), net.backward(cotangent), strict=True):
        assert torch.equal(a, b)


# --- Invariants ----------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [torch.nan, -torch.inf, 3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ragged", "eight", "no hidden"])
def test_unseen_values_reach_nobody(name, dtype, fill):
    """Forward, backward and objective keep their bits where a group is not seen."""
    configure(multiprocessors=1000)
    check_blind(MLPS[name](18, "tanh", dtype), 18, fill)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_expert_moves_its_own_parameters_only(activation, dtype):
    check_isolated(MLPS["powerset"](70, activation, dtype), 70)


def test_padding_stays_zero_beside_infinities():
    """An infinity that an expert does see makes no NaN of the zeros it is padded with."""
    net = draw(TOY, [5, 3], 20, "tanh", torch.bfloat16)
    x = net.x.clone()
    x[3, 0], x[4, 4] = torch.inf, -torch.inf
    net = net.with_leaves([x, *net.leaves[1:]])
    torch.testing.assert_close(net.forward(), net.dense(), rtol=0.02, atol=0.02)
    assert net.forward().isfinite().all()


def test_padding_stays_zero_beside_infinite_gradients():
    net = draw(TOY, [1, 1, 1], 20, "none", torch.bfloat16)
    cotangent = cotangent_of(net, 20)
    cotangent[7] = torch.inf
    plain = net.dense_backward(cotangent)
    assert all(grad.isinf().any() and not grad.isnan().any() for grad in plain[-4:])
    for what, a, b in zip(names(net), net.backward(cotangent), plain, strict=True):
        if what.startswith("bias"):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_an_infinite_bias_does_not_enter_through_rows_that_are_none():
    """A unit that is infinite in the only row: 0 times it, from the tile's empty rows, is NaN."""
    net = draw(TOY, [5], 1, "none")
    biases = [net.biases[0].clone(), net.biases[1]]
    biases[0][2] = torch.inf
    net = net.with_leaves([net.x, *net.weights, *biases])
    ours, plain = (f(cotangent_of(net, 1)) for f in (net.backward, net.dense_backward))
    assert plain[2].isinf().any()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- Tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_every_size(dtype):
    """Two rows that all samples share, cut into slices; a wide table; one so large that its ids
    are sorted, with rows that nobody reads."""
    family = mk.SubsetFamily({"a": 3, "b": 300}, {"a": ["a"], "ab": ["a", "b"]})
    net = draw(family, [8], 1501, "tanh", dtype, parts=[(2, 1), (70000, 2), (7, 300)])
    grads = net.backward(cotangent_of(net, 1501))
    exact = net.to(torch.float64).dense_backward(cotangent_of(net, 1501).double())
    for table, (ours, reference) in enumerate(zip(grads[:3], exact[:3], strict=True)):
        eps = torch.finfo(dtype).eps
        error = torch.linalg.vector_norm(ours.double() - reference)
        assert error <= 8 * eps * torch.linalg.vector_norm(reference), table
        unread = torch.ones(len(ours), dtype=torch.bool)
        unread[net.ids[table]] = False
        assert (ours[unread] == 0).all()


def test_ids_beyond_a_table_read_nothing():
    net = MLPS["ncf"](20, "relu")
    ids = [i.clone() for i in net.ids]
    ids[2][3], ids[2][5] = 40, -1
    wrong = replace(net, ids=ids)
    logits, expected = wrong.forward(), net.forward()
    rows = torch.zeros(20, dtype=torch.bool)
    rows[[3, 5]] = True
    blind = torch.tensor([True, False, True, False])  # who does not see the user
    assert torch.equal(logits[~rows], expected[~rows])
    assert torch.equal(logits[:, blind], expected[:, blind])
    assert logits[rows][:, ~blind].isnan().all()


def test_ids_beyond_a_table_write_nothing():
    """Their samples count for no row; a table that is scanned, and one whose ids are sorted."""
    family = mk.SubsetFamily({"a": 4, "b": 2}, {"a": ["a"], "b": ["b"]})
    net = draw(family, [8], 40, "tanh", parts=[(9, 4), (70000, 2)])
    cotangent = cotangent_of(net, 40)
    ids = [i.clone() for i in net.ids]
    for n, rows in enumerate((9, 70000)):
        ids[n][[3, 5, 7]] = torch.tensor([rows, -1, 10**12])
    ours = replace(net, ids=ids).backward(cotangent)
    expected = net.backward(cotangent.index_fill(0, torch.tensor([3, 5, 7]), 0))
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert torch.equal(a, b)


# --- The objective -------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("weighting", ["selection", "deselection", "uniform"])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_every_objective(confidence, weighting, normalize):
    configure(multiprocessors=1000)
    net = draw(POWER, [16], 40, "tanh")
    target, mask = targets(40)
    options = {"confidence": confidence, "weighting": weighting, "normalize": normalize}
    for sharpness, kept in itertools.product((1.0, 2.5), (None, mask)):
        check_gem(net, target, sharpness=sharpness, mask=kept, **options)
    if confidence == "abs":
        times = weights_of_samples(40)
        check_gem(net, target, sample_weight=times, **options)
        check_gem(net, target, sample_weight=times * 1e-20, mask=mask, **options)


def weights_of_samples(rows):
    """Some of them 0."""
    generator = torch.Generator().manual_seed(4)
    return torch.rand(rows, generator=generator) * torch.randint(3, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_the_objective_of_every_mlp(name, dtype):
    net = MLPS[name](70, "silu", dtype)
    target, mask = targets(70)
    check_gem(net, target, mask=mask, normalize="sample")
    check_gem(net, target, normalize="expert", weighting="deselection")
    times = weights_of_samples(70)
    check_gem(net, target, mask=mask, sample_weight=times, weighting="uniform")


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("name", ["ragged", "ncf"])
def test_one_phase_or_two(name, normalize):
    """Without the input's gradient the scale comes last; the same gradients."""
    net = MLPS[name](150, "gelu")
    target, mask = targets(150)
    loss, everything = net.gem(target, mask, normalize=normalize)
    alone, grads = net.gem(target, mask, normalize=normalize, needs=(False, False, True))
    assert torch.equal(loss, alone)
    for a, b in zip(grads, everything[-len(grads) :], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
    (only,) = [net.gem(target, mask, normalize=normalize, needs=(False,) * 3)]
    assert torch.equal(only[0], loss)
    assert only[1] == []


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_samples_that_do_not_count_reach_nothing(normalize):
    net = MLPS["ncf"](90, "tanh")
    target, mask = targets(90)
    x, spoiled = net.x.clone(), target.clone()
    x[~mask], spoiled[~mask] = torch.nan, torch.inf
    ids = [i.masked_fill(~mask, 10**12) for i in net.ids]
    other = replace(net.with_leaves([x, *net.leaves[1:]]), ids=ids)
    loss, grads = net.gem(target, mask, normalize=normalize)
    masked_loss, masked_grads = other.gem(spoiled, mask, normalize=normalize)
    assert torch.equal(loss, masked_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, masked_grads, strict=True))
    assert (grads[0][~mask] == 0).all()
    given = torch.rand(90)
    of_weights = net.gem(target, mask, normalize=normalize, sample_weight=given)
    times = given.masked_fill(~mask, 0)  # which says the same as the mask
    masked = other.gem(spoiled, None, normalize=normalize, sample_weight=times)
    assert torch.equal(of_weights[0], masked[0])
    assert all(torch.equal(a, b) for a, b in zip(of_weights[1], masked[1], strict=True))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_sample_at_all(rows, normalize):
    net = MLPS["ncf"](rows, "relu")
    target, mask = torch.ones(rows), torch.zeros(rows, dtype=torch.bool)
    loss, grads = net.gem(target, mask, normalize=normalize)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_weights_that_are_all_zero(normalize):
    """Logits of 0 select nobody: the sums that divide are 0, and divide by 1."""
    net = MLPS["eight"](20, "relu")
    net = net.with_leaves([net.x, *(torch.zeros_like(leaf) for leaf in net.leaves[1:])])
    loss, grads = net.gem(torch.ones(20), normalize=normalize)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_sums_of_many_blocks(normalize):
    """Every warp adds up those of 19 blocks, the last one of fewer; there are 127 sums."""
    configure(blocks=150, multiprocessors=1000)
    groups = dict.fromkeys("abcdefg", 1)
    net = draw(mk.SubsetFamily.powerset(groups, max_size=3), [], 2400, "none")
    assert net.family.num_experts == 63
    target, mask = targets(2400)
    check_gem(net, target, mask=mask, normalize=normalize)


@pytest.mark.parametrize("start", [0, 1, 16])
def test_samples_are_counted_wherever_the_mask_begins(start):
    """In words where it is aligned; 20001 samples are more than a block reads at once."""
    rows = 20001
    net = MLPS["no hidden"](rows, "none")
    target, mask = targets(rows + start)
    check_gem(net, target[start:], mask=mask[start:])


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_saturated_logits(confidence):
    """Products over strict subsets keep their digits where 1 - g is no longer 1 minus g."""
    net = MLPS["no hidden"](60, "none")
    strong = net.with_leaves([net.x * 2, *net.leaves[1:-1], net.biases[0] + 9])
    target, _ = targets(60)
    for sharpness in (0.3, 1.0, 3.0):
        options = {"confidence": confidence, "sharpness": sharpness}
        check_gem(strong, target, **options)
        # Divided by their sums, small weights count as much as large ones.
        check_gem(strong, target, weighting="deselection", normalize="expert", **options)


# --- Refusals ------------------------------------------------------------------------------


def test_too_little_shared_memory():
    net = MLPS["eight"](20, "gelu")
    configure(shared=4096)
    with pytest.raises(RuntimeError, match=r"needs \d+ bytes of shared memory .* has 4096 a block"):
        net.forward()
    # A backward needs more: it keeps every layer.
    configure(shared=40_000)
    net.forward()
    with pytest.raises(RuntimeError, match=r"16 rows, all layers together, .*use bfloat16"):
        net.backward(cotangent_of(net, 20))


def test_unsupported_mlps():
    net = draw(TOY, [16] * 16, 4)
    with pytest.raises(RuntimeError, match="17 layers, and at most 16"):
        net.forward()
    wide = draw(TOY, [16], 4)
    layouts = [wide.layouts[0], TOY.hidden_layout(16, 2)]
    bad = replace(wide, layouts=layouts, weights=[wide.weights[0], wide.weights[1].repeat(2)])
    with pytest.raises(RuntimeError, match="ends in an expert of 2 units"):
        bad.forward()
    hidden = TOY.hidden_layout(16, 1)
    everywhere = mk.BlockLayout(hidden.row_sizes, hidden.col_sizes, hidden.present)
    bad = replace(wide, layouts=[wide.layouts[0], everywhere])
    with pytest.raises(RuntimeError, match="layer 1 routes a gradient beside the diagonal"):
        bad.forward()
    bad = replace(wide, weights=[wide.weights[0], wide.weights[1][:-1]])
    with pytest.raises(RuntimeError, match=r"weights\[1\] must hold 80 values"):
        bad.forward()
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16"):
        wide.to(torch.float64).forward()


# --- Launches ------------------------------------------------------------------------------


def test_a_kernel_is_allowed_more_shared_memory_once():
    """Above 48 KiB a kernel needs permission: for its first launch, not for every one."""
    net = MLPS["eight"](70, "gelu")
    cotangent = cotangent_of(net, 70)
    net.backward(cotangent)
    allowed = host_emulator.shared_memory_limits_set()
    assert allowed >= 1
    for _ in range(2):
        net.backward(cotangent)
    assert host_emulator.shared_memory_limits_set() == allowed


# --- On a GPU ------------------------------------------------------------------------------


def on_gpu(net):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("maskmoe::masked_mlp", "CUDA"):
        pytest.skip("the extension was built without CUDA")
    return replace(net, device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 65, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_every_mlp_on_the_gpu(name, dtype, rows):
    """The bounds that the emulator is held to, and the same bits twice."""
    activation = ACTIVATIONS[list(MLPS).index(name) % len(ACTIVATIONS)]
    net = on_gpu(away_from_kinks(MLPS[name](rows, activation, dtype)))
    check(net, rows)
    target, mask = targets(rows)
    cotangent = cotangent_of(net, rows)
    for normalize in NORMALIZE:
        check_gem(net, target, mask=mask, normalize=normalize)
    check_mixture(net)
    for once, again in itertools.pairwise(
        [[*net.backward(cotangent), *net.gem(target)[1], *net.mixture()] for _ in range(2)]
    ):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ragged", "eight", "no hidden"])
@pytest.mark.parametrize("fill", [torch.nan, -torch.inf, 3e4])
def test_unseen_values_reach_nobody_on_the_gpu(name, dtype, fill):
    check_blind(on_gpu(MLPS[name](70, "tanh", dtype)), 70, fill)


@pytest.mark.cuda
def test_a_captured_step():
    """A CUDA graph replays the objective on new values; its first call was outside."""
    net = on_gpu(MLPS["ncf"](256, "relu"))
    target, _ = targets(256)
    arguments, samples = net.arguments(), net.on_device((target, None, None, net.family.strict))
    options = ("abs", 1.0, "selection", "expert", True, True, True)

    def step():
        return torch.ops.maskmoe.masked_mlp_gem(*arguments, *samples, *options)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    arguments[0].copy_(torch.randn_like(arguments[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
