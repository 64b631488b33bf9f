"""Which backend runs, and what ``info()`` says of it."""

import importlib.metadata
import platform
import types
from contextlib import suppress

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.ops import dispatch, native, triton_support
from maskmoe_kernels.ops.dispatch import BACKENDS, choose, reason_against, unsupported_reason
from maskmoe_kernels.ops.masked_linear import autograd


def test_info_knows_the_versions_and_every_backend():
    told = mk.info()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "triton": None}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    assert {name: told[name] for name in versions} == versions
    assert told["threads"] == torch.get_num_threads()
    assert list(told["backends"]) == list(BACKENDS)
    for name in ("torch", "reference"):  # PyTorch alone: they run wherever torch does
        assert told["backends"][name]["unsupported_reason"] is None


def test_info_is_a_dictionary_that_prints_as_text():
    told = mk.info()
    assert isinstance(told, dict)
    lines = repr(told).splitlines()
    assert ["torch", torch.__version__] in [line.split() for line in lines]
    assert "  reference  yes (plain differentiable" in repr(told)
    assert all(len(line) < 300 and not line.startswith("{") for line in lines)


@pytest.mark.parametrize("reason", [None, "no nvcc found"])
def test_info_says_whether_a_part_was_built(reason, monkeypatch):
    """A record without a reason is that of a part that was built."""
    record = {"cpu": None, "cuda": reason, "isas": [], "left_out": {}, "compiler": "c++"}
    monkeypatch.setattr(native, "build_record", lambda: record)
    told = mk.info()
    assert told["build"] == record
    lines = [line.split(maxsplit=1) for line in repr(told).splitlines()]
    build = lines[lines.index(["build"]) + 1 :]
    assert build[:2] == [["cpu", "yes"], ["cuda", "yes" if reason is None else f"no: {reason}"]]
    monkeypatch.setattr(native, "build_record", dict)  # never built
    assert ["build", "none"] in [line.split(maxsplit=1) for line in repr(mk.info()).splitlines()]


# --- A named backend is used, or it is an error ---------------------------------------------------

SMALL = FAMILIES["toy3"]().hidden_layout(4, 4)
FAMILY = FAMILIES["toy3"]()
FINE = mk.BlockLayout([1] * 512, [1] * 512, torch.ones(512, 512, dtype=torch.bool).tril())
# Above 4,096 blocks of under 16 weights, which no tile holds without padding.
NO_TILES = mk.BlockLayout([1] * 128, [1] * 128, torch.rand(128, 128).ge(0.5).fill_diagonal_(True))


def tensor(dtype=torch.float32, device="cpu", features=12):
    if device != "cuda":
        return torch.ones(2, features, dtype=dtype, device=device)
    return types.SimpleNamespace(
        dtype=dtype, device=torch.device("cuda", 0), shape=(2, features), is_cuda=True,
        is_floating_point=lambda: dtype.is_floating_point,
    )  # fmt: skip


CASES = {
    "plain": (SMALL, tensor()),
    "too fine": (FINE, tensor(features=512)),
    "no tiles": (NO_TILES, tensor(features=128)),
    "float64": (SMALL, tensor(torch.float64)),
    "integers": (SMALL, tensor(torch.int64)),
    "cuda": (SMALL, tensor(device="cuda")),
    "meta": (SMALL, tensor(device="meta")),
}
#: What the reason says, by case: of masked_linear on Triton and in C++, of a network, of selection.
WORDS = {
    "too fine": ("does not fit tiles", "too many blocks", "too many blocks", "NVIDIA"),
    "no tiles": ("does not fit tiles", None, None, "NVIDIA"),
    "float64": ("float64", "float64", "the weights are torch.float64", "NVIDIA"),
    "integers": ("convert it", "convert it", "convert it", "convert it"),
    "cuda": (None, "whole networks have CUDA kernels", "no CUDA", None),
    "meta": (None, None, "on the CPU and on NVIDIA GPUs", "NVIDIA"),
}


@pytest.fixture
def everything_built(monkeypatch):
    """A machine with all kernels for the CPU, none for CUDA, Triton's interpreter and a GPU."""
    monkeypatch.setattr(native, "UNSUPPORTED_REASON", None)
    monkeypatch.setattr(native, "CUDA_UNSUPPORTED_REASON", "no CUDA kernels were built")
    monkeypatch.setattr(triton_support, "_MISSING", None)
    monkeypatch.setattr(triton_support, "INTERPRETED", True)
    monkeypatch.setattr(triton_support, "_INTERPRETER", None)
    monkeypatch.setattr(triton_support, "_capability", lambda device: (9, 0))
    pytest.importorskip("triton")


@pytest.mark.parametrize("case", WORDS)
@pytest.mark.usefixtures("everything_built")
def test_reasons(case):
    layout, x = CASES[case]
    asked = [
        ("masked_linear", "triton", layout),
        ("masked_linear", "native", layout),
        ("masked_mlp", "native", [SMALL, layout]),
        ("selection", "triton", FAMILY),
    ]
    for words, (op, name, of) in zip(WORDS[case], asked, strict=True):
        reason = unsupported_reason(op, name, of, (x,))
        assert (reason is None) == (words is None), (op, name, reason)
        assert words is None or words in reason


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["masked_linear", "masked_mlp", "selection"])
@pytest.mark.usefixtures("everything_built")
def test_a_named_backend_is_used_or_refused(op, backend, case):
    layout, x = CASES[case]
    of = {"masked_linear": layout, "masked_mlp": [SMALL, layout], "selection": FAMILY}[op]
    reason = unsupported_reason(op, backend, of, (x,))
    if reason is None:
        assert choose(op, backend, of, (x,)) == backend
        assert reason_against(op, backend, backend, of, (x,)) is None
    else:
        with pytest.raises(mk.BackendError) as refused:
            choose(op, backend, of, (x,))
        assert str(refused.value) == f"backend {backend!r} cannot run: {reason}"
    for other in set(BACKENDS) - {backend}:
        assert repr(other) in reason_against(op, backend, other, of, (x,))
    if case != "integers":  # which nothing takes
        chosen = choose(op, None, of, (x,))
        assert unsupported_reason(op, chosen, of, (x,)) is None


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("cuda", "integers")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_linear_runs_what_was_named(backend, case, monkeypatch):
    layout, x = CASES[case]
    ran = []
    names = {"native": "masked_linear", "torch": "torch_linear", "triton": "triton_linear"}
    for name, op in names.items():
        real = autograd.FORWARD[op]
        monkeypatch.setitem(
            autograd.FORWARD, op, lambda *a, name=name, real=real: ran.append(name) or real(*a)
        )
    layout.caches.dispatch.clear()
    weight = torch.ones(layout.num_weights, dtype=x.dtype, device=x.device)
    reason = unsupported_reason("masked_linear", backend, layout, (x,))
    if reason is None:
        y = mk.masked_linear(x, weight, None, layout, backend=backend)
        assert y.shape == (2, layout.out_features)
        assert ran == [] if backend == "reference" else [backend]
    else:
        with pytest.raises(mk.BackendError, match="cannot run"):
            mk.masked_linear(x, weight, None, layout, backend=backend)
        assert not ran
    layout.caches.dispatch.clear()


def test_an_op_of_one_backend_refuses_what_that_cannot():
    """Called by name too: nothing else runs in its place."""
    layout, x = CASES["float64"]
    weight, fixed = torch.ones(layout.num_weights).double(), serialized_layout(layout, x.device)
    with pytest.raises(mk.BackendError, match="'triton' cannot run: "):
        torch.ops.maskmoe.triton_linear(
            x, weight, None, fixed, layout.id, layout.out_features, "none", False
        )


@pytest.mark.usefixtures("everything_built")
def test_a_network_gets_its_gpu_kernels_where_it_fits(monkeypatch):
    monkeypatch.setattr(native, "CUDA_UNSUPPORTED_REASON", None)
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: 232_448)

    def reason(net, dtype=torch.bfloat16):
        weights = [tensor(dtype, "cuda")]
        return reason_against("masked_mlp", "native", None, net.layers._chain, weights)

    small = mk.InterpretableMLP(FAMILY, hidden=[16, 16])
    assert "not known yet" in reason(small)
    for net in (small, wide := mk.InterpretableMLP(FAMILY, hidden=[512, 512])):
        dispatch.note_gpu_bytes(net.layers._chain)
    assert reason(small) is None
    assert reason(small, torch.float16) is None
    assert "three TF32 products" in reason(small, torch.float32)
    assert "of shared memory in training" in reason(wide)
    large = mk.InterpretableMLP(FAMILIES["ncf4"](), hidden=[256, 128])
    dispatch.note_gpu_bytes(large.layers._chain)
    assert "has 394368 weights" in reason(large)
    many = mk.InterpretableMLP(FAMILY, hidden=[16], outputs=3)
    dispatch.note_gpu_bytes(many.layers._chain)
    assert "3 units, not 1" in reason(many)
    assert choose("masked_mlp", None, small.layers._chain, [tensor(torch.bfloat16, "cuda")]) == (
        "native"
    )
    # Under autocast, the network computes in its dtype.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert reason(small, torch.float32) is None
    assert dispatch.computed_dtype(tensor(torch.float32, "cuda")) == torch.bfloat16
    for kept in (tensor(torch.float64, "cuda"), tensor(torch.float16, "cuda"), tensor()):
        assert dispatch.computed_dtype(kept) == kept.dtype


@pytest.mark.usefixtures("everything_built")
def test_without_cuda_kernels_no_network_gets_them():
    net = mk.InterpretableMLP(FAMILY, hidden=[16])
    dispatch.note_gpu_bytes(net.layers._chain)
    weights = [tensor(torch.bfloat16, "cuda")]
    reason = reason_against("masked_mlp", "native", None, net.layers._chain, weights)
    assert reason == "no CUDA kernels were built"
