"""Explains the predictions for one session in words: which expert decides, and what it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared import plot_style
from maskmoe_kernels.experiments.shared.output import print_line, print_written
from maskmoe_kernels.experiments.shared.report import write_json
from maskmoe_kernels.experiments.skip import figures as skip_figures
from maskmoe_kernels.experiments.skip.data.columns import CONTEXT_TYPES, HISTORY
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.generator.causes import CAUSES, Causes
from maskmoe_kernels.experiments.skip.models import decided, logits_of
from maskmoe_kernels.experiments.skip.runs import load
from maskmoe_kernels.experiments.skip.settings import TOLERANCE
from maskmoe_kernels.files import claim
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models.sessions import SessionExperts
from maskmoe_kernels.ops.selection.api import Mixture

_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_CONTEXT_NAMES = {
    "editorial_playlist": "editorial playlist",
    "radio": "radio",
    "user_collection": "own collection",
    "catalog": "catalogue",
    "charts": "charts",
    "personalized_playlist": "personalised playlist",
}
# The features of the music group that a reason mentions.
_MUSIC = ("energy", "acousticness", "instrumentalness", "danceability")


@dataclass(frozen=True)
class Track:
    """A track of half B and how its skip was predicted.

    Attributes:
        position: Position in the session, from 1.
        skipped: The label.
        predicted: Whether a skip is predicted.
        probability: Predicted probability of a skip.
        expert: Name of the expert with the largest share of the decision; or the smallest that
            suffices, whose share is 1.
        share: That share.
        belief: The probability of a skip according to this expert alone.
        reason: What this expert sees, in words.
        cause: The cause of the label, if it is known.
        attribution: Expert -> share; they sum to 1.
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
    """A session, and the predictions for its half B.

    Attributes:
        session: The official id.
        header: The session and its half A in words.
        sharpness: Sharpness of the prediction; ``None`` if experts are not mixed.
        shares: Expert -> mean share over the tracks; or for how many of them it suffices.
        tracks: The tracks of half B, in order.
        tolerance: Within which an expert suffices, in log-odds; ``None`` if experts are mixed.
    """

    session: str
    header: str
    sharpness: float | None
    shares: dict[str, float]
    tracks: list[Track]
    tolerance: float | None = None


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
    check: Callable[[str], None] | None = None,
) -> Explanation:
    """Explain the predictions for one session.

    Args:
        data: The folder of shards.
        run: The folder of a run of an interpretable model.
        session: Official id of the session; ``None``: the first one of the split.
        split: The split that holds the session.
        causes: Folder of ``maskmoe skip generate``, if the sessions are generated.
        sharpness: Sharpness of the prediction; ``None``: the one the model was trained with.
        out: Folder for ``explain-ID.json`` and ``explain-ID.png`` (figure 11).
        console: Where the explanation is printed; ``None`` is quiet.
        check: Called with the id of the session before it is explained; may raise.

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
    batch, table = shards.find(_first(shards) if session is None else session)
    if check is not None:
        check(batch.session_ids[0])
    with torch.inference_mode():
        logits = logits_of(model, batch, settings)[~batch.second_padding].double()
        mixed = decided(logits, model.family, settings, sharpness)
    known = None if causes is None else _cause_names(causes, batch.session_ids[0])
    rows, shares = table.to_pylist(), mixed.attribution.mean(0).tolist()
    explanation = Explanation(
        session=batch.session_ids[0],
        header=header_in_words(rows),
        sharpness=settings.power(sharpness),
        shares=dict(zip(model.family.names, shares, strict=True)),
        tracks=_tracks(rows, model.family, logits, mixed, known),
        tolerance=TOLERANCE if settings.suffices else None,
    )
    missing = None if out is None else _write(explanation, out)
    if console is not None:
        print_explanation(explanation, console)
        if out is not None:
            print_written(console, "report", "figure", out, missing)
    return explanation


def file_name(session: str) -> str:
    """Name of the files that :func:`explain` writes, without its ending."""
    # Ids come from the data: replace what is special in file names, separators first of all.
    return "explain-" + "".join(c if c.isalnum() or c in "-_" else "_" for c in session)


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print the header, a sentence a track (wrong predictions in red), and the experts' shares."""
    print_line(console, explanation.header)
    for track in explanation.tracks:
        style = None if track.skipped == track.predicted else "red"
        print_line(console, sentence(track, explanation.tolerance is not None), style)
    right = sum(track.skipped == track.predicted for track in explanation.tracks)
    descending = sorted(explanation.shares.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in descending if share >= 0.005)
    mixes = explanation.tolerance is None
    what = "Share of the decisions" if mixes else "Smallest expert that suffices"
    print_line(
        console,
        f"Right on {right} of {len(explanation.tracks)} tracks. {what}: {shares}.",
    )


def sentence(track: Track, suffices: bool = False) -> str:
    """A track in words: label, prediction and its probability, and the deciding expert.

    Args:
        track: The track.
        suffices: Whether its expert is the smallest that suffices, rather than one of a mixture.
    """
    sure = track.probability if track.predicted else 1 - track.probability
    known = "" if track.cause is None else f" The label's cause: {track.cause}."
    if suffices:
        why = f"{track.expert} suffices: the answer would be the same knowing only {track.reason}."
    else:
        why = f"{track.expert} decides with {track.share:.0%} ({track.reason})."
    return (
        f"Track {track.position} was {_verb(track.skipped)}; predicted: {_verb(track.predicted)}, "
        f"{100 * sure:.0f} % sure. {why}{known}"
    )


def header_in_words(rows: list[dict[str, Any]]) -> str:
    """A session in words: its length, time, context, and the interactions of half A.

    Args:
        rows: All rows of the session.
    """
    first = rows[: len(rows) // 2]
    start = rows[0]
    when = f"{_WEEKDAYS[start['date'].weekday()]} at {start['hour_of_day']} h"
    skips = [row["skip_2"] for row in first]
    return (
        f"Session {start['session_id']}: {len(rows)} tracks, {when}, {_context(first)}. "
        f"Of the first {len(first)} tracks {sum(skips)} were skipped; {_interaction(first)}."
    )


def reason_in_words(groups: tuple[str, ...], first: list[dict[str, Any]], row: Any) -> str:
    """What an expert sees when it predicts a track of half B.

    Args:
        groups: The subset of the expert.
        first: Rows of half A.
        row: The row of the track, with its raw features.
    """
    words = {
        "context": lambda: _context(first),
        "interaction": lambda: _interaction(first),
        "popularity": lambda: _popularity(row),
        "music": lambda: _music(row),
    }
    reasons = [words[group]() for group in groups if group in words]
    return "; ".join(reasons) or "the place in the session"


def _context(first: list[dict[str, Any]]) -> str:
    last = first[-1]
    account = "paying account" if last["premium"] else "free account"
    source = _CONTEXT_NAMES[CONTEXT_TYPES[last["context_type"]]]
    shuffle = ", shuffled" if last[HISTORY + "is_shuffle"] else ""
    return f"{account}, {source}{shuffle}"


def _interaction(first: list[dict[str, Any]]) -> str:
    skips = [bool(row["skip_2"]) for row in first]
    run = next((k for k, skip in enumerate(reversed(skips)) if skip != skips[-1]), len(skips))
    seeks = sum(row[HISTORY + "n_seekfwd"] for row in first)
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
    """The id of the first session."""
    if not len(shards):
        raise DataError(f"{shards.folder}: {shards.split} holds no session. Name another split.")
    name: str = shards.table(0, ("session_id",))["session_id"][0].as_py()
    return name


def _cause_names(causes: Path, session: str) -> list[str]:
    """The causes of the labels of half B, padded to ten tracks."""
    return [CAUSES[code] for code in Causes(causes).of([session])[0][0].tolist()]


def _tracks(
    rows: list[dict[str, Any]],
    family: SubsetFamily,
    logits: Tensor,
    mixed: Mixture,
    causes: Sequence[str] | None,
) -> list[Track]:
    """The tracks of half B.

    Args:
        rows: All rows of the session.
        family: The subsets of the experts.
        logits: ``(tracks, H)``.
        mixed: Their mixture.
        causes: Causes of the tracks, if known.
    """
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    beliefs = torch.sigmoid(2 * logits)
    result = []
    for t, row in enumerate(second):
        expert = int(mixed.attribution[t].argmax())
        name = family.names[expert]
        probability = float(mixed.probability[t])
        result.append(
            Track(
                position=row["session_position"],
                skipped=bool(row["skip_2"]),
                predicted=probability > 0.5,
                probability=probability,
                expert=name,
                share=float(mixed.attribution[t, expert]),
                belief=float(beliefs[t, expert]),
                reason=reason_in_words(tuple(family.subsets[name]), first, row),
                cause=None if causes is None else causes[t],
                attribution=dict(zip(family.names, mixed.attribution[t].tolist(), strict=True)),
            )
        )
    return result


def _write(explanation: Explanation, out: Path) -> str | None:
    """Write the report and figure 11.

    Returns:
        Why there is no figure, in words; ``None`` if there is one.
    """
    name = file_name(explanation.session)
    write_json(out / f"{name}.json", dataclasses.asdict(explanation))
    missing = plot_style.unsupported_reason()
    if missing is None:
        tracks = explanation.tracks
        skip_figures.session(
            torch.tensor([list(track.attribution.values()) for track in tracks]),
            list(explanation.shares),
            [track.position for track in tracks],
            [track.skipped for track in tracks],
            [track.probability for track in tracks],
            out / f"{name}.png",
            f"Session {explanation.session}",
        )
    return missing
