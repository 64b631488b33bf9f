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

# Of the largest tile of each instruction set: what multiplies, and how often in a step: by each row
# and vector of lanes. A step loads each row's input once.
PRODUCTS = {
    ("avx2", "avx2::Isa"): ("vfmadd", 6, 2),
    ("avx512", "avx512::Isa"): ("vfmadd", 14, 2),
    ("avx512bf16", "avx512bf16::Pairs"): ("vdpbf16ps", 14, 2),
}
SUMS = {
    ("avx2", "avx2::Isa"): ("vfmadd", 4, 2),
    ("avx512", "avx512::Isa"): ("vfmadd", 8, 2),
    ("avx512bf16", "avx512bf16::Pairs"): ("vdpbf16ps", 8, 2),
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


def check_loop(name, multiply, products, loads):
    """One loop has all of them, and nothing else on vectors: no sum is ever put on the stack."""
    found = [body for body in loops(name) if sum(multiply in line for line in body) == products]
    assert found, name
    for body in found:
        vectors = [line for line in body if re.search(r"%[xyz]mm", line)]
        assert sum("vbroadcastss" in line for line in vectors) == loads
        assert not any(re.search(r"%r[sb]p", line) for line in vectors)
        assert len(vectors) <= products + loads + 8  # the weights, and a few moves


@pytest.mark.parametrize("of", PRODUCTS, ids=lambda of: of[0])
def test_a_step_of_the_product_is_its_multiplications(of):
    isa, policy = of
    if isa not in BUILT:
        pytest.skip(f"not built for {isa}")
    multiply, rows, vectors = PRODUCTS[of]
    name = f"maskmoe::PanelProduct<maskmoe::{policy}>::product<{rows}, {vectors}, false>"
    check_loop(name, multiply, rows * vectors, rows)


@pytest.mark.parametrize("of", SUMS, ids=lambda of: of[0])
def test_a_step_of_the_sums_is_its_multiplications(of):
    isa, policy = of
    if isa not in BUILT:
        pytest.skip(f"not built for {isa}")
    multiply, inputs, vectors = SUMS[of]
    name = f"maskmoe::WeightSums<maskmoe::{policy}>::outer<{inputs}, {vectors}>"
    check_loop(name, multiply, 2 * inputs * vectors, 2 * inputs)  # two rows, or pairs, at a time


@pytest.mark.skipif("avx2" not in BUILT, reason="not built for avx2")
def test_kernels_of_avx2_have_no_wider_instruction():
    """Such an instruction would end the process on most processors."""
    names = [name for name in symbols() if "<maskmoe::avx2::Isa>" in name]
    assert len(names) > 50
    for name in names:
        assert not [text for _, text in instructions(name) if re.search(r"%zmm|%k[1-7]", text)]
