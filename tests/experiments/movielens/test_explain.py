"""Reasons in words: from the user's and the movie's real features, by the expert that decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.ranking import Features
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.tables import (
    AGES,
    GENRES,
    NUM_OCCUPATIONS,
    MovieLens,
)
from maskmoe_kernels.experiments.movielens.evaluate import CONFIDENCE
from maskmoe_kernels.experiments.movielens.explain import explain
from maskmoe_kernels.experiments.movielens.train import build
from maskmoe_kernels.experiments.movielens.words import (
    AGE_NAMES,
    OCCUPATION_NAMES,
    decade,
    reason_in_words,
)
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.models import NCF, InterpretableNCF
from maskmoe_kernels.ops.selection import mixture
from tests.experiments.movielens.tiny import write_movielens

pytest.importorskip("pyarrow", reason="reads MovieLens")

EXPERTS = ("content", "user", "item", "all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_movielens(tmp_path_factory.mktemp("data") / "ml-1m")


@pytest.fixture(scope="module")
def data(folder: Path) -> MovieLens:
    return read_movielens(folder)


def fresh(data: MovieLens, embeddings: str = "shared") -> InterpretableNCF:
    torch.manual_seed(0)
    model = build("interpretable", Features(data).sizes, embeddings)
    assert isinstance(model, InterpretableNCF)
    return model


def sure(data: MovieLens, expert: str, logit: float = 2.0) -> InterpretableNCF:
    """A model in which ``expert`` always gives ``logit``; the others stay where p is 0.3."""
    model = fresh(data)
    last = model.experts.layers[-1]
    neutral = float(torch.tensor(0.3).logit()) / 2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(neutral)
        last.bias[EXPERTS.index(expert)] = logit
    return model


def save(
    path: Path, model: InterpretableNCF | NCF, name: str = "interpretable", options: str = ""
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"model": name, "options": options or "embeddings=shared"}
    # The last weights are not the best ones.
    last = {key: value.clone() for key, value in model.state_dict().items()}
    for value in last.values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    best = {"epoch": 1, "metrics": {}, "model": model.state_dict()}
    torch.save({"format": 1, "config": config, "model": last, "best": best}, path)
    return path


# --- Words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expert", "reason"),
    [
        ("content", "like other action movies of the 70s, among men under 18"),
        ("user", "this user's taste for action movies of the 70s"),
        ("item", "liked by viewers like this one (men under 18, executive/managerial)"),
        ("all", "personal to this user"),
    ],
)
def test_each_expert_has_its_reason(
    tmp_path: Path, folder: Path, data: MovieLens, expert: str, reason: str
) -> None:
    path = save(tmp_path / "x.pt", sure(data, expert))
    movie = explain(folder, path, user=8, item=102).movies[0]
    assert (movie.expert, movie.reason, movie.title) == (expert, reason, "Film 1 (1970)")
    assert movie.share > 0.99
    assert movie.probability == pytest.approx(float(torch.tensor(4.0).sigmoid()), abs=1e-3)


def test_an_expert_that_speaks_against(tmp_path: Path, folder: Path, data: MovieLens) -> None:
    path = save(tmp_path / "x.pt", sure(data, "all", -4.0))
    movie = explain(folder, path, user=1, item=102).movies[0]
    assert movie.probability < 0.3
    assert movie.reason == "personal: this movie does not suit this user"
    for expert in EXPERTS:
        favourable = reason_in_words(data, 0, 1, expert, favours=True)
        assert reason_in_words(data, 0, 1, expert, favours=False) != favourable


def test_the_taste_of_a_user_is_counted(data: MovieLens) -> None:
    seen = data.items[data.users == 0].tolist()
    movie = next(m for m in range(0, 140, 7) if m not in seen)
    same = sum(m % 4 == movie % 4 for m in seen)
    decade_of = decade(int(data.year[movie]))
    expected = f"this user's taste for comedies of {decade_of} ({same} of 18 rated movies)"
    assert reason_in_words(data, 0, movie, "user", favours=True) == expected


def test_many_genres_are_told_by_the_rarest(data: MovieLens) -> None:
    last = data.num_items - 1  # Children's, Comedy, Sci-Fi; comedies are common
    reason = reason_in_words(data, 0, last, "content", favours=True)
    assert (
        reason
        == "like other children's and science fiction movies of the 2000s, among women under 18"
    )


@pytest.mark.parametrize(
    ("year", "words"),
    [(1919, "the 1910s"), (1930, "the 30s"), (1999, "the 90s"), (2000, "the 2000s")],
)
def test_decades(year: int, words: str) -> None:
    assert decade(year) == words


def test_every_code_has_a_name() -> None:
    from maskmoe_kernels.experiments.movielens.words import _GENRE_NAMES

    assert (len(AGE_NAMES), len(OCCUPATION_NAMES)) == (len(AGES), NUM_OCCUPATIONS)
    assert len(_GENRE_NAMES) == len(GENRES)
    assert (AGE_NAMES[0], AGE_NAMES[6], OCCUPATION_NAMES[20]) == (
        "under 18",
        "56 and over",
        "writer",
    )


# --- Recommendations ---------------------------------------------------------------------


def test_the_top_are_the_most_probable_unseen_movies(
    tmp_path: Path, folder: Path, data: MovieLens
) -> None:
    model = fresh(data)
    path = save(tmp_path / "x.pt", model)
    user = 12
    explanation = explain(folder, path, user=user + 1, top=5, sharpness=2.0)
    rows = torch.arange(data.num_items)
    logits = Features(data).logits(model, torch.full_like(rows, user), rows).detach().double()
    probability = mixture(logits, model.family, CONFIDENCE, 2.0).probability
    probability[data.items[data.users == user]] = -1
    probability[-1] = -1  # never rated
    best = probability.topk(5)
    assert [m.movie for m in explanation.movies] == data.movie_ids[best.indices].tolist()
    assert [m.rank for m in explanation.movies] == [1, 2, 3, 4, 5]
    assert {m.status for m in explanation.movies} == {"unseen"}
    for movie, expected in zip(explanation.movies, best.values.tolist(), strict=True):
        assert movie.probability == pytest.approx(expected)
        assert sum(movie.attribution.values()) == pytest.approx(1)
        assert movie.share == max(movie.attribution.values()) == movie.attribution[movie.expert]
    assert sum(explanation.shares.values()) == pytest.approx(1)
    # One movie by its id is the same movie, with the same rank.
    third = explanation.movies[2]
    assert explain(folder, path, user + 1, third.movie, sharpness=2.0).movies == [third]


def test_seen_and_never_rated_movies_have_no_rank(
    tmp_path: Path, folder: Path, data: MovieLens
) -> None:
    path = save(tmp_path / "x.pt", fresh(data))
    seen = int(data.movie_ids[data.items[data.users == 0][0]])
    for movie, status in ((seen, "seen"), (241, "never rated")):
        found = explain(folder, path, user=1, item=movie).movies[0]
        assert (found.rank, found.status, found.movie) == (None, status, movie)


def test_the_top_ends_where_the_movies_end(tmp_path: Path, folder: Path, data: MovieLens) -> None:
    path = save(tmp_path / "x.pt", fresh(data))
    assert len(explain(folder, path, user=1, top=1000).movies) == 140 - 18


def test_the_header_says_who_it_is(tmp_path: Path, folder: Path, data: MovieLens) -> None:
    path = save(tmp_path / "x.pt", sure(data, "user"))
    header = explain(folder, path, user=4).header
    assert header.startswith(
        "User 4 is a man, aged 35-44, occupation clerical/admin, with 18 rated movies, among them "
    )
    assert header.endswith("on average: content 0%, user 100%, item 0%, all 0%.")
    assert "User 1 is a woman, aged under 18, no stated" in explain(folder, path, user=1).header


def test_the_table_and_the_json(
    tmp_path: Path, folder: Path, data: MovieLens, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "x.pt", fresh(data))
    told = explain(folder, path, 1, out=tmp_path / "told", console=Console(width=160))
    screen = capsys.readouterr().out
    for movie in told.movies:
        assert movie.title in screen
    written = json.loads((tmp_path / "told" / "explain-user-1.json").read_text("utf-8"))
    assert written["movies"][0]["title"] == told.movies[0].title
    assert written["header"] == told.header
    explain(folder, path, 1, 241, out=tmp_path / "told", console=Console(width=160))
    assert "Never Seen [sic] (2000)" in capsys.readouterr().out
    assert (tmp_path / "told" / "explain-user-1-item-241.json").exists()


# --- The sharpness -----------------------------------------------------------------------


def test_the_chosen_sharpness_is_found_beside_the_checkpoint(
    tmp_path: Path, folder: Path, data: MovieLens
) -> None:
    path = save(tmp_path / "x.pt", fresh(data))
    assert explain(folder, path, 1).sharpness == 1
    write_json(tmp_path / "report.json", {"models": {"content": {}}})
    assert explain(folder, path, 1).sharpness == 1
    write_json(tmp_path / "report.json", {"models": {"interpretable": {"sharpness": 4.0}}})
    told = explain(folder, path, 1)
    assert (told.sharpness, told.chosen) == (4.0, "chosen in report.json")
    assert explain(folder, path, 1, sharpness=1.5).sharpness == 1.5
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report.json: not a readable report.*give --sharpness"):
        explain(folder, path, 1)


# --- What does not fit -------------------------------------------------------------------


def test_strict_embeddings_load(tmp_path: Path, folder: Path, data: MovieLens) -> None:
    path = save(tmp_path / "x.pt", fresh(data, "strict"), options="embeddings=strict")
    assert explain(folder, path, 1).movies


def test_unknown_ids_name_the_valid_ones(tmp_path: Path, folder: Path, data: MovieLens) -> None:
    path = save(tmp_path / "x.pt", fresh(data))
    with pytest.raises(DataError, match=r"no user 36 in users.dat: its 35 ids lie from 1 to 35"):
        explain(folder, path, 36)
    with pytest.raises(DataError, match=r"no movie 7 in movies.dat: .* from 101 to 241"):
        explain(folder, path, 1, 7)


def test_other_models_and_other_data_are_refused(
    tmp_path: Path, folder: Path, data: MovieLens
) -> None:
    black_box = save(tmp_path / "b.pt", build("black-box", Features(data).sizes), "black-box")
    with pytest.raises(DataError, match="holds the 'black-box' model"):
        explain(folder, black_box, 1)
    path = save(tmp_path / "x.pt", fresh(data))
    other = write_movielens(tmp_path / "other", users=28)
    with pytest.raises(
        DataError, match="trained on 35 users and 141 movies, the data has 28 and 141"
    ):
        explain(other, path, 1)
    with pytest.raises(DataError, match="no such checkpoint"):
        explain(folder, tmp_path / "none.pt", 1)
