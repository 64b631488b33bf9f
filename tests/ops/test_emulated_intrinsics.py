"""Emulated AVX-512 intrinsics against their definitions in Intel's manual, and the processor's.

``intrinsics.cpp`` is compiled with ``csrc/cpu/emulated_intrinsics.h``; where the processor has the
instructions, again with those: both must give the same bits. Of a NaN that arithmetic gives, only
that it is one; of dot products of bfloat16, the same to rounding.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parent / "intrinsics.cpp"
CSRC = SOURCE.parents[2] / "csrc"
AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl")
NAN = 0x7FC00000
INDEFINITE = 0xFFC00000  # what invalid operations give
MINIMUM = 2.0**-126

SPECIAL = np.array(
    [
        *(0x00000000, 0x00000001, 0x00400000, 0x007FFFFF, 0x00800000),  # denormals; 2^-126
        *(0x33000000, 0x33000001, 0x387FFFFF, 0x38800000, 0x477FEFFF, 0x477FF000),  # fp16's ends
        *(0x3EFFFFFF, 0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x40200000, 0x40600000),
        *(0x4EFFFFFF, 0x4F000000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF),  # int's, bfloat16's ends
        *(0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF),  # infinity, NaN
        *(0x42FC0000, 0x43150000, 0x43158000, 0x43190000, 0x43990000),  # 126, 149, 149.5, 153, 306
    ],
    np.uint32,
)
SPECIAL = np.concatenate([SPECIAL, SPECIAL | np.uint32(0x80000000)])

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, at NaN and infinity


# --- The program ---------------------------------------------------------------------------------


class Program:
    """The functions of a compiled ``intrinsics.cpp``, on arrays of 32-bit words."""

    def __init__(self, path):
        self.path, self.library = path, ctypes.CDLL(str(path))

    def __call__(self, name, *arrays, k=0):
        """Words that function ``name`` makes of up to three arrays, 16 by 16."""
        count = -(-arrays[0].nbytes // 64)
        given = []
        for array in (*arrays, *arrays[:1] * (3 - len(arrays))):
            padded = np.zeros(count * 64, np.uint8)
            padded[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            given.append(padded)
        to = np.zeros(count * 64, np.uint8)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*given, to)]
        a, b, c, y = pointers
        getattr(self.library, name)(a, b, c, ctypes.c_uint32(k), y, ctypes.c_long(count))
        return to.view(np.uint32).reshape(count, 16)

    def apart(self, call):
        """The exit status of a process that only calls a function: it may be killed."""
        code = f"import ctypes, sys; sys.exit(ctypes.CDLL({str(self.path)!r}).{call})"
        return subprocess.run([sys.executable, "-S", "-c", code], check=False).returncode


def processor_flags():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def compiled(folder, *flags):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not (CSRC / "cpu" / "emulated_intrinsics.h").is_file():
        pytest.skip("needs a C++ compiler and the sources")
    library = folder / "intrinsics.so"
    command = [compiler, "-O2", "-std=c++20", *flags, f"-I{CSRC}", "-shared", "-fPIC"]
    subprocess.run([*command, SOURCE, "-o", library], check=True)
    return Program(library)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    here = {"avx2", "fma", "f16c"} <= processor_flags()
    flags = ["-mavx2", "-mfma", "-mf16c"] if here else []
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    return compiled(tmp_path_factory.mktemp("emulated"), *warnings, "-DMASKMOE_EMULATE", *flags)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    found = processor_flags()
    if not {*AVX512, "fma", "f16c"} <= found:
        pytest.skip("this processor has no AVX-512")
    names = (*AVX512, "fma", "f16c", *(["avx512bf16"] if "avx512_bf16" in found else []))
    folder = tmp_path_factory.mktemp("native")
    return compiled(folder, "-w", *(f"-m{name}" for name in names))  # GCC warns of its own headers


# --- Values --------------------------------------------------------------------------------------


def words(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)


def pairs():
    """Each special value with each, then any bits."""
    a, b = (n.reshape(-1) for n in np.meshgrid(SPECIAL, SPECIAL))
    return np.concatenate([a, words(4096, 1)]), np.concatenate([b, words(4096, 2)])


def floats(bits):
    return bits.astype(np.uint32).view(np.float32)


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


def is_nan(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


def same(ours, expected):
    """Equal bits; NaN where NaN."""
    ours = ours.reshape(-1)[: expected.size]
    wrong = np.flatnonzero(
        (is_nan(ours) != is_nan(expected)) | ~is_nan(expected) & (ours != expected)
    )
    assert wrong.size == 0, [(n, hex(ours[n]), hex(expected[n])) for n in wrong[:5]]


def same_bits(ours, expected):
    expected = np.ascontiguousarray(expected).reshape(-1).view(np.uint32)
    ours = ours.reshape(-1)[: expected.size]
    wrong = np.flatnonzero(ours != expected)
    assert wrong.size == 0, [(n, hex(ours[n]), hex(expected[n])) for n in wrong[:5]]


def lower(words):
    """The 16-bit values that a function left in the lower halves of its vectors."""
    return words.view(np.uint16).reshape(-1, 32)[:, :16].reshape(-1)


def in_lower(values):
    """16-bit values, 16 to a vector."""
    values = values.reshape(-1, 16)
    return np.concatenate([values, np.zeros_like(values)], 1)


def nearest(value):
    """A fraction as float32: to nearest, ties to even."""
    if value == 0:
        return 0.0
    size, sign = abs(value), -1 if value < 0 else 1
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(size / unit) * unit  # Python rounds ties to even
    return sign * (float("inf") if rounded >= 2**128 else float(rounded))


def exact_fma(x, y, z):
    """x y + z as float32, rounded once."""
    x, y, z = map(float, (x, y, z))
    if not np.isfinite([x, y, z]).all():
        return float(np.float64(x) * np.float64(y) + np.float64(z))  # float64 does not overflow
    total = Fraction(x) * Fraction(y) + Fraction(z)
    return nearest(total) if total else x * y + z  # signs of zeros


def flushed(values):
    """As float32, without denormals."""
    single = np.asarray(values, np.float32)
    return np.where(np.abs(single) < MINIMUM, np.copysign(np.float32(0), single), single)


# --- Arithmetic ----------------------------------------------------------------------------------


def test_the_four_operations_and_roots(emulated):
    a, b = pairs()
    x, y = floats(a), floats(b)
    for name, expected in (("add", x + y), ("sub", x - y), ("mul", x * y), ("divide", x / y)):
        same(emulated(name, a, b), bits(expected))
    same(emulated("root", a, b), bits(np.sqrt(x)))


def test_min_and_max_give_the_second_where_neither_is_less(emulated):
    a, b = pairs()
    x, y = floats(a), floats(b)
    same_bits(emulated("min", a, b), np.where(x < y, a, b))
    same_bits(emulated("max", a, b), np.where(x > y, a, b))
    first = np.array([0, 0x80000000, NAN, 0], np.uint32)
    second = np.array([0x80000000, 0, 0, NAN], np.uint32)
    for name in ("min", "max"):
        same_bits(emulated(name, first, second), second)


def test_products_and_sums_are_rounded_once(emulated):
    random = np.random.default_rng(3)
    a, b, c = (bits(random.normal(size=2000) * 2.0 ** random.integers(-70, 70)) for _ in range(3))
    # Close to the negated product: what is left of it is what one rounding leaves.
    c[:500] = bits(-floats(a[:500]) * floats(b[:500]))
    a, b, c = (np.concatenate([n, np.resize(s, 2000)]) for n, s in zip(
        (a, b, c), (SPECIAL, SPECIAL[::-1], np.roll(SPECIAL, 7)), strict=True
    ))  # fmt: skip
    expected = bits([exact_fma(*at) for at in zip(floats(a), floats(b), floats(c), strict=True)])
    same(emulated("fmadd", a, b, c), expected)
    for k in (0, 0xFFFF, 0x8001, 0x5AF0):
        seen = np.resize(k >> np.arange(16) & 1, a.size).astype(bool)
        ours = emulated("mask3_fmadd", a, b, c, k=k).reshape(-1)[: a.size]
        same(ours[seen], expected[seen])
        assert np.array_equal(ours[~seen], c[~seen])


@pytest.mark.parametrize("condition", range(32))
def test_comparisons(emulated, condition):
    a, b = pairs()
    x, y = floats(a), floats(b)
    less, equal, greater, unordered = x < y, x == y, x > y, np.isnan(x) | np.isnan(y)
    true = [
        equal, less, less | equal, unordered,
        ~equal, equal | greater | unordered, greater | unordered, ~unordered,
        equal | unordered, less | unordered, less | equal | unordered, less & unordered,
        less | greater, equal | greater, greater, equal | ~equal,
    ][condition % 16]  # fmt: skip
    expected = (true[: a.size // 16 * 16].reshape(-1, 16) << np.arange(16)).sum(1)
    ours = emulated("cmp", a, b, k=condition)[: len(expected), 0]
    assert np.array_equal(ours, expected)


def test_integers_wrap_and_shift(emulated):
    a, b = words(800, 4), words(800, 5)
    same_bits(emulated("add_epi32", a, b), a + b)
    for name, of in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        same_bits(emulated(f"bits_{name}", a, b), of)
    for k in (0, 1, 16, 31, 32, 33, 255):
        same_bits(emulated("left", a, k=k), a << np.uint32(k) if k < 32 else a * 0)
        same_bits(emulated("right", a, k=k), a >> np.uint32(k) if k < 32 else a * 0)


# --- Places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 32, 64])
def test_unpacking_interleaves_halves_of_128_bits(emulated, width):
    a, b = words(160, 6), words(160, 7)
    each = 128 // width
    x, y = (n.view(f"u{width // 8}").reshape(-1, each) for n in (a, b))
    for name, half in (("lo", slice(each // 2)), ("hi", slice(each // 2, None))):
        expected = np.stack([x[:, half], y[:, half]], -1)
        same_bits(emulated(f"unpack{name}{width}", a, b), expected)


def test_shuffles_and_permutations(emulated):
    a, b, c = words(160, 8), words(160, 9), words(160, 10)
    x, y = a.reshape(-1, 4, 4), b.reshape(-1, 4, 4)
    for which in range(256):
        low, high = [which & 3, which >> 2 & 3], [which >> 4 & 3, which >> 6]
        expected = np.concatenate([x[:, low], y[:, high]], 1)
        same_bits(emulated("shuffle_i32x4", a, b, k=which), expected)
    x, y, z = (n.view(np.uint16).reshape(-1, 32) for n in (a, b, c))
    same_bits(emulated("permutexvar", a, b), np.take_along_axis(x, y & np.uint16(31), 1))
    both = np.concatenate([x, z], 1)
    same_bits(emulated("permutex2var", a, b, c), np.take_along_axis(both, y & np.uint16(63), 1))


def test_halves_masks_and_one_value_everywhere(emulated):
    a, b = words(160, 11), words(160, 12)
    x, y = a.reshape(-1, 16), b.reshape(-1, 16)
    same_bits(emulated("insert0", a, b), np.concatenate([x[:, :8], y[:, 8:]], 1))
    same_bits(emulated("insert1", a, b), np.concatenate([y[:, :8], x[:, :8]], 1))
    zeros = np.zeros_like(x[:, :8])
    same_bits(emulated("extract0", a), np.concatenate([x[:, :8], zeros], 1))
    same_bits(emulated("extract1", a), np.concatenate([x[:, 8:], zeros], 1))
    same_bits(emulated("extended", a), np.concatenate([x[:, :8], zeros], 1))
    for k in (0, 1, 0x8000, 0xFFFF, 0x5AF0C3A5):
        words_of, halves_of = (k >> np.arange(n) & 1 for n in (16, 32))
        same_bits(emulated("blend", a, b, k=k), np.where(words_of, y, x))
        same_bits(emulated("move", a, b, k=k), np.where(words_of, y, x))
        of = [n.view(np.uint16).reshape(-1, 32) for n in (b, a)]
        same_bits(emulated("blend_epi16", a, b, k=k), np.where(halves_of, *of))
    same_bits(emulated("set1", a), np.repeat(x[:, 5], 16))
    same_bits(emulated("set1_epi32", a), np.repeat(x[:, 5], 16))
    same_bits(emulated("set1_epi16", a), np.repeat(a.view(np.uint16).reshape(-1, 32)[:, 5], 32))
    same_bits(emulated("setr", a[:16]), bits(np.arange(1, 17)))


# --- Conversions ---------------------------------------------------------------------------------


def around(patterns):
    """float32 bits: values of a narrower type, the middles between them, and their neighbours."""
    ends = floats(patterns)
    middles = bits((ends[1:].astype(np.float64) + ends[:-1]) / 2)
    values = np.concatenate([patterns, middles])
    values = np.concatenate([values, values + 1, values - 1, words(2**16, 13), SPECIAL])
    return np.concatenate([values, values ^ np.uint32(0x80000000)]).astype(np.uint32)


def test_every_float16(emulated):
    patterns = np.arange(2**16, dtype=np.uint16)
    wide = bits(patterns.view(np.float16).astype(np.float32))
    payload = (patterns.astype(np.uint32) & 0x3FF) << 13 | (patterns & np.uint32(0x8000)) << 16
    nan = np.isnan(patterns.view(np.float16))
    same_bits(emulated("from_fp16", in_lower(patterns)), np.where(nan, payload | NAN, wide))


def test_floats_to_float16(emulated):
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    a = around(bits(finite.astype(np.float32)))
    expected = floats(a).astype(np.float16).view(np.uint16)
    quiet = a >> 16 & 0x8000 | 0x7E00 | a >> 13 & 0x3FF
    expected = np.where(is_nan(a), quiet, expected).astype(np.uint16)
    assert np.array_equal(lower(emulated("to_fp16", a))[: a.size], expected)


def bfloat16_of(a):
    """float32 bits to bfloat16 by integers of Python's size: half of the last place, to even."""
    a = a.astype(np.int64)
    size, sign = a & 0x7FFFFFFF, a >> 31 << 15
    kept, rest = size >> 16, size & 0xFFFF
    rounded = kept + ((rest > 0x8000) | (rest == 0x8000) & (kept % 2 == 1))
    rounded = np.where(size < 0x800000, 0, rounded)  # denormals
    return (sign | np.where(size > 0x7F800000, kept | 0x40, rounded)).astype(np.uint16)


def test_floats_to_bfloat16(emulated):
    a = around(np.arange(0x7F80, dtype=np.uint32) << 16)
    assert np.array_equal(lower(emulated("to_bf16", a))[: a.size], bfloat16_of(a))
    a = np.resize(a, (a.size // 16, 16))
    b = a[::-1]
    both = np.stack([bfloat16_of(b), bfloat16_of(a)], 1)  # the first in the upper half
    same_bits(emulated("two_to_bf16", a, b), both)


def test_integers_are_narrowed_and_widened(emulated):
    a = words(160, 14)
    wide = np.arange(2**16, dtype=np.uint16)
    same_bits(emulated("from_u16", in_lower(wide)), wide.astype(np.uint32))
    assert np.array_equal(lower(emulated("to_u16", a)), (a & 0xFFFF).astype(np.uint16))


def test_floats_to_integers_go_to_the_even_one(emulated):
    a = np.concatenate([bits(np.arange(-100, 100) / 4), SPECIAL, words(4096, 15)])
    x = floats(a).astype(np.float64)
    fits = (x >= -(2.0**31)) & (x < 2.0**31)
    expected = np.where(fits, np.rint(np.where(fits, x, 0)), -(2.0**31)).astype(np.int32)
    same_bits(emulated("to_int", a), expected.view(np.uint32))


# --- Exponents -----------------------------------------------------------------------------------


def test_scalef_rounds_once_and_has_a_table_for_the_rest(emulated):
    a, b = pairs()
    random = np.random.default_rng(16)
    a = np.concatenate([a, bits(random.normal(size=4096))])
    b = np.concatenate([b, bits(random.uniform(-160, 140, 4096))])
    x, y = floats(a), floats(b)
    power = np.clip(np.floor(np.where(np.isfinite(y), y, 0)), -1000, 1000).astype(int)
    with np.errstate(all="ignore"):
        expected = bits(np.ldexp(x.astype(np.float64), power))
    sign = a & np.uint32(0x80000000)
    quiet = np.isnan(x) & (a & 0x400000 != 0)
    for infinite, away, back in ((y == np.inf, 0x7F800000, x == 0), (y == -np.inf, 0, np.isinf(x))):
        expected = np.where(infinite, sign | np.uint32(away), expected)
        expected = np.where(infinite & back, np.uint32(INDEFINITE), expected)
        expected = np.where(infinite & quiet, np.uint32(away), expected)
        expected = np.where(infinite & np.isnan(x) & ~quiet, a | 0x400000, expected)
    expected = np.where(np.isnan(y), b | 0x400000, expected)
    expected = np.where(np.isnan(x) & ~np.isinf(y), a | 0x400000, expected).astype(np.uint32)
    same_bits(emulated("scalef", a, b), expected)


def test_exponent_and_digits(emulated):
    a = np.concatenate([SPECIAL, words(2**14, 17), words(2**12, 18) & 0x807FFFFF]).astype(np.uint32)
    x = floats(a)
    digits, exponent = np.frexp(np.abs(x).astype(np.float64))
    expected = bits(exponent.astype(np.float32) - 1)
    expected = np.where(x == 0, bits(-np.inf), np.where(np.isinf(x), bits(np.inf), expected))
    nan = a | np.uint32(0x400000)
    same_bits(emulated("getexp", a), np.where(np.isnan(x), nan, expected).astype(np.uint32))
    special = (x == 0) | np.isinf(x)
    expected = bits(np.copysign(np.where(special, 1.0, 2 * digits), np.where(np.isnan(x), 1, x)))
    same_bits(emulated("getmant", a), np.where(np.isnan(x), nan, expected).astype(np.uint32))


# --- Pairs of bfloat16 ---------------------------------------------------------------------------


def dot_of_pairs(c, a, b):
    """VDPBF16PS as Intel's manual has it: the second products of all pairs first."""
    halves = [[flushed(floats(n & 0xFFFF0000)), flushed(floats(n << 16))] for n in (a, b)]
    total = flushed(floats(c))
    for x, y in zip(*halves, strict=True):
        total = flushed([exact_fma(*at) for at in zip(x, y, total, strict=True)])
    return bits(total)


def bfloat16_pairs_of(halves):
    low, high = (bfloat16_of(bits(n)).astype(np.uint32) for n in halves)
    return low | high << np.uint32(16)


def bfloat16_pairs(lower, upper):
    return bfloat16_pairs_of([np.broadcast_to(n, 16) for n in (lower, upper)])


def test_dot_products_of_pairs(emulated):
    random = np.random.default_rng(19)
    scales = 2.0 ** random.integers(-75, 60, (2, 4096))
    a, b = (bits(random.normal(size=4096) * s) & 0xFFFF0000 | words(4096, 20) >> 16 for s in scales)
    c = bits(random.normal(size=4096) * scales[0] * scales[1])
    a, b, c = (np.concatenate([n, np.resize(s, 4096)]) for n, s in zip(
        (a, b, c), (SPECIAL, SPECIAL[::-1], np.roll(SPECIAL, 11)), strict=True
    ))  # fmt: skip
    expected = dot_of_pairs(c, a, b)
    same(emulated("dpbf16", a, b, c), expected)
    for k in (0, 0xFFFF, 0x6A31):
        seen = np.resize(k >> np.arange(16) & 1, a.size).astype(bool)
        ours = emulated("mask_dpbf16", a, b, c, k=k).reshape(-1)
        same(ours[seen], expected[seen])
        assert np.array_equal(ours[~seen], c[~seen])


@pytest.mark.parametrize(
    ("c", "a", "b", "expected"),
    [
        # Both products alone are half of the last place of 1: 1 + upper is a tie, and stays 1.
        (1.0, (2.0**-24, 2.0**-24), (1.0, 1.0), 1.0),
        # The lower first would leave 1 + 2^-23, and the upper a tie that goes up to 1 + 2^-22.
        (1.0, (1.5 * 2.0**-24, 2.0**-24), (1.0, 1.0), 1.0 + 2.0**-23),
        (1.0, (2.0**-24, 1.5 * 2.0**-24), (1.0, 1.0), 1.0 + 2.0**-22),
        (1.0, (2.0**30, -(2.0**30)), (1.0, 1.0), 0.0),  # 1 is lost beside the upper
        (0.0, (2.0**-130, 1.0), (2.0**100, 0.0), 0.0),  # a denormal is zero
        (2.0**-130, (0.0, 0.0), (1.0, 1.0), 0.0),
        (-(2.0**-130), (0.0, 0.0), (-1.0, -1.0), -0.0),
        (0.0, (2.0**-70, 0.0), (2.0**-70, 0.0), 0.0),  # and so is a result
        (0.0, (2.0**-126, 2.0**-70), (1.0, 2.0**-70), 2.0**-126),  # also the one in between
        (np.inf, (1.0, 1.0), (1.0, 1.0), np.inf),
        (0.0, (np.inf, np.inf), (1.0, -1.0), np.nan),
        (0.0, (np.inf, 0.0), (2.0**-130, 0.0), np.nan),  # infinity by zero
        (0.0, (2.0**127, -(2.0**127)), (4.0, 4.0), -np.inf),  # the upper overflows first
    ],
)
def test_order_denormals_and_infinities_of_pairs(emulated, c, a, b, expected):
    c = bits(np.full(16, c))
    same(
        emulated("dpbf16", bfloat16_pairs(*a), bfloat16_pairs(*b), c),
        bits(np.full(16, expected)),
    )


# --- Memory --------------------------------------------------------------------------------------


def test_masked_lanes_beyond_a_page_are_not_touched(emulated):
    assert emulated.apart("masked()") == 0


@pytest.mark.parametrize("which", range(6))
def test_aligned_addresses_only(emulated, which):
    assert emulated.apart(f"aligned({which}, 0)") == 0
    assert emulated.apart(f"aligned({which}, 16)") < 0  # killed


# --- The processor's own -------------------------------------------------------------------------


#: What the kernels give normal numbers only. Of others, processors were not there to be asked.
OF_NORMAL_NUMBERS = ("scalef", "getexp", "getmant", "to_bf16", "two_to_bf16")


def test_the_processor_gives_the_same_bits(emulated, native):
    a, b = pairs()
    c = np.roll(a, 17)
    half = in_lower(np.arange(2**16, dtype=np.uint16))
    random = np.random.default_rng(23)
    normal = bits(random.normal(size=4096) * 2.0 ** random.integers(-60, 60, 4096))
    steps = bits(random.integers(-60, 60, 4096))
    for name in re.findall(r"^EXPORT\((\w+)", SOURCE.read_text(), re.M):
        if name in ("dpbf16", "mask_dpbf16") or not hasattr(native.library, name):
            continue
        arrays = (half,) if name in ("from_fp16", "from_u16") else (a, b, c)
        if name in OF_NORMAL_NUMBERS:
            arrays = (normal, steps if name == "scalef" else np.roll(normal, 1))
        arithmetic = name in ("add", "sub", "mul", "divide", "root", "fmadd", "mask3_fmadd")
        check = same if arithmetic else same_bits
        for k in {"cmp": range(32), "shuffle_i32x4": range(256)}.get(name, (0, 3, 40, 0x5AF0C3A5)):
            check(emulated(name, *arrays, k=k), native(name, *arrays, k=k).reshape(-1))
    assert native.apart("masked()") == 0


def test_the_processor_multiplies_the_same_pairs(emulated, native):
    """To the rounding of two sums, whose order and denormals are each maker's."""
    if not hasattr(native.library, "dpbf16"):
        pytest.skip("this processor multiplies no bfloat16")
    random = np.random.default_rng(29)
    values = random.normal(size=(4, 4096)) * 2.0 ** random.integers(-20, 20, 4096)
    a, b = bfloat16_pairs_of(values[:2]), bfloat16_pairs_of(values[2:])
    c = bits(random.normal(size=4096))
    halves = [[floats(n << 16), floats(n & 0xFFFF0000)] for n in (a, b)]
    size = np.abs(floats(c)) + sum(np.abs(x * y) for x, y in zip(*halves, strict=True))
    for k in (0xFFFF, 0x6A31):
        ours, theirs = (of("mask_dpbf16", a, b, c, k=k).reshape(-1) for of in (emulated, native))
        assert (np.abs(floats(ours) - floats(theirs)) <= 2.0**-22 * size).all()
        unseen = np.resize(k >> np.arange(16) & 1, a.size) == 0
        assert np.array_equal(theirs[unseen], c[unseen])
