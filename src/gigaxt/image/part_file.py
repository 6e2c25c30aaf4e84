"""A file that has another name until it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import weakref
from pathlib import Path

from gigaxt.errors import ImageError


class PartFile:
    """Bytes appended by several threads to `path + ".part"`, which becomes `path` in one step or vanishes.

    An older file under the final name stays until then, whatever happens. A PartFile that is dropped without `commit`
    removes its .part; a killed process leaves it, and the next writer of the same path starts it anew.

    Args:
        path: the final name; its folder must exist.

    Raises:
        ImageError: from every method, when the system refuses; the first refusal is repeated by all later calls.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._part = path.parent / f"{path.name}.part"  # `.` has no name, and is refused below
        self._lock = threading.Lock()
        self._failure: ImageError | None = None
        try:
            if not path.parent.is_dir():
                raise ImageError(path, f"expected an existing folder, got {path.parent}: make it first")
            if path.is_dir():
                raise ImageError(path, "expected the name of a file, got a folder")
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ImageError(self._part, f"cannot be created ({error.strerror})") from error
        self._discard = weakref.finalize(self, _discard, self._fd, self._part, os.getpid())

    def append(self, data: bytes, *, align: int = 1) -> int:
        """Write `data` at the end, at an offset that is a multiple of `align`, and return that offset."""
        with self._lock:
            offset = self.size + -self.size % align
            self._write(data, offset)
            self.size = offset + len(data)
            return offset

    def rewrite(self, data: bytes, offset: int) -> None:
        """Replace bytes that were written before."""
        with self._lock:
            self._write(data, offset)

    def commit(self) -> None:
        """Bring everything to the disk and give the file its final name."""
        with self._lock:
            self._check_open()
            try:
                os.fsync(self._fd)
                self._part.replace(self.path)
            except OSError as error:
                raise self._failed(error, 0) from error
            self._discard.detach()
            os.close(self._fd)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the unfinished file. Does nothing after `commit` or a second time."""
        with self._lock:
            self._discard()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._discard.alive:
            raise ImageError(self.path, "expected a file that is being written, got one that is complete or given up")

    def _write(self, data: bytes, offset: int) -> None:
        self._check_open()
        rest = memoryview(data)
        while rest:
            try:
                written = os.pwrite(self._fd, rest, offset)
            except OSError as error:
                raise self._failed(error, len(rest)) from error
            rest, offset = rest[written:], offset + written

    def _failed(self, error: OSError, needed: int) -> ImageError:
        """Give up: free the disk at once, and remember why."""
        cause = f"cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.path.parent).free
                cause = (
                    f"disk full after {self.size:,} bytes: {needed:,} more were needed at once and {free:,} are free in"
                    f" {self.path.parent}; free some space or write elsewhere. The unfinished file was removed"
                )
        self._failure = ImageError(self.path, cause)
        self._discard()
        return self._failure


def _discard(fd: int, part: Path, pid: int) -> None:
    """Close and remove; in a forked child only close, for the file is the parent's."""
    os.close(fd)
    if os.getpid() == pid:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
