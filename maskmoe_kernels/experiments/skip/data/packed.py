"""Opens source files, decompressed where they are compressed."""

from __future__ import annotations

import lzma
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.shared.compression import compression_of, unpack_remedy

#: How the names of files in a folder end that are taken for csv files.
ENDINGS = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".csv.lz4")
#: How the names of parquet and arrow files end, which have rows instead of lines.
ROW_ENDINGS = (".parquet", ".arrow", ".feather")
_CODECS = {None: None, "gzip": "gzip", "bzip2": "bz2", "zstd": "zstd", "lz4": "lz4"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def stem(path: Path) -> str:
    """The name of a file without its endings."""
    for ending in sorted((*ENDINGS, *ROW_ENDINGS), key=len, reverse=True):
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.name


@contextmanager
def open_unpacked(path: Path) -> Iterator[Callable[[int], bytes]]:
    """Open a file for reading; how it is compressed is read from its content, not from its name.

    Returns:
        A function that reads up to so many decompressed bytes, and none at the end of the file.
    Raises:
        DataError: The file is missing, damaged, or of a format that is not read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith(_UTF16):
            command = f"iconv -f utf-16 -t utf-8 {shlex.quote(str(path))} > {stem(path)}.utf8.csv"
            raise DataError(
                f"{path}: expected UTF-8 text, got UTF-16. Convert it with `{command}`, and name "
                "the new file."
            )
        compression = compression_of(head)
        if compression == "xz":
            with lzma.open(path) as stream:
                yield stream.read
        elif compression in _CODECS:
            with pa.input_stream(str(path), compression=_CODECS[compression]) as stream:
                yield stream.read
        else:
            remedy = unpack_remedy(str(compression), path, f"{stem(path)}.csv")
            raise DataError(
                f"{path}: expected a csv file, plain or compressed by gzip, bzip2, xz, zstd or "
                f"lz4, got a {compression} file. {remedy}"
            )
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: expected a readable csv file, whole where it is compressed, got {error}. "
            "Download it again."
        ) from error
