"""Best rivals, floors, means, losses: from results made by hand."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench.cases import Case
from bench.counts import PHASES
from bench.layers.ratios import Time, line_of, lines
from bench.layers.summary import print_summary, summarize
from bench.layers.tables import print_result
from bench.statistics import geometric_mean, quartiles
from tests.bench.handmade import BYTES, FLOPS, document, result

BIG, SMALL = Case("ncf4", 16, 4096), Case("toy3", 16, 256)
TIMES = {
    "ours": 100.0,
    "exact a": 150.0,
    "exact b": 120.0,
    "inexact": 80.0,
    "floor gemm": 40.0,
    "floor copy": 50.0,
}


def text_of(printed: object) -> str:
    console = Console(width=200, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        printed(console)  # type: ignore[operator]
    return capture.get()


def test_a_line() -> None:
    line = line_of(result(BIG, TIMES), "step")
    assert line is not None
    assert (line.best.name, line.any.name, line.floor.name) == ("exact b", "inexact", "floor copy")
    assert line.speedup == pytest.approx(1.2)
    assert line.speedup_any == pytest.approx(0.8)
    assert line.over_floor == pytest.approx(2)
    assert line.gflops == pytest.approx(FLOPS / 100e-6 / 1e9)
    assert line.gbs == pytest.approx(BYTES / 100e-6 / 1e9)
    assert line.intensity == FLOPS / BYTES
    assert line.ours == Time("ours", 100.0, 98.0, 102.0)
    assert (line.flops, line.bytes, line.mode) == (FLOPS, BYTES, "hot")


def test_a_phase_that_was_not_measured() -> None:
    made = result(BIG, TIMES)
    del made["contenders"]["exact b"]["phases"]["backward"]
    assert line_of(made, "backward").best.name == "exact a"
    made["contenders"]["ours"] = {"unavailable": "broken", "exact": True, "floor": False}
    assert lines(made) == []
    alone = line_of(result(BIG, {"ours": 1.0}), "step")
    assert (alone.speedup, alone.speedup_any, alone.over_floor) == (None, None, None)


def test_quartiles_of_samples_that_lie_askew() -> None:
    assert quartiles([100.0, 1.0, 8.0, 2.0, 4.0]) == (2, 4, 8)
    assert quartiles([10.0, 1.0, 4.0, 2.0]) == (1.75, 3, 5.5)
    assert quartiles([7.0]) == (7, 7, 7)


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2)
    assert geometric_mean([]) is None


def test_summary() -> None:
    losing = result(Case("ncf4", 32, 4096), TIMES | {"ours": 480.0})
    lost_small = result(SMALL, TIMES | {"ours": 240.0})
    broken = result(Case("chain16", 16, 4096), TIMES)
    broken["contenders"]["ours"] = {"unavailable": "no kernel", "exact": True, "floor": False}
    summary = summarize([result(BIG, TIMES), losing, lost_small, broken])
    assert [mean["phase"] for mean in summary["means"]] == list(PHASES)
    for mean in summary["means"]:
        assert mean["cases"] == 2  # the small batch is in no mean
        assert mean["speedup"] == pytest.approx((1.2 * 0.25) ** 0.5)
        assert mean["speedup_any"] == pytest.approx((0.8 * 80 / 480) ** 0.5)
        assert mean["over_floor"] == pytest.approx((2 * 9.6) ** 0.5)
    assert summary["compared"] == 9
    assert [loss["speedup"] for loss in summary["losses"]] == pytest.approx([0.25] * 3 + [0.5] * 3)
    assert {loss["rival"] for loss in summary["losses"]} == {"exact b"}
    assert summary["worst"]["step"][0]["case"] == "ncf4 d=32 B=4096 float32"
    assert summary["failed"] == {"chain16 d=16 B=4096 float32": "no kernel"}
    printed = text_of(lambda console: print_summary(summary, console))
    assert "Losses: 6 of 9" in printed
    assert "ours did not run: chain16 d=16 B=4096 float32: no kernel" in printed


def test_no_loss_is_printed() -> None:
    summary = summarize(document(result(BIG, TIMES))["results"])
    assert summary["losses"] == []
    assert "No loss in 3 comparisons" in text_of(lambda console: print_summary(summary, console))


def test_the_table_holds_all_contenders() -> None:
    made = result(BIG, TIMES)
    made["contenders"]["exact a"]["phases"]["step"] = {
        **made["contenders"]["exact a"]["phases"]["step"],
        "fewer": "31x slower than the best in the warm-up",
    }
    made["contenders"]["gone"] = {
        "unavailable": "ImportError: no module [named gone]",
        "exact": True,
        "floor": False,
        "note": "",
    }
    printed = text_of(lambda console: print_result(made, console))
    for word in ("1.20 (exact b)", "0.80 (inexact)", "2.00 (floor copy)", "40.0", *TIMES):
        assert word in printed
    assert "gone: not measured: ImportError: no module [named gone]" in printed
    assert "step: few samples, 31x slower" in printed
