"""How fast the regions of a rehearsal come from the disk, and from the system's cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from gigaxt.image.cache import FETCHED, SEGMENTS
from gigaxt.image.file_cache import BLOCKS, file_cache, files_uncached
from gigaxt.machine import drop_from_cache, read_bytes
from gigaxt.scenes.batch import Chunk, SceneBatch
from gigaxt.streaming.prefetch import read_ahead
from gigaxt.streaming.rows import Streaming

READS, MOST_READ_S = 12, 5.0
"""Chunks that are read to time the disk, and when to stop."""


@dataclass(frozen=True)
class Reading:
    """How fast the reading threads bring regions. Of one region, s and bytes; 0: not measured."""

    cold_s: float = 0.0
    cold_bytes: float = 0.0
    again_s: float = 0.0
    decode_s: float = 0.0
    still_cached: tuple[str, ...] = ()


def time_reading(batch: SceneBatch, streaming: Streaming, files: Sequence[Path]) -> Reading:
    """Read some chunks from the source, and again from the system's cache or that of the config."""
    held = tuple(str(path) for path in dict.fromkeys(files) if not drop_from_cache(path))
    chunks = batch.chunks(streaming.chunk_regions)
    chunks = chunks[:: max(1, len(chunks) // READS)][:READS]
    with files_uncached():
        cold_s, cold_bytes, _ = _read(batch, chunks, streaming.readers)
    if file_cache() is not None:
        _read(batch, chunks, streaming.readers)  # fills it
    again_s, _, decode_s = _read(batch, chunks, streaming.readers)
    return Reading(cold_s, cold_bytes, again_s, decode_s, held)


def _read(batch: SceneBatch, chunks: Sequence[Chunk], readers: int) -> tuple[float, float, float]:
    """Seconds, bytes and seconds of CPU time a region, as nothing is in this process's memory yet."""
    for store in (SEGMENTS, FETCHED, BLOCKS):
        store.clear()
    regions, before, started, cpu = 0, read_bytes(), time.monotonic(), time.process_time()
    with contextlib.closing(cast(Any, read_ahead(batch.load, chunks, torch.device("cpu"), readers))) as loaded:
        for chunk, _ in loaded:
            regions += chunk.stop - chunk.start
            if time.monotonic() - started > MOST_READ_S:
                break
    seconds, cpu_s, after = time.monotonic() - started, time.process_time() - cpu, read_bytes()
    read = 0 if before is None or after is None else after - before
    return seconds / regions, read / regions, cpu_s / regions
