"""On a GPU: offsets past 2^31, CUDA graphs, streams, devices, the same bits under memory pressure.

Where a test can be rehearsed on any machine, a small version of it runs there.
"""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.ops.dispatch import BACKENDS
from maskmoe_kernels.ops.masked_linear.reference import dense_oracle
from maskmoe_kernels.testing import assert_blind, assert_close_to_oracle, strategies

GROUPS = {"a": 7, "b": 1, "c": 33, "d": 16}
FAMILY = mk.SubsetFamily.powerset(GROUPS)
RAGGED = mk.SubsetFamily(
    {"a": 7, "b": 1, "c": 33},
    {"none": [], "a": ["a"], "ab": ["b", "a"], "c": ["c"], "all": ["a", "b", "c"]},
)
STRIPES = torch.arange(33)[:, None] % 3 >= torch.arange(34) % 4
LAYOUTS = {
    "hidden": FAMILY.hidden_layout(16, 16),
    "wide": mk.SubsetFamily.powerset({"a": 1, "b": 1}).hidden_layout(128, 128),
    "input": FAMILY.input_layout(24),
    "ragged": RAGGED.hidden_layout([33, 7, 1, 16, 7], [7, 1, 33, 17, 1]),
    "interleaved": mk.BlockLayout.from_mask(STRIPES.repeat(2, 2)),
}
ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "tanh", "silu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: What may run on a GPU; None is what the library chooses there.
CHOICES = [None, *(name for name in BACKENDS if name not in ("native", "reference"))]

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
choices = pytest.mark.parametrize("backend", CHOICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def where(request, device):
    """The device under test; of a test for GPUs, a GPU."""
    if request.node.get_closest_marker("cuda") and device.type != "cuda":
        return torch.device("cuda")
    return device


def drawn(layout, rows, dtype, device, seed=0):
    """x, weight, bias and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    shapes.append((rows, layout.out_features))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def step(layout, x, weight, bias, cotangent, activation=None, backend=None):
    """Output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = mk.masked_linear(*leaves, layout, activation, backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def assert_same_bits(found, expected):
    for name, a, b in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"), found, expected, strict=True
    ):
        assert a.shape == b.shape
        same = a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)
        assert bool(same.all()), f"{name}: {int((~same).sum())} bytes of {same.numel()} differ"


def need_free(where, gigabytes):
    free = torch.cuda.mem_get_info(where)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


# --- Invariants 3 and 1 --------------------------------------------------------------------


@pytest.mark.cuda
@given(
    strategies.layouts(),
    st.sampled_from(CHOICES),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([*DTYPES, torch.float64]),
    st.integers(0, 40),
    st.integers(0, 2**16),
)
def test_matches_oracle(layout, backend, activation, dtype, rows, seed):
    if backend == "triton" and dtype == torch.float64:
        backend = None
    inputs = drawn(layout, rows, dtype, "cuda", seed)[:3]
    assert_close_to_oracle(
        lambda *args: mk.masked_linear(*args, backend), *inputs, layout, activation, seed=seed
    )


@pytest.mark.cuda
@choices
@dtypes
@layouts
@pytest.mark.parametrize("rows", [1, 127, 4096])
def test_matches_oracle_at_sizes_of_a_gpu(layout, rows, dtype, backend, where):
    inputs = drawn(layout, rows, dtype, where)[:3]
    assert_close_to_oracle(lambda *args: mk.masked_linear(*args, backend), *inputs, layout, "gelu")


@pytest.mark.cuda
@dtypes
@layouts
def test_is_blind(layout, dtype, where):
    x, weight, bias, _ = drawn(layout, 17, dtype, where)
    assert_blind(lambda x: mk.masked_linear(x, weight, bias, layout, "relu"), x, layout.mask())


CUTS = {
    "small blocks": mk.SubsetFamily.powerset(dict.fromkeys("abcd", 16)).hidden_layout(16, 16),
    "few small blocks": mk.SubsetFamily.powerset(dict.fromkeys("abc", 16)).hidden_layout(16, 16),
    "runs": mk.SubsetFamily.powerset(dict.fromkeys("ab", 64)).hidden_layout(64, 64),
    "wide blocks": mk.SubsetFamily.powerset(dict.fromkeys("abc", 64)).hidden_layout(64, 64),
    "wide tiles": mk.SubsetFamily.powerset(dict.fromkeys("ab", 136)).hidden_layout(136, 136),
    "ragged": LAYOUTS["ragged"],
    "interleaved": LAYOUTS["interleaved"],
}
#: Largest relative error of the norm.
ERRORS = {"float32": 1e-5, "tf32": 3e-3, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.fixture
def ways(monkeypatch, where):
    """Gives what ``run`` returns, once for each configuration that would be measured."""
    launch = pytest.importorskip("maskmoe_kernels.ops.masked_linear.triton.launch")
    from maskmoe_kernels.ops.masked_linear.triton import configs, products, tune

    if where.type == "cpu":
        monkeypatch.setattr(configs, "_PACKED_ROWS", 1)

    def each(run):
        k = most = 0
        while k <= most:
            numbers = []

            def choose(kind, layout, rows, precision, options, run, k=k, numbers=numbers):
                found = options()
                numbers.append(len(found) - 1)
                return found[min(k, len(found) - 1)]

            monkeypatch.setattr(tune, "choose", choose)
            products.forget()
            yield k, run(launch)
            k, most = k + 1, max(numbers)
        monkeypatch.undo()
        products.forget()

    return each


@pytest.mark.parametrize("layout", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("dtype", ERRORS)
def test_every_way_to_cut_it_is_right_and_blind(layout, dtype, ways, where):
    quick = dtype == "float16" and layout in (CUTS["few small blocks"], CUTS["runs"])
    if where.type == "cpu" and not quick:
        pytest.skip("for a GPU: the interpreter takes a minute")
    rows, size = (19 if where.type == "cpu" else 4133), torch.float32
    if dtype != "tf32":
        size = getattr(torch, dtype)
    x, weight, bias, grad = drawn(layout, rows, size, where)
    unseen, unrouted = ~layout.mask(), ~layout.grad_mask()
    dirty_x, dirty_grad = x.clone(), grad.clone()
    features = [0, layout.in_features // 2, layout.in_features - 1]
    units = [0, layout.out_features // 2, layout.out_features - 1]
    for row, feature, unit, value in zip(
        (0, rows // 2, rows - 1), features, units, (float("nan"), float("inf"), -float("inf")),
        strict=True,
    ):  # fmt: skip
        dirty_x[row, feature] = value
        dirty_grad[row, unit] = value

    act, needs = "silu", (True, True, True)  # smooth: no derivative flips where y is rounded

    def run(launch):
        y, z = launch.forward(x, weight, bias, layout, act, True)
        grads = launch.backward(grad, x, weight, z, layout, act, needs)
        dirty_y, _ = launch.forward(dirty_x, weight, bias, layout, act, True)
        dirty_gx, *_ = launch.backward(dirty_grad, x, weight, z, layout, act, needs)
        return y, *grads, dirty_y, dirty_gx

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = dense_oracle(*leaves, layout, act)
    wanted = [expected, *torch.autograd.grad(expected, leaves, grad.double())]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == "tf32" else "highest")
    try:
        for k, (*found, dirty_y, dirty_gx) in ways(run):
            for name, a, b in zip("y x weight bias".split(), found, wanted, strict=True):
                error = (a.double() - b).norm() / b.norm()
                assert error < ERRORS[dtype], f"way {k}, {name}: {error:.2e}"
            for row, feature, unit in zip((0, rows // 2, rows - 1), features, units, strict=True):
                blind = unseen[:, feature].to(where)
                assert torch.equal(dirty_y[row, blind], found[0][row, blind]), f"way {k}"
                assert not dirty_y[row, ~blind].isfinite().any(), f"way {k}"
                blind = unrouted[unit].to(where)
                assert torch.equal(dirty_gx[row, blind], found[1][row, blind]), f"way {k}"
                assert not dirty_gx[row, ~blind].isfinite().any(), f"way {k}"
    finally:
        torch.set_float32_matmul_precision(before)


# --- Invariant 8: offsets past 2^31 ------------------------------------------------------


def rows_to_check(layout, rows):
    """The first, the last, and those where an offset passes 2^30 (bytes: 2^31), 2^31 and 2^32."""
    chosen = {0, 1, 2, rows - 3, rows - 2, rows - 1}
    for features in (layout.in_features, layout.out_features):
        for limit in (2**30, 2**31, 2**32):
            chosen |= {limit // features + k for k in range(-2, 3)}
    return torch.tensor(sorted(k for k in chosen if 0 <= k < rows))


@pytest.mark.parametrize(
    ("elements", "width", "dtype"),
    [
        pytest.param(2**31 + 2**20, 64, torch.bfloat16, marks=pytest.mark.cuda),
        (2**12, 4, torch.float32),
    ],
    ids=["big", "rehearsal"],
)
@pytest.mark.parametrize("kind", ["hidden", "input"])
def test_big_offsets(kind, elements, width, dtype, where):
    """A few rows of a huge batch are held to the oracle; their cotangent alone is not zero.

    So the gradient of the weight is a sum over known rows, and a row read from the wrong place
    is a wrong number.
    """
    hidden = kind == "hidden"
    layout = FAMILY.hidden_layout(width, width) if hidden else FAMILY.input_layout(width)
    rows = -(-elements // layout.out_features)
    if where.type == "cuda":
        need_free(where, 40)
    chosen = rows_to_check(layout, rows).to(where)
    generator = torch.Generator(where).manual_seed(1)
    noise = torch.randn(rows, layout.in_features, dtype=dtype, device=where, generator=generator)
    untouched = {}

    def few_of_many(x, weight, bias, layout, activation):
        many = noise.index_copy(0, chosen, x)
        many.register_hook(lambda grad: untouched.update(grad=int(grad.count_nonzero())))
        y = mk.masked_linear(many, weight, bias, layout, activation)
        return y.index_select(0, chosen)

    inputs = drawn(layout, len(chosen), dtype, where)[:3]
    assert_close_to_oracle(few_of_many, *inputs, layout, "silu")
    # Nothing was written to the gradient of the rows between.
    assert 0 < untouched["grad"] <= chosen.numel() * layout.in_features


# --- Invariant 7: CUDA graphs, streams, devices ------------------------------------------


@pytest.mark.cuda
@choices
@dtypes
@layouts
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_graph_replays_what_eager_computes(layout, activation, dtype, backend, where):
    static = drawn(layout, 256, dtype, where)
    side = torch.cuda.Stream(where)
    side.wait_stream(torch.cuda.current_stream(where))
    with torch.cuda.stream(side):  # plans, tables and tuned configurations
        for _ in range(3):
            step(layout, *static, activation, backend)
    torch.cuda.current_stream(where).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(layout, *static, activation, backend)
    for seed in (1, 2):
        fresh = drawn(layout, 256, dtype, where, seed)
        expected = step(layout, *fresh, activation, backend)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        for result in replayed:
            result.fill_(torch.nan)
        graph.replay()
        assert_same_bits(replayed, expected)


@pytest.mark.cuda
@choices
@layouts
def test_other_streams(layout, backend, where):
    """Many at once, each on a stream of its own, with other work in front of it."""
    batches = [drawn(layout, 999, torch.float32, where, seed) for seed in range(8)]
    expected = [step(layout, *batch, "tanh", backend) for batch in batches]
    torch.cuda.synchronize(where)
    streams = [torch.cuda.Stream(where) for _ in batches]
    found = []
    for stream, batch in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            late = [t.clone() for t in batch]
            poison = [t.fill_(torch.nan) for t in (torch.empty_like(u) for u in batch)]
            torch.cuda._sleep(1_000_000)  # cycles: what ran on another stream would read NaN
            for place, value in zip(poison, late, strict=True):
                place.copy_(value)
            found.append(step(layout, *poison, "tanh", backend))
    torch.cuda.synchronize(where)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.cuda
@choices
@layouts
def test_several_devices(layout, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    first, second = (torch.device("cuda", k) for k in range(2))
    batch = drawn(layout, 100, torch.float32, first)
    with torch.cuda.device(first):  # the tensors' device counts, not the current one
        found = step(layout, *(t.to(second) for t in batch), "relu", backend)
    assert all(t.device == second for t in found)
    expected = step(layout, *batch, "relu", backend)
    torch.testing.assert_close([t.to(first) for t in found], expected)


@pytest.mark.cuda
@layouts
def test_a_call_waits_for_nothing(layout, where):
    """No host sync: the mode in which torch raises on one."""
    batch = drawn(layout, 64, torch.float32, where)
    step(layout, *batch, "gelu")
    torch.cuda.synchronize(where)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layout, *batch, "gelu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Invariant 4: the same bits ----------------------------------------------------------


class Pressure:
    """Blocks of random sizes come and go, full of NaN: what is not written shows."""

    def __init__(self, device, largest):
        self.device, self.largest = device, largest
        self.random = random.Random(0)
        self.held = []

    def change(self):
        for _ in range(4):
            size = int(self.largest ** self.random.uniform(0.4, 1.0))
            self.held.append(torch.full((size,), torch.nan, device=self.device))
        self.random.shuffle(self.held)
        del self.held[24:]
        if self.device.type == "cuda" and self.random.random() < 0.1:
            torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("times", "rows", "largest"),
    [pytest.param(100, 5000, 2**24, marks=pytest.mark.cuda), (4, 33, 2**12)],
    ids=["a hundred times", "rehearsal"],
)
@dtypes
@layouts
def test_same_bits_under_memory_pressure(layout, dtype, times, rows, largest, where):
    batch = drawn(layout, rows, dtype, where)
    expected = [t.clone() for t in step(layout, *batch, "silu")]
    assert all(bool(t.isfinite().all()) for t in expected)
    pressure = Pressure(where, largest)
    for _ in range(times):
        pressure.change()
        assert_same_bits(step(layout, *batch, "silu"), expected)


# --- The tests' own eyes -----------------------------------------------------------------


def test_one_bit_is_seen(where):
    layout = LAYOUTS["ragged"]
    expected = step(layout, *drawn(layout, 5, torch.float32, where))
    found = [t.clone() for t in expected]
    found[2].view(torch.int32)[3] ^= 1
    with pytest.raises(AssertionError, match=r"grad_weight: 1 bytes"):
        assert_same_bits(found, expected)


def test_a_wrong_row_is_seen(where, monkeypatch):
    """What an offset that wraps around would do."""
    right = mk.masked_linear

    def wrapped(x, *args):
        return right(torch.cat([x[:-1], x[:1]]), *args)

    monkeypatch.setattr(mk, "masked_linear", wrapped)
    with pytest.raises(AssertionError, match="the float64 oracle says"):
        test_big_offsets("hidden", 2**12, 4, torch.float32, where)
