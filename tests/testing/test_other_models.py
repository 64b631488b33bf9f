"""The assertions on models as people have them: state, structures, codes, zeros, random numbers."""

import copy
import dataclasses
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import maskmoe_kernels as mk
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated

FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 4, "c": 2},
    {"a": ["a"], "ab": ["a", "b"], "ac": ["a", "c"], "all": ["a", "b", "c"]},
)
VISIBLE = FAMILY.visible_features()


def x_of(rows=6):
    return torch.randn(rows, 9, generator=torch.Generator().manual_seed(1))


def masked(**options):
    torch.manual_seed(0)
    return mk.MaskedLinear(9, 4, VISIBLE, **options)


class Leaks(nn.Module):
    """An expert's output moved by a feature of another group, in the last bits."""

    def __init__(self):
        super().__init__()
        self.layer = masked()

    def forward(self, x):
        return self.layer(x) + 1e-3 * x[..., 8:]


# --- What a call changes is as before --------------------------------------------------------


class Busy(nn.Module):
    """Changes all that a module may: buffers (one is replaced), mode, gradients, generators."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(9)
        self.layer = masked()
        self.drop = nn.Dropout(0.25)
        self.generator = torch.Generator().manual_seed(5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        self.drop.train(not self.drop.training)
        y = self.layer(self.norm(x))
        self.last.copy_(y.detach().mean(0))
        noise = torch.rand(4, generator=self.generator) + torch.rand(4)
        shift = random.random() + np.random.rand()  # noqa: NPY002
        if self.layer.bias.grad is not None:
            self.layer.bias.grad += 1
        return self.drop(y * noise + shift)


def generators():
    return [
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        random.getstate(),
    ]


def everything(model):
    values = {name: t.clone() for name, t in model.state_dict().items() if torch.is_tensor(t)}
    values.update(
        (f"{n}.grad", p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None
    )
    values["last"], values["own"] = model.last.clone(), model.generator.get_state()
    return values, [m.training for m in model.modules()], generators()


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


@pytest.mark.parametrize("wrap", ["module", "method", "lambda", "partial"])
def test_a_model_is_as_before(wrap):
    model = Busy().train()
    model.layer.bias.grad = torch.full((4,), 0.5)
    grad, calls = model.layer.bias.grad, model.calls
    functions = {
        "module": model, "method": model.forward, "lambda": lambda x: model(x),
        "partial": partial(lambda m, x: m(x), model),
    }  # fmt: skip
    before = everything(model)
    assert_blind(functions[wrap], x_of(), VISIBLE)
    assert_same(before, everything(model))
    assert model.layer.bias.grad is grad
    assert model.calls is calls
    if wrap == "module":
        of_nobody = ["norm.weight", "norm.bias"]
        assert_gradient_isolated(model, x_of(), FAMILY, shared=of_nobody)
        assert_same(before, everything(model))


def test_running_statistics_hold_no_nan():
    model = nn.Sequential(nn.BatchNorm1d(9), masked()).train()
    model(x_of())
    mean = model[0].running_mean.clone()
    assert_blind(model, x_of(), VISIBLE)
    assert torch.equal(model[0].running_mean, mean)
    assert int(model[0].num_batches_tracked) == 1


def test_a_failure_restores_too():
    model = nn.Sequential(nn.BatchNorm1d(9), Leaks()).train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(AssertionError, match="output 0 depends"):
        assert_blind(model, x_of(), VISIBLE)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_a_graph_of_the_caller_lives_on():
    model = masked()
    loss = model(x_of()).square().sum()
    assert_gradient_isolated(model, x_of(), FAMILY)
    loss.backward()
    assert model.weight.grad.abs().sum() > 0


# --- What is returned, and what is seen -------------------------------------------------------


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    extra: int = 0


STRUCTURES = {
    "tuple": (lambda y: (y, None), lambda r: r[0], r"a tuple of \(a tensor \(6, 4\), a NoneType\)"),
    "dict": (lambda y: {"logits": y}, lambda r: r["logits"], r"'logits': a tensor \(6, 4\)"),
    "dataclass": (Answer, lambda r: r.logits, r"an? Answer with logits, extra"),
}


class Returns(nn.Module):
    def __init__(self, inner, make):
        super().__init__()
        self.inner, self.make = inner, make

    def forward(self, x):
        return self.make(self.inner(x))


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structures_are_judged_by_the_named_output(kind):
    make, choose, described = STRUCTURES[kind]
    good, leaky = Returns(masked(), make), Returns(Leaks(), make)
    for check in (
        lambda net, **o: assert_blind(net, x_of(), VISIBLE, **o),
        lambda net, **o: assert_gradient_isolated(net, x_of(), FAMILY, **o),
    ):
        check(good, output=choose)
        with pytest.raises(mk.LayoutError, match=described):
            check(good)
    with pytest.raises(AssertionError, match="depends on features it may not see"):
        assert_blind(leaky, x_of(), VISIBLE, output=choose)


def test_our_own_sequence_layers_are_judged():
    torch.manual_seed(0)
    gru = mk.MaskedGRU(FAMILY, 2)
    visible = VISIBLE.repeat_interleave(2, dim=0)
    x = torch.randn(2, 3, 9)
    assert_blind(gru, x, visible, output=lambda returned: returned[0])
    with pytest.raises(mk.LayoutError, match=r"a tuple of \(a tensor \(2, 3, 8\)"):
        assert_blind(gru, x, visible)


def test_visible_may_be_an_array_or_a_list():
    assert_blind(masked(), x_of(), VISIBLE.numpy())
    assert_blind(masked(), x_of(), VISIBLE.tolist())
    with pytest.raises(AssertionError, match="output 0 depends"):
        assert_blind(Leaks(), x_of(), VISIBLE.numpy())
    with pytest.raises(mk.LayoutError, match=r"int64 \(4, 9\)"):
        assert_blind(masked(), x_of(), VISIBLE.numpy().astype(np.int64))
    with pytest.raises(mk.LayoutError, match=r"bool matrix.*got dict"):
        assert_blind(masked(), x_of(), {})


# --- Columns that hold codes -------------------------------------------------------------------


class Coded(nn.Module):
    """Column 3, of group b, is a code of five; its embedding is read by who sees b."""

    def __init__(self, leak=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.layer, self.leak = masked(), leak
        self.register_buffer("sees", VISIBLE[:, 3].float())

    def forward(self, x):
        looked_up = self.table(x[..., 3].long())
        rest = torch.cat([x[..., :3], torch.zeros_like(x[..., 3:4]), x[..., 4:]], -1)
        return self.layer(rest) + looked_up * torch.where(self.sees > 0, 1.0, self.leak)


def coded():
    x = x_of()
    x[:, 3] = torch.tensor([0, 1, 2, 3, 4, 0])
    return x


def test_codes_have_fills_of_their_own():
    with pytest.raises(mk.LayoutError, match=r"module raised IndexError with .*fills=\{column"):
        assert_blind(Coded(), coded(), VISIBLE)
    assert_blind(Coded(), coded(), VISIBLE, fills={3: [0, 4]})
    with pytest.raises(AssertionError, match=r"output \d depends on features"):
        assert_blind(Coded(leak=1e-4), coded(), VISIBLE, fills={3: [0, 4]})


def test_fills_have_to_change_something():
    x = x_of()
    x[:, 3] = 2
    with pytest.raises(mk.LayoutError, match="column 3 as it is"):
        assert_blind(masked(), x, VISIBLE, fills={3: [2, 2]})
    with pytest.raises(mk.LayoutError, match="fills names column 9, but x has 9"):
        assert_blind(masked(), x, VISIBLE, fills={9: [2]})
    with pytest.raises(mk.LayoutError, match="at least one value"):
        assert_blind(masked(), x, VISIBLE, fills=[])


def test_one_list_of_fills_is_for_all_columns():
    """Who looks at finite values only is judged by those."""

    def finite(x):
        if not x.isfinite().all():
            raise ValueError("NaN in x")
        return layer(x)

    layer = masked()
    with pytest.raises(mk.LayoutError, match="module raised ValueError with nan"):
        assert_blind(finite, x_of(), VISIBLE)
    assert_blind(finite, x_of(), VISIBLE, fills=[7.0, -3.0])
    layer = Leaks()
    with pytest.raises(AssertionError, match="with 7 in every unseen feature"):
        assert_blind(finite, x_of(), VISIBLE, fills=[7.0, -3.0])


# --- Zeros, dead units, random numbers -----------------------------------------------------------


class Headed(nn.Module):
    """Two masked layers; the head may start at zero, and the detach between may be missing."""

    def __init__(self, routes_all, zero):
        super().__init__()
        torch.manual_seed(0)
        hidden = FAMILY.hidden_layout(5, 1)
        if routes_all:
            hidden = mk.BlockLayout(hidden.row_sizes, hidden.col_sizes, hidden.present)
        self.first = mk.MaskedLinear.from_layout(FAMILY.input_layout(5), activation="relu")
        self.head = mk.MaskedLinear.from_layout(hidden)
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.first(x))


@pytest.mark.parametrize("zero", [False, True])
def test_a_missing_detach_behind_a_head_of_zeros_is_seen(zero):
    assert_gradient_isolated(Headed(routes_all=False, zero=zero), x_of(), FAMILY)
    model = Headed(routes_all=True, zero=zero)
    with pytest.raises(AssertionError, match=r"'first\.(weight|bias)'"):
        assert_gradient_isolated(model, x_of(), FAMILY)
    assert not zero or not model.head.weight.any()


def test_an_expert_that_moves_nothing_cannot_be_judged():
    model = Headed(routes_all=False, zero=False)
    with torch.no_grad():
        model.first.bias.fill_(-1e6)  # every unit is dead, however the parameters are moved
    model.head.register_parameter("bias", None)
    with pytest.raises(mk.LayoutError, match="expert 'a' moves no parameter"):
        assert_gradient_isolated(model, x_of(), FAMILY)


def test_random_numbers_of_its_own_are_no_leak():
    numbers = torch.Generator()
    layer = masked()

    def noisy(x):
        return layer(x) + torch.rand(4, generator=numbers)

    with pytest.raises(mk.LayoutError, match="two runs of module on the same x differ in the out"):
        assert_blind(noisy, x_of(), VISIBLE)

    def moving(x):  # no buffer: nobody can put it back
        moving.calls += 1
        return layer(x) * moving.calls

    moving.calls = 0
    with pytest.raises(mk.LayoutError, match="state that moves"):
        assert_blind(moving, x_of(), VISIBLE)


def test_a_gradient_that_is_drawn_is_no_leak():
    numbers = torch.Generator()

    class Drawn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.rand((), generator=numbers)

    layer = masked()
    with pytest.raises(mk.LayoutError, match="differ in the gradient"):
        assert_blind(lambda x: Drawn.apply(layer(x)), x_of(), VISIBLE)
