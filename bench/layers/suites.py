"""Suites: the cases that one run measures, and how long it spends on each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cases import DTYPES, Case
from maskmoe_kernels.layout.families import FAMILIES

#: 3 to 16 experts.
SMALL = ("toy3", "ncf4", "spotify8", "chain16", "powerset4")
#: Dtypes that are measured on a CPU, too.
EVERYWHERE = ("float32", "bfloat16")


@dataclass(frozen=True)
class Grid:
    """Every combination of some families, widths, batches and dtypes."""

    families: Sequence[str]
    widths: Sequence[int]
    batches: Sequence[int]
    dtypes: Sequence[str] = EVERYWHERE

    def cases(self) -> list[Case]:
        """The cases, small batches first."""
        combined = itertools.product(self.batches, self.dtypes, self.families, self.widths)
        return [Case(family, width, batch, dtype) for batch, dtype, family, width in combined]


@dataclass(frozen=True)
class Suite:
    """Cases, and how long to measure each.

    Attributes:
        grids: What is measured.
        rounds: Minimum number of rounds a case.
        budget: Seconds of rounds a case, if the minimum takes less.
        longest: Seconds; a phase that would take longer at the measured GEMM rate is left out.
        slow: A contender this many times slower than the best gets only two samples.
        without: Contenders that the suite leaves out.
    """

    grids: Sequence[Grid]
    rounds: int = 5
    budget: float = 3.0
    longest: float = 1.0
    slow: float = 30.0
    without: Sequence[str] = ()

    def cases(
        self,
        families: Sequence[str] | None = None,
        widths: Sequence[int] | None = None,
        batches: Sequence[int] | None = None,
        dtypes: Sequence[str] | None = None,
    ) -> list[Case]:
        """All cases; a filter replaces the values of the suite."""
        grids = [
            Grid(
                families or grid.families,
                widths or grid.widths,
                batches or grid.batches,
                dtypes or grid.dtypes,
            )
            for grid in self.grids
        ]
        return list(dict.fromkeys(case for grid in grids for case in grid.cases()))


SUITES = {
    # Does everything run? One case is large enough to be part of the summary's means.
    "smoke": Suite(
        [
            Grid(["toy3"], [16], [256]),
            Grid(["powerset4"], [16], [64], ["float32"]),
            Grid(["toy3"], [16], [2048], ["float32"]),
        ],
        rounds=3,
        budget=0.1,
    ),
    # About two minutes: a small, a middle and a large family.
    "quick": Suite(
        [
            Grid(["ncf4", "powerset4", "powerset6"], [16, 64], [4096], ["float32"]),
            Grid(["ncf4", "powerset6"], [32], [256]),
            Grid(["pairs22"], [16], [256], ["float32"]),
            Grid(["powerset4"], [32], [4096], ["bfloat16"]),
        ],
        rounds=5,
        budget=3.0,
    ),
    # About forty minutes on two cores of 100 GFLOP/s together.
    "full": Suite(
        [
            Grid(list(FAMILIES), [16, 32, 64, 128], [256, 4096]),
            # Many rows take long and move the same bytes a row: a few shapes are enough.
            Grid(SMALL, [16], [65536]),
            Grid(["toy3", "ncf4"], [64], [65536]),
        ],
        rounds=4,
        budget=3.0,
    ),
    # For a GPU, the important cases first: a run may be cut off. Ten took two minutes on an H200.
    "gpu-quick": Suite(
        [
            Grid(["powerset6"], [16], [65536], ["bfloat16"]),
            Grid(["chain16"], [64], [65536], ["bfloat16"]),
            Grid(["ncf4"], [128], [65536], ["bfloat16"]),
            Grid(["powerset6"], [16, 64], [65536], ["tf32"]),
            Grid(["ncf4"], [64], [65536], ["tf32", "bfloat16"]),
            Grid(["ncf4"], [16], [65536, 1048576], ["bfloat16"]),
            Grid(["powerset4"], [32, 128], [65536], ["bfloat16"]),
            Grid(["powerset6"], [64], [65536], ["bfloat16"]),
            Grid(["pairs22"], [16], [65536], ["bfloat16"]),
            Grid(["spotify8"], [32], [65536], ["bfloat16"]),
            Grid(["toy3"], [64], [65536], ["bfloat16"]),
            Grid(["powerset6"], [32], [65536], ["float16"]),
            Grid(["ncf4"], [32], [4096], ["bfloat16"]),
            Grid(["pairs22"], [32], [4096], ["bfloat16"]),
            Grid(["powerset6"], [16, 64], [65536], ["float32"]),
            Grid(["ncf4"], [64], [65536], ["float32"]),
            Grid(["powerset8"], [32], [65536], ["bfloat16"]),
            Grid(["ncf4", "powerset4"], [32], [256], ["bfloat16"]),
            Grid(["powerset6", "toy3"], [16], [256], ["float32"]),
            Grid(["powerset6"], [16], [1048576], ["bfloat16"]),
        ],
        rounds=4,
        budget=0.2,
        slow=4.0,
        without=("ours, triton", "ours, torch"),  # "ours" chooses triton; torch is a fallback
    ),
    # For a GPU, every shape: an hour or more.
    "gpu": Suite(
        [Grid(list(FAMILIES), [16, 32, 64, 128], [256, 4096, 65536, 1048576], tuple(DTYPES))],
        rounds=7,
        budget=1.0,
    ),
}
