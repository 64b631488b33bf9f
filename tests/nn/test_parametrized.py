"""``torch.nn.utils`` and ``torch.nn.init`` on packed weights, beside the same on ``nn.Linear``."""

import copy
import traceback

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import maskmoe_kernels as mk
from maskmoe_kernels import MaskedLinear
from tests.nn.test_linear import MASKS

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4})
each_mask = pytest.mark.parametrize("name", ["blocks", "interleaved", "random"])


def twins(name, **options):
    """A layer, and ``nn.Linear`` with zeros where the mask is false; float64."""
    torch.manual_seed(0)
    mask = MASKS[name]
    layer = MaskedLinear(mask.shape[1], mask.shape[0], mask, dtype=torch.float64, **options)
    return layer, layer.to_linear()


def grads_of(module, x, cotangent):
    module.zero_grad()
    y = module(x)
    y.backward(cotangent)
    return y.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


def data(layer):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, layer.in_features, dtype=torch.float64, generator=generator),
        torch.randn(5, layer.out_features, dtype=torch.float64, generator=generator),
    )


def sigma(layer):
    """The largest singular value of what the layer multiplies by."""
    return torch.linalg.svdvals(layer.dense_weight().detach().double())[0].item()


# --- weight_norm -------------------------------------------------------------------------


@each_mask
@pytest.mark.parametrize("dim", [0, None])
def test_weight_norm_is_that_of_the_matrix(name, dim):
    layer, linear = twins(name)
    seeing = MASKS[name].any(1)  # nn.Linear's norm of a unit that sees nothing is 0 / 0
    y = layer(data(layer)[0])
    for module in (layer, linear):
        parametrizations.weight_norm(module, dim=dim)
    torch.testing.assert_close(layer(data(layer)[0]), y)
    ours, theirs = (module.parametrizations.weight for module in (layer, linear))
    assert ours.original0.shape == theirs.original0.shape
    with torch.no_grad():  # a step that changes norms and directions
        noise = torch.rand_like(ours.original0)
        ours.original0 += noise
        theirs.original0 += noise
        ours.original1 *= 3
        theirs.original1 *= 3
    rows = seeing if dim == 0 else ...
    dense = layer.dense_weight()
    torch.testing.assert_close(dense[rows], linear.weight[rows])
    norms = dense.norm(dim=1)[rows] if dim == 0 else dense.norm()
    torch.testing.assert_close(norms, ours.original0.flatten()[rows].reshape(norms.shape))
    x, cotangent = data(layer)
    _, found = grads_of(layer, x, cotangent)
    _, expected = grads_of(linear, x, cotangent)
    of = "parametrizations.weight.original"
    torch.testing.assert_close(found[of + "0"][rows], expected[of + "0"][rows])
    packed = layer.layout.pack(expected[of + "1"])
    torch.testing.assert_close(found[of + "1"], packed)
    assert packed.abs().min() > 0  # the directions learn


def test_units_that_see_nothing_have_finite_gradients():
    layer, _ = twins("random")
    parametrizations.weight_norm(layer)
    y, grads = grads_of(layer, *data(layer))
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["parametrizations.weight.original0"][2].item() == 0


# --- spectral_norm -----------------------------------------------------------------------


@each_mask
def test_spectral_norm_makes_sigma_one(name):
    layer, _ = twins(name)
    assert abs(sigma(layer) - 1) > 0.02
    parametrizations.spectral_norm(layer)
    x, _ = data(layer)
    for _ in range(1000):  # an iteration of the power method each
        layer(x)
    assert sigma(layer.eval()) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(torch.rand(layer.layout.num_weights) + 0.5)
    for _ in range(1000):
        layer.train()(x)
    assert sigma(layer.eval()) == pytest.approx(1, abs=1e-6)


@each_mask
def test_spectral_norm_has_the_gradient_of_the_matrix(name):
    layer, linear = twins(name)
    for module in (layer, linear):
        parametrizations.spectral_norm(module).eval()
    inner = layer.parametrizations.weight[0].inner
    linear.parametrizations.weight[0].load_state_dict(inner.state_dict())
    y, found = grads_of(layer, *data(layer))
    expected_y, expected = grads_of(linear, *data(layer))
    torch.testing.assert_close(y, expected_y)
    of = "parametrizations.weight.original"
    torch.testing.assert_close(found[of], layer.layout.pack(expected[of]))


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()

    def right_inverse(self, weight):
        return weight


def test_parametrizations_follow_each_other():
    """An element-wise one sees the packed weight; the norm comes second and sees the matrix."""
    layer, _ = twins("interleaved")
    parametrize.register_parametrization(layer, "weight", Positive())
    packed = layer.weight.detach()
    assert packed.shape == (layer.layout.num_weights,)
    parametrizations.spectral_norm(layer)
    for _ in range(1000):
        layer(data(layer)[0])
    assert sigma(layer.eval()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(layer.weight / layer.weight.sum(), packed / packed.sum())


# --- What parametrized layers keep doing -------------------------------------------------

NORMS = {"weight": parametrizations.weight_norm, "spectral": parametrizations.spectral_norm}
each_norm = pytest.mark.parametrize("norm", NORMS)


@each_norm
@each_mask
def test_copies_twins_and_removal_keep_the_bits(norm, name):
    layer = NORMS[norm](twins(name)[0]).eval()
    x, _ = data(layer)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    twin = layer.unrouted()
    assert torch.equal(twin(x), y)
    shared = zip(layer.parameters(), twin.parameters(), strict=True)
    assert all(a is b for a, b in shared)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is MaskedLinear
    assert torch.equal(layer(x), y)


@each_norm
def test_state_dicts_go_round(norm):
    layer, other = (NORMS[norm](twins("random")[0]).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(data(layer)[0]), layer(data(layer)[0]))


@each_norm
def test_a_parametrized_weight_of_another_layout_is_refused(norm):
    """As many weights, in another order."""
    masks = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[0, 1, 1], [1, 1, 0]]]).bool()
    layer, other = (NORMS[norm](MaskedLinear(3, 2, mask)) for mask in masks)
    with pytest.raises(RuntimeError, match=r"packing mismatch for weight"):
        layer.load_state_dict(other.state_dict())


@each_norm
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(norm, training):
    torch._dynamo.reset()
    layer = NORMS[norm](twins("interleaved")[0]).train(training)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    found, expected = (grads_of(module, *data(layer)) for module in (compiled, layer))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close([*found[1].values()], [*expected[1].values()])


@each_norm
def test_exports(norm):
    layer = NORMS[norm](twins("interleaved")[0]).eval()
    x, _ = data(layer)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@each_norm
def test_draws_the_initial_weight_again(norm):
    plain, layer = twins("random")[0], NORMS[norm](twins("random")[0]).eval()
    for module in (plain, layer):
        torch.manual_seed(5)
        module.reset_parameters()
    whole = layer.parametrizations.weight
    drawn = whole.original1 if norm == "weight" else whole.original
    assert torch.equal(drawn, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


def test_gates_and_projections_have_a_norm_a_unit():
    torch.manual_seed(0)
    gru = mk.MaskedGRU(FAMILY, 4)
    attention = mk.MaskedMultiheadAttention(FAMILY, 4)
    x, steps = torch.randn(6, 2, 7), torch.randn(6, 2, 12)
    before = gru(x)[0], attention(steps, steps.flip(0), steps)[0]
    for layer in (gru.cells[0].hidden_gates, gru.cells[0].input_gates, attention.in_proj):
        parametrizations.weight_norm(layer)
        of = layer.parametrizations.weight
        assert of.original0.shape == (3 * 12, 1)
        torch.testing.assert_close(layer.dense_weight().norm(dim=1), of.original0[:, 0])
    after = gru(x)[0], attention(steps, steps.flip(0), steps)[0]
    torch.testing.assert_close(after, before)


def test_a_normed_layer_in_an_mlp_is_called():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [6, 5], dtype=torch.float64, backend="torch")
    x, y = torch.randn(9, 7, dtype=torch.float64), torch.rand(9).round()
    before = net(x), net.gem_loss(x, y)
    parametrizations.weight_norm(net.layers[1])
    torch.testing.assert_close((net(x), net.gem_loss(x, y)), before)
    assert "Parametrized" in net.layers.unsupported_reason()
    with torch.no_grad():
        net.layers[1].parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(net(x), before[0])


# --- Older styles, and what cannot be right ----------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each_mask
def test_the_older_weight_norm_is_that_of_the_matrix(name):
    layer, linear = twins(name)
    seeing = MASKS[name].any(1)
    y = layer(data(layer)[0])
    for module in (layer, linear):
        nn.utils.weight_norm(module)
        with torch.no_grad():
            module.weight_g.mul_(torch.arange(1.0, len(seeing) + 1)[:, None])
    ours, theirs = grads_of(layer, *data(layer)), grads_of(linear, *data(layer))
    torch.testing.assert_close(ours[0][:, seeing], theirs[0][:, seeing])
    torch.testing.assert_close(ours[1]["weight_g"][seeing], theirs[1]["weight_g"][seeing])
    torch.testing.assert_close(ours[1]["weight_v"], layer.layout.pack(theirs[1]["weight_v"]))
    torch.testing.assert_close(layer.dense_weight().norm(dim=1)[seeing], layer.weight_g[seeing, 0])
    with torch.no_grad():
        layer.weight_g.div_(torch.arange(1.0, len(seeing) + 1)[:, None])
    nn.utils.remove_weight_norm(layer)
    torch.testing.assert_close(layer(data(layer)[0]), y)
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias"}


@each_mask
def test_the_older_spectral_norm_makes_sigma_one(name):
    layer, linear = twins(name)
    for module in (layer, linear):
        nn.utils.spectral_norm(module, n_power_iterations=3)
    for _ in range(400):
        layer(data(layer)[0])
    assert sigma(layer) == pytest.approx(1, abs=1e-6)
    for buffer in ("weight_u", "weight_v"):
        getattr(linear, buffer).copy_(getattr(layer, buffer))
    ours, theirs = (grads_of(m.eval(), *data(layer)) for m in (layer, linear))
    torch.testing.assert_close(ours[0], theirs[0])
    of = "weight_orig"
    torch.testing.assert_close(ours[1][of], layer.layout.pack(theirs[1][of]))
    other = nn.utils.spectral_norm(twins(name)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(data(layer)[0]), ours[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_norms_of_weights_that_are_not_there_are_refused(norm):
    """A dense checkpoint whose norms count masked weights would be another function here."""
    layer, linear = twins("blocks")
    other = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
    for module in (layer, linear, other):
        norm(module)
    layer.load_state_dict(linear.state_dict())
    torch.testing.assert_close(layer(data(layer)[0]), linear(data(layer)[0]))
    with pytest.raises(RuntimeError, match="weights outside of this layer's mask"):
        layer.load_state_dict(other.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_older_norm_of_the_whole_weight_is_right():
    layer, linear = twins("blocks")
    for module in (layer, linear):
        nn.utils.weight_norm(module, dim=None)
    ours, theirs = grads_of(layer, *data(layer)), grads_of(linear, *data(layer))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1]["weight_g"], theirs[1]["weight_g"])
    torch.testing.assert_close(ours[1]["weight_v"], layer.layout.pack(theirs[1]["weight_v"]))


def test_orthogonal_is_refused():
    with pytest.raises(ValueError, match="matrix"):
        parametrizations.orthogonal(twins("blocks")[0])


# --- prune -------------------------------------------------------------------------------


@each_mask
def test_pruning_chooses_among_visible_weights(name):
    layer, _ = twins(name)
    size = layer.weight.detach().abs()
    prune.l1_unstructured(layer, "weight", 0.25)
    gone = round(0.25 * size.numel())
    expected = size > size.sort().values[gone - 1]
    assert torch.equal(layer.weight_mask.bool(), expected)
    dense = layer.layout.unpack(layer.weight_orig * layer.weight_mask)
    x, _ = data(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))


@each_mask
def test_a_mask_of_the_matrix_is_packed(name):
    layer, linear = twins(name)
    mask = torch.rand(linear.weight.shape) < 0.6
    mask[1] = False  # a unit as a whole, as structured methods do
    prune.custom_from_mask(layer, "weight", layer.layout.pack(mask))
    prune.custom_from_mask(linear, "weight", mask)
    ours, theirs = grads_of(layer, *data(layer)), grads_of(linear, *data(layer))
    torch.testing.assert_close(ours[0], theirs[0])
    of = "weight_orig"
    torch.testing.assert_close(ours[1][of], layer.layout.pack(theirs[1][of]))


@pytest.mark.parametrize("method", ["ln_structured", "random_structured", "custom_from_mask"])
def test_pruning_of_a_matrix_names_the_way(method):
    layer, _ = twins("blocks")
    weight = layer.weight
    arguments = {
        "ln_structured": {"amount": 0.5, "n": 2, "dim": 0},
        "random_structured": {"amount": 0.5, "dim": 0},
        "custom_from_mask": {"mask": MASKS["blocks"]},
    }
    with pytest.raises((ValueError, AssertionError)) as error:
        getattr(prune, method)(layer, "weight", **arguments[method])
    assert "layer.layout.pack(mask)" in "".join(traceback.format_exception(error.value))
    assert layer.weight is weight
    assert not layer._forward_pre_hooks


def test_a_pruned_dense_checkpoint_is_packed():
    layer, linear = twins("random")
    mask = torch.rand(linear.weight.shape) < 0.6
    prune.custom_from_mask(linear, "weight", mask)
    other, _ = twins("random")
    prune.identity(other, "weight")
    other.load_state_dict(linear.state_dict())
    torch.testing.assert_close(other(data(layer)[0]), linear(data(layer)[0]))


def test_a_pruned_weight_of_another_layout_is_refused():
    masks = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[0, 1, 1], [1, 1, 0]]]).bool()
    layer, other = (MaskedLinear(3, 2, mask) for mask in masks)
    for module in (layer, other):
        prune.identity(module, "weight")
    with pytest.raises(RuntimeError, match=r"packing mismatch for weight"):
        layer.load_state_dict(other.state_dict())


# --- vectors, init -----------------------------------------------------------------------


def test_vectors_go_back_into_the_weights():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [6, 5])
    x = torch.randn(4, 7)
    y = net(x)
    vector = nn.utils.parameters_to_vector(net.parameters())
    other = mk.InterpretableMLP(FAMILY, [6, 5])
    nn.utils.vector_to_parameters(vector.clone(), other.parameters())
    assert torch.equal(other(x), y)


@each_mask
def test_initializers_take_each_units_fan_in(name):
    layer = MaskedLinear(*MASKS[name].T.shape, MASKS[name])
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    rows = layer.row_weights()
    assert sum(block.numel() for block in rows) == layer.layout.num_weights
    for block in rows:
        nn.init.kaiming_uniform_(block, nonlinearity="relu")
    dense, fan_in = layer.dense_weight().detach(), MASKS[name].sum(1)
    bound = (6 / fan_in).sqrt()
    seeing = fan_in > 0
    ratio = (dense.abs() / bound[:, None])[MASKS[name]]
    assert 0.5 < ratio.max() <= 1
    for unit in seeing.nonzero().flatten().tolist():
        seen = dense[unit][MASKS[name][unit]].sort().values
        assert any(torch.equal(row.sort().values, seen) for block in rows for row in block)


def test_rows_of_a_block_can_be_made_orthogonal():
    layer = mk.MaskedLinear.from_layout(FAMILY.hidden_layout(3, 3))
    for block in layer.row_weights():
        nn.init.orthogonal_(block)
    dense = layer.dense_weight().detach()
    for rows in dense.split(3):
        torch.testing.assert_close(rows @ rows.T, torch.eye(3))


@pytest.mark.parametrize(
    "init", ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
             "orthogonal_", "eye_", "dirac_"],
)  # fmt: skip
def test_initializers_of_matrices_refuse_a_packed_weight(init):
    layer, _ = twins("blocks")
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="dimension"):
        getattr(nn.init, init)(layer.weight)
    assert torch.equal(layer.weight, weight)
