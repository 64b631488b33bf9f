"""pyro's autoregressive networks on our layers, alone, in a flow and as a guide."""

import pytest
import torch

from tests.interop.swapped import assert_samples_like, clusters, swapped, trained

pyro = pytest.importorskip("pyro", reason="pyro is not installed")

import pyro.distributions as dist
from pyro.distributions import transforms as T
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from pyro.nn.auto_reg_nn import MaskedLinear


@pytest.fixture(autouse=True)
def empty_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("skip_connections", [False, True])
@pytest.mark.parametrize("permutation", [None, [2, 0, 1]], ids=str)
def test_a_conditional_network_is_the_same_function(skip_connections, permutation):
    torch.manual_seed(0)
    theirs = ConditionalAutoRegressiveNN(
        3, 2, [16, 16], (1, 1), skip_connections=skip_connections,
        permutation=None if permutation is None else torch.tensor(permutation),
    ).double()  # fmt: skip
    ours = swapped(theirs, MaskedLinear)
    x = torch.randn(5, 3).double().requires_grad_()
    context = torch.randn(5, 2).double()
    for ours_out, theirs_out in zip(ours(x, context), theirs(x, context), strict=True):
        torch.testing.assert_close(ours_out, theirs_out)
        grad = torch.randn_like(theirs_out)
        ours_grad, theirs_grad = (
            torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (ours_out, theirs_out)
        )
        torch.testing.assert_close(ours_grad, theirs_grad)
    order = theirs.permutation.tolist()
    jacobian = torch.autograd.functional.jacobian(lambda x: ours(x, context[0])[0], x[0])
    for k, unit in enumerate(order):
        assert not jacobian[unit, order[k:]].any()


def test_a_conditional_flow_trains_and_samples():
    torch.manual_seed(0)
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    theirs = [ConditionalAutoRegressiveNN(3, 1, [32, 32]) for _ in range(2)]
    x, context = clusters(256), torch.randn(256, 1)
    losses, flows = [], []
    for nets in ([swapped(net, MaskedLinear) for net in theirs], theirs):
        parts = [T.ConditionalAffineAutoregressive(net, stable=True) for net in nets]
        flow = dist.ConditionalTransformedDistribution(base, parts)
        parameters = [p for net in nets for p in net.parameters()]
        flows.append(flow)
        losses.append(
            trained(parameters, lambda flow=flow: -flow.condition(context).log_prob(x).mean())
        )
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-4, abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.5
    samples = []
    for flow in flows:
        torch.manual_seed(1)
        with torch.no_grad():
            samples.append(flow.condition(torch.zeros(1)).sample((2000,)))
    assert_samples_like(*samples)


def test_a_guide_of_variational_inference_finds_the_posterior():
    """A correlated posterior that is known; pyro finds our parameters by their names."""
    torch.manual_seed(0)
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]])
    posterior = torch.distributions.MultivariateNormal(torch.tensor([1.0, -1.0]), None, precision)
    net = swapped(AutoRegressiveNN(2, [16]), MaskedLinear)
    flow = T.AffineAutoregressive(net)

    def model():
        pyro.sample("z", dist.MultivariateNormal(posterior.mean, precision_matrix=precision))

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    elbo = pyro.infer.Trace_ELBO(64, vectorize_particles=True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.985}), elbo)
    for _ in range(250):
        svi.step()
    with torch.no_grad():
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        samples = dist.TransformedDistribution(base, [flow]).sample((4000,))
    torch.testing.assert_close(samples.mean(0), posterior.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(samples.T.cov(), posterior.covariance_matrix, rtol=0.15, atol=0.1)
    assert {p for p in pyro.get_param_store() if p.endswith("weight")}
