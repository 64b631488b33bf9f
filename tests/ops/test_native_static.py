"""What the compiler made of the C++ kernels, read off the built extension: on any processor."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import maskmoe_kernels

FOLDER = Path(maskmoe_kernels.__file__).parent
LIBRARY, RECORD = FOLDER / "_C.abi3.so", FOLDER / "_build.json"
BUILT = json.loads(RECORD.read_text())["isas"] if RECORD.exists() and LIBRARY.exists() else []

pytestmark = [
    pytest.mark.skipif(not BUILT, reason="there is no extension"),
    pytest.mark.skipif(
        not (shutil.which("objdump") and shutil.which("nm")), reason="no objdump and nm to read it"
    ),
]

# The kernel of the largest tile: what multiplies, how often in the innermost loop, and how many
# inputs that loads. A step of a product has 6 or 14 rows, one of a sum 4 or 8 inputs and two rows
# or pairs of rows, by two vectors of lanes.
STEPS = {
    ("avx2", "PanelProduct<maskmoe::avx2::Isa>::product<6, 2, false>"): ("vfmadd", 12, 6),
    ("avx2", "WeightSums<maskmoe::avx2::Isa>::outer<4, 2>"): ("vfmadd", 16, 8),
    ("avx512", "PanelProduct<maskmoe::avx512::Isa>::product<14, 2, false>"): ("vfmadd", 28, 14),
    ("avx512", "WeightSums<maskmoe::avx512::Isa>::outer<8, 2>"): ("vfmadd", 32, 16),
    ("avx512bf16", "PanelProduct<maskmoe::avx512bf16::Pairs>::product<14, 2, false>"): (
        "vdpbf16ps",
        28,
        14,
    ),
    ("avx512bf16", "WeightSums<maskmoe::avx512bf16::Pairs>::outer<8, 2>"): ("vdpbf16ps", 32, 16),
}


@functools.cache
def symbols():
    """Address and size of every function, by its name without arguments."""
    said = subprocess.run(["nm", "-CS", LIBRARY], capture_output=True, text=True, check=True)
    rows = re.findall(r"^(\w+) (\w+) [tTwW] (?:void )?(.*?)\(", said.stdout, re.M)
    return {name: (int(at, 16), int(size, 16)) for at, size, name in rows}


def instructions(name):
    """The machine code of a function: address and text of each instruction."""
    at, size = symbols()[name]
    command = ["objdump", "-d", "--no-show-raw-insn", f"--start-address={at}"]
    command += [f"--stop-address={at + size}", LIBRARY]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [
        (int(address, 16), text.strip())
        for address, text in re.findall(r"^ +([0-9a-f]+):\t(.*)$", said, re.M)
    ]


def loops(name):
    """The innermost loops of a function: from a jump's target back to the jump."""
    code = instructions(name)
    index = {address: k for k, (address, _) in enumerate(code)}
    for k, (address, text) in enumerate(code):
        jump = re.match(r"j\w+ +([0-9a-f]+)", text)
        start = index.get(int(jump[1], 16)) if jump else None
        if start is None or int(jump[1], 16) > address:
            continue
        body = [line for _, line in code[start:k]]
        if not any(re.match(r"j\w+ ", line) for line in body):
            yield body


@pytest.mark.parametrize("kernel", STEPS, ids=lambda kernel: kernel[1])
def test_a_step_is_its_multiplications(kernel):
    """One loop has them all, and little else on vectors: no sum is ever put on the stack."""
    isa, name = kernel
    if isa not in BUILT:
        pytest.skip(f"not built for {isa}")
    multiply, products, loads = STEPS[kernel]
    found = [
        body
        for body in loops(f"maskmoe::{name}")
        if sum(multiply in line for line in body) == products
    ]
    assert found
    for body in found:
        vectors = [line for line in body if re.search(r"%[xyz]mm", line)]
        assert sum("vbroadcastss" in line for line in vectors) == loads
        assert not any(re.search(r"%r[sb]p", line) for line in vectors)
        assert len(vectors) <= products + loads + 8  # the weights, and a few moves


@pytest.mark.skipif("avx2" not in BUILT, reason="not built for avx2")
def test_kernels_of_avx2_have_no_wider_instruction():
    """Such an instruction would end the process on most processors."""
    names = [name for name in symbols() if "<maskmoe::avx2::Isa>" in name]
    assert len(names) > 50
    for name in names:
        assert not [text for _, text in instructions(name) if re.search(r"%zmm|%k[1-7]", text)]
