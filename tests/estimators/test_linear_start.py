"""Training starts at the ridge regression of each expert, and may stop there."""

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.linear_start import start_linear
from maskmoe_kernels.estimators.subsets import family_of
from maskmoe_kernels.estimators.tables import read_table
from maskmoe_kernels.estimators.training import Network, Pace, Samples, train

PACE = Pace(1.0, 0.0, 64, 12, 5)


def problem(kind, rows=400):
    """Columns a, b, c, of which a and b count, and y of them."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(rows, 3)), columns=[*"abc"])
    score = np.sin(2 * frame.a) + 0.5 * frame.b**2
    z = (score - score.mean() + 0.3 * random.normal(size=rows)).to_numpy()
    if kind == "regression":
        return frame, z / z.std()
    return frame, (z > 0).astype(int) if kind == "binary" else np.digitize(z, [-0.5, 0.5])


def started(kind, held=True, bags=2):
    """Networks after the linear start, their samples and splits, and the chosen penalties."""
    frame, y = problem(kind)
    table = read_table(frame)
    encoder = Encoder.fitted(table, {name: [k] for k, name in enumerate("abc")}, np.ones(400), 8, 9)
    family = family_of(encoder.widths, ["a", "b", "ab"])
    outputs = 3 if kind == "multiclass" else None
    networks = [Network(encoder, family, (4, 8), outputs, k) for k in range(bags)]
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


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass"])
def test_every_expert_is_the_ridge_regression_of_what_it_sees(kind):
    networks, samples, splits, ridges = started(kind)
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


def test_the_penalty_is_the_one_with_the_smallest_held_out_loss():
    networks, samples, splits, ridges = started("regression", bags=1)
    ((kept, out),) = splits
    x, y = with_lines(samples), samples.target.numpy()
    loss = {
        ridge: (
            (Ridge(ridge * len(kept)).fit(x[kept], y[kept]).predict(x[out]) - y[out]) ** 2
        ).mean()
        for ridge in 10 ** -np.arange(0, 5.5, 0.5)
    }
    assert float(ridges[-1]) == pytest.approx(min(loss, key=loss.get), rel=1e-5, abs=0)
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


def test_and_that_makes_them_better_is_kept():
    networks, samples, splits, _ = started("regression")
    kept, held = [rows for rows, _ in splits], [samples.taken(out) for _, out in splits]
    pace = Pace(0.02, 0.0, 64, 40, 40)
    history = train(networks, lambda: [(samples, kept)], 4, held, "regression", pace, 0)
    mean = np.mean(history, axis=0)
    assert mean.min() < mean[0]
    top = [
        ((net(out.codes)[:, -1].detach() - out.target) ** 2).mean()
        for net, out in zip(networks, held, strict=True)
    ]
    assert np.mean([float(loss) for loss in top]) == pytest.approx(mean.min(), rel=1e-4, abs=0)
