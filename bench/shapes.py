"""What is measured: families of experts, cases, and the suites made of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maskmoe_kernels.layout.families import FAMILIES

#: 3 to 16 experts.
SMALL = ("toy3", "ncf4", "spotify8", "chain16", "powerset4")
#: "tf32" is float32 whose products may round their factors to ten bits.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Those that are measured on a CPU, too.
EVERYWHERE = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One hidden layer: a family, d units per expert, B rows, the name of a dtype."""

    family: str
    width: int
    batch: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.family} d={self.width} B={self.batch} {self.dtype}"


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
    """Cases and how long to stay with each.

    Attributes:
        grids: What is measured.
        rounds: Least rounds a case.
        budget: Seconds a case may go on beyond its least rounds.
        longest: Seconds; what would take longer at the measured GEMM rate is left out.
        slow: This many times slower than the best: two samples are enough.
        without: Contenders that it leaves out.
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
        """All cases, each filter taking the place of the suite's own values."""
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
    # Does everything run? One case has the batch from which a summary is made.
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
            # So many rows take long and move the same bytes a row: a few shapes are enough.
            Grid(SMALL, [16], [65536]),
            Grid(["toy3", "ncf4"], [64], [65536]),
        ],
        rounds=4,
        budget=3.0,
    ),
    # A GPU: by priority, for a run that is cut off. Ten cases took two minutes on an H200.
    "gpu-quick": Suite(
        [
            Grid(["powerset6"], [16, 64], [65536], ["bfloat16"]),
            Grid(["ncf4"], [16, 64, 128], [65536], ["bfloat16"]),
            Grid(["chain16"], [64], [65536], ["bfloat16"]),
            Grid(["pairs22"], [16], [65536], ["bfloat16"]),
            Grid(["powerset4"], [32, 128], [65536], ["bfloat16"]),
            Grid(["powerset8", "spotify8"], [32], [65536], ["bfloat16"]),
            Grid(["toy3"], [64], [65536], ["bfloat16"]),
            Grid(["ncf4", "powerset4"], [32], [256], ["bfloat16"]),
            Grid(["powerset6"], [16], [65536], ["float32", "tf32"]),
            Grid(["ncf4"], [64], [65536], ["float32", "tf32"]),
            Grid(["ncf4"], [32], [4096], ["bfloat16"]),
            Grid(["powerset6"], [32], [65536], ["float16"]),
            Grid(["powerset6"], [64], [65536], ["float32", "tf32"]),
            Grid(["pairs22"], [32], [4096], ["bfloat16"]),
            Grid(["ncf4", "powerset6"], [16], [1048576], ["bfloat16"]),
            Grid(["powerset6", "toy3"], [16], [256], ["float32"]),
        ],
        rounds=4,
        budget=0.2,
        slow=4.0,
        without=("ours, triton", "ours, torch"),  # ours is the former, the latter a fallback
    ),
    # A GPU, everything: an hour or more.
    "gpu": Suite(
        [Grid(list(FAMILIES), [16, 32, 64, 128], [256, 4096, 65536, 1048576], tuple(DTYPES))],
        rounds=7,
        budget=1.0,
    ),
}
