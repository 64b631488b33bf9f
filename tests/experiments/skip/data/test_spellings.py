"""The same sessions as other programs write them: the shards are the same, byte for byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.data.columns import LOG_COLUMNS, TRACK_COLUMNS
from maskmoe_kernels.experiments.skip.data.prepare import prepare
from tests.experiments.skip.data.files import contents, edit, put

KINDS = {column.name: column.kind for column in (*LOG_COLUMNS, *TRACK_COLUMNS)}
BITS = {column.name for column in LOG_COLUMNS if column.kind == "integer" and column.high == 1}
FILES = ("log_0.csv", "tf_0.csv")

Table = list[list[str]]


def spell(wanted: Callable[[str], bool], change: Callable[[str], str]) -> Callable[[Table], object]:
    """Spell the fields of the columns whose names are ``wanted`` anew."""

    def apply(table: Table) -> None:
        for i in (i for i, name in enumerate(table[0]) if wanted(name)):
            for row in table[1:]:
                row[i] = change(row[i])

    return apply


def is_kind(kind: str) -> Callable[[str], bool]:
    return lambda name: KINDS[name] == kind


def day_first(date: str) -> str:
    year, month, day = date.split("-")
    return f"{day}-{month}-{year[2:]}"


def reorder(table: Table) -> None:
    """Reverse the columns, between an empty column and the index of a data frame."""
    table[:] = [[str(i), *row[::-1], ""] for i, row in enumerate(table)]
    table[0][0], table[0][-1] = "", "comment"


def quote(table: Table) -> None:
    table[:] = [[f'"{field}"' for field in row] for row in table]


def add_text(table: Table) -> None:
    for i, row in enumerate(table):
        row.insert(1, '"Hello, ""World"""' if i % 2 else "title")


SPELLINGS: dict[str, Callable[[Table], object]] = {
    "true": spell(is_kind("flag"), str.title),
    "TRUE": spell(is_kind("flag"), str.upper),
    "1": spell(is_kind("flag"), {"true": "1", "false": "0"}.__getitem__),
    "1.0": spell(is_kind("flag"), {"true": "1.0", "false": "0.0"}.__getitem__),
    "bits as booleans": spell(BITS.__contains__, {"1": "True", "0": "False"}.__getitem__),
    "decimals for integers": spell(is_kind("integer"), lambda text: f"{text}.0"),
    "numbers for modes": spell(lambda n: n == "mode", {"minor": "0", "major": "1"}.__getitem__),
    "decimals for modes": spell(lambda n: n == "mode", {"minor": "0.0", "major": "1.0"}.get),
    "days first": spell(is_kind("date"), day_first),
    "spaces": spell(lambda name: KINDS[name] != "id", lambda text: f" {text} "),
    "other order, more columns": reorder,
    "quotes": quote,
    "commas in quotes": add_text,
}


@pytest.fixture(scope="module")
def official(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of the official spelling."""
    out = tmp_path_factory.mktemp("official")
    prepare([source / name for name in FILES], out, strict=True)
    return contents(out)


@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("is_mixed", [False, True], ids=["whole", "mixed"])
def test_other_spellings(
    folder: Path,
    tmp_path: Path,
    official: dict[str, bytes],
    change: Callable[[Table], object],
    is_mixed: bool,
) -> None:
    def change_first(table: Table) -> None:
        first = table[:3]
        change(first)
        table[:3] = first

    for name in FILES:
        mixed = is_mixed and change not in (reorder, add_text)
        edit(folder / name, change_first if mixed else change)
    prepare([folder], tmp_path / "out", strict=True)
    assert contents(tmp_path / "out") == official


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: b"\xef\xbb\xbf" + b'"' + text.replace(b",", b'",', 1).replace(b"\n", b"\r\n"),
    ],
    ids=["crlf", "bom", "bom_quotes_crlf"],
)
def test_other_line_ends_and_byte_order_marks(
    folder: Path, tmp_path: Path, official: dict[str, bytes], encode: Callable[[bytes], bytes]
) -> None:
    for name in FILES:
        (folder / name).write_bytes(encode((folder / name).read_bytes()))
    prepare([folder], tmp_path / "out", strict=True)
    assert contents(tmp_path / "out") == official


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda text: pa.compress(text, "zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "unnamed"])
def test_compressed_files(
    folder: Path, tmp_path: Path, official: dict[str, bytes], ending: str, is_named: bool
) -> None:
    for name in FILES:
        packed = PACKERS[ending]((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / (f"{name}.{ending}" if is_named else name)).write_bytes(packed)
    prepare([folder], tmp_path / "out", strict=True)
    assert contents(tmp_path / "out") == official


@pytest.mark.parametrize("ending", PACKERS)
def test_cut_compressed_files(folder: Path, tmp_path: Path, ending: str) -> None:
    packed = PACKERS[ending]((folder / "log_0.csv").read_bytes())
    (folder / "log_0.csv").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"log_0\.csv: expected a readable csv file, whole where"):
        prepare([folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\x03\x04", r"got a zip file\. Unpack it with `unzip .*log_0\.csv`"),
        (b"7z\xbc\xaf\x27\x1c", r"got a 7z file\. Unpack it with `7z x .*log_0\.csv`"),
        ("session_id".encode("utf-16"), r"got UTF-16\. Convert it with `iconv -f utf-16 -t utf-8"),
    ],
)
def test_formats_that_are_not_read(folder: Path, tmp_path: Path, head: bytes, message: str) -> None:
    (folder / "log_0.csv").write_bytes(head + bytes(600))
    with pytest.raises(DataError, match=rf"log_0\.csv: expected .*{message}"):
        prepare([folder], tmp_path / "out")


def test_the_remedy_for_utf16_works(
    folder: Path, tmp_path: Path, official: dict[str, bytes]
) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed")
    log = folder / "log_0.csv"
    log.write_bytes(log.read_text().encode("utf-16"))
    with pytest.raises(DataError, match="got UTF-16") as caught:
        prepare([folder], tmp_path / "out")
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=True, cwd=folder)
    (folder / "log_0.utf8.csv").rename(log)
    prepare([folder], tmp_path / "out", strict=True)
    assert contents(tmp_path / "out") == official


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators(folder: Path, tmp_path: Path, separator: str) -> None:
    log = folder / "log_0.csv"
    log.write_text(log.read_text().replace(",", separator))
    with pytest.raises(DataError, match=r"log_0\.csv, line 1: .*Separate the columns by commas"):
        prepare([folder], tmp_path / "out")


@pytest.mark.parametrize("field", ['"open', 'in"side"', '"closed"early', 'a"b'])
def test_bad_quotes(folder: Path, tmp_path: Path, field: str) -> None:
    """They cost their own session only, though others in the file are well quoted."""
    log = folder / "log_0.csv"
    edit(log, quote)
    edit(log, put(4, '"date"', field))
    found = prepare([folder], tmp_path / "out")
    assert (found.counts, found.dropped) == ({"quotes": 1, "positions": 1}, 1)
    message = r"log_0\.csv, line 4: expected double quotes .* around whole fields.*Remove line"
    with pytest.raises(DataError, match=message):
        prepare([folder], tmp_path / "out", strict=True)


def test_nothing_valid_shows_the_first_problem(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "tf_0.csv").read_text()
    edit(folder / "tf_0.csv", spell(lambda name: name == "mode", lambda text: "dur"))
    message = (
        r"expected tracks, got none that is valid\. .*tf_0\.csv, line 2: expected one of minor, "
        r"major in column mode, got 'dur'\. Write one of these names, or 0 for minor, 1 for major"
    )
    with pytest.raises(DataError, match=message):
        prepare([folder], tmp_path / "out")
    (folder / "tf_0.csv").write_text(whole)
    edit(folder / "log_0.csv", spell(lambda name: name == "date", lambda text: "today"))
    message = r"got none that is whole; .*log_0\.csv, line 2: expected a date .* got 'today'\. Wri"
    with pytest.raises(DataError, match=message):
        prepare([folder], tmp_path / "out")


def test_real_tracks_with_numbers_for_modes(shared_data: Path, tmp_path: Path) -> None:
    sample = shared_data / "mssd-sample"
    prepare([sample], tmp_path / "names", strict=True)
    folder = tmp_path / "numbers"
    folder.mkdir()
    shutil.copy(sample / "log_sample.csv", folder)
    (folder / "tf_sample.csv").write_text((sample / "tf_sample.csv").read_text())
    edit(folder / "tf_sample.csv", SPELLINGS["numbers for modes"])
    prepare([folder], tmp_path / "out", strict=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "names")
