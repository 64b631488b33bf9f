"""A bounded run of the fuzzer of layers, and proof that it finds what it is for."""

import pytest
import torch

import maskmoe_kernels as mk
from tests.fuzz import layers
from tests.fuzz.cases import Fault

CASES, SEED = 100, 1
real = mk.masked_linear


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_some_hundred_cases(seed):
    layers.run(CASES, seed)


def leaks(x, weight, bias, layout, *options):
    y = real(x, weight, bias, layout, *options)
    return y + 0 * x.sum(-1, keepdim=True)


def rounds(*args):
    y = real(*args)
    return (y.double() * (1 + 64 * torch.finfo(y.dtype).eps)).to(y.dtype)


def detaches_the_bias(x, weight, bias, *rest):
    return real(x, weight, None if bias is None else bias.detach() + 0 * bias, *rest)


def hides_nan(*args):
    return real(*args).nan_to_num(0.0)


def writes_into_x(x, *rest):
    with torch.no_grad():
        x.detach().mul_(1.5)
    return real(x, *rest)


@pytest.mark.parametrize("fault", [leaks, rounds, detaches_the_bias, hides_nan, writes_into_x])
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr(mk, "masked_linear", fault)
    with pytest.raises(Fault, match=rf"case \d+ of seed {SEED}"):
        layers.run(5 * CASES, SEED)  # it ends with the first
