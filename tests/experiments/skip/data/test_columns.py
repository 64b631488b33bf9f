"""Values of the official columns."""

from __future__ import annotations

import pytest

from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS, TRACK_COLUMNS, parse_date

COLUMNS = {column.name: column for column in (*LOG_COLUMNS, *TRACK_COLUMNS)}


def test_dates() -> None:
    assert parse_date("2018-07-15") == parse_date("15-07-18") == 17727
    for bad in ("2018-7-15", "15-13-18", "", "0000-01-01", "2018-07-15 ", "١٥-07-18"):
        assert parse_date(bad) is None


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("skip_1", {1: "true True TRUE 1 1.0", 0: "false False FALSE 0 0.0", None: "yes t 2 -1"}),
        ("context_switch", {1: "1 1.0 +1 true", 0: "0 0. -0 False", None: "yes 0.5 1e0 0x1"}),
        ("hour_of_day", {7: "7 07 7.0 7.000", 24: "24", None: "7.5 true 7h ７ 1234567890"}),
        ("mode", {0: "minor 0 0.0", 1: "major 1 1.0", None: "2 -1 Major true 0.5 dur"}),
        ("context_type", {1: "radio", None: "1 1.0 Radio"}),
        ("date", {17727: "2018-07-15 15-07-18", None: "15/07/18 17727"}),
    ],
)
def test_spellings(name: str, spellings: dict[int | None, str]) -> None:
    for value, texts in spellings.items():
        for text in texts.split():
            assert COLUMNS[name].parse(text) == COLUMNS[name].parse(f" {text} ") == value, text
    assert COLUMNS[name].parse("") is None
