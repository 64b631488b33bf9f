"""torch.func and batches of gradients: whole networks, losses and mixtures as single layers."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import maskmoe_kernels as mk
from maskmoe_kernels import BackendError
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.ops import dispatch
from tests.distributed.cases import Loss

FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 4, "c": 2},
    {"a": ["a"], "ab": ["a", "b"], "ac": ["a", "c"], "all": ["a", "b", "c"]},
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.func transforms run", "ignore:There is a performance drop"
)


def net_and_data(**options):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 6], "gelu", **options)
    return net, torch.randn(6, 9, requires_grad=True), torch.rand(6).round()


class Inputs(nn.Module):
    """Tables and columns in one op."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.tables = nn.ParameterList(torch.randn(5, width) for width in (3, 2))
        self.ids = [torch.tensor([0, 4, 4, 1, 2, 0]), torch.tensor([1, 1, 0, 3, 2, 4])]

    def given(self, x):
        return mk.Inputs(x[..., :4], [*self.tables], self.ids, [0, -4, 1])

    def forward(self, x):
        return self.net(self.given(x))

    def gem_loss(self, x, y):
        return self.net.gem_loss(self.given(x), y)


# --- Batches of gradients ----------------------------------------------------------------

#: From a network, an input and labels to something that is differentiated.
OUTPUTS = {
    "logits": lambda net, x, y: net(x),
    "gem_loss": lambda net, x, y: net.gem_loss(x, y),
    "loss of logits": lambda net, x, y: mk.gem_loss(net(x), y, FAMILY, "smooth", "deselection"),
    "selection": lambda net, x, y: mk.selection(net(x), FAMILY, "square", 2.0),
    "mixture": lambda net, x, y: mk.mixture(net(x), FAMILY).probability,
}
BATCHED = {
    "is_grads_batched": lambda y, of, v: torch.autograd.grad(
        y, of, v, retain_graph=True, is_grads_batched=True
    ),
    "vmap": lambda y, of, v: vmap(lambda w: torch.autograd.grad(y, of, w, retain_graph=True))(v),
}
each_way = pytest.mark.parametrize("way", BATCHED)


def assert_batches_are_single_ones(way, y, leaves):
    v = torch.randn(4, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in v]
    found = BATCHED[way](y, leaves, v)
    torch.testing.assert_close([*found], [torch.stack(of) for of in zip(*expected, strict=True)])


@each_way
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_batches_of_gradients(way, output, parts, backend):
    net, x, y = net_and_data(backend=backend)
    if backend is None:
        assert net.layers.unsupported_reason() is None
    model = Inputs(net) if parts else net
    assert_batches_are_single_ones(way, OUTPUTS[output](model, x, y), [x, *model.parameters()])


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", ["gem_loss", "selection", "mixture"])
def test_batches_of_gradients_through_the_kernels_of_the_objectives(
    way, output, dtype, monkeypatch
):
    """The kernels are Triton's; its interpreter runs them here."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu", "cuda"})
    logits = torch.randn(6, 4).to(dtype).requires_grad_()
    found = {
        "gem_loss": lambda: mk.gem_loss(logits, torch.rand(6).round(), FAMILY),
        "selection": lambda: mk.selection(logits, FAMILY),
        "mixture": lambda: mk.mixture(logits, FAMILY).probability,
    }[output]()
    assert_batches_are_single_ones(way, found, [logits])


@each_way
def test_batches_of_gradients_of_ncf(way):
    torch.manual_seed(0)
    model = InterpretableNCF(NCFSizes(3, 4), [6, 5])
    rows = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2, 3).long(), torch.randn(2, 19)
    loss = model.gem_loss(*rows, torch.ones(2))
    for y in (model(*rows), loss):
        assert_batches_are_single_ones(way, y, [*model.parameters()])


def test_jacobians_and_hessians_of_autograd():
    net, x, _ = net_and_data()
    of = torch.autograd.functional
    x = x.detach()
    torch.testing.assert_close(of.jacobian(net, x, vectorize=True), of.jacobian(net, x))
    with pytest.raises(BackendError, match="backend='reference'"):
        of.hessian(lambda x: net(x).sum(), x)


# --- torch.func --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_by_transform_are_those_of_backward(backend):
    """Of the loss in one pass, of all samples and of each."""
    net, x, y = net_and_data(backend=backend)
    model = Loss(net)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(model(x, y), [*parameters.values()])

    def loss(parameters, x, y):
        return functional_call(model, parameters, (x, y))

    found = grad(loss)(parameters, x, y)
    torch.testing.assert_close([*found.values()], [*expected])
    found = jacrev(loss)(parameters, x, y)
    torch.testing.assert_close([*found.values()], [*expected])
    of_sample = vmap(grad(loss), (None, 0, 0))(parameters, x[:, None], y[:, None])
    torch.testing.assert_close([g.mean(0) for g in of_sample.values()], [*expected])


def test_the_mixture_has_a_jacobian_and_a_batch():
    net, x, _ = net_and_data()

    def probability(x):
        return mk.mixture(net(x), FAMILY, "smooth").probability

    leaf = x.detach().clone().requires_grad_()
    rows = [torch.autograd.grad(p, leaf, retain_graph=True)[0] for p in probability(leaf)]
    torch.testing.assert_close(jacrev(probability)(x.detach()), torch.stack(rows))
    predicted = vmap(lambda row: net.predict(row).probability)(x)
    torch.testing.assert_close(predicted, net.predict(x).probability)


def test_the_twin_has_the_hessian_of_finite_differences():
    net, x, _ = net_and_data(dtype=torch.float64)
    twin, x = net.unrouted(), x.detach().double()[0]

    def logit(x):
        return twin(x)[3]

    eps, rows = 1e-5, []
    for direction in torch.eye(9, dtype=torch.float64):
        ends = [
            torch.autograd.grad(logit(leaf), leaf)[0]
            for leaf in ((x + s * eps * direction).requires_grad_() for s in (1, -1))
        ]
        rows.append((ends[0] - ends[1]) / (2 * eps))
    for transform in (hessian, lambda of: jacrev(jacrev(of))):
        found = transform(logit)(x)
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-7)


TRANSFORMS = {
    "grad": lambda of, x: grad(lambda x: of(x).sum())(x),
    "vmap": lambda of, x: vmap(of)(x),
    "hessian": lambda of, x: hessian(lambda row: of(row).sum())(x[0]),
    "jacrev": lambda of, x: jacrev(of)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_made_under_a_transform_outlives_it(transform):
    """Tables of a layout that is first called there; as wrappers they would end with it."""
    sizes = [2 + len(transform), 3]  # a layout that no other test has run
    layout = mk.BlockLayout(sizes, [2, 4], torch.ones(2, 2).tril() > 0, torch.eye(2) > 0)
    layer = mk.MaskedLinear.from_layout(layout, activation="tanh", dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    found = TRANSFORMS[transform](layer, x)
    again = TRANSFORMS[transform](layer, x)
    torch.testing.assert_close(found, again)
    fresh = mk.masked_linear(x, layer.weight, layer.bias, layout, "tanh", "reference")
    torch.testing.assert_close(fresh, layer(x))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(layout.weight_index(x.device))
