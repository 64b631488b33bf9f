"""The command: what it prints, and that a case is a function of its seed and number."""

import pytest
import torch

from tests.fuzz import layers
from tests.fuzz.__main__ import main
from tests.fuzz.drawn_mlps import Case as MLPCase


def test_says_in_one_line_that_there_is_no_fault(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(layers, "check", lambda seed, number: seen.append((seed, number)))
    assert main("layers --cases 10 --seed 5 --start 3".split()) == 0
    assert capsys.readouterr().out == "layers: 10 cases from seed 5: no fault\n"
    assert seen == [(5, number) for number in range(3, 13)]


def test_says_how_to_see_a_fault_again(capsys, monkeypatch):
    def check(seed, number):
        if number == 6:
            raise ValueError("too bad")

    monkeypatch.setattr(layers, "check", check)
    assert main("layers --cases 10 --seed 5".split()) == 1
    said = capsys.readouterr().out
    assert "case 6 of seed 5: ValueError: too bad" in said
    assert "python -m tests.fuzz layers --seed 5 --start 6 --cases 1\n" in said


def test_lists_the_fuzzers_when_asked_for_another(capsys):
    with pytest.raises(SystemExit):
        main(["lairs"])
    said = capsys.readouterr().err
    assert "layers" in said
    assert "mlp" in said


@pytest.mark.parametrize("kind", [layers.Case, MLPCase])
def test_a_case_is_a_function_of_seed_and_number(kind):
    (one, other), _ = [[kind(5, 17), kind(5, 17)] for _ in (kind(5, 16), kind(6, 17))]
    assert str(one) == str(other)
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
