"""Compressed files, recognised by how they begin and not by their names."""

from __future__ import annotations

import shlex
from pathlib import Path

_BEGINNINGS = {
    "gzip": (b"\x1f\x8b",),
    "bzip2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00", b"\x5d\x00\x00"),  # and its predecessor lzma, which xz reads too
    "zip": (b"PK\x03\x04", b"PK\x05\x06"),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "lz4": (b"\x04\x22\x4d\x18",),
    "7z": (b"7z\xbc\xaf\x27\x1c",),
    "rar": (b"Rar!\x1a\x07",),
}
# Compressors of one file, which write to standard output whatever the file is called.
_FILTERS = {"gzip": "gzip", "bzip2": "bzip2", "xz": "xz", "zstd": "zstd", "lz4": "lz4"}
_ARCHIVERS = {"zip": "unzip", "7z": "7z x", "rar": "unrar x", "tar": "tar -xf"}


def compression_of(data: bytes) -> str | None:
    """The format of a compressed file or archive from its first 512 bytes; None for any other."""
    for name, beginnings in _BEGINNINGS.items():
        if data.startswith(beginnings):
            return name
    return "tar" if data[257:262] == b"ustar" else None


def unpack_remedy(compression: str, path: str | Path, unpacked: str) -> str:
    """What to do about a file of a format that is not read here.

    Args:
        compression: From :func:`compression_of`.
        path: The file.
        unpacked: A name for what is in it.
    """
    name = shlex.quote(str(path))
    if compression in _ARCHIVERS:
        return (
            f"Unpack it with `{_ARCHIVERS[compression]} {name}`, and name the file that was in it."
        )
    command = f"{_FILTERS[compression]} -dc < {name} > {shlex.quote(unpacked)}"
    return f"Unpack it with `{command}`, and name {unpacked}."
