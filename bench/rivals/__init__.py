"""One file a rival: a :class:`~bench.layers.contender.Contender` its author would call fast."""

import torch

from bench.layers.contender import Contender
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
from bench.rivals.ours import Ours, OursGrouped, OursTriton
from bench.rivals.paper_style import (
    PaperStyle,
    PaperStyleCompiled,
    PaperStyleMaxAutotune,
    PaperStyleReduceOverhead,
)
from bench.rivals.quack_gemm import Quack, QuackTuned
from bench.rivals.stk_matrix import StkMatrix
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
#: On a GPU: these, too.
GPU: tuple[type[Contender], ...] = (
    *ALL,
    OursTriton,
    OursGrouped,
    PaperStyleReduceOverhead,
    PaperStyleMaxAutotune,
    Quack,
    QuackTuned,
    StkMatrix,
)


def contenders(device: str) -> tuple[type[Contender], ...]:
    """Who is measured on ``device``."""
    return GPU if torch.device(device).type == "cuda" else ALL


__all__ = [
    "ALL",
    "GPU",
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
    "OursGrouped",
    "OursTriton",
    "PaperStyle",
    "PaperStyleCompiled",
    "PaperStyleMaxAutotune",
    "PaperStyleReduceOverhead",
    "Quack",
    "QuackTuned",
    "StkMatrix",
    "Zuko",
    "contenders",
]
