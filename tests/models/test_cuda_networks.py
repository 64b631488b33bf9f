"""Networks on a GPU in 16 bits: which run as one op unasked, and what they compute."""

import copy

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.ops import native
from maskmoe_kernels.testing import assert_blind

HAS_GPU = torch.cuda.is_available() and native.CUDA_UNSUPPORTED_REASON is None
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU, and the kernels for it"),
]

NETS = {
    "toy": (FAMILIES["toy3"], [16, 16]),
    "spotify8": (FAMILIES["spotify8"], [16, 16, 16]),
    "powerset4": (lambda: mk.SubsetFamily.powerset(dict.fromkeys("abcd", 32)), [32, 32]),
    "uneven": (lambda: mk.SubsetFamily.powerset({"a": 3, "b": 17, "c": 1}), [9, 33]),
}
#: Relative error of a sum in the norm: a few roundings of each dtype.
ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", ERROR, ids=str)


def made(name, dtype, rows=777, activation="relu"):
    """A network on the GPU, the same in float64 on the CPU, and a batch for each."""
    torch.manual_seed(len(name))
    family, hidden = NETS[name]
    truth = mk.InterpretableMLP(family(), hidden, activation, backend="reference")
    net = mk.InterpretableMLP(truth.family, hidden, activation, device="cuda", dtype=dtype)
    net.load_state_dict(truth.state_dict())
    truth.double().load_state_dict({k: v.double().cpu() for k, v in net.state_dict().items()})
    x = torch.randn(rows, truth.family.in_features, device="cuda").to(dtype)
    y = torch.rand(rows, device="cuda").lt(0.4).float()
    return net, truth, x, y


def error(found, expected):
    expected = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


@dtypes
@pytest.mark.parametrize("activation", ["tanh", "gelu"])  # whose derivatives have no jump
@pytest.mark.parametrize("name", NETS)
def test_they_run_as_one_op_and_compute_the_definition(name, activation, dtype):
    net, truth, x, y = made(name, dtype, activation=activation)
    assert net.layers.unsupported_reason() is None
    wide = x.double().cpu()
    given, exact = x.clone().requires_grad_(), wide.clone().requires_grad_()
    assert error(net(x), truth(wide)) < ERROR[dtype]
    net.gem_loss(given, y).backward()
    truth.gem_loss(exact, y.cpu()).backward()
    pairs = [(given.grad, exact.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(net.parameters(), truth.parameters(), strict=True)]
    assert all(error(a, b) < 3 * ERROR[dtype] for a, b in pairs)
    assert error(net.predict(x).probability, truth.predict(wide).probability) < ERROR[dtype]
    assert_blind(net, x, net.family.visible_features())


@dtypes
def test_gradients_of_logits_that_anything_may_be_done_with(dtype):
    net, truth, x, _ = made("spotify8", dtype, activation="gelu")
    (net(x).float() ** 2).sum().backward()
    (truth(x.double().cpu()) ** 2).sum().backward()
    for found, expected in zip(net.parameters(), truth.parameters(), strict=True):
        assert error(found.grad, expected.grad) < 2 * ERROR[dtype]


def test_under_autocast_float32_networks_run_as_one_op_too():
    _, truth, x, y = made("spotify8", torch.float16)
    net = copy.deepcopy(truth).float().cuda()
    for layer in net.layers:
        layer.backend = None
    assert "TF32" in net.layers.unsupported_reason()
    with torch.autocast("cuda", torch.bfloat16):
        assert net.layers.unsupported_reason() is None
        loss = net.gem_loss(x.float(), y)
    loss.backward()
    truth.gem_loss(x.double().cpu(), y.cpu()).backward()
    for found, expected in zip(net.parameters(), truth.parameters(), strict=True):
        assert found.grad.dtype == torch.float32
        assert error(found.grad, expected.grad) < 0.1
    assert "TF32" in net.layers.unsupported_reason()


def test_what_does_not_fit_runs_layer_by_layer():
    family = FAMILIES["spotify8"]()
    wide = mk.InterpretableMLP(family, [512, 512], device="cuda", dtype=torch.bfloat16)
    assert "bytes of shared memory" in wide.layers.unsupported_reason()
    many = mk.InterpretableMLP(family, [16], outputs=3, device="cuda", dtype=torch.bfloat16)
    assert "3 units, not 1" in many.layers.unsupported_reason()
    x = torch.randn(64, family.in_features, device="cuda", dtype=torch.bfloat16)
    for net in (wide, many):
        net(x).float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_is_captured_as_a_graph(compiled):
    """Captured once, replayed on other values: the same bits as the step itself."""
    net, _, x, y = made("powerset4", torch.bfloat16)
    loss_of = torch.compile(net.gem_loss) if compiled else net.gem_loss
    inputs = [torch.randn_like(x), x]
    held, target = inputs[0].clone(), y.clone()

    def step():
        net.zero_grad()
        loss = loss_of(held, target)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in net.parameters())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for values in inputs:
        held.copy_(values)
        graph.replay()
        replayed = [tensor.clone() for tensor in found]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_a_network_keeps_its_kernels_when_it_moves():
    net, _, x, _ = made("toy", torch.bfloat16)
    expected = net(x)
    moved = copy.deepcopy(net).cpu()
    assert error(moved(x.cpu()), expected) < ERROR[torch.bfloat16]
    back = moved.cuda()
    assert back.layers.unsupported_reason() is None
    assert torch.equal(back(x), expected)


def test_a_recommender_trains_as_one_op():
    torch.manual_seed(0)
    net = InterpretableNCF(NCFSizes(300, 200)).cuda()
    user, item = torch.randint(0, 200, (2, 512), device="cuda")
    codes = torch.stack([torch.randint(0, n, (512,), device="cuda") for n in (2, 7, 21)], dim=1)
    numeric = torch.rand(512, 19, device="cuda")
    y = torch.rand(512, device="cuda").lt(0.3).float()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        with torch.autocast("cuda", torch.bfloat16):
            assert net.experts.layers.unsupported_reason() is None
            loss = net.gem_loss(user, item, codes, numeric, y, weighting="uniform")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
