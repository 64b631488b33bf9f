"""What an op is called with is not believed: plans, sizes, places. An id is not its content."""

import gc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import layout_of, serialize, serialized_layout
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.dispatch import choose
from maskmoe_kernels.testing import dense_oracle

CPU = torch.device("cpu")
OPS = torch.ops.maskmoe
REFUSED = (mk.LayoutError, RuntimeError)
LINEAR = ["masked_linear", "torch_linear"]


def made(*rows):
    """A layout nobody else has, with 3 row blocks and 2 column blocks."""
    return mk.BlockLayout(rows, [4, 5], torch.tensor([[1, 0], [1, 1], [0, 1]]).bool())


def drawn(layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(6, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    return [torch.randn(shape, generator=g) for shape in shapes]


def call(name, layout, plan, number=None):
    op = getattr(OPS, name)
    number = layout.id if number is None else number
    return op(*drawn(layout), plan, number, layout.out_features, "none", False)[0]


def expected(layout):
    return dense_oracle(*(t.double() for t in drawn(layout)), layout).float()


# --- Serialized layouts ------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_serialized_layout_that_was_tampered_with_is_refused_and_changes_nothing(name, known):
    layout = made(3, 7, 2)
    before = call(name, layout, serialized_layout(layout, CPU)) if known else expected(layout)
    plan = serialize(layout)
    for at in range(plan.numel()):
        for value in (int(plan[at]) + 1, 0, -1, 2**31, 2**62, -(2**63)):
            tampered = plan.clone()
            tampered[at] = value
            if torch.equal(tampered, plan):
                continue
            with pytest.raises(REFUSED):
                call(name, layout, tampered)
    for length in (0, 3, plan.numel() - 1):
        with pytest.raises(REFUSED):
            call(name, layout, plan[:length].clone())
    for other in (plan.double(), plan[None], plan.int(), plan.repeat(2)):
        with pytest.raises(REFUSED):
            call(name, layout, other)
    after = call(name, layout, serialized_layout(layout, CPU))
    torch.testing.assert_close(after, before)
    assert torch.equal(after, call(name, layout, serialize(layout)))


@pytest.mark.parametrize("name", LINEAR)
def test_a_serialized_layout_under_the_id_of_another_is_refused(name):
    layout, other = made(3, 7, 2), made(2, 7, 3)
    (
        call(name, layout, serialized_layout(layout, CPU)),
        call(name, other, serialized_layout(other, CPU)),
    )
    with pytest.raises(REFUSED, match="describes layout"):
        call(name, layout, serialized_layout(layout, CPU), other.id)
    with pytest.raises(REFUSED, match="describes layout"):
        call(name, layout, serialized_layout(other, CPU))
    torch.testing.assert_close(call(name, layout, serialized_layout(layout, CPU)), expected(layout))
    torch.testing.assert_close(call(name, other, serialized_layout(other, CPU)), expected(other))


@pytest.mark.parametrize("name", LINEAR)
def test_two_contents_of_one_id_are_two_layouts(name, monkeypatch):
    """Nobody has found such a pair; who does gains nothing by it."""
    monkeypatch.setattr(mk.BlockLayout, "_digest", lambda self: 12345)
    layouts = [made(3, 7, 2), made(2, 7, 3), made(7, 2, 3)]
    assert len({layout.id for layout in layouts}) == 1
    assert layouts[0] != layouts[1]
    assert layouts[0] == made(3, 7, 2)
    for _ in range(2):
        for layout in layouts:
            torch.testing.assert_close(
                call(name, layout, serialized_layout(layout, CPU)), expected(layout)
            )
            y = mk.masked_linear(*drawn(layout), layout)
            torch.testing.assert_close(y, expected(layout))
            assert layout_of(layout.id, serialized_layout(layout, CPU)) is layout
            assert layout_of(layout.id, serialize(layout)) == layout
    if native.UNSUPPORTED_REASON is None:
        native._extension.forget(12345)


@pytest.mark.parametrize("name", LINEAR)
def test_what_was_read_is_not_read_again(name):
    """A plan that is changed after its first call is what it was then."""
    layout, plan = made(5, 1, 4), serialize(made(5, 1, 4))
    before = call(name, layout, plan)
    plan.fill_(2**40)
    assert torch.equal(call(name, layout, plan), before)
    assert torch.equal(call(name, layout, serialize(layout)), before)


@pytest.mark.parametrize("name", LINEAR)
def test_a_claim_of_many_features_takes_no_memory(name):
    none = torch.zeros(1, 1, dtype=torch.bool)
    most = mk.BlockLayout([2**31 - 1], [4], none)
    x, weight = torch.zeros(2, 4), torch.zeros(0)
    with pytest.raises((*REFUSED, MemoryError)):
        getattr(OPS, name)(x, weight, None, serialize(most), most.id, 3, "none", False)
    with pytest.raises(mk.LayoutError, match="at most 2147483647 units and features"):
        mk.BlockLayout([2**31 - 1, 1], [4], none.expand(2, 1))
    plan = serialize(most)
    plan[5] = 2**40
    with pytest.raises(REFUSED, match="at most"):
        getattr(OPS, name)(x, weight, None, plan, 1, 3, "none", False)


def test_a_program_outlives_the_layout_that_it_was_made_with():
    layout = made(6, 3, 3)
    inputs, plan, number, truth = (
        drawn(layout),
        serialized_layout(layout, CPU),
        layout.id,
        expected(layout),
    )
    out = layout.out_features
    for name in LINEAR:
        getattr(OPS, name)(*inputs, plan, number, out, "none", False)
    del layout
    gc.collect()
    for name in LINEAR:
        y = getattr(OPS, name)(*inputs, plan, number, out, "none", False)[0]
        torch.testing.assert_close(y, truth)
    again = made(6, 3, 3)
    torch.testing.assert_close(mk.masked_linear(*inputs, again), truth)


def test_flops_are_counted_of_layouts_not_of_shapes():
    layout = made(4, 4, 4)
    x, weight, bias = (t.requires_grad_() for t in drawn(layout))
    with FlopCounterMode(display=False) as counter:
        mk.masked_linear(x, weight, bias, layout).sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 3 * layout.num_weights


# --- Sizes, types and places ---------------------------------------------------------------


def spoilt(t):
    """Tensors that are not what an op expects in the place of ``t``."""
    yield from (t.double(), t.int(), t[..., :-1], t.to("meta"), t.to_sparse(), t.reshape(-1)[:0])
    yield torch.cat([t, t], -1)
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    yield freed


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_each_tensor_of_a_layer_is_checked(activation):
    layout = made(3, 9, 17)
    x, weight, bias = drawn(layout)
    fixed = serialized_layout(layout, CPU), layout.id
    forward = [x, weight, bias, *fixed, layout.out_features, activation, True]
    y, z = OPS.masked_linear(*forward)
    saved = z if activation == "gelu" else y
    backward = [torch.randn_like(y), x, weight, saved, *fixed, activation, True, True, True]
    for op, honest in ((OPS.masked_linear, forward), (OPS.masked_linear_backward, backward)):
        truth = op(*honest)
        for k, value in enumerate(honest[:4]):
            ignored = activation == "none" and op is OPS.masked_linear_backward and k == 3
            if value is fixed[0] or ignored:
                continue
            for other in spoilt(value):
                if other.is_meta:
                    continue  # all of the call is, then
                with pytest.raises(REFUSED):
                    op(*honest[:k], other, *honest[k + 1 :])
        for a, b in zip(truth, op(*honest), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(REFUSED):
        OPS.masked_linear(x, weight, bias, *fixed, layout.out_features + 1, activation, True)
    with pytest.raises(REFUSED, match="unknown activation"):
        OPS.masked_linear(x, weight, bias, *fixed, layout.out_features, "softplus", True)


@pytest.mark.parametrize("name", LINEAR)
def test_a_bias_fits_the_units_and_not_the_features(name):
    layout = made(3, 7, 2)
    x, weight, _ = drawn(layout)
    op, plan = getattr(OPS, name), serialized_layout(layout, CPU)
    assert layout.in_features != layout.out_features
    for features in (1, layout.in_features, layout.out_features + 1):
        with pytest.raises(REFUSED, match="bias"):
            op(x, weight, torch.ones(features), plan, layout.id, layout.out_features, "none", False)
    with pytest.raises(
        mk.LayoutError, match=r"bias must be \(out_features,\) = \(12,\), got \(9,\)"
    ):
        mk.masked_linear(x, weight, torch.ones(layout.in_features), layout)


@pytest.fixture
def network():
    """A network with a table: the arguments of its ops up to the activation."""
    family = mk.SubsetFamily.powerset({"a": 3, "b": 5, "c": 2})
    torch.manual_seed(0)
    net = mk.InterpretableMLP(family, [5, 6])
    plans = [serialized_layout(layer.layout, CPU) for layer in net.layers]
    numbers = [layer.layout.id for layer in net.layers]
    parameters = [[getattr(layer, name).detach() for layer in net.layers] for name in
                  ("weight", "bias")]  # fmt: skip
    inputs = [torch.randn(4, 7), [torch.randn(6, 3)], [torch.randint(6, (4,))], [0, -7]]
    return [*inputs, *parameters, plans, numbers], net


PARTS = [
    [], [0], [-7], [0, 0, -7], [0, -7, 1], [0, -8], [0, -3], [-7, 0, -1], [0, -(2**63)],
    [0, -7, -(2**63)], [2**62, -7], [0, -(2**62), -(2**62)], [0, -7, 2**63 - 1],
]  # fmt: skip


@pytest.mark.parametrize("name", ["masked_mlp", "torch_mlp"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_parts_name_what_is_there(network, name, parts):
    arguments, _ = network
    with pytest.raises((*REFUSED, IndexError)):
        getattr(OPS, name)(*arguments[:3], parts, *arguments[4:], 7, "relu", False)


@pytest.mark.parametrize("name", ["masked_mlp", "torch_mlp"])
def test_a_network_reads_columns_or_tables_or_both(network, name):
    (x, tables, ids, _, *rest), net = network
    op, given = getattr(OPS, name), torch.cat([tables[0][ids[0]], x], -1)
    truth = net.layers.layered(given)
    both = x, tables, ids, [0, -7]
    halves = [tables[0], torch.randn(6, 7)], [ids[0], torch.arange(4)]
    halves[0][1][:4] = x
    for inputs in (both, (given, [], [], [-10]), (None, *halves, [0, 1])):
        torch.testing.assert_close(op(*inputs, *rest, 7, "relu", False)[0], truth)
    for inputs in (
        (None, [], [], []),
        (None, [], [], [-10]),
        (None, tables, [], [0, -7]),
        (x, tables, [], [0, -7]),
        (x, [], ids, [0, -7]),
        (x.sum(), tables, ids, [0, -7]),
        (x.sum(), [], [], [-10]),
    ):
        with pytest.raises(REFUSED):
            op(*inputs, *rest, 7, "relu", False)


@pytest.mark.parametrize("name", [*LINEAR, "masked_mlp", "torch_mlp"])
def test_the_number_of_units_is_the_layouts(network, name):
    """A traced program has it in its shapes: were it wrong, memory behind the result was read."""
    layout, (arguments, _) = made(3, 7, 2), network
    linear = *drawn(layout), serialized_layout(layout, CPU), layout.id
    right, given = (layout.out_features, linear) if name in LINEAR else (7, arguments)
    op = getattr(OPS, name)
    assert op(*given, right, "relu", False)[0].shape[-1] == right
    for wrong in (right - 1, right + 1, 0, -right, 2**40):
        with pytest.raises(REFUSED):
            op(*given, wrong, "relu", False)


@pytest.mark.parametrize("name", ["masked_mlp", "torch_mlp"])
def test_ids_are_rows_of_their_table(network, name):
    arguments, _ = network
    for bad in (-1, 6, 2**62, -(2**63)):
        ids = arguments[2][0].clone()
        ids[2] = bad
        with pytest.raises((*REFUSED, IndexError)):
            getattr(OPS, name)(*arguments[:2], [ids], *arguments[3:], 7, "relu", False)
    for ids in (arguments[2][0].int(), arguments[2][0][:3], arguments[2][0][None]):
        with pytest.raises((*REFUSED, IndexError)):
            getattr(OPS, name)(*arguments[:2], [ids], *arguments[3:], 7, "relu", False)


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
def test_what_a_network_kept_is_checked(network):
    arguments, _ = network
    logits, saved = OPS.masked_mlp(*arguments, 7, "relu", True)
    grad = torch.randn_like(logits)

    def backward(saved, grad=grad):
        inputs, plans = arguments[:6], arguments[6:]
        return OPS.masked_mlp_backward(grad, *inputs, saved, *plans, "relu", True, True, True)

    truth = backward(saved)
    assert saved.numel() > 0
    bad = [
        saved.double(), saved.bfloat16(), saved.int(), saved[:, :-1].contiguous(), saved.T,
        saved[:1].contiguous(), saved[:1].expand(saved.shape), saved.reshape(-1),
        torch.zeros(1 << 20, 1), torch.zeros(1, 1),
    ]  # fmt: skip
    for other in bad:
        with pytest.raises(REFUSED):
            backward(other)
    for other in (grad.double(), grad[:3], grad[:, :6], grad[0, 0], grad[None].to_sparse()):
        with pytest.raises(REFUSED):
            backward(saved, other)
    for a, b in zip(truth, backward(saved), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
def test_networks_are_chains_of_their_own_layouts(network):
    arguments, net = network
    *inputs, plans, numbers = arguments
    truth = OPS.masked_mlp(*arguments, 7, "relu", False)[0]
    for bad in (
        [plans[::-1], numbers[::-1]], [plans[::-1], numbers], [plans, numbers[:-1]],
        [plans[:-1], numbers], [plans * 2, numbers * 2], [[], []],
        [plans, [number + 1 for number in numbers]],
    ):  # fmt: skip
        with pytest.raises(REFUSED):
            OPS.masked_mlp(*inputs, *bad, 7, "relu", False)
    assert torch.equal(OPS.masked_mlp(*arguments, 7, "relu", False)[0], truth)
    strict, y = net.family.strict, torch.ones(4)
    whole = [*arguments, "relu"]
    good = [y, None, None, strict, "abs", 1.0, "selection", "none", True, True, True]
    loss = OPS.masked_mlp_gem(*whole, *good)[0]
    wrong = {
        0: [y.double(), y[:3], y.to_sparse()], 1: [y, torch.ones(3).bool()],
        2: [y.double(), y[:3], -y, y.new_full((4,), torch.nan), y.new_full((4,), torch.inf)],
        3: [strict[:6], strict[:, :6], strict.byte(), strict[:2, :2], strict[0]],
        4: ["unknown", ""], 5: [float("nan"), float("inf"), 0.0, -1.0], 6: ["even"], 7: ["rows"],
    }  # fmt: skip
    for k, values in wrong.items():
        for value in values:
            with pytest.raises(REFUSED):
                OPS.masked_mlp_gem(*whole, *good[:k], value, *good[k + 1 :])
    assert torch.equal(OPS.masked_mlp_gem(*whole, *good)[0], loss)
    bytes_of = torch.full((7, 7), 255, dtype=torch.uint8).view(torch.bool)
    for odd in (bytes_of, strict):  # any byte but 0 is true
        mask = torch.full((4,), 7, dtype=torch.uint8).view(torch.bool)
        found = [OPS.masked_mlp_gem(*whole, y, m, None, odd, *good[4:])[0] for m in (mask, None)]
        assert torch.equal(*found)


# --- Too fine ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:masked_linear runs in plain PyTorch")
def test_what_kernels_do_not_take_falls_back_everywhere():
    family = mk.SubsetFamily.powerset(dict.fromkeys("abcdefghijk", 2))
    torch.manual_seed(0)
    net = mk.InterpretableMLP(family, [4])
    layout = net.layers[1].layout
    assert layout.too_fine
    assert not net.layers[0].layout.too_fine
    x, y = torch.randn(3, 22), torch.tensor([0.0, 1.0, 1.0])
    assert "too many blocks of too few weights" in net.layers.unsupported_reason()
    assert "layer by layer: its layout has too many blocks" in repr(net)
    logits = net(x)
    torch.testing.assert_close(net.gem_loss(x, y), mk.gem_loss(logits, y, family))
    torch.testing.assert_close(net.predict(x).probability, mk.mixture(logits, family).probability)
    h = torch.randn(2, layout.in_features)
    weight = net.layers[1].weight
    assert choose("masked_linear", None, layout, (h,)) == "torch"
    for name in ["native"] if native.UNSUPPORTED_REASON is None else []:
        with pytest.raises(mk.BackendError, match=r"'native' cannot run: .* too many blocks"):
            mk.masked_linear(h, weight, None, layout, backend=name)
    # A program that names the op all the same is told what to choose instead.
    call = (
        h,
        weight,
        None,
        serialized_layout(layout, CPU),
        layout.id,
        layout.out_features,
        "none",
        False,
    )
    y = OPS.torch_linear(*call)[0]
    torch.testing.assert_close(y, mk.masked_linear(h, weight, None, layout, backend="torch"))
    if native.UNSUPPORTED_REASON is None:
        for _ in range(2):  # a refusal is not kept
            with pytest.raises(
                RuntimeError,
                match=r"masked_linear: layout 0 has too many blocks of too few weights: \d+ blocks "
                r".* choose another backend: backend='torch'",
            ):
                OPS.masked_linear(*call)
