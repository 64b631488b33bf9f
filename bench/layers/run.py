"""A run: every case of a suite, each written to the file as soon as it is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.cases import DTYPES, Case
from bench.contender import Contender, Unavailable
from bench.device import is_lost
from bench.layers import results
from bench.layers.harness import measure
from bench.layers.limits import Settings
from bench.layers.summary import summarize
from bench.layers.tables import print_result
from bench.peak_rates import PeakRates, measure_peak_rates
from bench.precision import products
from maskmoe_kernels.experiments.shared.output import print_line


@dataclass(frozen=True)
class Run:
    """Measures cases into a document.

    Attributes:
        settings: How to measure.
        kinds: The contenders.
        document: Of :func:`bench.layers.results.start`; it may hold earlier results.
        path: Where the document is saved, after each case.
        console: Where each case is printed.
    """

    settings: Settings
    kinds: Sequence[type[Contender]]
    document: dict[str, Any]
    path: Path
    console: Console

    def measure(self, cases: Sequence[Case], within: float) -> bool:
        """Measure every case that is not in the document yet.

        Args:
            cases: In this order.
            within: Seconds after which no further case begins.

        Returns:
            Whether the GPU was lost: after an illegal access this process runs no more kernels.
        """
        document, console = self.document, self.console
        done = results.finished(document)
        left = [c for c in cases if c not in done and str(c) not in document["skipped"]]
        if len(left) < len(cases):
            kept = len(cases) - len(left)
            print_line(console, f"{kept} of {len(cases)} cases are done already")
        document["summary"] = summarize(document["results"])
        start = time.perf_counter()
        for k, case in enumerate(left):
            if time.perf_counter() - start > within:
                text = f"{len(left) - k} cases left out: {within:g} s have passed (--within)"
                print_line(console, text, "yellow")
                break
            self._measure(case)
            document["summary"] = summarize(document["results"])
            results.save(self.path, document)
            spent = time.perf_counter() - start
            print_line(console, f"{k + 1} of {len(left)} cases, {spent:.0f} s")
            if is_lost(self.settings.device):
                return True
        return False

    def _measure(self, case: Case) -> None:
        """Add the case to the document, as a result or with the reason why it is skipped."""
        rates = self._peak_rates(case.dtype)
        try:
            result = measure(case, self.settings, rates.gflops, self.kinds)
        except (Unavailable, MemoryError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            if is_lost(self.settings.device):
                reason = f"{results.GPU_LOST} {reason}"
            self.document["skipped"][str(case)] = reason
            print_line(self.console, f"{case}: skipped: {reason}")
        else:
            self.document["results"].append(result)
            print_result(result, self.console)

    def _peak_rates(self, dtype: str) -> PeakRates:
        """Measured before the first case of a dtype."""
        known = self.document["peak_rates"]
        if dtype not in known:
            small = self.document["settings"]["suite"] == "smoke"
            with products(tf32=dtype == "tf32"):
                rates = measure_peak_rates(DTYPES[dtype], self.settings.device, small)
            known[dtype] = asdict(rates)
        return PeakRates(**known[dtype])
