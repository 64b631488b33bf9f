"""Training starts at the ridge regression of each expert, and may stop there."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.held_out import Look, gain_over
from maskmoe_kernels.estimators.linear_start import start_linear
from maskmoe_kernels.estimators.subsets import family_of
from maskmoe_kernels.estimators.tables import read_table
from maskmoe_kernels.estimators.training import (
    Network,
    Pace,
    Samples,
    default_epochs,
    train,
)

PACE = Pace(1.0, 0.0, 64, 12, 5)


def problem(kind, rows=400, together=False):
    """Columns a, b, c, and y of a and b: of each alone, or of their product."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(rows, 3)), columns=[*"abc"])
    score = frame.a * frame.b if together else np.sin(2 * frame.a) + 0.5 * frame.b**2
    z = (score - score.mean() + 0.3 * random.normal(size=rows)).to_numpy()
    if kind == "regression":
        return frame, z / z.std()
    return frame, (z > 0).astype(int) if kind == "binary" else np.digitize(z, [-0.5, 0.5])


def started(kind, held=True, bags=2, together=False, layers=1):
    """Networks after the linear start, their samples and splits, and the chosen penalties."""
    frame, y = problem(kind, together=together)
    table = read_table(frame)
    encoder = Encoder.fitted(table, {name: [k] for k, name in enumerate("abc")}, np.ones(400), 8, 9)
    family = family_of(encoder.widths, ["a", "b", "ab"])
    outputs = 3 if kind == "multiclass" else None
    networks = [Network(encoder, family, (4, 8, layers), outputs, k) for k in range(bags)]
    target = torch.from_numpy(y)
    samples = Samples(
        encoder.codes(table), target.float() if kind == "regression" else target, None
    )
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    splits = []
    for k in range(bags):
        out = torch.arange(400) // 60 == k
        splits.append((order[~out], order[out]) if held else (order, None))
    base = torch.zeros(3 if outputs else 1)
    return networks, samples, splits, start_linear(networks, samples, splits, kind, base)


def with_lines(samples):
    """Codes, and beside them each column standardised, which is the same penalty as ours."""
    codes = samples.codes.numbers.numpy()
    raw = problem("regression")[0].to_numpy()
    return np.column_stack([codes, (raw - raw.mean(0)) / raw.std(0)])


@pytest.mark.parametrize(("kind", "layers"), [("regression", 1), ("binary", 2), ("multiclass", 2)])
def test_every_expert_is_the_ridge_regression_of_what_it_sees(kind, layers):
    networks, samples, splits, ridges = started(kind, layers=layers)
    family = networks[0].experts.family
    x, y = with_lines(samples), samples.target.numpy()
    columns = np.r_[np.repeat(np.arange(3), [*family.groups.values()]), 0, 1, 2]
    for network, (kept, _) in zip(networks, splits, strict=True):
        answers = network(samples.codes).detach().numpy()
        for i, members in enumerate(family.membership.numpy()):
            seen, penalty = x[:, members[columns]], float(ridges[i]) * len(kept)
            if kind == "regression":
                wanted = Ridge(penalty).fit(seen[kept], y[kept]).predict(seen)
                assert answers[:, i] == pytest.approx(wanted, abs=0.02)
                continue
            model = LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)
            wanted = model.fit(seen[kept], y[kept]).predict_proba(seen)
            z = torch.from_numpy(answers[:, i])
            found = (2 * z).sigmoid() if kind == "binary" else z.softmax(-1)
            wanted = wanted[:, 1] if kind == "binary" else wanted
            assert np.sqrt(np.mean((found.numpy() - wanted) ** 2)) < 0.02
    assert torch.isfinite(ridges).all()
    assert len(set(ridges.tolist())) > 1


def test_a_smaller_penalty_is_taken_where_held_out_losses_are_clearly_smaller():
    networks, samples, splits, ridges = started("regression", bags=1)
    ((kept, out),) = splits
    x, y = with_lines(samples), samples.target.numpy()
    chosen, best = np.inf, y[out] ** 2
    for ridge in 10 ** -np.arange(0, 5.5, 0.5):
        model = Ridge(ridge * len(kept)).fit(x[kept], y[kept])
        losses = (model.predict(x[out]) - y[out]) ** 2
        less = best - losses
        if less.mean() > less.std() / np.sqrt(len(out)):
            chosen, best = ridge, losses
    assert float(ridges[-1]) == pytest.approx(chosen, rel=1e-5, abs=0)
    assert chosen < 0.3
    assert len(networks) == 1


def test_without_held_out_rows_one_penalty_serves_all():
    _, _, _, ridges = started("binary", held=False)
    assert ridges.tolist() == pytest.approx([0.01] * 4, rel=1e-6, abs=0)


def test_training_that_makes_held_out_rows_worse_is_undone():
    networks, samples, splits, _ = started("regression")
    before = [network(samples.codes).detach() for network in networks]
    wrong = Samples(samples.codes, -9 * samples.target, None)

    held = [samples.taken(out) for _, out in splits]
    kept = [rows for rows, _ in splits]
    history = train(networks, lambda: [(wrong, kept)], 4, held, "regression", PACE, 0)
    assert all(losses[0] < min(losses[1:]) for losses in history)
    for network, answers in zip(networks, before, strict=True):
        assert torch.equal(network(samples.codes), answers)


def test_training_that_makes_them_clearly_better_is_kept():
    networks, samples, splits, _ = started("regression", together=True)
    kept, held = [rows for rows, _ in splits], [samples.taken(out) for _, out in splits]
    pace = Pace(0.02, 0.0, 64, 40, 40)
    history = train(networks, lambda: [(samples, kept)], 4, held, "regression", pace, 0)
    mean = np.mean(history, axis=0)
    assert mean.min() < 0.7 * mean[0]  # a product of two columns is no sum of functions of each
    with torch.no_grad():
        top = [
            float(((net(out.codes)[:, -1] - out.target) ** 2).mean())
            for net, out in zip(networks, held, strict=True)
        ]
    assert np.mean(top) == pytest.approx(mean.min(), rel=2e-4, abs=0)


@pytest.mark.parametrize(
    ("steps", "blind", "epochs"),
    [
        (1, False, 1000),
        (1, True, 300),
        (16, False, 80),
        (50, False, 80),
        (265, False, 30),
        (5000, False, 5),
    ],
)
def test_there_are_enough_passes_but_not_thousands_of_steps_too_many(steps, blind, epochs):
    assert default_epochs(steps, blind) == epochs


@pytest.mark.parametrize("bags", [1, 2])
@pytest.mark.parametrize("errors", [0.9, 1.1])
def test_clearly_better_is_by_more_than_the_standard_error(bags, errors):
    random = torch.Generator().manual_seed(0)
    before, after, weights = [], [], []
    for _ in range(bags):
        count = torch.tensor([1, 1, 2]).repeat(30).double()  # a row of weight 2 counts as one row
        share = count / count.sum()
        noise = torch.randn(90, generator=random, dtype=torch.float64)
        noise -= noise @ share
        deviation = float((noise**2 @ share * (share @ share)).sqrt())
        before.append(torch.ones(90, dtype=torch.float64))
        after.append(1 + noise - errors * deviation / bags**0.5)
        weights.append(share)
    better, start = Look(after, weights), Look(before, weights)
    assert better.is_clearly_below(start) == (errors > 1)
    assert not start.is_clearly_below(better)
    assert better.means() == pytest.approx(
        [float(a @ w) for a, w in zip(after, weights, strict=True)]
    )
    two = [torch.stack([losses, before[0]], 1) for losses in after]
    both = [torch.stack([losses, losses], 1) for losses in before]
    gain, error = gain_over(two, both, weights)
    assert (gain > error).tolist() == [errors > 1, False]
