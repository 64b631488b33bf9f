"""The loss of experts with K classes, or of regressions, in one pass on the CPU."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_mlp import reference
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from maskmoe_kernels.testing.strategies import families

if not native.isas():
    pytest.skip("the extension has no kernels here", allow_module_level=True)

CUBE = mk.SubsetFamily.powerset({"a": 3, "b": 14, "c": 5})
KINDS = (("multiclass", 2), ("multiclass", 5), ("regression", None), ("regression", 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_isa = pytest.mark.parametrize("isa", native.isas())
every_kind = pytest.mark.parametrize(("kind", "outputs"), KINDS)


@pytest.fixture(autouse=True)
def the_best_isa_again():
    yield
    native.set_isa("")


def batch(family, kind, outputs, rows, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, family.in_features, generator=random).to(dtype)
    y = torch.randn(rows, *([] if outputs is None else [outputs]), generator=random)
    if kind == "multiclass":
        y = torch.randint(outputs, (rows,), generator=random)
    mask = torch.rand(rows, generator=random) < 0.8
    times = torch.rand(rows, generator=random) * torch.randint(3, (rows,), generator=random)
    return x, y, mask, times


def step(net, inputs, y, kind, **options):
    """Loss and gradients, in one pass."""
    x = inputs.x if isinstance(inputs, Inputs) else inputs
    tables = inputs.tables if isinstance(inputs, Inputs) else []
    leaves = [x, *tables, *net.parameters()]
    loss = net.expert_loss(inputs, y, kind, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def true_step(net, x, y, kind, outputs, **options):
    """The same by the definition, float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *net.parameters())]
    weights, biases = leaves[1::2], leaves[2::2]
    activation = net.layers[0].activation if len(net.layers) > 1 else "none"
    loss = reference.masked_mlp_expert_loss(
        leaves[0], weights, biases, net.layers.layouts, activation, y, kind, outputs, **options
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def layered_step(net, x, y, kind, outputs, **options):
    """The same layer by layer."""
    leaves = [x, *net.parameters()]
    z = net.layers.layered(x)
    z = z if outputs is None else z.unflatten(-1, (-1, outputs))
    loss = mk.expert_loss(z, y, kind, outputs=outputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def hold(ours, plain, true, dtype):
    """|ours - true| <= 2 |PyTorch - true| + roundings."""
    floor = 64 * torch.finfo(dtype).eps
    for a, b, t in zip(ours, plain, true, strict=True):
        if t.numel():
            error, theirs = (a.double() - t).abs().max(), (b.double() - t).abs().max()
            assert error <= 2 * theirs + floor * t.abs().max() + 1e-30, (error, theirs)


@every_isa
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_definition(kind, outputs, isa, dtype):
    native.set_isa(isa)
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [16, 5], "tanh", outputs=outputs, dtype=dtype)
    for rows, weighs in ((1, False), (70, True), (701, False)):
        x, y, mask, times = batch(CUBE, kind, outputs, rows, dtype=dtype)
        mask[0] = True
        x.requires_grad_()
        options = {"mask": mask, "sample_weight": times + 0.1 if weighs else None}
        ours = step(net, x, y, kind, **options)
        plain = layered_step(net, x, y, kind, outputs, **options)
        hold(ours, plain, true_step(net, x, y, kind, outputs, **options), dtype)
        assert not ours[1][~mask].any()
        again = step(net, x, y, kind, **options)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@given(
    families(max_experts=7), st.sampled_from(KINDS), st.lists(st.integers(1, 9), max_size=2),
    st.sampled_from(["relu", "silu"]), st.integers(0, 2**31 - 1), st.booleans(),
)  # fmt: skip
def test_any_family(family, of, hidden, activation, seed, masked):
    kind, outputs = of
    torch.manual_seed(seed)
    net = mk.InterpretableMLP(family, hidden, activation, outputs=outputs)
    x, y, mask, times = batch(family, kind, outputs, 12, seed)
    x.requires_grad_()
    options = {"mask": mask, "sample_weight": times} if masked else {}
    ours = step(net, x, y, kind, **options)
    plain = layered_step(net, x, y, kind, outputs, **options)
    hold(ours, plain, true_step(net, x, y, kind, outputs, **options), torch.float32)


@every_kind
def test_runs_as_one_op(kind, outputs, monkeypatch):
    net = mk.InterpretableMLP(CUBE, [4], outputs=outputs)
    x, y, *_ = batch(CUBE, kind, outputs, 9)
    monkeypatch.setattr(type(net.layers), "layered", None)
    with torch.profiler.profile() as profile:
        net.expert_loss(x, y, kind).backward()
    names = {event.name for event in profile.events()}
    assert "maskmoe::masked_mlp_expert_loss" in names
    assert "maskmoe::masked_mlp" not in names


@every_isa
@every_kind
def test_unseen_values_reach_nobody(kind, outputs, isa):
    native.set_isa(isa)
    net = mk.InterpretableMLP(CUBE, [16], outputs=outputs)
    x, y, mask, times = batch(CUBE, kind, outputs, 60)
    options = {"mask": mask, "sample_weight": times}
    sees = CUBE.membership[:, 1]
    units = torch.arange(7).repeat_interleave(outputs or 1)
    clean = step(net, x.requires_grad_(), y, kind, **options)
    for fill in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.detach().clone()
        spoilt[mask & (times > 0), 3:17] = fill
        out = ~mask | (times == 0)
        spoilt[out] = fill
        odd = y.clone()
        odd[out] = 10**9 if kind == "multiclass" else torch.nan
        found = step(net, spoilt.requires_grad_(), odd, kind, **options)
        assert torch.equal(found[-1][~sees[units]], clean[-1][~sees[units]])
        if fill != fill:
            assert found[-1][sees[units]].isnan().all()
        assert not found[1][out].any()


@every_isa
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 300.0])
def test_classes_keep_their_digits(scale, isa):
    """Of sure experts that are right, and of wrong ones; in float64 there is nothing to cancel."""
    native.set_isa(isa)
    net = mk.InterpretableMLP(CUBE, [], outputs=5)
    x, y, *_ = batch(CUBE, "multiclass", 5, 90)
    x.requires_grad_()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    for target in (y, net(x)[:, -1].argmax(-1), net(x)[:, 0].argmin(-1)):
        ours, true = (
            step(net, x, target, "multiclass"),
            true_step(net, x, target, "multiclass", 5),
        )
        for a, t in zip(ours, true, strict=True):
            torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=2e-6 * float(t.abs().max()))


def test_an_expert_that_is_sure_and_right_has_a_small_loss():
    family = mk.SubsetFamily({"a": 3}, {"a": ["a"]})
    net = mk.InterpretableMLP(family, [], outputs=3)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.eye(3).flatten())
        net.layers[0].bias.zero_()
    for sure in (20.0, 60.0, 85.0):  # beyond, exp(-z) is no float32
        x = torch.tensor([[sure, 0.0, -1.0]], requires_grad=True)
        loss, of_x, *_ = step(net, x, torch.tensor([0]), "multiclass")
        rest = (1 + torch.tensor(-1.0).double().exp()) * torch.tensor(-sure).double().exp()
        assert loss.item() == pytest.approx(rest.item(), rel=1e-5, abs=0)
        assert of_x[0, 0].item() == pytest.approx(-rest.item(), rel=1e-5, abs=0)


def test_tables_and_parts():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(CUBE, [8], outputs=4)
    x, y, mask, times = batch(CUBE, "multiclass", 4, 50)
    table, ids = torch.randn(9, 3, requires_grad=True), torch.randint(9, (50,))
    rest = x[:, 3:].clone().requires_grad_()
    options = {"mask": mask, "sample_weight": times}
    ours = step(net, Inputs(rest, [table], [ids], (0, -19)), y, "multiclass", **options)
    whole = torch.cat([table[ids].detach(), rest.detach()], 1).requires_grad_()
    expected = step(net, whole, y, "multiclass", **options)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1][:, 3:])
    summed = torch.zeros(9, 3).index_add(0, ids, expected[1][:, :3])
    torch.testing.assert_close(ours[2], summed)
    for a, b in zip(ours[3:], expected[2:], strict=True):
        torch.testing.assert_close(a, b)


@every_kind
def test_only_what_is_needed(kind, outputs):
    net = mk.InterpretableMLP(CUBE, [4], outputs=outputs)
    x, y, *_ = batch(CUBE, kind, outputs, 30)
    for need_x, need_weights in itertools.product((False, True), repeat=2):
        net.requires_grad_(need_weights)
        given_x = x.clone().requires_grad_(need_x)
        loss = net.expert_loss(given_x, y, kind)
        assert loss.requires_grad == (need_x or need_weights)
        if loss.requires_grad:
            (2 * loss).backward()
        assert (given_x.grad is not None) == need_x
        assert all((p.grad is not None) == need_weights for p in net.parameters())
        net.zero_grad()


def test_nothing_at_all():
    net = mk.InterpretableMLP(CUBE, [4], outputs=3)
    for rows, mask in ((0, None), (5, torch.zeros(5).bool())):
        x, y = torch.randn(rows, 22), torch.zeros(rows).long()
        loss, *grads = step(net, x.requires_grad_(), y, "multiclass", mask=mask)
        assert loss == 0
        assert not any(grad.any() for grad in grads)


def test_the_op_believes_nobody():
    net = mk.InterpretableMLP(CUBE, [4], outputs=3)
    x, y, *_ = batch(CUBE, "multiclass", 3, 6)
    call = net.layers.fused(x)
    op, whole = torch.ops.maskmoe.masked_mlp_expert_loss, (*call[:8], call.activation)
    good = [y.float(), None, None, "multiclass", 21, 3, False, False, True]
    loss = op(*whole, *good)[0]
    torch.library.opcheck(op, (*whole, *good), test_utils=("test_schema", "test_faketensor"))
    as_number = y.float()
    wrong = {
        0: [y, as_number + 1.5, as_number / 2 + 0.25, as_number - 3, as_number[:5],
            as_number * torch.nan],
        1: [y.float(), torch.ones(5).bool()], 2: [-torch.ones(6), torch.ones(5)],
        3: ["binary", "softmax"], 4: [22, 7, -1], 5: [2, 0, -3, 2**40],
    }  # fmt: skip
    for k, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match="maskmoe"):
                op(*whole, *good[:k], value, *good[k + 1 :])
    assert torch.equal(op(*whole, *good)[0], loss)


def test_compiles_whole():
    torch._dynamo.reset()
    net = mk.InterpretableMLP(CUBE, [6], outputs=3)
    loss_of = torch.compile(net.expert_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x, y, mask, times = batch(CUBE, "multiclass", 3, rows)
        x.requires_grad_()
        arguments = (x, y, "multiclass", times, mask)
        losses = loss_of(*arguments), net.expert_loss(*arguments)
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, [x, *net.parameters()]) for loss in losses]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
