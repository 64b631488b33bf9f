"""The MovieLens reader on made-up files, whole and damaged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.tables import GENRES, MovieLens
from tests.experiments.movielens.made import LINES, with_line, write_folder, write_zip


@pytest.fixture
def data(tmp_path: Path) -> MovieLens:
    return read_movielens(write_folder(tmp_path / "tiny"))


def assert_is_the_made_up_set(data: MovieLens) -> None:
    assert (data.num_users, data.num_items) == (3, 6)
    assert data.user_ids.tolist() == [10, 7, 3]
    assert data.movie_ids.tolist() == [5, 2, 9, 4, 8, 6]
    assert data.sex.tolist() == [0, 1, 1]
    assert data.age.tolist() == [0, 6, 2]
    assert data.occupation.tolist() == [10, 20, 0]
    assert data.titles[1:3] == ["Star Wars: Episode IV (1977)", "Misérables, Les (1995)"]
    assert data.year.tolist() == [1995, 1977, 1995, 1995, 2000, 1993]
    flagged = [{GENRES[g] for g in row.nonzero().flatten().tolist()} for row in data.genres]
    assert flagged[0] == {"Animation", "Children's", "Comedy"}
    assert flagged[4] == {"Western"}
    assert data.users.tolist() == [1, 1, 0, 1, 0, 0, 2, 2, 2, 0]
    assert data.items.tolist() == [1, 0, 2, 2, 1, 3, 5, 3, 1, 0]
    assert data.timestamps.tolist() == [100, 300, 50, 200, 70, 70, 10, 10, 10, 60]
    assert data.rated_items.tolist() == [0, 1, 2, 3, 5]
    integers = (data.user_ids, data.sex, data.age, data.occupation, data.movie_ids, data.year)
    assert {t.dtype for t in (*integers, data.users, data.items)} == {torch.int64}
    assert data.genres.dtype == torch.float32


@pytest.mark.parametrize("place", ["folder", "parent", "zip", "bare zip", "folder of zip", "crlf"])
def test_reads_every_official_container(tmp_path: Path, place: str) -> None:
    folder = write_folder(tmp_path / "ml-1m")
    path = {"folder": folder, "parent": tmp_path}.get(place, folder)
    if place == "zip":
        path = write_zip(tmp_path / "ml-1m.zip", folder)
    elif place == "bare zip":
        path = write_zip(tmp_path / "ml-1m.zip", folder, prefix="")
    elif place == "folder of zip":
        path = tmp_path / "held"
        path.mkdir()
        write_zip(path / "ml-1m.zip", folder)
    elif place == "crlf":
        for name in LINES:
            (folder / name).write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))
    assert_is_the_made_up_set(read_movielens(path))


# file, line, its damaged text, what was expected, what came
BAD_LINES = [
    ("users.dat", 2, "7,M,56,20,70072", "5 columns UserID::", "1 in '7,M,56,20,70072'"),
    ("users.dat", 2, "7::M::56::20", "5 columns UserID::", "4 in"),
    ("users.dat", 1, "10::F::1::10::48067::1", "5 columns UserID::", "6 in"),
    ("users.dat", 3, "x::M::25::0::5", "a whole number in column UserID", "'x'"),
    ("users.dat", 3, "-3::M::25::0::5", "a whole number in column UserID", "'-3'"),
    ("users.dat", 3, "3::m::25::0::5", "a Gender of ('F', 'M')", "'m'"),
    ("users.dat", 3, "3::M::26::0::5", "an Age of (1, 18,", "26"),
    ("users.dat", 3, "3::M::25::21::5", "an Occupation of 0..20", "21"),
    ("users.dat", 3, "10::M::25::0::5", "each UserID once", "10 of line 1 again"),
    ("users.dat", 2, "", "5 columns", "1 in ''"),
    ("movies.dat", 4, "4|Heat (1995)|Action", "3 columns MovieID::Title::Genres", "1 in"),
    ("movies.dat", 4, "4::Heat (1995)", "3 columns MovieID::Title::Genres", "2 in"),
    ("movies.dat", 4, "4::Heat (1995)::Action::x", "3 columns", "4 in"),
    ("movies.dat", 4, "4.0::Heat (1995)::Action", "a whole number in column MovieID", "'4.0'"),
    ("movies.dat", 4, "4::Heat::Action", "a Title that ends in its year", "'Heat'"),
    ("movies.dat", 4, "4::Heat (199x)::Action", "a Title that ends in its year", "'Heat (199x)'"),
    ("movies.dat", 4, "4::Heat (1995)::Action|Noir", "Genres of Action, ", "'Noir' in"),
    ("movies.dat", 4, "4::Heat (1995)::", "Genres of Action, ", "''"),
    ("movies.dat", 4, "4::Heat (1995)::War|War", "each once", "'War' in 'War|War'"),
    ("movies.dat", 6, "5::Café (1993)::Comedy", "each MovieID once", "5 of line 1 again"),
    ("movies.dat", 4, "4::He\x00at (1995)::Action", "latin-1 text", "the control byte b'\\x00'"),
    ("movies.dat", 4, "4::He\x85at (1995)::Action", "latin-1 text", "the control byte b'\\x85'"),
    ("ratings.dat", 4, "7\t9\t3\t200", "latin-1 text", "the control byte b'\\t'"),
    ("ratings.dat", 4, "7,9,3,200", "4 columns UserID::MovieID::Rating::Timestamp", "1 in"),
    ("ratings.dat", 4, "7:9:3:200", "4 columns", "1 in '7:9:3:200'"),
    ("ratings.dat", 4, "7:1:9::3::200", "4 columns", "3 in '7:1:9::3::200'"),
    ("ratings.dat", 4, "7:1:9:1:3:1:200", "4 columns", "1 in"),
    ("ratings.dat", 4, "7::9::3", "4 columns", "3 in '7::9::3'"),
    ("ratings.dat", 4, "7::9::3::200::1", "4 columns", "5 in"),
    ("ratings.dat", 4, "", "4 columns", "1 in ''"),
    ("ratings.dat", 4, "7::::3::200", "a whole number in column MovieID", "''"),
    ("ratings.dat", 4, "7::9::3.5::200", "a whole number in column Rating", "'3.5'"),
    ("ratings.dat", 4, "7:: 9::3::200", "a whole number in column MovieID", "' 9'"),
    ("ratings.dat", 4, "7::9::3::0x1F", "a whole number in column Timestamp", "'0x1F'"),
    ("ratings.dat", 4, "7::9::3::-2", "a whole number in column Timestamp", "'-2'"),
    ("ratings.dat", 4, "7::9::3::" + "9" * 20, "a whole number in column Timestamp", "'999"),
    ("ratings.dat", 4, "7::9::3::2é", "a whole number in column Timestamp", "'2é'"),
    ("ratings.dat", 4, "7::9::0::200", "a Rating of 1..5", "0"),
    ("ratings.dat", 4, "7::9::6::200", "a Rating of 1..5", "6"),
    ("ratings.dat", 4, "8::9::3::200", "a UserID of users.dat", "8"),
    ("ratings.dat", 4, "7::11::3::200", "a MovieID of movies.dat", "11"),
    ("ratings.dat", 4, "7::2::3::9", "each pair of user and movie once", "user 7 and movie 2 of"),
    ("ratings.dat", 10, "", "4 columns", "1 in ''"),
]


@pytest.mark.parametrize(("name", "line", "text", "expected", "got"), BAD_LINES)
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_bad_line_is_named(
    tmp_path: Path, name: str, line: int, text: str, expected: str, got: str, zipped: bool
) -> None:
    changed = {name.removesuffix(".dat"): with_line(name, line, text)}
    path = write_folder(tmp_path / "ml-1m", **changed)
    where = str(path / name)
    if zipped:
        path = write_zip(tmp_path / "ml-1m.zip", path)
        where = f"{path}:ml-1m/{name}"
    with pytest.raises(DataError) as caught:
        read_movielens(path)
    message = str(caught.value)
    assert message.startswith(f"{where}, line {line}: expected ")
    before, after = message.split(", got ", 1)
    assert expected in before
    assert after.startswith(got)
    assert "Correct it, or restore the official file" in after


def test_the_first_of_several_bad_lines_is_named(tmp_path: Path) -> None:
    lines = list(LINES["ratings.dat"])
    lines[2], lines[7] = "10::9::x::50", "broken"
    path = write_folder(tmp_path, ratings=("\n".join(lines) + "\n").encode())
    with pytest.raises(DataError, match=r"ratings\.dat, line 3: .* column Rating, got 'x'"):
        read_movielens(path)


def test_repeated_pair_names_both_lines(tmp_path: Path) -> None:
    path = write_folder(tmp_path, ratings=with_line("ratings.dat", 9, "3::6::1::99"))
    with pytest.raises(DataError, match=r"line 9: .*user 3 and movie 6 of line 7 again"):
        read_movielens(path)


@pytest.mark.parametrize("stem", ["users", "movies", "ratings"])
@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n \n"])
def test_empty_file(tmp_path: Path, stem: str, content: bytes) -> None:
    path = write_folder(tmp_path, **{stem: content})
    with pytest.raises(DataError, match=rf"{stem}\.dat, line 1: .*got an empty file"):
        read_movielens(path)


@pytest.mark.parametrize("stem", ["users", "movies", "ratings"])
def test_file_cut_inside_its_last_line(tmp_path: Path, stem: str) -> None:
    lines = LINES[f"{stem}.dat"]
    # Only the newline is gone: a number cut in half could look the same.
    path = write_folder(tmp_path, **{stem: "\n".join(lines).encode("latin-1")})
    with pytest.raises(DataError, match=rf"{stem}\.dat, line {len(lines)}: .*may be cut short"):
        read_movielens(path)


@pytest.mark.parametrize("stem", ["users", "movies", "ratings"])
def test_missing_file(tmp_path: Path, stem: str) -> None:
    folder = write_folder(tmp_path / "ml-1m")
    (folder / f"{stem}.dat").unlink()
    with pytest.raises(DataError, match=rf"{stem}\.dat: expected a readable file, got No such"):
        read_movielens(folder)


def test_text_encoded_anew(tmp_path: Path) -> None:
    utf8 = ("\n".join(LINES["movies.dat"]) + "\n").encode("utf-8")
    path = write_folder(tmp_path / "a", movies=utf8)
    with pytest.raises(DataError, match=r"movies\.dat, line 3: .*got UTF-8\. Convert it with"):
        read_movielens(path)
    path = write_folder(tmp_path / "b", users=b"\xef\xbb\xbf" + with_line("users.dat", 2, "x"))
    with pytest.raises(DataError, match=r"users\.dat, line 1: .*got UTF-8"):
        read_movielens(path)
    utf16 = ("\n".join(LINES["ratings.dat"]) + "\n").encode("utf-16")
    path = write_folder(tmp_path / "c", ratings=utf16 + b"\n")
    with pytest.raises(DataError, match=r"ratings\.dat, line 1: .*control byte b'\\x00'"):
        read_movielens(path)


@pytest.mark.parametrize(
    ("name", "encoding", "before"),
    [
        ("movies.dat", "utf-8", b""),
        ("movies.dat", "utf-8", b"\xef\xbb\xbf"),
        ("users.dat", "utf-8", b"\xef\xbb\xbf"),
        ("ratings.dat", "utf-8", b"\xef\xbb\xbf"),
        ("movies.dat", "utf-16", b""),
        ("ratings.dat", "utf-16", b""),
    ],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_the_remedy_converts_the_file(
    tmp_path: Path, name: str, encoding: str, before: bytes, zipped: bool
) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed")
    folder = write_folder(tmp_path / "ml-1m")
    text = (folder / name).read_text("latin-1")
    (folder / name).write_bytes(before + text.encode(encoding))
    path = write_zip(tmp_path / "ml-1m.zip", folder) if zipped else folder
    with pytest.raises(DataError, match=rf"{name}, line \d: expected latin-1 text") as caught:
        read_movielens(path)
    command = re.search("`(.*)`", str(caught.value))
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, cwd=folder)
    assert_is_the_made_up_set(read_movielens(folder))


def drop_end(raw: bytes) -> bytes:
    return raw[: len(raw) * 2 // 3]


def flip_content(raw: bytes) -> bytes:
    at = raw.index(b"ml-1m/users.dat") + 40
    return raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (drop_end, "a zip that is damaged or cut short"),
        (flip_content, "a zip that is damaged or cut short"),
        (lambda raw: b"", "an empty file"),
        (lambda raw: b"<html>404</html>", "a file that starts with b'<html>40'"),
    ],
)
def test_damaged_zip(tmp_path: Path, damage: Callable[[bytes], bytes], got: str) -> None:
    path = write_zip(tmp_path / "ml-1m.zip", write_folder(tmp_path / "ml-1m"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        read_movielens(path)
    assert f"{path}: expected ml-1m.zip or the folder it unpacks to, got {got}" in str(caught.value)
    assert "Download it again." in str(caught.value)


def test_no_cut_of_a_zip_is_half_read(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "ml-1m.zip", write_folder(tmp_path / "ml-1m")).read_bytes()
    path = tmp_path / "cut.zip"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.zip"):
            read_movielens(path)


def test_no_changed_byte_of_a_zip_goes_unseen(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "ml-1m.zip", write_folder(tmp_path / "ml-1m")).read_bytes()
    path = tmp_path / "changed.zip"
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            assert_is_the_made_up_set(read_movielens(path))  # dates and modes do not matter
        except DataError:
            refused += 1
    assert refused > len(whole) // 2


def test_zip_without_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-1m/users.dat", "1::F::1::10::48067\n")
    with pytest.raises(DataError, match=r"expected ml-1m/movies\.dat in the zip, got only \['ml"):
        read_movielens(path)


def test_no_such_path_and_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: expected a readable file, got No such file"):
        read_movielens(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"in this folder, got \['notes\.txt'\]"):
        read_movielens(str(tmp_path))


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "maskmoe_kernels\[data\]"'):
        read_movielens(write_folder(tmp_path))
