"""captum on our models: what an expert cannot see gets exactly nothing, and sums are complete."""

import pytest
import torch
from torch import nn

import maskmoe_kernels as mk

captum = pytest.importorskip("captum.attr", reason="captum is not installed")

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 4, "c": 2}, min_size=0)
VISIBLE = FAMILY.visible_features()
GROUP_OF = torch.tensor([0] * 3 + [1] * 4 + [2] * 2)
EXPERTS = range(FAMILY.num_experts)


def case():
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 8], activation="tanh")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)  # far from linear
    return net, torch.randn(6, 9), torch.randn(1, 9)


def in_modules(activation=nn.ReLU):
    """A masked network through which every gradient goes, its activations modules of their own."""
    torch.manual_seed(0)
    layouts = [FAMILY.input_layout(8), FAMILY.hidden_layout(8, 8), FAMILY.hidden_layout(8, 1)]
    parts = []
    for layout in layouts:
        routed = mk.BlockLayout(layout.row_sizes, layout.col_sizes, layout.present)
        parts += [mk.MaskedLinear.from_layout(routed), activation()]
    with torch.no_grad():
        for part in parts[:-1:2]:
            part.weight.mul_(3)
            part.bias.uniform_(-1, 1)  # kinks of ReLU between the input and its base
    return nn.Sequential(*parts[:-1])


GRADIENTS = {
    "IntegratedGradients": lambda net: captum.IntegratedGradients(net),
    "DeepLift": lambda net: captum.DeepLift(net),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_attributions_are_complete_where_every_gradient_is_routed(name):
    _, x, base = case()
    net = in_modules()
    method = GRADIENTS[name](net)
    steps = {"n_steps": 400} if name == "IntegratedGradients" else {}
    for i in EXPERTS:
        parts = method.attribute(x, base.expand_as(x), target=i, **steps)
        assert not parts[:, ~VISIBLE[i]].any()
        effect = (net(x) - net(base))[:, i]
        tolerance = 0.02 if steps else 1e-4  # the trapezoidal rule at kinks; rounding
        torch.testing.assert_close(parts.sum(1), effect, rtol=0, atol=tolerance)
        assert VISIBLE[i].any() == (effect.abs().max() > 10 * tolerance)


def test_integrated_gradients_of_experts_that_read_no_other():
    """Whose gradient is not stopped anywhere: the smallest subsets."""
    net, x, base = case()
    found = captum.IntegratedGradients(net)
    for i in EXPERTS:
        parts, delta = found.attribute(
            x, base.expand_as(x), target=i, n_steps=200, return_convergence_delta=True
        )
        assert not parts[:, ~VISIBLE[i]].any()
        if len(FAMILY.subsets[FAMILY.names[i]]) == 1:
            assert delta.abs().max() < 1e-3
            assert (net(x) - net(base))[:, i].abs().max() > 0.1


PERTURBATIONS = {
    "FeatureAblation": lambda net, x, base, i: captum.FeatureAblation(net).attribute(
        x, base, target=i
    ),
    "Occlusion": lambda net, x, base, i: captum.Occlusion(net).attribute(
        x, (1,), baselines=base.expand_as(x), target=i
    ),
    "ShapleyValueSampling": lambda net, x, base, i: captum.ShapleyValueSampling(net).attribute(
        x, base, target=i, n_samples=3
    ),
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbations_of_the_unseen_change_nothing(name):
    net, x, base = case()
    for i in EXPERTS:
        parts = PERTURBATIONS[name](net, x, base, i)
        assert not parts[:, ~VISIBLE[i]].any()
        assert parts[:, VISIBLE[i]].any() == VISIBLE[i].any()


def test_shapley_value_sampling_is_complete():
    """For any gradient: it asks for values alone, so stopped gradients do not matter."""
    net, x, base = case()
    method = captum.ShapleyValueSampling(net)
    for i in EXPERTS:
        parts = method.attribute(x, base, target=i, n_samples=4)
        torch.testing.assert_close(parts.sum(1), (net(x) - net(base))[:, i], rtol=0, atol=1e-5)


def test_shapley_values_of_the_game_of_experts_are_ours():
    """captum asks for each coalition of groups; we read all of them from one call."""
    net, x, _ = case()
    logits = net(x).detach()
    expert = {frozenset(groups): i for i, groups in enumerate(FAMILY.subsets.values())}

    def value(present):
        rows = [
            {g for g, here in zip(FAMILY.groups, row, strict=True) if here}
            for row in present.bool().tolist()
        ]
        chosen = torch.tensor([expert[frozenset(row)] for row in rows])
        return logits[torch.arange(len(rows)) % len(x), chosen]

    theirs = captum.ShapleyValues(value).attribute(torch.ones(6, 3), torch.zeros(6, 3))
    torch.testing.assert_close(mk.shapley(logits, FAMILY), theirs)


def test_groups_as_features():
    net, x, base = case()
    for i in EXPERTS:
        parts = captum.ShapleyValues(net).attribute(x, base, target=i, feature_mask=GROUP_OF)
        by_group = parts[:, [0, 3, 7]]
        torch.testing.assert_close(by_group.sum(1), (net(x) - net(base))[:, i], rtol=0, atol=1e-5)
        assert torch.equal(by_group.ne(0).any(0), FAMILY.membership[i])


def test_layers_can_be_attributed_to():
    net, x, base = case()
    top = FAMILY.num_experts - 1
    parts = captum.LayerConductance(net, net.layers[0]).attribute(
        x, base.expand_as(x), target=top, n_steps=20
    )
    own = slice(top * 8, top * 8 + 8)  # of experts below it, the gradient is stopped
    assert parts[:, own].any()
    assert not parts[:, : own.start].any()
    assert net.layers.unsupported_reason() is None  # its hooks are gone
