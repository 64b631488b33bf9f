"""A bounded run of the fuzzer of masked MLPs, and proof that it finds what it is for."""

import pytest

from maskmoe_kernels.models import mlp as model
from maskmoe_kernels.nn import mlp as module
from tests.fuzz import mlp
from tests.fuzz.cases import Fault

CASES, SEED = 40, 1


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_some_dozen_cases(seed):
    mlp.run(CASES, seed)


def planted(real, change):
    return lambda *args, **options: change(real(*args, **options))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ((model, "masked_mlp_gem"), lambda loss: loss * 1.001),
        ((model, "masked_mlp_gem"), lambda loss: loss + 0 * loss.detach().exp().exp().exp().exp()),
        ((module, "masked_mlp"), lambda logits: logits.nan_to_num(0.0)),
        ((model, "masked_mlp_mixture"), lambda out: (out[0], out[1], out[2].roll(1, -1))),
    ],
    ids=["gradients", "overflow", "NaN", "attribution"],
)
def test_a_planted_fault_is_found(where, change, monkeypatch):
    monkeypatch.setattr(*where, planted(getattr(*where), change))
    with pytest.raises(Fault, match=rf"case \d+ of seed {SEED}"):
        mlp.run(CASES, SEED)
