"""Networks of zuko, nflows and pyro whose converted layers hand their units on in block order."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import maskmoe_kernels as mk
from maskmoe_kernels.nn.converted_networks import _Network
from maskmoe_kernels.testing import assert_blind
from tests.nn.test_interception import GLOBAL, NEVER, ON_A_LAYER, ON_A_MODULE, recorder

FEATURES = 6


def _zuko(**options):
    zuko = pytest.importorskip("zuko")
    order = torch.arange(FEATURES)
    return zuko.nn.MaskedMLP(order[:, None] > order, hidden_features=(20, 33), **options)


def _nflows(**options):
    made = pytest.importorskip("nflows.transforms.made")
    return made.MADE(FEATURES, 20, output_multiplier=2, **options)


class PyroNet(nn.Module):
    """pyro's network of the features alone, its outputs side by side."""

    def __init__(self, **options):
        super().__init__()
        auto_reg_nn = pytest.importorskip("pyro.nn.auto_reg_nn")
        options = {"permutation": torch.randperm(FEATURES)} | options
        self.inside = auto_reg_nn.AutoRegressiveNN(FEATURES, [20, 33], **options)

    def forward(self, x):
        return torch.cat([part.flatten(1) for part in self.inside(x)], -1)


NETWORKS = {
    "zuko": _zuko,
    "zuko, tanh": lambda: _zuko(activation=nn.Tanh),
    "zuko, gelu": lambda: _zuko(activation=nn.GELU),
    "zuko, in place": lambda: _zuko(activation=lambda: nn.ReLU(inplace=True)),
    "nflows": _nflows,
    "nflows, silu": lambda: _nflows(activation=F.silu, num_blocks=3),
    "nflows, dropout": lambda: _nflows(dropout_probability=0.5).eval(),
    "pyro": PyroNet,
    "pyro, skip connections": lambda: PyroNet(skip_connections=True),
    "pyro, many parameters": lambda: PyroNet(param_dims=[2, 1], nonlinearity=nn.LeakyReLU()),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_package = pytest.mark.parametrize("name", ["zuko", "nflows", "pyro"])


def made(name):
    torch.manual_seed(0)
    theirs = nn.ModuleList([NETWORKS[name]()])
    ours = copy.deepcopy(theirs)
    mk.convert_(ours, force=True)
    return theirs[0], ours[0]


def handing_on(model):
    return [m for m in model.modules() if isinstance(m, _Network)]


def batch(rows=9):
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def within(monkeypatch):
    """The layers that computed inside a network, in the order in which they ran."""
    ran = []
    inside = mk.ConvertedLinear.within

    def counted(layer, *arguments):
        ran.append(layer)
        return inside(layer, *arguments)

    monkeypatch.setattr(mk.ConvertedLinear, "within", counted)
    return ran


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, mk.ConvertedLinear)]


def same(theirs, ours, x):
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# --- The same function ---------------------------------------------------------------------


@each_network
def test_outputs_and_gradients_are_the_same(name, within):
    theirs, ours = made(name)
    within.clear()
    grads = []
    for model in (theirs, ours):
        x = batch().requires_grad_()
        y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        grads.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    handed = [layer for layer in layers_of(ours) if layer.inner is not None]
    assert within == handed
    assert len(handed) >= 3
    packed = iter(layers_of(ours))
    for one, other in zip(*grads, strict=True):
        if one.shape != other.shape:
            one = next(packed).layout.pack(one)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_layers_share_orders_that_a_layer_alone_would_undo():
    _, ours = made("zuko")
    first, second, last = layers_of(ours)
    assert first.layout.row_order is not None
    assert torch.equal(second.layout.col_order, first.layout.row_order)
    assert torch.equal(last.layout.col_order, second.layout.row_order)
    assert first.inner.layout.row_order is None
    assert second.inner.layout.row_order is second.inner.layout.col_order is None
    assert last.inner.layout.col_order is None


@each_package
def test_unseen_features_change_no_bit(name):
    theirs, ours = made(name)
    x = batch().requires_grad_()
    y = theirs(x)
    visible = torch.stack(
        [
            torch.autograd.grad(y[:, n].sum(), x, retain_graph=True)[0].any(0)
            for n in range(y[0].numel())
        ]
    )
    assert 0 < visible.sum() < visible.numel()
    assert_blind(ours, x.detach(), visible)


@each_package
def test_the_same_result_twice(name):
    _, ours = made(name)
    x = batch()
    assert torch.equal(ours(x), ours(x))
    assert torch.equal(ours(x), copy.deepcopy(ours)(x))


@each_package
def test_any_shape(name):
    theirs, ours = made(name)
    same(theirs, ours, batch(1))
    assert ours(batch(0)).shape == theirs(batch(0)).shape
    if "pyro" not in name:
        same(theirs, ours, batch(24).view(2, 3, 4, FEATURES)[:, ::2])


# --- Who looks sees the original's values --------------------------------------------------


def _parts(model):
    return {n: m for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}


@each_network
@pytest.mark.parametrize("everywhere", [False, True], ids=["one", "all"])
def test_a_hook_sees_what_it_saw(name, everywhere, within):
    theirs, ours = made(name)
    within.clear()
    seen = [], []
    for part in _parts(theirs):
        if part == "" or "dropout" in part:
            continue
        handles = []
        for model, values in zip((theirs, ours), seen, strict=True):
            values.clear()

            def see(module, inputs, output, values=values):
                values.append((inputs[0].clone(), output))

            if everywhere:
                handles.append(nn.modules.module.register_module_forward_hook(see))
                model(batch())
                handles.pop().remove()
            else:
                handles.append(_parts(model)[part].register_forward_hook(see))
                model(batch())
        assert len(seen[0]) == len(seen[1])
        for one, other in zip(*seen, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        for handle in handles:
            handle.remove()
    within.clear()
    same(theirs, ours, batch())
    assert within


@pytest.mark.parametrize("kind", [kind for kind in ON_A_LAYER if kind not in NEVER])
def test_whoever_looks_at_a_layer_is_called(kind, within):
    _, ours = made("zuko")
    within.clear()
    log = []
    ON_A_LAYER[kind](ours[2], log)
    ours(batch().requires_grad_()).sum().backward()
    assert log
    of_parameter = kind in ("hook of a parameter", "hook after accumulation")
    assert (within == []) != of_parameter  # it sees the gradient wherever that comes from


@pytest.mark.parametrize("kind", [kind for kind in ON_A_MODULE if kind not in NEVER])
def test_whoever_looks_at_an_activation_is_called(kind, within):
    _, ours = made("zuko")
    within.clear()
    log = []
    ON_A_MODULE[kind](ours[1], log)
    ours(batch().requires_grad_()).sum().backward()
    assert log
    assert within == []


@pytest.mark.parametrize("register", GLOBAL)
def test_whoever_looks_at_all_modules_is_called(register, within):
    _, ours = made("zuko")
    within.clear()
    log = []
    handle = getattr(nn.modules.module, register)(recorder(log))
    try:
        ours(batch().requires_grad_()).sum().backward()
    finally:
        handle.remove()
        nn.modules.module._global_is_full_backward_hook = None
    assert len(log) >= len([*ours.modules()])
    assert within == []


def _swap(model):
    layers = layers_of(model)
    parent = next(m for m in model.modules() if layers[1] in m._modules.values())
    name = next(n for n, m in parent._modules.items() if m is layers[1])
    parent._modules[name] = layers[1].restored()


def _pruned(model):
    prune.l1_unstructured(layers_of(model)[1], "weight", amount=0)


def _own_forward(model):
    layer = layers_of(model)[1]
    layer.forward = lambda x, f=layer.forward: f(x)


def _other_activation(model):
    layers_of(model)[1].activation = "none"


@each_network
@pytest.mark.parametrize("change", [_swap, _pruned, _own_forward, _other_activation])
def test_a_changed_layer_is_called(name, change, within):
    theirs, ours = made(name)
    within.clear()
    change(ours)
    same(theirs, ours, batch())
    assert within == []


def test_another_layer_of_another_order_is_called(within):
    theirs, ours = made("zuko")
    within.clear()
    ours[2], ours[4] = ours[4], ours[2]
    with pytest.raises(mk.LayoutError):
        ours(batch())
    assert within == []
    ours[2], ours[4] = ours[4], ours[2]
    same(theirs, ours, batch())
    assert len(within) == 3


def test_a_longer_sequence_is_called(within):
    theirs, ours = made("zuko")
    within.clear()
    for model in (theirs, ours):
        model.append(nn.Tanh())
    same(theirs, ours, batch())
    assert within == []
    del ours[5], theirs[5]
    same(theirs, ours, batch())
    assert within


def test_modes_that_change_what_a_block_does(within):
    theirs, ours = made("nflows, dropout")
    within.clear()
    results = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)
        results.append(model(batch()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert within == []
    same(theirs.eval(), ours.eval(), batch())
    assert within


def test_a_context_is_added_as_before(within):
    made_ = pytest.importorskip("nflows.transforms.made")
    torch.manual_seed(0)
    theirs = nn.ModuleList([made_.MADE(FEATURES, 20, context_features=3)])
    ours = copy.deepcopy(theirs)
    mk.convert_(ours, force=True)
    within.clear()
    context = torch.randn(9, 3)
    torch.testing.assert_close(
        ours[0](batch(), context), theirs[0](batch(), context), rtol=1e-4, atol=1e-5
    )
    assert within == []
    same(theirs[0], ours[0], batch())
    assert within


@each_package
def test_transforms_and_autocast(name):
    theirs, ours = made(name)
    x = batch()
    jacobians = [torch.func.jacrev(model)(x) for model in (theirs, ours)]
    torch.testing.assert_close(*jacobians, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, other = theirs(x), ours(x)
    assert one.dtype == other.dtype
    torch.testing.assert_close(other, one, rtol=5e-2, atol=5e-2)


def test_traces_for_others_are_of_the_layers(within):
    theirs, ours = made("zuko")
    within.clear()
    x = batch()
    exported = torch.export.export(ours, (x,)).module()
    scripted = torch.jit.trace(ours, x, check_trace=False)
    assert within == []
    for model in (exported, scripted):
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_other_tensors_in_place_of_the_parameters(within):
    theirs, ours = made("pyro")
    within.clear()
    doubled = {name: 2 * p.detach() for name, p in ours.named_parameters()}
    y = torch.func.functional_call(ours, doubled, (batch(),))
    assert within
    for p in theirs.parameters():
        p.data *= 2
    torch.testing.assert_close(y, theirs(batch()), rtol=1e-4, atol=1e-5)


def test_the_second_derivative_is_refused():
    _, ours = made("zuko")
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(mk.BackendError, match="reference"):
        grad.sum().backward()


@pytest.mark.parametrize(("name", "left"), [("zuko", 0), ("nflows", 2)])
def test_compiled(name, left):
    """Of nflows' activations, those of what blocks add to are no layer's."""
    theirs, ours = made(name)
    x = batch()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for _ in range(2):  # another network of the same shape takes the same graph
        compiled = torch.compile(ours, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-5)
        ours = copy.deepcopy(ours)
    (graph,) = graphs
    assert sum(node.target is F.relu for node in graph.graph.nodes) == left


# --- Copies, files, and back ---------------------------------------------------------------


@each_network
def test_copies_and_pickles_hand_on(name, within):
    _, ours = made(name)
    within.clear()
    expected = ours(batch())
    for again in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        within.clear()
        assert torch.equal(again(batch()), expected)
        assert within
        assert len(handing_on(again)) == 1
        assert type(again) is type(ours)


@each_network
def test_revert_brings_the_class_back(name):
    theirs, ours = made(name)
    classes = [type(m) for m in theirs.modules()]
    (network,) = handing_on(ours)
    assert isinstance(network, network.origin)
    before = [*ours.modules()]
    mk.revert_(nn.ModuleList([ours]))
    assert [type(m) for m in ours.modules()] == classes
    assert network in before
    assert not handing_on(ours)
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)
    same(theirs, ours, batch())


@each_network
def test_state_dicts_are_those_of_the_layers(name):
    theirs, ours = made(name)
    theirs_names = {n for n in theirs.state_dict() if not n.endswith(("mask", "degrees"))}
    ours_names = {n for n in ours.state_dict() if not n.endswith("_extra_state")}
    assert ours_names == theirs_names
    other = made(name)[1]
    for p in other.parameters():
        p.data.normal_()
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other(batch()), ours(batch()))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(batch()), ours(batch()))


def test_the_report_names_the_networks():
    theirs = nn.ModuleDict({"one": _zuko(), "other": _zuko(activation=nn.ELU)})
    report = mk.convert_(theirs, force=True)
    assert report.networks == ("one",)
    assert repr(report).endswith("\nactivations run within the layers of one")
    assert type(theirs["one"]).__name__ == "ConvertedMaskedMLP"
    alone = _zuko()
    report = mk.convert_(alone, force=True)
    assert report.networks == ("",)
    assert repr(report).endswith("within the layers of the model")
    assert mk.convert_(_zuko(activation=nn.ELU), force=True).networks == ()
    mk.revert_(alone)
    assert type(alone) is type(_zuko())


# --- Which networks ------------------------------------------------------------------------


def test_networks_that_do_more_are_left_alone():
    kept = [
        _nflows(use_batch_norm=True),
        _nflows(dropout_probability=0.5),
        _nflows(use_residual_blocks=False),
        _nflows(activation=F.elu),
        _zuko(activation=nn.ELU),
        _zuko(activation=lambda: nn.LeakyReLU(0.2)),
        _zuko(activation=lambda: nn.GELU("tanh")),
        nn.Sequential(*[*_zuko()][:2], nn.BatchNorm1d(20), *[*_zuko()][2:]),
    ]
    for network in kept:
        theirs, ours = nn.ModuleList([network]), nn.ModuleList([copy.deepcopy(network)])
        mk.convert_(ours, force=True)
        assert layers_of(ours)
        assert not handing_on(ours)
        same(theirs[0].eval(), ours[0].eval(), batch())


def test_a_class_of_its_own_forward_is_left_alone():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Sequential):
        pass

    for cls, count in ((Doubled, 0), (Named, 1)):
        theirs = nn.ModuleList([cls(*_zuko())])
        ours = copy.deepcopy(theirs)
        mk.convert_(ours, force=True)
        assert len(handing_on(ours)) == count
        same(theirs[0], ours[0], batch())


def test_another_version_of_a_package_is_left_alone(monkeypatch):
    made_ = pytest.importorskip("nflows.transforms.made")
    forward = made_.MADE.forward
    monkeypatch.setattr(
        made_.MADE, "forward", lambda self, inputs, context=None: 3 * forward(self, inputs, context)
    )
    theirs, ours = made("nflows")
    assert not handing_on(ours)
    same(theirs, ours, batch())


@each_package
def test_a_forward_that_is_replaced_later_is_called(name, monkeypatch, within):
    _, ours = made(name)
    within.clear()
    (network,) = handing_on(ours)
    origin = next(c for c in network.origin.__mro__ if network.replaces in vars(c))
    before = getattr(origin, network.replaces)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(origin, network.replaces, lambda *a: [seen.append(1), before(*a)][1])
        ours(batch())
    assert seen
    assert within == []
    ours(batch())
    assert within


def test_a_layer_that_two_networks_share():
    first = _zuko()
    second = nn.Sequential(*first)
    theirs = nn.ModuleList([first, second])
    ours = copy.deepcopy(theirs)
    mk.convert_(ours, force=True)
    for one, other in zip(theirs, ours, strict=True):
        same(one, other, batch())


def test_a_layer_alone_is_converted_by_itself():
    theirs = nn.ModuleList([_zuko()])
    theirs[0][2].register_forward_hook(lambda *_: None)  # kept
    ours = copy.deepcopy(theirs)
    report = mk.convert_(ours, force=True)
    assert [r.converted for r in report] == [True, False, True]
    assert not handing_on(ours)
    same(theirs[0], ours[0], batch())
