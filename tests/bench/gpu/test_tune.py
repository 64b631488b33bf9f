"""Tuning without a GPU: the grid, records from Triton's interpreter, what is put back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import tune as gpu_tune
from bench.gpu.log import read
from bench.gpu.tune import FIRST, OWN, WIDE, chosen_by, grid, measure, parse_case, told, ways
from bench.shapes import Case
from maskmoe_kernels.ops import triton_support as triton
from maskmoe_kernels.ops.masked_linear.triton import tune
from maskmoe_kernels.ops.masked_linear.triton.configs import Config

MODEL, OTHER = Config(64, 32, 32, 7, 4, 3), Config(32, 16, 16, 7, 4, 2)
CASE = Case("toy3", 8, 16, "float32")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or triton.unsupported_reason(torch.device("cpu")) is not None,
    reason="needs Triton's interpreter",
)


def record(us: float | None, own: bool, rows: int = 64) -> dict[str, Any]:
    config = {"rows": rows, "lanes": 32}
    made: dict[str, Any] = {"own": own, "config": [config]}
    return made | ({"error": "too large"} if us is None else {"us": us})


def test_the_grid_is_the_librarys_options_and_more() -> None:
    own = [MODEL, OTHER]
    assert ways(own, FIRST) == [MODEL]
    assert ways(own, OWN) == own
    wide = ways(own, WIDE)
    assert wide[:2] == own
    assert len(wide) == len(set(wide)) == len([*grid()]) + 1  # the model's choice is in the grid
    assert {way.parts for way in wide} == {7}
    # 64 accumulators a thread at most in 4 warps, as in 8.
    assert all(way.rows * way.lanes <= 64 * 32 * way.warps for way in wide)


def test_pairs_cut_the_columns_alike() -> None:
    wide = ways([(OTHER, MODEL)], WIDE)
    assert wide[0] == (OTHER, MODEL)
    for first, second in wide[1:]:
        assert (first.lanes, first.depth) == (second.lanes, second.depth)
        assert (first.rows, first.parts) == (OTHER.rows, OTHER.parts)
    assert gpu_tune.described(wide[0])[1]["warps"] == 4


def test_the_choice_is_put_back_whatever_happens() -> None:
    before = tune.choose
    for error in (RuntimeError, KeyboardInterrupt):

        def failing(choose: Any, error: type[BaseException] = error) -> None:
            with chosen_by(choose):
                assert tune.choose is choose
                raise error

        with pytest.raises(error):
            failing(lambda *_: None)
        assert tune.choose is before


@interpreted
@pytest.mark.parametrize(("part", "kinds"), [("forward", 1), ("w", 1)])
def test_a_record_for_each_way(part: str, kinds: int) -> None:
    """A way that does not fit leaves its reason, and the next one is measured."""
    before, calls = tune.choose, []

    def timer(run: Any) -> dict[str, float]:
        calls.append(run)
        if len(calls) == 1:
            raise RuntimeError("out of\nresources")
        run()
        return {"us": float(len(calls))}

    found = [*measure(CASE, part, OWN, timer, "cpu")]
    assert len(found) == len(calls) >= kinds
    assert found[0]["error"] == "out of resources"
    assert "us" not in found[0]
    assert [r["us"] for r in found[1:]] == [float(k) for k in range(2, len(calls) + 1)]
    assert {(r["case"], r["part"], r["own"]) for r in found} == {(str(CASE), part, True)}
    assert tune.choose is before


@interpreted
def test_the_choice_is_put_back_when_the_launch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tune.choose

    def forward(*_: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(gpu_tune.launch, "forward", forward)
    with pytest.raises(RuntimeError, match="no launch"):
        next(measure(CASE, "forward", OWN, gpu_tune.once, "cpu"))
    assert tune.choose is before


def test_the_line_of_a_part() -> None:
    found = [
        record(30.0, True),
        record(20.5, True, 128),
        record(10.0, False, 16),
        record(None, False),
    ]
    line = "model 30.0 us | own best 20.5 us (128x32) | best of 4 10.0 us (16x32)"
    assert told(found) == line
    assert told([record(None, True), record(5.0, False)]) == (
        "model does not run | no own runs | best of 2 5.0 us (64x32)"
    )
    assert told([record(None, True)]) == "1 ways, none timed"


def test_cases_by_name() -> None:
    assert parse_case("ncf4:64:65536:bfloat16") == Case("ncf4", 64, 65536, "bfloat16")
    for text in ("ncf4", "none:8:8:float32", "ncf4:0:8:float32", "ncf4:8:float32", "ncf4:8:8:int8"):
        with pytest.raises(argparse.ArgumentTypeError, match="FAMILY:D:B:DTYPE"):
            parse_case(text)


@interpreted
def test_the_command_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/ways.jsonl"
    words = ["toy3:8:16:float32", "--ways", "first", "--device", "cpu", "--out", str(out)]
    assert gpu_tune.main([*words, "--parts", "forward"]) == 0
    assert "toy3 d=8 B=16 float32, forward: model " in capsys.readouterr().out
    assert gpu_tune.main([*words, "--parts", "forward", "x"]) == 0
    assert [r["part"] for r in read(out)] == ["forward", "x"]
    if not torch.cuda.is_available():
        assert gpu_tune.main([words[0], "--out", str(out)]) == 1
        assert "--device cuda cannot be used here" in capsys.readouterr().out
