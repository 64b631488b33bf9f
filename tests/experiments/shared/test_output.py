"""What commands print: whole words in a terminal of any width, tab-separated lines in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from maskmoe_kernels.experiments.shared.output import (
    Column,
    print_line,
    print_record,
    print_table,
    print_written,
)
from maskmoe_kernels.experiments.shared.progress import shown_bytes, shown_progress

COLUMNS = [
    Column("model", text=True),
    Column("parameters", optional=1),
    Column("NDCG@10"),
    Column("paper NDCG@10", optional=2),
    Column("reason", text=True, prose=True),
]
REASON = "this user's taste for comedies [sic] of the nineties, among women of 25-34"
ROWS = [["interpretable", "782,634", "0.412", "0.406", REASON]] * 2


def piped() -> Console:
    return Console(file=io.StringIO(), width=40)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_a_line_a_record_and_tabs() -> None:
    console = piped()
    print_line(console, "a message [plot] that is longer than the forty columns of its console")
    print_record(console, "content: epoch 1/20", {"validation Acc@1": "0.5828", "(kept)": ""})
    print_table(console, "Title [a]", COLUMNS, ROWS, "note [b]")
    names = "model\tparameters\tNDCG@10\tpaper NDCG@10\treason"
    assert text_of(console).split("\n") == [
        "a message [plot] that is longer than the forty columns of its console",
        "content: epoch 1/20\tvalidation Acc@1 0.5828\t(kept)",
        "# Title [a]", names, *["\t".join(row) for row in ROWS], "# note [b]", "",
    ]  # fmt: skip


def test_a_record_of_a_narrow_terminal_names_no_empty_cell() -> None:
    console = terminal(20)
    columns = [Column("contender", text=True), Column("forward, us"), Column("note", text=True)]
    print_table(console, "t", columns, [["masked dense", "10.8", ""], ["BSR", "9.0", "no step"]])
    assert text_of(console).split("\n") == [
        "t", "masked dense", "  forward, us 10.8", "BSR  forward, us 9.0", "  note no step", "",
    ]  # fmt: skip


def test_a_cell_cannot_break_a_line_of_a_pipe() -> None:
    console = piped()
    print_table(console, "t", [Column("a"), Column("b")], [["x\ty", "one\ntwo"]])
    assert text_of(console) == "# t\na\tb\nx y\tone two\n"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_a_terminal_of_any_width_cuts_no_word(width: int) -> None:
    console = terminal(width)
    print_table(console, "Title", COLUMNS, ROWS)
    print_record(console, "content: epoch 1/20", {"validation Acc@1": "0.5828"})
    lines = text_of(console).split("\n")
    assert "…" not in text_of(console)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    assert all(word in words for word in REASON.split())
    assert any("validation Acc@1 0.5828" in line for line in lines)  # a record breaks elsewhere


def test_a_narrow_terminal_shows_fewer_columns_and_says_so() -> None:
    shown = {}
    for width in (60, 70, 200):
        console = terminal(width)
        print_table(console, "Title", COLUMNS, ROWS)
        shown[width] = text_of(console)
    assert "No room for" not in shown[200]
    assert "No room for: paper NDCG@10." in shown[70]
    assert "No room for: parameters, paper NDCG@10." in shown[60]


def test_what_is_not_drawn_is_not_claimed(tmp_path) -> None:
    console = piped()
    hint = 'matplotlib is missing. Run: pip install "maskmoe_kernels[plot]"'
    print_written(console, "report", "figures", tmp_path, hint)
    assert text_of(console) == f"report: {tmp_path}\nno figures: {hint}\n"
    console = piped()
    print_written(console, "report", "figures", tmp_path, None)
    assert text_of(console) == f"report and figures: {tmp_path}\n"


def test_progress_in_a_pipe_is_a_line_every_ten_seconds(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = piped()
    with shown_progress(console, "content 1/20", 5000) as advance:
        for done in range(1, 31):
            now += 1.0
            advance(done, lambda: "speed [x]")
    expected = [f"content 1/20: {done} of 5,000 steps, speed [x]" for done in (10, 20, 30)]
    assert text_of(console).splitlines() == expected


def test_progress_of_files_in_a_pipe_is_a_line_every_ten_seconds_too(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = piped()
    with shown_bytes(console) as open_bar:
        plain, packed = open_bar("log_0", 30_000_000), open_bar("log_1.csv.gz", None)
        for _ in range(15):
            now += 1.0
            plain(1_000_000)
            packed(0)
        now += 5.0
        packed(70_000)
    assert text_of(console) == "log_0: 10.0 of 30.0 MB\nlog_1.csv.gz: 0.1 MB\n"
    with shown_bytes(None) as open_bar:
        open_bar("log_0", None)(1)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_bars_of_files_leave_nothing_behind(width: int) -> None:
    console = terminal(width)
    with shown_bytes(console) as open_bar:
        open_bar("log_0", 10)(10)
        open_bar("log_1", None)(10)
    assert text_of(console).endswith("\x1b[2K")  # the last line is cleared


def test_a_full_disk_is_told_of_what_is_printed() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="what the command prints cannot be written: No space left"):
        print_line(Console(file=Full()), "x")
