"""The toy tasks: what is sampled, what training gives, what the report holds."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from maskmoe_kernels import LayoutError, mixture
from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.report import machine, write_json
from maskmoe_kernels.experiments.toy import train as toy
from maskmoe_kernels.experiments.toy.data import SIGMA, TASKS, sample
from maskmoe_kernels.experiments.toy.evaluate import (
    CONFIDENCES,
    SUFFICIENT,
    combine,
    evaluate,
    explained,
    print_report,
)

SHORT = toy.ToyConfig(epochs=3, steps=150, learning_rate=5e-3, test_samples=4000)


@pytest.fixture(scope="module")
def trained():
    return toy.run("b", seed=1, config=SHORT)


@pytest.mark.parametrize("name", TASKS)
def test_samples_follow_their_clusters(name):
    task = TASKS[name]
    x, y, which = sample(task, 40_000, torch.Generator().manual_seed(0))
    share = torch.bincount(which, minlength=len(task.clusters)) / len(which)
    assert (share - 1 / len(task.clusters)).abs().max() < 0.01
    for k, cluster in enumerate(task.clusters):
        own = x[which == k]
        assert (own.mean(0) - torch.tensor(cluster.center)).abs().max() < 0.02
        noisy = torch.tensor([n in cluster.noisy for n in range(x.shape[1])])
        assert (own.std(0)[noisy] - SIGMA).abs().max() < 0.015
        assert (own[:, ~noisy] == torch.tensor(cluster.center)[~noisy]).all()
        assert (y[which == k] == cluster.label).all()


@pytest.mark.parametrize("name", TASKS)
def test_the_right_expert_separates_its_cluster_and_no_smaller_one_does(name):
    task = TASKS[name]
    member = dict(zip(task.family.names, task.family.membership.tolist(), strict=True))
    for cluster in task.clusters:
        fitting = [expert for expert in member if separates(task, member[expert], cluster)]
        assert cluster.expert in fitting
        subsets = task.family.strict[task.family.names.index(cluster.expert)]
        assert not any(subsets[task.family.names.index(expert)] for expert in fitting)


def separates(task, seen, cluster):
    """Does no cluster of the other label look the same to an expert with these inputs?"""

    def look(c):
        return [value for value, visible in zip(c.center, seen, strict=True) if visible]

    return all(look(c) != look(cluster) for c in task.clusters if c.label != cluster.label)


def test_samples_are_those_of_the_seed():
    first, again, other = (
        sample("b", 100, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_short_run_beats_chance_and_finds_the_experts(trained):
    report, _ = trained
    row = report["table"]["square"]
    assert row["accuracy"] > 0.95
    assert row["right_expert"]["inner"] > 0.6
    assert row["right_expert"]["outer"] > 0.8
    # What the confidences trade: a stricter one leaves more to the bivariate expert.
    inner = [report["table"][c]["right_expert"]["inner"] for c in CONFIDENCES]
    outer = [report["table"][c]["right_expert"]["outer"] for c in CONFIDENCES]
    assert inner == sorted(inner, reverse=True)
    assert outer == sorted(outer)


def test_experts_that_learn_from_every_sample_suffice_where_they_should():
    task = TASKS["b"]
    config = replace(SHORT, weighting="uniform", predict=SUFFICIENT)
    net, _, _ = toy.train(task, 1, config)
    (rule,) = (table := evaluate(net, task, 1, 4000, (SUFFICIENT,)))
    assert rule == SUFFICIENT
    assert table[rule]["accuracy"] > 0.99
    assert table[rule]["right_expert"]["inner"] > 0.75
    assert table[rule]["right_expert"]["outer"] > 0.95


def test_who_suffices_explains_alone_and_certainty_has_an_end():
    family = TASKS["b"].family  # x1, x2, x1+x2; log-odds are twice the logits
    logits = torch.tensor([[8.0, 0.0, 3.0], [8.0, -8.0, 0.0], [0.0, -0.9, -1.4], [0.0, 0.1, 0.2]])
    found = explained(logits, family, SUFFICIENT)
    assert found.attribution.argmax(-1).tolist() == [0, 2, 1, 1]
    assert torch.equal(found.attribution.sum(-1), torch.ones(4))
    torch.testing.assert_close(found.probability, torch.sigmoid(2 * logits[:, 2]))
    by_mixture = explained(logits, family, "square")
    torch.testing.assert_close(
        by_mixture.attribution, mixture(logits, family, "square").attribution
    )


def test_the_command_explains_by_who_suffices_and_refuses_where_none_can(tmp_path):
    config = replace(SHORT, epochs=1)
    report = toy.run_toy("a", 0, tmp_path, config=config, explain=SUFFICIENT, draw=False)
    assert list(report["table"]) == [SUFFICIENT]
    assert report["config"]["weighting"] == "uniform"
    console = Console(file=StringIO(), width=200)
    print_report(report, console)
    assert "explained by\tseed" in console.file.getvalue()
    with pytest.raises(DataError, match="in task 'c' no expert sees all inputs"):
        toy.run_toy("c", 0, tmp_path, explain="sufficient")


def test_a_seed_gives_the_same_bits_and_leaves_the_callers_stream_alone():
    config = toy.ToyConfig(epochs=1, steps=20, test_samples=100)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, losses, _ = toy.train("a", 7, config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(11)
    again, losses_again, _ = toy.train("a", 7, config)
    other, _, _ = toy.train("a", 8, config)
    assert losses == losses_again
    for p, q, r in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


def test_evaluation_of_a_perfect_net_is_perfect_up_to_overlap():
    task = TASKS["b"]

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            centers = torch.tensor([c.center for c in task.clusters])
            nearest = torch.cdist(x, centers).argmin(1)
            sign = 2 * torch.tensor([c.label for c in task.clusters])[nearest] - 1.0
            own = torch.tensor([task.family.names.index(c.expert) for c in task.clusters])
            return torch.nn.functional.one_hot(own[nearest], 3) * 5 * sign[:, None]

    for row in evaluate(Oracle(), task, n=4000).values():
        assert row["accuracy"] > 0.993
        assert row["right_expert"]["outer"] > 0.99
        assert row["right_expert"]["inner"] > 0.98


def test_report_round_trips(tmp_path, trained):
    report, _ = trained
    write_json(tmp_path / "deep" / "report.json", report)
    assert json.loads((tmp_path / "deep" / "report.json").read_text("utf-8")) == report
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.json"]


def test_a_report_that_json_cannot_say_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"old": 1})
    for bad, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            write_json(path, {"new": bad})
    assert json.loads(path.read_text("utf-8")) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_machine_names_no_host_and_no_path():
    assert set(machine()) == {"cpu", "cores", "threads", "gpu", "torch", "python"}


@pytest.mark.parametrize("name", TASKS)
def test_run_toy_writes_and_prints(tmp_path, name):
    pytest.importorskip("matplotlib")
    text = StringIO()
    config = toy.ToyConfig(steps=5, test_samples=200)
    report = toy.run_toy(
        name, 0, tmp_path, config=config, epochs=2, console=Console(file=text, width=120)
    )
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert len(report["losses"]) == 2
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"report.json", "panels.png", "plane.png", "hasse.png"}
    assert f"Toy ({name})" in text.getvalue()
    assert "square" in text.getvalue()


def test_seeds_are_combined(tmp_path):
    config = toy.ToyConfig(epochs=1, steps=3, test_samples=400)
    reports = [toy.run_toy("b", s, tmp_path / str(s), config=config, draw=False) for s in (0, 1)]
    combined = combine(reports, "maskmoe toy --task b")
    text = StringIO()
    print_report(combined, Console(file=text, width=120))
    assert [entry["seed"] for entry in combined["seeds"]] == [0, 1]
    accuracy = [report["table"]["abs"]["accuracy"] for report in reports]
    assert combined["summary"]["abs"]["accuracy"]["worst"] == min(accuracy)
    assert f"{accuracy[1]:.4f}" in text.getvalue()


def test_unknown_task():
    with pytest.raises(LayoutError, match="one of \\['a', 'b', 'c'\\], got 'd'"):
        toy.run("d")
