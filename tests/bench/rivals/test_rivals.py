"""Every rival against the float64 definition: a benchmark counts only behind green tests."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.contender import Contender, DenseLayer, Layer, Unavailable
from bench.counts import count
from bench.layers.reference_error import errors, reference
from bench.layers.suites import SMALL
from bench.problem import Problem
from bench.rivals import ALL
from bench.rivals.best_dense import BestDense, BestDenseCompiled
from bench.rivals.bsr import Bsr
from bench.rivals.bucketed_bmm import BucketedBmm
from bench.rivals.floor import FloorCopy, FloorGemm
from bench.rivals.grouped_mm import GroupedMM, GroupedMMGathered
from bench.rivals.masked_dense import MaskedBeforehand, MaskedDense
from bench.rivals.nflows import Nflows
from bench.rivals.ours import Ours
from bench.rivals.paper_style import PaperStyle, PaperStyleCompiled
from bench.rivals.paper_style_mlp import PaperStyleNCF
from bench.rivals.zuko import Zuko
from maskmoe_kernels import BlockLayout, SubsetFamily
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.models import InterpretableNCF, NCFSizes

EAGER = [kind for kind in ALL if issubclass(kind, Layer) and not kind.compiled]
# Experts out of the order of their sizes, so that buckets have to be put back.
MIXED = SubsetFamily(
    {"a": 1, "b": 1, "c": 1},
    {name: list(name) for name in ("abc", "a", "bc", "b", "ab", "c")},
)
UNIFORM = {
    **{name: FAMILIES[name]().hidden_layout(8, 8) for name in (*SMALL, "powerset6")},
    "mixed": MIXED.hidden_layout(8, 8),
}
RAGGED = {
    "hidden": MIXED.hidden_layout([1, 4, 2, 3, 5, 2], [3, 1, 7, 2, 4, 1]),
    "equal sides": MIXED.hidden_layout([1, 4, 2, 3, 5, 2], [1, 4, 2, 3, 5, 2]),
    "input": FAMILIES["ncf4"]().input_layout([3, 1, 4, 2]),
    "strict input": FAMILIES["ncf4"]().input_layout(2, strict=True),
}
#: Those that need blocks of one size.
UNIFORM_ONLY = {BucketedBmm, GroupedMM, GroupedMMGathered, Bsr}
LIMITS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def build(kind: type[Contender], problem: Problem) -> Layer:
    """The contender; the test is skipped where its package is missing."""
    try:
        contender = kind(problem)
    except Unavailable as reason:
        if "not installed" in str(reason):
            pytest.skip(str(reason))
        raise
    assert isinstance(contender, Layer)
    return contender


def found_and_expected(
    kind: type[Contender], layout: BlockLayout, dtype: torch.dtype, batch: int = 9, rows: int = 9
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    problem = Problem(layout, batch, dtype)
    return build(kind, problem).results(rows), reference(problem, rows)


def assert_exact(kind: type[Contender], layout: BlockLayout, dtype: torch.dtype) -> None:
    found, expected = found_and_expected(kind, layout, dtype)
    assert found.keys() == expected.keys()
    off = {name: e for name, e in errors(found, expected).items() if not e <= LIMITS[dtype]}
    assert not off


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("layout", UNIFORM.values(), ids=UNIFORM)
@pytest.mark.parametrize("kind", [k for k in EAGER if k.exact], ids=lambda k: k.name)
def test_exact_on_uniform_families(
    kind: type[Contender], layout: BlockLayout, dtype: torch.dtype
) -> None:
    if kind is GroupedMM and dtype == torch.float64:
        pytest.skip("grouped_mm has no float64")
    assert_exact(kind, layout, dtype)


@pytest.mark.parametrize("layout", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("kind", [k for k in EAGER if k.exact], ids=lambda k: k.name)
def test_exact_on_ragged_layouts(kind: type[Contender], layout: BlockLayout) -> None:
    if kind in UNIFORM_ONLY:
        with pytest.raises(Unavailable, match="blocks of one size"):
            kind(Problem(layout, 9))
        return
    assert_exact(kind, layout, torch.float64)


@pytest.mark.parametrize("kind", [k for k in EAGER if not k.exact], ids=lambda k: k.name)
def test_inexact_rivals_are_exact_forward(kind: type[Contender]) -> None:
    layout = UNIFORM["mixed"]
    found, expected = found_and_expected(kind, layout, torch.float32)
    assert errors({"y": found["y"]}, expected)["y"] < LIMITS[torch.float32]
    if kind.phases == ("forward",):
        assert found.keys() == {"y"}


@pytest.mark.parametrize(
    "kind", [MaskedDense, MaskedBeforehand, Zuko, Nflows], ids=lambda k: k.name
)
def test_masked_products_have_no_stop_gradient(kind: type[Contender]) -> None:
    problem = Problem(UNIFORM["mixed"], 9, torch.float64)
    found = build(kind, problem).results(9)
    plain = problem.grad @ problem.dense
    torch.testing.assert_close(found["grad_x"], plain.detach())
    assert errors(found, reference(problem, 9))["grad_x"] > 0.1
    assert not kind.exact


def test_gradients_of_absent_weights() -> None:
    problem = Problem(UNIFORM["mixed"], 9)
    absent = ~problem.layout.mask()
    for kind, zero in ((BestDense, True), (MaskedDense, True), (MaskedBeforehand, False)):
        contender = build(kind, problem)
        grad_weight = contender.step()[1]
        assert bool((grad_weight[absent] == 0).all()) is zero


@pytest.mark.parametrize("kind", EAGER, ids=lambda k: k.name)
def test_errors_of_the_first_rows(kind: type[Contender]) -> None:
    found, expected = found_and_expected(
        kind, UNIFORM["powerset4"], torch.float32, batch=12, rows=5
    )
    assert len(found["y"]) == 5
    exact = [name for name in found if kind.exact or name in ("y", "grad_weight", "grad_bias")]
    assert all(errors({n: found[n]}, expected)[n] < LIMITS[torch.float32] for n in exact)


@pytest.mark.parametrize("kind", [k for k in EAGER if "step" in k.phases], ids=lambda k: k.name)
def test_phases_agree(kind: type[Contender]) -> None:
    contender = build(kind, Problem(UNIFORM["toy3"], 9))
    assert torch.equal(contender.forward(), contender.graph())
    assert not contender.forward().requires_grad
    for one, other in zip(contender.step(), contender.backward(contender.graph()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BestDenseCompiled, PaperStyleCompiled], ids=lambda k: k.name)
def test_compiled_variants_are_exact(kind: type[Contender]) -> None:
    assert_exact(kind, UNIFORM["toy3"], torch.float32)


def test_compiled_variants_leave_large_families_out() -> None:
    with pytest.raises(Unavailable, match="63 experts: compiled up to 16"):
        PaperStyleCompiled(Problem(FAMILIES["powerset6"]().hidden_layout(1, 1), 2))


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [(Zuko, "zuko.nn", "zuko"), (Nflows, "nflows.transforms.made", "nflows")],
)
def test_a_missing_package_is_a_reason(
    kind: type[Contender], module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable, match=f"pip install {name}"):
        kind(Problem(UNIFORM["toy3"], 2))


# --- Work --------------------------------------------------------------------------------


def flops_of(contender: Contender, phase: str) -> int:
    with FlopCounterMode(display=False) as counter:
        getattr(contender, phase)()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "kind", [Ours, PaperStyle, MaskedDense, MaskedBeforehand, BestDense, BucketedBmm]
)
def test_declared_flops_are_done(kind: type[Contender]) -> None:
    """No contender multiplies more than it says, and no rival multiplies less."""
    problem = Problem(UNIFORM["powerset4"], 16)
    contender = kind(problem)
    assert flops_of(contender, "step") == kind.flops(problem)


def test_the_best_rivals_waste_nothing() -> None:
    problem = Problem(UNIFORM["powerset4"], 16)
    for kind in (Ours, BucketedBmm):
        for phase in ("forward", "step"):
            assert flops_of(kind(problem), phase) == count(problem)[phase].flops


@pytest.mark.parametrize("family", ["ncf4", "powerset4", "chain16"])
def test_floor_gemm_does_as_many_flops(family: str) -> None:
    problem = Problem(FAMILIES[family]().hidden_layout(16, 16), 32)
    floor, counts = FloorGemm(problem), count(problem)
    for phase in ("forward", "step"):
        assert flops_of(floor, phase) == pytest.approx(counts[phase].flops, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        floor.backward(floor.graph())
    assert counter.get_total_flops() == pytest.approx(counts["backward"].flops, rel=0.02)


def test_floor_copy_moves_as_many_bytes() -> None:
    problem = Problem(UNIFORM["powerset4"], 16)
    floor, counts = FloorCopy(problem), count(problem)
    for phase in ("forward", "step"):
        copied = getattr(floor, phase)()
        assert 2 * copied.nbytes == pytest.approx(counts[phase].bytes, abs=2)
    assert 2 * floor.backward(None).nbytes == pytest.approx(counts["backward"].bytes, abs=2)


def test_dense_layers_share_one_weight() -> None:
    """Many dense contenders at once must not each hold a copy."""
    problem = Problem(UNIFORM["powerset4"], 2)
    kinds = [k for k in EAGER if issubclass(k, DenseLayer) and k not in (Zuko, Nflows)]
    held = {build(kind, problem).parameters[0].data_ptr() for kind in [*kinds, Zuko]}
    assert held == {problem.dense.data_ptr()}


# --- The whole network -------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["shared", "strict"])
def test_the_paper_style_network_is_ours(embeddings: str) -> None:
    sizes = NCFSizes(num_users=5, num_items=6)
    ours = InterpretableNCF(sizes, hidden=(8, 4), embeddings=embeddings).double()
    theirs = PaperStyleNCF(ours)
    generator = torch.Generator().manual_seed(0)
    user, item = (torch.randint(5, (7,), generator=generator) for _ in range(2))
    codes = torch.stack([torch.randint(n, (7,), generator=generator) for n in (2, 7, 21)], 1)
    numeric = torch.randn(7, 19, dtype=torch.float64, generator=generator)
    grad = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    shared = list(ours.inputs.parameters())
    outputs = [model(user, item, codes, numeric) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for one, other in zip(*(torch.autograd.grad(y, shared, grad) for y in outputs), strict=True):
        torch.testing.assert_close(other, one)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1]
