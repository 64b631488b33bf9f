"""``MaskedLinear`` beside ``nn.Linear``: same manners, fewer weights."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import maskmoe_kernels as mk
from maskmoe_kernels import LayoutError, MaskedLinear
from maskmoe_kernels.testing.strategies import masks

seeds = st.integers(0, 2**31 - 1)

# Experts {a}, {b}, {a, b} on widths 3 and 4: blocks side by side.
FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4})
BLOCKS = FAMILY.input_layout([2, 5, 3]).mask()


def interleaved(out_features=12, in_features=10, degrees=4):
    """MADE's mask: unit o sees feature f of a smaller degree; equal units lie apart."""
    return torch.arange(out_features)[:, None] % degrees > torch.arange(in_features) % degrees


def random_mask(out_features=9, in_features=11):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(out_features, in_features, generator=generator) < 0.4
    mask[2] = False  # a unit that sees nothing
    mask[:, 5] = False  # a feature that nobody sees
    return mask


MASKS = {
    "blocks": BLOCKS,
    "interleaved": interleaved(),
    "random": random_mask(),
    "full": torch.ones(5, 6, dtype=torch.bool),
    "nothing": torch.zeros(3, 4, dtype=torch.bool),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def twins(mask, bias=True, dtype=torch.float64, **options):
    """A masked layer and the dense ``nn.Linear`` it was made from."""
    linear = nn.Linear(mask.shape[1], mask.shape[0], bias, dtype=dtype)
    return MaskedLinear.from_linear(linear, mask, **options), linear


def run(function, inputs, grad_y):
    """Output and the gradient of every input, for one cotangent."""
    y = function()
    return y.detach(), torch.autograd.grad(y, inputs, grad_y)


# --- Initial scale ---------------------------------------------------------------------------


def test_initial_scale_follows_each_units_own_fan_in():
    fan_ins = torch.tensor([4, 60, 240]).repeat(400)  # interleaved, so unit order matters
    mask = torch.arange(240) < fan_ins[:, None]
    torch.manual_seed(0)
    layer = MaskedLinear(240, 1200, mask)
    weight, bias = layer.dense_weight().detach(), layer.bias.detach()
    for fan_in in (4, 60, 240):
        bound = fan_in**-0.5
        seen = weight[fan_ins == fan_in, :fan_in]
        for values, sigmas in ((seen, 0.05), (bias[fan_ins == fan_in], 0.12)):
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.98 * bound
            # Uniform on +-bound has mean 0 and deviation bound / sqrt(3).
            assert values.std() == pytest.approx(bound / 3**0.5, rel=sigmas)
            assert abs(values.mean()) < sigmas * 2 * bound
        assert seen.unique().numel() > 0.99 * seen.numel()  # no weight is a copy of another


def test_unit_without_inputs_starts_at_zero():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    layer = MaskedLinear(3, 2, mask)
    assert layer.bias[1] == 0
    assert layer.bias[0] != 0
    assert layer.weight.shape == (2,)
    torch.testing.assert_close(layer(torch.randn(4, 3))[:, 1], torch.zeros(4), rtol=0, atol=0)


def test_reset_parameters_draws_again_from_the_same_seed():
    torch.manual_seed(5)
    layer = MaskedLinear(10, 12, interleaved())
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not torch.equal(layer.weight, first["weight"])
    torch.manual_seed(5)
    layer.reset_parameters()
    assert torch.equal(layer.weight, first["weight"])
    assert torch.equal(layer.bias, first["bias"])


# --- Round trips with nn.Linear --------------------------------------------------------------


@given(masks(), seeds, st.booleans())
def test_equals_linear_with_a_masked_weight(mask, seed, bias):
    torch.manual_seed(seed)
    layer, linear = twins(mask, bias)
    x = torch.randn(3, mask.shape[1], dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(3, mask.shape[0], dtype=torch.float64)
    ours, theirs = [x, *layer.parameters()], [x, *linear.parameters()]
    y, grads = run(lambda: layer(x), ours, grad_y)
    expected, expected_grads = run(
        lambda: F.linear(x, linear.weight * mask, linear.bias), theirs, grad_y
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])
    torch.testing.assert_close(grads[1], layer.layout.pack(expected_grads[1]))
    torch.testing.assert_close(grads[2:], expected_grads[2:])


@given(masks(), seeds, st.booleans())
def test_round_trip_through_linear_is_bitwise(mask, seed, bias):
    torch.manual_seed(seed)
    layer, linear = twins(mask, bias)
    dense = layer.to_linear()
    assert torch.equal(dense.weight, torch.where(mask, linear.weight, 0))
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert (dense.bias is None) == (not bias)
    back = MaskedLinear.from_linear(dense, mask)
    assert back.layout == layer.layout
    for name, value in layer.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    assert {p.dtype for p in back.parameters()} == {torch.float64}


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "tanh", "silu"])
def test_activation_is_fused_after_the_bias(activation):
    layer, linear = twins(BLOCKS, activation=activation)
    x = torch.randn(4, 7, dtype=torch.float64)
    act = getattr(F, activation) if activation != "tanh" else torch.tanh
    torch.testing.assert_close(layer(x), act(F.linear(x, linear.weight * BLOCKS, linear.bias)))
    torch.testing.assert_close(  # to_linear leaves the activation to the caller
        layer.to_linear()(x), F.linear(x, linear.weight * BLOCKS, linear.bias)
    )


def test_copies_share_no_storage():
    layer, linear = twins(BLOCKS)
    dense = layer.to_linear()
    before = layer(torch.ones(1, 7, dtype=torch.float64)).detach()
    with torch.no_grad():
        for parameter in (*linear.parameters(), *dense.parameters()):
            parameter.add_(1)
    assert torch.equal(layer(torch.ones(1, 7, dtype=torch.float64)), before)


def test_grad_mask_stops_the_gradient_to_the_input_only():
    layout = FAMILY.hidden_layout([3, 4, 2], [2, 5, 3])
    layer, linear = twins(layout.mask(), grad_mask=layout.grad_mask())
    x = torch.randn(6, layout.in_features, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(6, layout.out_features, dtype=torch.float64)
    _, grads = run(lambda: layer(x), [x, layer.weight, layer.bias], grad_y)
    torch.testing.assert_close(grads[0], grad_y @ (linear.weight * layout.grad_mask()))
    torch.testing.assert_close(grads[1], layout.pack(grad_y.T @ x))
    torch.testing.assert_close(grads[2], grad_y.sum(0))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (5,), (2, 3, 4)])
@each_mask
def test_any_leading_shape(mask, shape):
    layer, linear = twins(mask)
    x = torch.randn(*shape, mask.shape[1], dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(*shape, mask.shape[0], dtype=torch.float64)
    y, (grad_x, _, grad_bias) = run(lambda: layer(x), [x, *layer.parameters()], grad_y)
    torch.testing.assert_close(y, F.linear(x, linear.weight * mask, linear.bias))
    torch.testing.assert_close(grad_x, grad_y @ (linear.weight * mask))
    torch.testing.assert_close(grad_bias, grad_y.reshape(-1, mask.shape[0]).sum(0))


# --- Checkpoints -----------------------------------------------------------------------------


class Nested(nn.Module):
    """Two linear layers below prefixes, built by ``make(in_features, out_features, mask)``."""

    def __init__(self, make):
        super().__init__()
        self.first = make(7, 10, BLOCKS)
        self.deep = nn.Sequential(OrderedDict(inner=nn.Sequential(nn.ReLU(), make(10, 12, MADE))))
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(self.deep(self.first(x)))


MADE = interleaved()


def dense_layer(in_features, out_features, mask):
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear


def zuko_layer(in_features, out_features, mask):
    zuko_nn = pytest.importorskip("zuko.nn", reason="zuko is not installed")
    return zuko_nn.MaskedLinear(mask)


@pytest.mark.parametrize("make", [dense_layer, zuko_layer])
@pytest.mark.parametrize("assign", [False, True])
def test_dense_checkpoint_loads_below_prefixes(make, assign):
    source, target = Nested(make), Nested(MaskedLinear)
    target.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(5, 7)
    torch.testing.assert_close(target(x), source(x))
    assert target.first.weight.shape == (int(BLOCKS.sum()),)
    assert isinstance(target.first.weight, nn.Parameter)
    assert target.first.weight.requires_grad


@pytest.mark.parametrize("make", [dense_layer, zuko_layer])
def test_goes_back_into_dense_modules(make):
    source, target = Nested(MaskedLinear), Nested(make)
    dense = Nested(MaskedLinear)
    dense.load_state_dict(source.state_dict())
    dense.first = dense.first.to_linear()
    dense.deep.inner[1] = dense.deep.inner[1].to_linear()
    missing, unexpected = target.load_state_dict(dense.state_dict(), strict=False)
    assert all(key.endswith(".mask") for key in missing)  # zuko's buffers: they are already right
    assert unexpected == []
    x = torch.randn(5, 7)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("make", [dense_layer, zuko_layer])
def test_loading_leaves_the_callers_state_dict_alone(make):
    for name, module in (("", make(7, 10, BLOCKS)), ("nested", Nested(make))):
        state = module.state_dict()
        before = {key: (id(value), value.clone()) for key, value in state.items()}
        target = Nested(MaskedLinear) if name else MaskedLinear(7, 10, BLOCKS)
        target.load_state_dict(state)
        assert list(state) == list(before)
        for key, (identity, value) in before.items():
            assert id(state[key]) == identity
            assert torch.equal(state[key], value)


def test_packed_checkpoint_is_bitwise():
    source, target = Nested(MaskedLinear), Nested(MaskedLinear)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 7)
    assert torch.equal(source(x), target(x))


def test_wrong_dense_shape_names_the_key_and_both_shapes():
    state = Nested(dense_layer).state_dict()
    key = "deep.inner.1.weight"
    state[key] = state[key].T.contiguous()
    target = Nested(MaskedLinear)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}.*\(12, 10\).*\(10, 12\)"):
        target.load_state_dict(state)
    assert torch.equal(target.deep.inner[1].weight, before[key])


def test_wrong_packed_length_and_bias_name_the_key():
    layer = MaskedLinear(7, 10, BLOCKS)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({**state, "weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        layer.load_state_dict({**state, "bias": torch.zeros(3)})


def test_missing_and_unexpected_keys_are_named():
    state = Nested(dense_layer).state_dict()
    del state["first.weight"]
    state["deep.inner.1.scale"] = torch.ones(1)
    with pytest.raises(RuntimeError) as error:
        Nested(MaskedLinear).load_state_dict(state)
    assert "first.weight" in str(error.value)
    assert "deep.inner.1.scale" in str(error.value)
    missing, unexpected = Nested(MaskedLinear).load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["first.weight"], ["deep.inner.1.scale"])


def test_other_mask_in_the_checkpoint_is_refused():
    layer = MaskedLinear(7, 10, BLOCKS)
    other = BLOCKS.clone()
    other[0, 0] ^= True
    state = {"weight": torch.randn(10, 7), "bias": torch.randn(10)}
    with pytest.raises(RuntimeError, match=r"mask mismatch for mask.*in 1 of 70 entries"):
        layer.load_state_dict({**state, "mask": other})
    with pytest.raises(RuntimeError, match=r"mask mismatch for mask.*\(2, 2\).*\(10, 7\)"):
        layer.load_state_dict({**state, "mask": torch.ones(2, 2)})


def test_packed_weight_of_another_layout_is_refused():
    other = MaskedLinear(7, 10, BLOCKS.flip(0))  # as many weights, in another order
    layer = Nested(MaskedLinear)
    state = layer.state_dict()
    for key, value in other.state_dict().items():
        assert state[f"first.{key}"].shape == value.shape
        state[f"first.{key}"] = value
    with pytest.raises(RuntimeError, match=r"packing mismatch for first\.weight"):
        layer.load_state_dict(state)
    # A layout that differs only in what it routes packs alike.
    stopped = MaskedLinear(7, 10, BLOCKS, grad_mask=torch.zeros_like(BLOCKS))
    stopped.load_state_dict(layer.first.state_dict())
    assert torch.equal(stopped.dense_weight(), layer.first.dense_weight())


def test_dense_checkpoint_forgets_invisible_weights():
    linear = nn.Linear(7, 10)
    with torch.no_grad():
        linear.weight.masked_fill_(~BLOCKS, torch.nan)
    layer = MaskedLinear(7, 10, BLOCKS)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.dense_weight(), torch.where(BLOCKS, linear.weight, 0))


# --- The manners of a torch module -----------------------------------------------------------


def test_without_bias():
    layer = MaskedLinear(7, 10, BLOCKS, bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T)
    layer.load_state_dict(nn.Linear(7, 10, bias=False).state_dict())


@each_mask
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_bits(mask, how):
    layer, _ = twins(mask, activation="silu", grad_mask=mask & (torch.arange(len(mask.T)) % 2 == 0))
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.layout == layer.layout
    assert other.activation == "silu"
    results = []
    x = torch.randn(4, mask.shape[1], dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(4, mask.shape[0], dtype=torch.float64)
    for module in (layer, other):
        y, grads = run(lambda m=module: m(x), [x, *module.parameters()], grad_y)
        results.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        other.weight.add_(1)
    assert not mask.any() or not torch.equal(other.weight, layer.weight)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@each_mask
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_moves_to_another_dtype(mask, dtype, device):
    layer, _ = twins(mask, dtype=torch.float32)
    moved = copy.deepcopy(layer).to(device, dtype)
    assert {p.dtype for p in moved.parameters()} == {dtype}
    x = torch.randn(6, mask.shape[1]).to(dtype)
    grad_y = torch.randn(6, mask.shape[0]).to(dtype)
    y, grads = run(lambda: moved(x.to(device)), list(moved.parameters()), grad_y.to(device))
    exact = layer.double()
    exact.load_state_dict(moved.state_dict())  # the same rounded weights
    expected, expected_grads = run(
        lambda: exact(x.double()), list(exact.parameters()), grad_y.double()
    )
    assert y.dtype == dtype
    for ours, theirs in zip((y, *grads), (expected, *expected_grads), strict=True):
        close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(ours.double().cpu(), theirs, **close)


@each_mask
def test_autocast_computes_in_bf16_and_trains_in_fp32(mask, device):
    layer, linear = twins(mask, dtype=torch.float32)
    layer, linear, mask = layer.to(device), linear.to(device), mask.to(device)
    x = torch.randn(8, mask.shape[1], device=device, requires_grad=True)
    grad_y = torch.randn(8, mask.shape[0], device=device).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        y, grads = run(lambda: layer(x), [x, layer.weight, layer.bias], grad_y)
        expected, expected_grads = run(
            lambda: F.linear(x, linear.weight * mask, linear.bias),
            [x, linear.weight, linear.bias],
            grad_y,
        )
        assert layer.double()(x.double()).dtype == torch.float64  # as torch's linear
    assert y.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(grads[0], expected_grads[0], **close)
    torch.testing.assert_close(grads[1], layer.layout.pack(expected_grads[1]), **close)
    torch.testing.assert_close(grads[2], expected_grads[2], **close)


def test_extra_repr_shows_blocks_and_density():
    text = repr(MaskedLinear(7, 10, BLOCKS, activation="relu"))
    for part in ("in_features=7, out_features=10, bias=True", "blocks=3x2 (4 present)"):
        assert part in text
    assert f"density={BLOCKS.float().mean():.3f}, activation=relu" in text
    hidden = MaskedLinear.from_layout(FAMILY.hidden_layout(2, 2), bias=False)
    assert "bias=False" in repr(hidden)
    assert "routed=3" in repr(hidden)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((10, 7, BLOCKS), {}, LayoutError, r"\(out_features, in_features\) = \(7, 10\).*\(10, 7\)"),
        ((7, 10, BLOCKS), {"activation": "softplus"}, LayoutError, "softplus.*element-wise"),
        ((7, 10, BLOCKS), {"grad_mask": ~BLOCKS}, LayoutError, "grad_mask|rout"),
        ((7, 10, BLOCKS.float() / 2), {}, LayoutError, "mask"),
    ],
)
def test_constructor_errors_carry_the_values(arguments, options, error, words):
    with pytest.raises(error, match=words):
        MaskedLinear(*arguments, **options)


@each_mask
def test_output_may_be_changed_in_place(mask):
    layer, linear = twins(mask)
    x = torch.randn(4, mask.shape[1], dtype=torch.float64)
    grad_y = torch.randn(4, mask.shape[0], dtype=torch.float64)
    y, grads = run(lambda: layer(x).mul_(2), list(layer.parameters()), grad_y)
    torch.testing.assert_close(y, 2 * F.linear(x, linear.weight * mask, linear.bias))
    torch.testing.assert_close(grads[0], layer.layout.pack(2 * grad_y.T @ x))
    torch.testing.assert_close(grads[1], 2 * grad_y.sum(0))


def test_call_errors_carry_the_values():
    layer = MaskedLinear(7, 10, BLOCKS)
    with pytest.raises(LayoutError, match=r"in_features=7, got \(4, 6\)"):
        layer(torch.randn(4, 6))
    with pytest.raises(LayoutError, match=r"float64.*weight is torch.float32"):
        layer(torch.randn(4, 7).double())
    with pytest.raises(LayoutError, match="int64"):
        layer(torch.ones(4, 7, dtype=torch.int64))
    with pytest.raises(mk.BackendError, match="fastest"):
        MaskedLinear(7, 10, BLOCKS, backend="fastest")(torch.randn(4, 7))


# --- Meta device -----------------------------------------------------------------------------


def emptied():
    return MaskedLinear(10, 12, MADE, device="meta").to_empty(device="cpu")


def assigned():
    layer = MaskedLinear(10, 12, MADE, device="meta")
    layer.load_state_dict(MaskedLinear(10, 12, MADE).state_dict(), assign=True)
    return layer


def unpickled():
    return pickle.loads(pickle.dumps(MaskedLinear(10, 12, MADE)))


@pytest.mark.parametrize("made", [emptied, assigned, unpickled])
def test_compiles_before_its_first_call_wherever_it_comes_from(made):
    """A compiler finds serialized layouts and makes none: they are there as the parameters are."""
    torch._dynamo.reset()
    layer = made()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 10)
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(y, layer(x))


def test_a_sweep_over_a_hundred_masks_compiles_twice():
    """No guard depends on a layout: a second size makes sizes dynamic, and that graph serves all.

    It stopped at the ninth, torch's limit of graphs for one function.
    """
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    for n in range(10, 110):
        generator = torch.Generator().manual_seed(n)
        layer = MaskedLinear(n, 2 * n - 7, torch.rand(2 * n - 7, n, generator=generator) < 0.5)
        x = torch.randn(3, n, generator=generator, requires_grad=True)
        inputs, cotangent = [x, *layer.parameters()], torch.randn(3, 2 * n - 7, generator=generator)
        y = torch.compile(layer, backend=graphs, fullgraph=True)(x)
        expected = layer(x)
        assert torch.equal(y, expected)
        ours, eager = (torch.autograd.grad(of, inputs, cotangent) for of in (y, expected))
        assert all(map(torch.equal, ours, eager))
    assert graphs.frame_count <= 3
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["argument", "context"])
def test_meta_then_reset_equals_direct_construction(how):
    if how == "argument":
        layer = MaskedLinear(10, 12, MADE, device="meta")
    else:
        with torch.device("meta"):
            layer = MaskedLinear(10, 12, MADE)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    direct = MaskedLinear(10, 12, MADE)
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), direct(x))


def test_meta_layer_infers_shape_and_dtype():
    layer = MaskedLinear(10, 12, MADE, device="meta", dtype=torch.bfloat16, activation="gelu")
    x = torch.empty(3, 0, 10, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.bfloat16, (3, 0, 12))
    y.backward(torch.empty_like(y))
    assert [g.grad.shape for g in (x, layer.weight, layer.bias)] == [
        x.shape, layer.weight.shape, layer.bias.shape
    ]  # fmt: skip


def test_meta_layer_takes_a_dense_checkpoint():
    linear = dense_layer(10, 12, MADE)
    layer = MaskedLinear(10, 12, MADE, device="meta")
    layer.load_state_dict(linear.state_dict(), assign=True)
    x = torch.randn(3, 10)
    torch.testing.assert_close(layer(x), linear(x))


# --- Distributed -----------------------------------------------------------------------------


def trained(module, x, grad_y, steps=2):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).backward(grad_y)
        optimizer.step()
    return module


def test_ddp_trains_like_one_process(one_process):
    alone = Nested(MaskedLinear)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    x, grad_y = torch.randn(6, 7), torch.randn(6, 12)
    trained(alone, x, grad_y)
    trained(parallel, x, grad_y)
    for ours, theirs in zip(parallel.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fsdp2_trains_like_one_process(one_process):
    from torch.distributed.fsdp import fully_shard

    alone = Nested(MaskedLinear)
    sharded = copy.deepcopy(alone)
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(sharded.first, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x, grad_y = torch.randn(6, 7), torch.randn(6, 12)
    trained(alone, x, grad_y)
    trained(sharded, x, grad_y)
    for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs)


# --- torch.compile and torch.export ----------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks", "interleaved"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compiles_whole_with_a_dynamic_batch(name, activation):
    torch._dynamo.reset()
    mask = torch.cat([MASKS[name], MASKS[name][:1]])  # a layout that no other test has run
    layer, _ = twins(mask, dtype=torch.float32, activation=activation)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 2, 17, 33):
        x = torch.randn(batch, mask.shape[1], requires_grad=True)
        grad_y = torch.randn(batch, mask.shape[0])
        inputs = [x, *layer.parameters()]
        with torch.compiler.set_stance("fail_on_recompile" if batch != 4 else "default"):
            y, grads = run(lambda x=x: compiled(x), inputs, grad_y)
        expected, expected_grads = run(lambda x=x: layer(x), inputs, grad_y)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("name", ["blocks", "interleaved", "random"])
def test_exports_with_a_dynamic_batch(name):
    mask = torch.cat([MASKS[name], MASKS[name][:2]])  # a layout that no other test has run
    layer, _ = twins(mask, dtype=torch.float32, activation="relu")
    layer = pickle.loads(pickle.dumps(layer))  # nor does a copy inherit tables
    example = torch.randn(4, mask.shape[1])
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (1, 4, 19):
        x = torch.randn(rows, mask.shape[1])
        assert torch.equal(loaded(x), layer(x))


def test_a_checkpoint_of_shapes_only_loads() -> None:
    layer = mk.MaskedLinear(4, 3, torch.ones(3, 4, dtype=torch.bool), device="meta")
    state = {name: value.to("meta") for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.weight.is_meta


def test_a_packed_weight_must_say_how_it_is_packed():
    """Parameters alone (an EMA, say) could belong to another order of the same size."""
    source, target = (mk.MaskedLinear(4, 4, torch.ones(4, 4).tril()) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        target.load_state_dict(dict(source.named_parameters()))
    target.load_state_dict(dict(source.named_parameters()), strict=False)
    assert torch.equal(target.weight, source.weight)


def test_an_unknown_backend_is_refused_at_once():
    with pytest.raises(mk.BackendError, match=r"backend must be None or one of .*, got 'cuda'"):
        mk.MaskedLinear(4, 4, torch.ones(4, 4), backend="cuda")
