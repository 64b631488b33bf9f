"""Rivals that need a GPU, on stand-ins of their packages written from the published signatures."""

from __future__ import annotations

import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import rivals
from bench.layers.contender import Contender, Layer, Unavailable
from bench.layers.counts import PHASES
from bench.layers.problem import Problem
from bench.layers.truth import errors, truth
from bench.rivals import (
    OursGrouped,
    OursTriton,
    PaperStyleMaxAutotune,
    PaperStyleReduceOverhead,
    Quack,
    QuackTuned,
    StkMatrix,
)
from maskmoe_kernels import SubsetFamily
from maskmoe_kernels.errors import BackendError
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.ops.dispatch import choose

OBSTACLE = None  # why the Triton kernels cannot run on a CPU: here they may be interpreted
try:
    choose("masked_linear", "triton", None, (torch.empty(0),))
except BackendError as error:
    OBSTACLE = str(error)
MIXED = SubsetFamily(
    {"a": 1, "b": 1, "c": 1},
    {name: list(name) for name in ("abc", "a", "bc", "b", "ab", "c")},
)
LAYOUTS = {
    "mixed": MIXED.hidden_layout(16, 16),
    "power set": FAMILIES["powerset4"]().hidden_layout(32, 32),  # 480 units: not whole blocks
    "wide": FAMILIES["toy3"]().hidden_layout(128, 128),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def gemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor,
    tuned: bool = True,
) -> Tensor:
    """What ``quack.gemm_interface.gemm`` computes, and what it asks of its operands."""
    ends = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert ends is not None
    assert ends.dtype == A_idx.dtype == torch.int32
    assert A.dtype == B.dtype
    assert A.dtype in (torch.bfloat16, torch.float16)
    spans = list(pairwise(ends.tolist()))
    if cu_seqlens_k is not None:
        assert A.stride(-2) == 1, "A must be m-major"
        assert B.stride(-1) == 1, "B must be n-major"
        parts = [A[:, A_idx[a:b]] @ B[a:b] for a, b in spans]
        made = torch.stack(parts)
        made = made if bias is None else made + bias[:, None]
    else:
        assert A.stride(-1) == 1, "A must be k-major"
        assert B.shape[0] == len(spans)
        made = torch.cat([A[A_idx[a:b]] @ part for (a, b), part in zip(spans, B, strict=True)])
    if out is None:
        return made
    assert out.shape == made.shape
    assert out.stride(-1) == 1
    return out.copy_(made)


class Matrix:
    """``stk.Matrix`` as far as it is used; dense inside."""

    def __init__(
        self,
        size: tuple[int, int],
        data: Tensor,
        row_indices: Tensor,
        column_indices: Tensor,
        offsets: Tensor,
        column_indices_t: Any = None,
        offsets_t: Any = None,
        block_offsets_t: Any = None,
    ) -> None:
        assert data.shape == (len(row_indices), 128, 128)
        assert data.is_contiguous()
        assert offsets.tolist() == [int((row_indices < k).sum()) for k in range(size[0] // 128 + 1)]
        self.size, self.data, self.offsets = size, data, offsets
        self.at = (row_indices.long(), column_indices.long())
        self.column_indices_t = self.offsets_t = self.block_offsets_t = ()

    def dense(self) -> Tensor:
        count = [side // 128 for side in self.size]
        blocks = self.data.new_zeros(*count, 128, 128)
        blocks[self.at] = self.data
        return blocks.transpose(1, 2).reshape(self.size)


def dds(a: Tensor, b: Matrix) -> Tensor:
    assert a.shape[0] % 128 == 0
    assert a.shape[1] == b.size[0]
    return a @ b.dense()


def sdd(a: Tensor, b: Tensor, topology: Matrix) -> Any:
    assert a.shape[0] % 128 == b.shape[1] % 128 == a.shape[1] % 32 == 0
    count = [side // 128 for side in topology.size]
    blocks = (a @ b).view(count[0], 128, count[1], 128).transpose(1, 2)
    return types.SimpleNamespace(data=blocks[topology.at].contiguous())


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    quack, interface, stk = (types.ModuleType(n) for n in ("quack", "quack.gemm_interface", "stk"))
    interface.gemm = gemm  # type: ignore[attr-defined]
    stk.Matrix = Matrix  # type: ignore[attr-defined]
    stk.ops = types.SimpleNamespace(dds=dds, sdd=sdd)  # type: ignore[attr-defined]
    for module in (quack, interface, stk):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [Quack, QuackTuned, StkMatrix], ids=lambda k: k.name)
@layouts
def test_exact(layout: Any, kind: type[Layer], dtype: torch.dtype) -> None:
    problem = Problem(layout, 128, dtype)
    layer, true = kind(problem), truth(problem, 128)
    off = {name: e for name, e in errors(layer.results(128), true).items() if not e < 0.02}
    assert not off
    assert layer.phases == PHASES
    for one, other in zip(layer.step(), layer.backward(layer.graph()), strict=True):
        assert torch.equal(one, other)
    # A masked block keeps its zeros: an optimizer moves no absent weight.
    if kind is StkMatrix:
        assert bool((layer.step()[1][layer.seen == 0] == 0).all())


@pytest.mark.usefixtures("stand_ins")
def test_stk_in_tf32() -> None:
    problem = Problem(LAYOUTS["mixed"], 128, tf32=True)
    assert max(errors(StkMatrix(problem).results(128), truth(problem, 128)).values()) < 1e-5


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("kind", "problem", "reason"),
    [
        (Quack, lambda: Problem(LAYOUTS["mixed"], 128), "16 bits only"),
        (StkMatrix, lambda: Problem(LAYOUTS["mixed"], 128), "in tf32 only"),
        (StkMatrix, lambda: Problem(LAYOUTS["mixed"], 9, torch.float16), "128 rows, not 9"),
        (
            StkMatrix,
            lambda: Problem(MIXED.hidden_layout(24, 24), 128, torch.float16),
            "size that divides 128",
        ),
        (
            Quack,
            lambda: Problem(MIXED.input_layout(8), 128, torch.float16),
            "blocks of one size and a gradient",
        ),
    ],
)
def test_what_they_cannot_do_has_a_reason(kind: type[Contender], problem: Any, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        kind(problem())


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [(Quack, "quack.gemm_interface", "quack-kernels"), (StkMatrix, "stk", "stanford-stk")],
)
def test_a_missing_package_is_a_reason(
    kind: type[Contender], module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable, match=f"not installed.*pip install {name}"):
        kind(Problem(LAYOUTS["mixed"], 128, torch.bfloat16))


@pytest.mark.parametrize("kind", [PaperStyleReduceOverhead, PaperStyleMaxAutotune])
def test_modes_of_a_gpu(kind: type[Layer]) -> None:
    assert kind.compiled
    assert not kind.capturable
    assert kind.phases == ("forward", "step")  # an output lives until the next call
    with pytest.raises(Unavailable, match=f"{kind.mode!r} is for a GPU"):
        kind(Problem(LAYOUTS["mixed"], 4))


def test_ours_by_name() -> None:
    problem = Problem(LAYOUTS["mixed"], 9)
    assert max(errors(OursGrouped(problem).results(9), truth(problem, 9)).values()) < 3e-6
    if OBSTACLE is not None:
        with pytest.raises(BackendError, match="triton"):
            OursTriton(problem).forward()


def test_a_gpu_has_everybody() -> None:
    assert rivals.contenders("cpu") is rivals.ALL
    assert rivals.contenders("cuda:1") is rivals.GPU
    assert set(rivals.ALL) < set(rivals.GPU)
    assert len({kind.name for kind in rivals.GPU}) == len(rivals.GPU)
    assert {kind.number for kind in rivals.GPU} == {*"123456789", "floor", ""}
