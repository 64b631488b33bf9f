"""One session in words: which expert decides on each track, how sure, and what it looked at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.shared.files import claim
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.experiments.skip import figures as skip_figures
from maskmoe_kernels.experiments.skip.data.causes import CAUSES, Causes
from maskmoe_kernels.experiments.skip.data.mssd_columns import CONTEXT_TYPES
from maskmoe_kernels.experiments.skip.data.session_features import SessionBatch
from maskmoe_kernels.experiments.skip.data.sessions import Shards
from maskmoe_kernels.experiments.skip.train import load, logits_of
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models.sessions import SessionExperts
from maskmoe_kernels.ops.selection import mixture

_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_CONTEXT_NAMES = {
    "editorial_playlist": "editorial playlist",
    "radio": "radio",
    "user_collection": "own collection",
    "catalog": "catalogue",
    "charts": "charts",
    "personalized_playlist": "personalised playlist",
}
#: Features of the music that are told.
_MUSIC = ("energy", "acousticness", "instrumentalness", "danceability")


@dataclass(frozen=True)
class Judged:
    """One track of the second half.

    Attributes:
        position: In the session, from 1.
        skipped: The label.
        predicted: Is a skip predicted?
        probability: Of a skip.
        expert: The one with the largest share of the decision.
        share: That share.
        belief: Its own probability of a skip.
        reason: What it looked at, in words.
        cause: What decided the label, where that is known.
        attribution: Share of each expert; they sum to 1.
    """

    position: int
    skipped: bool
    predicted: bool
    probability: float
    expert: str
    share: float
    belief: float
    reason: str
    cause: str | None
    attribution: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """A session, its second half judged, and who decided.

    Attributes:
        session: Official id.
        header: The first half in words.
        sharpness: Power of the smaller experts' confidence.
        shares: Mean share of each expert over the tracks.
        tracks: Of the second half, in order.
    """

    session: str
    header: str
    sharpness: float
    shares: dict[str, float]
    tracks: list[Judged]


def explain(
    data: Path,
    run: Path,
    session: str | None = None,
    *,
    split: str = "test",
    causes: Path | None = None,
    sharpness: float | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Explanation:
    """Explain the predictions for one session.

    Args:
        data: Prepared shards.
        run: Folder of an interpretable model's run.
        session: Its id; ``None``: the first of the split.
        split: Where it is.
        causes: Folder of the generated sessions, whose causes are known.
        sharpness: Of the prediction; ``None``: as the model was trained.
        out: Folder for ``explain-ID.json`` and ``explain-ID.png`` (figure 11).
        console: Where the words go.

    Raises:
        DataError: Shards, run or causes are missing or damaged, the model has no experts, or the
            split does not hold the session.
    """
    if out is not None:
        claim(out)
    model, settings, _ = load(run)
    if not isinstance(model, SessionExperts):
        raise DataError(
            f"{run}: holds the {settings.model!r} model, which has no experts to explain; name a "
            "run of an interpretable one"
        )
    shards = Shards(data, split)
    batch, rows = shards.find(_first(shards) if session is None else session)
    power = settings.sharpness if sharpness is None else sharpness
    with torch.inference_mode():
        logits = logits_of(model, batch, settings)[~batch.second_padding].double()
        mixed = mixture(logits, model.family, settings.confidence, power)
    tracks = _judged(
        batch, rows.to_pylist(), model.family, logits, mixed.probability, mixed.attribution, causes
    )
    shares = dict(zip(model.family.names, mixed.attribution.mean(0).tolist(), strict=True))
    header = header_in_words(rows.to_pylist())
    explanation = Explanation(batch.session_ids[0], header, power, shares, tracks)
    missing = None if out is None else _write(explanation, out)
    if console is not None:
        print_explanation(explanation, console)
        if out is not None:
            text = f"no figure: {missing}" if missing else f"report and figure: {out}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    return explanation


def print_explanation(explanation: Explanation, console: Console) -> None:
    """The session, a sentence a track (in red where it is wrong), and each expert's share."""
    console.print(explanation.header, highlight=False, markup=False)
    for track in explanation.tracks:
        style = None if track.skipped == track.predicted else "red"
        console.print(sentence(track), style=style, highlight=False, markup=False)
    right = sum(track.skipped == track.predicted for track in explanation.tracks)
    held = sorted(explanation.shares.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {share:.0%}" for name, share in held if share >= 0.005)
    console.print(
        f"Right on {right} of {len(explanation.tracks)} tracks. Share of the decisions: {told}.",
        highlight=False,
    )


def sentence(track: Judged) -> str:
    """One track in words: label, prediction and how sure it is, who decides and why."""
    sure = track.probability if track.predicted else 1 - track.probability
    known = "" if track.cause is None else f" The label's cause: {track.cause}."
    return (
        f"Track {track.position} was {_verb(track.skipped)}; predicted: {_verb(track.predicted)}, "
        f"{100 * sure:.0f} % sure. {track.expert} decides with {track.share:.0%} ({track.reason})."
        f"{known}"
    )


def header_in_words(rows: list[dict[str, Any]]) -> str:
    """Who listens, when, and what happened in the first half."""
    first = rows[: len(rows) // 2]
    start = rows[0]
    when = f"{_WEEKDAYS[start['date'].weekday()]} at {start['hour_of_day']} h"
    skips = [row["skip_2"] for row in first]
    return (
        f"Session {start['session_id']}: {len(rows)} tracks, {when}, {_context(first)}. "
        f"Of the first {len(first)} tracks {sum(skips)} were skipped; {_interaction(first)}."
    )


def reason_in_words(groups: tuple[str, ...], first: list[dict[str, Any]], row: Any) -> str:
    """What an expert of these groups looked at, for a track of the second half.

    Args:
        groups: Of its subset.
        first: Rows of the first half.
        row: The track's, with its raw features.
    """
    words = {
        "context": lambda: _context(first),
        "interaction": lambda: _interaction(first),
        "popularity": lambda: _popularity(row),
        "music": lambda: _music(row),
    }
    told = [words[group]() for group in groups if group in words]
    return "; ".join(told) or "the place in the session"


def _context(first: list[dict[str, Any]]) -> str:
    last = first[-1]
    account = "paying account" if last["premium"] else "free account"
    source = _CONTEXT_NAMES[CONTEXT_TYPES[last["context_type"]]]
    shuffle = ", shuffled" if last["hist_user_behavior_is_shuffle"] else ""
    return f"{account}, {source}{shuffle}"


def _interaction(first: list[dict[str, Any]]) -> str:
    skips = [bool(row["skip_2"]) for row in first]
    run = next((k for k, skip in enumerate(reversed(skips)) if skip != skips[-1]), len(skips))
    seeks = sum(row["hist_user_behavior_n_seekfwd"] for row in first)
    last = (
        f"the last {run} were {_verb(skips[-1])}" if run > 1 else f"the last was {_verb(skips[-1])}"
    )
    return last + (f", {seeks} seeks forward" if seeks else "")


def _popularity(row: Any) -> str:
    minutes, seconds = divmod(round(row["duration"]), 60)
    return (
        f"popularity {row['us_popularity_estimate']:.1f}, of {row['release_year']:.0f}, "
        f"{minutes}:{seconds:02d} min"
    )


def _music(row: Any) -> str:
    features = ", ".join(f"{name} {row[name]:.2f}" for name in _MUSIC)
    return f"{features}, {'major' if row['mode'] > 0.5 else 'minor'}"


def _verb(skipped: bool) -> str:
    return "skipped" if skipped else "played"


def _first(shards: Shards) -> str:
    if not len(shards):
        raise DataError(f"{shards.folder}: {shards.split} holds no session. Name another split.")
    name: str = shards.table(0, ("session_id",))["session_id"][0].as_py()
    return name


def _judged(
    batch: SessionBatch,
    rows: list[dict[str, Any]],
    family: SubsetFamily,
    logits: torch.Tensor,
    probability: torch.Tensor,
    attribution: torch.Tensor,
    causes: Path | None,
) -> list[Judged]:
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    why = None if causes is None else Causes(causes).of(batch.session_ids)[0][0]
    beliefs = torch.sigmoid(2 * logits)
    result = []
    for t, row in enumerate(second):
        expert = int(attribution[t].argmax())
        name = family.names[expert]
        chance = float(probability[t])
        result.append(
            Judged(
                position=row["session_position"],
                skipped=bool(row["skip_2"]),
                predicted=chance > 0.5,
                probability=chance,
                expert=name,
                share=float(attribution[t, expert]),
                belief=float(beliefs[t, expert]),
                reason=reason_in_words(tuple(family.subsets[name]), first, row),
                cause=None if why is None else CAUSES[int(why[t])],
                attribution=dict(zip(family.names, attribution[t].tolist(), strict=True)),
            )
        )
    return result


def _write(explanation: Explanation, out: Path) -> str | None:
    """The report and figure 11; why there is no figure, in words."""
    # A session's id is a file's name only after what folders are made of is out of it.
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in explanation.session)
    write_json(out / f"explain-{name}.json", dataclasses.asdict(explanation))
    missing = plot_style.unsupported_reason()
    if missing is None:
        tracks = explanation.tracks
        skip_figures.session(
            torch.tensor([list(track.attribution.values()) for track in tracks]),
            list(explanation.shares),
            [track.position for track in tracks],
            [track.skipped for track in tracks],
            [track.probability for track in tracks],
            out / f"explain-{name}.png",
            f"Session {explanation.session}",
        )
    return missing
