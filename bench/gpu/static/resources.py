"""What a compiled kernel uses: registers, shared memory, spills and instructions; and the rules."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from bench.gpu.static.launches import Launch

ARCHITECTURES = (80, 90, 100)
#: Shared memory of a thread block at most, in bytes (CUDA's table of compute capabilities).
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
#: Bytes that a thread may spill: a value or two, parked in memory across the loop. Where registers
#: are limited, a step of the loop may have half as many accesses.
PARKED = 16
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_WIDE = re.compile(r"mul\.lo\.s64|mul\.wide\.s32|mad\.lo\.s64|mad\.wide\.s32")


def resources(compiled: Any) -> dict[str, Any]:
    """Resources and instructions of a compiled kernel."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        code = subprocess.run(
            [_CUOBJDUMP, "--dump-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no registers: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spilled": stack + local,
        **_of_loop(code),
        "shared": compiled.metadata.shared,
        "tensor": len(_TENSOR_CORES.findall(ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "async copies": ptx.count("cp.async.c") + ptx.count("cp.async.bulk.tensor"),
        "64-bit products": len(_WIDE.findall(ptx)),
    }


def _of_loop(code: str) -> dict[str, int]:
    """Count instructions of a step of the loop with loads in flight; without a loop, of all code.

    ``parked`` are accesses to spilled values, ``stalls`` are waits for all products of a step, and
    ``barriers`` are those of the thread block.
    """
    lines = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    bodies = []
    for at, text in lines:
        back = _BRANCH.search(text)
        if back is not None and int(back[1], 16) < at:
            body = [other for k, other in lines if int(back[1], 16) <= k <= at]
            if any("LDGSTS" in other or "UTMALDG" in other for other in body):
                bodies.append(body)
    body = min(bodies, key=len, default=[text for _, text in lines])

    def times(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in body)

    return {
        "parked": times(r"\b(LDL|STL)\b"),
        "stalls": times(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0"),
        "barriers": times(r"\bBAR\.SYNC"),
    }


def broken_rules(launch: Launch, found: dict[str, Any], architecture: int) -> list[str]:
    """The rules that the kernel breaks, in words."""
    constants = dict(launch.constants)
    wrong = []
    # With limited registers, the code that repairs rows may spill: it runs rarely.
    if found["spilled"] > PARKED and (launch.registers is None or found["parked"] > PARKED // 2):
        wrong.append(f"spills {found['spilled']} bytes, {found['parked']} accesses a step")
    if found["shared"] > SHARED[architecture]:
        wrong.append(f"{found['shared']} bytes of shared memory, of {SHARED[architecture]}")
    if launch.kernel.__name__ not in ("forward", "backward"):
        return wrong
    if not found["64-bit products"]:
        wrong.append("no 64-bit product in its offsets")
    exact = constants["PRECISION"] == "ieee" and dict(launch.signature)["x"] == "*fp32"
    if not exact and not found["tensor"]:
        wrong.append("no tensor-core instruction")
    tall = constants.get("M", constants.get("XM", 0)) >= 64
    if architecture == 90 and tall and not exact and not found["wgmma"]:
        wrong.append("no wgmma, though its tiles have 64 rows")
    return wrong
