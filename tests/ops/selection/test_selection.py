"""Selection: the definition, its three properties (section 3.3.2), and its digits."""

import math
import time

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import LayoutError, SubsetFamily, selection
from maskmoe_kernels.ops.selection import deselection, rare_positive
from maskmoe_kernels.testing.strategies import families
from tests.ops.selection.definition import CONFIDENCES, confidence_of, define, define_all

seeds = st.integers(0, 2**31 - 1)
confidences = st.sampled_from([*CONFIDENCES, "callable"])
sharpnesses = st.sampled_from([0.5, 1.0, 1.5, 4.0])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])

CUBE = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})
CHAIN = SubsetFamily(
    {"a": 1, "b": 1, "c": 1, "d": 1}, {name: list(name) for name in ("abc", "a", "abcd", "ab")}
)


def half_sine(logits):
    """A confidence of one's own, in [0, 1]."""
    return torch.sin(logits) / 2 + 0.5


def named(confidence):
    return half_sine if confidence == "callable" else confidence


def random_logits(family, seed, rows=3, dtype=torch.float64, extremes=True):
    """Logits of every size, from 1e-8 to 300, zeros and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, family.num_experts)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    if extremes:
        sizes = torch.tensor([0.0, 1e-8, 1e-3, 0.3, 1.0, 3.0, 30.0, 300.0, torch.inf])
        logits = torch.where(logits == 0, 1.0, logits)
        logits *= sizes[torch.randint(len(sizes), shape, generator=generator)]
    return logits.to(dtype)


# --- The definition --------------------------------------------------------------------------


@given(families(max_experts=16), seeds, confidences, sharpnesses)
def test_equals_the_definition(family, seed, confidence, sharpness):
    logits = 1.5 * random_logits(family, seed, extremes=False)
    alpha, above = define_all(logits, family, named(confidence), sharpness)
    # 1 - g of a callable cancels: its digits are lost in the definition as in ours.
    close = {"rtol": 1e-9, "atol": 1e-12 if confidence == "callable" else 0}
    arguments = (family, named(confidence), sharpness)
    torch.testing.assert_close(selection(logits, *arguments), alpha, **close)
    torch.testing.assert_close(deselection(logits, *arguments), above, **close)


def test_by_hand():
    family = SubsetFamily({"a": 1, "b": 1}, {"both": ["a", "b"], "a": ["a"], "none": []})
    z = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
    both, a, none = torch.tanh(z).abs().tolist()
    expected = [both * (1 - a) * (1 - none), a * (1 - none), none]
    torch.testing.assert_close(selection(z, family), torch.tensor(expected, dtype=torch.float64))
    # Sharpness 3 raises the confidence of those with a larger one above them: not of `both`.
    expected = [both * (1 - a**3) * (1 - none**3), a**3 * (1 - none**3), none**3]
    torch.testing.assert_close(
        selection(z, family, sharpness=3), torch.tensor(expected, dtype=torch.float64)
    )


def test_confidences_by_hand():
    alone = SubsetFamily({"a": 1}, {"a": ["a"]})
    for probability in (0.001, 0.2, 0.3, 0.31, 0.5, 0.7, 0.999):
        z = torch.tensor([math.atanh(2 * probability - 1)], dtype=torch.float64)
        f, q = abs(2 * probability - 1), abs(probability - 0.3)
        expected = {
            "abs": f,
            "square": f * f,
            "smooth": 2 * f**4 / (1 + f**3),
            "rare": q**4 / (1 + q**3) * (1 + 0.7**3) / 0.7**4,
        }
        for name, value in expected.items():
            assert selection(z, alone, name).item() == pytest.approx(value, rel=1e-9, abs=1e-33)


@given(seeds, st.sampled_from([0.1, 0.3, 0.5]), st.integers(2, 6))
def test_rare_positive_with_any_threshold(seed, threshold, power):
    logits = 2 * random_logits(CUBE, seed, extremes=False)
    confidence = rare_positive(threshold, power)
    p = torch.sigmoid(2 * logits)
    q = (p - threshold).abs()
    g = q**power / (1 + q ** (power - 1))
    g = g / ((1 - threshold) ** power / (1 + (1 - threshold) ** (power - 1)))
    torch.testing.assert_close(confidence(logits), g, rtol=1e-12, atol=0)
    alpha = selection(logits, CUBE, confidence)
    expected, _ = define_all(logits, CUBE, confidence)
    torch.testing.assert_close(alpha, expected, rtol=1e-7, atol=0)
    if (threshold, power) == (0.3, 4):
        torch.testing.assert_close(alpha, selection(logits, CUBE, "rare"), rtol=1e-6, atol=0)


# --- The three properties of section 3.3.2 ---------------------------------------------------


@given(families(), seeds, confidences, sharpnesses, dtypes)
def test_selection_is_between_0_and_1(family, seed, confidence, sharpness, dtype):
    if confidence == "callable":
        # From logits that may be infinite, a function of one's own must answer itself.
        confidence = lambda z: torch.sigmoid(z)  # noqa: E731
    logits = random_logits(family, seed, dtype=dtype)
    for function in (selection, deselection):
        value = function(logits, family, confidence, sharpness)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.shape == logits.shape
        assert (value >= 0).all()  # false for NaN
        assert (value <= 1).all()


@given(
    families(),
    seeds,
    confidences,
    sharpnesses,
    st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38, -2.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_depends_on_smaller_experts_only(family, seed, confidence, sharpness, poison, dtype):
    """Sample i poisons every expert that is not inside S_i; alpha_i keeps its bits."""
    logits = random_logits(family, seed, rows=1, dtype=dtype, extremes=confidence != "callable")
    count = family.num_experts
    clean = logits.repeat(count, 1)
    spoilt = torch.where(family.inclusion, clean, torch.tensor(poison, dtype=dtype))
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    results = []
    for z in (clean, spoilt):
        z = z.requires_grad_()
        alpha = selection(z, family, named(confidence), sharpness).diagonal()
        above = deselection(z, family, named(confidence), sharpness).diagonal()
        (grad,) = torch.autograd.grad(above, z, weight.to(above), retain_graph=True)
        results.append((alpha, above, torch.where(family.inclusion, grad, 0)))
        if math.isfinite(poison):
            assert not grad[~family.strict].any()  # nothing flows to experts outside omega(i)
    for before, after in zip(*results, strict=True):
        # assert_close with equal_nan compares a diverging derivative (callables) too.
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(before.isnan(), after.isnan())
    assert not results[1][0].isnan().any()


@given(families(), seeds, confidences, st.sampled_from([torch.float64, torch.float32]))
def test_smaller_subsets_deselect_larger_ones(family, seed, confidence, dtype):
    logits = random_logits(family, seed, dtype=dtype, extremes=False) * 2
    alpha = selection(logits, family, named(confidence)).double()
    _, above = define_all(logits, family, named(confidence))
    slack = 1e-12 if dtype == torch.float64 else 2e-5
    assert (alpha <= above * (1 + slack) + 1e-15).all()
    assert (alpha <= deselection(logits, family, named(confidence))).all()
    g = logits.double().apply_(lambda z: confidence_of(z, named(confidence)))
    for i, j in family.strict.nonzero().tolist():
        assert (alpha[:, i] <= (1 - g[:, j]) * (1 + slack) + slack * 1e-2).all()


@given(families(), seeds, confidences, sharpnesses, dtypes)
def test_an_unknown_logit_reaches_all_that_contain_its_subset(
    family, seed, confidence, sharpness, dtype
):
    """Sample j has NaN at expert j: unknown are those that contain S_j, and only they."""
    count = family.num_experts
    logits = random_logits(family, seed, rows=1, dtype=dtype, extremes=confidence != "callable")
    logits = logits.repeat(count, 1).fill_diagonal_(torch.nan)
    arguments = (family, named(confidence), sharpness)
    assert torch.equal(selection(logits, *arguments).isnan(), family.inclusion.T)
    assert torch.equal(deselection(logits, *arguments).isnan(), family.strict.T)


def test_what_a_confidence_does_not_know_is_unknown():
    """A callable's own NaN counts as that of a logit."""
    logits = torch.full((CUBE.num_experts, CUBE.num_experts), 0.5).fill_diagonal_(2.0)
    alpha = selection(logits, CUBE, lambda z: torch.where(z > 1, torch.nan, z))
    assert torch.equal(alpha.isnan(), CUBE.inclusion.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_of_a_callable_are_clamped_and_keep_their_last_digit(dtype):
    family = SubsetFamily({"a": 1, "b": 1}, {"a": ["a"], "all": ["a", "b"]})
    eps = torch.finfo(dtype).eps
    values = torch.tensor([[-0.5, 1.5], [1.5, 0.5], [1 - eps / 2, 0.5]], dtype=dtype)
    above = torch.tensor([[1, 1], [1, 0], [1, eps / 2]], dtype=dtype)
    own = torch.tensor([[0, 1], [1, 0.5], [1 - eps / 2, 0.5]], dtype=dtype)
    close = {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(deselection(values, family, lambda z: z), above, **close)
    torch.testing.assert_close(selection(values, family, lambda z: z), own * above, **close)


@pytest.mark.parametrize("sharpness", [1e-6, 1e6])
def test_the_range_of_sharpness(sharpness):
    logits = torch.tensor([0.5, -2.0, 1.0, 0.25, 3.0, 0.1, 0.2], dtype=torch.float64)
    alpha, above = define_all(logits, CUBE, sharpness=sharpness)
    close = {"rtol": 1e-6, "atol": 1e-300}
    torch.testing.assert_close(selection(logits, CUBE, sharpness=sharpness), alpha, **close)
    torch.testing.assert_close(deselection(logits, CUBE, sharpness=sharpness), above, **close)


def test_certain_expert_silences_all_larger_ones():
    logits = torch.zeros(CUBE.num_experts)
    logits[0] = torch.inf
    alpha = selection(logits + 0.5, CUBE)
    inside = CUBE.strict[:, 0]
    assert alpha[0] == 1
    assert not alpha[inside].any()
    assert alpha[~inside].all()


# --- Digits ----------------------------------------------------------------------------------

SATURATED = (12.0, -12.0, 30.0, -30.0, 100.0, -100.0, 0.01, -3.0, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 64.0])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_saturated_products_keep_their_digits(confidence, sharpness, dtype):
    generator = torch.Generator().manual_seed(0)
    pool = torch.tensor(SATURATED, dtype=torch.float64)
    info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    for family in (CUBE, CHAIN):
        choice = torch.randint(len(pool), (12, family.num_experts), generator=generator)
        logits = pool[choice].to(dtype)
        alpha = selection(logits, family, confidence, sharpness)
        above = deselection(logits, family, confidence, sharpness)
        for r, row in enumerate(logits.tolist()):
            with mpmath.workdps(400):
                exact = define(
                    [mpmath.mpf(z) for z in row],
                    family,
                    confidence,
                    int(sharpness) if sharpness >= 1 else mpmath.mpf(sharpness),
                    mpmath,
                )
            for ours, theirs in zip((alpha[r], above[r]), exact, strict=True):
                for value, truth in zip(ours.tolist(), theirs, strict=True):
                    if truth < info.tiny:
                        assert value <= 2 * info.tiny
                    else:
                        # Through exp(log): the error grows with the logarithm, here below 750.
                        scale = 4 * (sharpness + 1) + 2 * abs(float(mpmath.log(truth)))
                        assert value == pytest.approx(float(truth), rel=scale * info.eps, abs=0)


@given(families(max_experts=20), seeds, st.sampled_from(["abs", "square", "smooth"]))
def test_float32_keeps_relative_accuracy(family, seed, confidence):
    logits = random_logits(family, seed).float()
    logits = logits.where(logits.isfinite(), 1.0)
    exact = selection(logits.double(), family, confidence)
    normal = exact > 1e-37
    ours = selection(logits, family, confidence).double()
    torch.testing.assert_close(ours[normal], exact[normal], rtol=5e-5, atol=0)
    assert (ours[~normal] < 2e-37).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(families(max_experts=12), seeds, confidences)
def test_low_precision_logits_are_read_exactly(dtype, family, seed, confidence):
    logits = random_logits(family, seed, dtype=dtype, extremes=confidence != "callable")
    expected = selection(logits.float(), family, named(confidence))
    assert torch.equal(selection(logits, family, named(confidence)), expected)


def test_autocast_changes_nothing(device):
    logits = random_logits(CUBE, 3, dtype=torch.float32).to(device)
    expected = selection(logits, CUBE, "smooth", 2.0)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(selection(logits, CUBE, "smooth", 2.0), expected)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("confidence", [*CONFIDENCES, half_sine])
def test_derivative(confidence, sharpness):
    logits = random_logits(CHAIN, 7, rows=4, extremes=False).requires_grad_()

    def run(z):
        return selection(z, CHAIN, confidence, sharpness)

    assert torch.autograd.gradcheck(run, logits)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("confidence", [*CONFIDENCES, torch.sigmoid])
def test_derivative_is_finite_everywhere(confidence, sharpness):
    sizes = torch.tensor([0.0, 1e-30, 1e-8, 1e-4, 0.1, 12.0, 100.0, 1e30])
    logits = torch.cat([sizes, -sizes])[:, None].repeat(1, CHAIN.num_experts).requires_grad_()
    alpha = selection(logits, CHAIN, confidence, sharpness)
    grad_alpha = torch.randn(alpha.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(alpha, logits, grad_alpha)
    assert grad.isfinite().all()


# --- Sizes, shapes and errors ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_shape(shape):
    logits = torch.randn(*shape, CUBE.num_experts, dtype=torch.float64)
    alpha = selection(logits, CUBE, "square")
    assert alpha.shape == logits.shape
    torch.testing.assert_close(alpha, define_all(logits, CUBE, "square")[0], rtol=1e-9, atol=0)


def test_strided_logits():
    wide = torch.randn(5, 4, 2 * CUBE.num_experts)[:, 1::2, ::2]
    assert torch.equal(selection(wide, CUBE), selection(wide.contiguous(), CUBE))


def test_hundreds_of_experts_are_quick():
    family = SubsetFamily.powerset({f"g{n}": 1 for n in range(22)}, max_size=2)
    assert family.num_experts == 253
    logits = torch.randn(512, 253)
    expected, _ = define_all(logits[:4], family)
    selection(logits, family)
    start = time.perf_counter()
    alpha = selection(logits, family)
    assert time.perf_counter() - start < 0.5  # about 10 ms on one core
    torch.testing.assert_close(alpha[:4].double(), expected, rtol=1e-4, atol=0)


def test_a_thousand_experts():
    family = SubsetFamily.powerset({f"g{n}": 1 for n in range(10)})
    assert family.num_experts == 1023
    logits = torch.randn(64, 1023) / 4
    alpha = selection(logits, family)
    expected, _ = define_all(logits[:1], family)
    torch.testing.assert_close(alpha[:1].double(), expected, rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize(
    ("logits", "options", "words"),
    [
        (torch.zeros(4, 6), {}, r"H=7, got \(4, 6\)"),
        (torch.tensor(1.0), {}, r"H=7, got \(\)"),
        (torch.zeros(4, 7, dtype=torch.int64), {}, "int64"),
        (torch.zeros(4, 7), {"confidence": "cube"}, "'abs', 'square', 'smooth', 'rare'.*'cube'"),
        (torch.zeros(4, 7), {"confidence": None}, "function of the logits, got None"),
        (torch.zeros(4, 7), {"confidence": lambda z: z[0]}, r"\(4, 7\), its result is \(7,\)"),
        (torch.zeros(4, 7), {"sharpness": 0}, "from 1e-6 to 1e6, got 0"),
        (torch.zeros(4, 7), {"sharpness": 9e-7}, "from 1e-6 to 1e6, got 9e-07"),
        (torch.zeros(4, 7), {"sharpness": 1.1e6}, "from 1e-6 to 1e6, got 1100000"),
        (torch.zeros(4, 7), {"sharpness": -1.5}, "from 1e-6 to 1e6, got -1.5"),
        (torch.zeros(4, 7), {"sharpness": math.nan}, "from 1e-6 to 1e6, got nan"),
    ],
)
def test_errors_carry_the_values(logits, options, words):
    for function in (selection, deselection):
        with pytest.raises(LayoutError, match=words):
            function(logits, CUBE, **options)


@pytest.mark.parametrize(("threshold", "power"), [(0.0, 4), (0.6, 4), (0.3, 1)])
def test_rare_positive_refuses_what_it_cannot_scale(threshold, power):
    with pytest.raises(LayoutError, match=f"got {threshold} and {power}"):
        rare_positive(threshold, power)


def test_a_nan_logit_stays_with_its_experts_backward_too():
    """No product with 0 may carry it: experts that do not contain the subset keep finite values."""
    family = SubsetFamily.powerset({"a": 1, "b": 1})
    logits = torch.tensor([[0.3, -0.7, torch.nan]], requires_grad=True)
    clean = torch.tensor([[0.3, -0.7, 0.5]], requires_grad=True)
    for expert in (0, 1):
        (grad,) = torch.autograd.grad(selection(logits, family)[0, expert], logits)
        (expected,) = torch.autograd.grad(selection(clean, family)[0, expert], clean)
        assert torch.equal(grad, expected)
        assert grad[0, expert] != 0
