"""Sessions of random families: what the tests of both session models share."""

import torch
from hypothesis import strategies as st

from maskmoe_kernels.testing.strategies import families
from tests.nn.per_expert import linear, widths


@st.composite
def halves(draw, max_experts=5, of=(1, 2, 3)):
    """A family, the groups of both halves in an order and widths of their own, and widths.

    The first half's are those of the family, or others: then a group may be in the second half
    alone, or in none.
    """
    family = draw(families(max_experts))

    def groups():
        names = draw(st.lists(st.sampled_from(list(family.groups)), min_size=1, unique=True))
        return {name: draw(st.sampled_from([1, 2, 3])) for name in names}

    second = groups()
    first = groups() if draw(st.booleans()) else None
    return family, second, draw(widths(family, of)), first


def batch(model, sessions=3, steps=(3, 4), seed=0, dtype=torch.float64, tail=False):
    """Both halves and where they are padding: anywhere, or after the steps."""
    generator = torch.Generator().manual_seed(seed)
    features = (model.first_features, model.second_features)
    data, padding = [], []
    for count, width in zip(steps, features, strict=True):
        data.append(torch.randn(sessions, count, width, generator=generator, dtype=dtype))
        if tail:
            lengths = torch.randint(1, count + 1, (sessions, 1), generator=generator)
            padding.append(torch.arange(count) >= lengths)
        else:
            padding.append(torch.rand(sessions, count, generator=generator) < 0.3)
    return *data, *padding


def spoilt(data, fill):
    """The batch with ``fill`` at every padded step."""
    first, second, *padding = data
    parts = zip((first, second), padding, strict=True)
    return *(x.masked_fill(absent[..., None], fill) for x, absent in parts), *padding


def side_by_side(model, padding):
    """The model as a function of one tensor that holds both halves, and who sees what of it."""
    width = model.first_features

    def run(x):
        return model(x[..., :width], x[..., width:], *padding)

    visible = torch.tensor(
        [
            [
                group in subset
                for groups in (model.first_groups, model.second_groups)
                for group, units in groups.items()
                for _ in range(units)
            ]
            for subset in model.family.subsets.values()
        ]
    )
    return run, visible


def first_layer(layer, x, family, groups):
    """``layer`` over the groups of a half, expert by expert."""
    reading = [
        (inside, inside)
        for subset in family.subsets.values()
        for inside in [[n for n, group in enumerate(groups) if group in subset]]
    ]
    parts = x.split(list(groups.values()), -1)
    sizes = layer.layout.row_sizes
    return torch.cat(linear(layer.dense_weight(), layer.bias, parts, sizes, reading), -1)
