"""The model whose smallest sufficient expert explains: training, report, figure, words."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens import WIDTHS
from maskmoe_kernels.experiments.movielens import explain as module
from maskmoe_kernels.experiments.movielens.data.ranking import Features, Task
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.explain import explain
from maskmoe_kernels.experiments.movielens.sufficient import (
    TOLERANCES,
    best_of_catalogue,
    contributions,
    evaluate_sufficient,
)
from maskmoe_kernels.experiments.movielens.train import Options, build, run_movielens, train
from maskmoe_kernels.experiments.movielens.words import same_in_words
from maskmoe_kernels.experiments.shared.checkpoint import load_checkpoint
from maskmoe_kernels.models import NCF, InterpretableNCF
from tests.experiments.movielens.test_explain import EXPERTS, save
from tests.experiments.movielens.tiny import write_movielens

pytest.importorskip("pyarrow", reason="reads MovieLens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_movielens(tmp_path_factory.mktemp("data") / "ml-1m")


def biased(folder: Path, **logits: float) -> InterpretableNCF:
    """A model whose experts always give these logits, the others 0."""
    torch.manual_seed(0)
    model = build("sufficient", Features(read_movielens(folder)).sizes)
    assert isinstance(model, InterpretableNCF)
    last = model.experts.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([logits.get(name, 0.0) for name in EXPERTS]))
    return model


def test_the_report_has_both_rules_and_a_figure(tmp_path: Path, folder: Path) -> None:
    models = ("interpretable", "sufficient")
    options = Options(models, epochs=1, batch_size=64, widths="equal")
    report = run_movielens(folder, tmp_path, options)
    found = report["models"]["sufficient"]
    assert report["models"]["interpretable"]["parameters"] == found["parameters"]
    assert [point["tolerance"] for point in found["frontier"]] == list(TOLERANCES)
    for point in found["frontier"]:
        for shares in (point["decided"], point["recommended"], point["catalogue"]):
            assert list(shares) == list(EXPERTS)
            assert sum(shares.values()) == pytest.approx(1)
    left = [point["decided"]["all"] for point in found["frontier"]]
    assert left == sorted(left, reverse=True)
    assert json.loads((tmp_path / "report.json").read_text())["models"]["sufficient"] == found
    if pytest.importorskip("matplotlib"):
        for name in ("sufficient", "contributions", "interactions"):
            assert (tmp_path / f"{name}.png").stat().st_size > 20_000
    assert list(found["contributions"]["mean_size"]) == list(found["family"]["groups"])
    again = run_movielens(folder, tmp_path, Options(**{**vars(options), "resume": True}))
    assert again["models"]["sufficient"] == found


def test_the_expert_that_predicts_has_most_units(tmp_path: Path, folder: Path) -> None:
    """Half as many as the black box; the mixture's are equal, for any of its experts decides."""
    task = Task(read_movielens(folder), 0, None)
    black_box = build("black-box", task.sizes)
    assert isinstance(black_box, NCF)
    units = [layer.out_features for layer in black_box.layers if isinstance(layer, nn.Linear)][:-1]
    at = EXPERTS.index("all")
    assert [2 * layer[at] for layer in WIDTHS["largest"]] == units
    assert all(layer[at] >= 2 * max(layer[:at]) for layer in WIDTHS["largest"])
    assert [sum(layer) for layer in WIDTHS["equal"]] == units
    for model, widths, made in (
        ("sufficient", None, "largest"),
        ("interpretable", None, "equal"),
        ("sufficient", "equal", "equal"),
        ("interpretable", "largest", "largest"),
    ):
        net = build(model, task.sizes, widths=widths)
        assert isinstance(net, InterpretableNCF)
        assert [layer.layout.row_sizes for layer in net.experts.layers[:-1]] == list(WIDTHS[made])
        options = Options((model,), epochs=1, batch_size=512, widths=widths)
        out = tmp_path / f"{model}-{widths}"
        out.mkdir()
        train(model, task, out, options)
        explain(folder, out / f"{model}.pt", user=8)  # which builds the same network
        other = Options(**{**vars(options), "widths": "equal" if made == "largest" else "largest"})
        with pytest.raises(DataError, match=f"widths={made}"):
            run_movielens(folder, out, Options(**{**vars(other), "resume": True}))
    with pytest.raises(ValueError, match=r"widths must be one of .*'largest'.* got 'wide'"):
        build("sufficient", task.sizes, widths="wide")


def test_the_sizes_of_a_gap_decide(folder: Path) -> None:
    """Log-odds are twice the logits: content is 0.6 away, user 1.8, item on the spot."""
    model = biased(folder, content=0.7, user=0.1, item=1.0, all=1.0)
    task = Task(read_movielens(folder), 0, None)
    by_tolerance = {p["tolerance"]: p for p in evaluate_sufficient(model, task)["frontier"]}
    for tolerance, expert in ((0.25, "item"), (0.5, "item"), (0.75, "content"), (2.0, "content")):
        for shares in (by_tolerance[tolerance]["decided"], by_tolerance[tolerance]["recommended"]):
            assert shares[expert] == 1
    # All movies have the same score: a tie counts against the positive.
    assert by_tolerance[1.0]["test"]["HR@10"] == 0


def test_learns_who_suffices(tmp_path: Path) -> None:
    """Where age tells the taste, content says as much as all; where it does not, the user does."""
    for by_age, right in ((True, "content"), (False, "user")):
        out = tmp_path / right
        data = read_movielens(write_movielens(out / "ml-1m", by_age=by_age))
        task = Task(data, seed=0, negatives=None)
        model, _ = train("sufficient", task, out, Options(epochs=8, patience=8, batch_size=64))
        assert isinstance(model, InterpretableNCF)
        model.load_state_dict(load_checkpoint(out / "sufficient.pt")["model"])
        point = next(
            p for p in evaluate_sufficient(model, task)["frontier"] if p["tolerance"] == 2.0
        )
        assert point["decided"][right] > 0.6, (right, point)
        assert (
            task.ranking(
                task.list_logits(model, task.test_lists)[..., 3].double(), task.test_lists
            )["HR@10"]
            > 0.9
        )


def test_a_movie_is_explained_by_who_suffices_and_by_what_groups_add(
    tmp_path: Path, folder: Path
) -> None:
    model = biased(folder, content=0.7, user=0.1, item=1.0, all=1.0)
    path = save(tmp_path / "sufficient.pt", model, "sufficient", "widths=largest")
    for tolerance, expert, gap in ((0.1, "item", 0.0), (0.7, "content", 0.6)):
        found = explain(folder, path, user=8, item=102, tolerance=tolerance)
        (movie,) = found.movies
        assert (found.sharpness, found.tolerance) == (None, tolerance)
        assert found.shares == {name: float(name == expert) for name in EXPERTS}
        assert "Smallest expert that suffices on this movie" in found.header
        assert (movie.expert, movie.share, movie.attribution) == (expert, None, {})
        assert movie.gap == pytest.approx(gap, abs=1e-6)
        assert movie.probability == pytest.approx(float(torch.tensor(2.0).sigmoid()), abs=1e-6)
        # Of the game user, item with content as base: v = 1.4, 0.2, 2.0, 2.0 in log-odds.
        expected = {"content": 1.4, "user": (-1.2 + 0.0) / 2, "item": (0.6 + 1.8) / 2}
        assert movie.contributions == pytest.approx(expected, abs=1e-5)
        assert sum(movie.contributions.values()) == pytest.approx(2.0, abs=1e-5)
        assert movie.reason.startswith("the answer would be the same knowing only ")
    console = Console(file=io.StringIO())
    explain(folder, path, user=8, item=102, console=console)
    _, names, row, note = console.file.getvalue().splitlines()[-4:]  # type: ignore[attr-defined]
    cells = dict(zip(names.split("\t"), row.split("\t"), strict=True))
    adds = [f"{group} adds" for group in expected]
    assert [cells[name] for name in adds] == ["+1.40", "-0.60", "+1.20"]
    assert "log-odds" in note
    nothing = biased(folder, content=0.5, user=0.4999, item=0.5, all=0.4999)
    console = Console(file=io.StringIO())
    saved = save(tmp_path / "nothing.pt", nothing, "sufficient", "widths=largest")
    explain(folder, saved, user=8, item=102, console=console)
    assert "\t+1.00\t+0.00\t+0.00\t" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"--sharpness mixes experts.* give --tolerance"):
        explain(folder, path, user=8, item=102, sharpness=2.0)


def test_the_explanation_has_a_picture_that_is_not_replaced(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[dict[str, Any]] = []
    model = biased(folder, user=0.5, all=0.9)
    path = save(tmp_path / "sufficient.pt", model, "sufficient", "widths=largest")
    monkeypatch.setattr(module, "waterfall", lambda bars, to, **of: drawn.append(bars | of))
    explain(folder, path, user=8, item=102, out=tmp_path / "out")
    (picture,) = drawn
    assert list(picture)[:2] == [
        "user: this user's ratings (0 of 18 of such movies)",
        "item: who watches this movie",
    ]
    assert picture["base"] == ("content: men under 18, action movies of the 70s", 0.0)
    assert picture["answers"] == pytest.approx({"content": 0, "user": 1, "item": 0, "all": 1.8})
    assert (picture["sufficient"], picture["tolerance"]) == ("user", 1.0)
    monkeypatch.undo()
    console = Console(file=io.StringIO(), width=200)
    explain(folder, path, user=8, out=tmp_path / "out", console=console)
    assert (tmp_path / "out" / "explain-user-8.png").stat().st_size > 20_000
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "report explain-user-8.json and picture explain-user-8.png: " in said


def test_contributions_are_made_of_interactions_and_sum_to_the_answer(folder: Path) -> None:
    task = Task(read_movielens(folder), 0, None)
    torch.manual_seed(1)
    model = build("sufficient", task.sizes)
    assert isinstance(model, InterpretableNCF)
    logits = torch.randn(5, 100, 4, dtype=torch.float64)
    found = contributions(model, logits)
    best = logits[..., 3].topk(10).indices
    all_ = 2 * logits[..., 3].gather(1, best).flatten()
    content = 2 * logits[..., 0].gather(1, best).flatten()
    torch.testing.assert_close(found.probability, torch.sigmoid(all_))
    torch.testing.assert_close(found.interactions.sum(-1), found.phi)
    torch.testing.assert_close(found.phi.sum(-1) + content.mean(), all_)
    at = list(model.family.groups).index("content")
    torch.testing.assert_close(found.phi[:, at], content - content.mean())


def test_each_expert_has_its_words(folder: Path) -> None:
    data = read_movielens(folder)
    words = {expert: same_in_words(data, 7, 1, expert) for expert in EXPERTS}
    assert words == {
        "content": "the answer would be the same knowing only that these are action movies of the "
        "70s, and the user is one of the men under 18",
        "user": "the answer would be the same knowing only this user's ratings (0 of 18 of such "
        "movies), and that these are action movies of the 70s",
        "item": "the answer would be the same knowing only who watches this movie, and that the "
        "user is one of the men under 18",
        "all": "it takes both: this user's ratings and who watches this movie",
    }


def test_the_best_of_the_catalogue_are_the_best_unseen_that_explain_lists(
    tmp_path: Path, folder: Path
) -> None:
    """Who suffices for each user's ten best: one by one, by the command a user would run."""
    torch.manual_seed(3)
    task = Task(read_movielens(folder), 0, None)
    model = build("sufficient", task.sizes)
    assert isinstance(model, InterpretableNCF)
    with torch.no_grad():
        for parameter in model.experts.parameters():
            parameter.mul_(3.5)  # an untrained model says almost the same of all
    path = save(tmp_path / "sufficient.pt", model, "sufficient", "widths=largest")
    best = best_of_catalogue(model, task, chunk=4)
    assert best.shape == (10 * task.data.num_users, 4)
    told = [movie for u in task.data.user_ids.tolist() for movie in explain(folder, path, u).movies]
    assert {movie.status for movie in told} == {"unseen"}
    expected = torch.tensor([list(movie.answers.values()) for movie in told], dtype=torch.float64)
    torch.testing.assert_close(2 * best, expected, rtol=0, atol=1e-5)
    point = next(p for p in evaluate_sufficient(model, task)["frontier"] if p["tolerance"] == 1)
    shares = {name: sum(m.expert == name for m in told) / len(told) for name in EXPERTS}
    assert point["catalogue"] == pytest.approx(shares, abs=1e-9)
    assert 0 < shares["all"] < 1


def test_a_user_who_has_seen_almost_all_has_fewer_recommendations(folder: Path) -> None:
    data = read_movielens(folder)
    task = Task(data, 0, None)
    model = biased(folder, all=1.0)
    left = 3
    others = data.rated_items[~torch.isin(data.rated_items, data.items[data.users == 0])]
    task.data = dataclasses.replace(
        data,
        users=torch.cat([data.users, torch.zeros(len(others) - left, dtype=torch.int64)]),
        items=torch.cat([data.items, others[left:]]),
    )
    assert len(best_of_catalogue(model, task)) == 10 * (data.num_users - 1) + left


def test_a_few_users_of_many_are_spread_over_all(folder: Path) -> None:
    task = Task(read_movielens(folder), 0, None)
    torch.manual_seed(0)
    model = build("sufficient", task.sizes)
    assert isinstance(model, InterpretableNCF)
    every = best_of_catalogue(model, task).unflatten(0, (task.data.num_users, 10))
    few = best_of_catalogue(model, task, most=4, chunk=3).unflatten(0, (4, 10))
    torch.testing.assert_close(few, every[[0, 8, 17, 26]])
