"""A user's recommendations, and in words which expert decided on each and what it looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens import EVERY_MODEL, TOLERANCE, WIDTHS
from maskmoe_kernels.experiments.movielens.data.ranking import Features
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.tables import SEXES, MovieLens
from maskmoe_kernels.experiments.movielens.evaluate import SEALED
from maskmoe_kernels.experiments.movielens.verdict import (
    Decide,
    Verdict,
    mixed,
    named_values,
    sufficing,
)
from maskmoe_kernels.experiments.movielens.words import (
    AGE_NAMES,
    OCCUPATION_NAMES,
    SEX_NAMES,
    group_in_words,
    reason_in_words,
    same_in_words,
    seen_by,
)
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.shared.checkpoint import (
    check_experiment,
    failing,
    load_checkpoint,
    restore_model,
    restoring,
)
from maskmoe_kernels.experiments.shared.contributions import waterfall
from maskmoe_kernels.experiments.shared.output import Column, print_line, print_table, print_written
from maskmoe_kernels.experiments.shared.report import check_seal, read_json, write_json
from maskmoe_kernels.experiments.shared.structure import check
from maskmoe_kernels.files import claim
from maskmoe_kernels.models import InterpretableNCF

# Below this probability an expert speaks against a movie: the "rare" confidence is 0 there.
_NEUTRAL = 0.3


@dataclass(frozen=True)
class Recommendation:
    """One movie for one user.

    Attributes:
        rank: From 1, among the rated movies the user has not seen; ``None`` for a movie that is
            not among them.
        status: ``"unseen"``, ``"seen"`` by this user, or ``"never rated"`` by anybody: its
            embedding is then untrained.
        movie: Official movie id.
        title: With its year, as in ``movies.dat``.
        probability: That the user watches it: of the mixture, or of the expert that sees all.
        expert: The expert with the largest share of the decision; or the smallest that suffices.
        share: That share; ``None`` of an expert that suffices.
        reason: What the expert looked at, in words.
        attribution: Share of each expert, which sum to 1; empty where none has a share.
        gap: How far the expert that suffices is from the one that sees all, in log-odds.
        contributions: Shapley values in log-odds, of an expert that suffices: what user and item
            add to what content says. They sum to the log-odds of ``probability``.
        answers: Log-odds of each expert, where one suffices.
    """

    rank: int | None
    status: str
    movie: int
    title: str
    probability: float
    expert: str
    share: float | None
    reason: str
    attribution: dict[str, float]
    gap: float | None = None
    contributions: dict[str, float] = dataclasses.field(default_factory=dict)
    answers: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """A user, the movies, and who decided.

    Attributes:
        user: Official user id.
        header: Who the user is and what share each expert holds, one paragraph.
        sharpness: Power of the smaller experts' confidence; ``None`` if the smallest expert that
            suffices explains.
        chosen: Where the sharpness comes from.
        shares: Mean share of each expert over ``movies``; or for how many of them it suffices.
        movies: Best first.
        tolerance: Within which an expert suffices, in log-odds.
    """

    user: int
    header: str
    sharpness: float | None
    chosen: str
    shares: dict[str, float]
    movies: list[Recommendation]
    tolerance: float | None = None


def explain(
    path: Path,
    checkpoint: Path,
    user: int,
    item: int | None = None,
    *,
    top: int = 10,
    sharpness: float | None = None,
    tolerance: float | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Explanation:
    """Explain a user's top recommendations, or one movie, by the interpretable model.

    Args:
        path: MovieLens-1M, as for :func:`read_movielens`.
        checkpoint: Of the interpretable model; its best epoch is used.
        user: Official user id.
        item: Official id of the one movie to explain, seen or not; ``None`` for the top.
        top: How many movies, at least 1.
        sharpness: See :func:`mixture`; ``None`` takes the one chosen in the ``report.json`` beside
            the checkpoint, or 1 where there is none.
        tolerance: Of a checkpoint of the model ``"sufficient"``; see :func:`sufficient`. ``None``
            takes ``TOLERANCE``.
        out: Folder for ``explain-user-U.json`` or ``explain-user-U-item-I.json``; of a model whose
            experts suffice also for a picture of the first movie, ``.png``.
        console: Where the header and the table go.

    Raises:
        DataError: The data is damaged, the checkpoint is of another model or other data, the
            user or the movie does not exist, or the report beside it cannot be read; or
            ``sharpness`` or ``tolerance`` is given for the model that has none.
    """
    if out is not None:
        claim(out)
    saved = _checkpoint_of_interpretable(checkpoint)
    data = read_movielens(path)
    row = _row_of(data.user_ids, user, "user", "users.dat")
    named = None if item is None else _row_of(data.movie_ids, item, "movie", "movies.dat")
    features = Features(data)
    model = _restored(saved, features, checkpoint)
    power, within, chosen = None, None, "none: experts are not mixed"
    suffices = saved["config"]["model"] == "sufficient"
    _check_given(checkpoint, suffices, sharpness, tolerance)
    if suffices:
        within = TOLERANCE if tolerance is None else tolerance
        decide: Decide = partial(sufficing, tolerance=within)
    else:
        power, chosen = _sharpness(sharpness, checkpoint)
        decide = partial(mixed, sharpness=power)
    movies = _recommend(model, features, row, named, top, decide)
    shares = _mean_shares(model.family.names, movies)
    header = _header(data, row, shares, named is not None, within)
    explanation = Explanation(user, header, power, chosen, shares, movies, within)
    if console is not None:
        print_explanation(explanation, console)
    if out is not None:
        _write(explanation, data, row, item, out, console)
    return explanation


def file_names(user: int, item: int | None) -> tuple[str, str]:
    """Names of the report and of the picture that :func:`explain` writes."""
    stem = f"explain-user-{user}" + ("" if item is None else f"-item-{item}")
    return f"{stem}.json", f"{stem}.png"


def _write(
    explanation: Explanation,
    data: MovieLens,
    row: int,
    item: int | None,
    out: Path,
    console: Console | None,
) -> None:
    """The report; and the picture of the first movie, where groups have contributions."""
    report, picture = file_names(explanation.user, item)
    write_json(out / report, dataclasses.asdict(explanation))
    drawn = explanation.tolerance is not None and bool(explanation.movies)
    missing = plot_style.unsupported_reason()
    if drawn and missing is None:
        _draw(explanation, data, row, out / picture)
    if console is not None and drawn:
        print_written(console, f"report {report}", f"picture {picture}", out, missing)
    elif console is not None:
        print_line(console, f"report: {out / report}")


def _draw(explanation: Explanation, data: MovieLens, row: int, path: Path) -> None:
    first = explanation.movies[0]
    movie = _row_of(data.movie_ids, first.movie, "movie", "movies.dat")
    told = {
        group: f"{group}: {group_in_words(data, row, movie, group)}"
        for group in first.contributions
    }
    waterfall(
        {told[group]: value for group, value in first.contributions.items() if group != "content"},
        path,
        title=f"User {explanation.user}: {first.title}\n{first.reason}",
        base=(told["content"], first.contributions["content"]),
        answers=first.answers,
        sufficient=first.expert,
        tolerance=explanation.tolerance,
    )


def print_explanation(explanation: Explanation, console: Console) -> None:
    """The header and the table."""
    print_line(console, explanation.header)
    if explanation.sharpness is not None:
        print_line(console, f"Sharpness {explanation.sharpness:g} ({explanation.chosen}).", "dim")
    else:
        print_line(console, f"Tolerance: {explanation.tolerance:g} log-odds.", "dim")
    if not explanation.movies:
        print_line(console, "No rated movie is left that this user has not seen.")
        return
    columns = [
        Column("rank"),
        Column("title", text=True, prose=True),
        Column("probability"),
        Column("decided by" if explanation.tolerance is None else "sufficient", text=True),
        Column("share" if explanation.tolerance is None else "gap", optional=1),
        Column("reason", text=True, prose=True),
    ]
    added = list(explanation.movies[0].contributions)
    columns[5:5] = [Column(f"{group} adds", optional=2) for group in added]
    rows = []
    for m in explanation.movies:
        rank = m.status if m.rank is None else str(m.rank)
        how = f"{m.gap:.2f}" if m.share is None else f"{m.share:.0%}"
        rows.append([rank, m.title, f"{m.probability:.3f}", m.expert, how])
        rows[-1] += [f"{value:+z.2f}" for value in m.contributions.values()] + [m.reason]
    note = "" if not added else "What a group adds, in log-odds: its Shapley value."
    print_table(console, f"User {explanation.user}: what to watch, and why", columns, rows, note)


def _mean_shares(names: Sequence[str], movies: Sequence[Recommendation]) -> dict[str, float]:
    def share(movie: Recommendation, name: str) -> float:
        return movie.attribution[name] if movie.attribution else float(movie.expert == name)

    return {name: sum(share(m, name) for m in movies) / max(len(movies), 1) for name in names}


def _header(
    data: MovieLens, user: int, shares: dict[str, float], one: bool, tolerance: float | None
) -> str:
    rated = seen_by(data, user)
    singular = SEX_NAMES[SEXES[int(data.sex[user])]][0]
    age, code = AGE_NAMES[int(data.age[user])], int(data.occupation[user])
    work = "no stated occupation" if code == 0 else f"occupation {OCCUPATION_NAMES[code]}"
    some = "; ".join(data.titles[k] for k in rated[:3].tolist())
    held = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    over = "on this movie" if one else "on the movies below, on average"
    what = "Share of the decision"
    if tolerance is not None:
        what, over = (
            "Smallest expert that suffices",
            "on this movie" if one else "on the movies below",
        )
    return (
        f"User {int(data.user_ids[user])} is a {singular}, aged {age}, {work}, with {len(rated)} "
        f"rated movies, among them {some}. {what} {over}: {held}."
    )


def _recommend(
    model: InterpretableNCF,
    features: Features,
    user: int,
    named: int | None,
    top: int,
    decide: Decide,
) -> list[Recommendation]:
    """The ``top`` unseen movies, or the ``named`` one with its rank among them."""
    data = features.data
    unseen = data.rated_items[~torch.isin(data.rated_items, seen_by(data, user))]
    status = "unseen"
    listed = unseen
    if named is not None and not bool((unseen == named).any()):
        status = "seen" if bool((data.rated_items == named).any()) else "never rated"
        listed = torch.tensor([named])
    with torch.inference_mode():
        logits = features.logits(model, torch.full_like(listed, user), listed).double()
        verdict = decide(model, logits)
    order = verdict.probability.argsort(descending=True, stable=True).tolist()
    result: list[Recommendation] = []
    for rank, k in enumerate(order, start=1):
        movie = int(listed[k])
        if len(result) == top or (named is not None and movie != named):
            continue
        of_experts = _of_experts(model, data, user, movie, verdict.at(k), logits[k])
        result.append(
            Recommendation(
                rank=rank if status == "unseen" else None,
                status=status,
                movie=int(data.movie_ids[movie]),
                title=data.titles[movie],
                probability=float(verdict.probability[k]),
                **of_experts,
            )
        )
    return result


def _of_experts(
    model: InterpretableNCF,
    data: MovieLens,
    user: int,
    movie: int,
    verdict: Verdict,
    logits: Tensor,
) -> dict[str, Any]:
    """What a :class:`Recommendation` says of who decides and why."""
    name = model.family.names[int(verdict.expert)]
    if verdict.gap is None:
        shares = named_values(model, verdict.share)
        # Its own verdict, not the mixture's: it is the deciding expert that is explained.
        favours = bool(torch.sigmoid(2 * logits[verdict.expert]) >= _NEUTRAL)
        reason = reason_in_words(data, user, movie, name, favours)
        return {"expert": name, "share": shares[name], "reason": reason, "attribution": shares}
    return {
        "expert": name,
        "share": None,
        "reason": same_in_words(data, user, movie, name),
        "attribution": {},
        "gap": float(verdict.gap),
        "contributions": {group: float(phi) for group, phi in verdict.contributions.items()},
        "answers": named_values(model, 2 * logits),
    }


def _row_of(ids: Tensor, wanted: int, what: str, file: str) -> int:
    found = (ids == wanted).nonzero().flatten()
    if not len(found):
        raise DataError(
            f"no {what} {wanted} in {file}: its {len(ids)} ids lie from {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    return int(found[0])


def _checkpoint_of_interpretable(path: Path) -> dict[str, Any]:
    saved = load_checkpoint(path)
    check_experiment(path, saved["config"], "movielens")
    check(saved["config"], {"model": str, "options": str}, failing(path), "config")
    if saved["best"] is None:
        raise failing(path)("expected the best epoch, got None")
    name = saved["config"]["model"]
    if name not in ("interpretable", "sufficient"):
        raise DataError(
            f"{path}: holds the {name!r} model, which has no experts to explain; give the "
            "checkpoint of the interpretable one (interpretable.pt), or sufficient.pt"
        )
    return saved


def _restored(saved: dict[str, Any], features: Features, path: Path) -> InterpretableNCF:
    """The model of a checkpoint, if it was trained on data of this size."""
    weights, sizes = saved["best"]["model"], features.sizes
    with restoring(path, "weights"):
        trained = (len(weights["inputs.user.weight"]), len(weights["inputs.item.weight"]))
    if trained != (sizes.num_users, sizes.num_items):
        raise DataError(
            f"{path}: was trained on {trained[0]} users and {trained[1]} movies, the data has "
            f"{sizes.num_users} and {sizes.num_items}; give the data it was trained on"
        )
    options = saved["config"]["options"]
    embeddings = "strict" if "embeddings=strict" in options else "shared"
    widths = "largest" if "widths=largest" in options else "equal"
    model = InterpretableNCF(sizes, WIDTHS[widths], embeddings)
    restore_model(path, model, weights)
    return model.eval()


def _check_given(
    path: Path, suffices: bool, sharpness: float | None, tolerance: float | None
) -> None:
    """Raise DataError for an option that the explanation would not use."""
    if suffices and sharpness is not None:
        raise DataError(
            f"--sharpness mixes experts, and those of {path} are not mixed: give --tolerance, or "
            "interpretable.pt"
        )
    if not suffices and tolerance is not None:
        raise DataError(
            f"--tolerance says which expert suffices, and those of {path} are mixed: give "
            "--sharpness, or sufficient.pt"
        )


def _sharpness(given: float | None, checkpoint: Path) -> tuple[float, str]:
    """The power to use, and where it comes from."""
    if given is not None:
        return given, "as given"
    report = checkpoint.with_name("report.json")
    if not report.exists():
        return 1.0, f"no {report.name} beside the checkpoint"
    remedy = "give --sharpness, or restore a copy of it"

    def fail(what: object) -> DataError:
        return DataError(f"{report}: not a readable report ({what}); {remedy}")

    try:
        models = read_json(report, "It cannot be used.")
    except DataError as error:
        raise fail(error) from error
    check(models, {"models": {str: {str: object}}}, fail)
    if strange := models["models"].keys() - set(EVERY_MODEL):
        raise fail(f"expected models of {list(EVERY_MODEL)}, got {sorted(strange)}")
    chosen = models["models"].get("interpretable")
    if chosen is None:
        return 1.0, f"{report.name} does not know the interpretable model"
    check(chosen, {"sharpness": float}, fail, "models.interpretable")
    check_seal({key: chosen[key] for key in SEALED if key in chosen}, report, remedy)
    if chosen["sharpness"] <= 0:
        raise fail(f"expected a sharpness above 0, got {chosen['sharpness']}")
    return float(chosen["sharpness"]), f"chosen in {report.name}"
