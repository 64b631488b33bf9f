"""float32 networks follow torch's float32_matmul_precision; run by the twin on the host."""

from contextlib import contextmanager

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.masked_mlp import schema
from tests.ops import cuda_twin
from tests.ops.cuda_cases import (
    ACTIVATIONS,
    NETWORKS,
    POWER,
    TOY,
    check_blind,
    check_isolated,
    check_order,
    check_own_logits,
    cotangent_of,
    everything,
    names,
    targets,
)
from tests.ops.cuda_twin import configure, draw, hold

REASON = cuda_twin.obstacle()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("usual_machine"),
]
if REASON is None:
    torch.library.register_fake("maskmoe_twin::masked_mlp", schema._forward_fake)
#: Networks that have products (a single layer is summed up without tensor cores).
DEEP = [name for name in NETWORKS if name != "no hidden"]


@contextmanager
def precision(name):
    """torch's setting. What PyTorch computes inside may follow it too: references stay outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def each_precision(function):
    """What ``function()`` returns under "highest", "high" and "medium"."""
    found = []
    for name in ("highest", "high", "medium"):
        with precision(name):
            found.append(function())
    return found


def smooth(name):
    """An activation without kinks, whose derivative is not 1 everywhere."""
    return ("gelu", "tanh", "silu")[DEEP.index(name) % 3]


def rounded(values):
    """The nearest float32 with 11 digits, ties away from zero."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_medium_rounds_the_factors_of_a_product_and_nothing_else(activation):
    """Sums, biases, activations and the last layer keep float32's digits."""
    net = draw(POWER, [[16, 5, 33, 1, 16, 20, 7]], 70, activation)
    with precision("medium"):
        ours = net.forward()
    factors = [rounded(net.x), rounded(net.weights[0])]
    assert not torch.equal(factors[0], net.x)
    same = net.with_leaves([*factors, *net.leaves[2:]])
    magnitude, _ = same.magnitudes(cotangent_of(net, 70))
    reference = same.to(torch.float64).dense()
    hold("logits", ours, same.dense(), reference, magnitude, 2, False)


@pytest.mark.parametrize("name", DEEP)
def test_errors_are_those_of_one_product(name):
    """Near 1e-3, and far from 3xTF32's, in the logits and every gradient with a product in it."""
    net = NETWORKS[name](130, smooth(name))
    cotangent, exact = cotangent_of(net, 130), net.to(torch.float64)
    magnitude, magnitudes = net.magnitudes(cotangent)
    highest, high, medium = each_precision(lambda: [net.forward(), *net.backward(cotangent)])
    plain = [net.dense(), *net.dense_backward(cotangent)]
    reference = [exact.dense(), *exact.dense_backward(cotangent.double())]
    sums = [magnitude, *magnitudes]
    norm, layers = torch.linalg.vector_norm, len(net.layouts)
    assert all(torch.equal(a, b) for a, b in zip(highest, high, strict=True))
    for what, *values in zip(
        ["logits", *names(net)], high, medium, plain, reference, sums, strict=True
    ):
        three, one, theirs, truth, size = values
        # Twice 2^-11 a product, forward and then backward.
        hold(what, one, theirs, truth, size, layers, False, eps=2.0**-11)
        if what == f"bias {layers - 1}":
            assert torch.equal(one, three)  # the sum of what was given
            continue
        error = norm(one.double() - truth) / norm(truth)
        assert 3e-5 < error < 3e-3, (what, error)
        assert error > 50 * norm(three.double() - truth) / norm(truth), what


@pytest.mark.parametrize("name", DEEP)
def test_objective_and_mixture_follow_it_too(name):
    net = NETWORKS[name](70, smooth(name))
    target, mask = targets(70)
    exact_loss, exact = net.to(torch.float64).dense_gem(target, mask=mask, normalize="sample")
    mixture = mk.mixture(net.to(torch.float64).dense(), net.family)

    def ours():
        loss, grads = net.gem(target, mask, normalize="sample")
        return [loss, *grads, *net.mixture()]

    highest, high, medium = each_precision(ours)
    assert all(torch.equal(a, b) for a, b in zip(highest, high, strict=True))
    truths = [exact_loss, *exact, *mixture]
    what = ["loss", *names(net), *mixture._fields]
    norm = torch.linalg.vector_norm
    for name_of, *values, truth in zip(what, high, medium, truths, strict=True):
        three, one = (norm(value.double() - truth) / norm(truth) for value in values)
        assert one < 5e-3, name_of
        assert one > 20 * three, name_of
    with precision("medium"):
        check_own_logits(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_types_do_not_ask(dtype):
    net = NETWORKS["ragged"](70, "gelu", dtype)
    highest, _, medium = each_precision(lambda: everything(net, 70))
    assert all(torch.equal(a, b) for a, b in zip(highest, medium, strict=True))


# --- When it is read -----------------------------------------------------------------------


def test_every_call_reads_it():
    """A backward has the setting of its own call, as PyTorch's has, not that of its forward."""
    net = NETWORKS["ncf"](70, "tanh")
    cotangent = cotangent_of(net, 70)
    forward, backward = net.forward, lambda: net.backward(cotangent)
    (exact, _, rounded_logits), (grads, _, rounded_grads) = map(each_precision, (forward, backward))
    with precision("medium"):
        assert torch.equal(forward(), rounded_logits)
    assert all(torch.equal(a, b) for a, b in zip(backward(), grads, strict=True))
    assert torch.equal(forward(), exact)
    with precision("medium"):
        assert all(torch.equal(a, b) for a, b in zip(backward(), rounded_grads, strict=True))
    assert not torch.equal(exact, rounded_logits)


def test_settings_that_torch_refuses_to_read_are_refused():
    net, of = NETWORKS["toy"](4), torch.backends.cuda.matmul
    if not hasattr(of, "fp32_precision"):
        pytest.skip("this torch has one way to set TF32")
    before = of.fp32_precision
    try:
        of.fp32_precision = "tf32"
        try:
            torch.get_float32_matmul_precision()
        except RuntimeError:
            pass
        else:
            pytest.skip("this torch reads any mix of settings")
        with pytest.raises(RuntimeError, match=r"call torch\.set_float32_matmul_precision"):
            net.forward()
    finally:
        of.fp32_precision = before
    assert net.forward().isfinite().all()


def test_a_compiled_function_reads_it_at_every_call():
    """The setting is no constant of the trace: it changes, and nothing is compiled again."""
    net = NETWORKS["ncf"](20, "tanh")
    *inputs, activation = net.arguments()
    experts = net.family.num_experts

    def logits(x):
        of = torch.ops.maskmoe_twin.masked_mlp(x, *inputs[1:], experts, activation, False)[0]
        return of * 2

    torch._dynamo.reset()
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    with precision("high"):
        assert torch.equal(compiled(net.x), logits(net.x))
        expected = logits(net.x)
    with precision("medium"), torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(net.x), logits(net.x))
        assert not torch.equal(compiled(net.x), expected)


# --- Laws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [torch.nan, -torch.inf, 3e4])
@pytest.mark.parametrize("name", ["ragged", "eight"])
def test_unseen_values_reach_nobody(name, fill):
    configure(processors=1000)
    with precision("medium"):
        check_blind(NETWORKS[name](18, "tanh"), 18, fill)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_expert_moves_its_own_parameters_only(activation):
    with precision("medium"):
        check_isolated(NETWORKS["powerset"](70, activation), 70)


@pytest.mark.parametrize("name", ["ragged", "ncf", "permuted", "many"])
def test_the_order_of_threads_does_not_matter(name):
    with precision("medium"):
        check_order(NETWORKS[name](150, "gelu"), 150)


@pytest.mark.parametrize("rows", [0, 1, 17, 33, (2, 3, 5)], ids=str)
def test_every_number_of_rows(rows):
    """However rows are cut, and where there are none, they have the same bits."""
    net = NETWORKS["ncf"](rows, "gelu")
    with precision("medium"):
        expected = net.forward()
        configure(100, 1000)
        assert torch.equal(net.forward(), expected)
        flat = net.with_leaves([net.x.reshape(-1, 16), *net.leaves[1:]])
        flat = cuda_twin.replace(flat, ids=[ids.flatten() for ids in net.ids])
        assert torch.equal(flat.forward(), expected.reshape(-1, 4))
        assert all(grad.isfinite().all() for grad in net.backward(cotangent_of(net, rows)))


def test_infinities_are_rounded_to_infinities():
    net = draw(TOY, [5, 3], 20, "tanh")
    x = net.x.clone()
    x[3, 0], x[4, 4], x[5, 1] = torch.inf, -torch.inf, torch.nan
    net = net.with_leaves([x, *net.leaves[1:]])
    plain = net.dense()
    assert plain[[3, 4]].isfinite().all()
    with precision("medium"):
        torch.testing.assert_close(net.forward(), plain, rtol=5e-3, atol=5e-3, equal_nan=True)


# --- On a GPU ------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", DEEP)
def test_errors_are_those_of_one_product_on_the_gpu(name):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("maskmoe::masked_mlp", "CUDA"):
        pytest.skip("the extension was built without CUDA")
    net = NETWORKS[name](300, smooth(name))
    cotangent = cotangent_of(net, 300)
    on_gpu = cuda_twin.replace(net, device="cuda")
    twin, (_, _, gpu) = (
        each_precision(lambda of=of: [of.forward(), *of.backward(cotangent)])
        for of in (net, on_gpu)
    )
    norm = torch.linalg.vector_norm
    for high, medium, ours in zip(twin[1], twin[2], gpu, strict=True):
        # Sums in another order round to other factors now and then, and stay as far from 3xTF32.
        assert norm(ours - medium) <= 2e-3 * norm(medium) + 1e-30
        assert norm(ours - high) >= 0.5 * norm(medium - high)
