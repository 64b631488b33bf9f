"""The MovieLens reader on made-up files, whole and damaged, and on the real set where present."""

from __future__ import annotations

import gzip
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.movielens.baselines import most_popular
from maskmoe_kernels.experiments.movielens.data.negatives import (
    draw_negatives,
    read_fixed_negatives,
    sample_training_pairs,
)
from maskmoe_kernels.experiments.movielens.data.reader import read_movielens
from maskmoe_kernels.experiments.movielens.data.split import Split, leave_one_out
from maskmoe_kernels.experiments.movielens.data.tables import GENRES, MovieLens
from maskmoe_kernels.experiments.shared.metrics import hit_rate, leave_one_out_ranks, ndcg

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "ml-1m"

# Ids are neither sorted nor dense, one movie is never rated, timestamps tie and are unsorted.
LINES = {
    "users.dat": ["10::F::1::10::48067", "7::M::56::20::70072", "3::M::25::0::55117-1234"],
    "movies.dat": [
        "5::Toy Story (1995)::Animation|Children's|Comedy",
        "2::Star Wars: Episode IV (1977)::Action|Sci-Fi",
        "9::Misérables, Les (1995)::Drama|Musical",
        "4::Heat (1995)::Action|Crime|Thriller",
        "8::Never Seen (2000)::Western",
        "6::Café (1993)::Comedy",
    ],
    "ratings.dat": [
        "7::2::5::100",
        "7::5::4::300",
        "10::9::3::50",
        "7::9::3::200",
        "10::2::1::70",
        "10::4::2::70",
        "3::6::5::10",
        "3::4::5::10",
        "3::2::5::10",
        "10::5::5::60",
    ],
}
NEGATIVES = ["(7,5)\t4", "(10,4)\t6", "(3,2)\t5"]


def write_folder(folder: Path, **changed: bytes) -> Path:
    """The made-up set; ``changed`` replaces the bytes of ``users``, ``movies`` or ``ratings``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in LINES.items():
        content = changed.get(name.removesuffix(".dat"))
        if content is None:
            content = ("\n".join(lines) + "\n").encode("latin-1")
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, folder: Path, prefix: str = "ml-1m/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in LINES:
            archive.write(folder / name, prefix + name)
    return path


def with_line(name: str, line: int, text: str) -> bytes:
    lines = list(LINES[name])
    lines[line - 1] = text
    return ("\n".join(lines) + "\n").encode("latin-1")


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


# --- split


def test_last_item_is_tested(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    # User 10: two items at the latest time, the lower one in the file; user 3: all at one time.
    assert split.test.tolist() == [3, 0, 1]


def test_split_is_a_partition(data: MovieLens) -> None:
    chosen: list[set[int]] = [set(), set(), set()]
    for seed in range(40):
        split = leave_one_out(data, seed)
        train = list(zip(split.train_users.tolist(), split.train_items.tolist(), strict=True))
        held = [*enumerate(split.validation.tolist()), *enumerate(split.test.tolist())]
        everything = list(zip(data.users.tolist(), data.items.tolist(), strict=True))
        assert sorted(train + held) == sorted(everything)
        assert train == [pair for pair in everything if pair in train]  # file order
        for user, item in enumerate(split.validation.tolist()):
            chosen[user].add(item)
    assert chosen == [{0, 1, 2}, {1, 2}, {3, 5}]  # every item but the last has its turn


def test_split_depends_on_the_seed_alone(data: MovieLens) -> None:
    first = [leave_one_out(data, seed).validation.tolist() for seed in range(8)]
    again = [leave_one_out(data, seed).validation.tolist() for seed in range(8)]
    assert first == again
    assert len({tuple(v) for v in first}) > 1


def test_interactions(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    rows = [set(row.nonzero().flatten().tolist()) for row in split.interacted]
    assert rows == [{0, 1, 2, 3}, {0, 1, 2}, {1, 3, 5}]
    for user, row in enumerate(split.interacted_train):
        held = {int(split.validation[user]), int(split.test[user])}
        assert set(row.nonzero().flatten().tolist()) == rows[user] - held


def test_user_with_two_ratings_cannot_be_split(tmp_path: Path) -> None:
    lines = [line for line in LINES["ratings.dat"] if line != "3::4::5::10"]
    data = read_movielens(write_folder(tmp_path, ratings=("\n".join(lines) + "\n").encode()))
    with pytest.raises(DataError, match=r"user 3 has 2 ratings .* at least 3"):
        leave_one_out(data, seed=0)


def test_most_popular_counts_all_but_the_test_items(data: MovieLens) -> None:
    held, test = torch.tensor([3, 4]), torch.tensor([5, 0])
    split = Split(torch.tensor([0, 1, 0]), torch.tensor([1, 1, 4]), held, test, data.num_items)
    assert most_popular(split, data.num_items).tolist() == [0, 2, 0, 1, 2, 0]


# --- negatives


def test_drawn_negatives_are_the_only_ones_possible(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    for seed in range(10):
        drawn = draw_negatives(data, split, seed, per_user=1)
        assert drawn[0].tolist() == [5]  # all else was rated by user 10, or by nobody
        assert drawn[1].item() in {3, 5}
        assert drawn[2].item() in {0, 2}


def test_drawn_negatives_are_distinct_and_uniform(tmp_path: Path) -> None:
    movies = "".join(f"{m}::M (2000)::War\n" for m in range(12)).encode()
    ratings = "".join(f"{7 + 3 * (m > 6)}::{m}::1::1\n" for m in range(11)) + "3::9::1::1\n"
    ratings += "3::10::1::1\n3::8::1::1\n"
    data = read_movielens(write_folder(tmp_path, movies=movies, ratings=ratings.encode()))
    split = leave_one_out(data, seed=0)
    count = torch.zeros(12)
    for seed in range(600):
        drawn = draw_negatives(data, split, seed, per_user=4)
        assert all(len(set(row)) == 4 for row in drawn.tolist())
        assert not split.interacted.gather(1, drawn).any()
        count += torch.bincount(drawn[2], minlength=12)
    assert count[8:].tolist() == [0, 0, 0, 0]  # rated by user 3, or by nobody
    # Each of 8 is drawn with probability 1/2: 300 times, with a deviation of 12.2.
    assert (count[:8] - 300).abs().max() < 5 * 12.2
    assert torch.equal(draw_negatives(data, split, 5, 4), draw_negatives(data, split, 5, 4))


def test_too_few_movies_to_draw_from(data: MovieLens) -> None:
    with pytest.raises(DataError, match=r"user 10 leaves 1 rated movies .* 2 negatives"):
        draw_negatives(data, leave_one_out(data, seed=0), seed=0, per_user=2)


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


# --- training pairs


def sample(data: MovieLens, split: Split, seed: int, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return sample_training_pairs(
        split, split.interacted_train, data.rated_items, ratio, generator=generator
    )


def test_an_epoch_of_training_pairs(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    users, items, target = sample(data, split, seed=1, ratio=300)
    assert target.dtype == torch.float32
    positive = target == 1
    assert sorted(zip(users[positive].tolist(), items[positive].tolist(), strict=True)) == sorted(
        zip(split.train_users.tolist(), split.train_items.tolist(), strict=True)
    )
    # 300 negatives for each positive, uniform over the rated movies outside training.
    for user in range(data.num_users):
        own = split.interacted_train[user]
        allowed = [i for i in data.rated_items.tolist() if not own[i]]
        draws = torch.bincount(items[~positive & (users == user)], minlength=data.num_items)
        total = 300 * int(own.sum())
        share = 1 / len(allowed)
        assert int(draws.sum()) == total == int(draws[allowed].sum())
        assert (draws[allowed] - total * share).abs().max() < 5 * (total * share) ** 0.5
        assert draws[split.test[user]] > 0  # held-out items are not given away by their absence


def test_epochs_are_shuffled_fresh_and_seeded(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    assert all(map(torch.equal, sample(data, split, 3, 50), sample(data, split, 3, 50)))
    generator = torch.Generator().manual_seed(3)
    taken, rated = split.interacted_train, data.rated_items
    first = sample_training_pairs(split, taken, rated, 50, generator=generator)
    second = sample_training_pairs(split, taken, rated, 50, generator=generator)
    assert all(map(torch.equal, first, sample(data, split, 3, 50)))
    assert not torch.equal(first[1], second[1])
    place = first[2].nonzero().flatten()
    assert place.max() - place.min() > len(place)  # the positives do not stand together


def test_no_negative_exists(data: MovieLens) -> None:
    split = leave_one_out(data, seed=0)
    generator = torch.Generator().manual_seed(0)
    taken = split.interacted_train.clone()
    taken[1] = True
    with pytest.raises(ValueError, match=r"user row 1 has all 5 candidates"):
        sample_training_pairs(split, taken, data.rated_items, generator=generator)
    users, items, target = sample_training_pairs(
        split, taken, data.rated_items, 0, generator=generator
    )
    assert target.tolist() == [1.0] * len(split.train_users)
    assert sorted(items.tolist()) == sorted(split.train_items.tolist())
    assert sorted(users.tolist()) == sorted(split.train_users.tolist())
    with pytest.raises(ValueError, match=r"ratio must be at least 0, got -1"):
        sample_training_pairs(split, taken, data.rated_items, -1, generator=generator)


# --- the real data set


@pytest.fixture(scope="module")
def real() -> MovieLens:
    if not (REAL / "ml-1m.zip").is_file():
        pytest.skip("MovieLens-1M may not be redistributed and is not beside this repository")
    return read_movielens(REAL)


@pytest.fixture(scope="module")
def real_split(real: MovieLens) -> Split:
    return leave_one_out(real, seed=0)


def test_real_data_is_complete(real: MovieLens) -> None:
    assert (len(real.users), real.num_users, real.num_items) == (1_000_209, 6_040, 3_883)
    assert len(real.rated_items) == 3_706
    assert real.titles[0] == "Toy Story (1995)"
    assert int(real.sex.sum()) == 4_331  # the official counts: 4,331 men and 1,709 women
    assert (int(real.year.min()), int(real.year.max())) == (1919, 2000)
    assert int(real.genres[:, GENRES.index("Drama")].sum()) == 1_603


def test_most_popular_has_its_known_figures(real: MovieLens, real_split: Split) -> None:
    negatives = read_fixed_negatives(REAL / "ncf-test-negatives.tsv.gz", real, real_split)
    own_positive = negatives == real_split.test[:, None]
    assert int(own_positive.any(1).sum()) == 156
    assert not (real_split.interacted.gather(1, negatives) & ~own_positive).any()
    score = most_popular(real_split, real.num_items)
    ranks = leave_one_out_ranks(score[real_split.test], score[negatives], own_positive)
    assert hit_rate(ranks) == pytest.approx(0.453, abs=0.0005)
    assert ndcg(ranks) == pytest.approx(0.254, abs=0.0005)


def test_real_training_epoch(real: MovieLens, real_split: Split) -> None:
    users, items, target = sample(real, real_split, seed=0, ratio=4)
    positive = target == 1
    assert int(positive.sum()) == len(real_split.train_users) == 1_000_209 - 2 * 6_040
    assert len(target) == 5 * int(positive.sum())
    assert torch.equal(real_split.interacted_train[users, items], positive)


def test_real_drawn_negatives(real: MovieLens, real_split: Split) -> None:
    drawn = draw_negatives(real, real_split, seed=0)
    assert drawn.shape == (6_040, 99)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    assert not real_split.interacted.gather(1, drawn).any()
    assert torch.isin(drawn, real.rated_items).all()
