"""Problems, counts and the reference, against independent definitions."""

from __future__ import annotations

import pytest
import torch

from bench.cases import Case
from bench.counts import Counts, count
from bench.layers.reference_error import errors, reference, rows_to_check
from bench.layers.suites import SUITES
from bench.problem import Problem
from maskmoe_kernels import BlockLayout, SubsetFamily
from maskmoe_kernels.layout.families import FAMILIES
from maskmoe_kernels.testing import dense_oracle

FAMILY = SubsetFamily({"a": 2, "b": 3}, {"none": [], "a": ["a"], "b": ["b"], "both": ["a", "b"]})
LAYOUTS = {
    "uniform": FAMILY.hidden_layout(3, 3),
    "ragged": FAMILY.hidden_layout([1, 4, 2, 5], [3, 1, 7, 2]),
    "input, with a unit that sees nothing": FAMILY.input_layout([2, 1, 3, 4]),
    "strict": FAMILY.input_layout(2, strict=True),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@layouts
def test_forms_of_the_weight_agree(layout: BlockLayout) -> None:
    problem = Problem(layout, 4)
    assert torch.equal(layout.unpack(problem.packed), problem.dense)
    assert torch.equal(problem.dense != 0, layout.mask())
    for form, back in (("packed", problem.from_packed), ("dense", problem.from_dense)):
        assert torch.equal(back(getattr(problem, form)), problem.compact)
    columns = layout.mask()
    for i, matrix in enumerate(problem.row_matrices(problem.compact)):
        rows = slice(*layout.row_offsets[i : i + 2])
        assert torch.equal(matrix, problem.dense[rows][:, columns[rows][0]])


def test_interleaved_layouts_are_refused() -> None:
    layout = BlockLayout.from_mask(torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]))
    assert layout.row_order is not None
    with pytest.raises(ValueError, match="one after another"):
        Problem(layout, 4)


@layouts
@pytest.mark.parametrize("rows", [3, 5])
def test_the_reference_is_the_oracle(layout: BlockLayout, rows: int) -> None:
    problem = Problem(layout, 5, torch.float64)
    x = problem.x.detach()[:rows].requires_grad_()
    weight = problem.packed
    y = dense_oracle(x, weight, problem.bias, layout)
    grads = torch.autograd.grad(y, (x, weight, problem.bias), problem.grad[:rows])
    expected = {"y": y, "grad_x": grads[0], "grad_bias": grads[2]}
    expected["grad_weight"] = problem.from_packed(grads[1])
    found = reference(problem, rows)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-12)


def test_errors_are_relative_to_the_largest_value() -> None:
    expected = {"y": torch.tensor([4.0, -8.0]).double(), "grad_x": torch.tensor([1.0]).double()}
    assert errors({"y": torch.tensor([5.0, -8.0])}, expected) == {"y": 1 / 8}


def test_few_rows_are_checked_only_where_float64_is_slow() -> None:
    assert rows_to_check(Problem.of(Case("toy3", 16, 4096))) == 4096
    assert 64 <= rows_to_check(Problem.of(Case("powerset6", 64, 4096))) < 4096


def test_counts_by_hand() -> None:
    # Three experts of 2 units: 3 blocks on the diagonal, 2 below it.
    problem = Problem(FAMILIES["toy3"]().hidden_layout(2, 2), 10, torch.bfloat16)
    counts = count(problem)
    assert counts["forward"] == Counts(2 * 10 * 5 * 4, 2 * (60 + 20 + 6 + 60))
    assert counts["backward"] == Counts(2 * 10 * (20 + 12), 2 * (60 + 60 + 12 + 60 + 20 + 6))
    assert counts["step"] == counts["forward"] + counts["backward"]


def test_values_follow_from_the_case() -> None:
    a, b = (Problem.of(Case("ncf4", 4, 8)) for _ in range(2))
    for name in ("compact", "bias", "x", "grad"):
        assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("name", SUITES)
def test_suites(name: str) -> None:
    suite = SUITES[name]
    cases = suite.cases()
    assert len(set(cases)) == len(cases) > 0
    only = suite.cases(["chain16"], [7], [9], ["bfloat16"])
    assert only == [Case("chain16", 7, 9, "bfloat16")]


def test_the_full_suite_holds_every_shape() -> None:
    cases = set(SUITES["full"].cases())
    for family in FAMILIES:
        for width in (16, 32, 64, 128):
            for batch in (256, 4096):
                for dtype in ("float32", "bfloat16"):
                    assert Case(family, width, batch, dtype) in cases
    assert {case.batch for case in cases} == {256, 4096, 65536}
