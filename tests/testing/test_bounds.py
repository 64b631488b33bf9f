"""Faults planted just inside and just outside what each assertion allows."""

import re

import pytest
import torch
from torch import nn

import maskmoe_kernels as mk
from maskmoe_kernels.testing import (
    agreement,
    assert_blind,
    assert_close_to_oracle,
    assert_gradient_isolated,
)

# Unit 0 sees feature 0, unit 1 the first two, unit 2 the last. Where units 0 are judged, unit 1
# reads their feature and a filled one; feature 2 is read by unit 2 alone.
VISIBLE = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
X = torch.tensor([[0.5, 0.25, 2.0], [1.5, -0.5, 0.0]])
ORDINARY = -3.0


class _Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, in_output, in_gradient):
        ctx.save_for_backward(x)
        ctx.in_gradient = in_gradient
        y = torch.stack([x[..., 0], x[..., 0] + x[..., 1], x[..., 2]], -1)
        return y if in_output is None else in_output(x, y)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_x = torch.stack([grad[..., 0] + grad[..., 1], grad[..., 1], grad[..., 2]], -1)
        if ctx.in_gradient is not None:
            grad_x = ctx.in_gradient(x, grad, grad_x)
        return grad_x, None, None


def planted(in_output=None, in_gradient=None):
    """A module that respects ``VISIBLE`` but for what the two make of outputs and gradients."""
    return lambda x: _Planted.apply(x, in_output, in_gradient)


def up(value):
    """The next larger number."""
    return torch.nextafter(value, torch.full_like(value, torch.inf))


def put(where, unit, value):
    """``value(y)`` in place of unit or feature ``unit`` in the rows ``where`` says."""

    def change(x, *tensors):
        y = tensors[-1].clone()
        rows = where(x, *tensors[:-1])
        y[..., unit] = torch.where(rows, value(y[..., unit]), y[..., unit])
        return y

    return change


def filled_with(value, feature=1):
    """Rows whose ``feature`` holds ``value``."""

    def rows(x, *_):
        at = x[..., feature]
        return at.isnan() if value != value else at == value

    return rows


def second_row(rows):
    return lambda x, *rest: rows(x, *rest) & (torch.arange(len(x)) == 1)


def nan(y):
    return torch.full_like(y, torch.nan)


LARGEST = float(torch.tensor(1e38))
FILLS = [torch.nan, torch.inf, -torch.inf, LARGEST, ORDINARY]


def test_nothing_planted_passes():
    assert_blind(planted(), X, VISIBLE)
    assert_blind(planted(in_output=put(filled_with(ORDINARY), 1, up)), X, VISIBLE)  # which it sees


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("change", "row"),
    [
        (up, 0),
        (nan, 0),
        (lambda y: y + torch.inf, 0),
        (nan, 1),  # of what is 0 there
        (lambda y: -y, 1),  # the sign of a 0
    ],
    ids=["one ulp", "NaN", "infinity", "NaN for 0", "-0"],
)
def test_an_output_that_tells_of_one_fill(fill, change, row):
    rows = filled_with(fill)
    fault = put(second_row(rows) if row else rows, 2, change)
    shown = re.escape(f"{fill:g}")
    message = rf"(?s)output 2 depends on features .* \(0, 1\).* with {shown} in .* in row {row}"
    with pytest.raises(AssertionError, match=message):
        assert_blind(planted(fault), X, VISIBLE)


def asked(unit, rows=None):
    """Rows in which the gradient of ``unit`` is asked for, of those that ``rows`` says."""

    def chosen(x, grad):
        found = grad[..., unit] != 0
        return found if rows is None else found & rows(x)

    return chosen


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("unit", "feature", "change", "kind"),
    [
        (2, 1, lambda g: g + 2.0**-80, "may not see"),
        (2, 2, up, "they see"),
        (2, 2, nan, "they see"),  # no other output reads it
        (0, 0, up, "they see"),
        (0, 0, lambda g: g + torch.inf, "they see"),
        (0, 1, lambda g: g + 2.0**-80, "may not see"),
        (0, 1, lambda g: g + torch.inf, "may not see"),
    ],
)
def test_a_gradient_that_tells_of_one_fill(fill, unit, feature, change, kind):
    of_fill = filled_with(fill, 2 if unit == 0 else 1)
    fault = put(asked(unit, of_fill), feature, change)
    message = rf"outputs {unit} to feature {feature}, which they {kind.removeprefix('they ')}"
    with pytest.raises(AssertionError, match=message) as caught:
        assert_blind(planted(in_gradient=fault), X, VISIBLE)
    assert f"with {fill:g} in every unseen feature" in str(caught.value)


@pytest.mark.parametrize("feature", [0, 1])
@pytest.mark.parametrize("fill", FILLS)
def test_nan_that_another_output_explains_is_forgiven_but_for_the_ordinary_fill(fill, feature):
    fault = put(asked(0, filled_with(fill)), feature, nan)
    if fill != ORDINARY:
        assert_blind(planted(in_gradient=fault), X, VISIBLE)
        return
    with pytest.raises(AssertionError, match=rf"outputs 0 to feature {feature}, .*with -3 .*"):
        assert_blind(planted(in_gradient=fault), X, VISIBLE)


@pytest.mark.parametrize("change", [lambda g: g + 2.0**-80, nan], ids=["tiny", "NaN"])
def test_a_gradient_to_the_unseen_with_nothing_filled(change):
    as_given = second_row(lambda x: x[..., 1] == X[1, 1])
    fault = put(asked(0, as_given), 1, change)
    with pytest.raises(AssertionError, match=r"feature 1, which they may not .* row 1, with x as"):
        assert_blind(planted(in_gradient=fault), X, VISIBLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_one_ulp_in_every_type(dtype):
    def step(y):
        integer = {2: torch.int16, 8: torch.int64}[y.element_size()]
        return (y.contiguous().view(integer) + 1).view(dtype)

    fault = second_row(filled_with(ORDINARY))
    x = X.to(dtype)
    assert_blind(planted(), x, VISIBLE)
    with pytest.raises(AssertionError, match="output 2 depends"):
        assert_blind(planted(put(fault, 2, step)), x, VISIBLE)


class InTraining(nn.Module):
    def forward(self, x):
        fault = put(filled_with(ORDINARY), 2, up) if self.training else None
        return planted(fault)(x)


def test_a_module_is_judged_in_the_mode_it_is_in():
    assert_blind(InTraining().eval(), X, VISIBLE)
    with torch.no_grad(), pytest.raises(AssertionError, match="output 2"):
        assert_blind(InTraining(), X, VISIBLE)


# --- assert_gradient_isolated ------------------------------------------------------------

FAMILY = mk.SubsetFamily({"a": 2, "b": 3}, {"a": ["a"], "b": ["b"], "all": ["a", "b"]})


class Meddling(nn.Module):
    """Expert 1's logit moves one element of a parameter of expert 0's, and nobody sees it."""

    def __init__(self, name, element, factor):
        super().__init__()
        torch.manual_seed(0)
        self.net = mk.InterpretableMLP(FAMILY, [4, 4], "tanh")
        self.name, self.element, self.factor = name, element, factor

    def forward(self, x):
        logits = self.net(x)
        moved = self.factor * dict(self.net.named_parameters())[self.name][self.element]
        return logits + moved * torch.tensor([0.0, 1.0, 0.0])


@pytest.mark.parametrize("factor", [1e-30, torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize(
    ("name", "element"),
    [("layers.0.weight", 7), ("layers.0.bias", 3), ("layers.1.weight", 15), ("layers.2.bias", 0)],
)
def test_one_element_moved_by_another_expert(name, element, factor):
    model, x = Meddling(name, element, factor), torch.ones(2, 5)
    if factor == 0:
        assert_gradient_isolated(model, x, FAMILY)
        return
    message = rf"'net\.{name}': element \({element},\) is moved by .*'a' and by that of expert 'b'"
    with pytest.raises(AssertionError, match=message):
        assert_gradient_isolated(model, x, FAMILY)
    assert_gradient_isolated(model, x, FAMILY, shared=[f"net.{name}"])
    model.net.get_parameter(name).requires_grad_(False)
    assert_gradient_isolated(model, x, FAMILY)


def test_one_element_moved_by_the_wrong_expert_alone():
    model, x = Meddling("layers.2.weight", 3, 1e-30), torch.ones(2, 5)
    head = model.net.layers[1]
    with torch.no_grad():  # the unit whose weight that is says nothing: its owner does not move it
        head.weight[[3, 7, 11, 15]] = 0
        head.bias[3] = 0
    message = (
        r"layers\.2\.weight': the loss of expert 'b' moves row block 0, which .*'a'.* element 3 "
    )
    with pytest.raises(AssertionError, match=message):
        assert_gradient_isolated(model, x, FAMILY)


# --- assert_close_to_oracle --------------------------------------------------------------

ONE = mk.BlockLayout([1], [1], torch.ones(1, 1).bool())
EPS = torch.finfo(torch.float32).eps


class _Off(torch.autograd.Function):
    """y = x w + b of one number each, and what is planted in one of its four results."""

    @staticmethod
    def forward(ctx, x, weight, bias, at, change):
        ctx.save_for_backward(x, weight)
        ctx.fault = at, change
        y = x * weight + bias
        return change(y) if at == "output" else y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        at, change = ctx.fault
        grads = {
            "grad_x": grad * weight,
            "grad_weight": (grad * x).sum(0),
            "grad_bias": grad.sum(0),
        }
        if at in grads:
            grads[at] = change(grads[at])
        return *grads.values(), None, None


def off(at, change):
    return lambda x, weight, bias, layout, activation: _Off.apply(x, weight, bias, at, change)


@pytest.mark.parametrize("at", ["output", "grad_x", "grad_weight", "grad_bias"])
def test_four_roundings_are_allowed_and_a_fifth_is_not(at):
    """Everything is exact in float32 here, and no term of a sum is larger than the sum."""
    inputs = torch.ones(1, 1), torch.ones(1), torch.zeros(1)
    for roundings in (-3.4, 3.4):
        assert_close_to_oracle(off(at, lambda t, k=roundings: t * (1 + k * EPS)), *inputs, ONE)
    for change in (lambda t: t * (1 + 5 * EPS), lambda t: t * (1 - 5 * EPS), nan, torch.zeros_like):
        with pytest.raises(AssertionError, match=rf"{at}\[0(, 0)?\] is .*\(allowed error"):
            assert_close_to_oracle(off(at, change), *inputs, ONE)


def test_terms_that_cancel_allow_their_own_roundings():
    inputs = torch.full((1, 1), 1024.0), torch.ones(1), torch.full((1,), -1023.0)  # y = 1 of 2047
    assert_close_to_oracle(off("output", lambda t: t + 4 * 2047 * EPS), *inputs, ONE)
    with pytest.raises(AssertionError, match="output"):
        assert_close_to_oracle(off("output", lambda t: t + 4 * 2060 * EPS), *inputs, ONE)


def test_four_of_the_smallest_numbers_are_allowed():
    inputs = torch.full((1, 1), 2.0**-70), torch.full((1,), 2.0**-70), torch.zeros(1)  # y = 2^-140
    smallest = 2.0**-149
    assert_close_to_oracle(off("output", lambda t: t + 4 * smallest), *inputs, ONE)
    with pytest.raises(AssertionError, match="output"):
        assert_close_to_oracle(off("output", lambda t: t + 5 * smallest), *inputs, ONE)


def test_twice_the_error_of_pytorch_is_allowed():
    true = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    theirs = true + torch.tensor([1e-3, -1e-3, 0.0, 0.0], dtype=torch.float64)
    floor = torch.tensor([1e-4, 1e-4, 1e-4, 0.0], dtype=torch.float64)
    inside = torch.tensor([2.09e-3, 2.09e-3, 0.9e-4, 0.0], dtype=torch.float64)
    for sign in (-1, 1):
        agreement._hold("y", true + sign * inside, theirs, true, floor)
    for k, error in enumerate((2.11e-3, 2.11e-3, 1.1e-4, 1e-300)):
        wrong = true.clone()
        wrong[k] += error
        with pytest.raises(AssertionError, match=rf"y\[{k}\] .* 1 of 4 elements are off"):
            agreement._hold("y", wrong, theirs, true, floor)


class _More(torch.autograd.Function):
    """y, and ``slope`` times its cotangent for x besides."""

    @staticmethod
    def forward(ctx, y, x, slope):
        ctx.slope = slope
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad * ctx.slope, None


def more(slope):
    return lambda x, *rest: _More.apply(mk.masked_linear(x, *rest, "reference"), x, slope)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu", "silu"])
def test_a_slope_may_be_taken_where_z_is_rounded_to(activation):
    """At z = 1: four roundings of 1.2 + |z|, and twice PyTorch's own of less than one."""
    inputs = torch.ones(1, 1), torch.ones(1), torch.zeros(1)
    assert_close_to_oracle(more(8 * EPS), *inputs, ONE, activation)
    with pytest.raises(AssertionError, match="grad_x"):
        assert_close_to_oracle(more(12 * EPS), *inputs, ONE, activation)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_the_side_of_a_kink_is_luck_within_rounding_only(activation):
    """z = x + 1 is rounded at 2, so its sign is luck below 4 * 4 roundings of that."""
    one = torch.ones(1)
    for roundings in (-30, 0, 30):
        x = torch.full((1, 1), -1 + roundings * EPS)
        assert_close_to_oracle(more(1), x, one, one, ONE, activation)
        with pytest.raises(AssertionError, match="grad_x"):
            assert_close_to_oracle(more(1), x, one, one, ONE, "tanh")  # which has no kink
    for roundings in (-34, 34):
        x = torch.full((1, 1), -1 + roundings * EPS)
        with pytest.raises(AssertionError, match="grad_x"):
            assert_close_to_oracle(more(1), x, one, one, ONE, activation)


@pytest.mark.parametrize("change", [lambda y: y.double(), lambda y: y[0]])
def test_another_dtype_or_shape_is_refused(change):
    inputs = torch.ones(2, 1), torch.ones(1), torch.zeros(1)
    with pytest.raises(AssertionError, match=r"op gave .*, expected torch\.float32 \(2, 1\)"):
        assert_close_to_oracle(
            lambda x, w, b, layout, name: change(mk.masked_linear(x, w, b, layout)), *inputs, ONE
        )


@torch.no_grad()
def test_gradients_are_judged_where_none_are_recorded():
    fault = put(asked(2), 1, lambda g: g + 1)
    with pytest.raises(AssertionError, match="gradient of outputs 2"):
        assert_blind(planted(in_gradient=fault), X, VISIBLE)
    with pytest.raises(AssertionError, match="is moved by"):
        assert_gradient_isolated(Meddling("layers.0.bias", 0, 1.0), torch.ones(2, 5), FAMILY)
    inputs = torch.ones(1, 1), torch.ones(1), torch.zeros(1)
    with pytest.raises(AssertionError, match="grad_weight"):
        assert_close_to_oracle(off("grad_weight", lambda t: 2 * t), *inputs, ONE)
