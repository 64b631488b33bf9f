"""Atomic files: written under a temporary name in the same folder, then renamed.

On a POSIX file system, :func:`replacing` guarantees:

- A reader finds the old file or the complete new one, also after a kill or a power cut: the bytes
  are on the disk before the rename, and the rename is before :func:`replacing` returns.
- If anything fails (a full disk, Ctrl-C), the old file stays and the temporary file is removed.
- Several processes may write one path; the last rename wins.
- The temporary name is random and must be new: a symbolic link of that name is not followed.
- Permissions are those of the file that is replaced, else 666 less the umask. A path that is a
  symbolic link becomes a file; the target of the link stays as it is.

A kill may leave a temporary file. Its writer holds a lock on it (``flock``), which ends with the
process: :func:`claim` removes temporary files that no process holds.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows needs no lock: an open file cannot be removed there
    fcntl = None  # type: ignore[assignment]

#: How the name of every temporary file begins.
UNFINISHED = ".unfinished-"
_CHUNK = 1 << 20

_REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left in this user's quota",
    errno.EFBIG: "it grows beyond the largest file allowed here",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the disk can only be read",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EISDIR: "there is a folder of this name",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "expected a folder, got a file",
    errno.ENOENT: "no folder can be made there",
}
_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that replaces ``path`` when the block ends without an error.

    Missing folders are made. The guarantees are listed at the top of this module.

    Raises:
        OSError: It cannot be written; the message names the path, the reason and the remedy.
    """
    path = Path(path)
    with _explained(path):
        make_folder(path.parent)
        file = _Unfinished(path.parent)
    try:
        try:
            yield file  # type: ignore[misc]  # writers need no more than a RawIOBase
        finally:
            # Libraries replace an error of write() by their own, or drop it.
            if file.failure is not None:
                raise file.failure
        with _explained(path, file):
            file.move_to(path)
    except OSError as error:
        if error is not file.failure:
            raise
        raise _explanation(path, error, file) from None
    finally:
        file.remove()


def claim(folder: str | Path) -> Path:
    """Check that files can be written to a folder, and remove what killed runs left in it.

    Call it before long work, to find out early that its result cannot be written. A missing folder
    is made for the check and removed again: work that ends without a result leaves no folder.

    Raises:
        OSError: It is no folder, or nothing can be written there.
    """
    folder = Path(folder)
    with _explained(folder):
        made = make_folder(folder)
        for left in folder.glob(f"{UNFINISHED}*"):
            _remove_if_stale(left)
        _Unfinished(folder).remove()
        with suppress(OSError):  # another process uses it by now
            for place in made:
                place.rmdir()
    return folder


def make_folder(folder: Path) -> list[Path]:
    """Make a folder, synced to the disk, and return which folders were missing, deepest first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_folder(made.parent)
    return missing


def checksum(path: Path, start: int = 0, end: int | None = None) -> int:
    """CRC-32 of the bytes of a file from ``start`` to ``end``, or to the end of the file."""
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        left = os.fstat(file.fileno()).st_size - start if end is None else end - start
        while left > 0 and (data := file.read(min(left, _CHUNK))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
    return crc


class _Unfinished(io.RawIOBase):
    """A new, locked file with a temporary name, which keeps the error of a failed write.

    Attributes:
        name: The temporary path.
        failure: The error of the first ``write`` that failed.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.failure: BaseException | None = None
        self._descriptor, self._path = _create(folder)
        self.name = str(self._path)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def write(self, data: Any) -> int:
        """Write all of ``data``: some libraries ignore how much was written."""
        if self.failure is not None:
            raise self.failure
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.write(self._descriptor, view[done:])
        except BaseException as error:
            self.failure = error
            raise
        return done

    def move_to(self, path: Path) -> None:
        """Rename the file, once its bytes are on the disk."""
        if path.is_file() and not path.is_symlink():
            os.chmod(self._path, stat.S_IMODE(path.stat().st_mode))
        os.fsync(self._descriptor)
        if fcntl is None:
            self.close()  # Windows does not rename an open file
        os.replace(self._path, path)
        _sync_folder(path.parent)

    def remove(self) -> None:
        """Close the file, and remove it unless it was renamed."""
        with suppress(OSError):
            self._path.unlink()
        self.close()

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _create(folder: Path) -> tuple[int, Path]:
    """Descriptor and path of a new file, locked by this process."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        path = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            continue
        with suppress(OSError):  # on a file system without locks, claim() finds none either
            _lock(descriptor)
        # Before it was locked, another process may have removed it as a leftover.
        if os.fstat(descriptor).st_nlink or fcntl is None:
            return descriptor, path
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Take the lock of an open file.

    Raises:
        OSError: Another process has it, or there are no locks here.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_if_stale(path: Path) -> None:
    """Remove a temporary file unless a process holds its lock."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError):
        descriptor = os.open(path, flags)
        try:
            _lock(descriptor)
            if fcntl is None:
                os.close(descriptor)
            path.unlink()
        finally:
            if fcntl is not None:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can do that."""
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path, file: _Unfinished | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explanation(path, error, file) from None


def _explanation(path: Path, error: OSError, file: _Unfinished | None = None) -> OSError:
    """The same error for the user: the path, the reason, the free space, the remedy."""
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
    remedy = "Name another folder, or give leave to write to this one."
    if error.errno in _SPACE:
        remedy = "Free some space, or name a folder on another disk."
        with suppress(OSError):
            folder = next(place for place in (path, *path.parents) if place.is_dir())
            reason += f" ({shutil.disk_usage(folder).free:,} bytes are free"
            reason += f" after {file.tell():,} of this file)" if file is not None else ")"
    if error.errno == errno.EFBIG:
        remedy = "Raise the limit (ulimit -f), or name a folder on another disk."
    kept = (
        " The file that was there is as it was."
        if file is not None and os.path.isfile(path)
        else ""
    )
    told = OSError(f"{path}: cannot be written: {reason}. {remedy}{kept}")
    told.errno = error.errno
    return told
