"""peft beside masked layers: an adapter never connects what a mask keeps apart."""

import copy

import pytest
import torch
from torch import nn

import maskmoe_kernels as mk
from maskmoe_kernels.testing import assert_blind

peft = pytest.importorskip("peft", reason="peft is not installed")

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4, "c": 2})
VISIBLE = FAMILY.visible_features()


class Encoded(nn.Module):
    """Dense encoders, one a group, and the experts on their codes."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({g: nn.Linear(n, 4) for g, n in FAMILY.groups.items()})
        codes = mk.SubsetFamily(dict.fromkeys(FAMILY.groups, 4), FAMILY.subsets)
        self.experts = mk.InterpretableMLP(codes, [8])

    def forward(self, x):
        parts = x.split([*FAMILY.groups.values()], -1)
        encoders = self.encoders.values()
        return self.experts(torch.cat([f(p) for f, p in zip(encoders, parts, strict=True)], -1))


def case():
    torch.manual_seed(0)
    return Encoded(), torch.randn(6, 9), torch.rand(6).round()


def train(model, x, y, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        mk.gem_loss(model(x), y, FAMILY).backward()
        optimizer.step()
    return {name for name, p in model.named_parameters() if p.requires_grad}


CONFIGURATIONS = {
    "LoRA": lambda names: peft.LoraConfig(target_modules=names),
    "DoRA": lambda names: peft.LoraConfig(target_modules=names, use_dora=True),
    "LoHa": lambda names: peft.LoHaConfig(target_modules=names),
    "LoKr": lambda names: peft.LoKrConfig(target_modules=names),
    "OFT": lambda names: peft.OFTConfig(target_modules=names),
    "IA3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=[]),
    "VeRA": lambda names: peft.VeraConfig(target_modules=names),
    "weights": lambda names: peft.LoraConfig(
        target_modules=[], target_parameters=[f"{name}.weight" for name in names]
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_adapter_of_a_masked_layer_is_refused(name):
    """A product of two dense factors connects every input with every unit."""
    for names in (["experts.layers.0"], ["experts.layers.0", "experts.layers.1"]):
        model, x, _ = case()
        before = model(x)
        with pytest.raises((ValueError, TypeError), match=r"support|compatible|2d"):
            peft.get_peft_model(model, CONFIGURATIONS[name](names))
        assert torch.equal(model(x), before)


def test_all_linear_layers_are_the_dense_ones():
    model, x, y = case()
    plain = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(adapted(x), plain(x))  # an adapter begins at zero
    trained = train(adapted, x, y)
    assert trained
    assert all("encoders" in name and "lora" in name for name in trained)
    assert not torch.equal(adapted(x), plain(x))
    for merged in (False, True):
        if merged:
            expected = adapted(x)
            adapted = adapted.merge_and_unload()
            torch.testing.assert_close(adapted(x), expected)
        assert_blind(adapted, x, VISIBLE)
    for ours, theirs in zip(adapted.experts.parameters(), plain.experts.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_masked_layers_are_trained_whole_beside_an_adapter(tmp_path):
    model, x, y = case()
    plain = copy.deepcopy(model)
    of = peft.LoraConfig(r=2, target_modules=["encoders.a"], modules_to_save=["experts.layers.1"])
    adapted = peft.get_peft_model(model, of)
    trained = train(adapted, x, y)
    assert any("experts.layers.1" in name for name in trained)
    assert not any("experts.layers.0" in name for name in trained)
    assert_blind(adapted, x, VISIBLE)
    adapted.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    torch.testing.assert_close(again(x), adapted(x))
    assert not torch.equal(again(x), plain(x))
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), plain(x))
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted(x))
    assert_blind(merged, x, VISIBLE)
