"""Where trained models go: AOTInductor packages, TorchScript, ONNX. One list of models for all.

ONNX is checked in ONNX Runtime where the three packages are installed.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import maskmoe_kernels as mk
from maskmoe_kernels import BackendError
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from tests.nn.test_linear import MASKS

ROOT = Path(__file__).resolve().parents[2]
FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 4, "c": 2},
    {"a": ["a"], "ab": ["a", "b"], "ac": ["a", "c"], "all": ["a", "b", "c"]},
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.jit.trace records masked_linear",
    "ignore::torch.jit.TracerWarning",  # checks of shapes are no part of a trace
    "ignore::DeprecationWarning",
)


class Predicting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return tuple(self.net.predict(x, "smooth", 2.0))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = mk.MaskedMultiheadAttention(FAMILY, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


def linear(name, backend=None):
    mask = MASKS[name]
    return mk.MaskedLinear(*mask.T.shape, mask, activation="gelu", backend=backend)


def sessions(model, backend=None, **sizes):
    return model(FAMILY, {"a": 3, "b": 2}, width=4, backend=backend, **sizes)


def padded(rows):
    generator = torch.Generator().manual_seed(rows)
    steps = torch.randint(1, 5, (2, rows, 1), generator=generator)
    return [torch.arange(5) >= steps[0], torch.arange(4) >= steps[1]]


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


#: Name to a model and, for a number of rows, its arguments.
MODELS = {
    "blocks": (lambda b=None: linear("blocks", b), lambda n: (randn(n, 7),)),
    "interleaved": (lambda b=None: linear("interleaved", b), lambda n: (randn(n, 3, 10),)),
    "random": (lambda b=None: linear("random", b), lambda n: (randn(n, 11),)),
    "nothing": (lambda b=None: linear("nothing", b), lambda n: (randn(n, 4),)),
    "mlp": (
        lambda b=None: mk.InterpretableMLP(FAMILY, [8, 6], backend=b),
        lambda n: (randn(n, 9),),
    ),
    "predict": (
        lambda b=None: Predicting(mk.InterpretableMLP(FAMILY, [8, 6], "silu", backend=b)),
        lambda n: (randn(n, 9),),
    ),
    "ncf": (
        lambda b=None: InterpretableNCF(NCFSizes(5, 7), backend=b),
        lambda n: (torch.arange(n) % 5, torch.arange(n) % 7, torch.ones(n, 3).long(), randn(n, 19)),
    ),
    "gru": (lambda b=None: mk.MaskedGRU(FAMILY, 4, 2, backend=b), lambda n: (randn(3, n, 9),)),
    "attention": (lambda b=None: Attending(), lambda n: (randn(n, 3, 16),)),
    "interpretable-gru": (
        lambda b=None: sessions(mk.InterpretableGRU, b),
        lambda n: (randn(n, 5, 9), randn(n, 4, 5), *padded(n)),
    ),
    "transformer": (
        lambda b=None: sessions(mk.InterpretableTransformer, b, layers=1),
        lambda n: (randn(n, 5, 9), randn(n, 4, 5), *padded(n)),
    ),
}
BATCH_OF = {"gru": 1}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name, backend=None):
    torch.manual_seed(0)
    make, arguments = MODELS[name]
    return make(backend).eval(), arguments


def tensors(found):
    found = found if isinstance(found, (tuple, list)) else (found,)
    return [t.detach() for t in found if t is not None]


# --- TorchScript -------------------------------------------------------------------------


@each_model
def test_traces_load_and_take_other_batches(name, tmp_path):
    """The check of torch.jit.trace, which compares graphs of several runs, is on."""
    model, arguments = made(name)
    traced = torch.jit.trace(model, arguments(6))
    traced.save(tmp_path / "net.pt")
    loaded = torch.jit.load(tmp_path / "net.pt")
    for rows in (6,) if name in ("gru", "interpretable-gru") else (6, 2):
        found = tensors(loaded(*arguments(rows)))
        torch.testing.assert_close(found, tensors(model(*arguments(rows))))
    assert "maskmoe::" not in str(traced.inlined_graph)


def test_a_trace_runs_without_the_package(tmp_path):
    model, arguments = made("mlp")
    torch.jit.trace(model, arguments(6)).save(tmp_path / "net.pt")
    torch.save((arguments(4), tensors(model(*arguments(4)))), tmp_path / "data.pt")
    code = (
        "import sys, torch\n"
        "net, (x, y) = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(net(*x).detach(), y[0])\n"
        "assert 'maskmoe_kernels' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "net.pt", tmp_path / "data.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["interleaved", "mlp", "transformer"])
def test_traces_train_with_routed_gradients(name):
    model, arguments = made(name)
    traced = torch.jit.trace(model, arguments(6))
    inputs = [x.clone() for x in arguments(6)]
    inputs[0].requires_grad_()
    grads = []
    for module in (traced, model):
        y = tensors_with_grad(module(*inputs))
        torch.manual_seed(3)
        leaves = [inputs[0], *model.parameters()]
        grads.append(torch.autograd.grad(y, leaves, torch.randn_like(y)))
    torch.testing.assert_close(*grads)


def tensors_with_grad(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", ["blocks", "interleaved", "random"])
def test_what_a_trace_may_not_see_is_absent(name):
    model, arguments = made(name)
    (x,) = arguments(6)
    traced = torch.jit.trace(model, x)
    y = traced(x)
    for feature in range(x.shape[-1]):
        spoilt = x.clone()
        spoilt[..., feature] = torch.nan
        sees = MASKS[name][:, feature]
        found = traced(spoilt)
        assert found[..., sees].isnan().all()
        assert torch.equal(found[..., ~sees], y[..., ~sees])


def test_a_trace_says_what_it_records():
    model, arguments = made("blocks", "native")
    with pytest.raises(BackendError, match=r"'native' has no operators in TorchScript"):
        torch.jit.trace(model, arguments(6))
    model, arguments = made("blocks")
    with pytest.warns(UserWarning, match=r"torch\.export keeps the kernels"):
        torch.jit.trace(model, arguments(6))


# --- AOTInductor -------------------------------------------------------------------------

PACKAGES = [
    pytest.param("interleaved", None, False, marks=pytest.mark.deep),
    ("mlp", None, True),  # captured as torch.compile does, which has one op for all layers
    pytest.param("interleaved", "reference", True, marks=pytest.mark.deep),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend", "strict"), PACKAGES)
def test_aotinductor_packages_compute_the_same(name, backend, strict, tmp_path):
    model, arguments = made(name, backend)
    x = arguments(6)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in x)
    program = torch.export.export(model, x, strict=strict, dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for rows in (6, 3):
        found = tensors(run(*arguments(rows)))
        torch.testing.assert_close(found, tensors(model(*arguments(rows))))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_no_op_of_an_exported_program_has_an_empty_list(strict, bias):
    """AOTInductor cannot call one that has."""
    layouts = [FAMILY.input_layout(5), FAMILY.hidden_layout(5, 1)]
    program = torch.export.export(mk.MaskedMLP(layouts, bias=bias), (randn(6, 9),), strict=strict)
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = [n for part in parts for n in part.graph.nodes if "maskmoe.masked_" in str(n.target)]
    assert len(calls) >= 2
    lists = [a for node in calls for a in node.args if isinstance(a, (list, tuple))]
    assert all(lists)


@pytest.mark.parametrize("name", ["interleaved", "random", "mlp"])
def test_the_reference_compiles_before_its_first_call(name):
    """Two of one network, on layouts that no other test has run."""
    torch._dynamo.reset()
    masks = [MASKS[name] if name != "mlp" else FAMILY.visible_features()] * 2
    masks = [torch.cat([mask, mask[: k + 1]]) for k, mask in enumerate(masks)]
    layers = [mk.MaskedLinear(*m.T.shape, m, activation="tanh", backend="reference") for m in masks]

    def both(x):
        return torch.cat([layer(x) for layer in layers], -1)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    x = randn(4, masks[0].shape[1]).requires_grad_()
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    results = []
    for of in (compiled, both):
        y = of(x)
        torch.manual_seed(0)
        results.append((y, *torch.autograd.grad(y, leaves, torch.randn_like(y))))
    torch.testing.assert_close(*results)


# --- ONNX --------------------------------------------------------------------------------


@pytest.mark.slow
@each_model
def test_onnx_runtime_computes_the_same(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, arguments = made(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({BATCH_OF.get(name, 0): batch} for _ in arguments(6))
    exported = torch.onnx.export(
        model, arguments(6), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert {node.domain for node in exported.model.graph} == {""}  # the standard's operators alone
    exported.save(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    for rows in (6, 3):
        given = dict(zip((i.name for i in session.get_inputs()), arguments(rows), strict=True))
        found = session.run(None, {key: value.numpy() for key, value in given.items()})
        expected = tensors(model(*arguments(rows)))
        torch.testing.assert_close([torch.from_numpy(y) for y in found], expected)


@pytest.mark.slow
def test_what_onnx_may_not_see_is_absent(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, arguments = made("mlp")
    (x,) = arguments(6)
    torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    visible = FAMILY.visible_features()
    (y,) = session.run(None, {"x": x.numpy()})
    for feature in range(x.shape[-1]):
        spoilt = x.clone()
        spoilt[..., feature] = torch.nan
        (found,) = session.run(None, {"x": spoilt.numpy()})
        sees = visible[:, feature].numpy()
        assert (found[:, ~sees] == y[:, ~sees]).all()
