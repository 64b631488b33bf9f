"""Groups that are missing in a row: the experts that see them are left out, the others decide."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.models.gru import InterpretableGRU
from maskmoe_kernels.testing.strategies import families
from tests.ops.selection.definition import CONFIDENCES, confidence_of

seeds = st.integers(0, 2**31 - 1)
confidences = st.sampled_from([*CONFIDENCES, torch.sigmoid])
CUBE = mk.SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})
NAN = torch.nan


def of_known(row, family, confidence, sharpness):
    """The mixture of the family of the experts that are known, in plain loops (section 3.3)."""
    known = [i for i, z in enumerate(row) if z == z]
    strict = family.strict.tolist()
    g = {i: confidence_of(row[i], confidence) for i in known}
    for j in known:
        if any(strict[i][j] for i in known):
            g[j] = g[j] ** sharpness
    alpha = [0.0] * len(row)
    for i in known:
        alpha[i] = g[i]
        for j in known:
            alpha[i] *= 1 - g[j] if strict[i][j] else 1
    total = sum(alpha)
    share = [a / total for a in alpha]
    probability = sum(share[i] / (1 + math.exp(-2 * row[i])) for i in known)
    return probability, alpha, share


@given(families(max_experts=12), seeds, confidences, st.sampled_from([1.0, 2.5]))
def test_is_the_mixture_of_the_experts_that_are_known(family, seed, confidence, sharpness):
    """Whoever is unknown: every expert by chance, not only those that a missing group silences."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, family.num_experts, generator=generator, dtype=torch.float64)
    unknown = torch.rand(logits.shape, generator=generator) < 0.4
    unknown[unknown.all(-1), 0] = False
    logits[unknown] = NAN
    out = mk.mixture(logits, family, confidence, sharpness, missing="skip")
    for row, found in zip(logits.tolist(), zip(*out, strict=True), strict=True):
        for ours, expected in zip(found, of_known(row, family, confidence, sharpness), strict=True):
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-15)
    assert torch.equal(out.attribution == 0, (out.selection == 0))
    assert not out.attribution[unknown].any()
    assert (out.attribution.sum(-1) - 1).abs().max() < 1e-12


@given(families(max_experts=12), seeds, confidences, st.sampled_from([1.0, 2.5]))
def test_where_nothing_is_missing_it_changes_nothing(family, seed, confidence, sharpness):
    logits = torch.randn(4, family.num_experts, generator=torch.Generator().manual_seed(seed))
    plain, skip = (
        mk.mixture(logits, family, confidence, sharpness, how) for how in ("propagate", "skip")
    )
    for a, b in zip(plain, skip, strict=True):
        assert torch.equal(a, b)


@given(families(max_experts=12), seeds)
def test_a_missing_group_takes_no_factor_from_an_expert_that_does_not_see_it(family, seed):
    """alpha of the others is what it was: who is inside a known expert's subset is known."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, family.num_experts, generator=generator, dtype=torch.float64)
    group = seed % len(family.groups)
    sees = family.membership[:, group]
    whole = mk.mixture(logits, family)
    out = mk.mixture(logits.masked_fill(sees, NAN), family, missing="skip")
    if sees.all():
        assert all(part.isnan().all() for part in out)
        return
    assert torch.equal(out.selection[:, ~sees], whole.selection[:, ~sees])
    assert not out.selection[:, sees].any()


def test_nobody_left_is_nan_and_nobody_sure_counts_alike():
    logits = torch.zeros(2, 7)
    logits[0] = NAN
    logits[1, 3:] = NAN
    out = mk.mixture(logits, CUBE, missing="skip")
    assert all(part[0].isnan().all() for part in out)
    assert out.probability[1] == 0.5
    assert torch.equal(out.attribution[1], torch.tensor([1 / 3] * 3 + [0.0] * 4))


def test_has_a_gradient_where_experts_are_known():
    logits = torch.randn(4, 7, dtype=torch.float64)
    logits[:, 2] = NAN
    logits.requires_grad_()
    out = mk.mixture(logits, CUBE, missing="skip")
    (grad,) = torch.autograd.grad(out.probability, logits, torch.randn(4).double())
    assert torch.equal(grad != 0, ~logits.isnan())


@pytest.mark.parametrize("backend", [None, "native", "torch", "reference"])
@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_predict_answers_rows_with_missing_groups(backend, sharpness):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [8, 8], backend=backend)
    x = torch.randn(4, 6)
    x[1, 2] = x[2, 5] = x[3, 0] = x[3, 2] = x[3, 5] = NAN  # b; c; all of them
    plain, out = (net.predict(x, sharpness=sharpness, missing=how) for how in ("propagate", "skip"))
    assert plain.probability.isnan().tolist() == [False, True, True, True]
    assert out.probability.isnan().tolist() == [False, False, False, True]
    torch.testing.assert_close(out.probability[0], plain.probability[0])
    for row, group in ((1, "b"), (2, "c")):
        sees = CUBE.membership[:, [*CUBE.groups].index(group)]
        rest = {"a", "b", "c"} - {group}
        left = mk.SubsetFamily.powerset(
            {name: CUBE.groups[name] for name in CUBE.groups if name in rest}
        )
        expected = mk.mixture(net(x)[row, ~sees], left, sharpness=sharpness)
        torch.testing.assert_close(out.probability[row], expected.probability)
        torch.testing.assert_close(out.attribution[row, ~sees], expected.attribution)
        assert not out.attribution[row, sees].any()


def test_session_models_predict_with_missing_groups():
    family = mk.SubsetFamily.powerset({"a": 2, "b": 1})
    model = InterpretableGRU(family, {"a": 2}, 4)
    first, second = torch.randn(2, 3, 3), torch.randn(2, 4, 2)
    first[1, 2, 2] = NAN  # b, in the second session
    plain = model.predict(first, second).probability
    out = model.predict(first, second, missing="skip")
    assert torch.equal(plain.isnan(), torch.tensor([[False], [True]]).expand(2, 4))
    assert not out.probability.isnan().any()
    torch.testing.assert_close(out.attribution[1], torch.tensor([1.0, 0.0, 0.0]).expand(4, 3))


def test_an_unknown_way_is_refused():
    net = mk.InterpretableMLP(CUBE, [4])
    for call in (
        lambda: net.predict(torch.randn(2, 6), missing="drop"),
        lambda: mk.mixture(torch.randn(2, 7), CUBE, missing="drop"),
    ):
        with pytest.raises(
            mk.LayoutError, match=r"missing must be one of \['propagate', 'skip'\], got 'drop'"
        ):
            call()
