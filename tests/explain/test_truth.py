"""Trained experts against the truth: correlated Gaussians, whose Shapley values are known."""

import pytest
import torch

import maskmoe_kernels as mk
from bench.networks.gaussian_truth import GaussianTask, errors, train
from tests.explain.definition import by_permutations


def test_the_truth_is_the_mean_of_samples_with_the_same_seen_features():
    task = GaussianTask(3, seed=3)
    x, _ = task.draw(2, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for seen, value in zip(task.family.membership, task.game(x).T, strict=True):
        for row in range(2):
            # The conditional distribution, drawn: kriging moves a free draw onto what is seen.
            free, _ = task.draw(400_000, generator)
            of_seen = task.covariance[:, seen].float()
            off = x[row, seen] - free[:, seen]
            drawn = free + off @ torch.linalg.solve(of_seen[seen], of_seen.T)
            means = task.mean(drawn.double())
            noise = 5 * float(means.std()) / len(means) ** 0.5
            assert float(value[row]) == pytest.approx(float(means.mean()), rel=0, abs=noise + 1e-6)


def test_the_true_values_are_those_of_all_permutations():
    task = GaussianTask(4, seed=1)
    x, _ = task.draw(3, torch.Generator().manual_seed(0))
    game = task.game(x)
    members = task.family.membership
    for row, phi in enumerate(task.shapley(x)):
        values = {
            frozenset(members[i].nonzero().flatten().tolist()): float(game[row, i])
            for i in range(len(members))
        } | {frozenset(): task.base}
        for n, expected in by_permutations(values.__getitem__, range(4)).items():
            assert float(phi[n]) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("features", "steps"),
    [
        (4, 1000),
        pytest.param(6, 4000, marks=pytest.mark.deep),
        pytest.param(8, 4000, marks=pytest.mark.deep),
    ],
)
def test_trained_experts_have_the_true_shapley_values(features, steps):
    task = GaussianTask(features)
    trained = train(task, 0, steps=steps)
    x, _ = task.draw(2000, torch.Generator().manual_seed(9))
    found, true = trained.shapley(x), task.shapley(x)
    assert errors(found, true)["relative"] <= 0.03
    # They share out what the model learned, whatever it learned.
    torch.testing.assert_close(found.sum(-1) + trained.base, trained.game(x)[:, -1])
    # Another seed of training, the same truth: it is no accident of the weights.
    assert torch.corrcoef(torch.stack([found.flatten(), true.flatten()]))[0, 1] > 0.999


@pytest.mark.deep
def test_trained_experts_have_the_shapley_values_of_an_enumerated_distribution():
    """Four dependent binary features and a label: every P(y | x_S) is a sum over 16 cells."""
    random = torch.Generator().manual_seed(3)
    cells = torch.cartesian_prod(*[torch.arange(2)] * 4).bool()
    weight = torch.rand(16, generator=random).square().double() + 0.02
    positive = torch.rand(16, generator=random).double().mul(0.8).add(0.1)
    family = mk.SubsetFamily.powerset({f"x{n}": 1 for n in range(4)})
    agree = (cells[:, None, None] == cells[None, :, None]) | ~family.membership
    same = agree.all(-1).double()  # (cell, cell, expert): alike in all that the expert sees?
    seen = torch.einsum("c,xci->xi", weight, same)
    true = torch.logit(torch.einsum("c,c,xci->xi", weight, positive, same) / seen)
    base = float(torch.logit((weight * positive).sum() / weight.sum()))

    torch.manual_seed(0)
    net = mk.InterpretableMLP(family, [16, 16], "silu")
    steps = 1500
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        which = torch.multinomial(weight, 2048, True, generator=random)
        y = (torch.rand(2048, generator=random) < positive[which]).float()
        optimizer.zero_grad()
        net.gem_loss(cells[which].float(), y, weighting="uniform").backward()
        optimizer.step()
        decay.step()
    found = 2 * net(cells.float()).detach().double()
    close = errors(mk.shapley(found, family, base), mk.shapley(true, family, base))
    assert close["relative"] <= 0.03
