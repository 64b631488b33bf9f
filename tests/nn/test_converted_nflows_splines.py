"""Splines of nflows' flows after ``convert_``: the same functions, and nflows' where ours end."""

import copy
import io

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops import native
from tests.nn.seen_ops import ops_of

pytest.importorskip("nflows", reason="nflows is not installed")

from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import CompositeTransform
from nflows.transforms.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Autoregressive,
)
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform as Coupling

pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON)
)
FEATURES = 5
TAILS = {"tails": "linear", "tail_bound": 2.5}


def coupling(number, **options):
    mask = torch.arange(FEATURES) % 2 == number
    return Coupling(mask, lambda i, o: ResidualNet(i, o, 16), **{**TAILS, **options})


def flow_of(make):
    return Flow(CompositeTransform([make(0), make(1)]), StandardNormal([FEATURES]))


FLOWS = {
    "autoregressive": lambda: flow_of(lambda _: Autoregressive(FEATURES, 16, **TAILS)),
    "few bins": lambda: flow_of(
        lambda _: Autoregressive(
            FEATURES, 16, num_bins=3, min_bin_width=0.05, min_derivative=0.1, **TAILS
        )
    ),
    "coupling": lambda: flow_of(coupling),
}
each_flow = pytest.mark.parametrize("name", FLOWS)


def pair(name="autoregressive"):
    """A flow, and the same after ``convert_``; the parameters of its splines are not all alike."""
    torch.manual_seed(0)
    theirs = FLOWS[name]()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = copy.deepcopy(theirs)
    report = mk.convert_(ours)
    assert report.splines == ("_transform._transforms.0", "_transform._transforms.1")
    return theirs, ours


def batch(rows=65):
    return 2 * torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(1))


def close(one, other, tolerance=1e-4):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- The same flow -------------------------------------------------------------------------------


@each_flow
def test_densities_and_gradients_are_the_same(name):
    theirs, ours = pair(name)
    found = []
    for flow in (theirs, ours):
        leaf = batch().requires_grad_()
        log_prob = flow.log_prob(leaf)
        log_prob.mean().backward()
        if flow is ours:
            mk.revert_(flow)  # its weights are dense again, with their gradients
        found.append([log_prob.detach(), leaf.grad, *(p.grad for p in flow.parameters())])
    for one, other in zip(*found, strict=True):
        if one is None:
            assert other is None
        else:
            close(other, one, 1e-3)


@each_flow
def test_samples_their_densities_and_gradients_are_the_same(name):
    theirs, ours = pair(name)
    found = []
    for flow in (theirs, ours):
        noise = batch().requires_grad_()
        sample, log_det = flow._transform.inverse(noise)
        (sample.sin().sum() + log_det.square().mean()).backward()
        found.append([sample.detach(), log_det.detach(), noise.grad])
    for one, other in zip(*found, strict=True):
        close(other, one, 5e-3)


def test_our_ops_run_and_nothing_of_nflows():
    theirs, ours = pair()
    x = batch()
    with torch.no_grad():
        assert ops_of(lambda: ours.log_prob(x)) == ["rational_quadratic"] * 2
        assert {*ops_of(lambda: ours.sample(3))} == {"rational_quadratic_inverse"}
        assert not ops_of(lambda: theirs.log_prob(x))


def test_images():
    def make():
        torch.manual_seed(0)
        mask = torch.tensor([True, False, True])
        return Coupling(
            mask, lambda i, o: ConvResidualNet(i, o, 8), num_bins=4, img_shape=[4, 4], **TAILS
        )

    theirs, ours = make(), make()
    assert mk.convert_(ours).splines == ("",)
    x = 2 * torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for one, other in zip(theirs(x), ours(x), strict=True):
        close(other, one)
    with torch.no_grad():
        assert ops_of(lambda: ours(x)) == ["rational_quadratic"]


def test_an_empty_batch():
    _, ours = pair()
    assert ours.log_prob(torch.zeros(0, FEATURES)).shape == (0,)


def test_a_compiled_flow_takes_the_op():
    theirs, ours = pair()
    torch._dynamo.reset()
    x = batch()
    compiled = torch.compile(ours._transform, backend="aot_eager")
    for one, other in zip(compiled(x), theirs._transform(x), strict=True):
        close(one, other)


# --- What stays nflows' --------------------------------------------------------------------------


def test_other_dtypes_and_transforms_are_nflows():
    theirs, ours = pair()
    x = batch()
    wide, mine = (copy.deepcopy(flow).double() for flow in (theirs, ours))
    assert not ops_of(lambda: mine.log_prob(x.double()))
    close(mine.log_prob(x.double()), wide.log_prob(x.double()), 1e-9)
    transform = ours._transform._transforms[0]
    parameters = torch.randn(65, FEATURES * 29, generator=torch.Generator().manual_seed(2))
    assert not ops_of(
        lambda: torch.func.grad(lambda p: transform._elementwise(x, p.clone())[1].sum())(parameters)
    )


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: Autoregressive(FEATURES, 16, tails=None), 0),
        (lambda: Autoregressive(FEATURES, 16, num_bins=70, min_bin_width=1e-3, **TAILS), 0),
        (lambda: Autoregressive(FEATURES, 16, min_bin_width=0.0, **TAILS), 0),
        (lambda: Autoregressive(FEATURES, 16, **TAILS).double(), 0),
        (lambda: coupling(0, tails=None), 0),
        (lambda: Autoregressive(FEATURES, 16, **TAILS), 1),
    ],
)
def test_what_the_kernels_do_not_take_is_left_alone(make, count):
    transform = make()
    cls = type(transform)
    assert len(mk.convert_(transform).splines) == count
    assert (type(transform) is cls) == (count == 0)


def test_a_method_that_was_changed_counts(monkeypatch):
    _, ours = pair()
    transform = ours._transform._transforms[0]
    monkeypatch.setattr(Autoregressive, "_elementwise", lambda *_: ("theirs",) * 2)
    assert transform(batch()) == ("theirs", "theirs")
    monkeypatch.undo()
    assert ops_of(lambda: transform(batch()))

    class Own(Autoregressive):
        def _elementwise(self, *args):
            return super()._elementwise(*args)

    assert not mk.convert_(Own(FEATURES, 16, **TAILS)).splines


def test_options_that_are_changed_later_count():
    theirs, ours = pair()
    for flow in (theirs, ours):
        for transform in flow._transform._transforms:
            transform.tail_bound = 1.5
            transform.min_derivative = 0.3
    close(ours.log_prob(batch()), theirs.log_prob(batch()))
    for transform in ours._transform._transforms:
        transform.min_bin_width = 0.5
    with pytest.raises(ValueError, match="Minimal bin width too large"):
        ours.log_prob(batch())


def test_nothing_that_is_not_finite_reaches_another_sample():
    _, ours = pair()
    x = batch()
    clean = ours.log_prob(x)
    x[7, 2] = torch.nan
    dirty = ours.log_prob(x)
    others = torch.arange(65) != 7
    assert torch.equal(dirty[others], clean[others])
    assert bool(dirty[7].isnan())


# --- Copies, and the way back --------------------------------------------------------------------


def test_copies_files_and_the_way_back():
    theirs, ours = pair()
    x = batch()
    wanted = ours.log_prob(x)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (copy.deepcopy(ours), torch.load(saved, weights_only=False)):
        assert torch.equal(other.log_prob(x), wanted)
        assert isinstance(other._transform._transforms[0], Autoregressive)
        assert ops_of(lambda flow=other: flow.log_prob(x))
    mk.revert_(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(ours.log_prob(x), theirs.log_prob(x))


def test_another_backend_has_no_splines():
    flow = FLOWS["autoregressive"]()
    assert not mk.convert_(flow, backend="torch").splines
