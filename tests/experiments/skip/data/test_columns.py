"""Values of the official columns."""

from __future__ import annotations

from maskmoe_kernels.experiments.skip.data.columns import parse_date


def test_dates() -> None:
    assert parse_date("2018-07-15") == parse_date("15-07-18") == 17727
    for bad in ("2018-7-15", "15-13-18", "", "0000-01-01", "2018-07-15 ", "١٥-07-18"):
        assert parse_date(bad) is None
