"""What is remembered of a launch: it launches what Triton's own launch would, of all it compiled.

Nothing is compiled here, and nothing runs: Triton's binder chooses among kernels that stand in, and
a driver that stands in notes what reaches it.
"""

import ctypes
import struct
import threading
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.ops import native, triton_support

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

    known = {}  # by handle

    def __init__(self, src, launched):
        self.module, self.function, self.packed_metadata = None, next(_handles), (4, 1, 96)
        self.src, self.name, self._module_pid = src, None, None
        self.described = [kind for kind in src.signature.values() if kind.startswith("tensordesc")]
        self.metadata = SimpleNamespace(
            tensordesc_meta=[
                {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": block_of(kind)}
                for kind in self.described
            ]
        )
        self._run = lambda *given: launched.append(by_triton(self, given))
        Compiled.known[self.function] = self

    def launch_metadata(self, *given):
        return None


def block_of(kind):
    return [int(size) for size in kind[kind.index("[") + 1 : kind.index("]")].split(",")]


def by_triton(compiled, given):
    """What Triton's launcher makes of it: addresses and numbers, constants left out."""
    x, y, z, stream, function, metadata, _, _, _, *args = given
    kinds = compiled.src.signature.values()
    values = [read(a) for a, kind in zip(args, kinds, strict=True) if kind != "constexpr"]
    return x, y, z, stream, function, metadata, values


def read(value):
    if isinstance(value, TensorDescriptor):
        block = tuple(value.block_shape)
        return value.base.data_ptr(), tuple(value.shape), tuple(value.strides), block
    return value.data_ptr() if isinstance(value, torch.Tensor) else value or 0


class Driver:
    """Stands in for NVIDIA's: what it is asked to launch, read back from the parameters' memory."""

    def __init__(self, launched):
        self.launched, self.status, self.context, self.encoded = launched, [], None, 0
        ints, pointer = [ctypes.c_uint] * 7, ctypes.c_void_p
        kinds = {
            self.launch: [pointer, *ints, pointer, ctypes.POINTER(pointer), pointer],
            self.encode: [
                pointer, ctypes.c_int, ctypes.c_uint, pointer, ctypes.POINTER(ctypes.c_uint64),
                ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint),
                ctypes.POINTER(ctypes.c_uint), *[ctypes.c_int] * 4,
            ],
            self.current: [ctypes.POINTER(pointer)],
            self.set_current: [pointer],
            self.error: [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
        }  # fmt: skip
        self.functions = [
            ctypes.CFUNCTYPE(ctypes.c_int, *given)(function) for function, given in kinds.items()
        ]
        self.addresses = tuple(ctypes.cast(f, pointer).value for f in self.functions)

    def launch(self, function, x, y, z, threads, one, too, shared, stream, parameters, extra):
        if self.status and (status := self.status.pop(0)):
            return status
        assert (one, too, extra) == (1, 1, None)
        compiled, found = Compiled.known[function], []
        at = iter(parameters[k] for k in range(1000))
        for kind in compiled.src.signature.values():
            if kind.startswith("tensordesc"):
                memory = ctypes.string_at(place := next(at), 128)
                assert not place % 64
                shape = tuple(struct.unpack("<i", ctypes.string_at(next(at), 4))[0] for _ in "rc")
                strides = tuple(struct.unpack("<q", ctypes.string_at(next(at), 8))[0] for _ in "rc")
                address, columns, rows, stride, *block = struct.unpack_from("<Q8xQQQII", memory)
                assert (rows, columns, stride) == (*shape, 2 * strides[0])
                found.append((address, shape, strides, tuple(block[::-1])))
            elif kind != "constexpr":
                form = {"i32": "<i", "i64": "<q"}.get(kind, "<Q")
                memory = ctypes.string_at(next(at), struct.calcsize(form))
                found.append(struct.unpack(form, memory)[0])
        assert [ctypes.string_at(next(at), 8) for _ in "gp"] == [bytes(8)] * 2
        of = (threads // 32, 1, shared)
        self.launched.append((x, y, z, stream, function, of, found))
        return 0

    def encode(self, place, kind, rank, address, sizes, strides, box, steps, *modes):
        assert (kind, rank, steps[0], steps[1], modes) == (9, 2, 1, 1, (0, 3, 2, 0))
        self.encoded += 1
        memory = struct.pack("<QQQQQII", address, 1 << 21, *sizes[:2], strides[0], *box[:2])
        ctypes.memmove(place, memory, len(memory))
        return 0

    def current(self, context):
        context[0] = 1234
        return 0

    def set_current(self, context):
        self.context = context
        return 0

    def error(self, status, text):
        text[0] = b"it is lost"
        return 0


class Kernel(JITFunction):
    """A kernel of the package whose compiler does nothing; counts Triton's own launches."""

    def __init__(self, kernel, launched):
        super().__init__(kernel.fn)
        self.ordinary = 0
        self.device_caches[0]  # makes the binder, and sets the compiler
        self.compile = lambda src, **options: Compiled(src, launched)

    def run(self, *args, **options):
        self.ordinary += 1
        return super().run(*args, **options)


class Launched(list):
    """Launches, and the driver that noted them."""

    driver: Driver


@pytest.fixture(params=["by triton", "by the driver"])
def launched(request, monkeypatch):
    """What reached the GPU, which is an sm_90 without memory or processors."""
    found = Launched()
    found.driver = stands_in = Driver(found)
    if request.param == "by the driver":
        if native.extension() is None:
            pytest.skip(native.UNSUPPORTED_REASON)
        monkeypatch.setattr(launcher, "_driver_functions", lambda: stands_in.addresses)
        monkeypatch.setattr(launcher, "_driver_version", lambda: 13000)
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
        plain = len(tensors) - len(self._described)
        named = [of(t) for of, t in zip(self._described, tensors[plain:], strict=True)]
        self._kernel[self._grid](*tensors[:plain], *named, *self._fixed, **self._options)
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
        assert rows == (x.data_ptr(), (4096, 192), (192, 1), (128, 64))
        assert packed[3] in ((64, 64), (128, 64))


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


# --- The driver alone ----------------------------------------------------------------------------


by_the_driver = pytest.mark.parametrize("launched", ["by the driver"], indirect=True)


@pytest.fixture
def gpu(launched):
    """The driver that stands in; it launches a kernel of one pointer and a number."""
    src = SimpleNamespace(signature={"x": "*fp32", "n": "i32"})
    Compiled.known[77] = SimpleNamespace(src=src)
    return launched.driver


def prepared(gpu, grid=(2, 3, 4), parameters=None, places=None, described=None):
    module = native.extension()
    scratch = [bytes(8), bytes(8)]
    parameters = [bytes(8), struct.pack("<i", 9), *scratch] if parameters is None else parameters
    launch = module.prepare_launch(
        gpu.addresses, (77, *grid, 128, 5), parameters, [0] if places is None else places,
        described or [],
    )  # fmt: skip
    return lambda stream, *addresses: module.launch(launch, stream, *addresses)


@by_the_driver
def test_what_the_driver_is_given(gpu, launched):
    run = prepared(gpu)
    run(7, 2**63 + 16)
    run(8, 0)
    assert launched == [
        (2, 3, 4, 7, 77, (4, 1, 5), [2**63 + 16, 9]), (2, 3, 4, 8, 77, (4, 1, 5), [0, 9])
    ]  # fmt: skip
    prepared(gpu, grid=(0, 1, 1))(7, 16)  # which CUDA refuses
    assert len(launched) == 2


@by_the_driver
def test_a_thread_that_has_no_context_gets_one(gpu, launched):
    run = prepared(gpu)
    gpu.status = [201]
    thread = threading.Thread(target=run, args=(7, 16))
    thread.start()
    thread.join()
    assert gpu.context == 1234
    assert len(launched) == 1


@by_the_driver
def test_an_error_of_the_driver_is_raised_with_its_text(gpu, launched):
    run = prepared(gpu)
    gpu.status = [700]
    with pytest.raises(RuntimeError, match="CUDA error 700: it is lost"):
        run(7, 16)
    run(7, 16)
    assert len(launched) == 1


@by_the_driver
def test_a_descriptor_is_encoded_where_its_address_is_new(gpu, launched, monkeypatch):
    monkeypatch.setattr(launch, "has_tma", lambda device: True)
    runs = mk.SubsetFamily.powerset(dict.fromkeys("ab", 64)).hidden_layout(64, 64)
    x, weight = room(4096, runs.in_features), room(runs.num_weights)
    other = room(4096, runs.in_features)
    packed = room(2 * runs.num_weights)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty_at(packed))
    encoded = []
    for matrix in (x, x, other, other, x):
        launch.forward(matrix, weight, None, runs, "relu", False)
        encoded.append(gpu.encoded)
    assert encoded == [0, 2, 3, 3, 4]  # the first is Triton's own
    given = [values for *_, values in launched if any(isinstance(v, tuple) for v in values)]
    named = [next(v[0] for v in values if isinstance(v, tuple)) for values in given]
    assert named == [m.data_ptr() for m in (x, x, other, other, x)]


def new_empty_at(memory):
    """Packed weights lie at one address, as they do when memory is used again."""
    real = torch.Tensor.new_empty

    def new_empty(tensor, size, **options):
        if isinstance(size, int) and size <= memory.numel():
            return memory[:size]
        return real(tensor, size, **options)

    return new_empty


@by_the_driver
@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"parameters": [bytes(8)] * 129}, ValueError, "so many parameters"),
        ({"parameters": [bytes(3000), bytes(3000)]}, ValueError, "so many parameters"),
        ({"places": [1]}, ValueError, "no such parameter"),
        ({"places": [9]}, ValueError, "no such parameter"),
        (
            {"described": [(0, 0, 9, 3, 64, 64, 128, 64, 64, False)]},
            ValueError,
            "no such parameter",
        ),
        ({"described": [(0, 0, 9)]}, TypeError, "10 arguments"),
        ({"parameters": ["text"]}, TypeError, "bytes"),
    ],
)
def test_what_cannot_be_prepared_is_refused(given, error, says, gpu):
    with pytest.raises(error, match=says):
        prepared(gpu, **given)


@by_the_driver
def test_a_launch_refuses_what_is_no_launch(gpu):
    run = prepared(gpu)
    for given in ((7,), (7, 1, 2)):
        with pytest.raises(TypeError, match="its addresses"):
            run(*given)
    with pytest.raises(ValueError, match="PyCapsule"):
        native.extension().launch(object(), 7, 1)
    with pytest.raises(OverflowError):
        run(7, -1)
