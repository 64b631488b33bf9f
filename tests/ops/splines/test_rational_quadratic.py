"""Splines of the C++ kernels, held to their definition in float64 and to what a spline is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from maskmoe_kernels.ops import native, splines
from maskmoe_kernels.ops.splines import (
    SplineForm,
    rational_quadratic,
    rational_quadratic_inverse,
    reference,
    schema,
    takes,
)

pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON)
)

BOUND, SLOPE = 5.0, 1e-3
ZUKO, NFLOWS = SplineForm(BOUND, SLOPE), SplineForm(BOUND, SLOPE, 2e-3, 1e-3, False)
each_isa = pytest.mark.parametrize("isa", native.isas())
each_form = pytest.mark.parametrize("form", [ZUKO, NFLOWS], ids=["zuko", "nflows"])


def drawn(elements, bins, *, scale=2.0, bound=BOUND, seed=0, dtype=torch.float32):
    """Elements inside and outside, and parameters: views of one matrix, as a network gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.6 * bound * torch.randn(elements, generator=generator)
    rows = scale * torch.randn(elements, 3 * bins - 1, generator=generator)
    return x.to(dtype), rows.to(dtype)


def off_knots(rows, axis, form):
    """An element for each row: within a bin, for gradients jump at its ends; some outside."""
    generator = torch.Generator().manual_seed(7)
    knots = reference._knots(split(rows.double())[axis], axis, form)
    bins = knots.shape[-1] - 1
    index = torch.randint(bins, (len(rows), 1), generator=generator)
    z = 0.02 + 0.96 * torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
    x = torch.lerp(knots.gather(-1, index), knots.gather(-1, index + 1), z).squeeze(-1).float()
    x[::17] = x[::17].sign() * (form.bound + x[::17].abs())
    return x


def split(rows):
    bins = (rows.shape[-1] + 1) // 3
    return rows.split([bins, bins, bins - 1], -1)


def results(function, x, rows, cotangents, form):
    """What ``function`` returns, and its gradients of x and of the parameters."""
    x, rows = x.clone().requires_grad_(), rows.clone().requires_grad_()
    found = function(x, *split(rows), form)
    grads = torch.autograd.grad(found, (x, rows), cotangents)
    return [y.detach() for y in found] + list(grads)


def assert_as_exact(name, rows, form):
    """Ours are as close to the definition in float64 as PyTorch is in float32.

    An element's error depends on how narrow its bin is, and on luck: the errors of 99 and 99.9 in a
    hundred are compared, and the largest.
    """
    x = off_knots(rows, int(name.endswith("inverse")), form)
    ours, theirs = getattr(splines, name), getattr(reference, name)
    cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    wide = [c.double() for c in cotangents]
    exact = results(theirs, x.double(), rows.double(), wide, form)
    single = results(theirs, x, rows, cotangents, form)
    found = results(ours, x, rows, cotangents, form)
    for wanted, one, other in zip(exact, found, single, strict=True):
        errors = [(y.double() - wanted).abs().flatten().sort().values for y in (one, other)]
        floor = 2e-7 * float(wanted.abs().max())
        for share, times in ((0.99, 1.25), (0.999, 2), (1, 10)):
            error, usual = (of[int(share * (len(of) - 1))] for of in errors)
            assert error <= times * usual + floor


each_direction = pytest.mark.parametrize(
    "name", ["rational_quadratic", "rational_quadratic_inverse"]
)


@each_isa
@each_form
@each_direction
@pytest.mark.parametrize("bins", [1, 2, 3, 7, 8, 9, 16, 33, 64])
def test_values_slopes_and_gradients_are_those_of_the_definition(isa, form, name, bins):
    native.set_isa(isa)
    assert_as_exact(name, drawn(9001, bins)[1], form)


@each_isa
@each_direction
@pytest.mark.parametrize("slope", [1e-6, 1e-2, 0.9])
@pytest.mark.parametrize("bound", [1e-3, math.pi, 300.0])
def test_other_domains_and_slopes(isa, name, bound, slope):
    native.set_isa(isa)
    rows = drawn(9001, 5, scale=1.0)[1]
    assert_as_exact(name, rows, SplineForm(bound, slope))
    assert_as_exact(name, rows, SplineForm(bound, slope, 0.19, 1e-6, False))


@each_form
def test_the_definition_has_the_derivatives_that_it_claims(form):
    x, rows = drawn(12, 4, dtype=torch.float64)
    inputs = x.requires_grad_(), rows.requires_grad_()
    gradcheck(lambda x, rows: reference.rational_quadratic(x, *split(rows), form), inputs)
    y, log_slope = reference.rational_quadratic(x, *split(rows), form)
    (by_x,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(by_x.log(), log_slope)
    back, slope_there = reference.rational_quadratic_inverse(y, *split(rows), form)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(slope_there, log_slope)


@each_isa
@each_form
@given(
    elements=st.integers(0, 70),
    bins=st.integers(1, 12),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_a_spline_is_monotone_onto_its_domain_and_inverted(isa, form, elements, bins, scale, seed):
    native.set_isa(isa)
    _, rows = drawn(1, bins, scale=scale, seed=seed)
    x = torch.linspace(-1.3 * BOUND, 1.3 * BOUND, elements)
    rows = rows.expand(elements, -1)  # of one spline: rows that lie on each other
    y, log_slope = rational_quadratic(x, *split(rows), form)
    outside = x.abs() > BOUND
    assert torch.equal(y[outside], x[outside])
    assert not log_slope[outside].any()
    assert bool((y.diff() >= -1e-5).all())
    assert bool((y[~outside].abs() <= BOUND * (1 + 1e-6)).all())
    # Where the spline is flat, rounding y moves x; where slopes differ a thousandfold, the root's
    # coefficients cancel.
    back, _ = rational_quadratic_inverse(y, *split(rows), form)
    assert bool(((back - x).abs() <= 2e-4 * (1 + torch.exp(-log_slope))).all())
    if scale == 0 and form == ZUKO:
        torch.testing.assert_close(y, x, atol=2e-6, rtol=0)


# --- Elements do not meet ------------------------------------------------------------------------


@each_isa
@each_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_element(isa, form, bad):
    native.set_isa(isa)
    x, rows = drawn(41, 8)
    x[3] = 9.0  # outside
    cotangents = torch.ones(41), torch.ones(41)
    clean = results(rational_quadratic, x, rows, cotangents, form)
    for place in (3, 17, 40):
        for column in (None, 0, 7, 8, 22):
            dirty_x, dirty = x.clone(), rows.clone()
            if column is None:
                dirty_x[place] = bad
            else:
                dirty[place, column] = bad
            others = torch.arange(41) != place
            for one, other in zip(
                results(rational_quadratic, dirty_x, dirty, cotangents, form),
                clean,
                strict=True,
            ):
                assert torch.equal(one[others], other[others])
            log_slope, wanted = (
                f(dirty_x, *split(dirty), form)[1]
                for f in (rational_quadratic, reference.rational_quadratic)
            )
            # An inner slope matters to the bins beside it; a caller sees that it is not finite.
            # A softmax makes 0 of -inf, and nothing bounds what nflows gives it.
            told = column != 22 and not (form == NFLOWS and bad == -math.inf)
            assert bool(log_slope[place].isnan()) or not told
            assert bool(log_slope[place].isnan()) >= bool(wanted[place].isnan())


@each_isa
@each_form
def test_any_number_of_threads_and_any_place_gives_the_same_bits(isa, form):
    native.set_isa(isa)
    x, rows = drawn(40_001, 8)
    cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    torch.set_num_threads(1)
    alone = results(rational_quadratic, x, rows, cotangents, form)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(
            results(rational_quadratic, x, rows, cotangents, form), alone, strict=True
        ):
            assert torch.equal(one, other)
    for begin in (1, 5, 33):
        few = results(
            rational_quadratic,
            x[begin:77],
            rows[begin:77],
            [c[begin:77] for c in cotangents],
            form,
        )
        for one, other in zip(few, alone, strict=True):
            assert torch.equal(one, other[begin:77])


# --- As torch ------------------------------------------------------------------------------------


def test_shapes_views_and_an_empty_batch():
    x, rows = drawn(60, 5)
    flat = rational_quadratic(x, *split(rows), ZUKO)
    shaped = rational_quadratic(x.view(3, 4, 5), *split(rows.view(3, 4, 5, -1)), ZUKO)
    for one, other in zip(shaped, flat, strict=True):
        assert torch.equal(one, other.view(3, 4, 5))
    turned = rational_quadratic(
        x.view(6, 10).t(), *split(rows.view(6, 10, -1).transpose(0, 1)), ZUKO
    )
    for one, other in zip(turned, flat, strict=True):
        assert torch.equal(one, other.view(6, 10).t())
    apart = torch.stack([x, x], 1)[:, 0]
    for one, other in zip(rational_quadratic(apart, *split(rows), ZUKO), flat, strict=True):
        assert torch.equal(one, other)
    columns = rows.t().contiguous().t()  # a parameter's values lie apart
    for one, other in zip(rational_quadratic(x, *split(columns), ZUKO), flat, strict=True):
        assert torch.equal(one, other)
    nothing = torch.zeros(0, 3)
    y, log_slope = rational_quadratic(nothing, *split(torch.zeros(0, 3, 14)), ZUKO)
    assert y.shape == log_slope.shape == (0, 3)


@pytest.mark.parametrize("used", [0, 1])
@each_direction
def test_a_result_that_nobody_uses_has_no_gradient(name, used):
    rows = drawn(100, 8)[1]
    x = off_knots(rows, int(name.endswith("inverse")), ZUKO)
    found = []
    for module, dtype in ((splines, torch.float32), (reference, torch.float64)):
        leaf = rows.to(dtype).requires_grad_()
        pair = getattr(module, name)(x.to(dtype), *split(leaf), ZUKO)
        found += torch.autograd.grad(pair[used].sum(), leaf)
    ours, wanted = found
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-3


@each_form
@each_direction
def test_a_gradient_of_a_gradient_is_that_of_the_definition(name, form):
    """What a score, or a penalty on it, needs."""
    found = []
    for module, dtype in ((splines, torch.float32), (reference, torch.float64)):
        x, rows = drawn(200, 6, scale=1.0, dtype=dtype)
        x.requires_grad_()
        rows.requires_grad_()
        y = getattr(module, name)(x, *split(rows), form)
        total = sum(part.sin().sum() for part in y)
        first = torch.autograd.grad(total, (x, rows), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, rows))
        found.append([g.detach().double() for g in (*first, *second)])
    for one, wanted in zip(*found, strict=True):
        assert float((one - wanted).norm() / wanted.norm()) < 1e-3


def test_a_batch_of_gradients():
    x, rows = drawn(50, 4)
    rows.requires_grad_()
    y, _ = rational_quadratic(x, *split(rows), ZUKO)
    many = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    (batched,) = torch.autograd.grad(y, rows, many, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        (one,) = torch.autograd.grad(y, rows, many[n], retain_graph=True)
        torch.testing.assert_close(batched[n], one, rtol=1e-3, atol=1e-4)


def test_the_ops_have_fakes():
    x, rows = drawn(9, 4)
    parts = [x, *(part.contiguous() for part in split(rows))]
    y, log_slope = torch.ops.maskmoe.rational_quadratic(*parts, *ZUKO)
    given = {
        "rational_quadratic": parts,
        "rational_quadratic_inverse": parts,
        "rational_quadratic_backward": [y, log_slope, *parts],
    }
    for name, args in given.items():
        torch.library.opcheck(
            getattr(torch.ops.maskmoe, name).default,
            (*args, *ZUKO),
            test_utils=("test_schema", "test_faketensor"),
        )


# --- What an op refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, "widths must be 8 rows of 4 values"),
        ({"x": torch.zeros(9, dtype=torch.float64)}, "x has another dtype"),
        ({"x": torch.zeros(18)[::2]}, "x must be 9 values, one after the other"),
        ({"widths": torch.zeros(9, 65)}, "widths must be of 1 to 64 bins, and is of 65"),
        ({"widths": torch.zeros(9, 0)}, "widths must be of 1 to 64 bins, and is of 0"),
        ({"widths": torch.zeros(4, 9).t()}, "widths must be 9 rows of 4 values, one after the"),
        ({"heights": torch.zeros(9, 5)}, "heights must be 9 rows of 4 values"),
        ({"derivatives": torch.zeros(9, 4)}, "derivatives must be 9 rows of 3 values"),
        ({"derivatives": torch.zeros(9, 3).half()}, "derivatives has another dtype"),
        ({"bound": math.nan}, "bound must be in"),
        ({"bound": 0.0}, "bound must be in"),
        ({"slope": 1.0}, "slope in"),
        ({"slope": 0.0}, "slope in"),
        ({"width": 0.1}, r"width and height must be in \[0, 0\]"),
        ({"height": math.nan}, r"width and height must be in \[0, 0\]"),
        ({"squashed": False}, r"width and height must be in \[1e-06, 0.2375\]"),
        ({"squashed": False, "width": 0.1, "height": 0.25}, "width and height must be in"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["rational_quadratic", "rational_quadratic_backward"])
def test_what_does_not_fit_is_refused(op, change, message):
    x, rows = drawn(9, 4)
    widths, heights, derivatives = (part.contiguous() for part in split(rows))
    given = {"x": x, "widths": widths, "heights": heights, "derivatives": derivatives}
    given |= ZUKO._asdict() | change
    grads = (None, None) if op.endswith("backward") else ()
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.maskmoe, op)(*grads, *given.values())


def test_memory_that_was_freed_is_refused():
    x, rows = drawn(9, 4)
    parts = [part.contiguous() for part in split(rows)]
    parts[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="widths ends behind its storage"):
        torch.ops.maskmoe.rational_quadratic(x, *parts, *ZUKO)


def test_takes_says_what_the_op_does():
    x = torch.zeros(2)
    for bins, *options in [
        (1, 1.0, 0.5),
        (schema.MAX_BINS, 1e-6, schema.LEAST),
        (4, 1.0, 0.5, 0.1, 0.1, True),
        (4, 1.0, 0.5, schema.MOST_FIXED / 4, 0.1, False),
        (4, 1.0, 0.5, schema.LEAST, schema.MOST_FIXED / 4, False),
        (4, 1.0, 0.5, 0.0, 0.1, False),
        (4, 1.0, 0.5, 0.1, 0.24, False),
        (schema.MAX_BINS + 1, 1.0, 0.5),
        (4, 1e7, 0.5),
        (4, 1.0, 1.0),
        (4, math.nan, 0.5),
        (4, 1.0, 1e-7),
    ]:
        parts = split(torch.zeros(2, 3 * bins - 1))
        try:
            torch.ops.maskmoe.rational_quadratic(x, *parts, *options)
            taken = True
        except RuntimeError:
            taken = False
        assert takes(bins, SplineForm(*options)) == taken
