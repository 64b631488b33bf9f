"""The C++ kernels as a user meets them: chosen, forced, threaded, forked, and refused in words."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.ops import native
from maskmoe_kernels.testing import assert_close_to_oracle, strategies

pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON)
)

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 5, "c": 2})
# Panels of every kind: whole vectors, two vectors, ragged ones, small blocks that share one.
LAYOUTS = {
    "full vectors": FAMILY.hidden_layout(16, 16),
    "wide": FAMILY.hidden_layout(64, 48),
    "ragged": FAMILY.hidden_layout([1, 7, 33, 16, 17, 2, 40], [33, 1, 20, 16, 3, 9, 18]),
    "one unit": FAMILY.hidden_layout(16, 1),
    "one input": FAMILY.hidden_layout(1, 16),
    "input": FAMILY.input_layout(16),
    # Nested sets in no order: panels cross blocks, and both sides are gathered and scattered.
    "staircase": mk.BlockLayout.from_mask(
        (torch.arange(90) % 11)[:, None] >= torch.arange(45) % 11
    ),
}


@pytest.fixture(autouse=True)
def _threads_and_isa_stay():
    threads, isa = torch.get_num_threads(), native.isa()
    yield
    torch.set_num_threads(threads)
    native.set_isa(isa)


def drawn(layout, rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    shapes.append((rows, layout.out_features))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def step(layout, x, weight, bias, cotangent, activation="relu"):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = mk.masked_linear(*leaves, layout, activation, backend="native")
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 13, 63, 64, 129, 600])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("isa", native.isas())
def test_every_panel_and_tile(isa, name, rows, dtype):
    """Row counts around the tiles and the threshold from which weights are copied together."""
    native.set_isa(isa)
    *inputs, _ = drawn(LAYOUTS[name], rows, dtype)
    assert_close_to_oracle(
        lambda *args: mk.masked_linear(*args, backend="native"), *inputs, LAYOUTS[name], "relu"
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", native.isas())
def test_any_number_of_threads(isa, threads):
    """A row's output has the same bits whoever computes it; sums over rows are close."""
    native.set_isa(isa)
    layout = LAYOUTS["wide"]
    x, weight, bias, cotangent = drawn(layout, 4001)
    torch.set_num_threads(1)
    alone = step(layout, x, weight, bias, cotangent)
    torch.set_num_threads(threads)
    together = step(layout, x, weight, bias, cotangent)
    again = step(layout, x, weight, bias, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])
    for a, b in zip(alone[2:], together[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@given(strategies.layouts(), st.integers(1, 40), st.integers(0, 2**16))
def test_a_row_does_not_depend_on_its_neighbours(layout, rows, seed):
    """Tiles of any height add in the same order: a batch is its rows, bit for bit."""
    x, weight, bias, _ = drawn(layout, rows)
    y = mk.masked_linear(x, weight, bias, layout, "tanh", backend="native")
    row = seed % rows
    one = mk.masked_linear(x[row : row + 1], weight, bias, layout, "tanh", backend="native")
    assert torch.equal(y[row : row + 1], one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [7, 8, 49, 130])
@pytest.mark.parametrize("isa", native.isas())
def test_what_is_not_finite_stays_in_its_row_and_with_who_sees_it(isa, rows, dtype):
    """Tiles of finite values are multiplied without masks, others with them: the same bits."""
    native.set_isa(isa)
    layout = LAYOUTS["staircase"]
    x, weight, bias, cotangent = drawn(layout, rows, dtype)
    y, grad_x, *_ = step(layout, x, weight, bias, cotangent, None)
    row, feature, unit = rows - 1, 5, 14
    x[row, feature], cotangent[row, unit] = torch.nan, torch.inf
    spoilt, spoilt_grad, *_ = step(layout, x, weight, bias, cotangent, None)
    mask = layout.mask()
    for before, after, reached in (
        (y, spoilt, mask[:, feature]),
        (grad_x, spoilt_grad, mask[unit]),
    ):
        assert 0 < reached.sum() < reached.numel()
        assert torch.equal(before[:row], after[:row])
        assert torch.equal(before[row, ~reached], after[row, ~reached])
        assert not after[row, reached].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", native.isas())
def test_the_sign_of_a_zero_tells_nothing_of_what_is_not_seen(isa, dtype):
    native.set_isa(isa)
    layout = LAYOUTS["staircase"]
    feature = 10  # that few units see
    unseen = ~layout.mask()[:, feature]
    bits = []
    for value in (1.0, -1.0, torch.inf):
        x = torch.full((50, layout.in_features), -(2.0**-100))
        x[:, feature] = value
        weight = torch.full((layout.num_weights,), 2.0**-100)  # products are rounded to -0
        bias = torch.full((layout.out_features,), -0.0)
        y = mk.masked_linear(
            x.to(dtype), weight.to(dtype), bias.to(dtype), layout, backend="native"
        )
        assert not y[:, unseen].any()
        bits.append(y[:, unseen].float().view(torch.int32))
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])


def test_instruction_sets_agree():
    layout = LAYOUTS["ragged"]
    inputs = drawn(layout, 300)
    results = []
    for isa in native.isas():
        native.set_isa(isa)
        assert native.isa() == isa == mk.info()["isa"]["used"]
        results.append(step(layout, *inputs))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_unknown_instruction_sets_are_refused():
    with pytest.raises(mk.BackendError, match=r"no kernels for 'sse9' here; there are \['"):
        native.set_isa("sse9")


def test_float64_named_is_refused_and_unnamed_is_computed():
    layout = LAYOUTS["full vectors"]
    x, weight, bias, _ = (t.double() for t in drawn(layout, 4))
    with pytest.raises(mk.BackendError, match=r"'native' cannot run: x is torch.float64; .*16"):
        mk.masked_linear(x, weight, bias, layout, backend="native")
    y = mk.masked_linear(x, weight, bias, layout)
    torch.testing.assert_close(y, mk.masked_linear(x, weight, bias, layout, backend="torch"))


def test_an_op_called_by_name_refuses_float64_and_names_the_remedy():
    layout = LAYOUTS["full vectors"]
    x, weight, bias, grad_y = (t.double() for t in drawn(layout, 4))
    fixed = serialized_layout(layout, x.device), layout.id
    said = r"x is Double; .* float16\. Convert it, or choose another backend: backend='torch'"
    ops = torch.ops.maskmoe
    with pytest.raises(RuntimeError, match=f"masked_linear: {said}"):
        ops.masked_linear(x, weight, bias, *fixed, layout.out_features, "relu", True)
    needs = (True, True, True)
    with pytest.raises(RuntimeError, match=f"masked_linear_backward: {said}"):
        ops.masked_linear_backward(grad_y, x, weight, grad_y, *fixed, "relu", *needs)


def test_as_many_dimensions_as_torch_has():
    layout = LAYOUTS["input"]
    x, weight, bias, cotangent = drawn(layout, 1)
    want = step(layout, x, weight, bias, cotangent)
    x, cotangent = (t.view(*[1] * 63, -1) for t in (x, cotangent))
    for one, other in zip(step(layout, x, weight, bias, cotangent), want, strict=True):
        assert torch.equal(one.view_as(other), other)
    with pytest.raises(RuntimeError, match="at most 64 dimensions, got 65"):
        step(layout, x[None], weight, bias, cotangent[None])


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, k):
        layout = LAYOUTS["wide"]
        x, weight, bias, _ = drawn(layout, 500)
        return mk.masked_linear(x + k, weight, bias, layout, backend="native")[-1]


def test_forked_workers():
    """After this process has used threads, workers that are forked from it still compute."""
    torch.set_num_threads(2)
    data = Rows()
    expected = torch.stack([data[k] for k in range(len(data))])
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_forces_an_instruction_set():
    code = "import maskmoe_kernels as mk; print(mk.info()['isa']['used'])"
    for isa in native.isas():
        assert run(code, MASKMOE_ISA=isa).stdout.split() == [isa]
    wrong = run(code, MASKMOE_ISA="sse9")
    assert wrong.returncode != 0
    assert "no kernels for 'sse9' here" in wrong.stderr


def test_an_extension_that_does_not_load_gives_its_reason(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    code = (
        "import torch, maskmoe_kernels as mk\n"
        "print(mk.info()['backends']['native']['unsupported_reason'])\n"
        "layer = mk.MaskedLinear(2, 2, torch.eye(2).bool())\n"
        "print(layer(torch.ones(1, 2)).shape)\n"
    )
    done = run(code, MASKMOE_EXTENSION=str(broken))
    assert "the extension does not load" in done.stdout, done.stderr
    assert "torch.Size([1, 2])" in done.stdout
    said = "masked_linear runs in plain PyTorch: no native kernels, the extension does not load"
    assert done.stderr.count(said) == 1


def test_a_missing_reason_is_a_reason():
    """Without the library the package works, and says how to get it."""
    done = run(
        "import sys; sys.modules['maskmoe_kernels._C'] = None\n"
        "import maskmoe_kernels as mk\n"
        "print(mk.info()['backends']['native']['unsupported_reason'])",
        MASKMOE_EXTENSION="",
    )
    assert "the C++ extension is not there" in done.stdout, done.stderr
