"""Every kernel compiles for every chip within its means: no spills, tensor cores, wide offsets."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.gpu.static import launches, resources, tables

ROOT = Path(__file__).resolve().parents[3]
TABLES = sorted((ROOT / "bench/results/static").glob("kernels-triton*.json"))


#: In them, every kernel is launched.
SOME = ["toy3", "chain16", "powerset4 d=64 B=65536 tf32"]
KERNELS = set(
    "forward backward total reduce_parts form pack transpose "
    "gem selection_forward selection_backward weight_sums".split()
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [("90", SOME), *(pytest.param(a, [], marks=pytest.mark.deep) for a in ("80", "90", "100"))],
    ids=lambda value: value if isinstance(value, str) else "some" if value else "all",
)
def test_compiled_as_in_the_committed_table(architecture, shapes, tmp_path):
    written = tmp_path / "table.json"
    chosen = ["--shapes", *shapes] if shapes else []
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.static", "--arch", architecture,
         *chosen, "--check", *TABLES, "--write", written],
        cwd=ROOT, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(written.read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    hot = [row for row in rows if row["kernel"] in ("forward", "backward")]
    assert {row["arch"] for row in rows} == {f"sm_{architecture}"}
    assert all(row["64-bit products"] for row in hot)
    assert sum(row["async copies"] > 0 for row in hot) > len(hot) / 2


def test_a_kernel_that_breaks_a_rule_is_named():
    good = {"registers": 90, "spilled": 0, "parked": 0, "shared": 1024, "tensor": 8, "wgmma": 8,
            "async copies": 4, "64-bit products": 3}  # fmt: skip
    shape = launches.Shape("toy3", 16, 65536)
    kept = next(k for k in launches.launches(shape) if k.kernel.__name__ == "forward")
    assert resources.broken_rules(kept, good, 90) == []
    for change, message in (
        ({"spilled": 64, "parked": 30}, "spills 64 bytes, 30 accesses a step"),
        ({"shared": 300_000}, "300000 bytes of shared memory, of 232448"),
        ({"tensor": 0}, "no tensor-core instruction"),
        ({"wgmma": 0}, "no wgmma, though its tiles have 64 rows"),
        ({"64-bit products": 0}, "no 64-bit product in its offsets"),
    ):
        assert resources.broken_rules(kept, good | change, 90) == [message]
    # With limited registers, code outside the loop may spill, and the loop a little.
    capped = replace(kept, registers=96)
    assert resources.broken_rules(capped, good | {"spilled": 64, "parked": 2}, 90) == []
    assert resources.broken_rules(capped, good | {"spilled": 64, "parked": 20}, 90)


def test_the_loop_is_found_in_the_disassembly():
    code = """
        /*0000*/                   STL [R1], R2 ;            /* 0x0 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R119], desc[UR22][R16.64], P0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   LDL R3, [R1] ;
        /*0050*/              @P0  BRA 0x10 ;
        /*0060*/                   LDL R3, [R1] ;
        /*0070*/              @P0  BRA 0x60 ;
    """
    assert resources._of_loop(code) == {"parked": 1, "stalls": 1, "barriers": 1}


def test_the_table_of_this_triton_is_compared_with(tmp_path):
    row = {"shape": "s", "kernel": "k", "cut": "c", "arch": "sm_90", "registers": 90, "spilled": 0,
           "parked": 0, "stalls": 0, "barriers": 2, "shared": 1024, "tensor": 8, "wgmma": 8,
           "async copies": 4, "wrong": []}  # fmt: skip
    version = tables.triton.__version__

    def compared(row, **written):
        files = [tmp_path / name for name in written]
        for file, (made_by, rows) in zip(files, written.values(), strict=True):
            file.write_text(json.dumps({"triton": made_by, "rows": rows}))
        known = tables.committed(files)
        return tables.broken(known, [row]) + tables.differences(known, [row])

    more = row | {"registers": 120}
    spills = row | {"wrong": ["spills 32 bytes"]}
    assert compared(row, a=(version, [row])) == []
    assert compared(row, a=("0", [])) == compared(more, a=("0", [row])) == compared(row) == []
    assert compared(row, a=(version, [])) == [
        "s k c sm_90: not in the committed table; write it anew"
    ]
    assert compared(more, a=("0", [more]), b=(version, [row])) == [
        "s k c sm_90: registers 90 -> 120"
    ]
    message = ["s k c sm_90: spills 32 bytes"]
    assert compared(spills) == compared(spills, a=("0", [spills])) == message
    assert compared(spills, a=(version, [row])) == message
    assert compared(spills, a=(version, [row | {"wrong": ["spills 24 bytes"]}])) == message
    assert compared(spills, a=(version, [spills])) == []
