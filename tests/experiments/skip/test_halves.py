"""Experts that differ in the two halves, and a group of half B alone: from events to figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskmoe_kernels.experiments.skip.data.prepare import prepare
from maskmoe_kernels.experiments.skip.data.sessions import SessionDataset
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.evaluate import evaluate
from maskmoe_kernels.experiments.skip.explain import explain
from maskmoe_kernels.experiments.skip.models import build
from maskmoe_kernels.experiments.skip.pace import Pace
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema
from maskmoe_kernels.experiments.skip.settings import MODELS, Settings
from maskmoe_kernels.experiments.skip.train import train
from tests.experiments.skip.logs import TEXT, draw_events, write_log

pytest.importorskip("duckdb")
LATER = """[groups.later]
halves = "B"
features = [{ of = "price", divide = 100 }]

[groups.who]"""
OWN = (
    TEXT.replace("[groups.who]", LATER)
    .replace(
        'past = ["past"]', 'past = { A = [], B = ["past"] }\nbefore = { A = ["past"], B = [] }'
    )
    .replace('all = ["given", ', 'all = ["given", "later", ')
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halves")
    events = draw_events(500, users=12)
    prepare([write_log(folder / "log", events)], folder / "out", parse_schema(OWN), row_group=16)
    return folder / "out"


@pytest.mark.parametrize("name", MODELS[:2])
def test_an_expert_sees_its_groups_of_each_half(log: Path, name: str) -> None:
    shards = Shards(log, "train")
    model = build(Settings(name, width=4, layers=1), shards.schema, shards.embedded)
    batch = next(iter(SessionDataset(shards, 16)))
    halves = [batch.first, batch.second]
    rest = batch.first_padding, batch.second_padding, batch.user
    before = model(*halves, *rest)[~batch.second_padding]
    price = batch.second[..., 13][~batch.second_padding]
    assert ((price > 0) & (price <= 1)).all()
    seen = {
        (0, "given"): {"given", "all"},
        (0, "past in A"): {"before", "all"},
        (0, "goods"): {"all"},
        (1, "past in B"): {"past", "all"},
        (1, "goods"): {"all"},
        (1, "later"): {"all"},
    }
    for (half, group), experts in seen.items():
        groups = (shards.schema.first_groups, shards.schema.second_groups)[half]
        start = sum(list(groups.values())[: list(groups).index(group)])
        spoilt = [x.clone() for x in halves]
        spoilt[half][..., start : start + groups[group]] = float("nan")
        after = model(*spoilt, *rest)[~batch.second_padding]
        for i, expert in enumerate(shards.schema.experts):
            if expert in experts:
                assert after[:, i].isnan().any(), (group, expert)
            else:
                assert torch.equal(after[:, i], before[:, i]), (group, expert)


def test_the_whole_way(log: Path, tmp_path: Path) -> None:
    for name in (MODELS[1], MODELS[3]):
        pace = Pace(epochs=1, learning_rate=1e-2)
        train(log, tmp_path / name, Settings(name, width=4, layers=1, batch_size=16), pace)
    evaluate(log, tmp_path / "report", [tmp_path / MODELS[1], tmp_path / MODELS[3]])
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    family = report["models"][MODELS[1]]["family"]
    assert family["groups"]["later"] == 1
    assert family["subsets"]["past"] == ["past in B"]
    told = explain(log, tmp_path / MODELS[1], out=tmp_path / "report")
    assert set(told.shares) == {"given", "past", "before", "who", "all"}
    assert len(list((tmp_path / "report").glob("explain-*.png"))) == 1
