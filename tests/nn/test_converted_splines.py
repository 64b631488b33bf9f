"""Splines of zuko's flows after ``convert_``: the same functions, and zuko's own where ours end."""

import copy
import functools
import io
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import maskmoe_kernels as mk
from maskmoe_kernels.nn.converted_splines import SplineMaker
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.splines import SplineForm, reference
from tests.nn.seen_ops import ops_of

zuko = pytest.importorskip("zuko", reason="zuko is not installed")
MonotonicRQSTransform = zuko.transforms.MonotonicRQSTransform
pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON)
)

FEATURES, CONTEXT = 5, 2
SMALL = {"transforms": 2, "hidden_features": (16, 16)}
FLOWS = {
    "NSF": lambda: zuko.flows.NSF(FEATURES, CONTEXT, **SMALL),
    "few bins": lambda: zuko.flows.NSF(FEATURES, CONTEXT, bins=3, slope=0.05, **SMALL),
    "coupling": lambda: zuko.flows.NSF(FEATURES, CONTEXT, passes=2, **SMALL),
    "one feature": lambda: zuko.flows.NSF(1, CONTEXT, **SMALL),
    "circular": lambda: zuko.flows.NCSF(FEATURES, CONTEXT, slope=0.01, **SMALL),
}
each_flow = pytest.mark.parametrize("name", FLOWS)


def pair(name="NSF"):
    """A flow, and the same after ``convert_``; the parameters of its splines are not all alike."""
    torch.manual_seed(0)
    theirs = FLOWS[name]()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)
    ours = copy.deepcopy(theirs)
    report = mk.convert_(ours)
    assert report.splines == tuple(
        name for name, module in ours.named_modules() if hasattr(module, "univariate")
    )
    return theirs, ours


def batch(flow, rows=65):
    generator = torch.Generator().manual_seed(1)
    features = 1 if isinstance(flow.transform.transforms[0], zuko.flows.ElementWiseTransform) else 5
    x = 2.5 * torch.randn(rows, features, generator=generator)  # some outside of [-5, 5]
    if isinstance(flow, zuko.flows.NCSF):
        x = x.clamp(-3.1, 3.1)  # angles
    return x, torch.randn(rows, CONTEXT, generator=generator)


def makers(flow):
    return [m.univariate for m in flow.modules() if hasattr(m, "univariate")]


def close(one, other, tolerance=1e-4):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- The same flow -------------------------------------------------------------------------------


@each_flow
def test_densities_and_gradients_are_the_same(name):
    theirs, ours = pair(name)
    x, context = batch(theirs)
    found = []
    for flow in (theirs, ours):
        leaf = x.clone().requires_grad_()
        log_prob = flow(context).log_prob(leaf)
        log_prob.mean().backward()
        found.append([log_prob.detach(), leaf.grad, *(p.grad for p in flow.parameters())])
    for one, other in zip(*found, strict=True):
        close(other, one, 1e-3)
    assert ops_of(lambda: ours(context).log_prob(x)) == ["rational_quadratic"] * 2
    assert not ops_of(lambda: theirs(context).log_prob(x))


@each_flow
def test_samples_and_their_gradients_are_the_same(name):
    theirs, ours = pair(name)
    _, context = batch(theirs)
    found = []
    for flow in (theirs, ours):
        torch.manual_seed(2)
        sample = flow(context).rsample()
        sample.square().mean().backward()
        found.append([sample.detach(), *(p.grad for p in flow.parameters())])
    for one, other in zip(*found, strict=True):
        close(other, one, 2e-3)
    with torch.no_grad():
        ops = ops_of(lambda: ours(context).sample())
    assert {*ops} == {"rational_quadratic_inverse"}


def test_a_transform_is_zukos_and_shows_what_zukos_shows():
    theirs, ours = (flow.transform.transforms[0] for flow in pair())
    x, context = batch(pair()[0])
    one, other = (module.meta(context, x).base for module in (theirs, ours))
    assert isinstance(other, MonotonicRQSTransform)
    assert other.bins == one.bins == 8
    for name in ("horizontal", "vertical", "derivatives"):
        assert torch.equal(getattr(other, name), getattr(one, name))
    assert repr(ours) == repr(theirs)
    assert repr(other) == "ConvertedMonotonicRQSTransform(bins=8)"
    assert other.domain == one.domain
    assert other.bijective
    close(other.inv(other(x)), x, 1e-3)
    close(other.inv.log_abs_det_jacobian(other(x), x), -one.log_abs_det_jacobian(x, one(x)))
    with pytest.raises(AttributeError, match="no attribute 'vertikal'"):
        _ = other.vertikal


def test_nothing_of_zukos_is_computed():
    _, ours = pair()
    x, context = batch(ours)
    transform = ours.transform.transforms[0].meta(context, x).base
    transform.call_and_ladj(x)
    transform.inv(x)
    assert "horizontal" not in vars(transform)
    assert vars(transform).keys() >= vars(torch.distributions.Transform()).keys()


def test_the_definition_is_zukos():
    generator = torch.Generator().manual_seed(3)
    x, rows = (torch.randn(3, 4, 5, *n, generator=generator).double() for n in ((), (11,)))
    x, parameters = 3 * x, (3 * rows).split([4, 4, 3], -1)
    theirs = MonotonicRQSTransform(*parameters, bound=3.5, slope=0.02)
    found = reference.rational_quadratic(x, *parameters, SplineForm(3.5, 0.02))
    for one, other in zip(found, theirs.call_and_ladj(x), strict=True):
        torch.testing.assert_close(one, other)
    back, _ = reference.rational_quadratic_inverse(x, *parameters, SplineForm(3.5, 0.02))
    torch.testing.assert_close(back, theirs.inv(x))


def test_a_score_and_its_divergence():
    """The gradient of a density by x, and the gradient of that: score matching."""
    theirs, ours = pair()
    x, context = batch(theirs, 20)
    found = []
    for flow in (theirs, ours):
        leaf = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(flow(context).log_prob(leaf).sum(), leaf, create_graph=True)
        score.square().mean().backward()
        found.append([score.detach(), *(p.grad for p in flow.parameters())])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 2e-3 * float(one.norm())


def test_training_goes_the_same_way():
    theirs, ours = pair()
    x, context = batch(theirs, 256)
    losses = []
    for flow in (theirs, ours):
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = -flow(context).log_prob(x.clamp(-4, 4)).mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# --- Copies, and the way back --------------------------------------------------------------------


def test_copies_and_files():
    _, flow = pair()
    x, context = batch(flow)
    wanted = flow(context).log_prob(x)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for other in (
        copy.deepcopy(flow),
        pickle.loads(pickle.dumps(flow)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(context).log_prob(x), wanted)
        assert ops_of(lambda other=other: other(context).log_prob(x))


def test_the_way_back():
    theirs, ours = pair()
    assert all(type(maker) is SplineMaker for maker in makers(ours))
    before = [maker.origin for maker in makers(ours)]
    again = mk.convert_(ours)
    assert again.splines == ()
    assert [maker.origin for maker in makers(ours)] == before
    mk.revert_(ours)
    assert all(a is b for a, b in zip(makers(ours), before, strict=True))
    x, context = batch(theirs)
    assert torch.equal(ours(context).log_prob(x), theirs(context).log_prob(x))


def test_the_report_names_them():
    torch.manual_seed(0)
    flow = FLOWS["NSF"]()
    text = repr(mk.convert_(flow))
    assert text.endswith(
        "splines run in one pass in transform.transforms.0, transform.transforms.1"
    )
    one = FLOWS["one feature"]()
    assert repr(mk.convert_(one)).splitlines() == [
        "no MaskedLinear of zuko, nflows or pyro found",
        "splines run in one pass in transform.transforms.0, transform.transforms.1",
    ]


# --- Where ours end ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_another_backend_leaves_them(backend):
    flow = FLOWS["NSF"]()
    assert mk.convert_(flow, backend=backend).splines == ()
    assert mk.convert_(flow, backend="native").splines


def test_other_numbers_are_zukos():
    theirs, ours = pair()
    x, context = batch(theirs)
    assert mk.convert_(copy.deepcopy(theirs).double()).splines == ()
    theirs.double(), ours.double()
    calls = x.double(), context.double()
    assert not ops_of(lambda: ours(calls[1]).log_prob(calls[0]))
    assert torch.equal(ours(calls[1]).log_prob(calls[0]), theirs(calls[1]).log_prob(calls[0]))
    theirs.float(), ours.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(context).log_prob(x), theirs(context).log_prob(x))


def test_transforms_of_functions():
    theirs, ours = pair()
    x, context = batch(theirs, 4)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        one, other = (
            transform(lambda x, f=f: f(context[0]).log_prob(x))(x[0]) for f in (theirs, ours)
        )
        close(other, one, 1e-3)
    one, other = (
        torch.func.vmap(lambda x, c, f=f: f(c).log_prob(x))(x, context) for f in (theirs, ours)
    )
    close(other, one)


def test_compiled_it_is_ours():
    theirs, ours = pair()
    x, _ = batch(theirs)
    maker, own = (flow.transform.transforms[0].univariate for flow in (ours, theirs))
    rows = torch.randn(65, 23, generator=torch.Generator().manual_seed(0))
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph.code)
        return make_boxed_func(graph)

    def spline(x, rows, maker=maker):
        y, ladj = maker(*rows.split([8, 8, 7], -1)).call_and_ladj(x)
        return y + ladj

    torch.compiler.reset()
    compiled = torch.compile(spline, fullgraph=True, backend=aot_autograd(fw_compiler=kept))
    found = []
    for function in (compiled, functools.partial(spline, maker=own)):
        leaf = rows.clone().requires_grad_()
        y = function(x[:, 0], leaf)
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-3)
    assert [code.count("maskmoe.rational_quadratic") for code in graphs] == [1, 1]


@pytest.mark.parametrize("name", ["NSF", "circular"])
def test_a_compiled_flow_is_the_same(name):
    theirs, ours = pair(name)
    x, context = batch(theirs)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, c: ours(c).log_prob(x), backend="aot_eager")
    close(compiled(x, context), theirs(context).log_prob(x))
    torch.compiler.reset()


def test_a_spline_for_many_rows_is_zukos():
    """Its parameters have the shape of one row."""
    flow = FLOWS["one feature"]()
    mk.convert_(flow)
    theirs = copy.deepcopy(flow)
    mk.revert_(theirs)
    x = torch.randn(7, 1, generator=torch.Generator().manual_seed(0))
    one, other = (f(torch.zeros(CONTEXT)).log_prob(x) for f in (theirs, flow))
    assert torch.equal(one, other)


def test_a_class_that_was_changed_later_is_obeyed(monkeypatch):
    theirs, ours = pair()
    x, context = batch(theirs)
    monkeypatch.setattr(
        MonotonicRQSTransform, "call_and_ladj", lambda self, x: (x + 1, torch.zeros_like(x))
    )
    assert torch.equal(ours(context).log_prob(x), theirs(context).log_prob(x))
    assert not ops_of(lambda: ours(context).log_prob(x))


class OtherSplines(MonotonicRQSTransform):
    pass


@pytest.mark.parametrize(
    "constructor",
    [
        OtherSplines,
        functools.partial(OtherSplines, slope=0.1),
        functools.partial(MonotonicRQSTransform, slope=0.1, cache_size=1),
        functools.partial(MonotonicRQSTransform, slope=2.0),
        functools.partial(MonotonicRQSTransform, slope=torch.tensor([0.1, 0.2])),
        functools.partial(MonotonicRQSTransform, bound="wide"),
        lambda *phi: MonotonicRQSTransform(*phi),
    ],
    ids=range(7),
)
def test_what_is_not_known_is_left(constructor):
    flow = FLOWS["NSF"]()
    flow.transform.transforms[0].univariate = constructor
    assert mk.convert_(flow).splines == ("transform.transforms.1",)
    assert flow.transform.transforms[0].univariate is constructor


@pytest.mark.parametrize("method", ["call_and_ladj", "_inverse"])
def test_another_formula_is_left(monkeypatch, method):
    theirs = getattr(MonotonicRQSTransform, method)

    def other(self, x):
        y = theirs(self, x)
        return (y[0], y[1] + 0.01) if isinstance(y, tuple) else y + 0.01

    monkeypatch.setattr(MonotonicRQSTransform, method, other)
    assert mk.convert_(FLOWS["NSF"]()).splines == ()


def test_another_definition_is_left(monkeypatch):
    """A version of zuko that squashes slopes in another way."""
    made = MonotonicRQSTransform.__init__

    def other(self, widths, heights, derivatives, bound=5.0, slope=1e-3, **kwargs):
        made(self, widths, heights, derivatives.tanh(), bound, slope, **kwargs)

    monkeypatch.setattr(MonotonicRQSTransform, "__init__", other)
    assert mk.convert_(FLOWS["NSF"]()).splines == ()


@pytest.mark.parametrize("default", [torch.float64, torch.device("meta")], ids=str)
def test_defaults_do_not_matter(default):
    flow = FLOWS["NSF"]()
    try:
        set_default = (
            torch.set_default_device if default == torch.device("meta") else torch.set_default_dtype
        )
        set_default(default)
        assert mk.convert_(flow).splines
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_a_bare_class_is_known():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.univariate = MonotonicRQSTransform
            self.rows = nn.Parameter(torch.randn(3, 14, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return self.univariate(*self.rows.split([5, 5, 4], -1)).call_and_ladj(x)

    theirs = Holder()
    ours = copy.deepcopy(theirs)
    report = mk.convert_(ours)
    assert report.splines == ("",)
    assert repr(report).endswith("splines run in one pass in the model")
    x = torch.tensor([0.1, -3.0, 7.0])
    for one, other in zip(ours(x), theirs(x), strict=True):
        close(one, other)
