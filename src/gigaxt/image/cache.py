"""Tiles and strips of files ("segments") that the next window may need: bounded, one store per process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from numpy.typing import NDArray

from gigaxt.image.process import PerProcess


class Sized(Protocol):
    """What takes some memory, such as an array."""

    @property
    def nbytes(self) -> int:
        """How much."""


Segment = TypeVar("Segment", bound=Sized)


@dataclass(frozen=True)
class Fetched:
    """A segment as it is in the file."""

    data: bytes
    shared: bool
    """Whether several of the windows that were announced need it, so that it should stay once it is decoded."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return len(self.data)


class SegmentCache(Generic[Segment]):
    """Least recently used segments up to `limit` bytes in all, shared by all images of the process.

    Regions smaller than the file's tiles, halos, and above all strips as wide as the image are decoded once instead of
    once a region. The newest segment is kept even if it is larger than the limit.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._store: PerProcess[_Store[Segment]] = PerProcess(_Store)

    def get(self, key: Hashable) -> Segment | None:
        """The segment, or None if it is not kept."""
        store = self._store.get()
        if key not in store.segments:  # most often; no lock needed
            return None
        with store.lock:
            segment = store.segments.get(key)
            if segment is not None:
                store.segments.move_to_end(key)
            return segment

    def put(self, key: Hashable, segment: Segment) -> None:
        """Keep a segment, which nobody may change from now on."""
        if self.limit <= 0:
            return
        store = self._store.get()
        with store.lock:
            if key in store.segments:
                return
            store.segments[key] = segment
            store.bytes += segment.nbytes
            while store.bytes > self.limit and len(store.segments) > 1:
                store.bytes -= store.segments.popitem(last=False)[1].nbytes

    def has(self, key: Hashable) -> bool:
        """Whether it is kept now; does not count as use."""
        return key in self._store.get().segments

    def take(self, key: Hashable) -> Segment | None:
        """The segment, which is not kept any longer, or None if it was not."""
        store = self._store.get()
        if key not in store.segments:  # as above
            return None
        with store.lock:
            segment = store.segments.pop(key, None)
            store.bytes -= 0 if segment is None else segment.nbytes
            return segment

    @property
    def bytes(self) -> int:
        """What is kept now in this process."""
        return self._store.get().bytes

    def clear(self) -> None:
        """Forget everything that this process keeps."""
        self._store.drop()


class _Store(Generic[Segment]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.segments: OrderedDict[Hashable, Segment] = OrderedDict()
        self.bytes = 0


SEGMENTS: SegmentCache[NDArray[Any]] = SegmentCache(32 << 20)
"""Used by all readers. 32 MiB: 40 tiles of 512 px in RGB, or the strips of one row of regions at 40,000 px width."""
FETCHED: SegmentCache[Fetched] = SegmentCache(16 << 20)
"""Tiles as they are in the file, read together with their neighbours and not used yet (`Image.expect`)."""
