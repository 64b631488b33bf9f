"""bfloat16 on tiles (AMX): the emulated instruction against its definition, and wide blocks.

``make emulate`` runs the second half on emulated tiles, on every processor with AVX2.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.testing import assert_blind, assert_close_to_oracle, dense_oracle
from tests.ops.masked_linear.test_masked_linear import (
    ACTIVATIONS,
    FILLS,
    drawn,
    on,
    same_bits,
    step,
)
from tests.ops.runners import RUNNERS

HEADERS = Path(__file__).resolve().parents[3] / "csrc" / "cpu"
SOURCE = """
#define MASKMOE_EMULATE
#include "simd_amx.h"
using maskmoe::amx::Tiles;
extern "C" void dot(float* c, const uint16_t* a, const uint16_t* b, int64_t stride) {
  Tiles::configure();
  Tiles::load<2>(c, stride);
  Tiles::load<4>(a, 64);
  Tiles::load<6>(b, 64);
  Tiles::dot<2, 4, 6>();
  Tiles::store<2>(c, 64);
  Tiles::release();
}
"""
MINIMUM = np.float32(2.0**-126)

NATIVE = [name for name in RUNNERS if name.startswith("native")]
SIZES = [1, 3, 8, 15, 16, 17, 20, 32, 33, 40, 48, 64, 100]
ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 65, 300]


# --- The instruction ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None or not (HEADERS / "simd_amx.h").is_file():
        pytest.skip("needs a C++ compiler and the sources")
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "dot.cpp").write_text(SOURCE)
    command = [compiler, "-O2", "-std=c++20", "-shared", "-fPIC", f"-I{HEADERS}", "dot.cpp"]
    subprocess.run([*command, "-o", "dot.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "dot.so"))

    def dot(c, a, b, stride=64):
        c, a, b = c.copy(), a.copy(), b.copy()
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (c, a, b)]
        library.dot(*pointers, ctypes.c_int64(stride))
        return c

    return dot


def bfloat16(values):
    """Bits of the nearest bfloat16, and its value."""
    tensor = torch.from_numpy(values.astype(np.float32)).bfloat16()
    return tensor.view(torch.int16).numpy().view(np.uint16), tensor.double().numpy()


def flushed(values):
    """As float32, without denormals."""
    single = values.astype(np.float32)
    return np.where(np.abs(single) < MINIMUM, np.copysign(np.float32(0), single), single)


def defined(c, a, b):
    """TDPBF16PS as Intel's manual has it, (16, 16) += (16, 32) by (16, 16 pairs, 2)."""
    a, b = flushed(a).astype(np.float64).reshape(16, 16, 2), flushed(b).astype(np.float64)
    sums = np.zeros((16, 16, 2), np.float32)
    for k in range(16):  # in float64 a product is exact, and so is its sum, or nearly
        sums = flushed(sums + a[:, None, k, :] * b[None, k])
    return flushed(flushed(c) + flushed(sums[..., 0] + sums[..., 1]))


@pytest.mark.parametrize("scale", [1.0, 1e-19, 2e-38, 1e18])
@pytest.mark.parametrize("seed", range(5))
def test_dot_is_what_it_is_defined_to_be(emulated, scale, seed):
    random = np.random.default_rng(seed)
    a_bits, a = bfloat16(random.normal(size=(16, 32)) * scale)
    b_bits, b = bfloat16(random.normal(size=(16, 16, 2)) * (1 if scale == 2e-38 else scale))
    c = (random.normal(size=(16, 16)) * scale).astype(np.float32)
    ours = emulated(c, a_bits, b_bits)
    assert np.array_equal(ours.view(np.int32), defined(c, a, b).view(np.int32))
    exact = c + np.einsum("mkp,knp->mn", a.reshape(16, 16, 2), b)
    size = np.abs(c) + np.einsum("mkp,knp->mn", *map(np.abs, (a.reshape(16, 16, 2), b)))
    assert (np.abs(ours - exact) <= 40 * 2.0**-24 * size + 40 * MINIMUM).all()


def test_dot_keeps_rows_and_columns_apart(emulated):
    a, b = np.ones((16, 32)), np.ones((16, 16, 2))
    a[3, 5], b[2, 7, 1] = np.nan, np.inf
    ours = emulated(np.zeros((16, 16), np.float32), bfloat16(a)[0], bfloat16(b)[0])
    expected = np.full((16, 16), 32.0)
    expected[:, 7] = np.inf
    expected[3] = np.nan
    assert np.array_equal(ours, expected, equal_nan=True)


def test_a_stride_of_zero_repeats_a_row(emulated):
    zeros = np.zeros((16, 32), np.uint16)
    c = np.arange(256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(emulated(c, zeros, zeros, stride=0), np.tile(c[0], (16, 1)))


# --- Blocks wide enough for tiles --------------------------------------------------------


@st.composite
def layouts(draw):
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    sizes = [draw(st.lists(st.sampled_from(SIZES), min_size=n, max_size=n)) for n in (rows, cols)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.3, 0.6, 1.0]))
    present = torch.rand(rows, cols, generator=generator) < density
    routes = present & (torch.rand(rows, cols, generator=generator) < 0.7)
    layout = mk.BlockLayout(*sizes, present, routes if draw(st.booleans()) else None)
    if not draw(st.booleans()):
        return layout
    # The same blocks with units and features in any order.
    unit, feature = (torch.randperm(n, generator=generator) for n in layout.mask().shape)
    mask, routed = (m[unit][:, feature] for m in (layout.mask(), layout.grad_mask()))
    return mk.BlockLayout.from_mask(mask, routed)


runners = st.sampled_from(NATIVE or ["torch"])
seeds = st.integers(0, 2**16)


@given(
    layouts(), runners, st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from(ROWS), seeds
)
def test_wide_blocks_match_oracle(layout, runner, activation, bias, rows, seed):
    x, weight, bias = drawn(layout, (rows,), torch.bfloat16, seed, bias)
    assert_close_to_oracle(on(runner), x, weight, bias, layout, activation, seed=seed)


@pytest.mark.parametrize("rows", [257, 600])
@pytest.mark.parametrize("runner", NATIVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_tiles_of_rows(activation, runner, rows):
    """Sums of weight gradients go on from tile to tile, of pieces seen as a whole and in part.

    By norms: the oracle's floor for one element, a sum over all rows, is wide here.
    """
    present = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])
    layout = mk.BlockLayout([32, 16, 40], [64, 24, 16], present)
    tensors = drawn(layout, (rows,), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(rows, layout.out_features, generator=generator).bfloat16()
    ours = step(layout, *tensors, cotangent, activation, runner)
    double = [t.double().requires_grad_() for t in tensors]
    y = dense_oracle(*double, layout, activation)
    exact = [y, *torch.autograd.grad(y, double, cotangent.double())]
    for mine, ref in zip(ours, exact, strict=True):
        assert (mine.double() - ref).norm() <= 0.01 * ref.norm()


@given(layouts(), runners, st.booleans(), seeds)
def test_wide_blocks_are_blind(layout, runner, bias, seed):
    x, weight, bias = drawn(layout, (18,), torch.bfloat16, seed, bias)
    assert_blind(lambda x: on(runner)(x, weight, bias, layout, "relu"), x, layout.mask())


@given(layouts(), runners, st.sampled_from(FILLS), st.sampled_from(ROWS), seeds)
def test_gradients_of_wide_blocks_are_blind(layout, runner, fill, rows, seed):
    """A spoilt feature reaches weights that see it; a spoilt cotangent its unit's gradients."""
    mask, routed = layout.mask(), layout.grad_mask()
    x, weight, bias = drawn(layout, (rows,), torch.bfloat16, seed)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(rows, layout.out_features, generator=generator).bfloat16()
    before = step(layout, x, weight, bias, cotangent, None, runner)
    again = step(layout, x, weight, bias, cotangent, None, runner)
    assert all(same_bits(a, b) for a, b in zip(before, again, strict=True))

    feature = torch.tensor([seed % layout.in_features])
    after = step(layout, x.index_fill(1, feature, fill), weight, bias, cotangent, None, runner)
    others = mask.index_fill(1, feature, False)
    assert same_bits(before[0][:, ~mask[:, feature[0]]], after[0][:, ~mask[:, feature[0]]])
    assert same_bits(before[1], after[1])
    assert same_bits(before[2][layout.pack(others)], after[2][layout.pack(others)])
    assert same_bits(before[3], after[3])

    unit = torch.tensor([seed % layout.out_features])
    after = step(layout, x, weight, bias, cotangent.index_fill(1, unit, fill), None, runner)
    others = mask.index_fill(0, unit, False)
    kept = ~routed[unit[0]]
    assert same_bits(before[1][:, kept], after[1][:, kept])
    assert same_bits(before[2][layout.pack(others)], after[2][layout.pack(others)])
