"""Reading a scene from slow storage, region by region: an artificial 5 ms before each answer, and 100 MB/s.

A synthetic RGB pyramid (JPEG 4:2:0, tiles of 256 px, made once under /tmp) is read as training reads it: chunks of 8
regions of 256 px, by threads that read ahead. Each read of the file waits for its answer (threads wait side by side),
then for its bytes to come through a link that all threads share. What the cache of files reads of its own folder does
not wait. Compared are

    one read a tile                 as before tiles were read together
    neighbours of a region          the tiles of one window in runs of neighbours
    neighbours of a chunk           the regions of a chunk announced, too: what gigaxt does
    cache, first time / again       the same with `--cache DIR`, empty and full

Reads and bytes are counted; `storage` is what follows from them where the threads wait side by side and nothing else
takes time: reads x 5 ms / threads + bytes / 100 MB/s. `clock` is measured, and holds the decoding, too: on a busy
machine that is most of it. Regions lie on the file's tiles (aligned), or have a halo of 32 px and touch four to nine.

    python benchmarks/bench_storage.py [--size 4096] [--latency-ms 5] [--mb-s 100] [--keep]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tifffile
import torch
from bench_read import scene
from report import publish

import gigaxt
from gigaxt.image.base import Image
from gigaxt.image.cache import FETCHED, SEGMENTS
from gigaxt.image.file_cache import BLOCKS, files_cached
from gigaxt.scenes.batch import SceneBatch
from gigaxt.scenes.inputs import InputConfig
from gigaxt.streaming.prefetch import read_ahead

CHUNK = 8
MODES = ("one read a tile", "neighbours of a region", "neighbours of a chunk")


class SlowStorage:
    """A file whose reads wait: for the answer, threads side by side, then for the bytes, one after the other."""

    def __init__(self, path: Path, latency_s: float, bytes_s: float) -> None:
        self.latency_s, self.bytes_s = latency_s, bytes_s
        stat = path.stat()
        self.file = (stat.st_dev, stat.st_ino)
        self.link, self.free_at = threading.Lock(), 0.0
        self.reads = self.bytes = 0

    def wait(self, number: int, count: int) -> None:
        """Take as long as a read of `count` bytes does."""
        stat = os.fstat(number)
        if (stat.st_dev, stat.st_ino) != self.file:
            return
        with self.link:
            self.reads, self.bytes = self.reads + 1, self.bytes + count
            answered = time.monotonic() + self.latency_s
            self.free_at = max(self.free_at, answered) + count / self.bytes_s
            until = self.free_at
        time.sleep(max(0.0, until - time.monotonic()))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """All reads of the file by position wait."""
        pread, preadv = os.pread, os.preadv

        def slow_pread(number: int, count: int, offset: int) -> bytes:
            data = pread(number, count, offset)
            self.wait(number, len(data))
            return data

        def slow_preadv(number: int, buffers: Sequence[memoryview], offset: int) -> int:
            got = preadv(number, buffers, offset)
            self.wait(number, got)
            return got

        self.reads, self.bytes, self.free_at = 0, 0, 0.0
        with patch("os.pread", slow_pread), patch("os.preadv", slow_preadv):
            yield


@contextmanager
def reading(mode: str) -> Iterator[None]:
    """Read in one of `MODES`."""
    with ExitStack() as stack:
        if mode != MODES[2]:
            stack.enter_context(patch.object(Image, "expect", lambda *_: None))
        if mode == MODES[0]:
            apart = patch("gigaxt.image.tiff_pieces.runs", lambda parts: [[index] for index in range(len(parts))])
            stack.enter_context(apart)
        yield


def read_scene(path: Path, halo: int, readers: int, storage: SlowStorage, chunks: int | None = None) -> dict[str, Any]:
    """Open a scene and read all of its regions, or the first `chunks` times 8."""
    for store in (SEGMENTS, FETCHED, BLOCKS):
        store.clear()
    config = InputConfig(mean=[0.0] * 3, std=[1.0] * 3, halo=halo)
    with storage.at_work():
        started, cpu = time.monotonic(), time.process_time()
        batch = SceneBatch([gigaxt.open_image(path)], config, region=256, channels=3, tokens_per_core=8)
        wanted = batch.chunks(CHUNK)[:chunks]
        with closing(read_ahead(batch.load, wanted, torch.device("cpu"), readers)) as loaded:
            regions = sum(len(found["pixels"]) for _, found in loaded)
        seconds = time.monotonic() - started
    storage_s = storage.reads * storage.latency_s / readers + storage.bytes / storage.bytes_s
    return {
        "storage_s": round(storage_s, 3),
        "clock_s": round(seconds, 3),
        "storage_ms_a_region": round(1e3 * storage_s / regions, 3),
        "clock_ms_a_region": round(1e3 * seconds / regions, 3),
        "cpu_ms_a_region": round(1e3 * (time.process_time() - cpu) / regions, 3),
        "reads_a_region": round(storage.reads / regions, 3),
        "kib_a_region": round(storage.bytes / regions / 1024, 1),
        "regions": regions,
    }


def strips(folder: Path) -> Path:
    """An uncompressed scene in strips: the layout in which a region's rows lie far apart."""
    path = folder / "strips.tif"
    tifffile.imwrite(path, np.zeros((512, 8192, 3), np.uint8), rowsperstrip=16, photometric="rgb")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="side of the scene, px")
    parser.add_argument("--latency-ms", type=float, default=5.0)
    parser.add_argument("--mb-s", type=float, default=100.0)
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def measure(path: Path, what: str, halo: int, mode: str, readers: int, cache: Path | None = None) -> None:
        storage = SlowStorage(path, options.latency_ms / 1e3, options.mb_s * 1e6)
        for told in ("first time", "again") if cache else ("",):
            with reading(mode), files_cached(cache, 10.0) if cache else nullcontext():
                found = read_scene(path, halo, readers, storage, chunks=2 if what == "strips" else None)
            name = f"cache, {told}" if cache else mode
            rows.append({"regions": what, "how": name, "readers": readers, **found})
            print(
                f"{what:<8} {name:<23} {readers} threads, a region: {found['reads_a_region']:7.3f} reads"
                f"  {found['kib_a_region']:6.1f} KiB  storage {found['storage_ms_a_region']:7.2f} ms"
                f"  clock {found['clock_ms_a_region']:7.2f} ms  CPU {found['cpu_ms_a_region']:5.2f} ms",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as name:
        folder, tiled = Path(name), scene(options.size)
        for halo, what in ((0, "aligned"), (32, "halo 32")):
            for mode in MODES:
                measure(tiled, what, halo, mode, readers=2)
            measure(tiled, what, halo, MODES[2], readers=8)
            measure(tiled, what, halo, MODES[2], readers=2, cache=folder / what)
        measure(strips(folder), "strips", 0, MODES[2], readers=2)
        measure(strips(folder), "strips", 0, MODES[2], readers=2, cache=folder / "of strips")
    settings = {"side_px": options.size, "latency_ms": options.latency_ms, "mb_s": options.mb_s, "chunk": CHUNK}
    publish("storage", {**settings, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
