"""Skip metrics against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels.experiments.skip.metrics import SkipTally


def tally(*sessions: str, pad: Callable[[str, int, str], str] = str.ljust) -> dict[str, float]:
    """Metrics of sessions written as ``x`` for right, ``.`` for wrong; ``-`` is padding, right."""
    longest = max(map(len, sessions))
    padded = [pad(name, longest, "-") for name in sessions]
    right = torch.tensor([[c != "." for c in name] for name in padded])
    real = torch.tensor([[c != "-" for c in name] for name in padded])
    result = SkipTally()
    result.add(right, real)
    return result.metrics()


def test_skips_by_hand() -> None:
    # AA of "x.x": (1/1 + 0 + 2/3) / 3 = 5/9; of ".xx.x": (0 + 1/2 + 2/3 + 0 + 3/5) / 5 = 53/150.
    for pad in (str.ljust, str.rjust):  # padding after the tracks, or before them
        once = tally("x.x", pad=pad)
        assert once == pytest.approx({"Acc": 2 / 3, "Acc@1": 1, "MAA": 5 / 9}, rel=1e-12, abs=0)
        once = tally(".xx.x", pad=pad)
        assert once == pytest.approx({"Acc": 3 / 5, "Acc@1": 0, "MAA": 53 / 150}, rel=1e-12, abs=0)
    # Acc is over tracks, MAA over sessions, whatever their lengths.
    both = {"Acc": 5 / 8, "Acc@1": 1 / 2, "MAA": (5 / 9 + 53 / 150) / 2}
    for pad in (str.ljust, str.rjust):
        assert tally("x.x", ".xx.x", pad=pad) == pytest.approx(both, rel=1e-12, abs=0)
        assert tally("xxxxx", "x", pad=pad) == {"Acc": 1, "Acc@1": 1, "MAA": 1}
        assert tally("....", "..", pad=pad) == {"Acc": 0, "Acc@1": 0, "MAA": 0}
        assert tally("....", ".x", pad=pad)["Acc@1"] == 0
        assert tally("....", "x.", pad=pad)["Acc@1"] == 0.5
    assert tally("-x-.-x", "--x.x-") == pytest.approx(tally("x.x"), rel=1e-12, abs=0)  # anywhere
    # An early mistake costs more than a late one.
    assert tally(".xxxx")["MAA"] < tally("xxxx.")["MAA"]


def test_guessing_skips_gives_50_50_and_about_33() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 11, (200_000, 1), generator=generator)
    right = torch.rand(200_000, 10, generator=generator) < 0.5
    result = SkipTally()
    result.add(right, torch.arange(10) < lengths)
    # Where track j is right, half of the j - 1 before it are: E[AA] = 1/4 + (1 + ... + 1/T) / 4T.
    guessed = [0.25 + sum(1 / j for j in range(1, n + 1)) / (4 * n) for n in range(5, 11)]
    expected = {"Acc": 0.5, "Acc@1": 0.5, "MAA": sum(guessed) / 6}
    assert result.metrics() == pytest.approx(expected, abs=0.004)
    assert expected["MAA"] == pytest.approx(0.33, abs=0.015)


@given(st.lists(st.text("x.", min_size=1, max_size=10), min_size=2, max_size=8), st.data())
def test_sessions_may_be_counted_in_any_parts(sessions: list[str], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(sessions) - 1))
    whole = SkipTally()
    for part in (sessions[:cut], sessions[cut:]):
        right = torch.tensor([[c == "x" for c in name.ljust(10, ".")] for name in part])
        whole.add(right, torch.tensor([[k < len(name) for k in range(10)] for name in part]))
    means = [sum(name[: k + 1].count("x") / (k + 1) for k, c in enumerate(name) if c == "x")
             / len(name) for name in sessions]  # fmt: skip
    tracks = "".join(sessions)
    expected = {
        "Acc": tracks.count("x") / len(tracks),
        "Acc@1": sum(name[0] == "x" for name in sessions) / len(sessions),
        "MAA": sum(means) / len(sessions),
    }
    assert whole.metrics() == pytest.approx(expected, abs=1e-12)


def test_skips_of_another_shape_are_refused() -> None:
    right = torch.ones(2, 3, dtype=torch.bool)
    for real in (right[:, :2], right.float(), right[None]):
        with pytest.raises(ValueError, match=r"expected right and real \(B, T\) bool, got"):
            SkipTally().add(right, real)
    with pytest.raises(ValueError, match="no track was counted"):
        SkipTally().metrics()
