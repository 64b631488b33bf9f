"""The training loss: eq. 7 and the authors' variants, its gradient, its padding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import LayoutError, SubsetFamily, gem_loss, selection
from maskmoe_kernels.ops.selection import deselection
from maskmoe_kernels.ops.selection.reference import gem_loss_reference
from maskmoe_kernels.testing.strategies import families
from tests.ops.selection.definition import CONFIDENCES, define_all

NORMALIZE = (None, "sample", "expert", "batch")

seeds = st.integers(0, 2**31 - 1)
confidences = st.sampled_from([*CONFIDENCES, torch.sigmoid])
WEIGHTINGS = ("selection", "deselection", "uniform")

weightings = st.sampled_from(WEIGHTINGS)
normalizes = st.sampled_from(NORMALIZE)
sharpnesses = st.sampled_from([1.0, 2.5])
each_normalize = pytest.mark.parametrize("normalize", NORMALIZE)

CUBE = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})
ALONE = SubsetFamily({"a": 1}, {"a": ["a"]})


def sample(family, seed, shape=(5,), dtype=torch.float64):
    """Logits, targets and a mask that keeps some samples."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(*shape, family.num_experts, generator=generator, dtype=dtype)
    target = torch.rand(shape, generator=generator).round().to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.6
    return logits, target, mask


def drawn_weights(seed, shape):
    """Weights of samples; a third of them are 0."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.rand(shape, generator=generator) * torch.randint(3, shape, generator=generator)


def weights_of(logits, family, confidence, weighting, normalize, sharpness, times):
    """w of every sample and expert, in loops over the definition; sample s counts ``times[s]``."""
    alpha, above = define_all(logits, family, confidence, sharpness)
    of = {"selection": alpha, "deselection": above, "uniform": torch.ones_like(alpha)}
    w = of[weighting].clone()
    n, count = w.shape
    for s in range(n):
        if normalize == "sample" and w[s].sum():
            w[s] /= float(w[s].sum())
        w[s] *= float(times[s])
    for s in range(n):
        for i in range(count):
            total = {
                "sample": lambda: float(times.sum()),
                "expert": lambda i=i: float(w[:, i].sum()),
                "batch": lambda: float(w.sum()),
                None: lambda: float(times.sum()),
            }[normalize]()
            alpha[s, i] = w[s, i] / total if total else 0.0
    return alpha


def loss_of(logits, target, weights):
    """Sum of w * BCE(y, f), with f as a probability (eq. 5)."""
    total = 0.0
    for z, y, w in zip(logits.tolist(), target.tolist(), weights.tolist(), strict=True):
        for z_i, w_i in zip(z, w, strict=True):
            # log f and log(1 - f) of f = (tanh z + 1) / 2, which would cancel as they stand.
            log_f, log_rest = (-math.log1p(math.exp(-2 * x)) for x in (z_i, -z_i))
            total -= w_i * (y * log_f + (1 - y) * log_rest)
    return total


@given(
    families(max_experts=12),
    seeds,
    confidences,
    weightings,
    normalizes,
    sharpnesses,
    st.booleans(),
    st.booleans(),
)
def test_loss_and_gradient_follow_the_definition(
    family, seed, confidence, weighting, normalize, sharpness, padded, weighs
):
    logits, target, mask = sample(family, seed)
    mask = mask if padded else None
    kept = torch.ones(5, dtype=torch.bool) if mask is None else mask
    times = drawn_weights(seed, (5,)) if weighs else torch.ones(5)
    arguments = (family, confidence, weighting, normalize)
    w = weights_of(logits, *arguments, sharpness, kept * times.double())
    logits.requires_grad_()
    options = {"mask": mask, "sharpness": sharpness, "sample_weight": times if weighs else None}
    loss = gem_loss(logits, target, *arguments, **options)
    reference = gem_loss_reference(logits.detach(), target, *arguments, **options)
    torch.testing.assert_close(loss.detach(), reference, rtol=1e-8, atol=1e-13)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loss_of(logits, target, w), rel=1e-8, abs=0)
    # The weights are of the old parameters: no gradient passes through them.
    expected = w * 2 * (torch.sigmoid(2 * logits.detach()) - target[:, None])
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(grad, 0.7 * expected, rtol=1e-7, atol=0)


@given(families(), seeds, confidences, weightings)
def test_experts_learn_apart(family, seed, confidence, weighting):
    """Unnormalised: what expert i learns from is bitwise free of experts outside S_i."""
    logits, target, _ = sample(family, seed, dtype=torch.float32)
    i = seed % family.num_experts
    grads = []
    for value in (None, torch.nan, -3.0):
        z = logits.clone()
        if value is not None:
            z[:, ~family.inclusion[i]] = value
        z.requires_grad_()
        loss = gem_loss(z, target, family, confidence, weighting)
        grads.append(torch.autograd.grad(loss, z)[0][:, i])
    assert grads[0].isfinite().all()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def unknown_gradients(family, hit, normalize, weighting):
    """Where a NaN logit of expert ``hit`` in sample 1 of 5 makes gradients unknown."""
    none = torch.zeros_like(family.strict)
    of = {"selection": family.inclusion, "deselection": family.strict, "uniform": none}
    weights = of[weighting]
    weight = torch.zeros(5, family.num_experts, dtype=torch.bool)
    weight[1] = weights[:, hit]
    if normalize == "sample":
        weight |= weight.any(1, keepdim=True)
    elif normalize == "expert":
        weight |= weight.any(0)
    elif normalize == "batch":
        weight |= weight.any()
    weight[1, hit] = True  # whose cross-entropy is unknown, whatever its weight is
    return weight


@given(families(), seeds, confidences, weightings, normalizes)
def test_an_unknown_logit_reaches_all_gradients_that_need_it(
    family, seed, confidence, weighting, normalize
):
    logits, target, _ = sample(family, seed, dtype=torch.float32)
    hit = seed % family.num_experts
    logits[1, hit] = torch.nan
    logits.requires_grad_()
    loss = gem_loss(logits, target, family, confidence, weighting, normalize)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert torch.equal(grad.isnan(), unknown_gradients(family, hit, normalize, weighting))


# --- Saturation ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z", [-12.0, 12.0, -30.0, 30.0, -100.0, 100.0])
def test_gradient_survives_saturation(z, dtype):
    logits = torch.tensor([[z], [-z]], dtype=dtype, requires_grad=True)
    wrong = torch.tensor([float(z < 0), float(z > 0)])
    loss = gem_loss(logits, wrong, ALONE, weighting="deselection")
    assert loss.item() == pytest.approx(2 * abs(z), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    # Weight 1 and two samples: 2 (f - y) / 2 = -+1, where a probability's form has 0.
    torch.testing.assert_close(grad, torch.tensor([[z], [-z]]).sign().to(dtype))
    right = gem_loss(logits, 1 - wrong, ALONE)
    (grad,) = torch.autograd.grad(right, logits)
    assert 0 <= right.item() < 1e-9
    assert grad.abs().max() < 1e-9
    # Small is not nothing: of y = 0, log(1 + e) and 2 (f - y) / 2 are e = exp(-2 |z|), while a
    # number holds it; of y = 1, f - y is rounded at 1, and torch rounds one of the losses at z.
    tiny = math.exp(-2 * abs(z))
    if tiny > torch.finfo(right.dtype).tiny:
        assert right.item() >= tiny / 2 * (1 - 1e-6)
        (negative,) = grad[logits < 0].tolist()
        assert negative == pytest.approx(tiny, rel=4 * torch.finfo(dtype).eps + 1e-6, abs=0)


def test_gradient_of_a_saturated_expert_is_twice_its_weight():
    logits, _, _ = sample(CUBE, 1, dtype=torch.float32)
    logits[:, 2] = -12.0
    weight = selection(logits, CUBE)[:, 2]
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(gem_loss(logits, torch.ones(5), CUBE), logits)
    torch.testing.assert_close(grad[:, 2], -2 * weight / 5, rtol=1e-5, atol=0)


def test_low_precision_logits_get_a_float32_loss():
    logits, target, mask = sample(CUBE, 2, dtype=torch.bfloat16)
    low = logits.clone().requires_grad_()
    full = logits.float().requires_grad_()
    losses = [gem_loss(z, target, CUBE, "smooth", mask=mask) for z in (low, full)]
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, (low, full), strict=True)]
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_autocast_changes_nothing(device):
    logits, target, mask = (t.to(device) for t in sample(CUBE, 3, dtype=torch.float32))
    expected = gem_loss(logits, target, CUBE, mask=mask)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(gem_loss(logits, target, CUBE, mask=mask), expected)


# --- Padding ---------------------------------------------------------------------------------


@given(
    families(max_experts=20),
    seeds,
    confidences,
    weightings,
    normalizes,
    st.sampled_from([torch.nan, torch.inf, -torch.inf, 7.0]),
)
def test_padding_cannot_reach_the_loss(family, seed, confidence, weighting, normalize, poison):
    logits, target, mask = sample(family, seed, (2, 4), torch.float32)
    mask[0, 0] = True
    results = []
    for spoil in (False, True):
        z = torch.where(mask[..., None], logits, poison) if spoil else logits.clone()
        y = torch.where(mask, target, torch.nan) if spoil else target
        z.requires_grad_()
        loss = gem_loss(z, y, family, confidence, weighting, normalize, mask)
        (grad,) = torch.autograd.grad(loss, z, torch.tensor(1.7))
        assert not grad[~mask].any()  # exactly zero; NaN would be true
        results.append((loss, grad))
    assert results[0][0].isfinite()
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
    # Padding is absence: the same as not having those samples.
    short = logits[mask].requires_grad_()
    loss = gem_loss(short, target[mask], family, confidence, weighting, normalize)
    (grad,) = torch.autograd.grad(loss, short, torch.tensor(1.7))
    torch.testing.assert_close(results[1][0], loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[1][1][mask], grad, rtol=1e-4, atol=1e-6)


@each_normalize
def test_nothing_but_padding_is_no_loss(normalize):
    logits = torch.full((3, 7), torch.nan, requires_grad=True)
    mask = torch.zeros(3, dtype=torch.bool)
    loss = gem_loss(logits, torch.ones(3), CUBE, normalize=normalize, mask=mask)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


# --- Shapes and errors -----------------------------------------------------------------------


@each_normalize
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 3, 2)], ids=str)
def test_leading_dimensions_are_samples(shape, normalize):
    logits, target, mask = sample(CUBE, 4, shape)
    mask = mask | torch.tensor(shape == ())
    for kept in (None, mask):
        flat = None if kept is None else kept.reshape(-1)
        loss = gem_loss(logits, target, CUBE, normalize=normalize, mask=kept)
        expected = gem_loss(
            logits.reshape(-1, 7), target.reshape(-1), CUBE, normalize=normalize, mask=flat
        )
        torch.testing.assert_close(loss, expected)
        assert loss > 0


@each_normalize
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_empty_batch_is_no_loss(shape, normalize, padded):
    logits = torch.empty(*shape, 7, requires_grad=True)
    mask = torch.empty(shape, dtype=torch.bool) if padded else None
    loss = gem_loss(logits, torch.empty(shape), CUBE, normalize=normalize, mask=mask)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float64], ids=str)
def test_targets_of_any_type(dtype):
    logits, target, mask = sample(CUBE, 5, dtype=torch.float32)
    for kept in (None, mask):
        expected = gem_loss(logits, target, CUBE, mask=kept)
        assert torch.equal(gem_loss(logits, target.to(dtype), CUBE, mask=kept), expected)


@each_normalize
def test_all_zero_weights_are_no_loss(normalize):
    logits = torch.zeros(4, 7, requires_grad=True)  # nobody is confident
    loss = gem_loss(logits, torch.ones(4), CUBE, normalize=normalize)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def every_expert(z, family):
    """The weights of ``"uniform"``."""
    return torch.ones_like(z)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_thousand_experts(weighting):
    family = SubsetFamily.powerset({f"g{n}": 1 for n in range(10)})
    logits, target, _ = sample(family, 6, (64,))
    logits = (logits / 4).float().requires_grad_()
    loss = gem_loss(logits, target.float(), family, weighting=weighting)
    (grad,) = torch.autograd.grad(loss, logits)
    z = logits.detach().double()
    of = {"selection": selection, "deselection": deselection, "uniform": every_expert}
    w = of[weighting](z, family) / 64
    expected = w * 2 * (torch.sigmoid(2 * z) - target.double()[:, None])
    torch.testing.assert_close(grad.double(), expected, rtol=2e-4, atol=1e-37)


def test_compiles_whole_with_a_dynamic_batch():
    torch._dynamo.reset()
    family = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})  # never used before
    compiled = torch.compile(gem_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 17):
        logits, target, mask = sample(CUBE, rows, (rows,))
        logits.requires_grad_()
        arguments = (logits, target, family, "square", "deselection", "expert", mask)
        ours, theirs = compiled(*arguments), gem_loss(*arguments)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "alpha"}, "'selection', 'deselection', 'uniform'.*'alpha'"),
        ({"normalize": "mean"}, "'sample', 'expert', 'batch'.*'mean'"),
        ({"target": torch.ones(4, 1)}, r"target must be .*\(4,\), got \(4, 1\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must be .*\(4,\), got \(3,\)"),
        ({"logits": torch.zeros(4, 6)}, r"H=7, got \(4, 6\)"),
        ({"confidence": "cube"}, "'cube'"),
        ({"sharpness": 0.0}, "from 1e-6 to 1e6, got 0.0"),
        ({"sample_weight": torch.ones(4, 1)}, r"sample_weight must be .*\(4,\), got \(4, 1\)"),
        (
            {"sample_weight": [1.0] * 4},
            r"a tensor, got list; pass torch.as_tensor\(sample_weight\)",
        ),
        ({"sample_weight": torch.ones(4) * 1j}, "sample_weight must be real, got torch.complex64"),
    ],
)
def test_errors_carry_the_values(options, words):
    arguments = {"logits": torch.zeros(4, 7), "target": torch.ones(4), "family": CUBE, **options}
    with pytest.raises(LayoutError, match=words):
        gem_loss(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_that_is_not_bool_is_refused(dtype: torch.dtype) -> None:
    family = SubsetFamily.powerset({"a": 2, "b": 3})
    mask = torch.ones(4, dtype=dtype)
    with pytest.raises(LayoutError, match="mask must be bool"):
        gem_loss(torch.randn(4, 3), torch.ones(4), family, mask=mask)


# --- Uniform weights, and weights of samples -------------------------------------------------


@given(families(), seeds, confidences, st.sampled_from([None, "sample", "expert", "batch"]))
def test_with_uniform_weights_all_experts_learn_all_samples(family, seed, confidence, normalize):
    """The mean cross-entropy of each expert, whatever its confidence is; all normalized alike."""
    logits, target, _ = sample(family, seed)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        2 * logits, target[:, None].expand_as(logits), reduction="none"
    ).mean(0)
    loss = gem_loss(logits, target, family, confidence, "uniform", normalize, sharpness=3.0)
    by = 1 if normalize in (None, "expert") else family.num_experts
    torch.testing.assert_close(loss, each.sum() / by)


def counted(family, seed, weighting, normalize, dtype=torch.float32):
    """A loss as a function of weights and logits, and weights that are small integers."""
    logits, target, mask = sample(family, seed, dtype=dtype)
    mask[seed % 5] = True

    def loss_of(z, times, mask=mask, target=target):
        return gem_loss(z, target, family, "abs", weighting, normalize, mask, sample_weight=times)

    times = torch.randint(4, (5,), generator=torch.Generator().manual_seed(seed))
    return loss_of, logits, target, mask, times


@given(families(), seeds, weightings, normalizes)
def test_a_weight_is_how_often_a_sample_counts(family, seed, weighting, normalize):
    loss_of, logits, target, mask, times = counted(family, seed, weighting, normalize)
    ours = logits.clone().requires_grad_()
    loss = loss_of(ours, times)
    (grad,) = torch.autograd.grad(loss, ours)
    repeated = logits.repeat_interleave(times, 0).requires_grad_()
    expected = loss_of(
        repeated, None, mask.repeat_interleave(times), target.repeat_interleave(times)
    )
    (of_each,) = torch.autograd.grad(expected, repeated)
    summed = torch.zeros_like(grad).index_add(0, torch.arange(5).repeat_interleave(times), of_each)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, summed, rtol=1e-5, atol=1e-7)
    for factor in (3, 1e-30, 1e300):  # of all weights: changes nothing
        torch.testing.assert_close(loss_of(logits, times.double() * factor), loss.detach())
    torch.testing.assert_close(loss_of(logits, times * 0 + 1), loss_of(logits, None))


@given(families(), seeds, weightings, normalizes)
def test_a_weight_of_zero_leaves_a_sample_out_whatever_it_holds(family, seed, weighting, normalize):
    loss_of, logits, target, mask, times = counted(family, seed, weighting, normalize)
    times, out = times.float(), (times == 0) | ~mask
    found = []
    for poison in (logits, torch.nan, torch.inf):
        z = torch.where(out[:, None], poison, logits).requires_grad_()
        y = target if poison is logits else torch.where(out, torch.nan, target)
        w = times if poison is logits else torch.where(mask, times, torch.nan)
        loss = loss_of(z, w, target=y)
        found.append((loss, torch.autograd.grad(loss, z)[0]))
    assert not found[0][1][out].any()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    kept = times.clamp(min=0.5)  # a mask may say the same
    torch.testing.assert_close(loss_of(logits, kept, ~out), found[0][0])


@each_normalize
def test_weights_that_are_all_zero_are_no_loss(normalize):
    logits = torch.full((3, 7), torch.nan, requires_grad=True)
    options = {"normalize": normalize, "sample_weight": torch.zeros(3)}
    loss = gem_loss(logits, torch.full((3,), 7.0), CUBE, **options)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@each_normalize
def test_weights_of_samples_have_a_derivative(weighting, normalize):
    logits, target, mask = sample(CUBE, 8)
    mask[0] = True
    times = (drawn_weights(8, (5,)).double() + 0.2).requires_grad_()
    options = ("abs", weighting, normalize, mask)
    assert torch.autograd.gradcheck(
        lambda w: gem_loss(logits, target, CUBE, *options, sample_weight=w), times
    )


@pytest.mark.parametrize("bad", [-1e-9, -3.0, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_none_is_refused_where_it_counts(bad):
    logits, target, _ = sample(CUBE, 9)
    times, mask = torch.tensor([1.0, 0.0, bad, 2.0, 1.0]), torch.arange(5) != 2
    with pytest.raises(LayoutError, match=r"sample_weight must hold .* weight 0 or use mask"):
        gem_loss(logits, target, CUBE, sample_weight=times)
    assert gem_loss(logits, target, CUBE, mask=mask, sample_weight=times).isfinite()


def test_weights_compile_whole():
    torch._dynamo.reset()
    compiled = torch.compile(gem_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 17):
        logits, target, mask = sample(CUBE, rows, (rows,))
        times = drawn_weights(rows, (rows,))
        arguments = (logits, target, CUBE, "abs", "uniform", "expert", mask, 1.0, times)
        torch.testing.assert_close(compiled(*arguments), gem_loss(*arguments))
