"""What the op promises torch: opcheck, gradcheck, transforms, compile, export, autocast, errors."""

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils.flop_counter import FlopCounterMode

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.ops.dispatch import BACKENDS, unsupported_reason
from maskmoe_kernels.testing import assert_close_to_oracle, dense_oracle
from tests.distributed.cases import Loss
from tests.ops.runners import ON_CPU

ROOT = Path(__file__).resolve().parents[3]
ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "tanh", "silu"]

FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 1, "c": 7},
    {"none": [], "a": ["a"], "b": ["b"], "ab": ["a", "b"], "all": ["a", "b", "c"]},
)
FINE = torch.rand(9, 13, generator=torch.Generator().manual_seed(1)) < 0.5
LAYOUTS = {
    "input": FAMILY.input_layout([1, 7, 3, 2, 4]),
    "hidden": FAMILY.hidden_layout(4, [1, 7, 3, 2, 4]),
    "wide": FAMILY.hidden_layout([1, 12, 12, 12, 16], [3, 8, 8, 12, 12]),
    "fine": mk.BlockLayout.from_mask(FINE, FINE & (torch.arange(13) % 3 > 0)),
    "interleaved": mk.BlockLayout.from_mask(
        (torch.arange(12)[:, None] % 3 >= torch.arange(8) % 4).repeat(3, 2)
    ),
}
COMPILERS = ["aot_eager"] + ["inductor"] * any(map(shutil.which, ("c++", "g++", "clang++")))


def drawn(layout, *rows, dtype=torch.float64, grad=False):
    torch.manual_seed(0)
    shapes = [(*rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def network(activation="tanh", **options):
    torch.manual_seed(0)
    return mk.InterpretableMLP(FAMILY, hidden=[16, 12], activation=activation, **options)


def x_of(*rows):
    return torch.randn(*rows, FAMILY.in_features, generator=torch.Generator().manual_seed(2))


# --- Registered ops ----------------------------------------------------------------------


# The C++ kernels refuse float64.
OPS = [("masked_linear", torch.float32), ("torch_linear", torch.float64)]


# An op's arguments say all that its fake knows; of the layout, nothing but widths.
SAVED = [("hidden", activation, keep) for activation in ("relu", "gelu") for keep in (True, False)]
SAVED += [(name, "gelu", True) for name in LAYOUTS if name != "hidden"]
NEEDS = [(True, True, True), (False, True, False), (True, False, True)]
NEEDED = [("hidden", activation, needs) for activation in ("relu", "gelu") for needs in NEEDS]
NEEDED += [(name, "gelu", NEEDS[0]) for name in LAYOUTS if name != "hidden"]


@pytest.mark.parametrize(("op", "dtype"), OPS)
@pytest.mark.parametrize(("name", "activation", "keep"), SAVED)
def test_opcheck_forward(name, keep, activation, op, dtype):
    layout = LAYOUTS[name]
    for rows in [(2, 2), (0,)]:
        x, weight, bias = drawn(layout, *rows, dtype=dtype)
        plan = serialized_layout(layout, x.device)
        for b in (bias, None):
            args = (x, weight, b, plan, layout.id, layout.out_features, activation, keep)
            torch.library.opcheck(getattr(torch.ops.maskmoe, op), args)


@pytest.mark.parametrize(("op", "dtype"), OPS)
@pytest.mark.parametrize(("name", "activation", "needs"), NEEDED)
def test_opcheck_backward(name, activation, needs, op, dtype):
    layout = LAYOUTS[name]
    for rows in [(2, 2), ()]:
        x, weight, _ = drawn(layout, *rows, dtype=dtype)
        grad_y = torch.randn(*rows, layout.out_features, dtype=x.dtype)
        plan = serialized_layout(layout, x.device)
        args = (grad_y, x, weight, torch.randn_like(grad_y), plan, layout.id, activation, *needs)
        torch.library.opcheck(getattr(torch.ops.maskmoe, op + "_backward"), args)


@pytest.mark.parametrize("backend", ["torch", "reference"])  # those that take float64
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradcheck(name, activation, backend):
    """For weight and bias always; for x where every present block routes."""
    layout = LAYOUTS[name]
    x, weight, bias = drawn(layout, 3, grad=True)
    still = x.detach()

    def of(x, *parameters):
        return mk.masked_linear(x, *parameters, layout, activation, backend)

    # Fast mode compares random projections of the Jacobian: the whole of it costs seconds.
    assert gradcheck(lambda *p: of(still, *p), (weight, bias), fast_mode=True)
    if layout.routes_all:
        assert gradcheck(of, (x, weight, bias), fast_mode=True)
    else:  # the routed gradient is not the derivative
        with pytest.raises(GradcheckError):
            gradcheck(lambda x: of(x, weight, bias), x)


@pytest.mark.parametrize("which", range(3))
def test_double_backward_raises(which):
    """Also for a loss linear in y, whose cotangent requires no gradient: it is no constant."""
    layout = LAYOUTS["input"]
    inputs = [t.requires_grad_(k == which) for k, t in enumerate(drawn(layout, 3))]
    for linear in (True, False):
        y = mk.masked_linear(*inputs, layout, "tanh")
        cotangent = torch.randn_like(y) if linear else y
        (grad,) = torch.autograd.grad(y, inputs[which], cotangent, create_graph=True)
        assert grad.requires_grad
        with pytest.raises(mk.BackendError, match="'reference'"):
            (grad.square().sum() + y.sum()).backward()


def test_double_backward_works_on_reference():
    layout = LAYOUTS["input"]

    def of(x, weight, bias):
        return mk.masked_linear(x, weight, bias, layout, "tanh", backend="reference")

    assert gradgradcheck(of, drawn(layout, 3, grad=True))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("which", range(3))
def test_forward_mode_raises(which, backend):
    layout = LAYOUTS["hidden"]
    inputs = drawn(layout, 3, dtype=torch.float32)
    with forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], torch.randn_like(inputs[which]))
        with pytest.raises(mk.BackendError, match="forward-mode"):
            mk.masked_linear(*inputs, layout, backend=backend)


@pytest.mark.parametrize("backend", [None, *ON_CPU])
@pytest.mark.parametrize("which", range(3))
def test_jvp_raises(which, backend):
    layout = LAYOUTS["hidden"]
    inputs = drawn(layout, 3, dtype=torch.float32)

    def of(value):
        arguments = [*inputs[:which], value, *inputs[which + 1 :]]
        return mk.masked_linear(*arguments, layout, backend=backend)

    with pytest.raises(mk.BackendError, match=r"forward-mode|torch\.func"):
        torch.func.jvp(of, (inputs[which],), (torch.randn_like(inputs[which]),))
    with pytest.raises(mk.BackendError, match=r"forward-mode|torch\.func"):
        torch.func.jacfwd(of)(inputs[which])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_func_transforms_agree_with_autograd(name, activation):
    layout = LAYOUTS[name]
    inputs = drawn(layout, 4, grad=True)
    y = mk.masked_linear(*inputs, layout, activation)
    cotangent = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, cotangent)
    plain = [t.detach() for t in inputs]

    def of(*inputs):
        return mk.masked_linear(*inputs, layout, activation)

    value, pull = torch.func.vjp(of, *plain)
    torch.testing.assert_close(value, y.detach())
    torch.testing.assert_close(pull(cotangent), expected)

    def loss(*inputs):
        return (of(*inputs) * cotangent).sum()

    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*plain), expected)
    torch.testing.assert_close(
        torch.func.vmap(of, (0, None, None))(*plain), y.detach(), rtol=1e-12, atol=1e-12
    )
    per_sample = torch.func.vmap(
        torch.func.grad(lambda w, x, c: (of(x, w, plain[2]) * c).sum()), (None, 0, 0)
    )(plain[1], plain[0], cotangent)
    torch.testing.assert_close(per_sample.sum(0), expected[1])


def test_func_transforms_refuse_a_backend_that_cannot():
    layout = LAYOUTS["hidden"]
    x, weight, bias = drawn(layout, 4)
    with pytest.raises(mk.BackendError, match=r"'torch'.*'reference'"):
        torch.func.vmap(lambda x: mk.masked_linear(x, weight, bias, layout, backend="torch"))(x)


def test_functional_call_over_an_ensemble():
    nets = [network() for _ in range(3)]
    for k, net in enumerate(nets):
        nn.init.normal_(net.layers[0].weight, std=k + 1)
    parameters, buffers = torch.func.stack_module_state(nets)
    x = x_of(5)
    together = torch.func.vmap(
        lambda p, b: torch.func.functional_call(nets[0], (p, b), (x,)), randomness="error"
    )(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([net(x) for net in nets]))


# --- torch.compile and torch.export ------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(call, net, rows):
    net.zero_grad()
    x = x_of(*rows).requires_grad_()
    y = call(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_with_a_dynamic_batch(compiler, dynamic):
    net = network("gelu")
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in [(5,), (8,), (17,), (3, 4), (2, 9)]:
        ours, plain = train(compiled, net, rows), train(net, net, rows)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for rows in (6, 11):
            torch.testing.assert_close(compiled(x_of(rows)), net(x_of(rows)))


@pytest.mark.filterwarnings("ignore:torch.func transforms")
@pytest.mark.parametrize("what", ["layer", "network", "loss"])
@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_under_compile_are_those_outside(what):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(mk.SubsetFamily.powerset({"a": 3, "b": 4}), [8])
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    module = {"layer": net.layers[0], "network": net, "loss": Loss(net)}[what]

    def of(parameters, x):
        given = (x, y) if what == "loss" else (x,)
        return torch.func.functional_call(module, parameters, given).square().sum()

    parameters = dict(module.named_parameters())
    x = torch.randn(5, 7)
    for transformed in (
        lambda p, x: torch.func.grad(of, (0, 1))(p, x),
        lambda p, x: torch.func.vmap(lambda row: of(p, row.expand(5, 7)))(x),
    ):
        expected = transformed(parameters, x)
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(parameters, x), expected)
    inside = torch.func.grad(torch.compile(of, backend="aot_eager"), 1)
    torch.testing.assert_close(inside(parameters, x), torch.func.grad(of, 1)(parameters, x))
    with pytest.raises(Exception, match="no forward-mode derivative"):
        torch.compile(lambda x: torch.func.jvp(lambda x: of(parameters, x), (x,), (x,)))(x)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_serves_every_batch():
    net = network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 8, 17, 31):
        torch.testing.assert_close(compiled(x_of(rows)), net(x_of(rows)))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, "silu") for name in LAYOUTS), ("hidden", None), ("hidden", "relu")],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_every_layout_compiles(name, activation):
    layout = LAYOUTS[name]
    for bias, backend in ((True, None), (False, None), (True, "reference")):
        layer = mk.MaskedLinear.from_layout(layout, bias, activation=activation, backend=backend)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        results = []
        for call in (compiled, layer):
            torch.manual_seed(1)
            x = torch.randn(4, layout.in_features, requires_grad=True)
            layer.zero_grad()
            y = call(x)
            y.backward(torch.randn_like(y))
            results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_function_tells_layouts_apart(backend):
    """Of one shape they are, and of as many weights."""

    def of(x, weight, layout):
        return mk.masked_linear(x, weight, None, layout, backend=backend)

    lower, upper = (torch.tensor(m).bool() for m in ([[1, 0], [1, 1]], [[1, 1], [0, 1]]))
    layouts = [
        mk.BlockLayout([2, 2], [3, 3], present, routes)
        for present, routes in ((lower, None), (upper, None), (lower, torch.eye(2) > 0))
    ]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(of, fullgraph=True, backend=counter)
    for layout in (*layouts, pickle.loads(pickle.dumps(layouts[0]))):
        x, weight, _ = drawn(layout, 5, dtype=torch.float32, grad=True)
        plain, ours = of(x, weight, layout), compiled(x, weight, layout)
        cotangent = torch.randn_like(ours)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (x, weight), cotangent),
            torch.autograd.grad(plain, (x, weight), cotangent),
        )
    assert counter.frame_count >= 3


LOAD = """
import sys, torch
import maskmoe_kernels
for path in sys.argv[1:]:
    program = torch.export.load(path + ".pt2").module()
    for x, expected in torch.load(path + ".cases"):
        torch.testing.assert_close(program(x), expected, rtol=0, atol=0)
    print("loaded", path)
"""


@pytest.mark.slow
def test_exports_load_in_a_fresh_process(tmp_path):
    """One process for all: none has built a layout before it loads the first."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    paths = []
    for strict, trained in [(True, True), (False, True), (False, False)]:
        net = network("gelu").requires_grad_(trained)
        program = torch.export.export(net, (x_of(5),), dynamic_shapes=({0: batch},), strict=strict)
        paths.append(str(tmp_path / f"strict-{strict}-trained-{trained}"))
        torch.export.save(program, paths[-1] + ".pt2")
        cases = [(x_of(rows), net(x_of(rows)).detach()) for rows in (1, 5, 33)]
        torch.save(cases, paths[-1] + ".cases")
    command = [sys.executable, "-c", LOAD, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [f"loaded {path}" for path in paths]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_train_alike(copied):
    net = network()
    other = copied(net)
    ours, theirs = train(net, net, (5,)), train(other, other, (5,))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


# --- autocast, FLOPs ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_dtype(dtype, backend):
    layout = LAYOUTS["wide"]
    leaves = drawn(layout, 5, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", dtype):
        y = mk.masked_linear(*leaves, layout, "tanh", backend)
        assert nn.functional.linear(*drawn(layout, 5, dtype=torch.float32)[:1], torch.ones(
            1, layout.in_features)).dtype == y.dtype == dtype  # fmt: skip
        double = drawn(layout, 5)
        if backend not in ("native", "triton"):  # which refuse float64 where they are named
            assert mk.masked_linear(*double, layout, backend=backend).dtype == torch.float64
    low = [t.detach().to(dtype).requires_grad_() for t in leaves]
    expected = mk.masked_linear(*low, layout, "tanh", backend)
    cotangent = torch.randn_like(expected)
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y, leaves, cotangent)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    for ours, theirs in zip(grads, torch.autograd.grad(expected, low, cotangent), strict=True):
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_of_a_layer_without_bias(backend):
    layout = LAYOUTS["wide"]
    x, weight, _ = drawn(layout, 5, dtype=torch.float32)
    expected = mk.masked_linear(x.bfloat16(), weight.bfloat16(), None, layout, "relu", backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mk.masked_linear(x, weight, None, layout, "relu", backend), expected)


def test_autocast_off_changes_nothing():
    layout = LAYOUTS["wide"]
    inputs = drawn(layout, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert mk.masked_linear(*inputs, layout).dtype == torch.float32


def test_autocast_of_another_device_changes_nothing():
    layout = LAYOUTS["wide"]
    inputs = drawn(layout, 5, dtype=torch.float32)
    expected = mk.masked_linear(*inputs, layout)
    other = "cpu" if inputs[0].is_cuda else "cuda"
    before = torch.is_autocast_enabled(other)
    torch.set_autocast_enabled(other, True)  # torch.autocast leaves off a device that is not here
    try:
        assert torch.equal(mk.masked_linear(*inputs, layout), expected)
    finally:
        torch.set_autocast_enabled(other, before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flops_count_present_blocks(name):
    layout = LAYOUTS[name]
    inputs = drawn(layout, 2, 5, grad=True)
    with FlopCounterMode(display=False) as forward:
        y = mk.masked_linear(*inputs, layout, "relu")
    assert forward.get_total_flops() == 2 * 10 * layout.num_weights
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.randn_like(y))
    routed = int(layout.grad_mask().sum())
    assert backward.get_total_flops() == 2 * 10 * (layout.num_weights + routed)


# --- Errors name the argument, what it must be and what it is ----------------------------


WRONG = {
    "features": (lambda x, w, b: (x[:, 1:], w, b), r"x must be .*in_features=20, got \(3, 19\)"),
    "scalar": (lambda x, w, b: (x.sum(), w, b), r"x must be .*got \(\)"),
    "integers": (lambda x, w, b: (x.long(), w, b), r"x must be floating-point, got torch\.int64"),
    "short weight": (lambda x, w, b: (x, w[1:], b), r"weight must .*\({n},\), got \({m},\).*pack"),
    "dense weight": (lambda x, w, b: (x, w[None], b), r"weight must .*\({n},\), got \(1, {n}\)"),
    "short bias": (lambda x, w, b: (x, w, b[1:]), r"bias must be .*\(17,\), got \(16,\)"),
    "column bias": (lambda x, w, b: (x, w, b[:, None]), r"bias must be .*\(17,\), got \(17, 1\)"),
    "weight dtype": (lambda x, w, b: (x, w.float(), b), r"float64 .*weight is torch\.float32"),
    "bias dtype": (lambda x, w, b: (x, w, b.half()), r"float64 .*bias is torch\.float16"),
    "bias device": (lambda x, w, b: (x, w, b.to("meta")), r"on cpu but bias is .*on meta"),
}


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_refused(case, backend):
    layout = LAYOUTS["hidden"]
    break_, message = WRONG[case]
    inputs = break_(*drawn(layout, 3))
    message = message.replace("{n}", str(layout.num_weights))
    with pytest.raises(mk.LayoutError, match=message.replace("{m}", str(layout.num_weights - 1))):
        mk.masked_linear(*inputs, layout, backend=backend)


def test_wrong_names_are_refused():
    layout = LAYOUTS["hidden"]
    inputs = drawn(layout, 3)
    with pytest.raises(mk.LayoutError, match=r"activation must be .*'gelu'.*got 'softplus'"):
        mk.masked_linear(*inputs, layout, "softplus")
    with pytest.raises(mk.BackendError, match=r"backend must be .*'torch'.*got 'cutlass'"):
        mk.masked_linear(*inputs, layout, backend="cutlass")
    with pytest.raises(mk.LayoutError, match="softplus"):
        mk.MaskedLinear.from_layout(layout, activation="softplus")


# --- The same from a process that never saw the layout -----------------------------------


def test_a_serialized_layout_is_enough():
    """The op rebuilds a layout it has not met, and refuses a plan that is not its own."""
    layout = mk.BlockLayout([2, 3], [4, 1], torch.tensor([[1, 0], [1, 1]]).bool())
    x, weight, bias = drawn(layout, 3)
    plan, number, out = serialized_layout(layout, x.device).clone(), layout.id, layout.out_features
    expected = dense_oracle(x, weight, bias, layout)
    other = serialized_layout(LAYOUTS["wide"], x.device)
    del layout
    for name, dtype in reversed(OPS):
        x, weight, bias, expected = (t.to(dtype) for t in (x, weight, bias, expected))
        op = getattr(torch.ops.maskmoe, name)
        with pytest.raises((mk.LayoutError, RuntimeError), match="describes layout"):
            op(x, weight, bias, other, number, out, "none", False)
        y = op(x, weight, bias, plan, number, out, "none", False)[0]
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_inference_mode_and_no_grad(name):
    layout = LAYOUTS[name]
    inputs = drawn(layout, 3, grad=True)
    expected = mk.masked_linear(*inputs, layout, "silu").detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = mk.masked_linear(*inputs, layout, "silu")
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_parameters_may_be_trained_in_place_of_each_other():
    """A frozen layer still passes its gradient on, and a frozen input still trains the layer."""
    layout = LAYOUTS["hidden"]

    def op(x, weight, bias, layout, activation):
        first = mk.masked_linear(x.detach(), weight, bias, layout, activation)
        second = mk.masked_linear(x, weight.detach(), bias.detach(), layout, activation)
        return (first + second) / 2 + (second - first) / 2  # second's value, both gradients halved

    x, weight, bias = drawn(layout, 4)
    halves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = op(*halves, layout, "gelu")
    assert_close_to_oracle(mk.masked_linear, x, weight, bias, layout, "gelu")
    (grad_x,) = torch.autograd.grad(y, halves[0], torch.ones_like(y).cumsum(0))
    whole = x.clone().requires_grad_()
    z = mk.masked_linear(whole, weight, bias, layout, "gelu")
    (expected,) = torch.autograd.grad(z, whole, torch.ones_like(z).cumsum(0))
    torch.testing.assert_close(grad_x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 1, 4), (3, 1, 2), (1, 1), (4,)])
@pytest.mark.filterwarnings("ignore:.*mask:UserWarning")
def test_the_same_bits_with_and_without_a_graph(shape, backend):
    """torch folds a product of more than two dimensions where a gradient is asked for, else not."""
    if unsupported_reason("masked_linear", backend, None, (torch.empty(0),)) is not None:
        pytest.skip("these kernels do not run on the CPU")
    mask = torch.rand(5, 25, generator=torch.Generator().manual_seed(0)) < 0.6
    for layout in (*LAYOUTS.values(), mk.BlockLayout.from_mask(mask)):
        x, weight, _ = drawn(layout, *shape, dtype=torch.float32)
        order = [*reversed(range(x.dim()))]
        x = x.permute(order).contiguous().permute(order)  # features lie far apart
        y = mk.masked_linear(x, weight.requires_grad_(), None, layout, None, backend)
        with torch.no_grad():
            again = mk.masked_linear(x, weight, None, layout, None, backend)
        assert torch.equal(y.view(torch.int32), again.view(torch.int32))
