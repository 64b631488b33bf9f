"""The MovieLens experiment on made-up data: who decides, the frontier, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maskmoe_kernels.experiments.movielens import MODELS, figures
from maskmoe_kernels.experiments.movielens.data.ranking import Features, Task
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.evaluate import (
    CONFIDENCE,
    SHARPNESS,
    choose_sharpness,
    scores,
)
from maskmoe_kernels.experiments.movielens.train import Options, build, run_movielens, train
from maskmoe_kernels.experiments.shared import charts, hasse, plot_style
from maskmoe_kernels.experiments.shared.checkpoint import load_checkpoint
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.ops.selection import mixture
from tests.experiments.movielens.tiny import write_movielens

pytest.importorskip("pyarrow", reason="reads MovieLens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_movielens(tmp_path_factory.mktemp("data") / "ml-1m")


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return Task(read_movielens(folder), seed=0, negatives=None)


# --- Who decides -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("by_age", "right"), [(True, "content"), (False, "user")])
def test_the_smallest_sufficient_expert_decides(tmp_path: Path, by_age: bool, right: str) -> None:
    data = read_movielens(write_movielens(tmp_path / "ml-1m", by_age=by_age))
    task = Task(data, seed=0, negatives=None)
    options = Options(epochs=8, patience=8, batch_size=64)
    model, run = train("interpretable", task, tmp_path, options)
    assert isinstance(model, InterpretableNCF)
    assert run.best["HR@10"] > 0.95
    # All later epochs rank alike here, so the best one may be an early, undecided one.
    model.load_state_dict(load_checkpoint(tmp_path / "interpretable.pt")["model"])
    logits = task.list_logits(model, task.test_lists)[:, 0].double()
    share = mixture(logits, model.family, CONFIDENCE).attribution
    decided = share.argmax(1) == model.family.names.index(right)
    assert decided.double().mean() > 0.9
    sharp = mixture(logits, model.family, CONFIDENCE, sharpness=16).attribution
    assert (sharp.argmax(1) == model.family.names.index("all")).double().mean() > 0.5


# --- The frontier ------------------------------------------------------------------------


def frontier(*points: tuple[float, float, float]) -> list[dict[str, Any]]:
    return [
        {"sharpness": s, "validation": {"HR@10": hit, "NDCG@10": gain}} for s, hit, gain in points
    ]


@pytest.mark.parametrize(
    ("max_loss", "expected"), [(0.0, 8.0), (0.01, 4.0), (0.02, 4.0), (0.05, 2.0), (1.0, 1.0)]
)
def test_the_smallest_sharpness_that_loses_little(max_loss: float, expected: float) -> None:
    points = frontier((1, 0.60, 0.35), (2, 0.65, 0.37), (4, 0.695, 0.395), (8, 0.70, 0.40))
    assert choose_sharpness(points, max_loss) == expected
    assert choose_sharpness(points[::-1], max_loss) == expected


def test_both_metrics_count() -> None:
    points = frontier((1, 0.70, 0.30), (2, 0.69, 0.40), (4, 0.60, 0.40))
    assert choose_sharpness(points, 0.011) == 2
    # None is within 0.005 of both: the best NDCG@10, the first of equals.
    assert choose_sharpness(points, 0.005) == 2


def test_one_point_is_chosen() -> None:
    assert choose_sharpness(frontier((3, 0.0, 0.0)), 0.0) == 3


# --- Ranking -----------------------------------------------------------------------------


def test_a_positive_among_its_own_negatives_does_not_count(task: Task) -> None:
    lists = torch.tensor([[5, 5, 7], [1, 2, 3]])
    assert task.ranking(torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.1, 0.2]]), lists)["NDCG@10"] == 1
    worse = task.ranking(torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.1, 0.2]]), lists)
    assert worse["NDCG@10"] == pytest.approx((1 + 1 / torch.tensor(3.0).log2().item()) / 2)


def test_lists_hold_the_positive_and_99_unseen_movies(task: Task) -> None:
    for lists, positive in (
        (task.validation_lists, task.split.validation),
        (task.test_lists, task.split.test),
    ):
        assert lists.shape == (35, 100)
        assert torch.equal(lists[:, 0], positive)
        assert not task.split.interacted.gather(1, lists[:, 1:]).any()
    assert not torch.equal(task.validation_lists[:, 1:], task.test_lists[:, 1:])


def test_chunks_do_not_matter(task: Task) -> None:
    torch.manual_seed(0)
    model = build("interpretable", task.sizes).eval()
    whole = task.list_logits(model, task.test_lists)
    assert whole.shape == (35, 100, 4)
    torch.testing.assert_close(task.list_logits(model, task.test_lists, chunk=4), whole)
    one = task.logits(model, torch.tensor([34]), task.test_lists[34, 3:4])
    torch.testing.assert_close(one[0], whole[34, 3])


def test_scores_are_probabilities_of_the_mixture_or_the_one_logit(task: Task) -> None:
    interpretable, black_box = build("interpretable", task.sizes), build("black-box", task.sizes)
    z = torch.randn(3, 5, 4)
    expected = mixture(z.double(), interpretable.family, CONFIDENCE, 2.0).probability
    assert torch.equal(scores(interpretable, z, 2.0), expected)
    assert torch.equal(scores(black_box, z[..., :1]), z[..., 0].double())


def test_an_epoch_follows_from_seed_and_number(task: Task) -> None:
    first, again, later = task.epoch(0, 1), task.epoch(0, 1), task.epoch(0, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], later[1])
    assert float(first[2].mean()) == pytest.approx(0.2)


def test_the_year_is_standardised_over_rated_movies(task: Task, folder: Path) -> None:
    year = task.numeric[task.data.rated_items, 0].double()
    assert float(year.mean()) == pytest.approx(0, abs=1e-6)
    assert float(year.std()) == pytest.approx(1, abs=1e-6)
    movies = (folder / "movies.dat").read_text("latin-1")
    alone = folder.parent / "one-year"
    alone.mkdir(exist_ok=True)
    for decade in ("1970", "1980", "1990"):
        movies = movies.replace(f"({decade})", "(1960)")
    for name in ("users.dat", "ratings.dat"):
        (alone / name).write_bytes((folder / name).read_bytes())
    (alone / "movies.dat").write_text(movies, "latin-1")
    assert Features(read_movielens(alone)).numeric.isfinite().all()


def test_an_unknown_model_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=r"model must be one of .*got 'blackbox'"):
        build("blackbox", task.sizes)


# --- End to end --------------------------------------------------------------------------


def test_the_report_and_going_on(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: None)
    for module, name in (
        (charts, "learning_curves"),
        (charts, "attribution_bars"),
        (figures, "frontier"),
        (hasse, "hasse"),
    ):
        monkeypatch.setattr(module, name, lambda *a, _name=name, **k: drawn.append(_name))
    options = Options(MODELS["mixture"], epochs=2, patience=2, batch_size=512)
    report = run_movielens(folder, tmp_path, options)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert "NaN" not in text
    assert str(folder) not in text
    assert report["options"] == {
        "data": "ml-1m", "negatives": None, "models": ["content", "black-box", "interpretable"],
        "epochs": 2, "patience": 2, "batch_size": 512, "seed": 0, "embeddings": "shared",
        "widths": "auto", "device": "cpu", "resume": False, "sharpness": "auto", "max_loss": 0.01,
    }  # fmt: skip
    assert set(report["models"]) == {"content", "black-box", "interpretable"}
    interpretable = report["models"]["interpretable"]
    assert [point["sharpness"] for point in interpretable["frontier"]] == list(SHARPNESS)
    for point in interpretable["frontier"]:
        assert sum(point["decided"].values()) == pytest.approx(1)
        assert sum(point["mean_attribution"].values()) == pytest.approx(1)
    assert interpretable["sharpness"] == choose_sharpness(interpretable["frontier"], 0.01)
    assert set(drawn) == {"learning_curves", "attribution_bars", "frontier", "hasse"}

    # Finished models are only evaluated, whatever the sharpness.
    again = run_movielens(folder, tmp_path, Options(**{**vars(options), "resume": True}))
    assert again["models"] == report["models"]
    given = Options(**{**vars(options), "resume": True, "sharpness": 2.5})
    other = run_movielens(folder, tmp_path, given)["models"]["interpretable"]
    assert (other["sharpness"], other["chosen"]) == (2.5, "given")
    assert 2.5 in [point["sharpness"] for point in other["frontier"]]


def test_the_same_twice_but_for_the_speed(tmp_path: Path, folder: Path) -> None:
    reports = []
    for name in ("a", "b"):
        options = Options(models=("content",), epochs=1, batch_size=512)
        report = run_movielens(folder, tmp_path / name, options)
        for model in report["models"].values():
            for entry in model["history"]:
                del entry["samples_per_s"]
        reports.append(report)
    assert reports[0] == reports[1]


def test_without_matplotlib_the_report_is_still_written(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    monkeypatch.setattr(plot_style, "unsupported_reason", lambda: "matplotlib is not installed")
    options = Options(models=("content",), epochs=1, batch_size=512)
    run_movielens(folder, tmp_path, options, console=Console(width=120))
    assert "no figures: matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "report.json").exists()
    assert not list(tmp_path.glob("*.png"))


# --- The paper's sizes -------------------------------------------------------------------


def parameters(name: str, sizes: NCFSizes) -> int:
    return sum(p.numel() for p in build(name, sizes).parameters())


def test_parameters_on_the_real_data(shared_data: Path) -> None:
    if not (shared_data / "ml-1m" / "ml-1m.zip").is_file():
        pytest.skip("no ml-1m/ml-1m.zip in the folder of data sets")
    sizes = Features(read_movielens(shared_data / "ml-1m")).sizes
    assert (parameters("interpretable", sizes), parameters("black-box", sizes)) == (
        782_634,
        890_583,
    )
