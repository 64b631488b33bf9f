"""What the compiler made of the CUDA kernels, read off the built extension without a GPU."""

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import maskmoe_kernels
from maskmoe_kernels.ops import native

LIBRARY = Path(maskmoe_kernels.__file__).parent / "_C.abi3.so"
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"

pytestmark = pytest.mark.skipif(
    native.CUDA_UNSUPPORTED_REASON is not None, reason=f"{native.CUDA_UNSUPPORTED_REASON}"
)

#: Number type as the kernels' names have it, and the matrix instruction it has to come down to.
TYPES = {
    "If": "HMMA.1688.F32.TF32",
    "4Tf32": "HMMA.1688.F32.TF32",
    "8Bfloat16": "HMMA.16816.F32.BF16",
    "7Float16": "HMMA.16816.F32",
}
CHIPS = ["sm_80", "sm_90a"]
REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # of a block
WIDE = ("If", "4Tf32")  # float32 in memory
RESIDENT = {phase: dict.fromkeys(TYPES, 2) for phase in ("Forward", "Mix", "Backward")}


@functools.cache
def dumped(option):
    """What cuobjdump says of the library, by chip."""
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")) is not None:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        tool = str(bundled) if bundled.exists() else None
    if tool is None:
        pytest.skip("no cuobjdump to look at machine code with")
    text = subprocess.run([tool, option, str(LIBRARY)], capture_output=True, text=True, check=True)
    found = dict.fromkeys(CHIPS, "")
    for part in text.stdout.split("Fatbin elf code:")[1:]:
        chip = re.search(r"arch = (\w+)", part)[1]
        if chip in found:  # CUDA's own runtime is there for others, too
            found[chip] += part
    return found


def resources(kind, chip):
    """Registers and bytes of local memory of each kernel, by its mangled name."""
    listed = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        dumped("--dump-resource-usage")[chip],
    )
    return {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in listed
        if kind in name
    }


def instructions(kind, chip):
    """The machine instructions of each kernel."""
    parts = dumped("-sass")[chip].split("Function :")[1:]
    named = {part.split("\n", 1)[0].strip(): part for part in parts}
    return {
        name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)", part)
        for name, part in named.items()
        if kind in name
    }


def computes_tiles(name):
    """Is it a kernel that takes tiles of rows through the layers?"""
    return any(phase in name for phase in RESIDENT)


@pytest.mark.parametrize("chip", CHIPS)
def test_registers_suffice(chip):
    """Nothing is spilled, and as many blocks fit a processor as the kernel asks for."""
    for kind in TYPES:
        kernels = resources(kind, chip)
        assert len([name for name in kernels if computes_tiles(name)]) == 2 * len(RESIDENT)
        for name, (registers, local) in kernels.items():
            assert local == 0, name
            for resident in (RESIDENT[phase][kind] for phase in RESIDENT if phase in name):
                assert -(-registers // 8) * 8 * THREADS * resident <= REGISTERS, name


def test_machine_code():
    """Matrix instructions; weights in words of 16 bytes; no local memory and no atomics."""
    # One test: to disassemble is what takes the time.
    products = {}
    for kind, chip in itertools.product(TYPES, CHIPS):
        kernels = instructions(kind, chip)
        assert len(kernels) > 4
        for name, code in kernels.items():
            products[chip, name] = sum(word.startswith("HMMA") for word in code)
            kinds = {word.rstrip(";") for word in code}
            assert code, name
            used = [w for w in kinds if w.startswith(("ATOM", "RED", "LDL", "STL"))]
            assert not used, name
            if computes_tiles(name):
                check_products(kind, name, kinds)
    for chip, name in [key for key in products if "4Tf32ELi32E" in key[1]]:
        # float32 multiplies high and low parts where Tf32 multiplies once. (Of high tiles, whose
        # loops are not unrolled.)
        whole = products[chip, name.replace("INS0_4Tf32E", "If")]
        assert whole == 3 * products[chip, name] > 0, name


def check_products(kind, name, kinds):
    assert TYPES[kind] in kinds, name
    assert any(word.startswith("LDG.E.128") for word in kinds), name
    if kind not in WIDE:
        assert any(word.startswith("LDSM.16.M88.4") for word in kinds), name
        transposed = any("LDSM.16.MT88.4" in word for word in kinds)
        assert transposed == ("Backward" in name), name


@pytest.mark.skipif(not SOURCES.is_dir(), reason="the suite runs against an installed wheel")
def test_one_place_sets_attributes_of_kernels():
    """The function that ``raise_shared_memory_limit`` calls once for each kernel and device."""
    texts = [path.read_text() for path in SOURCES.rglob("*") if path.is_file()]
    assert sum(text.count("cudaFuncSetAttribute(") for text in texts) == 1
    calls = sum(text.count("set_shared_memory_limit<") for text in texts)
    assert calls == 1
