"""``convert_`` and ``revert_`` on real models of zuko, nflows and pyro."""

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import maskmoe_kernels as mk
from maskmoe_kernels.nn.convert import _difference
from maskmoe_kernels.nn.foreign import ORIGINS
from maskmoe_kernels.nn.gain import gains
from maskmoe_kernels.ops import native
from maskmoe_kernels.testing import assert_blind

FEATURES = 6


def _zuko(kind, **options):
    zuko = pytest.importorskip("zuko")
    flow = getattr(zuko.flows, kind)(FEATURES, 0, transforms=2, hidden_features=(20, 33), **options)
    return flow, lambda model, x: model().log_prob(x)


def _nflows(**options):
    made = pytest.importorskip("nflows.transforms.made")
    net = made.MADE(FEATURES, 20, output_multiplier=2, **options)
    return net, lambda model, x: model(x)


def _pyro(**options):
    auto_reg_nn = pytest.importorskip("pyro.nn.auto_reg_nn")
    net = auto_reg_nn.ConditionalAutoRegressiveNN(FEATURES, 3, [20, 33], **options)
    return net, lambda model, x: torch.cat(model(x, context=x[:, :3]), -1)


MODELS = {
    "zuko MAF": lambda: _zuko("MAF"),
    "zuko MAF, shuffled": lambda: _zuko("MAF", randperm=True),
    "zuko MAF, residual": lambda: _zuko("MAF", residual=True),
    "zuko NSF": lambda: _zuko("NSF"),
    "nflows": lambda: _nflows(),
    "nflows, random masks": lambda: _nflows(use_residual_blocks=False, random_mask=True),
    "pyro": lambda: _pyro(),
    "pyro, skip connections": lambda: _pyro(skip_connections=True),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


def foreign(model):
    return [m for m in model.modules() if type(m).__name__ == "MaskedLinear"]


def converted(model):
    return [m for m in model.modules() if isinstance(m, mk.ConvertedLinear)]


def batch(rows=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, FEATURES, generator=generator, dtype=dtype)


# --- The same function ---------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_and_gradients_are_the_same(name, dtype):
    theirs, call = made(name)
    theirs = theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    report = mk.convert_(ours, force=True)
    assert [r.reason for r in report] == [None] * len(foreign(theirs))
    assert len(converted(ours)) == len(report) > 0
    assert not foreign(ours)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {
        "rtol": 1e-3, "atol": 1e-4
    }  # fmt: skip
    results = []
    for model in (theirs, ours):
        x = batch(dtype=dtype).requires_grad_()
        y = call(model, x)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        y.backward(cotangent)
        results.append((y.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, **tolerance)
    for dense, packed in zip(foreign(theirs), converted(ours), strict=True):
        torch.testing.assert_close(
            packed.weight.grad, packed.layout.pack(dense.weight.grad), **tolerance
        )
        if dense.bias is not None:
            torch.testing.assert_close(packed.bias.grad, dense.bias.grad, **tolerance)
        assert torch.equal(packed.mask, dense.mask)


def test_every_present_weight_routes_its_gradient():
    model, _ = made("pyro")
    mk.convert_(model, force=True)
    assert all(layer.layout.routes_all for layer in converted(model))


@each_model
def test_converted_layers_are_blind(name):
    model, _ = made(name)
    mk.convert_(model, force=True)
    for layer in converted(model):
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert_blind(layer, x, layer.layout.mask())


# --- The way back ----------------------------------------------------------------------------


@each_model
def test_revert_restores_the_original_exactly(name):
    model, _ = made(name)
    for layer in foreign(model):
        with torch.no_grad():
            layer.weight[~layer.mask.bool()] = 7.0  # what is absent is nobody's, and stays
    model.eval()
    foreign(model)[0].weight.requires_grad_(False)
    layers, parameters = foreign(model), dict(model.named_parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mk.convert_(model, force=True)
    assert set(model.state_dict()) != set(before)
    assert len(mk.revert_(model)) == len(layers)
    assert all(a is b for a, b in zip(foreign(model), layers, strict=True))
    assert all(p is parameters[k] for k, p in model.named_parameters())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in parameters.values()
    ]
    assert not foreign(model)[0].weight.requires_grad


def test_revert_brings_todays_weights_dtype_mode_and_gradients():
    model, call = made("pyro")
    twin = copy.deepcopy(model)
    first = foreign(model)[0]
    with torch.no_grad():
        first.weight[~first.mask.bool()] = 7.0
    mk.convert_(model, force=True)
    model.double().train(False)
    assert converted(model)[0].mask.dtype == torch.float64  # pyro's mask, which .double() casts
    layer = converted(model)[0]
    layer.weight.requires_grad_(False).add_(1.0)
    layer.bias.requires_grad_(False)
    call(model, batch(dtype=torch.float64)).sum().backward()
    second = converted(model)[1].weight.grad
    mk.revert_(model)
    expected = foreign(twin)[0].weight.double()
    mask = first.mask.bool()
    assert torch.equal(first.weight[mask], expected[mask] + 1)
    assert (first.weight[~mask] == 7).all()
    assert (first.weight.dtype, first.bias.dtype, first.mask.dtype) == (torch.float64,) * 3
    assert not first.training
    assert not first.weight.requires_grad
    assert not first.bias.requires_grad
    dense = foreign(model)[1]
    assert torch.equal(dense.weight.grad[dense.mask.bool()].sort()[0], second.sort()[0])
    assert (dense.weight.grad[~dense.mask.bool()] == 0).all()


def test_gradients_that_wait_are_carried_over():
    model, call = made("nflows")
    call(model, batch()).square().sum().backward()
    before = [layer.weight.grad.clone() for layer in foreign(model)]
    mk.convert_(model, force=True)
    for layer, grad in zip(converted(model), before, strict=True):
        assert torch.equal(layer.weight.grad, layer.layout.pack(grad))
    mk.revert_(model)
    assert all(
        torch.equal(layer.weight.grad, grad)
        for layer, grad in zip(foreign(model), before, strict=True)
    )


def test_revert_refuses_to_lose_a_hook():
    model, _ = made("pyro")
    mk.convert_(model, force=True)
    handle = converted(model)[1].register_forward_hook(lambda *_: None)
    with pytest.raises(mk.BackendError, match=r"cannot revert 'layers\.1': a hook"):
        mk.revert_(model)
    assert len(converted(model)) == 3  # nothing was changed
    handle.remove()
    assert mk.revert_(model) == ["layers.0", "layers.1", "layers.2"]
    assert mk.revert_(model) == []


# --- What is kept, and why ---------------------------------------------------------------------


def _spoilt(spoil):
    model, _ = made("pyro")
    spoil(model, model.layers[1])
    return {r.name: r for r in mk.convert_(model, force=True)}, model


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _own_forward(model, layer):
    class Own(type(layer)):
        def forward(self, x):
            return super().forward(x) + 1

    layer.__class__ = Own


SPOILS = {
    "forward hook": (lambda _, of: of.register_forward_hook(lambda *_: None), "a hook wants to"),
    "backward hook": (
        lambda _, of: of.register_full_backward_hook(lambda *_: None), "a hook wants to see"
    ),
    "state dict hook": (
        lambda _, of: of.register_state_dict_post_hook(lambda *_: None), "its state dict"
    ),
    "gradient hook": (lambda _, of: of.weight.register_hook(lambda g: g), "gradient of"),
    "accumulated": (
        lambda _, of: of.bias.register_post_accumulate_grad_hook(lambda p: None), "gradient of"
    ),
    "parametrization": (
        lambda m, of: parametrize.register_parametrization(of, "weight", Doubling()), "parametrized"
    ),
    "weight norm": (
        lambda m, of: nn.utils.parametrizations.weight_norm(of), "parametrized"
    ),
    "own forward": (_own_forward, "Own has a forward of its own"),
    "forward replaced": (lambda m, of: setattr(of, "forward", lambda x: x), "was replaced"),
    "compiled": (lambda _, of: of.compile(backend="eager"), "was replaced"),
    "soft mask": (lambda _, of: of.mask.mul_(0.5), "other numbers than zeros and ones"),
    "tied": (lambda m, of: setattr(m, "other", _holding(of.weight)), "another module holds"),
    "more buffers": (lambda _, of: of.register_buffer("scale", torch.ones(1)), "its buffers are"),
    "more parameters": (
        lambda _, of: of.register_parameter("scale", nn.Parameter(torch.ones(1))), "its parameters"
    ),
    "mask of another shape": (lambda m, of: setattr(of, "mask", torch.ones(1, 20)), "the shape of"),
    "meta": (lambda _, of: of.to("meta"), "on meta"),
}  # fmt: skip


def _holding(parameter):
    module = nn.Module()
    module.weight = parameter
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_layer_that_is_not_plain_is_kept_with_a_reason(spoil):
    change, message = SPOILS[spoil]
    records, model = _spoilt(change)
    assert message in records["layers.1"].reason
    assert not records["layers.1"].converted
    assert records["layers.0"].converted
    assert not isinstance(model.layers[1], mk.MaskedLinear)
    assert f"kept: {records['layers.1'].reason}" in repr(mk.ConversionReport(records.values()))


def test_a_class_whose_forward_is_another_is_kept(monkeypatch):
    model, _ = made("pyro")
    cls = type(model.layers[0])
    monkeypatch.setattr(cls, "forward", lambda self, x: nn.Linear.forward(self, x))
    assert {r.reason for r in mk.convert_(model, force=True)} == {
        "it computes something else than F.linear(x, weight * mask, bias)"
    }


def test_the_comparison_takes_weights_of_any_size():
    model, _ = made("pyro")
    for fill in (1e30, 1e-30, math.inf, math.nan):
        with torch.no_grad():
            model.layers[0].weight[0, 0] = fill
        mk.convert_(model, force=True)
        layer = model.layers[0]
        assert isinstance(layer, mk.ConvertedLinear)
        assert _difference(layer.original[0], layer) is None
        mk.revert_(model)


def test_converting_under_autocast_or_inference_mode():
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        model, call = made("nflows")
        with mode:
            assert all(r.converted for r in mk.convert_(model, force=True))
        call(model, batch()).sum().backward()
        assert all(layer.weight.grad is not None for layer in converted(model))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_converting_with_any_precision_of_products(precision):
    model, _ = made("pyro")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert all(r.converted for r in mk.convert_(model, force=True))
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_subclass_with_the_same_forward_is_converted():
    model, _ = made("pyro")

    class Named(type(model.layers[0])):
        pass

    model.layers[1].__class__ = Named
    assert all(r.converted for r in mk.convert_(model, force=True))
    mk.revert_(model)
    assert type(model.layers[1]) is Named


def test_a_layer_in_two_places_stays_one():
    model, _ = made("pyro")
    model.again = model.layers[1]
    assert len(mk.convert_(model, force=True)) == 3
    assert model.again is model.layers[1]
    assert isinstance(model.again, mk.ConvertedLinear)
    mk.revert_(model)
    assert model.again is model.layers[1]
    assert not isinstance(model.again, mk.ConvertedLinear)


def test_the_model_itself_cannot_be_replaced():
    model, _ = made("pyro")
    (record,) = mk.convert_(model.layers[0], force=True)
    assert "MaskedLinear.from_linear" in record.reason


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason="no C++ kernels, no gain")
def test_layers_that_do_not_gain_are_kept():
    small, _ = made("zuko MAF")
    report = mk.convert_(small)
    assert not any(r.converted for r in report)
    assert all("no gain expected" in r.reason for r in report)
    assert not converted(small)
    pytest.importorskip("pyro")
    from pyro.nn import ConditionalAutoRegressiveNN

    large = ConditionalAutoRegressiveNN(64, 4, [512, 512])
    assert repr(mk.convert_(large)).startswith("3 of 3 layers converted\n  layers.0  pyro  ")
    mk.revert_(large)
    assert "torch.float64" in mk.convert_(large.double())[0].reason


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason="no C++ kernels, no gain")
@pytest.mark.parametrize(
    ("features", "hidden", "rows", "gain"),
    [(16, 64, 256, False), (64, 64, 4096, True), (64, 128, 256, True), (16, 512, None, True)],
)
def test_a_spline_flow_is_replaced_where_it_was_measured_to_gain(features, hidden, rows, gain):
    """bench/results/epyc-avx2: with 64 features and 64 units least, 1.05 times as fast."""
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.NSF(features, 0, transforms=1, hidden_features=(hidden, hidden))
    assert {r.converted for r in mk.convert_(flow, batch=rows)} == {gain}


def test_the_cost_model_follows_the_mask():
    units = torch.arange(512)
    stairs = mk.BlockLayout.from_mask(units[:, None] // 8 >= units // 8)
    for rows in (256, 4096):
        forward, step = gains(stairs, rows)
        assert 1.4 < forward < 2.5
        assert 1.4 < step < 2.5
        assert min(gains(mk.BlockLayout.from_mask(torch.ones(64, 8) > 0), rows)) < 1.1
    with pytest.warns(UserWarning, match="no faster"):
        random = mk.BlockLayout.from_mask(torch.rand(512, 512) < 0.5)
    assert max(gains(random, 1024)) < 1


def test_nothing_to_convert():
    model = nn.Sequential(nn.Linear(3, 3))
    report = mk.convert_(model)
    assert (len(report), repr(report)) == (0, "no MaskedLinear of zuko, nflows or pyro found")


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "many"])
def test_bad_arguments(batch):
    with pytest.raises(mk.LayoutError, match="batch must be"):
        mk.convert_(nn.Identity(), batch=batch)
    for function in (mk.convert_, mk.revert_):
        with pytest.raises(mk.LayoutError, match="model must be a Module, got"):
            function("model")
    with pytest.raises(mk.BackendError, match="optimizers must hold optimizers"):
        mk.convert_(nn.Identity(), optimizers=[3])


def test_a_wrapped_model_is_refused(tmp_path):
    model, _ = made("pyro")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(mk.BackendError, match=r"DistributedDataParallel.*before you wrap it"):
            mk.convert_(wrapped)
    finally:
        torch.distributed.destroy_process_group()


# --- Optimizers ----------------------------------------------------------------------------------


def trained(model, call, optimizer, steps=3):
    for k in range(steps):
        optimizer.zero_grad()
        call(model, batch() + k).square().mean().backward()
        optimizer.step()


def test_an_optimizer_that_would_go_on_with_old_weights_is_refused():
    model, call = made("pyro")
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(mk.BackendError, match=r"the Adam that was created before.*Pass it"):
        mk.convert_(model, force=True)
    assert not converted(model)
    del optimizer
    assert all(r.converted for r in mk.convert_(model, force=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mk.BackendError, match="the SGD that was created before revert_"):
        mk.revert_(model)
    mk.revert_(model, optimizers=optimizer)
    trained(model, call, optimizer)


@pytest.mark.parametrize("kind", ["Adam", "SGD", "Adagrad", "RMSprop"])
def test_an_optimizer_follows_there_and_back(kind):
    options = {"lr": 0.05} | ({"momentum": 0.9} if kind == "SGD" else {})
    results = []
    for convert in (False, True):
        model, call = made("pyro")
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        trained(model, call, optimizer)
        if convert:
            mk.convert_(model, force=True, optimizers=[optimizer])
        trained(model, call, optimizer)
        if convert:
            mk.revert_(model, optimizers=[optimizer])
        trained(model, call, optimizer)
        results.append(model.state_dict())
    for one, other in zip(*(r.values() for r in results), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_an_optimizer_that_mixes_weights_is_refused():
    model, _ = made("pyro")
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(mk.BackendError, match="LBFGS cannot follow convert_"):
        mk.convert_(model, force=True, optimizers=optimizer)
    assert not converted(model)


# --- What models are put through ---------------------------------------------------------------


@each_model
def test_checkpoints_of_the_original_load(name):
    model, call = made(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = call(model, batch())
    mk.convert_(model, force=True)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(state)
    torch.testing.assert_close(call(model, batch()), expected, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_can_be_reverted():
    model, call = made("nflows")
    expected = call(model, batch())
    mk.convert_(model, force=True)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        for layer in converted(other):
            assert layer.bias is layer.original[0].bias
        with torch.no_grad():
            converted(other)[0].bias.add_(1)
        mk.revert_(other)
        with torch.no_grad():
            foreign(other)[0].bias.sub_(1)
        torch.testing.assert_close(call(other, batch()), expected, rtol=1e-4, atol=1e-5)
    assert len(converted(model)) > 0


def test_the_random_generator_is_left_alone():
    model, _ = made("zuko MAF")
    state = torch.get_rng_state()
    mk.convert_(model, force=True)
    mk.revert_(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_model_sees_the_change():
    model, call = made("pyro")
    compiled = torch.compile(model, backend="eager")
    x = batch()
    expected = call(compiled, x)
    mk.convert_(compiled, force=True)
    assert len(converted(model)) == 3
    with torch.no_grad():
        for layer in converted(model):
            layer.weight.mul_(0)
    changed = call(compiled, x)
    torch.testing.assert_close(changed, call(model, x))
    assert not torch.allclose(changed, expected)


def test_the_packages_need_not_be_installed():
    code = (
        "import sys, torch, maskmoe_kernels as mk; mk.convert_(torch.nn.Linear(2, 2)); "
        "assert not {'zuko', 'nflows', 'pyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("origin", ORIGINS, ids=".".join)
def test_the_names_are_those_of_the_packages(origin):
    module, name = origin
    assert issubclass(getattr(pytest.importorskip(module), name), nn.Linear)
