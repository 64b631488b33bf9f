"""Kernels read what they are given and not a byte behind it, and write only what is theirs."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops import native

pytestmark = [
    pytest.mark.skipif(
        native.UNSUPPORTED_REASON is not None, reason=str(native.UNSUPPORTED_REASON)
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is protected with Linux's calls"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILY = mk.SubsetFamily(
    {"a": 3, "b": 4, "c": 2}, {"a": ["a"], "ab": ["a", "b"], "all": ["a", "b", "c"]}
)
#: glibc's allocator with marks behind each piece of memory, looked at when it is freed.
CHECKED_MALLOC = "libc_malloc_debug.so.0"


def guarded(tensor):
    """A copy that ends where memory ends: to touch the next byte is a fault."""
    bytes_ = tensor.numel() * tensor.element_size()
    size = -(-bytes_ // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    nobody = libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0)
    assert nobody == 0, os.strerror(ctypes.get_errno())
    count = tensor.numel()
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=count, offset=size - bytes_)
    return copy.view(tensor.shape).copy_(tensor)


def same_bits(ours, others):
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("sizes", [[3, 5, 1], [13], [9, 18, 2]], ids=str)
def test_a_layer_reads_nothing_behind_its_tensors(sizes, activation, dtype):
    layout = mk.BlockLayout(sizes, sizes[::-1], torch.ones(len(sizes), len(sizes)).tril().bool())

    def run(place):
        torch.manual_seed(0)
        x, y = (torch.randn(11, sum(sizes)).to(dtype) for _ in range(2))
        given = [
            place(t.to(dtype)).requires_grad_()
            for t in (x, torch.randn(layout.num_weights), torch.randn(sum(sizes)))
        ]
        out = mk.masked_linear(*given, layout, activation=activation)
        return [out, *torch.autograd.grad(out, given, place(y))]

    same_bits(run(guarded), run(torch.clone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [[3], [5, 9]], ids=str)
def test_a_network_reads_nothing_behind_its_tensors(hidden, dtype):
    def run(place):
        torch.manual_seed(0)
        net = mk.InterpretableMLP(FAMILY, hidden, "silu").to(dtype)
        for parameter in net.parameters():
            parameter.data = place(parameter.data)
        x = place(torch.randn(13, 9).to(dtype)).requires_grad_()
        target = place((torch.rand(13) < 0.5).float())
        wanted = [x, *net.parameters()]
        logits = net(x)
        grads = torch.autograd.grad(logits, wanted, place(torch.randn(13, 3).to(dtype)))
        loss = net.gem_loss(x, target)
        of_loss = torch.autograd.grad(loss, wanted)
        return [logits, *grads, loss, *of_loss, net.predict(x)[0]]

    same_bits(run(guarded), run(torch.clone))


STEPS = """
import threading
import torch
import maskmoe_kernels as mk

torch.manual_seed(0)
family = mk.SubsetFamily({"a": 3, "b": 4}, {"a": ["a"], "ab": ["a", "b"]})
layout = mk.BlockLayout([9, 2, 3], [5, 8], torch.tensor([[1, 0], [1, 1], [0, 1]]).bool())


def layer(rows, dtype):
    given = [torch.randn(*shape, dtype=dtype, requires_grad=True)
             for shape in ((rows, 13), (layout.num_weights,), (14,))]
    mk.masked_linear(*given, layout, activation="silu").float().square().sum().backward()


def network(rows, dtype):
    net = mk.InterpretableMLP(family, [9], "silu").to(dtype)
    x = torch.randn(rows, 7, dtype=dtype, requires_grad=True)
    net(x).float().square().sum().backward()
    for normalize in ("none", "sample", "expert", "batch"):
        net.gem_loss(x, torch.ones(rows), normalize=normalize).backward()
    net.predict(x)


for rows in (1, 5, 130):
    for dtype in (torch.float32, torch.bfloat16):
        for step in (layer, network):
            # A thread takes memory for its kernels, and gives it back at its end.
            thread = threading.Thread(target=step, args=(rows, dtype))
            thread.start()
            thread.join()
print("done")
"""


def test_a_process_writes_nothing_behind_its_memory():
    """Marks behind each piece of memory are whole when it is given back."""
    environment = {"LD_PRELOAD": CHECKED_MALLOC, "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot be preloaded" in done.stderr:
        pytest.skip(f"needs glibc's {CHECKED_MALLOC}")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
