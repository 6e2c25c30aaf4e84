"""How `gigaxt plan` times reading: past the caches, then through them, with the run's reading threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import gigaxt
from gigaxt.image.cache import FETCHED, SEGMENTS
from gigaxt.image.file_cache import BLOCKS, file_cache, files_uncached
from gigaxt.machine import drop_from_cache, read_bytes
from gigaxt.scenes.batch import SceneBatch
from gigaxt.scenes.inputs import InputConfig
from gigaxt.streaming.prefetch import read_ahead
from gigaxt.streaming.rows import Reader, Streaming
from gigaxt.training.reading_speed import time_reading


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (512, 640, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    return tmp_path / "a.tif"


@pytest.fixture
def clean() -> Iterator[None]:
    for store in (SEGMENTS, FETCHED, BLOCKS):
        store.clear()
    yield
    gigaxt.cache_files(None)


def batch_of(path: Path) -> SceneBatch:
    config = InputConfig(mean=[0.0] * 3, std=[1.0] * 3)
    return SceneBatch([gigaxt.open_image(path)], config, region=96, channels=3, tokens_per_core=2)


@pytest.mark.parametrize("cached", [False, True])
def test_the_source_is_read_cold_and_the_cache_again(
    scene: Path, tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    if cached:
        gigaxt.cache_files(tmp_path / "cache")
        batch_of(scene).load(batch_of(scene).chunks(80)[0])  # the cache holds it already
    batch, pread, reads = batch_of(scene), os.pread, []

    def counting(number: int, count: int, offset: int) -> bytes:
        reads.append(count)
        return pread(number, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    found = time_reading(batch, Streaming(chunk_regions=8, readers=1), [scene])
    source = scene.stat().st_size
    passes = 1 if cached else 2
    # Regions that share tiles with the row above, and chunks that span two rows: a quarter more than the file.
    assert passes * 1.1 * source < sum(reads) < passes * 1.4 * source
    assert found.cold_bytes == pytest.approx(1.25 * source / 42, rel=0.1)
    assert found.cold_s > 0
    assert found.again_s > 0
    assert found.decode_s > 0
    assert (file_cache() is not None) == cached


def test_files_are_forgotten(scene: Path, tmp_path: Path) -> None:
    before = read_bytes()
    scene.read_bytes()
    after = read_bytes()
    if before is not None and after is not None:
        assert after - before >= scene.stat().st_size
    held = [os.preadv(fd, [bytearray(1)], 0) for fd in [os.open(scene, os.O_RDONLY)]]
    assert held == [1]
    assert isinstance(drop_from_cache(scene), bool)
    assert drop_from_cache(tmp_path) == drop_from_cache(scene)  # all files of a folder
    assert not drop_from_cache(tmp_path / "none.tif")


def test_pages_that_stay_are_told(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    scene.read_bytes()
    number = os.open(scene, os.O_RDONLY)
    try:
        os.preadv(number, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system does not tell what it holds in memory")
    finally:
        os.close(number)
    assert not drop_from_cache(scene)


def test_past_the_cache_for_a_while(tmp_path: Path, clean: None) -> None:
    gigaxt.cache_files(tmp_path / "cache")
    active = file_cache()
    with files_uncached():
        assert file_cache() is None
    assert file_cache() is active is not None


@pytest.mark.parametrize("readers", [1, 5])
def test_so_many_threads_read_ahead(readers: int) -> None:
    start, names = threading.Barrier(readers), set()

    def load(chunk: int) -> torch.Tensor:
        names.add(threading.current_thread().name)
        if chunk < readers:
            start.wait(30)  # passes only if so many are at it at once
        return torch.tensor([chunk])

    chunks = range(12)
    found = [(chunk, int(value)) for chunk, value in read_ahead(load, chunks, torch.device("cpu"), readers)]
    assert found == [(chunk, chunk) for chunk in chunks]
    assert len(names) == readers
    start.reset()
    rows = Reader(load, torch.device("cpu"), 0, Streaming(readers=readers)).rows(chunks)
    assert [int(part.loaded) for part in rows] == list(chunks)
