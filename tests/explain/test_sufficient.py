"""The smallest expert that suffices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.explain import sufficient
from maskmoe_kernels.testing import strategies

FAMILY = mk.SubsetFamily(
    {"content": 2, "user": 3, "item": 1},
    {
        "all": ["content", "user", "item"],
        "user": ["content", "user"],
        "item": ["content", "item"],
        "content": ["content"],
    },
)
ALL, USER, ITEM, CONTENT = range(4)
nan = torch.nan


@pytest.mark.parametrize(
    ("logits", "expert", "gap"),
    [
        ([1.0, 1.0, 1.0, 1.0], CONTENT, 0.0),
        ([1.0, 0.0, 0.0, 0.8], CONTENT, 0.4),  # log-odds are 2 z
        ([1.0, 0.9, 1.05, 0.0], ITEM, 0.1),  # of one size: the nearer
        ([1.0, 0.76, 0.0, 0.0], USER, 0.48),
        ([1.0, 0.74, 0.0, 0.0], ALL, 0.0),
        ([1.0, nan, 0.9, nan], ITEM, 0.2),
        ([-1.0, -0.9, 0.9, 1.0], USER, 0.2),
    ],
)
def test_who_suffices(logits, expert, gap):
    out = sufficient(torch.tensor(logits, dtype=torch.float64), FAMILY)
    assert int(out.expert) == expert
    assert float(out.gap) == pytest.approx(gap, rel=0, abs=1e-12)
    assert float(out.prediction) == pytest.approx(
        float(torch.sigmoid(torch.tensor(2 * logits[0], dtype=torch.float64))), rel=1e-12, abs=0
    )


def test_where_all_is_not_known_nothing_is():
    out = sufficient(torch.tensor([[nan, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]), FAMILY)
    assert out.expert.tolist() == [ALL, ALL]
    assert out.gap.isnan().tolist() == [True, False]
    assert out.prediction.isnan().tolist() == [True, False]


def test_classes_agree_in_log_odds():
    logits = torch.tensor([[[0.0, 1.0, 3.0], [7.0, 8.0, 10.0], [0.0, 1.3, 2.9], [0.0, 0.0, 3.0]]])
    out = sufficient(logits, FAMILY, 0.5)
    # The second expert's logits are shifted alike, which changes no probability: gap 0.
    assert out.expert.tolist() == [USER]
    assert float(out.gap) == pytest.approx(0.0, abs=1e-6)
    out = sufficient(logits[:, [0, 2, 3, 1]], FAMILY, 0.5)  # another expert is content now
    assert out.expert.tolist() == [CONTENT]
    torch.testing.assert_close(out.prediction, logits[:, 0].softmax(-1))
    only = sufficient(logits[:, [0, 2, 3, 3]], FAMILY, 0.5)
    assert only.expert.tolist() == [USER]
    assert float(only.gap) == pytest.approx(0.4, abs=1e-6)  # 0.3 up, 0.1 down


@given(strategies.families(), st.integers(0, 2**16), st.floats(0, 3))
def test_nobody_smaller_would_do(family, seed, tolerance):
    tops = family.inclusion.all(1)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, family.num_experts, generator=generator, dtype=torch.float64)
    if not tops.any():
        with pytest.raises(mk.LayoutError, match="sees all that the others see"):
            sufficient(logits, family, tolerance)
        return
    top, size = int(tops.nonzero()[0]), family.membership.sum(1)
    out = sufficient(logits, family, tolerance)
    for n, row in enumerate(2 * logits):
        gaps = (row - row[top]).abs()
        chosen = int(out.expert[n])
        assert gaps[chosen] <= tolerance
        assert torch.equal(out.gap[n], gaps[chosen])
        for other in range(family.num_experts):
            smaller = size[other] < size[chosen]
            nearer = size[other] == size[chosen] and gaps[other] < gaps[chosen]
            assert not (gaps[other] <= tolerance and (smaller or nearer))


def test_the_prediction_is_differentiable():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sufficient(z, FAMILY).prediction, logits)
    out = sufficient(logits, FAMILY)
    assert not out.gap.requires_grad


@pytest.mark.parametrize("tolerance", [-0.1, nan, "0.5", None])
def test_bad_tolerance(tolerance):
    with pytest.raises(mk.LayoutError, match="tolerance must be"):
        sufficient(torch.zeros(2, 4), FAMILY, tolerance)


def test_one_graph_of_torch_compile():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(sufficient, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(logits, FAMILY), sufficient(logits, FAMILY), strict=True):
        torch.testing.assert_close(ours, eager)
