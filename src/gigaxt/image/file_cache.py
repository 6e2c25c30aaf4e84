"""Copies of what was read from slow storage, in a folder on a fast disk: blocks of files, up to a size.

A block is one file, `FOLDER/DIGEST/NUMBER`: DIGEST is of the source's path, size and time of change, so that what was
read before a file changed is never taken for what is in it now. It begins with a checksum of its content and its name:
what is damaged, cut short or misplaced is read from the source again. Any number of processes may use one folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from gigaxt.amounts import GIB
from gigaxt.errors import ConfigError
from gigaxt.image.cache import SegmentCache
from gigaxt.image.process import PerProcess

logger = logging.getLogger("gigaxt")

BLOCK = 512 << 10
"""Bytes that are read and kept together: what a store that answers after 5 ms and sends 100 MB/s sends while one waits
for its answer. Larger blocks would fetch more of what nobody needs, such as the glass around the tissue of a slide."""
FORMAT = 1
"""Part of every digest; another one where the layout of blocks changes."""
CHECKSUM = 4
"""Bytes before a block's content."""
KEPT_SHARE = 0.9
"""Share of the size that is left when blocks make room, so that room is made once for many new ones."""
STALE_S = 3600.0
"""Age at which a block that was never finished is removed."""

_DIGEST = re.compile("[0-9a-f]{32}")
_BLOCK_NAME = re.compile(r"[0-9a-f]{8}(\.[0-9a-f]{32}\.part)?")

Identity = tuple[str, int, int]
"""A file's absolute path, size and time of change in ns."""
Key = tuple[Identity, int]

BLOCKS: SegmentCache[memoryview] = SegmentCache(32 << 20)
"""Checked blocks in memory, so that a block that is read tile by tile is opened once. 32 MiB: 64 of them."""


class FileCache:
    """Blocks of files in one folder, up to a size; the least recently used ones make room.

    Args:
        folder: made where it does not exist.
        most_gib: size of the folder.

    Raises:
        ConfigError: the folder cannot be made or written, or the size is no size.
    """

    def __init__(self, folder: str | Path, most_gib: float) -> None:
        if not 0 < most_gib < float("inf"):
            raise ConfigError(f"cache: expected a size above 0 GiB, got {most_gib}")
        self.folder, self.most_bytes = Path(folder).absolute(), int(most_gib * GIB)
        self._state = PerProcess(_State)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._total() as total:
                if total.bytes > self.most_bytes:  # it may be smaller from now on
                    total.bytes = self._make_room(0)
        except OSError as error:
            raise ConfigError(
                f"cache: {folder}: {error.strerror or error}; name a folder that can be written"
            ) from error

    @property
    def summary(self) -> str:
        """What this process read through it, in words."""
        state = self._state.get()
        total = state.kept_bytes + state.source_bytes
        share = state.kept_bytes / total if total else 0.0
        return f"{state.source_bytes / 2**20:,.0f} MiB from the source, {share:.0%} from {self.folder}"

    def read(self, path: str, number: int, offset: int, count: int) -> bytes:
        """Bytes of an open file, at most those up to its end.

        Args:
            path: of the file.
            number: its descriptor.
            offset: from where on.
            count: how many.

        Raises:
            OSError: the source cannot be read.
        """
        state, stat = self._state.get(), os.fstat(number)  # each time: it may have changed since it was opened
        if path not in state.real_paths:
            state.real_paths[path] = os.path.realpath(path)
        identity = (state.real_paths[path], stat.st_size, stat.st_mtime_ns)
        stop = min(offset + count, stat.st_size)
        if offset >= stop:
            return b""
        first = offset // BLOCK
        keys = [(identity, index) for index in range(first, (stop - 1) // BLOCK + 1)]
        blocks = self._blocks(state, number, keys)
        blocks[-1] = blocks[-1][: stop - keys[-1][1] * BLOCK]
        blocks[0] = blocks[0][offset - first * BLOCK :]
        return b"".join(blocks)

    def _blocks(self, state: _State, number: int, keys: Sequence[Key]) -> list[memoryview]:
        """Each key's block: from memory, the folder, the source, or another thread that is loading it already."""
        found: dict[Key, memoryview] = {}
        mine: dict[Key, Future[memoryview]] = {}
        others: dict[Key, Future[memoryview]] = {}
        for key in keys:
            block = BLOCKS.get(key)
            if block is not None:
                found[key] = block
                continue
            with state.lock:
                future = state.flying.get(key)
                if future is None:
                    mine[key] = state.flying[key] = Future()
                else:
                    others[key] = future
        try:
            self._load(state, number, mine)
        except BaseException as error:
            for future in mine.values():
                if not future.done():
                    future.set_exception(error)
            raise
        finally:
            with state.lock:
                for key in mine:
                    del state.flying[key]
        found |= {key: future.result() for key, future in (mine | others).items()}
        return [found[key] for key in keys]

    def _load(self, state: _State, number: int, wanted: dict[Key, Future[memoryview]]) -> None:
        """Fulfil `wanted` from the folder, and what it lacks from the source, neighbours in one read."""
        missing: list[Key] = []
        for key, future in wanted.items():
            block = self._get(key)
            if block is None:
                missing.append(key)
                continue
            state.count(kept=len(block))
            BLOCKS.put(key, block)
            future.set_result(block)
        start = 0
        for i in range(1, len(missing) + 1):
            if i < len(missing) and missing[i][1] == missing[i - 1][1] + 1:
                continue
            self._fetch(state, number, missing[start:i], wanted)
            start = i

    def _fetch(self, state: _State, number: int, keys: Sequence[Key], wanted: dict[Key, Future[memoryview]]) -> None:
        """Read neighbouring blocks from the source, keep them, and fulfil `wanted`."""
        (_, size, changed_ns), first = keys[0]
        start = first * BLOCK
        count = min(size, (keys[-1][1] + 1) * BLOCK) - start
        data = memoryview(_read_all(number, start, count))
        stat = os.fstat(number)
        unchanged = (stat.st_size, stat.st_mtime_ns) == (size, changed_ns) and len(data) == count
        for key in keys:
            block = data[(key[1] - first) * BLOCK : (key[1] - first + 1) * BLOCK]
            block = memoryview(bytes(block)) if len(keys) > 1 else block  # else one block would hold all in memory
            state.count(source=len(block))
            if unchanged:  # of a file that is being written, blocks of two states could be mixed
                BLOCKS.put(key, block)
                self._put(state, key, block)
            wanted[key].set_result(block)

    def _path(self, key: Key) -> Path:
        identity, index = key
        name = hashlib.blake2b(repr((FORMAT, BLOCK, identity)).encode(), digest_size=16).hexdigest()
        return self.folder / name / f"{index:08x}"

    def _get(self, key: Key) -> memoryview | None:
        """The block, if it is in the folder and undamaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        block = memoryview(data)[CHECKSUM:]
        if len(block) != min(BLOCK, key[0][1] - key[1] * BLOCK) or data[:CHECKSUM] != _checksum(path, block):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # when it was last used
        return block

    def _put(self, state: _State, key: Key, block: memoryview) -> None:
        """Keep a block, where there is room."""
        path, size = self._path(key), CHECKSUM + len(block)
        if state.closed or size > self.most_bytes:
            return
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            with self._total() as total:
                if total.bytes + size > self.most_bytes:
                    total.bytes = self._make_room(size)
                path.parent.mkdir(exist_ok=True)
                with part.open("wb") as file:
                    file.write(_checksum(path, block))
                    file.write(block)
                before = path.stat().st_size if path.exists() else 0  # a damaged one, or another process's
                part.replace(path)
                total.bytes += size - before
        except OSError as error:
            state.closed = True
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            why = error.strerror or error
            logger.warning("cache: %s cannot be written (%s); going on without adding to it", self.folder, why)

    @contextlib.contextmanager
    def _total(self) -> Iterator[_Total]:
        """The bytes in the folder, which one thread of one process at a time may change, as long as it holds this."""
        with (self.folder / "size").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            total = _Total(int(text) if text.isdigit() else sum(size for _, size, _ in self._files()))
            yield total
            file.truncate(0)
            file.write(b"%d" % max(total.bytes, 0))

    def _make_room(self, size: int) -> int:
        """Remove the least recently used blocks until with `size` bytes more at most `KEPT_SHARE` is full.

        Returns:
            The bytes that are left.
        """
        files = sorted(self._files())
        left, aim = sum(size for _, size, _ in files), KEPT_SHARE * self.most_bytes - size
        for used, freed, path in files:
            stale = path.suffix == ".part" and time.time() - used > STALE_S  # of a process that was killed
            if left > aim or stale:
                path.unlink(missing_ok=True)
                left -= freed
                with contextlib.suppress(OSError):  # it holds other blocks
                    path.parent.rmdir()
        return left

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of each block, finished or not; other files in the folder are not ours."""
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if not _DIGEST.fullmatch(folder.name):
                    continue
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                            if _BLOCK_NAME.fullmatch(entry.name):
                                stat = entry.stat()
                                yield stat.st_mtime, stat.st_size, Path(entry.path)


@dataclass
class _Total:
    bytes: int


@dataclass
class _State:
    """What belongs to one process."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    flying: dict[Key, Future[memoryview]] = field(default_factory=dict)
    """Blocks that a thread is at."""
    real_paths: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    """Nothing is added any more."""
    kept_bytes: int = 0
    source_bytes: int = 0

    def count(self, *, kept: int = 0, source: int = 0) -> None:
        """Add to the bytes that came from the folder and from the source."""
        with self.lock:
            self.kept_bytes += kept
            self.source_bytes += source


def _checksum(path: Path, block: memoryview) -> bytes:
    return zlib.crc32(block, zlib.crc32(f"{path.parent.name}/{path.name}".encode())).to_bytes(CHECKSUM)


def _read_all(number: int, offset: int, count: int) -> bytes:
    """`count` bytes, fewer only at the file's end."""
    data = os.pread(number, count, offset)
    while len(data) < count:
        more = os.pread(number, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


_active: FileCache | None = None


def cache_files(folder: str | Path | None, gib: float = 50.0) -> None:
    """From now on keep local copies of what this process, and those forked from it, read from image files.

    For files on slow or remote storage and a folder on a fast disk. TIFF of every kind, masks included, PNG, JPEG,
    WebP and BMP are read through it, in blocks of 512 KiB; OME-Zarr, vendor slides that openslide reads, and formats
    of GDAL are not. A file that changes (size or time) is read anew; a full disk ends the adding, not the reading.

    Args:
        folder: made where it does not exist; any number of processes may share it. None: no copies any more.
        gib: size of the folder, of which the least recently used blocks make room for new ones.

    Raises:
        ConfigError: the folder cannot be made or written, or the size is no size.
    """
    global _active
    _active = None if folder is None else FileCache(folder, gib)


@contextlib.contextmanager
def files_cached(folder: str | Path | None, gib: float) -> Iterator[FileCache | None]:
    """`cache_files` for a while; with None all stays as it is."""
    global _active
    before = _active
    if folder is not None:
        cache_files(folder, gib)
    try:
        yield _active
    finally:
        _active = before


@contextlib.contextmanager
def files_uncached() -> Iterator[None]:
    """Read past the cache for a while, as if there were none."""
    global _active
    before, _active = _active, None
    try:
        yield
    finally:
        _active = before


def file_cache() -> FileCache | None:
    """This process's cache; None: there is none."""
    return _active
