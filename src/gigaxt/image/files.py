"""Files that are read by position: opened once in each process, shared by threads without a lock."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gigaxt.errors import ImageError
from gigaxt.image.file_cache import FileCache, file_cache
from gigaxt.image.process import PerProcess

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER = 64 << 10  # bytes that a stream reads at once


class Descriptor:
    """An open file that is read by position, so that threads share it without a lock. Closed when nobody holds it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        try:
            self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ImageError(path, f"cannot be opened: {error.strerror or error}") from error
        except ValueError as error:  # a zero byte in the name
            raise ImageError(path, f"cannot be opened: {error}") from error
        self.size = os.fstat(self.number).st_size

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class File:
    """A file opened lazily in each process.

    Args:
        path: what to open.
        cached: whether what is read goes through the cache of files, where this process has one.
    """

    def __init__(self, path: str | Path, *, cached: bool = True) -> None:
        self.path, self.cached = str(path), cached
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
        cache = self._cache
        if cache is not None:
            data = cache.read(self.path, descriptor.number, offset, count)
            if len(data) < count:
                raise self._ended(offset, count, len(data))
            return data
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
        if self._cache is not None:
            view[:] = self.read(offset, count)
            return
        while done < count:
            got = os.preadv(descriptor.number, [view[done:]], offset + done)
            if not got:
                raise self._ended(offset, count, done)
            done += got

    def stream(self) -> io.BufferedReader:
        """The same for those who want a file object: with a position, for one thread."""
        return io.BufferedReader(_Raw(self), _BUFFER)

    @property
    def _cache(self) -> FileCache | None:
        return file_cache() if self.cached else None

    def _ended(self, offset: int, count: int, got: int) -> ImageError:
        return ImageError(self.path, f"expected {count} bytes at {offset}, the file ended after {got}: it is truncated")


class _Raw(io.RawIOBase):
    """A `File` with a position."""

    def __init__(self, file: File) -> None:
        self.file, self.place, self.name = file, 0, file.path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.file.size}[whence]
        if place < 0:
            raise ValueError(f"expected a place from 0, got {place}")
        self.place = place
        return place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.file.size - self.place))
        if count:
            self.file.read_into(view[:count], self.place)
        self.place += count
        return count


def file_identity(name: str) -> tuple[str, int, int] | None:
    """A file's path, time and size; None for what is no single file."""
    path = Path(name)
    try:
        stat = path.stat() if path.is_file() else None
    except (OSError, ValueError):
        return None
    return None if stat is None else (str(path), stat.st_mtime_ns, stat.st_size)
