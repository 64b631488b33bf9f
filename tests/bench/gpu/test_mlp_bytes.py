"""The counted bytes of the CUDA MLPs follow the sizes that the kernels ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from bench.gpu import mlp_bytes
from bench.gpu.mlp_bytes import BLOCK, LIMIT, Shape, estimate
from bench.networks.mlp_training import NAMES
from tests.ops import host_emulator
from tests.ops.cuda_cases import MLPS

REASON = host_emulator.unsupported_reason()


@pytest.fixture
def machine() -> Iterator[None]:
    yield
    host_emulator.configure()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_a_tile_is_as_large_as_the_kernels_say(name: str, dtype: torch.dtype) -> None:
    net = MLPS[name](40, "relu", dtype)
    host_emulator.configure(shared=64)
    with pytest.raises(RuntimeError, match="bytes of shared memory") as refusal:
        net.gem(torch.zeros(40))
    match = re.search(r"needs (\d+) bytes of shared memory for (\d+) rows", str(refusal.value))
    assert match is not None
    assert Shape.of(net.layouts).tile(int(match[2]), dtype.itemsize) == int(match[1])


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("name", NAMES)
def test_sums_in_shared_memory_fit_and_save_their_bytes(name: str, size: int) -> None:
    shape = Shape.of(mlp_bytes.layouts_of(name))
    found = estimate(shape, 65536, size)
    near, tile, blocks = (found[key] for key in ("near_bytes", "tile_bytes", "blocks"))
    assert shape.others <= near <= shape.sums
    assert tile + near <= LIMIT
    tiles = -(-65536 // found["rows_of_a_tile"])
    assert found["before"]["bytes"] == 2 * tiles * shape.sums
    assert found["before"]["bytes"] - found["after"]["bytes"] == 2 * (tiles - blocks) * near
    if found["blocks_of_a_processor"] == 1:  # not one more block of weights would fit
        assert tile + near + BLOCK > LIMIT
