"""The settings that determine the generated sessions."""

from __future__ import annotations

from dataclasses import dataclass

#: Sessions of a chunk: one ``log_*.csv`` and one ``causes_*.parquet``.
CHUNK = 25_000
#: The schemas of which sessions can be generated.
KINDS = ("mssd", "users")
#: With fewer tracks, a kind of track that a rule needs may not occur.
FEWEST_TRACKS = 2_000


@dataclass(frozen=True)
class GeneratorSettings:
    """Everything that determines the generated files; equal settings give equal files.

    Attributes:
        sessions: Number of sessions.
        seed: Seed of all random numbers, from 0.
        tracks: Number of tracks, at least ``FEWEST_TRACKS``.
        chunk: Sessions of a chunk.
        kind: One of ``KINDS``: the Music Streaming Sessions Dataset, or sessions of known users.
            Of these every user has ten, and as many users are generated as are needed.

    Raises:
        ValueError: A value is too small.
    """

    sessions: int
    seed: int = 0
    tracks: int = 50_000
    chunk: int = CHUNK
    kind: str = "mssd"

    def __post_init__(self) -> None:
        if self.sessions < 1 or self.chunk < 1 or self.seed < 0:
            raise ValueError(
                "sessions and chunk must be at least 1 and seed at least 0, got "
                f"{self.sessions}, {self.chunk} and {self.seed}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.tracks < FEWEST_TRACKS:
            raise ValueError(f"tracks must be at least {FEWEST_TRACKS}, got {self.tracks}")

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.sessions // self.chunk)
