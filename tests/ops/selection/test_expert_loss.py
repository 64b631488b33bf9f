"""The loss of every expert in every sample, and selection among experts with K classes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels import LayoutError, SubsetFamily, expert_loss, gem_loss, mixture, selection
from maskmoe_kernels.ops.selection import deselection, reference
from maskmoe_kernels.testing.strategies import families
from tests.ops.selection.test_gem import drawn_weights

KINDS = ("binary", "multiclass", "regression", "regressions")
CUBE = SubsetFamily.powerset({"a": 1, "b": 2, "c": 1})

seeds = st.integers(0, 2**31 - 1)
kinds = st.sampled_from(KINDS)
classes = st.integers(2, 5)
confidences = st.sampled_from(["abs", "square", "smooth"])
sharpnesses = st.sampled_from([1.0, 2.5])
weightings = st.sampled_from(["selection", "deselection", "uniform"])
normalizes = st.sampled_from([None, "sample", "expert", "batch"])


def sample(experts, outputs, kind, seed, rows=6, dtype=torch.float64):
    """Predictions, targets, a mask, weights of samples."""
    random = torch.Generator().manual_seed(seed)
    of_one = (rows, experts)
    shape = of_one if kind in ("binary", "regression") else (*of_one, outputs)
    z = 1.5 * torch.randn(shape, generator=random, dtype=dtype)
    target = {
        "binary": lambda: torch.rand(rows, generator=random).to(dtype),
        "multiclass": lambda: torch.randint(outputs, (rows,), generator=random),
        "regression": lambda: torch.randn(rows, generator=random, dtype=dtype),
        "regressions": lambda: torch.randn(rows, outputs, generator=random, dtype=dtype),
    }[kind]()
    mask = torch.rand(rows, generator=random) < 0.7
    return z, target, mask, drawn_weights(seed, (rows,)).to(dtype)


def kind_of(name):
    return name.replace("regressions", "regression")


def of_each(z, y, kind):
    """The loss of each expert in one sample, in plain Python."""
    if kind == "binary":
        f = [1 / (1 + math.exp(-2 * v)) for v in z.tolist()]
        return [-(y * math.log(p) + (1 - y) * math.log(1 - p)) for p in f]
    if kind == "multiclass":
        return [math.log(sum(map(math.exp, row))) - row[y] for row in z.tolist()]
    if kind == "regression":
        return [(v - y) ** 2 for v in z.tolist()]
    return [sum((a - b) ** 2 for a, b in zip(v, y, strict=True)) for v in z.tolist()]


@given(st.integers(1, 6), classes, kinds, seeds, st.booleans(), st.booleans())
def test_is_the_weighted_mean_of_every_experts_loss(experts, outputs, kind, seed, masked, weighs):
    z, y, mask, times = sample(experts, outputs, kind, seed)
    kept = mask.double() if masked else torch.ones(len(z)).double()
    given_times = (kept * (times if weighs else 1)).tolist()
    total = sum(given_times)
    losses = [sum(of_each(a, b, kind)) for a, b in zip(z, y.tolist(), strict=True)]
    expected = sum(t * loss for t, loss in zip(given_times, losses, strict=True)) / (total or 1)
    options = {"sample_weight": times if weighs else None, "mask": mask if masked else None}
    many = outputs if kind in ("multiclass", "regressions") else None
    loss = expert_loss(z, y, kind_of(kind), outputs=many, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    defined = reference.expert_loss_reference(z, y, kind_of(kind), **options)
    torch.testing.assert_close(loss, defined, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind):
    z, y, mask, times = sample(3, 4, kind, 1)
    z, times = z.requires_grad_(), (times + 0.1).requires_grad_()
    many = 4 if z.dim() == 3 else None

    def loss_of(z, times):
        return expert_loss(z, y, kind_of(kind), times, mask, outputs=many)

    assert torch.autograd.gradcheck(loss_of, (z, times))
    assert torch.autograd.gradgradcheck(loss_of, (z, times))


@given(st.integers(2, 6), kinds, seeds)
def test_an_expert_is_apart_and_what_does_not_count_reaches_nobody(experts, kind, seed):
    z, y, mask, times = sample(experts, 3, kind, seed, dtype=torch.float32)
    many = 3 if z.dim() == 3 else None
    out = ~mask | (times == 0)
    found = []
    for spoil in (False, True):
        a, b = z.clone(), y.clone()
        if spoil:
            a[:, 1] = torch.nan
            a[out] = torch.inf
            b[out] = torch.nan if b.is_floating_point() else 10**9
        a.requires_grad_()
        w = torch.where(mask, times, -torch.inf) if spoil else times
        loss = expert_loss(a, b, kind_of(kind), w, mask, outputs=many)
        (grad,) = torch.autograd.grad(loss, a)
        assert not grad[out].any()
        assert loss.isnan() == bool(spoil and not out.all())
        found.append(grad)
    others = torch.arange(experts) != 1
    assert torch.equal(found[0][:, others], found[1][:, others])
    assert found[1][~out][:, 1].isnan().all()


@given(families(max_experts=8), seeds)
def test_binary_is_the_loss_with_uniform_weights(family, seed):
    z, y, mask, times = sample(family.num_experts, None, "binary", seed, dtype=torch.float32)
    expected = gem_loss(z, y, family, weighting="uniform", mask=mask, sample_weight=times)
    assert torch.equal(expert_loss(z, y, "binary", times, mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape_and_type_and_nothing_at_all(kind):
    z, y, mask, times = sample(3, 4, kind, 2, dtype=torch.float32)
    options, name = {"outputs": 4 if z.dim() == 3 else None}, kind_of(kind)
    expected = expert_loss(z, y, name, times, mask, **options)
    shaped = [t.unflatten(0, (3, 1, 2)) for t in (z, y, times, mask)]
    assert torch.equal(expert_loss(*shaped[:2], name, *shaped[2:], **options), expected)
    low = expert_loss(z.bfloat16(), y, name, **options)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expert_loss(z, y, name, **options), rtol=0.05, atol=0)
    for rows in (z[:0], z[:2]):
        rows.requires_grad_()
        nothing = torch.zeros(len(rows))
        loss = expert_loss(rows, y[: len(rows)], name, sample_weight=nothing, **options)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, rows)[0].any()


@pytest.mark.parametrize(
    ("shape", "target", "kind", "outputs", "words"),
    [
        ((4, 3), torch.ones(4), "softmax", None, "'binary', 'multiclass', 'regression'.*'softmax'"),
        ((4, 3), torch.ones(3), "binary", None, r"target must be \(4,\) for 'binary', got \(3,\)"),
        (
            (4, 3, 2),
            torch.ones(4),
            "binary",
            2,
            "needs experts with one output; these have 2 outputs",
        ),
        ((4,), torch.zeros(4).long(), "multiclass", None, r"needs experts with K outputs"),
        ((4, 3, 2), torch.tensor([0, 1, 2, 0]), "multiclass", None, "from 0 to 1, got .* 0 to 2"),
        ((4, 3, 2), torch.tensor([0, 1, -1, 0]), "multiclass", None, "values from -1 to 1"),
        ((4, 3, 2), torch.zeros(4), "multiclass", None, r"integers, got .*; pass target.long\(\)"),
        ((4, 3, 2), torch.zeros(4, 3), "regression", None, None),
        ((4, 3, 2), torch.zeros(4, 5), "regression", None, r"target must be \(4, 3\) for"),
        ((4, 3, 2), torch.zeros(4, 5), "regression", 2, r"target must be \(4, 2\) for"),
        ((4, 3, 2), torch.zeros(4, 3), "regression", 3, r"K=outputs=3, got \(4, 3, 2\)"),
        ((4, 3, 3), torch.zeros(4, 3), "regression", None, r"\(\*, H\) or \(\*, H, K\).*outputs=3"),
        ((4, 3), torch.tensor([0.0, math.nan, 1, 2]), "regression", None, "NaN|finite.*with mask"),
        ((4, 3), torch.tensor([0.0, math.inf, 1, 2]), "regression", None, "finite numbers"),
        ((4, 3), torch.full((4,), 2.0), "binary", None, r"labels in \[0, 1\]"),
    ],
)
def test_errors_carry_the_values(shape, target, kind, outputs, words):
    if words is None:
        assert expert_loss(torch.ones(shape), target, kind, outputs=outputs) == 2
        return
    with pytest.raises(LayoutError, match=words):
        expert_loss(torch.zeros(shape), target, kind, outputs=outputs)


def test_a_batch_of_as_many_rows_as_experts_is_a_batch():
    z, y = torch.randn(3, 3), torch.randn(3)
    expected = (z - y[:, None]).square().sum() / 3
    torch.testing.assert_close(expert_loss(z, y, "regression"), expected)


def test_integers_are_no_predictions():
    with pytest.raises(LayoutError, match=r"predictions must be floating-point, got torch.int64"):
        expert_loss(torch.zeros(2, 3).long(), torch.zeros(2))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    torch._dynamo.reset()
    compiled = torch.compile(expert_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        z, y, mask, times = sample(3, 4, kind, rows, rows)
        arguments = (z, y, kind_of(kind), times, mask)
        options = {"outputs": 4 if z.dim() == 3 else None}
        torch.testing.assert_close(
            compiled(*arguments, **options), expert_loss(*arguments, **options)
        )


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("binary", 2.0), ("multiclass", 4), ("multiclass", -1), ("regression", math.inf),
     ("regression", math.nan)],
)  # fmt: skip
def test_a_graph_refuses_targets_and_weights_too(kind, bad):
    torch._dynamo.reset()
    compiled = torch.compile(expert_loss, fullgraph=True, backend="aot_eager")
    z, y, mask, times = sample(3, 4, kind, 1, dtype=torch.float32)
    mask[1], spoilt = True, y.clone()
    spoilt[1] = bad
    out = mask.clone()
    out[1] = False
    assert compiled(z, spoilt, kind, times, out).isfinite()
    with pytest.raises(RuntimeError, match="target must hold"):
        compiled(z, spoilt, kind, times + 1, mask)
    with pytest.raises(RuntimeError, match="sample_weight must hold"):
        compiled(z, y, kind, times - 9, mask)


# --- The paper's rule for K classes ----------------------------------------------------------


def class_logits(family, outputs, seed, dtype=torch.float64, rows=5):
    random = torch.Generator().manual_seed(seed)
    shape = (rows, family.num_experts, outputs)
    return 1.5 * torch.randn(shape, generator=random, dtype=dtype)


@given(families(max_experts=10), classes, seeds, confidences, sharpnesses)
def test_selection_and_mixture_follow_the_definition(family, outputs, seed, confidence, sharpness):
    z = class_logits(family, outputs, seed)
    options = (family, confidence, sharpness)
    for own, ours in ((True, selection), (False, deselection)):
        expected = reference.selection_reference(z, *options, own, outputs)
        torch.testing.assert_close(ours(z, *options, outputs=outputs), expected)
    found = mixture(z, *options, outputs=outputs)
    for a, b in zip(found, reference.mixture_reference(z, *options, outputs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found.probability.sum(-1), torch.ones(5).double())


@given(families(max_experts=8), seeds, confidences, sharpnesses, weightings, normalizes)
def test_two_classes_are_one_logit(family, seed, confidence, sharpness, weighting, normalize):
    """Classes with the logits -z and z: |F| of z, and everything that follows from it."""
    z = 4 * class_logits(family, 2, seed)[..., 0]
    two = torch.stack([-z, z], -1)
    ours = mixture(two, family, confidence, sharpness, outputs=2)
    theirs = mixture(z, family, confidence, sharpness)
    torch.testing.assert_close(ours.probability[..., 1], theirs.probability)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    y = torch.arange(5) % 2
    options = (family, confidence, weighting, normalize, None, sharpness)
    torch.testing.assert_close(gem_loss(two, y, *options, outputs=2), gem_loss(z, y, *options))


@given(families(max_experts=8), classes, seeds, weightings, normalizes, st.booleans())
def test_the_loss_of_classes_follows_the_definition(
    family, outputs, seed, weighting, normalize, counted
):
    z = class_logits(family, outputs, seed).requires_grad_()
    y = torch.arange(5) % outputs
    mask, times = torch.arange(5) != seed % 5, drawn_weights(seed, (5,))
    arguments = (z, y, family, "abs", weighting, normalize, *((mask, 1.0, times) * counted))
    loss = gem_loss(*arguments, outputs=outputs)
    expected = reference.gem_loss_reference(*arguments, outputs=outputs)
    torch.testing.assert_close(loss, expected)
    if expected.requires_grad:
        grads = [torch.autograd.grad(of, z)[0] for of in (loss, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("confidence", ["abs", "square", "smooth"])
def test_selection_of_classes_has_derivatives(confidence):
    z = class_logits(CUBE, 3, 3, rows=2).requires_grad_()
    for function in (selection, deselection):
        assert torch.autograd.gradcheck(
            lambda z, f=function: f(z, CUBE, confidence, 2.0, outputs=3), z
        )


@given(families(max_experts=8), classes, seeds, confidences, st.sampled_from([0.0, 1e-4, 40.0]))
def test_bounds_and_digits_of_classes_in_float32(family, outputs, seed, confidence, scale):
    z = class_logits(family, outputs, seed, torch.float32) * scale
    alpha = selection(z, family, confidence, outputs=outputs)
    assert ((alpha >= 0) & (alpha <= 1)).all()
    exact = selection(z.double(), family, confidence, outputs=outputs)
    torch.testing.assert_close(alpha.double(), exact, rtol=1e-3, atol=1e-37)
    prediction = mixture(z, family, confidence, outputs=outputs).probability
    assert ((prediction >= 0) & (prediction <= 1)).all()
    if scale == 0:  # nobody is confident
        torch.testing.assert_close(prediction, torch.full_like(prediction, 1 / outputs))


@given(families(), classes, seeds, st.sampled_from([torch.nan, torch.inf]))
def test_an_unknown_class_logit_reaches_who_contains_its_expert(family, outputs, seed, poison):
    z = class_logits(family, outputs, seed, torch.float32)
    hit = seed % family.num_experts
    clean = mixture(z, family, outputs=outputs)
    z[0, hit, seed % outputs] = poison
    alpha = selection(z, family, outputs=outputs)
    assert torch.equal(alpha[0].isnan(), family.inclusion[:, hit])
    assert torch.equal(alpha[1:], clean.selection[1:])
    known = mixture(z, family, missing="skip", outputs=outputs)
    assert known.probability.isfinite()[0].all() == (family.num_experts > 1)
    assert known.attribution[0, hit].nan_to_num() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outputs": 1}, "2 classes at least, got 1"),
        ({"outputs": True}, "2 classes at least, got True"),
        ({"outputs": 4}, r"\(H, K\) = \(7, 4\), got \(5, 7, 3\)"),
        ({}, r"H=7, got \(5, 7, 3\); .*outputs=K"),
        ({"outputs": 3, "confidence": "rare"}, "'abs', 'square', 'smooth'\\].*'rare'"),
        ({"outputs": 3, "confidence": torch.sigmoid}, r"\(5, 7\), its result is \(5, 7, 3\)"),
    ],
)
def test_errors_of_classes_carry_the_values(options, words):
    z = class_logits(CUBE, 3, 4)
    for function in (selection, deselection, mixture):
        with pytest.raises(LayoutError, match=words):
            function(z, CUBE, **options)


# --- In a network ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize(("kind", "outputs"), [
    ("binary", None), ("multiclass", 3), ("regression", None), ("regression", 1),
    ("regression", 4),
])  # fmt: skip
def test_a_network_learns_as_its_predictions_do(kind, outputs, backend):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [6, 5], "tanh", outputs=outputs, backend=backend)
    x, mask, times = torch.randn(40, 4), torch.rand(40) < 0.8, drawn_weights(3, (40,))
    _, y, *_ = sample(
        7, outputs, kind + "s" * (kind == "regression" and outputs is not None), 5, 40
    )
    logits = net(x)
    assert logits.shape == ((40, 7) if outputs is None else (40, 7, outputs))
    out = ~mask | (times == 0)
    poison = x.masked_fill(out[:, None], torch.nan)
    found = []
    for loss in (
        expert_loss(logits, y, kind, times, mask, outputs=outputs),
        net.expert_loss(x, y, kind, times, mask),
        net.expert_loss(poison, y, kind, times, mask),
    ):
        net.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters())])
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(b, c)
    if outputs is None or kind == "regression":
        return
    for a, b in zip(net.predict(x), mixture(logits, CUBE, outputs=outputs), strict=True):
        torch.testing.assert_close(a, b.detach())
    loss = net.gem_loss(poison, y, mask=mask, sample_weight=times)
    expected = gem_loss(logits, y, CUBE, mask=mask, sample_weight=times, outputs=outputs)
    torch.testing.assert_close(loss, expected)


@given(families(max_experts=6), classes, seeds)
def test_the_experts_of_classes_are_blind_and_move_their_own_parameters(family, outputs, seed):
    torch.manual_seed(seed)
    net = mk.InterpretableMLP(family, [4], outputs=outputs)
    x, y = torch.randn(5, family.in_features), torch.arange(5) % outputs
    group = seed % family.num_groups
    start = sum([*family.groups.values()][:group])
    spoilt = x.clone()
    spoilt[:, start : start + [*family.groups.values()][group]] = torch.nan
    sees = family.membership[:, group]
    before, after = net(x), net(spoilt)
    assert torch.equal(before[:, ~sees], after[:, ~sees])
    assert after[:, sees].isnan().all()
    grads = []
    for inputs in (x, spoilt):
        net.zero_grad()
        net.expert_loss(inputs, y, "multiclass").backward()
        grads.append(net.layers[-1].bias.grad.view(family.num_experts, outputs).clone())
    assert torch.equal(grads[0][~sees], grads[1][~sees])
    assert grads[1][sees].isnan().all()


@pytest.mark.parametrize("outputs", [0, -1, 2.0, "3"])
def test_outputs_are_a_number(outputs):
    with pytest.raises(LayoutError, match="outputs must be None, or a number of at least 1"):
        mk.InterpretableMLP(CUBE, [4], outputs=outputs)
