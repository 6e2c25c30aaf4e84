"""Decoded segments (tiles or strips of a file) that the next window may need again: bounded, one store per process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from gigaxt.image.process import PerProcess

Segment = NDArray[np.generic]


class SegmentCache:
    """Least recently used segments up to `limit` bytes in all, shared by all images of the process.

    Regions smaller than the file's tiles, halos, and above all strips as wide as the image are decoded once instead of
    once a region. The newest segment is kept even if it is larger than the limit.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._store = PerProcess(_Store)

    def get(self, key: Hashable) -> Segment | None:
        """The segment, or None if it is not kept."""
        store = self._store.get()
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

    @property
    def bytes(self) -> int:
        """What is kept now in this process."""
        return self._store.get().bytes

    def clear(self) -> None:
        """Forget everything that this process keeps."""
        self._store.drop()


class _Store:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.segments: OrderedDict[Hashable, Segment] = OrderedDict()
        self.bytes = 0


SEGMENTS = SegmentCache(32 << 20)
"""Used by all readers. 32 MiB: 40 tiles of 512 px in RGB, or the strips of one row of regions at 40,000 px width."""
