"""Files that are whole or not there: written beside their place, then moved into it.

On a file system that keeps POSIX's promises, :func:`replacing` guarantees:

- Whoever opens the path finds the old file or the whole new one, also after a kill, and after a
  power cut: the bytes reach the disk before the new name does, and the name before it returns.
- Whatever goes wrong, a full disk and Ctrl-C included, the old file stays and nothing else does.
- Several processes may write one path; the last one to finish wins.
- The temporary name is new and leads nowhere: a link that waits under it is not followed.
- Permissions are those of the file that is replaced, else what the umask leaves of 666. A path that
  is a link becomes a file of its own; what the link led to stays as it is.

A kill may leave a temporary file. Its writer held a lock on it (``flock``), which ends with the
process: :func:`claim` removes what no living process writes to.
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
except ImportError:  # Windows, where a file that is open cannot be removed: lock enough
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
}
_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that takes the place of ``path`` when the block ends well.

    Folders that are missing are made. What it guarantees stands at the top of this module.

    Raises:
        OSError: It cannot be written; the message names the path, the reason and the remedy.
    """
    path = Path(path)
    with _explained(path):
        make_folder(path.parent)
        file = _Unfinished(path.parent)
    try:
        try:
            yield file  # type: ignore[misc]  # a RawIOBase is all that writers ask for
        finally:
            # Libraries turn an error of write() into their own, or lose it.
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
    """See that files can be written to a folder, and remove what killed runs left in it.

    Before long work: what would keep its result from being written is found here. A folder that is
    missing is made again by the first file: work that ends without one leaves none behind.

    Raises:
        OSError: It is no folder, or nothing can be written there.
    """
    folder = Path(folder)
    with _explained(folder):
        made = make_folder(folder)
        for left in folder.glob(f"{UNFINISHED}*"):
            _remove_if_stale(left)
        _Unfinished(folder).remove()
        with suppress(OSError):  # somebody else uses it by now
            for place in made:
                place.rmdir()
    return folder


def make_folder(folder: Path) -> list[Path]:
    """Make a folder to outlast a power cut, and return which were missing, deepest first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_folder(made.parent)
    return missing


def checksum(path: Path, start: int = 0, end: int | None = None) -> int:
    """CRC-32 of the bytes of a file from ``start`` to ``end``, or to where the file ends."""
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        left = os.fstat(file.fileno()).st_size - start if end is None else end - start
        while left > 0 and (data := file.read(min(left, _CHUNK))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
    return crc


class _Unfinished(io.RawIOBase):
    """A new, locked file with a temporary name, which remembers why a write failed.

    Attributes:
        name: The temporary path.
        failure: What the first ``write`` that failed raised.
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
        """Write all of ``data``: some libraries do not ask how much was taken."""
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
        """Give the file its name, once its bytes are on the disk."""
        if path.is_file() and not path.is_symlink():
            os.chmod(self._path, stat.S_IMODE(path.stat().st_mode))
        os.fsync(self._descriptor)
        if fcntl is None:
            self.close()  # Windows does not rename what is open
        os.replace(self._path, path)
        _sync_folder(path.parent)

    def remove(self) -> None:
        """Close the file, and remove it where it has not been moved."""
        with suppress(OSError):
            self._path.unlink()
        self.close()

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _create(folder: Path) -> tuple[int, Path]:
    """Descriptor and path of a new file that this process holds the lock of."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        path = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            continue
        with suppress(OSError):  # some network file systems have no locks, and claim() none to take
            _lock(descriptor)
        # Between its birth and the lock another process may have taken it for a leftover.
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
    """Remove a temporary file that no process writes to."""
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
    """Have the names in a folder reach the disk, where the system can do that."""
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
    """The same error in words for the user: the path, what is wrong, how much space, what to do."""
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
