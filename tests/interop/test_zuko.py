"""zuko's flows on our layers: trained, sampled, and the same as on zuko's own."""

import pytest
import torch

from tests.interop.swapped import assert_samples_like, clusters, swapped, trained

zuko = pytest.importorskip("zuko", reason="zuko is not installed")

FLOWS = {
    "MAF": lambda: zuko.flows.MAF(3, context=2, transforms=2, hidden_features=(32, 32)),
    "NSF": lambda: zuko.flows.NSF(3, context=2, transforms=2, hidden_features=(32, 32), bins=4),
    "coupling": lambda: zuko.flows.NICE(3, context=2, transforms=2, hidden_features=(32, 32)),
}


def flow(name):
    torch.manual_seed(0)
    return FLOWS[name]()


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_a_flow_trains_and_samples(name):
    theirs = flow(name)
    ours = swapped(theirs, zuko.nn.MaskedLinear)
    x, context = clusters(256), torch.randn(256, 2)
    losses = [
        trained(model.parameters(), lambda model=model: -model(context).log_prob(x).mean())
        for model in (ours, theirs)
    ]
    # Step for step the same, while rounding has not grown.
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-4, abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0, abs=0.2)
    torch.manual_seed(1)
    with torch.no_grad():
        samples = ours(torch.zeros(2)).sample((2000,))
    assert_samples_like(samples, x)


@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_a_sample_goes_back_to_where_it_came_from(name):
    ours = swapped(flow(name).double(), zuko.nn.MaskedLinear)
    x, context = clusters(32).double(), torch.randn(32, 2).double()
    transform = ours(context).transform
    z, volume = transform.call_and_ladj(x)
    torch.testing.assert_close(transform.inv(z), x, rtol=1e-6, atol=1e-6)
    # Autoregressive: coordinate k of z depends on those up to k in one order, so the determinant
    # is that of a triangular matrix.
    jacobian = torch.autograd.functional.jacobian(lambda x: ours(context[0]).transform(x), x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], volume[0], rtol=1e-4, atol=1e-4)


def test_what_has_no_masked_layer_stays():
    with pytest.raises(AssertionError):
        swapped(flow("coupling"), zuko.nn.MaskedLinear)


def test_checkpoints_pass_in_both_directions():
    theirs = flow("MAF")
    ours = swapped(flow("MAF"), zuko.nn.MaskedLinear)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, context = clusters(8), torch.randn(8, 2)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(context).log_prob(x)
    torch.testing.assert_close(ours(context).log_prob(x), expected)
    back = flow("MAF")
    for name, module in ours.named_modules():
        if hasattr(module, "dense_weight"):
            back.get_submodule(name).load_state_dict(
                module.to_linear().state_dict() | {"mask": module.layout.mask()}
            )
    torch.testing.assert_close(back(context).log_prob(x), expected)
