"""Explains the predictions for one session in words: which expert decides, and what it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from maskmoe_kernels.experiments.skip.data.columns import MSSD
from maskmoe_kernels.experiments.skip.data.features import SessionBatch
from maskmoe_kernels.experiments.skip.data.shards import Shards
from maskmoe_kernels.experiments.skip.generator.causes import Causes
from maskmoe_kernels.experiments.skip.models import decided, logits_of
from maskmoe_kernels.experiments.skip.runs import check_schema, load
from maskmoe_kernels.experiments.skip.schema.schema import Schema
from maskmoe_kernels.experiments.skip.settings import TOLERANCE, Settings
from maskmoe_kernels.experiments.skip.words import header_in_words, reason_in_words
from maskmoe_kernels.files import claim
from maskmoe_kernels.models.sessions import SessionExperts
from maskmoe_kernels.ops.selection.api import Mixture


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
        sums: Name of a sum of the schema -> mean share of its experts together.
        verbs: What is said of a label that is false, and of one that is true.
        tracks: The tracks of half B, in order.
        tolerance: Within which an expert suffices, in log-odds; ``None`` if experts are mixed.
    """

    session: str
    header: str
    sharpness: float | None
    shares: dict[str, float]
    tracks: list[Track]
    tolerance: float | None = None
    verbs: tuple[str, str] = MSSD.verbs
    sums: dict[str, float] = field(default_factory=dict)


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
    model, settings = _load(run)
    shards = Shards(data, split)
    schema = shards.schema
    check_schema(run, model, schema)
    batch, table = shards.find(_first(shards) if session is None else session)
    if check is not None:
        check(batch.session_ids[0])
    with torch.inference_mode():
        logits = logits_of(model, batch, settings)[~batch.second_padding].double()
        mixed = decided(logits, model.family, settings, sharpness)
    known = None if causes is None else _cause_names(causes, batch, schema)
    shares = dict(zip(model.family.names, mixed.attribution.mean(0).tolist(), strict=True))
    rows = table.to_pylist()
    explanation = Explanation(
        session=batch.session_ids[0],
        header=header_in_words(rows, schema),
        sharpness=settings.power(sharpness),
        shares=shares,
        tracks=_tracks(rows, schema, logits, mixed, known),
        tolerance=TOLERANCE if settings.suffices else None,
        verbs=schema.verbs,
        sums={name: sum(shares[one] for one in of) for name, of in schema.sums.items()},
    )
    missing = None if out is None else _write(explanation, out, schema)
    if console is not None:
        print_explanation(explanation, console)
        if out is not None:
            print_written(console, "report", "figure", out, missing)
    return explanation


def _load(run: Path) -> tuple[SessionExperts, Settings]:
    """The interpretable model of a run, and its settings."""
    model, settings, _ = load(run)
    if not isinstance(model, SessionExperts):
        raise DataError(
            f"{run}: holds the {settings.model!r} model, which has no experts to explain; name a "
            "run of an interpretable one"
        )
    return model, settings


def file_name(session: str) -> str:
    """Name of the files that :func:`explain` writes, without its ending."""
    # Ids come from the data: replace what is special in file names, separators first of all.
    return "explain-" + "".join(c if c.isalnum() or c in "-_" else "_" for c in session)


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print the header, a sentence a track (wrong predictions in red), and the experts' shares."""
    print_line(console, explanation.header)
    for track in explanation.tracks:
        style = None if track.skipped == track.predicted else "red"
        suffices = explanation.tolerance is not None
        print_line(console, sentence(track, explanation.verbs, suffices), style)
    right = sum(track.skipped == track.predicted for track in explanation.tracks)
    descending = sorted(explanation.shares.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in descending if share >= 0.005)
    mixes = explanation.tolerance is None
    what = "Share of the decisions" if mixes else "Smallest expert that suffices"
    print_line(
        console,
        f"Right on {right} of {len(explanation.tracks)} tracks. {what}: {shares}.",
    )
    if explanation.sums:
        sums = ", ".join(f"{name} {share:.0%}" for name, share in explanation.sums.items())
        print_line(console, f"Summed: {sums}.")


def sentence(track: Track, verbs: tuple[str, str] = MSSD.verbs, suffices: bool = False) -> str:
    """A track in words: label, prediction and its probability, and the deciding expert.

    Args:
        track: The track.
        verbs: What is said of a label that is false, and of one that is true.
        suffices: Whether its expert is the smallest that suffices, rather than one of a mixture.
    """
    sure = track.probability if track.predicted else 1 - track.probability
    known = "" if track.cause is None else f" The label's cause: {track.cause}."
    if suffices:
        why = f"{track.expert} suffices: the answer would be the same knowing only {track.reason}."
    else:
        why = f"{track.expert} decides with {track.share:.0%} ({track.reason})."
    return (
        f"Track {track.position} was {verbs[track.skipped]}; predicted: {verbs[track.predicted]}, "
        f"{100 * sure:.0f} % sure. {why}{known}"
    )


def _first(shards: Shards) -> str:
    """The id of the first session."""
    if not len(shards):
        raise DataError(f"{shards.folder}: {shards.split} holds no session. Name another split.")
    name: str = shards.table(0, ("session_id",))["session_id"][0].as_py()
    return name


def _cause_names(causes: Path, batch: SessionBatch, schema: Schema) -> list[str]:
    """The causes of the labels of half B, padded."""
    names = tuple(schema.causes)
    return [names[code] for code in Causes(causes, schema).of_batch(batch)[0][0].tolist()]


def _tracks(
    rows: list[dict[str, Any]],
    schema: Schema,
    logits: Tensor,
    mixed: Mixture,
    causes: Sequence[str] | None,
) -> list[Track]:
    """The tracks of half B.

    Args:
        rows: All rows of the session.
        schema: The schema.
        logits: ``(tracks, H)``.
        mixed: Their mixture.
        causes: Causes of the tracks, if known.
    """
    family = schema.family
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
                skipped=bool(row[schema.events.label]),
                predicted=probability > 0.5,
                probability=probability,
                expert=name,
                share=float(mixed.attribution[t, expert]),
                belief=float(beliefs[t, expert]),
                reason=reason_in_words(tuple(family.subsets[name]), first, row, schema),
                cause=None if causes is None else causes[t],
                attribution=dict(zip(family.names, mixed.attribution[t].tolist(), strict=True)),
            )
        )
    return result


def _write(explanation: Explanation, out: Path, schema: Schema) -> str | None:
    """Write the report and figure 11.

    Returns:
        Why there is no figure, in words; ``None`` if there is one.
    """
    name = file_name(explanation.session)
    write_json(out / f"{name}.json", dataclasses.asdict(explanation))
    missing = plot_style.unsupported_reason()
    if missing is None:
        tracks = explanation.tracks
        every = [[*track.attribution.values()] for track in tracks]
        drawn = {name: (explanation.shares, every, "expert")}
        if schema.sums:
            sums = [
                [sum(track.attribution[e] for e in experts) for experts in schema.sums.values()]
                for track in tracks
            ]
            drawn[f"{name}-sums"] = explanation.sums, sums, "experts together"
        for file, (names, shares, rows) in drawn.items():
            skip_figures.session(
                torch.tensor(shares),
                list(names),
                [track.position for track in tracks],
                [track.skipped for track in tracks],
                [track.probability for track in tracks],
                out / f"{file}.png",
                f"Session {explanation.session}",
                schema.verbs,
                rows,
            )
    return missing
