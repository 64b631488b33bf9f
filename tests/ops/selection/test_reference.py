"""The definition in float64 is section 3.3 word by word, and what users call agrees with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.ops.selection import deselection
from maskmoe_kernels.ops.selection.reference import (
    gem_loss_reference,
    mixture_reference,
    selection_reference,
)
from maskmoe_kernels.testing import strategies
from tests.ops.selection.definition import CONFIDENCES, define_all

seeds = st.integers(0, 2**16)
sharpnesses = st.sampled_from([1.0, 0.5, 3.0])
confidences = st.sampled_from(CONFIDENCES)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(strategies.families(), confidences, sharpnesses, seeds)
def test_word_by_word(family, confidence, sharpness, seed):
    logits = draw(seed, 2, family.num_experts)
    alpha, product = define_all(logits, family, confidence, sharpness)
    for own, expected in ((True, alpha), (False, product)):
        found = selection_reference(logits, family, confidence, sharpness, own)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@given(strategies.families(), confidences, sharpnesses, seeds)
def test_what_users_call_agrees(family, confidence, sharpness, seed):
    logits = draw(seed, 3, family.num_experts).requires_grad_()
    given_ = logits, family, confidence, sharpness
    pairs = [
        (mk.selection(*given_), selection_reference(*given_)),
        (deselection(*given_), selection_reference(*given_, own=False)),
        *zip(mk.mixture(*given_), mixture_reference(*given_), strict=True),
    ]
    cotangent = draw(seed + 1, 3, family.num_experts)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
        by = cotangent if ours.dim() == 2 else cotangent[:, 0]
        grads = [torch.autograd.grad(y, logits, by, retain_graph=True)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@given(
    strategies.families(),
    confidences,
    st.sampled_from(["selection", "deselection"]),
    st.sampled_from([None, "sample", "expert", "batch"]),
    st.booleans(),
    seeds,
)
def test_the_loss_agrees(family, confidence, weighting, normalize, masked, seed):
    logits = draw(seed, 4, family.num_experts).requires_grad_()
    target = (draw(seed + 1, 4) > 0).double()
    mask = draw(seed + 2, 4) > -0.5 if masked else None
    given_ = logits, target, family, confidence, weighting, normalize, mask, 2.0
    losses = mk.gem_loss(*given_), gem_loss_reference(*given_)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(loss, logits, allow_unused=True)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("normalize", [None, "sample", "expert", "batch"])
def test_weights_that_are_all_zero_stay_zero(normalize):
    family = mk.SubsetFamily.powerset({"a": 1, "b": 1})
    logits = torch.zeros(3, 3)
    assert float(gem_loss_reference(logits, torch.ones(3), family, normalize=normalize)) == 0
