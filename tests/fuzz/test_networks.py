"""A bounded run of the fuzzer of networks, and proof that it finds what it is for."""

import pytest

from maskmoe_kernels.ops.masked_mlp import api as op
from tests.fuzz import networks
from tests.fuzz.cases import Fault

CASES, SEED = 40, 1


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_some_dozen_cases(seed):
    networks.run(CASES, seed)


def planted(real, change):
    return lambda *args, **options: change(real(*args, **options))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ((op, "masked_mlp_gem"), lambda loss: loss * 1.001),
        ((op, "masked_mlp_gem"), lambda loss: loss + 0 * loss.detach().exp().exp().exp().exp()),
        ((op, "masked_mlp"), lambda logits: logits.nan_to_num(0.0)),
        ((op, "masked_mlp_mixture"), lambda out: (out[0], out[1], out[2].roll(1, -1))),
    ],
    ids=["gradients", "overflow", "NaN", "attribution"],
)
def test_a_planted_fault_is_found(where, change, monkeypatch):
    monkeypatch.setattr(*where, planted(getattr(*where), change))
    with pytest.raises(Fault, match=rf"case \d+ of seed {SEED}"):
        networks.run(CASES, SEED)
