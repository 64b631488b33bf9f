"""The mixture: eq. 1, and what makes an attribution readable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import LayoutError, SubsetFamily, mixture, selection
from maskmoe_kernels.testing.strategies import families
from tests.ops.selection.definition import CONFIDENCES, define_all

seeds = st.integers(0, 2**31 - 1)
confidences = st.sampled_from([*CONFIDENCES, torch.sigmoid])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
scales = st.sampled_from([0.0, 1e-6, 0.1, 1.0, 10.0, 100.0])

CUBE = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})


def randn(family, seed, rows=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, family.num_experts)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@given(families(max_experts=16), seeds, confidences, st.sampled_from([1.0, 2.5]))
def test_equals_equation_1(family, seed, confidence, sharpness):
    logits = randn(family, seed)
    alpha, _ = define_all(logits, family, confidence, sharpness)
    expert = (torch.tanh(logits) + 1) / 2  # eq. 5
    out = mixture(logits, family, confidence, sharpness)
    total = alpha.sum(-1)
    close = {"rtol": 1e-9, "atol": 0}
    torch.testing.assert_close(out.selection, alpha, **close)
    torch.testing.assert_close(out.attribution, alpha / total[:, None], **close)
    torch.testing.assert_close(out.probability, (alpha * expert).sum(-1) / total, **close)


@given(families(), seeds, confidences, scales, dtypes)
def test_rows_are_shares_and_the_prediction_a_probability(family, seed, confidence, scale, dtype):
    logits = randn(family, seed, rows=6, dtype=dtype) * scale
    out = mixture(logits, family, confidence)
    eps = torch.finfo(out.attribution.dtype).eps
    for part in out:
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (part >= 0).all()
        assert (part <= 1).all()
    rounding = family.num_experts * eps
    assert (out.attribution.double().sum(-1) - 1).abs().max() <= rounding
    assert torch.equal(out.selection, selection(logits, family, confidence))
    # An average lies between what it averages.
    expert = torch.sigmoid(2 * logits.double())
    assert (out.probability.double() >= expert.amin(-1) - rounding - 2 * eps).all()
    assert (out.probability.double() <= expert.amax(-1) + rounding + 2 * eps).all()


@given(
    families(),
    st.sampled_from(["abs", "square", "smooth"]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_without_any_confidence_experts_count_alike(family, confidence, sharpness, dtype):
    logits = torch.zeros(2, family.num_experts, dtype=dtype)
    out = mixture(logits, family, confidence, sharpness)
    assert not out.selection.any()
    torch.testing.assert_close(
        out.attribution, torch.full_like(out.attribution, 1 / family.num_experts)
    )
    torch.testing.assert_close(out.probability, torch.full_like(out.probability, 0.5))


@given(families(), seeds)
def test_samples_do_not_meet(family, seed):
    """A sample with one unknown expert has no answer, and leaves the others' bits alone."""
    logits = randn(family, seed, rows=4)
    clean = mixture(logits, family)
    expert = seed % family.num_experts
    logits[1, expert] = torch.nan
    spoilt = mixture(logits, family)
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert spoilt.probability[1].isnan()
    assert spoilt.attribution[1].isnan().all()
    assert torch.equal(spoilt.selection[1].isnan(), family.inclusion[:, expert])


def test_one_confident_small_expert_decides():
    logits = torch.full((CUBE.num_experts,), 0.01)
    logits[0] = -20.0
    out = mixture(logits, CUBE)
    assert out.probability < 0.03
    assert out.attribution.argmax() == 0
    logits[0] = 20.0
    assert mixture(logits, CUBE).probability > 0.97


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_derivative(confidence):
    logits = randn(CUBE, 5, rows=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(mixture(z, CUBE, confidence, 2.0)), logits)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 12.0, 100.0])
def test_derivative_is_finite(scale):
    logits = (randn(CUBE, 6, dtype=torch.float32).sign() * scale).requires_grad_()
    weight = torch.randn(3, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(mixture(logits, CUBE).probability, logits, weight)
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_shape(shape):
    logits = torch.randn(*shape, CUBE.num_experts, dtype=torch.float64)
    out = mixture(logits, CUBE, "square")
    assert out.probability.shape == shape
    assert out.attribution.shape == out.selection.shape == logits.shape
    rows = logits.reshape(-1, CUBE.num_experts)
    for k, row in enumerate(rows):
        alone = mixture(row, CUBE, "square")
        torch.testing.assert_close(out.probability.reshape(-1)[k], alone.probability)
        torch.testing.assert_close(out.attribution.reshape(rows.shape)[k], alone.attribution)


def fresh_family():
    """Its tables have never been built: no eager call has warmed them."""
    return SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})


def test_compiles_whole_with_a_dynamic_batch():
    torch._dynamo.reset()
    family = fresh_family()
    compiled = torch.compile(mixture, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 17):
        logits = randn(CUBE, rows, rows=rows)
        ours, theirs = compiled(logits, family, "smooth", 2.0), mixture(logits, CUBE, "smooth", 2.0)
        torch.testing.assert_close(tuple(ours), tuple(theirs))


class Explain(torch.nn.Module):
    def __init__(self, family):
        super().__init__()
        self.family = family

    def forward(self, logits):
        return tuple(mixture(logits, self.family, "smooth", 2.0))


def test_exports_with_a_dynamic_batch():
    model = Explain(fresh_family())
    shapes = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(model, (randn(CUBE, 0),), dynamic_shapes=shapes)
    for rows in (1, 5):
        logits = randn(CUBE, rows, rows=rows)
        expected = tuple(mixture(logits, CUBE, "smooth", 2.0))
        torch.testing.assert_close(program.module()(logits), expected)
        torch.testing.assert_close(model(logits), expected)  # the trace left nothing behind


def test_a_thousand_experts():
    family = SubsetFamily.powerset({f"g{n}": 1 for n in range(10)})
    logits = randn(family, 0, rows=64, dtype=torch.float32) * 3
    out = mixture(logits, family)
    torch.testing.assert_close(out.attribution.sum(-1), torch.ones(64))
    exact = mixture(logits.double(), family)
    torch.testing.assert_close(out.probability.double(), exact.probability, rtol=1e-4, atol=0)


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match=r"H=7, got \(4, 6\)"):
        mixture(torch.zeros(4, 6), CUBE)
    with pytest.raises(LayoutError, match="'median'"):
        mixture(torch.zeros(4, 7), CUBE, "median")
    with pytest.raises(LayoutError, match="from 1e-6 to 1e6, got 0"):
        mixture(torch.zeros(4, 7), CUBE, sharpness=0)
