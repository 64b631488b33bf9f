"""What is remembered of a launch: it launches what Triton's own launch would, of all it compiled.

Nothing is compiled here, and nothing runs: Triton's binder chooses among kernels that stand in.
"""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops import triton_support

triton = pytest.importorskip("triton")
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from maskmoe_kernels.ops.masked_linear.triton import (  # noqa: E402
    kernels,
    launch,
    operands,
    products,
    tune,
)
from maskmoe_kernels.ops.triton_support import launcher  # noqa: E402

STREAM = 7
_handles = count(1)


class Compiled(CompiledKernel):
    """Stands in for a kernel on a GPU: notes what it is launched with."""

    def __init__(self, launched):
        self.module, self.function, self.packed_metadata = None, next(_handles), (4, 1, 0)
        self.src = self.name = self._module_pid = None
        self._run = lambda *given: launched.append(plain(given))

    def launch_metadata(self, *given):
        return None


def plain(given):
    """What the launcher makes of it: addresses and numbers. What hooks there are is no part."""
    x, y, z, stream, function, metadata, _, _, _, *args = given
    return x, y, z, stream, function, metadata, [read(a) for a in args]


def read(value):
    if isinstance(value, TensorDescriptor):
        return value.base.data_ptr(), value.shape, value.strides, value.block_shape
    return value.data_ptr() if isinstance(value, torch.Tensor) else value or 0


class Kernel(JITFunction):
    """A kernel of the package whose compiler does nothing; counts Triton's own launches."""

    def __init__(self, kernel, launched):
        super().__init__(kernel.fn)
        self.ordinary = 0
        self.device_caches[0]  # makes the binder, and sets the compiler
        self.compile = lambda *given, **options: Compiled(launched)

    def run(self, *args, **options):
        self.ordinary += 1
        return super().run(*args, **options)


@pytest.fixture
def launched(monkeypatch):
    """What reached the GPU, which is an sm_90 without memory or processors."""
    found = []
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: STREAM,
    )
    monkeypatch.setattr(driver, "_active", gpu)
    names = ("forward", "reduce_parts", "backward", "total", "pack", "form", "transpose")
    made = {name: Kernel(getattr(kernels, name), found) for name in names}
    for module in (launch, operands):
        monkeypatch.setattr(module, "kernels", SimpleNamespace(**made))
    monkeypatch.setenv("MASKMOE_TUNE", "0")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, it warns
    for module in (launch, products):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    products.forget()
    yield found
    products.forget()


def ordinary():
    return sum(kernel.ordinary for kernel in vars(launch.kernels).values())


def compared(launched, monkeypatch):
    """Each launch three times: as it is, again, and as Triton does it. Gives the kernels chosen."""
    chosen = []

    def call(self, device, *tensors):
        del launched[:]
        real(self, device, *tensors)
        before = ordinary()
        real(self, device, *tensors)
        assert ordinary() == before  # that one was remembered
        self._kernel[self._grid](*tensors, *self._fixed, **self._options)
        first, again, own = launched
        assert first == again == own
        assert own[3] == STREAM
        chosen.append((self._kernel.__name__, own[4]))

    real = launcher.Launch.__call__
    monkeypatch.setattr(launcher.Launch, "__call__", call)
    return chosen


def room(*shape, offset=0, pad=0, dtype=torch.bfloat16):
    """A tensor that starts ``offset`` elements after an aligned address, with ``pad`` a row."""
    width = shape[-1] + pad
    rows = shape[0] if len(shape) == 2 else 1
    memory = torch.zeros(rows * width + 64, dtype=dtype)
    start = (-memory.data_ptr() // memory.itemsize) % 64 + offset
    strides = (width, 1)[2 - len(shape) :]
    return memory.as_strided(shape, strides, memory.storage_offset() + start)


# One feature of 16 and one of 17 in all: integers that are divisible by 16, and that are not.
EVEN = BlockLayout([16, 16], [32, 16], torch.tensor([[True, False], [True, True]]))
ODD = BlockLayout([16, 1], [16, 1], torch.tensor([[True, False], [True, True]]))
ONE = BlockLayout([1], [1], torch.tensor([[True]]))


@pytest.mark.parametrize("layout", [EVEN, ODD, ONE], ids=["even", "odd", "one"])
def test_what_is_remembered_is_what_triton_would_choose(layout, launched, monkeypatch):
    chosen = compared(launched, monkeypatch)
    kernels_of = {}
    cases = [
        (rows, pad, offsets, with_bias)
        for rows in (1, 16, 17)
        for pad in (0, 1, 16)
        for offsets in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (8, 4, 2))
        for with_bias in (True, False)
    ]
    for rows, pad, (at_x, at_weight, at_bias), with_bias in cases:
        x = room(rows, layout.in_features, offset=at_x, pad=pad)
        weight = room(layout.num_weights, offset=at_weight)
        bias = room(layout.out_features, offset=at_bias) if with_bias else None
        grad_y = room(rows, layout.out_features, offset=at_bias)
        del chosen[:]
        y, _ = launch.forward(x, weight, bias, layout, "relu", True)
        launch.backward(grad_y, x, weight, y, layout, "relu", (True, True, with_bias))
        kernels_of[rows, pad, at_x, at_weight, at_bias, with_bias] = tuple(chosen)
    # No one kernel for all: an unaligned view, a stride or a batch of 16 has its own.
    plain_case = kernels_of[16, 0, 0, 0, 0, True]
    assert plain_case != kernels_of[16, 0, 1, 0, 0, True]
    assert plain_case != kernels_of[16, 0, 0, 1, 0, True]
    assert plain_case != kernels_of[17, 0, 0, 0, 0, True]
    if layout is EVEN:
        assert plain_case != kernels_of[16, 1, 0, 0, 0, True]


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (True, True, False),
                                   (False, True, True)])  # fmt: skip
@pytest.mark.parametrize("rows", [40, 4096])
def test_with_split_k_and_without(needs, rows, launched, monkeypatch):
    chosen = compared(launched, monkeypatch)
    x, weight = room(rows, EVEN.in_features), room(EVEN.num_weights, offset=1)
    grad_y = room(rows, EVEN.out_features)
    launch.backward(grad_y, x, weight, grad_y, EVEN, "gelu", needs)
    expected = ["backward"]
    if rows == 4096:  # packed, formed, and a launch for each gradient
        of_x, of_weight, _ = needs
        expected = [*["pack"] * of_x, "form", *["backward"] * (of_x + of_weight)]
        expected += ["total"] * of_weight
    assert [name for name, _ in chosen] == expected


@pytest.mark.parametrize("offset", [0, 1])
def test_descriptors_name_what_is_aligned(offset, launched, monkeypatch):
    monkeypatch.setattr(launch, "has_tma", lambda device: True)
    chosen = compared(launched, monkeypatch)
    runs = mk.SubsetFamily.powerset(dict.fromkeys("ab", 64)).hidden_layout(64, 64)
    x, weight = room(4096, runs.in_features, offset=offset), room(runs.num_weights)
    launch.forward(x, weight, None, runs, "relu", False)
    assert [name for name, _ in chosen] == ["pack", "forward"]
    described = [value for value in launched[-1][-1] if isinstance(value, tuple)]
    if offset:
        assert not described
    else:
        rows, packed = described
        assert rows == (x.data_ptr(), [4096, 192], [192, 1], [128, 64])
        assert packed[3] in ([64, 64], [128, 64])


def test_sums_of_split_tiles(launched, monkeypatch):
    chosen = compared(launched, monkeypatch)
    long = BlockLayout([16], [2048], torch.tensor([[True]]))
    for rows in (1, 16, 17):
        x, weight, bias = room(rows, 2048), room(long.num_weights), room(16, offset=1)
        launch.forward(x, weight, bias, long, "gelu", True)
    assert [name for name, _ in chosen] == ["forward", "reduce_parts"] * 3


def calls(launched, count=1):
    """Launches of a forward pass, and how many of them were Triton's own."""
    x, weight = torch.zeros(16, EVEN.in_features), torch.zeros(EVEN.num_weights)
    before, was = ordinary(), len(launched)
    for _ in range(count):
        launch.forward(x, weight, None, EVEN, "none", False)
    return len(launched) - was, ordinary() - before


def test_who_watches_launches_sees_all_of_them(launched, monkeypatch):
    assert calls(launched, 3) == (3, 1)

    def hook(*_, **__):
        pass

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert calls(launched, 2) == (2, 2)
        chain.remove(hook)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    assert calls(launched) == (1, 1)
    launch.kernels.forward.add_pre_run_hook(hook)
    assert calls(launched) == (1, 1)
    launch.kernels.forward.pre_run_hooks.clear()


def test_an_unknown_triton_launches_itself(launched, monkeypatch):
    monkeypatch.setattr(launcher, "_KNOWN", False)
    assert calls(launched, 3) == (3, 3)


def test_streams_are_looked_up_in_every_call(launched, monkeypatch):
    calls(launched, 2)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: 9)
    calls(launched)
    assert [stream for _, _, _, stream, *_ in launched] == [STREAM, STREAM, 9]


def test_batches_of_ever_new_sizes_fill_no_memory(launched, monkeypatch):
    monkeypatch.setattr(products, "_JOBS", 5)
    pair = products.products_of(EVEN)
    weight = torch.zeros(EVEN.num_weights)
    for rows in range(1, 20):
        launch.forward(torch.zeros(rows, EVEN.in_features), weight, None, EVEN, "none", False)
        assert 1 <= len(pair.jobs) <= 5


def test_a_forgotten_choice_is_made_anew(launched, monkeypatch):
    calls(launched)
    seen = []
    choose = tune.choose

    def watched(kind, *given):
        seen.append(kind)
        return choose(kind, *given)

    monkeypatch.setattr(tune, "choose", watched)
    calls(launched)
    assert seen == []
    products.forget()
    calls(launched, 2)
    assert seen == ["forward"]


def test_the_layer_launches_what_the_op_does(launched, monkeypatch):
    """Without the dispatcher: the same kernels with the same arguments but the addresses."""
    monkeypatch.setattr(triton_support, "unsupported_reason", lambda device: None)
    layer = mk.MaskedLinear.from_layout(EVEN, activation="silu", backend="triton")
    x = torch.zeros(3, 5, EVEN.in_features, requires_grad=True)
    with torch.profiler.profile() as profiler:  # which sees the op
        layer(x).sum().backward()
    of_op = [given[:6] for given in launched]
    del launched[:]
    layer(x).sum().backward()
    assert [given[:6] for given in launched] == of_op
    names = {event.key for event in profiler.key_averages()}
    assert {"maskmoe::triton_linear", "maskmoe::triton_linear_backward"} <= names
