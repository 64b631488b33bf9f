"""nflows' masked autoregressive flow on our layers."""

import pytest
import torch

from tests.interop.swapped import assert_samples_like, clusters, swapped, trained

pytest.importorskip("nflows", reason="nflows is not installed")

from nflows.distributions.normal import StandardNormal
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from nflows.flows.base import Flow
from nflows.transforms import CompositeTransform, ReversePermutation
from nflows.transforms.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.made import MaskedLinear


def maf(**options):
    torch.manual_seed(0)
    return MaskedAutoregressiveFlow(3, 32, 2, 1, **options)


def splines():
    torch.manual_seed(0)
    parts = []
    for _ in range(2):
        parts += [
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                3, 32, num_bins=4, tails="linear", tail_bound=6.0
            ),
            ReversePermutation(3),
        ]
    return Flow(CompositeTransform(parts), StandardNormal([3]))


FLOWS = {
    "residual": maf,
    "feedforward": lambda: maf(use_residual_blocks=False),
    "random masks": lambda: maf(use_residual_blocks=False, use_random_masks=True),
    "splines": splines,
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_trains_and_samples(name):
    theirs = FLOWS[name]()
    ours = swapped(theirs, MaskedLinear)
    x = clusters(256)
    losses = [
        trained(model.parameters(), lambda model=model: -model.log_prob(x).mean())
        for model in (ours, theirs)
    ]
    assert losses[0][:10] == pytest.approx(losses[1][:10], rel=1e-4, abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.5
    torch.manual_seed(1)
    with torch.no_grad():
        samples = ours.sample(2000)
    assert samples.isfinite().all()
    assert_samples_like(samples, x)


def test_its_checkpoints_load():
    theirs, ours = maf(), swapped(maf(), MaskedLinear)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    x = clusters(8)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
