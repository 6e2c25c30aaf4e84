"""What belongs to one process: file descriptors, handles and locks that must not cross a fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from gigaxt.errors import ImageError

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value that every process makes for itself on first use; a forked child drops what it inherited.

    Needs no lock (a lock may be held by another thread at the moment of a fork): `dict.setdefault` is atomic, so of
    two threads that make the value at once, both get the same one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """This process's value, made now if there is none yet."""
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            value = self._values.setdefault(pid, self._make())
            for other in [key for key in self._values if key != pid]:
                self._values.pop(other, None)
        return value

    def drop(self) -> None:
        """Forget the value; the next `get` makes a new one."""
        self._values.pop(os.getpid(), None)


class Descriptor:
    """An open file that is read by position, so that threads share it without a lock. Closed when nobody holds it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        try:
            self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ImageError(path, f"cannot be opened: {error.strerror or error}") from error
        self.size = os.fstat(self.number).st_size

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class File:
    """A file opened lazily in each process.

    Args:
        path: what to open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._descriptor = PerProcess(lambda: Descriptor(self.path))

    @property
    def size(self) -> int:
        """Bytes of the file when this process opened it."""
        return self._descriptor.get().size

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`.

        Raises:
            ImageError: the file ends before that.
        """
        descriptor = self._descriptor.get()  # held while reading: another thread may drop it
        data = os.pread(descriptor.number, count, offset)
        while len(data) < count:  # a signal, a network file system, or 2 GiB at once may cut a read short
            more = os.pread(descriptor.number, count - len(data), offset + len(data))
            if not more:
                raise self._ended(offset, count, len(data))
            data += more
        return data

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a contiguous byte view from `offset` on.

        Raises:
            ImageError: the file ends before that.
        """
        descriptor = self._descriptor.get()
        done, count = 0, len(view)
        while done < count:
            got = os.preadv(descriptor.number, [view[done:]], offset + done)
            if not got:
                raise self._ended(offset, count, done)
            done += got

    def _ended(self, offset: int, count: int, got: int) -> ImageError:
        return ImageError(self.path, f"expected {count} bytes at {offset}, the file ended after {got}: it is truncated")


def file_identity(name: str) -> tuple[str, int, int] | None:
    """A file's path, time and size; None for what is no single file."""
    path = Path(name)
    try:
        stat = path.stat() if path.is_file() else None
    except (OSError, ValueError):
        return None
    return None if stat is None else (str(path), stat.st_mtime_ns, stat.st_size)
