"""What must arrive, beside ``assert_blind``, which says what must not."""

import torch


def assert_arrives(module, sample, visible):
    """NaN in a feature makes NaN of all outputs that see it, and of no other.

    Args:
        module: Maps ``(rows, in)`` to ``(rows, out)``, each row by itself.
        sample: One row, ``(in,)``, finite; each feature is spoilt in a copy of its own.
        visible: Entry (o, f): does output o see feature f? ``(out, in)``, bool.
    """
    with torch.no_grad():
        y = module(sample.repeat(len(sample), 1).fill_diagonal_(torch.nan))
    assert torch.equal(y.isnan(), visible.T.to(y.device))


def experts_of(layer, family):
    """The expert that each weight and each bias of a masked layer belongs to."""
    layout = layer.layout
    expert = torch.arange(family.num_experts)
    of_weight = expert.repeat_interleave(torch.tensor(layout.weight_offsets).diff())
    return of_weight, expert.repeat_interleave(torch.tensor(layout.row_sizes))
