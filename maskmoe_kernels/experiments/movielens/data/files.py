"""The files of MovieLens-1M: read whole and bounded, with errors that name file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.compression import compression_of, unpack_remedy

RESTORE = (
    "Correct it, or restore the official file from https://grouplens.org/datasets/movielens/1m/."
)
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # little endian, big endian
# What the unpackers raise on damage: ValueError for a bad offset, RuntimeError for a bad flag.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
#: Largest file that is read, packed or unpacked; the official ratings.dat has 24.6 MB.
LIMIT = 256 << 20
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class DataFile:
    """The bytes of one data file and the name by which errors call it."""

    name: str
    data: bytes

    def error(
        self, line: int | None, expected: str, got: object, remedy: str = RESTORE
    ) -> DataError:
        where = self.name if line is None else f"{self.name}, line {line}"
        return DataError(f"{where}: expected {expected}, got {got}. {remedy}")

    def text(self) -> bytes:
        """The bytes with newline line ends; raises on an empty or cut file, and on UTF-16."""
        if not self.data.strip():
            raise self.error(1, "at least one line", "an empty file")
        if self.data.startswith(_UTF16):
            got = f"UTF-16, where every other byte is the control byte {bytes(1)!r}"
            raise self.error(1, "latin-1 text", got, self._conversion("utf-16"))
        data = self.data.replace(b"\r\n", b"\n")
        # Without a last newline, a number that is cut short would look complete.
        if not data.endswith(b"\n"):
            count = data.count(b"\n") + 1
            remedy = "It may be cut short; if it is whole, end it with a newline."
            raise self.error(count, "a newline at the end of the last line", "none", remedy)
        return data

    def latin1_lines(self) -> Iterator[str]:
        """Decoded lines; raises on control characters and on text re-encoded as UTF-8."""
        data = self.text()
        if control := _CONTROL.search(data):
            line = data.count(b"\n", 0, control.start()) + 1
            raise self.error(line, "latin-1 text", f"the control byte {control.group()!r}")
        accented = re.search(rb"[^\x00-\x7f]", data)
        if accented and (data.startswith(_BOM) or _is_utf8(data)):
            line = data.count(b"\n", 0, accented.start()) + 1
            got = "UTF-8 with a byte order mark" if data.startswith(_BOM) else "UTF-8"
            raise self.error(line, "latin-1 text", got, self._conversion("utf-8"))
        # A generator: a list of all lines would take many times the memory of the file.
        return (line[:-1].decode("latin-1") for line in io.BytesIO(data))

    def _conversion(self, encoding: str) -> str:
        """How to make latin-1 text of this file."""
        name = shlex.quote(re.split(r"[/:]", self.name)[-1])
        command = f"iconv -f {encoding} -t latin1 {name} > latin1.tmp && mv latin1.tmp {name}"
        # latin-1 has no byte order mark; iconv removes the one of UTF-16 itself.
        if self.data.startswith(_BOM):
            body = self.data[len(_BOM) :]
            convert = f" | iconv -f {encoding} -t latin1" if not body.isascii() else ""
            command = f"tail -c +4 {name}{convert} > latin1.tmp && mv latin1.tmp {name}"
        return (
            f"Convert it with `{command}` in its (unzipped) folder, or restore the official file."
        )

    def rows(self, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
        """Line numbers from 1 and their ``::``-separated fields, exactly one a column."""
        for line, text in enumerate(self.latin1_lines(), start=1):
            fields = text.split("::")
            if len(fields) != len(columns):
                expected = f"{len(columns)} columns {'::'.join(columns)}"
                raise self.error(line, expected, f"{len(fields)} in {text!r}")
            yield line, fields

    def integer(self, line: int, column: str, text: str) -> int:
        # At most 18 digits: every such number fits int64.
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise self.error(line, f"a whole number in column {column}", repr(text))
        return int(text)


def read_container(path: Path, names: Sequence[str]) -> dict[str, DataFile]:
    """The files of these names as bytes, all read before any is parsed.

    Args:
        path: ``ml-1m.zip``, the folder it unpacks to, or a folder that holds either.
        names: Which files.

    Raises:
        DataError: The path is no such thing, or a file is missing or damaged.
    """
    if path.is_dir():
        for folder in (path, path / "ml-1m"):
            if any((folder / name).exists() for name in names):
                return {name: _read_plain(folder / name) for name in names}
        if (path / "ml-1m.zip").is_file():
            return _read_zip(path / "ml-1m.zip", names)
        raise DataError(
            f"{path}: expected {', '.join(names)} or ml-1m.zip in this folder, "
            f"got {sorted(entry.name for entry in path.iterdir())[:8]}. {RESTORE}"
        )
    return _read_zip(path, names)


def _read_plain(path: Path) -> DataFile:
    try:
        with path.open("rb") as file:
            return DataFile(str(path), _bounded(file, str(path), path.stat().st_size))
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable file, got {error.strerror}. {RESTORE}"
        ) from error


def _read_zip(path: Path, wanted: Sequence[str]) -> dict[str, DataFile]:
    whole = _read_plain(path)
    try:
        with zipfile.ZipFile(io.BytesIO(whole.data)) as archive:
            names = set(archive.namelist())
            prefix = "ml-1m/" if any(f"ml-1m/{name}" in names for name in wanted) else ""
            # read() verifies each file's checksum.
            files = {
                name: _unpacked(archive, prefix + name, f"{path}:{prefix}{name}")
                for name in wanted
                if prefix + name in names
            }
    except DataError:
        raise
    except _DAMAGE as error:
        if not whole.data:
            got = "an empty file"
        elif not whole.data.startswith(b"PK"):
            got = f"a file that starts with {whole.data[:8]!r}"
        else:
            got = f"a zip that is damaged or cut short ({error})"
        expected = "ml-1m.zip or the folder it unpacks to"
        raise whole.error(None, expected, got, "Download it again.") from error
    for name in wanted:
        if name not in files:
            raise whole.error(None, f"{prefix}{name} in the zip", f"only {sorted(names)[:8]}")
    return files


def _unpacked(archive: zipfile.ZipFile, member: str, name: str) -> DataFile:
    with archive.open(member) as file:
        return DataFile(name, _bounded(file, name, archive.getinfo(member).file_size))


def _bounded(file: IO[bytes], name: str, declared: int) -> bytes:
    """All bytes of an open file: not more than ``LIMIT``, whatever size it declares to have.

    Raises:
        DataError: It holds more.
    """
    data = b"" if declared > LIMIT else file.read(LIMIT + 1)
    if declared > LIMIT or len(data) > LIMIT:
        got = max(declared, len(data))
        raise DataError(
            f"{name}: expected at most {LIMIT:,} bytes, unpacked, got {got:,} or more. {RESTORE}"
        )
    return data


def read_packed(path: Path) -> DataFile:
    """A text file, plain or compressed by gzip, bzip2, xz or zip; without its byte order mark.

    Raises:
        DataError: It is missing, damaged, of another format, or no text.
    """
    file = _read_plain(path)
    if (compression := compression_of(file.data)) is not None:
        file = _unpack(file, path, compression)
    if file.data.startswith(_UTF16):
        command = f"iconv -f utf-16 -t utf-8 {shlex.quote(str(path))} > utf8.txt"
        remedy = f"Convert it with `{command}`, and name utf8.txt."
        raise file.error(1, "text of one byte a character", "UTF-16", remedy)
    if file.data[:512].lstrip().startswith((b"<!", b"<html", b"<HTML")):
        remedy = "Download the raw file, not the page that shows it."
        raise file.error(1, "a text file", "a web page", remedy)
    return DataFile(file.name, file.data.removeprefix(_BOM))


_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], io.BufferedIOBase]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def _unpack(file: DataFile, path: Path, compression: str) -> DataFile:
    """The only file in a compressed file."""
    if compression not in (*_DECOMPRESSORS, "zip"):
        readable = "a text file, plain or compressed by gzip, bzip2, xz or zip"
        remedy = unpack_remedy(compression, path, f"{path.stem}.txt")
        raise file.error(None, readable, f"a {compression} file", remedy)
    try:
        if compression == "zip":
            unpacked = _only_member(file, path)
        else:
            stream = _DECOMPRESSORS[compression](io.BytesIO(file.data))
            with io.BufferedReader(stream) as packed:
                unpacked = DataFile(file.name, _bounded(packed, file.name, 0))
    except DataError:
        raise
    except _DAMAGE as error:
        got = f"one that is damaged or cut short ({error})"
        raise file.error(None, f"a whole {compression} file", got, "Fetch it again.") from error
    if (inner := compression_of(unpacked.data)) is not None:
        got = f"a {inner} file in a {compression} file"
        remedy = unpack_remedy("tar" if inner == "tar" else compression, path, "unpacked")
        raise file.error(None, "a text file, compressed once", got, remedy)
    return unpacked


def _only_member(file: DataFile, path: Path) -> DataFile:
    """The one file in a zip, beside folders and what macOS adds."""
    with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
        names = [n for n in archive.namelist() if n[-1] != "/" and not n.startswith("__MACOSX/")]
        if len(names) != 1:
            remedy = unpack_remedy("zip", path, "")
            raise file.error(None, "one file in the zip", f"{len(names)}: {names[:8]}", remedy)
        return _unpacked(archive, names[0], f"{file.name}:{names[0]}")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
