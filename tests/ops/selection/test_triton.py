"""The fused objectives: the definition's numbers, its blindness, the same bits, what compiles."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from maskmoe_kernels import BackendError, LayoutError, SubsetFamily, gem_loss, mixture, selection
from maskmoe_kernels.ops import dispatch
from maskmoe_kernels.ops import triton_support as backend
from maskmoe_kernels.ops.selection import deselection, rare_positive, tables
from maskmoe_kernels.ops.selection.samples import weighted
from maskmoe_kernels.testing.strategies import families
from tests.ops.selection import test_gem, test_mixture, test_selection
from tests.ops.selection.definition import CONFIDENCES

pytest.importorskip("triton")
ON_CPU = backend.unsupported_reason(torch.device("cpu"))  # None where the interpreter runs
runs = pytest.mark.skipif(
    ON_CPU is not None and not torch.cuda.is_available(), reason=f"no NVIDIA GPU, and {ON_CPU}"
)
interpreted = pytest.mark.skipif(ON_CPU is not None, reason=f"no interpreter: {ON_CPU}")

seeds = st.integers(0, 2**31 - 1)
names = st.sampled_from(CONFIDENCES)
sharpnesses = st.sampled_from([1.0, 0.5, 2.5])
weightings = st.sampled_from(test_gem.WEIGHTINGS)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
# The interpreter takes a tenth of a second a call: few examples, and none is made smaller.
few = settings(max_examples=8, phases=(Phase.explicit, Phase.reuse, Phase.generate))

CUBE = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})
TESSERACT = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1, "d": 1})
MANY = SubsetFamily.powerset({f"g{n}": 1 for n in range(16)}, max_size=2)
NEAR = SubsetFamily(
    dict.fromkeys("abcd", 1),
    {name: [*name] for name in ("c", "cd", "acd", "b", "ab", "abd", "bc", "bd", "d", "ac", "ad")},
)
PAIR = SubsetFamily.powerset({"a": 1, "b": 1})


@contextmanager
def on_kernels(launches=1):
    """CPU tensors go to the kernels here, and at least ``launches`` calls did."""
    from maskmoe_kernels.ops.selection.triton import gem_kernels, selection_kernels

    real, count = selection_kernels.rows_of, []

    def counted(logits):
        count.append(1)
        return real(logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICES", {"cuda", "cpu"})
        for module in (selection_kernels, gem_kernels):
            patch.setattr(module, "rows_of", counted)
        yield
    assert len(count) >= launches


@contextmanager
def on_pytorch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TRITON_DEVICES", set())
        yield


def draw(family, seed, rows=7, dtype=torch.float32):
    """Logits from 1e-4 to 30 as ``dtype`` has them, targets and a mask that keeps some samples."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, family.num_experts)
    sizes = torch.tensor([1e-4, 0.1, 0.5, 1.0, 3.0, 30.0])
    logits = torch.randn(shape, generator=generator)
    logits = logits * sizes[torch.randint(len(sizes), shape, generator=generator)]
    target = torch.rand(rows, generator=generator).round()
    return logits.to(dtype), target, torch.rand(rows, generator=generator) < 0.7


def assert_as_good_as_pytorch(run, logits, family, floor=1.0):
    """Each result errs by at most twice PyTorch's own error, plus a rounding floor."""
    with on_kernels():
        ours = run(logits)
    with on_pytorch():
        theirs, exact = run(logits.float()), run(logits.double())
    terms = 16 + int(family.strict.sum(1).max())
    for us, them, truth in zip(ours, theirs, exact, strict=True):
        assert torch.equal(us.isnan(), truth.isnan())
        truth, us, them = (t.cpu().double().nan_to_num() for t in (truth, us, them))
        eps = torch.finfo(torch.float32).eps
        allowed = 2 * (them - truth).abs() + floor * eps * terms * truth.abs() + 1e-37
        assert ((us - truth).abs() <= allowed).all()


# --- The numbers -----------------------------------------------------------------------------


@runs
@few
@given(families(max_experts=16), seeds, names, sharpnesses, dtypes)
def test_selection_and_mixture_equal_pytorch(device, family, seed, name, sharpness, dtype):
    logits = draw(family, seed, dtype=dtype)[0].to(device)

    def run(z):
        return (
            selection(z, family, name, sharpness),
            deselection(z, family, name, sharpness),
            *mixture(z, family, name, sharpness)[:2],
        )

    # A sharpened confidence is a power: it multiplies the relative error by its exponent, and
    # near p = 0.3 "rare" magnifies the rounding of p.
    loose = 4 * (1 + sharpness) * (8 if name == "rare" else 1)
    assert_as_good_as_pytorch(run, logits, family, floor=loose)
    with on_kernels():
        assert torch.equal(run(logits)[0], mixture(logits, family, name, sharpness).selection)
        share = mixture(logits, family, name, sharpness).attribution
    with on_pytorch():
        exact = mixture(logits.double(), family, name, sharpness).attribution
    torch.testing.assert_close(
        share.double(), exact, rtol=1e-4, atol=1e-6 if name == "rare" else 1e-36
    )


@runs
@few
@given(families(max_experts=16), seeds, names, sharpnesses, dtypes)
def test_gradients_through_selection(device, family, seed, name, sharpness, dtype):
    logits = draw(family, seed, dtype=dtype)[0].to(device)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(logits.shape, generator=generator).to(device) for _ in range(2)]
    columns = weights[0][:, 0]

    def run(z):
        z = z.detach().requires_grad_()
        alpha = selection(z, family, name, sharpness)
        above = deselection(z, family, name, sharpness)
        mixed = mixture(z, family, name, sharpness)
        losses = (
            (alpha * weights[0].to(alpha)).sum(),
            (above * weights[1].to(alpha)).sum(),
            (mixed.probability * columns.to(alpha)).sum() + (mixed.attribution * weights[1]).sum(),
        )
        return alpha.detach(), [torch.autograd.grad(loss, z)[0] for loss in losses]

    with on_kernels(3):
        _, ours = run(logits)
    with on_pytorch():
        (alpha, exact), (_, theirs) = run(logits.double()), run(logits)
    # Terms cancel, so a row's error is measured by the row; a share's have the size of 1 / total.
    shares = 4e-6 / alpha.sum(-1, keepdim=True).clamp(min=1e-30)
    for us, truth, them, extra in zip(ours, exact, theirs, (0, 0, shares), strict=True):
        assert us.dtype == dtype
        size = truth.abs().amax(-1, keepdim=True)
        info = torch.finfo(dtype)
        # 1 - tanh^2 has no digits below 1e-16 even in PyTorch's float64.
        allowed = (2e-5 + info.eps) * size + extra + info.smallest_normal * info.eps + 1e-15
        allowed = allowed + 2 * (them.double() - truth).abs()
        assert ((us.double() - truth).abs() <= allowed).all()


@runs
@few
@given(
    families(max_experts=16),
    seeds,
    names,
    weightings,
    st.sampled_from(test_gem.NORMALIZE),
    sharpnesses,
    dtypes,
)
@example(NEAR, 116, "rare", "selection", "expert", 0.5, torch.float32)  # q = 2e-4, to the power 2
def test_loss_and_its_gradient(device, family, seed, name, weighting, normalize, sharpness, dtype):
    logits, target, mask = (t.to(device) for t in draw(family, seed, dtype=dtype))
    times = test_gem.drawn_weights(seed, mask.shape).to(device)
    for kept, of in ((None, None), (mask, None), (None, times), (mask, times)):

        def run(z, kept=kept, of=of):
            z = z.detach().requires_grad_()
            loss = gem_loss(z, target, family, name, weighting, normalize, kept, sharpness, of)
            weight = torch.tensor(-1.3, dtype=loss.dtype, device=device)
            return loss.detach(), torch.autograd.grad(loss, z, weight)[0]

        with on_kernels():
            loss, grad = run(logits)
            with torch.no_grad():
                arguments = (family, name, weighting, normalize, kept, sharpness, of)
                assert torch.equal(gem_loss(logits, target, *arguments), loss)
        with on_pytorch():
            exact, exact_grad = run(logits.double())
            nearby = [run(logits.double() + step) for step in (STEP, -STEP)]
            lost = lost_shares(
                logits.double(), kept, of, family, name, weighting, normalize, sharpness
            )
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        allowed = 2 * max((other - exact).abs() for other, _ in nearby)
        allowed += 2e-5 * exact.abs() + (lost * (1 + 2 * logits.double().abs())).sum() + 1e-30
        assert (loss.double() - exact).abs() <= allowed
        # f - y has no digits below 1e-16 even in PyTorch's float64; float16 none below 2^-24.
        least = 2.0**-24 if dtype == torch.float16 else 1e-15
        allowed = 2 * torch.stack([(other - exact_grad).abs() for _, other in nearby]).amax(0)
        allowed += (4e-5 + torch.finfo(dtype).eps) * exact_grad.abs() + 4 * lost + least
        assert ((grad.double() - exact_grad).abs() <= allowed).all()


# An ulp of p = f = 0.3, where "rare" has no confidence and p - 0.3 no digits but p's: half of them
# in the kernels' p, and as much of z.
STEP = 2.0**-22


def lost_shares(logits, mask, times, family, name, weighting, normalize, sharpness):
    """What a weight below the least normal float32, which is 0 on a GPU, is of its sum."""
    weight = torch.ones_like(logits)
    if weighting != "uniform":
        weigh = {"selection": selection, "deselection": deselection}[weighting]
        weight = weigh(logits, family, name, sharpness=sharpness)
    mask, times = weighted(mask, times)
    if mask is not None:
        weight = weight.masked_fill(~mask[:, None], 0)
    if times is not None and normalize != "sample":
        weight = weight * times[:, None]
    total = {
        "sample": lambda: weight.sum(1, keepdim=True),
        "expert": lambda: weight.sum(0),
        "batch": weight.sum,
        None: lambda: torch.ones_like(weight[:1]),
    }[normalize]()
    least = weight.numel() * torch.finfo(torch.float32).smallest_normal
    return (least / total).clamp(max=1).masked_fill(total == 0, 0).expand_as(weight)


@runs
@pytest.mark.parametrize("normalize", test_gem.NORMALIZE)
@pytest.mark.parametrize("sure", [5.0, 30.0, 43.0])
def test_weights_of_any_size_and_a_scaled_loss(device, sure, normalize):
    """What "a" and "b" leave to "ab": 1e-4, 1e-28 and, a product of two, denormal."""
    logits, target, mask = (t.to(device) for t in draw(PAIR, 4, rows=50))
    logits[:, 0], logits[:, 1], logits[:, 2] = sure, 3 + logits[:, 1].tanh(), -9.0
    target = torch.zeros_like(target)
    left = float(deselection(logits.double(), PAIR)[:, 2].min())
    floor = 1e-4 + (4 * 2.0**-149 / left if normalize in ("expert", "batch") else 0)
    for scale in (1.0, 2.0**24):
        found = []
        for where, z in ((on_kernels, logits.clone()), (on_pytorch, logits.double())):
            z.requires_grad_()
            with where():
                loss = gem_loss(
                    z, target, PAIR, weighting="deselection", normalize=normalize, mask=mask
                )
            factor = torch.tensor(scale, dtype=loss.dtype, device=device)
            found.append((loss.detach(), *torch.autograd.grad(loss, z, factor)[0].unbind(1)))
        for ours, exact in zip(*found, strict=True):
            assert ((ours - exact).abs() <= floor * exact.abs().max() + scale * 2.0**-126).all()


@runs
@pytest.mark.parametrize("name", ["abs", "rare"])
def test_more_than_a_hundred_experts(device, name):
    logits, target, mask = (t.to(device) for t in draw(MANY, 1, rows=11))
    assert_as_good_as_pytorch(
        lambda z: (selection(z, MANY, name), mixture(z, MANY, name).probability), logits, MANY, 32
    )
    for normalize in ("sample", "expert"):
        with on_kernels():
            ours = gem_loss(logits, target, MANY, name, normalize=normalize, mask=mask)
        with on_pytorch():
            exact = gem_loss(logits.double(), target, MANY, name, normalize=normalize, mask=mask)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


@runs
def test_programs_walk_several_tiles(device, monkeypatch):
    from maskmoe_kernels.ops.selection.triton import gem_kernels

    monkeypatch.setattr(gem_kernels, "_PROGRAMS", 3)
    logits, target, mask = (t.to(device) for t in draw(MANY, 2, rows=39))
    for normalize in ("expert", None):
        losses = []
        for where in (on_kernels, on_pytorch):
            z = (logits.double() if where is on_pytorch else logits.clone()).requires_grad_()
            with where():
                loss = gem_loss(z, target, MANY, normalize=normalize, mask=mask)
            losses.append((loss.double(), torch.autograd.grad(loss, z)[0].double()))
        torch.testing.assert_close(*losses, rtol=2e-5, atol=1e-15)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides(device, dtype):
    flat = draw(CUBE, 3, rows=24, dtype=dtype)[0].to(device)
    turned = flat.T.contiguous().T.unflatten(0, (2, 3, 4))
    wide = flat.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3].unflatten(0, (2, 3, 4))
    expanded = flat[:1].expand(24, -1)
    target = torch.arange(24, device=device) % 2
    with on_kernels():
        alpha, loss = selection(flat, CUBE), gem_loss(flat, target, CUBE)
        for view in (turned, wide):
            assert torch.equal(selection(view, CUBE).flatten(0, 2), alpha)
            assert torch.equal(mixture(view, CUBE).selection.flatten(0, 2), alpha)
            assert torch.equal(gem_loss(view, target.reshape(2, 3, 4), CUBE), loss)
        assert torch.equal(selection(expanded, CUBE), alpha[:1].expand(24, -1))


# --- Blindness, determinism ------------------------------------------------------------------


@runs
@few
@given(families(max_experts=14), seeds, names, sharpnesses, dtypes)
def test_nan_reaches_only_what_contains_it(device, family, seed, name, sharpness, dtype):
    """One row for each expert, whose logit is NaN there; forward and backward, bit for bit."""
    count = family.num_experts
    clean = draw(family, seed, rows=1, dtype=dtype)[0].repeat(count, 1)
    spoilt = clean.clone().fill_diagonal_(torch.nan)
    hit = family.inclusion.T.to(device)  # row j, expert i: does S_i contain S_j?
    hidden = torch.eye(count, dtype=torch.bool, device=device)
    results = []
    for logits in (clean.to(device), spoilt.to(device)):
        z = logits.requires_grad_()
        with on_kernels(2):
            alpha = selection(z, family, name, sharpness)
            above = deselection(z, family, name, sharpness)
            # Only what no NaN reaches asks for a gradient.
            weight = torch.where(hit, 0.0, torch.arange(1.0, count + 1, device=device))
            (grad,) = torch.autograd.grad((alpha, above), z, (weight, weight))
        results.append((alpha.detach(), above.detach(), grad))
    before, after = results
    assert torch.equal(after[0].isnan(), hit)
    assert torch.equal(after[1].isnan(), hit & ~hidden)
    for k, reached in enumerate((hit, hit & ~hidden, hidden)):
        assert torch.equal(before[k][~reached], after[k][~reached])
    assert not after[2][hidden].any()


@runs
@pytest.mark.parametrize("normalize", test_gem.NORMALIZE)
def test_same_bits_twice(device, normalize):
    logits, target, mask = (t.to(device) for t in draw(TESSERACT, 5, rows=70))
    results = []
    for _ in range(2):
        z = logits.clone().requires_grad_()
        with on_kernels():
            loss = gem_loss(z, target, TESSERACT, "smooth", normalize=normalize, mask=mask)
            alpha = selection(z, TESSERACT, "smooth", 2.0)
        results.append((loss, alpha, *torch.autograd.grad(loss + alpha.sum(), z)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- What holds for PyTorch holds here -------------------------------------------------------


def inner(test):
    return test.hypothesis.inner_test


@interpreted
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 64.0])
@pytest.mark.parametrize("name", CONFIDENCES)
def test_saturation(name, sharpness):
    with on_kernels():
        test_selection.test_saturated_products_keep_their_digits(name, sharpness, torch.float32)
        test_selection.test_derivative_is_finite_everywhere(name, sharpness)


@interpreted
@few
@given(
    families(max_experts=10),
    seeds,
    names,
    sharpnesses,
    st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38, -2.0]),
)
def test_depends_on_smaller_experts_only(family, seed, name, sharpness, poison):
    with on_kernels():
        inner(test_selection.test_depends_on_smaller_experts_only)(
            family, seed, name, sharpness, poison, torch.float32
        )


@interpreted
@few
@given(families(max_experts=10), seeds, names, weightings, st.sampled_from(test_gem.NORMALIZE))
def test_padding_and_separation(family, seed, name, weighting, normalize):
    poison = [torch.nan, torch.inf, -torch.inf, 7.0][seed % 4]
    with on_kernels(4):
        inner(test_gem.test_padding_cannot_reach_the_loss)(
            family, seed, name, weighting, normalize, poison
        )
        inner(test_gem.test_experts_learn_apart)(family, seed, name, weighting)
        inner(test_gem.test_an_unknown_logit_reaches_all_gradients_that_need_it)(
            family, seed, name, weighting, normalize
        )


@interpreted
@few
@given(families(max_experts=10), seeds, names, test_mixture.scales, dtypes)
def test_bounds(family, seed, name, scale, dtype):
    with on_kernels():
        inner(test_mixture.test_rows_are_shares_and_the_prediction_a_probability)(
            family, seed, name, scale, dtype
        )
        inner(test_selection.test_selection_is_between_0_and_1)(family, seed, name, 1.5, dtype)
        inner(test_selection.test_low_precision_logits_are_read_exactly)(
            torch.bfloat16, family, seed, name
        )


@interpreted
@pytest.mark.parametrize(
    ("test", "cases"),
    [
        (test_selection.test_certain_expert_silences_all_larger_ones, [()]),
        (test_selection.test_a_nan_logit_stays_with_its_experts_backward_too, [()]),
        (test_selection.test_autocast_changes_nothing, [(torch.device("cpu"),)]),
        (test_mixture.test_one_confident_small_expert_decides, [()]),
        (test_mixture.test_derivative_is_finite, [(0.0,), (1e-20,), (12.0,), (100.0,)]),
        (test_gem.test_gradient_of_a_saturated_expert_is_twice_its_weight, [()]),
        (test_gem.test_low_precision_logits_get_a_float32_loss, [()]),
        (test_gem.test_autocast_changes_nothing, [(torch.device("cpu"),)]),
        (
            test_gem.test_gradient_survives_saturation,
            [(z, dtype) for z in (-100.0, 12.0, 30.0) for dtype in (torch.float32, torch.bfloat16)],
        ),
        (test_gem.test_nothing_but_padding_is_no_loss, [(n,) for n in test_gem.NORMALIZE]),
        (test_gem.test_all_zero_weights_are_no_loss, [(n,) for n in test_gem.NORMALIZE]),
        (
            test_gem.test_empty_batch_is_no_loss,
            [((2, 0), n, p) for p in (False, True) for n in test_gem.NORMALIZE],
        ),
        (test_gem.test_targets_of_any_type, [(torch.bool,), (torch.int64,), (torch.float64,)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_as_pytorch(test, cases):
    with on_kernels(len(cases)):
        for case in cases:
            test(*case)


# --- What the ops promise torch --------------------------------------------------------------


def tables_of(family, *which):
    return tuple(tables.table(family, name, torch.device("cpu")) for name in which)


@interpreted
@pytest.mark.parametrize("shape", [(2,), (0,)], ids=str)
def test_opcheck(shape):
    logits = torch.randn(*shape, 7)
    forward = (*tables_of(CUBE, "subset_experts", "supersets_of", "has_superset"), "smooth", 2.0)
    backward = (*tables_of(CUBE, "superset_experts", "subsets_of", "has_superset"), "smooth", 2.0)
    ops = torch.ops.maskmoe
    for keep in (False, True):
        torch.library.opcheck(ops.selection, (logits, *forward, keep))
    grad = torch.randn(*shape, 7)
    alpha, product = ops.selection(logits, *forward, True)
    for pair in ((grad, None), (None, grad), (grad, grad), (None, None)):
        torch.library.opcheck(ops.selection_backward, (*pair, logits, alpha, product, *backward))
    torch.library.opcheck(ops.mixture, (logits.half(), *forward))
    target, mask = torch.ones(shape), torch.ones(shape, dtype=torch.bool)
    for kept, normalize in ((None, "none"), (mask, "expert"), (mask, "sample"), (None, "batch")):
        arguments = (logits, target, kept, None, *forward, "deselection", normalize)
        torch.library.opcheck(ops.gem_loss, arguments)
        counted = (*arguments[:3], torch.rand(shape), *arguments[4:])
        torch.library.opcheck(ops.gem_loss, counted)
    for low in (logits.half(), logits.bfloat16()):  # whose loss and gradient wait in float32
        torch.library.opcheck(ops.gem_loss, (low, *arguments[1:]))
        assert {t.dtype for t in ops.gem_loss(low, *arguments[1:])} == {torch.float32}


@interpreted
def test_tables_are_what_a_kernel_reads():
    """A program that was loaded brings its own, and the kernels read them by address."""
    ops, logits, options = torch.ops.maskmoe, torch.randn(2, 7), ("smooth", 2.0)
    forward = tables_of(CUBE, "subset_experts", "supersets_of", "has_superset")
    alpha, product = ops.selection(logits, *forward, *options, True)
    back = tables_of(CUBE, "superset_experts", "subsets_of", "has_superset")
    for op, before, theirs, after in (
        (ops.selection, (logits,), forward, (*options, True)),
        (ops.selection_backward, (alpha, None, logits, alpha, product), back, options),
        (ops.mixture, (logits,), forward, options),
        (
            ops.gem_loss,
            (logits, torch.ones(2), None, None),
            forward,
            (*options, "selection", "none"),
        ),
    ):
        op(*before, *theirs, *after)
        for k, table in enumerate(theirs):
            apart = torch.stack([table, table], -1)[..., 0]
            for odd in (table.long(), table.float(), table[..., :-1].clone(), table[None], apart):
                with pytest.raises(LayoutError, match="must be"):
                    op(*before, *theirs[:k], odd, *theirs[k + 1 :], *after)


def training_step(logits, target, family):
    return gem_loss(logits, target, family, "square", normalize="expert")


def prediction(logits, target, family):
    return mixture(logits, family, "smooth", 2.0).probability.sum()


@interpreted
@pytest.mark.parametrize("step", [training_step, prediction])
def test_compiles_whole_and_never_seen_before(step):
    torch._dynamo.reset()
    family = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})  # its tables are not built yet
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with on_kernels(4):
        for rows in (3, 5):
            logits, target, _ = draw(CUBE, rows, rows)
            results = []
            for function in (compiled, step):
                z = logits.clone().requires_grad_()
                loss = function(z, target, family)
                results.append((loss, torch.autograd.grad(loss, z)[0]))
            torch.testing.assert_close(*results)


@interpreted
def test_a_compiled_function_tells_families_apart():
    """Of as many experts they are; one made anew has its tables yet to build."""
    torch._dynamo.reset()
    subsets = [["a", "b"][:n] + ["c"] * c for n in range(3) for c in range(2)]
    other = SubsetFamily(CUBE.groups, {str(s): s for s in [*subsets, ["b"]]})
    anew = SubsetFamily(CUBE.groups, CUBE.subsets)
    compiled = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    with on_kernels(6):
        for family in (CUBE, other, anew):
            logits, target, _ = draw(CUBE, 5, 5)
            results = []
            for function in (compiled, training_step):
                z = logits.clone().requires_grad_()
                loss = function(z, target, family)
                results.append((loss, torch.autograd.grad(loss, z)[0]))
            torch.testing.assert_close(*results)


@interpreted
def test_exports_the_fused_mixture():
    family = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})
    model, logits = test_mixture.Explain(family), draw(CUBE, 0)[0]
    with on_kernels():
        program = torch.export.export(
            model, (logits,), dynamic_shapes=({0: torch.export.Dim("rows")},)
        )
        assert "maskmoe.mixture" in str(program.graph)
        torch.testing.assert_close(program.module()(logits[:5]), model(logits[:5]))


@interpreted
def test_a_second_derivative_raises():
    logits, target, _ = draw(CUBE, 0)
    for function in (
        lambda z: selection(z, CUBE).square().sum(),
        lambda z: gem_loss(z, target, CUBE),
    ):
        z = logits.clone().requires_grad_()
        with on_kernels():
            (grad,) = torch.autograd.grad(function(z), z, create_graph=True)
        with pytest.raises(BackendError, match="float64 logits"):
            grad.square().sum().backward()


@interpreted
def test_transforms_and_target_gradients_go_through_pytorch():
    logits, target, _ = draw(CUBE, 1)
    with on_kernels(0):
        tangent = torch.func.jvp(lambda z: selection(z, CUBE), (logits,), (logits,))[1]
        per_row = torch.func.vmap(lambda z: selection(z, CUBE))(logits)
        y = target.clone().requires_grad_()
        (grad,) = torch.autograd.grad(gem_loss(logits, y, CUBE), y)
    with on_pytorch():
        expected = torch.func.jvp(lambda z: selection(z, CUBE), (logits,), (logits,))[1]
        torch.testing.assert_close(tangent, expected)
        torch.testing.assert_close(per_row, selection(logits, CUBE))
    assert tangent.abs().sum() > 0
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("logits", "confidence", "words"),
    [
        (torch.zeros(2, 3), "abs", "on meta"),
        (torch.zeros(2, 3, dtype=torch.float64), "abs", "torch.float64"),
        (torch.zeros(2, 1025), "abs", "1025 experts; .* up to 1024"),
        (torch.zeros(2, 3), rare_positive(), "is a function"),
    ],
)
def test_unsupported_reasons(logits, confidence, words, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
    logits = logits.to("meta") if "meta" in words else logits
    reason = dispatch.unsupported_reason("selection", "triton", None, (logits,), confidence)
    assert re.search(words, reason)


# --- Compiled for GPUs that are not here -----------------------------------------------------

# In a process of its own: under the interpreter there is nothing to compile.
COMPILE = """
import json, os, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from maskmoe_kernels.ops.selection.triton import gem_kernels
from maskmoe_kernels.ops.selection.triton import selection_kernels

tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
every = [*selection_kernels.variants(), *gem_kernels.variants()]
assert len({name for name, *_ in every}) == len(every)
for n, capability in ((9, 90), (30, 80), (50, 100), (86, 90), (102, 80), (len(every) - 1, 90)):
    name, kernel, signature, constexprs, warps, stages = every[n]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True)
    use = re.search(r"REG:(\\d+) STACK:(\\d+).* LOCAL:(\\d+)", dump.stdout.decode())
    wide = len(re.findall(r"mul\\.wide|mad\\.wide|mul\\.lo\\.s64", compiled.asm["ptx"]))
    print(json.dumps([name, capability, *map(int, use.groups()), wide]))
"""


def test_some_of_each_kernel_compile_for_other_gpus_without_spills():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for name, capability, registers, stack, local, wide in lines:
        assert (stack, local) == (0, 0), (name, capability, registers)
        assert wide > 0, name  # offsets in 64 bits
