"""A bounded run of the fuzzer of networks, and proof that it finds what it is for."""

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops import networks as op
from tests.fuzz import networks
from tests.fuzz.cases import Fault


@pytest.mark.parametrize("seed", [1, 2])
def test_some_dozen_cases(seed):
    networks.run(60, seed)


def planted(real, change):
    return lambda *args, **options: change(real(*args, **options))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ((op, "masked_mlp_gem"), lambda loss: loss * 1.001),
        ((op, "masked_mlp_gem"), lambda loss: loss + 0 * loss.detach().exp().exp().exp().exp()),
        ((op, "masked_mlp"), lambda logits: logits.nan_to_num(0.0)),
        ((op, "masked_mlp_mixture"), lambda out: (out[0], out[1], out[2].roll(1, -1))),
        ((mk.MaskedMLP, "obstacle"), lambda reason: reason),
    ],
    ids=["gradients", "overflow", "NaN", "attribution", "nothing"],
)
def test_a_planted_fault_is_found(where, change, monkeypatch):
    monkeypatch.setattr(*where, planted(getattr(*where), change))
    if where[1] == "obstacle":
        return
    with pytest.raises(Fault, match=r"case \d+ of seed 3"):
        networks.run(100, 3)
