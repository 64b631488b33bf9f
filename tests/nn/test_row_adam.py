"""RowAdam: the results of Adam with dense gradients, at the cost of the rows that are read."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.experiments.shared.trainer import take_step
from maskmoe_kernels.nn import RowAdam, unrouted

ROWS, WIDTH = 60, 3


class Model(nn.Module):
    def __init__(self, sparse: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, WIDTH, sparse=sparse, dtype=dtype)
        self.linear = nn.Linear(WIDTH, 1, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        y: Tensor = self.linear(self.table(rows)).squeeze(-1)
        return y


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Rows, some twice and some for hundreds of steps not at all, and targets."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        rare = torch.randint(20, ROWS - 5, (1,), generator=generator)
        rows = torch.randint(0, 20, (6,), generator=generator)
        rows = torch.cat([rows, rows[:2], rare if k % 7 == 0 else rows[:0]])
        found.append((rows, torch.randn(len(rows), generator=generator, dtype=torch.float64)))
    return found


def advance(model: Model, optimizer: Any, steps: Any, clip: float | None = None) -> None:
    for rows, target in steps:
        take_step(optimizer, lambda r=rows, y=target: ((model(r) - y) ** 2).sum(), clip)


def assert_same(one: nn.Module, other: nn.Module, rtol: float) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_results_are_those_of_dense_gradients(clip: float | None) -> None:
    dense, sparse = Model(False), Model(True)
    start = copy.deepcopy(dense)
    adam = torch.optim.Adam(dense.parameters(), lr=0.01, fused=True)
    ours = RowAdam(sparse, lr=0.01)
    for k, step in enumerate(batches(400)):
        if k in (60, 310):  # as a schedule does
            adam.param_groups[0]["lr"] = ours.param_groups[0]["lr"] = 0.02 - k / 30_000
        for model, optimizer in ((dense, adam), (sparse, ours)):
            advance(model, optimizer, [step], clip)
        # What is looked up is up to date at any time.
        torch.testing.assert_close(sparse(step[0]), dense(step[0]), rtol=1e-10, atol=1e-11)
    behind = (sparse.table.weight - dense.table.weight).abs().amax(1)
    assert (behind > 1e-6).any()
    ours.settle()
    assert_same(dense, sparse, 1e-11)
    moved = (dense.table.weight - start.table.weight).abs().amax(1)
    read = torch.cat([rows for rows, _ in batches(400)]).unique()
    never = torch.ones(ROWS, dtype=torch.bool)
    never[read] = False
    assert (moved[read] > 1e-3).all()
    assert never.any()
    assert torch.equal(sparse.table.weight[never], start.table.weight[never])
    # And not those of an optimizer that leaves rows where they are.
    lazy = Model(True)
    parts = [torch.optim.SparseAdam([lazy.table.weight], lr=0.01),
             torch.optim.Adam(lazy.linear.parameters(), lr=0.01)]  # fmt: skip
    for rows, target in batches(300):
        for part in parts:
            part.zero_grad()
        ((lazy(rows) - target) ** 2).sum().backward()
        for part in parts:
            part.step()
    dense = Model(False)
    advance(dense, torch.optim.Adam(dense.parameters(), lr=0.01), batches(300))
    assert (dense.table.weight - lazy.table.weight).abs().max() > 1e-3


def test_in_float32_it_differs_by_rounding() -> None:
    dense, sparse = Model(False, torch.float32), Model(True, torch.float32)
    exact = Model(False)
    exact.load_state_dict({k: v.double() for k, v in dense.state_dict().items()})
    adam = torch.optim.Adam(dense.parameters(), fused=True)
    ours, truth = RowAdam(sparse), torch.optim.Adam(exact.parameters())
    steps = [(rows, target.float()) for rows, target in batches(400)]
    advance(dense, adam, steps)
    advance(sparse, ours, steps)
    advance(exact, truth, [(rows, target.double()) for rows, target in steps])
    ours.settle()
    for name, value in exact.state_dict().items():
        errors = [(m.state_dict()[name] - value).abs().max() for m in (dense, sparse)]
        assert errors[1] <= 2 * errors[0] + 1e-6, name


def train_twins(sparse: bool) -> Model:
    """A model with two embeddings that share their rows, and are read in one step."""
    model = Model(sparse)
    twin = nn.Embedding(ROWS, WIDTH, sparse=sparse)
    twin.weight = model.table.weight
    model.add_module("twin", twin)
    optimizer = RowAdam(model)

    def loss(rows: Tensor, target: Tensor) -> Tensor:
        both = model(rows) + model.linear(twin(rows + 1)).squeeze(-1)
        return ((both - target) ** 2).sum()

    for batch in batches(60):
        take_step(optimizer, partial(loss, *batch))
    optimizer.settle()
    return model


def test_two_embeddings_may_share_their_rows() -> None:
    assert_same(train_twins(False), train_twins(True), 1e-11)


def test_without_sparse_embeddings_it_is_adam_bit_for_bit() -> None:
    one, other = Model(False), Model(False)
    advance(one, torch.optim.Adam(one.parameters(), fused=True), batches(20), 0.5)
    advance(other, RowAdam(other), batches(20), 0.5)
    assert_same(one, other, 0)


def test_a_compiled_model_trains_the_same() -> None:
    eager, compiled = Model(True), Model(True)
    compiled.compile(backend="aot_eager", dynamic=True)
    for model in (eager, compiled):
        advance(model, optimizer := RowAdam(model), batches(25), 0.5)
        optimizer.settle()
    assert_same(eager, compiled, 1e-12)


def test_a_resumed_run_has_the_same_bits() -> None:
    steps = batches(120)
    whole = Model(True)
    advance(whole, of_whole := RowAdam(whole), steps)
    half = Model(True)
    advance(half, optimizer := RowAdam(half), steps[:70])
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["row_step"].unique().numel() > 10
    resumed = Model(True)
    of_resumed = RowAdam(resumed)
    resumed.load_state_dict(saved[0])
    of_resumed.load_state_dict(saved[1])
    advance(resumed, of_resumed, steps[70:])
    assert_same(whole, resumed, 0)
    for key, value in of_whole.state_dict()["state"][0].items():
        assert torch.equal(value, of_resumed.state_dict()["state"][0][key]), key


def test_it_goes_on_where_dense_gradients_ended_and_back() -> None:
    steps = batches(200)
    dense = Model(False)
    advance(dense, adam := torch.optim.Adam(dense.parameters(), fused=True), steps)
    model: Model | None = None
    saved: Any = None
    for begin, end, is_sparse in ((0, 60, False), (60, 130, True), (130, 200, False)):
        model = Model(is_sparse)
        optimizer = RowAdam(model)
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        advance(model, optimizer, steps[begin:end])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert model is not None
    assert_same(dense, model, 1e-10)
    torch.testing.assert_close(saved[1]["state"][0], adam.state_dict()["state"][0])


def test_a_step_touches_no_other_row() -> None:
    model = Model(True)
    advance(model, optimizer := RowAdam(model), batches(30))
    state = optimizer.state[model.table.weight]
    before = {name: value.clone() for name, value in state.items()}
    weight = model.table.weight.detach().clone()
    rows = torch.tensor([4, 11, 4])
    advance(model, optimizer, [(rows, torch.ones(3, dtype=torch.float64))])
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    for name in ("exp_avg", "exp_avg_sq", "row_step"):
        assert torch.equal(state[name][others], before[name][others])
        assert not torch.equal(state[name][rows], before[name][rows])
    assert torch.equal(model.table.weight[others], weight[others])
    assert model.table.weight.grad is not None
    assert model.table.weight.grad.is_sparse


def test_rows_that_catch_up_together_or_alone_have_the_same_bits() -> None:
    one, other = Model(True, torch.float32), Model(True, torch.float32)
    steps = [(rows, target.float()) for rows, target in batches(90)]
    advance(one, of_one := RowAdam(one), steps)
    advance(other, of_other := RowAdam(other), steps)
    of_one.settle()
    for row in torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)):
        of_other.look_up(other.table.weight, row)
    assert_same(one, other, 0)


def test_copies_and_pickles() -> None:
    model = Model(True)
    advance(model, optimizer := RowAdam(model), batches(30))
    rows = torch.arange(ROWS)
    twin, apart = unrouted(model), pickle.loads(pickle.dumps(model))
    behind = apart(rows)
    after = twin(rows)  # shares the weights, so it brings them up to date
    assert not torch.equal(after, behind)
    assert torch.equal(model(rows), after)
    apart_optimizer = RowAdam(apart)  # a new one knows nothing that was missed
    assert torch.equal(apart(rows), behind)
    del optimizer, apart_optimizer
    assert torch.equal(model(rows), after)


def test_what_it_refuses() -> None:
    with pytest.raises(LayoutError, match=r"beta1\^2 < beta2, .* got \(0.9, 0.5\)"):
        RowAdam(Model(True), betas=(0.9, 0.5))
    with pytest.raises(LayoutError, match=r"embedding table must be float32 .* got torch.bfloat16"):
        RowAdam(Model(True, torch.bfloat16))
    with pytest.raises(LayoutError, match="model must be"):
        RowAdam([])  # type: ignore[arg-type]
    model = Model(True)
    advance(model, optimizer := RowAdam(model), batches(3))
    for bad in (torch.tensor([1.0]), torch.full((ROWS,), 4.0), torch.full((ROWS,), 0.5)):
        saved = optimizer.state_dict()
        saved["state"] = {k: dict(v) for k, v in saved["state"].items()}
        saved["state"][0]["row_step"] = bad
        with pytest.raises(ValueError, match="expected 60 whole numbers from 0 to 3 in row_step"):
            RowAdam(Model(True)).load_state_dict(saved)
