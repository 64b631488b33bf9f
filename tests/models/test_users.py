"""Embeddings of users in session models: who reads them, and who trains them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models import GRU, InterpretableGRU, InterpretableTransformer, Transformer
from maskmoe_kernels.models.sessions import SessionModel, UserTable

GROUPS = {"given": 2, "who": 3, "item": 4}
FAMILY = SubsetFamily(
    GROUPS,
    {"given": ["given"], "who": ["who"], "item": ["item"], "both": ["who", "item"],
     "all": ["given", "who", "item"]},
)  # fmt: skip
SECOND = {"who": 3, "item": 4}
SEES = {"who", "both", "all"}


def build(kind: type[Any], strict: bool = False) -> Any:
    torch.manual_seed(0)
    table = UserTable(6, "who", GROUPS, SECOND, std=0.5)
    if kind in (GRU, Transformer):
        more = (20, 5) if kind is Transformer else (20,)
        return kind(9, 7, *more, 1, users=table)
    more = (4, 1) if kind is InterpretableTransformer else (4,)
    return kind(FAMILY, SECOND, *more, 1, users=table, strict=strict)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(4, 5, 9, generator=generator)
    second = torch.randn(4, 5, 7, generator=generator)
    steps = torch.arange(5)
    paddings = [steps >= torch.tensor(n)[:, None] for n in ([5, 3, 4, 5], [5, 5, 2, 1])]
    return first, second, paddings[0], paddings[1], torch.tensor([1, 5, 0, 1])


@pytest.mark.parametrize("kind", [InterpretableGRU, InterpretableTransformer, GRU, Transformer])
def test_the_embedding_stands_in_the_columns_of_its_group(kind: type[Any]) -> None:
    model: SessionModel = build(kind)
    first, second, *paddings, user = batch()
    assert model.users is not None
    got = model(first, second, *paddings, user)
    rows = model.users.table(user)[:, None].expand(-1, 5, -1)
    by_hand = torch.cat([first[..., :2], rows, first[..., 5:]], -1)
    other = torch.cat([rows, second[..., 3:]], -1)
    table, model.users = model.users, None
    torch.testing.assert_close(model(by_hand, other, *paddings), got, rtol=0, atol=0)
    model.users = table
    # Whatever stood there before reaches nothing.
    first[..., 2:5], second[..., :3] = float("nan"), float("inf")
    assert torch.equal(model(first, second, *paddings, user), got)
    with pytest.raises(LayoutError, match="user must be given"):
        model(first, second, *paddings)
    with pytest.raises(LayoutError, match=r"user must be int64 \(4,\)"):
        model(first, second, *paddings, user.float())


@pytest.mark.parametrize("kind", [InterpretableGRU, InterpretableTransformer])
def test_who_sees_the_user_and_who_trains_its_embedding(kind: type[Any]) -> None:
    for strict in (False, True):
        model = build(kind, strict)
        *inputs, user = batch()
        before = model(*inputs, user)
        with torch.no_grad():
            model.users.table.weight[5] = float("nan")
        after = model(*inputs, user)
        real = ~inputs[3][1]
        for i, name in enumerate(FAMILY.names):
            assert after[1, real, i].isnan().all() == (name in SEES), name
            assert torch.equal(after[1, real, i], before[1, real, i]) == (name not in SEES), name
        assert torch.equal(after[0], before[0])
        model = build(kind, strict)
        trains = {"who"} if strict else SEES
        for i, name in enumerate(FAMILY.names):
            model.zero_grad()
            logits = model(*inputs, user)[..., i]
            (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(i))).sum(
            ).backward()  # fmt: skip
            gradient = model.users.table.weight.grad
            moved = gradient is not None and bool(gradient.any())
            assert moved == (name in trains), (name, strict)
            if moved:
                assert sorted(gradient.any(1).nonzero().flatten().tolist()) == [0, 1, 5]


def test_sparse_gradients_are_the_dense_ones_compiled_or_not() -> None:
    dense, *inputs = build(GRU), *batch()
    dense(*inputs).square().sum().backward()
    expected = dense.users.table.weight.grad
    for compiled in (False, True):
        model = build(GRU)
        model.users.table.sparse = True
        if compiled:
            model.compile(backend="aot_eager")
        model(*inputs).square().sum().backward()
        gradient = model.users.table.weight.grad
        assert gradient.is_sparse
        assert gradient.coalesce().indices().tolist() == [[0, 1, 5]]
        torch.testing.assert_close(gradient.to_dense(), expected, rtol=1e-5, atol=1e-7)


def test_a_table_that_does_not_fit() -> None:
    with pytest.raises(LayoutError, match="group 'whom' must be one of A or B"):
        UserTable(3, "whom", GROUPS, SECOND)
    with pytest.raises(LayoutError, match="as wide in both"):
        UserTable(3, "who", GROUPS, {"who": 2})
    with pytest.raises(LayoutError, match="count"):
        UserTable(0, "who", GROUPS, SECOND)
