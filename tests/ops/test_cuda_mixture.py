"""Prediction and attribution by the kernels for the GPU, run by their twin on the host."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import maskmoe_kernels as mk
from maskmoe_kernels.layout import chain
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_mlp import api
from maskmoe_kernels.testing import strategies
from tests.ops import cuda_twin
from tests.ops.cuda_cases import (
    ACTIVATIONS,
    CONFIDENCES,
    DTYPES,
    MANY,
    NETWORKS,
    POWER,
    PRIOR,
    check_mixture,
    check_own_logits,
)
from tests.ops.cuda_twin import configure, draw

REASON = cuda_twin.obstacle()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("usual_machine"),
]
SHARPNESS = (0.7, 1.0, 2.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name, dtype):
    number = list(NETWORKS).index(name)
    net = NETWORKS[name](130, ACTIVATIONS[number % len(ACTIVATIONS)], dtype)
    for processors in (1, 1000):
        configure(processors=processors)
        check_mixture(net, CONFIDENCES[number % 4], SHARPNESS[number % 3])


@pytest.mark.parametrize("rows", [0, 1, 15, 33, (3, 0), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(rows, dtype):
    check_mixture(NETWORKS["ncf"](rows, "gelu", dtype), "rare")


@given(strategies.families(max_experts=8), st.data())
def test_drawn_networks(family, data):
    widths = st.lists(
        st.sampled_from([1, 2, 7, 16, 17]),
        min_size=family.num_experts,
        max_size=family.num_experts,
    )
    hidden, rows = data.draw(st.lists(widths, max_size=2)), data.draw(st.integers(0, 40))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 999))
    configure(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 1000])))
    net = draw(family, hidden, rows, "tanh", dtype, bias=seed % 2 == 0, seed=seed)
    confidence = data.draw(st.sampled_from(CONFIDENCES))
    if dtype == torch.float32:
        check_own_logits(net, confidence, data.draw(st.sampled_from(SHARPNESS)))
        return
    # Logits that a test can see are rounded: selection as near as they are, and shares of it.
    probability, alpha, share = net.mixture(confidence)
    expected = mk.selection(net.forward().double(), family, confidence)
    torch.testing.assert_close(alpha.double(), expected, rtol=0.0, atol=0.05)
    torch.testing.assert_close(share * alpha.sum(-1, keepdim=True), alpha, rtol=1e-5, atol=1e-30)
    assert ((probability >= 0) & (probability <= 1)).all()


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("shift", [0.0, 9.0])
def test_the_mixture_of_its_own_logits(confidence, sharpness, shift):
    """Digit by digit, also where 1 - g is no longer 1 minus g."""
    net = draw(MANY, [8], 60, "tanh")
    net = net.with_leaves([net.x, *net.weights, net.biases[0], net.biases[1] + shift])
    check_own_logits(net, confidence, sharpness)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("confidence", ["abs", "square", "smooth"])
def test_where_nobody_is_confident_all_count_alike(confidence, sharpness):
    net = NETWORKS["eight"](20, "relu")
    net = net.with_leaves([net.x, *(torch.zeros_like(leaf) for leaf in net.leaves[1:])])
    probability, alpha, share = net.mixture(confidence, sharpness)
    assert torch.equal(probability, torch.full((20,), 0.5))
    assert torch.equal(alpha, torch.zeros(20, 8))
    assert torch.equal(share, torch.full((20, 8), 1 / 8))


def test_infinite_and_unknown_logits():
    """A NaN reaches its own expert and those above; the shares of its sample, and no other's."""
    net = draw(PRIOR, [], 6, "none", torch.bfloat16)
    x = net.x.clone()
    x[1, 0], x[2, 5], x[3, 23], x[4, 0] = torch.nan, torch.inf, torch.nan, -torch.inf
    net = net.with_leaves([x, *net.leaves[1:]])
    logits = net.forward()
    assert logits[[1, 3]].isnan().any()
    assert logits[[2, 4]].isinf().any()
    for confidence, sharpness in itertools.product(CONFIDENCES, SHARPNESS):
        ours = net.mixture(confidence, sharpness)
        exact = mk.mixture(logits.double(), PRIOR, confidence, sharpness)
        for a, t in zip(ours, exact, strict=True):
            assert torch.equal(a.isnan(), t.isnan())
            torch.testing.assert_close(a.double(), t, rtol=0.05, atol=0.01, equal_nan=True)


def test_a_probability_is_at_most_one():
    """Ten experts that are all sure: as added up in float32, ten tenths are more than 1."""
    groups = {f"g{n}": 1 for n in range(10)}
    family = mk.SubsetFamily(groups, {group: [group] for group in groups})
    net = draw(family, [], 40, "none")
    net = net.with_leaves([net.x, *net.weights, net.biases[0] + 40])
    probability, _, share = net.mixture()
    total = torch.zeros(40)
    for of_expert in share.unbind(-1):
        total += of_expert
    assert (total > 1).all()
    assert torch.equal(probability, torch.ones(40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_however_rows_are_cut(dtype):
    net = NETWORKS["permuted"](150, "gelu", dtype)
    expected = net.mixture("smooth", 2.5)
    for blocks, processors, backwards in itertools.product((1, 3, 100), (1, 1000), (False, True)):
        configure(blocks, processors, backwards=backwards)
        for a, b in zip(net.mixture("smooth", 2.5), expected, strict=True):
            assert torch.equal(a, b)


# --- The front end -------------------------------------------------------------------------


def test_predicts_with_these_kernels(monkeypatch):
    """And what does not fit is refused before a launch."""
    monkeypatch.setattr(api, "MIXTURE", torch.ops.maskmoe_twin.masked_mlp_mixture.default)
    torch.manual_seed(0)
    net = mk.InterpretableMLP(POWER, [16, 5], backend="native")
    x = torch.randn(4, 9, POWER.in_features)
    theirs = mk.mixture(net.layers.layered(x).detach(), POWER, "square", 2.0)
    for a, b in zip(net.predict(x, "square", 2.0), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    configure(shared=4096)
    with pytest.raises(mk.BackendError, match=r"16 rows, two layers at a time.* has 4096 a block"):
        net.predict(x)


class Seen(TorchDispatchMode):
    """Names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("named", [False, True])
def test_on_a_gpu_the_kernels_predict_where_they_are_named(named, monkeypatch):
    monkeypatch.setattr(native, "CUDA_UNSUPPORTED_REASON", None)
    # Tables go to the device itself, which need not be there.
    monkeypatch.setattr(
        chain, "serialized_layout", lambda layout, device: torch.empty(0, device=device)
    )
    monkeypatch.setattr(
        mk.SubsetFamily, "table", lambda self, _, device: self.strict.new_empty(3, 3, device=device)
    )
    family = mk.SubsetFamily.powerset({"a": 3, "b": 29})
    net = mk.InterpretableMLP(family, [3], backend="native" if named else None)
    with FakeTensorMode(allow_non_fake_inputs=True), Seen() as seen:
        for layer in net.layers:
            for name, p in [*layer.named_parameters()]:
                setattr(layer, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        if not named:
            assert "name them" in net.layers.unsupported_reason()
            return
        out = net.predict(torch.empty(5, 2, 32, device="cuda"))
    assert "maskmoe::masked_mlp_mixture" in seen.names
    assert [tuple(part.shape) for part in out] == [(5, 2), (5, 2, 3), (5, 2, 3)]
    assert all(part.is_cuda and part.dtype == torch.float32 for part in out)


# --- On a GPU ------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_captured_prediction():
    """A CUDA graph replays it on new values; the first call was outside."""
    net = mk.InterpretableMLP(POWER, [16], backend="native", device="cuda")
    x = torch.randn(300, POWER.in_features, device="cuda")
    net.predict(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = net.predict(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, net.predict(x), strict=True):
        assert torch.equal(a, b)
