"""``unrouted()``: the twin whose gradients are derivatives, beside finite differences."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import maskmoe_kernels as mk
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.nn import unrouted

FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 4, "c": 2},
    {"a": ["a"], "ab": ["a", "b"], "ac": ["a", "c"], "all": ["a", "b", "c"]},
)
DOUBLE = {"dtype": torch.float64}


class Own(nn.Module):
    """A model of the user's, with our layers inside."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16, **DOUBLE))
        self.register_buffer("shift", torch.zeros(16, **DOUBLE))
        self.attention = mk.MaskedMultiheadAttention(FAMILY, 4, batch_first=True, **DOUBLE)

    def forward(self, x):
        return self.attention(x * self.scale, x, x + self.shift)[0]

    def unrouted(self):
        return unrouted(self)


class StateFirst(Own):
    """A GRU's cell by its state, through which some blocks route no gradient."""

    def __init__(self):
        super().__init__()
        self.cell = mk.MaskedGRUCell(FAMILY, 4, **DOUBLE)

    def forward(self, hx, x):
        return self.cell(x, hx)


def interleaved():
    """A mask whose equal units lie apart, and of which a part routes no gradient."""
    mask = torch.arange(12)[:, None] % 4 >= torch.arange(10) % 4
    grad_mask = mask & (torch.arange(10) % 2 == 0)
    return mk.MaskedLinear(10, 12, mask, grad_mask=grad_mask, activation="gelu", **DOUBLE)


#: Name to a model and its input; the output of some comes first in a tuple.
MODELS = {
    "linear": lambda: (interleaved(), randn(5, 10)),
    "stacked": lambda: (
        mk.nn.StackedLinear.repeat(FAMILY.hidden_layout(2, 3), 3, **DOUBLE),
        randn(4, 8),
    ),
    "masked-mlp": lambda: (
        mk.MaskedMLP([FAMILY.input_layout(5), FAMILY.hidden_layout(5, 2)], "gelu", **DOUBLE),
        randn(4, 9),
    ),
    "mlp": lambda: (mk.InterpretableMLP(FAMILY, [8, 6], "gelu", **DOUBLE), randn(6, 9)),
    "strict": lambda: (
        mk.InterpretableMLP(
            FAMILY, [8, 6], "tanh", input_layout=FAMILY.input_layout(8, strict=True), **DOUBLE
        ),
        randn(6, 9),
    ),
    "cell": lambda: (StateFirst(), randn(3, 16), randn(3, 9)),
    "gru": lambda: (mk.MaskedGRU(FAMILY, 4, 2, **DOUBLE), randn(3, 2, 9)),
    "attention": lambda: (
        mk.MaskedMultiheadAttention(FAMILY, 4, batch_first=True, **DOUBLE),
        *[randn(2, 3, 16)] * 3,
    ),
    "own": lambda: (Own(), randn(2, 3, 16)),
    "interpretable-gru": lambda: (
        mk.InterpretableGRU(FAMILY, {"a": 3, "b": 2}, 4, **DOUBLE),
        randn(2, 5, 9),
        randn(2, 4, 5),
    ),
    "transformer": lambda: (
        mk.InterpretableTransformer(FAMILY, {"a": 3, "b": 2}, 4, layers=2, **DOUBLE),
        randn(2, 5, 9),
        randn(2, 4, 5),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def randn(*shape):
    return torch.randn(*shape, **DOUBLE)


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


def first(found):
    return found[0] if isinstance(found, tuple) else found


def slopes(module, *inputs):
    """Along a random direction of the first input: by autograd, and by central differences."""
    generator = torch.Generator().manual_seed(3)
    x, *rest = inputs
    direction = torch.randn(x.shape, generator=generator, **DOUBLE)
    shape = first(module(*inputs)).shape
    weights = torch.randn(shape, generator=generator, **DOUBLE)

    def value(x):
        return (first(module(x, *rest)) * weights).sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        eps = 1e-6
        difference = (value(x + eps * direction) - value(x - eps * direction)) / (2 * eps)
    return (grad * direction).sum(), difference


@each_model
def test_gradients_of_the_twin_are_derivatives(name):
    module, *inputs = made(name)
    twin = module.unrouted()
    assert type(twin) is type(module)
    assert torch.equal(first(twin(*inputs)), first(module(*inputs)))
    ours, expected = slopes(twin, *inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    routed, _ = slopes(module, *inputs)
    assert (routed - expected).abs() > 0.01 * expected.abs()  # the case tells the two apart


@each_model
def test_the_twin_shares_its_tensors(name):
    module, *inputs = made(name)
    before = copy.deepcopy(module.state_dict())
    twin = module.unrouted()
    ours, theirs = ([*m.parameters(), *m.buffers()] for m in (twin, module))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    assert torch.equal(first(twin(*inputs)), first(module(*inputs)))
    assert not torch.equal(
        torch.cat([p.flatten() for p in twin.parameters()]),
        torch.cat([before[n].flatten() for n, _ in module.named_parameters()]),
    )
    twin.load_state_dict(before)  # packed alike
    assert torch.equal(first(twin(*inputs)), first(module(*inputs)))


@each_model
def test_the_module_stays_routed(name):
    module, *inputs = made(name)
    before = slopes(module, *inputs)[0]
    twin = module.unrouted()
    assert torch.equal(slopes(module, *inputs)[0], before)
    again, copied = twin.unrouted(), copy.deepcopy(twin)
    for other in (again, copied):
        assert torch.equal(slopes(other, *inputs)[0], slopes(twin, *inputs)[0])


def test_a_layer_that_routes_all_is_its_own_twin():
    layer = mk.MaskedLinear(3, 2, torch.ones(2, 3).bool())
    twin = layer.unrouted()
    assert twin is not layer
    assert twin.layout is layer.layout
    assert twin.weight is layer.weight


def test_twins_of_the_same_layout_share_one():
    layout = FAMILY.hidden_layout(2, 3)
    assert layout.unrouted() is layout.unrouted()
    assert layout.unrouted().routes_all
    assert not layout.routes_all
    assert layout.unrouted().packing_id == layout.packing_id


def test_the_twin_runs_as_one_op_with_its_own_gradients():
    """Loss and gradients in one pass, and after pickling; the definition is in float64."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 6], "gelu")
    reference = mk.InterpretableMLP(FAMILY, [8, 6], "gelu", backend="reference", **DOUBLE)
    reference.load_state_dict(net.state_dict())
    x, y = torch.randn(33, 9, requires_grad=True), torch.rand(33).round()
    twin = net.unrouted()
    for ours in (twin, pickle.loads(pickle.dumps(twin))):
        assert ours.layers.unsupported_reason() is None
        for loss in (
            lambda net, x: net.gem_loss(x, y, "smooth"),
            lambda net, x: mk.mixture(net(x), FAMILY).probability.sum(),
        ):
            found = torch.autograd.grad(loss(ours, x), [x, *ours.parameters()])
            exact = reference.unrouted()
            expected = torch.autograd.grad(loss(exact, x.double()), [x, *exact.parameters()])
            torch.testing.assert_close(
                [*found], [t.to(f.dtype) for t, f in zip(expected, found, strict=True)]
            )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
def test_pruned_and_normed_layers_have_a_twin(change):
    module, x = made("mlp")
    change(module.layers[1])
    module.eval()(x)  # weights that hooks compute are there, with their graphs
    twin = module.unrouted()
    torch.testing.assert_close(slopes(twin, x)[0], slopes(module, x)[1], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    assert torch.equal(twin(x), module(x))


def test_embeddings_get_their_derivatives():
    torch.manual_seed(0)
    model = InterpretableNCF(NCFSizes(3, 4), [6, 5], embeddings="strict")
    twin = model.unrouted()
    ids = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2, 3).long(), torch.randn(2, 19)
    reference = copy.deepcopy(model)
    for layer in reference.experts.layers:
        layer.backend = "reference"
    reference = reference.double().unrouted()
    exact = (*ids[:3], ids[3].double())
    weight = torch.randn(2, 4)
    parameters = [*twin.parameters()]
    found = torch.autograd.grad((twin(*ids) * weight).sum(), parameters)
    expected = torch.autograd.grad((reference(*exact) * weight).sum(), [*reference.parameters()])
    torch.testing.assert_close([*found], [grad.float() for grad in expected])
    routed = torch.autograd.grad((model(*ids) * weight).sum(), [*model.parameters()])
    table = [name for name, _ in model.named_parameters()].index("inputs.user.weight")
    assert not torch.allclose(routed[table], found[table])


def test_integrated_gradients_add_up():
    """The convergence delta of captum: 0 for the twin, as large as the effect for the model."""
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 6], "gelu")
    x = torch.randn(12, 9)
    effect = (net(x) - net(torch.zeros_like(x)))[:, 3].detach()
    deltas = []
    for module in (net, net.unrouted()):
        explain = attr.IntegratedGradients(module)
        values, delta = explain.attribute(x, target=3, n_steps=100, return_convergence_delta=True)
        torch.testing.assert_close(values.sum(1) - delta.float(), effect, rtol=1e-3, atol=1e-5)
        deltas.append(delta.abs().max())
    assert deltas[0] > 0.3 * effect.abs().max()
    assert deltas[1] < 1e-4 * effect.abs().max()


def test_an_attack_on_the_twin_goes_where_the_gradient_says():
    """One small step along the gradient raises a logit by its squared length."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 6], "gelu", **DOUBLE)
    x = torch.randn(1, 9, requires_grad=True, **DOUBLE)
    (grad,) = torch.autograd.grad(net.unrouted()(x)[0, 3], x)
    step = 1e-5
    gain = (net(x + step * grad) - net(x))[0, 3] / step
    torch.testing.assert_close(gain, grad.pow(2).sum(), rtol=1e-3, atol=0)
