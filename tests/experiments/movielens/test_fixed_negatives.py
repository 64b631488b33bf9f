"""Fixed test negatives: the two numberings, the compressions, and damaged files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.fixed_negatives import read_fixed_negatives
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.split import leave_one_out
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens
from tests.experiments.movielens.made import write_folder

NEGATIVES = ["(7,5)\t4", "(10,4)\t6", "(3,2)\t5"]
# The same, counted as ratings.dat names them first: users 7, 10, 3; movies 2, 5, 9, 4, 6.
COUNTED = ["(0,1)\t3", "(1,3)\t4", "(2,0)\t1"]
ROWS = [[5], [3], [0]]  # in the order of users.dat, not of the file


@pytest.fixture
def data(tmp_path: Path) -> MovieLens:
    return read_movielens(write_folder(tmp_path / "tiny"))


def write_negatives(path: Path, lines: list[str], zipped: bool = False) -> Path:
    raw = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return path


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_fixed_negatives(tmp_path: Path, data: MovieLens, zipped: bool) -> None:
    path = write_negatives(tmp_path / "n.tsv", NEGATIVES, zipped)
    negatives = read_fixed_negatives(path, data, leave_one_out(data, seed=0), per_user=1)
    assert negatives.tolist() == [[5], [3], [0]]  # in the order of users.dat, not of the file


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "7,5\t4", r"expected '\(user,positive\)' and a tab first, got '7,5'"),
        (2, "(10,4) 6", r"expected '\(user,positive\)' and a tab first, got '\(10,4\) 6'"),
        (2, "(10,4)", r"expected 1 tab-separated negatives, got 0"),
        (2, "(10,4)\t6\t6", r"expected 1 tab-separated negatives, got 2"),
        (2, "(10,4)\t6x", r"expected a whole number in column negatives, got '6x'"),
        (2, "", r"expected '\(user,positive\)' and a tab first, got ''"),
        (3, "(4,2)\t5", r"expected a user of users.dat, got 4"),
        (3, "(7,5)\t5", r"expected each user once, got user 7 of line 1 again"),
        (3, "(3,4)\t5", r"expected the test item 2 of user 3, got 4"),
        (3, "(3,2)\t77", r"expected movies of movies.dat, got 77"),
    ],
)
def test_bad_negatives(tmp_path: Path, data: MovieLens, line: int, text: str, message: str) -> None:
    lines = list(NEGATIVES)
    lines[line - 1] = text
    path = write_negatives(tmp_path / "n.tsv", lines)
    with pytest.raises(DataError, match=rf"n\.tsv, line {line}: {message}"):
        read_fixed_negatives(path, data, leave_one_out(data, seed=0), per_user=1)


def test_unknown_negative_deep_in_a_line(tmp_path: Path, data: MovieLens) -> None:
    lines = ["(7,5)\t4\t6", "(10,4)\t6\t8", "(3,2)\t5\t77"]
    path = write_negatives(tmp_path / "n.tsv", lines)
    with pytest.raises(DataError, match=r"n\.tsv, line 3: .*got 77"):
        read_fixed_negatives(path, data, leave_one_out(data, seed=0), per_user=2)


def test_negatives_of_an_absent_user(tmp_path: Path, data: MovieLens) -> None:
    path = write_negatives(tmp_path / "n.tsv", NEGATIVES[:2])
    with pytest.raises(DataError, match=r"n\.tsv: .*each of 3 users, got none for user 3"):
        read_fixed_negatives(path, data, leave_one_out(data, seed=0), per_user=1)


def test_damaged_negatives_file(tmp_path: Path, data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    path = write_negatives(tmp_path / "n.tsv.gz", NEGATIVES, zipped=True)
    whole = path.read_bytes()
    for length in range(3, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"n\.tsv\.gz: expected a whole gzip file"):
            read_fixed_negatives(path, data, split, per_user=1)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"n\.tsv\.gz, line 1: .*got an empty file"):
        read_fixed_negatives(path, data, split, per_user=1)
    path.write_bytes("\n".join(NEGATIVES).encode())
    with pytest.raises(DataError, match=r"n\.tsv\.gz, line 3: .*may be cut short"):
        read_fixed_negatives(path, data, split, per_user=1)
    with pytest.raises(DataError, match=r"absent\.tsv: expected a readable file"):
        read_fixed_negatives(tmp_path / "absent.tsv", data, split, per_user=1)


def read(path: Path, data: MovieLens) -> list[list[int]]:
    return read_fixed_negatives(path, data, leave_one_out(data, seed=0), per_user=1).tolist()


def test_both_numberings_name_the_same_movies(tmp_path: Path, data: MovieLens) -> None:
    assert read(write_negatives(tmp_path / "ids.tsv", NEGATIVES), data) == ROWS
    assert read(write_negatives(tmp_path / "ml-1m.test.negative", COUNTED), data) == ROWS
    windows = write_negatives(tmp_path / "crlf", [f"{line}\r" for line in COUNTED])
    assert read(windows, data) == ROWS


COUNTED_FROM_0 = r"ratings\.dat, counted from 0"


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (
            2,
            "(1,4)\t2",
            r"expected the test item 3 of user 1 \(movie 4 of user 10\), got 4 \(movie 6\)",
        ),
        (2, "(1,9)\t2", r"expected the test item 3 of user 1 \(movie 4 of user 10\), got 9\. The"),
        (3, "(5,0)\t1", rf"expected a user of {COUNTED_FROM_0}, got 5"),
        (3, "(2,0)\t5", rf"expected movies of {COUNTED_FROM_0}, got 5"),  # movie 8 is never rated
        (3, "(0,1)\t1", r"expected each user once, got user 0 of line 1 again"),
    ],
)
def test_bad_numbers_of_the_authors(
    tmp_path: Path, data: MovieLens, line: int, text: str, message: str
) -> None:
    lines = list(COUNTED)
    lines[line - 1] = text
    path = write_negatives(tmp_path / "ml-1m.test.negative", lines)
    with pytest.raises(DataError, match=rf"ml-1m\.test\.negative, line {line}: {message}"):
        read(path, data)


def test_the_authors_file_beside_ratings_of_another_order(tmp_path: Path, data: MovieLens) -> None:
    """No line fits, so the file is known by its user 0 alone."""
    path = write_negatives(tmp_path / "n", ["(0,4)\t3", "(1,0)\t4", "(2,3)\t1"])
    message = (
        r"n, line 1: expected the test item 1 of user 0 \(movie 5 of user 7\), got 4 \(movie 6\)\. "
        r"The numbers count users and movies as ratings\.dat names them first, so it must be the "
        r"official file"
    )
    with pytest.raises(DataError, match=message):
        read(path, data)


TEXT = ("\n".join(COUNTED) + "\n").encode()


def in_zip(text: bytes, *names: str) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, text)
    return raw.getvalue()


def in_tar(text: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        member = tarfile.TarInfo("ml-1m.test.negative")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return raw.getvalue()


@pytest.mark.parametrize(
    "pack",
    [
        bytes,
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda text: lzma.compress(text, lzma.FORMAT_ALONE),
        lambda text: in_zip(text, "Data/ml-1m.test.negative"),
        lambda text: in_zip(text, "__MACOSX/._n", "Data/", "Data/n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: gzip.compress(b"\xef\xbb\xbf" + text),
    ],
    ids=["plain", "gzip", "bzip2", "xz", "lzma", "zip", "mac_zip", "bom", "gzip_bom"],
)
@pytest.mark.parametrize("name", ["n.tsv", "n.gz", "n.zip"])
def test_compressions_are_known_by_content(
    tmp_path: Path, data: MovieLens, pack: Callable[[bytes], bytes], name: str
) -> None:
    (tmp_path / name).write_bytes(pack(TEXT))
    assert read(tmp_path / name, data) == ROWS


@pytest.mark.parametrize(
    ("pack", "name"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz"),
     (lambda text: in_zip(text, "n"), "zip")],
)  # fmt: skip
def test_each_cut_names_the_format(
    tmp_path: Path, data: MovieLens, pack: Callable[[bytes], bytes], name: str
) -> None:
    whole = pack(TEXT)
    for length in range(6, len(whole)):
        (tmp_path / "n").write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"n: expected a whole {name} file, .*Fetch it again"):
            read(tmp_path / "n", data)


@pytest.mark.parametrize(
    ("raw", "got", "remedy"),
    [
        (b"\x28\xb5\x2f\xfd", "a zstd file", r"`zstd -dc < .*/n\.x > n\.txt`, and name n\.txt"),
        (b"\x04\x22\x4d\x18", "a lz4 file", r"`lz4 -dc < .*/n\.x > n\.txt`"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z file", r"`7z x .*/n\.x`, and name the file that was in it"),
        (b"Rar!\x1a\x07\x00", "a rar file", r"`unrar x .*/n\.x`"),
        (in_tar(TEXT), "a tar file", r"`tar -xf .*/n\.x`"),
        (gzip.compress(in_tar(TEXT)), "a tar file in a gzip file", r"`tar -xf .*/n\.x`"),
        (gzip.compress(gzip.compress(TEXT)), "a gzip file in a gzip file", r"`gzip -dc < "),
        (in_zip(TEXT, "a", "b"), r"2: \['a', 'b'\]", r"`unzip .*/n\.x`"),
        (in_zip(TEXT), r"0: \[\]", r"`unzip .*/n\.x`"),
        (TEXT.decode().encode("utf-16"), "UTF-16", r"`iconv -f utf-16 -t utf-8 .*/n\.x > utf8"),
        (b"\n<!DOCTYPE html>\n", "a web page", "Download the raw file"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # not of a time
)
def test_other_formats_have_their_own_remedy(
    tmp_path: Path, data: MovieLens, raw: bytes, got: str, remedy: str
) -> None:
    (tmp_path / "n.x").write_bytes(raw)
    with pytest.raises(DataError, match=rf"n\.x(, line 1)?: expected .*, got {got}\. .*{remedy}"):
        read(tmp_path / "n.x", data)


@pytest.mark.parametrize("tool", ["zstd", "lz4", "tar", "unzip", "iconv", "gzip"])
def test_the_remedy_works_as_it_is_pasted(tmp_path: Path, data: MovieLens, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    path = tmp_path / "the file.x"
    if tool in ("zstd", "lz4"):
        path.write_bytes(subprocess.run([tool, "-c"], input=TEXT, capture_output=True).stdout)
    packed = {
        "tar": gzip.compress(in_tar(TEXT)),
        "unzip": in_zip(TEXT, "ml-1m.test.negative", "ml-1m.test.rating"),
        "iconv": TEXT.decode().encode("utf-16"),
        "gzip": gzip.compress(gzip.compress(TEXT)),
    }
    if tool in packed:
        path.write_bytes(packed[tool])
    with pytest.raises(DataError, match=f"`{tool} ") as caught:
        read(path, data)
    command = re.search("`(.*)`", str(caught.value))
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, cwd=tmp_path)
    unpacked = next(p for p in tmp_path.iterdir() if p.is_file() and p not in (path,)
                    and not p.name.endswith(".rating"))  # fmt: skip
    assert read(unpacked, data) == ROWS
