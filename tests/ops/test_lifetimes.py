"""Nothing outlives what it was made for: memory after many layers, many steps, many layouts.

``MASKMOE_STEPS=20000 pytest tests/ops/test_lifetimes.py`` takes the steps of a long training run.
"""

import copy
import ctypes
import gc
import itertools
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout import serialized as registry
from maskmoe_kernels.layout.serialized import serialize, serialized_layout
from maskmoe_kernels.ops import native

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
STEPS = int(os.environ.get("MASKMOE_STEPS", "200"))
SETUP = """
import gc, os, torch
import maskmoe_kernels as mk
torch.set_num_threads(1)

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
"""

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps"),
]


def grown(code):
    """What a script of its own prints last: MiB."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP + code],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_layers_that_are_dropped_leave_nothing():
    """A fresh mask a step, as order-agnostic MADE draws them. It left 1.5 to 3.4 MiB a layer."""
    code = """
g = torch.Generator().manual_seed(0)
def step():
    rows, cols = (torch.randint(1, 700, (700,), generator=g) for _ in range(2))
    layer = mk.MaskedLinear(700, 700, rows[:, None] >= cols)
    layer(torch.ones(8, 700)).sum().backward()
for _ in range(5):
    step()
before = resident()
for _ in range(LAYERS):
    step()
print(resident() - before)
"""
    layers = 150 if STEPS > 10000 else 12
    assert grown(code.replace("LAYERS", str(layers))) < (60 if layers == 150 else 10)


def test_steps_of_training_leave_nothing():
    """3.5 MiB a thousand before: each name of an activation among an op's arguments leaked."""
    code = """
from maskmoe_kernels.layout.families import skip_sessions
from maskmoe_kernels.models import InterpretableTransformer
family, second = skip_sessions()
model = InterpretableTransformer(family, second, width=2, layers=1)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
x, y = torch.randn(4, 5, model.first_features), torch.randn(4, 5, model.second_features)
target = torch.randint(2, (4, 5)).float()
def step():
    loss = mk.gem_loss(model(x, y), target, family)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for _ in range(60):
    step()
before = resident()
for _ in range(STEPS):
    step()
print(resident() - before)
"""
    assert grown(code.replace("STEPS", str(STEPS))) < max(1.0, 10 * STEPS / 20000)


class _Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def in_use():
    """Bytes that malloc has given out; glibc's own count."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this libc does not count")
    libc.mallinfo2.restype = _Heap
    gc.collect()
    return libc.mallinfo2().uordblks


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
@pytest.mark.parametrize("what", ["layer", "network", "gem", "mixture", "refusal"])
def test_no_call_leaks_a_byte(what):
    family = mk.SubsetFamily.powerset({"a": 3, "b": 4})
    net = mk.InterpretableMLP(family, [4, 4])
    layer, x, y = net.layers[0], torch.randn(4, 7), torch.ones(4)

    def refuse():
        with pytest.raises(RuntimeError):
            torch.ops.maskmoe.masked_linear(
                x,
                layer.weight,
                None,
                serialized_layout(layer.layout, CPU),
                layer.layout.id,
                3,
                "gelu",
                True,
            )

    calls = {
        "layer": lambda: layer(x).sum().backward(),
        "network": lambda: net(x).sum().backward(),
        "gem": lambda: net.gem_loss(x, y).backward(),
        "mixture": lambda: net.predict(x),
        "refusal": refuse,
    }
    counts = []
    for _ in range(4):  # the first ones fill caches of torch's and Python's
        for _ in range(200):
            calls[what]()
        counts.append(in_use())
    # 48 bytes a string before: 9,600 a round and more.
    assert min(after - before for before, after in itertools.pairwise(counts)) < 3000


def test_hundreds_of_layouts_leave_nothing():
    """Made, used on two backends, forward and backward, and dropped: in Python and in C++."""
    code = """
import weakref
from maskmoe_kernels.layout import serialized
from maskmoe_kernels.ops import native
backends = ["torch"] + ["native"] * (native.UNSUPPORTED_REASON is None)
compiled = (lambda: native._extension.compiled()) if len(backends) == 2 else (lambda: 0)
def step(n):
    layout = mk.BlockLayout([n, 2], [3, 5], torch.tensor([[1, 0], [1, 1]]).bool())
    weight = torch.ones(layout.num_weights, requires_grad=True)
    for backend in backends:
        x = torch.ones(2, 8, requires_grad=True)
        mk.masked_linear(x, weight, None, layout, "gelu", backend).sum().backward()
    layer = mk.MaskedLinear.from_layout(layout)
    layer(x).sum().backward()
    return weakref.ref(layout)
for n in range(300):  # torch keeps what it compiled for these sizes
    step(10 + n)
before, kept, known = resident(), compiled(), len(serialized._known)
gone = [step(10 + n) for n in range(300)]
assert not any(ref() for ref in gone), "a layout lives"
assert (compiled(), len(serialized._known), len(serialized._read)) == (kept, known, 0)
del gone
print(resident() - before)
"""
    assert grown(code) < 1.2


# --- Who keeps what ------------------------------------------------------------------------


def fresh(size, weights=3):
    return mk.BlockLayout([size, 2], [weights, 5], torch.tensor([[1, 0], [1, 1]]).bool())


def use(layout):
    x, weight = torch.ones(2, layout.in_features), torch.ones(layout.num_weights)
    for backend in ("torch", "native" if native.UNSUPPORTED_REASON is None else "torch"):
        given = x.clone().requires_grad_()
        mk.masked_linear(given, weight, None, layout, "relu", backend).sum().backward()
    return x, weight


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
def test_what_was_compiled_dies_with_the_last_equal_layout():
    gc.collect()
    before = native._extension.compiled()
    layout, other = fresh(101), fresh(102)
    twin = copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))
    for one in (layout, other, *twin):
        use(one)
    assert native._extension.compiled() == before + 2
    registered = weakref.ref(layout)
    del layout, one
    assert native._extension.compiled() == before + 2
    use(twin[1])
    del twin, other
    gc.collect()
    assert registered() is None
    assert native._extension.compiled() == before


def test_what_was_read_from_a_tensor_dies_with_the_tensor():
    serialized, number = serialize(fresh(103)), fresh(103).id
    for _ in range(3):
        found = weakref.ref(registry.layout_of(number, serialized))
        gc.collect()
        assert found() is registry.layout_of(number, serialized)
    del serialized
    gc.collect()
    assert found() is None


@pytest.mark.skipif(native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON))
def test_serialized_layouts_of_strangers_take_bounded_memory():
    """Every call with a tensor of its own: kept by the kernels for a while, not for ever."""
    layout = fresh(104)
    x, weight = use(layout)
    number, out = layout.id, layout.out_features
    op, serialized = torch.ops.maskmoe.masked_linear, serialize(layout)
    for _ in range(5000):
        op(x, weight, None, serialized.clone(), number, out, "relu", False)
    assert native._extension.compiled() <= 4096
    native._extension.forget(number)
    use(layout)


def test_a_compiled_graph_outlives_its_layer():
    def build():
        layer = mk.MaskedLinear.from_layout(fresh(105))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, layer.in_features)
        return compiled, x, layer(x)

    compiled, x, expected = build()
    gc.collect()
    assert torch.equal(compiled(x), expected)
    layout = weakref.ref(compiled.layout)
    program = torch.export.export(copy.deepcopy(compiled._orig_mod), (x,)).module()
    del compiled
    torch.compiler.reset()
    gc.collect()
    del layout
    assert torch.equal(program(x), expected)


def test_triton_keeps_no_layout():
    products = pytest.importorskip("maskmoe_kernels.ops.masked_linear.triton.products")
    tune = pytest.importorskip("maskmoe_kernels.ops.masked_linear.triton.tune")
    layout = fresh(106)
    pair = weakref.ref(products.products_of(layout))
    x = torch.ones(2, layout.in_features)
    tune.choose("forward", layout, x, "ieee", lambda: [1], lambda config: None)
    assert pair().chosen
    gone = weakref.ref(layout)
    del layout
    assert gone() is None
    assert pair() is None
