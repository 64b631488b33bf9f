"""Which backend runs, and what ``info()`` says of it."""

import importlib.metadata
import platform
from contextlib import suppress

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.dispatch import BACKENDS


def test_info_knows_the_versions_and_every_backend():
    told = mk.info()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "triton": None}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    assert {name: told[name] for name in versions} == versions
    assert told["threads"] == torch.get_num_threads()
    assert list(told["backends"]) == list(BACKENDS)
    for name in ("torch", "reference"):  # PyTorch alone: they run wherever torch does
        assert told["backends"][name]["obstacle"] is None
