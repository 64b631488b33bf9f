"""One file a rival: a :class:`~bench.contender.Contender` that its author would call fast."""

from bench.contender import Contender
from bench.rivals.best_dense import BestDense, BestDenseCompiled
from bench.rivals.bsr import Bsr
from bench.rivals.bucketed_bmm import BucketedBmm
from bench.rivals.floors import FloorCopy, FloorGemm
from bench.rivals.grouped_mm import GroupedMM, GroupedMMGathered
from bench.rivals.masked_dense import (
    MaskedBeforehand,
    MaskedBeforehandCompiled,
    MaskedDense,
    MaskedDenseCompiled,
)
from bench.rivals.nflows_layer import Nflows
from bench.rivals.ours import Ours
from bench.rivals.paper_style import PaperStyle, PaperStyleCompiled
from bench.rivals.zuko_layer import Zuko

#: Ours first, then by number.
ALL: tuple[type[Contender], ...] = (
    Ours,
    PaperStyle,
    PaperStyleCompiled,
    MaskedDense,
    MaskedDenseCompiled,
    MaskedBeforehand,
    MaskedBeforehandCompiled,
    BestDense,
    BestDenseCompiled,
    BucketedBmm,
    GroupedMM,
    GroupedMMGathered,
    Bsr,
    Zuko,
    Nflows,
    FloorGemm,
    FloorCopy,
)

__all__ = [
    "ALL",
    "BestDense",
    "BestDenseCompiled",
    "Bsr",
    "BucketedBmm",
    "FloorCopy",
    "FloorGemm",
    "GroupedMM",
    "GroupedMMGathered",
    "MaskedBeforehand",
    "MaskedBeforehandCompiled",
    "MaskedDense",
    "MaskedDenseCompiled",
    "Nflows",
    "Ours",
    "PaperStyle",
    "PaperStyleCompiled",
    "Zuko",
]
