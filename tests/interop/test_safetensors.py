"""safetensors: packed weights and what says how they are packed, shared ones too."""

import pytest
import torch
from torch import nn

import maskmoe_kernels as mk

files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4})
TRIANGLE = torch.ones(9, 9).tril()


class Shared(nn.Module):
    """A layer that stands in two places, and a weight that two layers have."""

    def __init__(self, mask=TRIANGLE):
        super().__init__()
        self.one = mk.MaskedLinear(9, 9, mask)
        self.again = self.one
        self.other = mk.MaskedLinear(9, 9, mask)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.again(self.one(x)))


MODELS = {
    "shared": Shared,
    "network": lambda: mk.InterpretableMLP(FAMILY, [5, [1, 2, 3]]),
    "recurrent": lambda: mk.MaskedGRU(FAMILY, 3, num_layers=2),
    "attention": lambda: mk.MaskedMultiheadAttention(FAMILY, 4, 2),
    "norm": lambda: mk.ExpertNorm(FAMILY, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(name, tmp_path):
    source, target = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for p in target.parameters():
            p.fill_(7)
    files.save_model(source, str(tmp_path / "model"))
    assert files.load_model(target, str(tmp_path / "model")) == (set(), [])
    found = dict(target.named_parameters(remove_duplicate=False))
    for key, value in source.named_parameters(remove_duplicate=False):
        assert torch.equal(found[key], value), key


def test_shared_weights_are_stored_once_and_stay_shared(tmp_path):
    source, target = Shared(), Shared()
    files.save_model(source, str(tmp_path / "model"))
    stored = files.load_file(tmp_path / "model")
    assert sum(key.endswith(".weight") for key in stored) == 1
    files.load_model(target, str(tmp_path / "model"))
    assert target.other.weight is target.one.weight
    x = torch.randn(4, 9)
    assert torch.equal(target(x), source(x))
    with pytest.raises(RuntimeError, match="share memory"):  # and the other way in refuses
        files.save_file(source.state_dict(), tmp_path / "file")


@pytest.mark.parametrize("strict", [True, False])
def test_another_layout_is_refused(strict, tmp_path):
    files.save_model(Shared(), str(tmp_path / "model"))
    target = Shared(TRIANGLE.flip(0))
    with pytest.raises(RuntimeError, match=r"packing mismatch .* another layout"):
        files.load_model(target, str(tmp_path / "model"), strict=strict)


def test_dense_weights_of_another_program_load(tmp_path):
    source = mk.MaskedLinear(9, 9, TRIANGLE)
    files.save_model(source.to_linear(), str(tmp_path / "dense"))
    target = mk.MaskedLinear(9, 9, TRIANGLE)
    files.load_model(target, str(tmp_path / "dense"))
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)
