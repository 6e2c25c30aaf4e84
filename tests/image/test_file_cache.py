"""Local copies of blocks of files: the same bytes, within a size, never stale, whatever happens to the folder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile

import gigaxt
from gigaxt.errors import ConfigError, ImageError
from gigaxt.image.cache import SEGMENTS
from gigaxt.image.file_cache import BLOCK, BLOCKS, FileCache, file_cache
from gigaxt.image.files import File
from gigaxt.image.open import open_image

SIZE = 5 * BLOCK + 1234
DATA = np.random.default_rng(0).bytes(SIZE)
GIB = 2**30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FileCache]:
    forget()
    gigaxt.cache_files(tmp_path / "cache", gib=1.0)
    active = file_cache()
    assert active is not None
    yield active
    gigaxt.cache_files(None)
    forget()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, count) of each read of a source."""
    found: list[tuple[int, int]] = []
    pread = os.pread

    def counting(number: int, count: int, offset: int) -> bytes:
        found.append((offset, count))
        return pread(number, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    return found


def forget() -> None:
    """As if the process had just begun."""
    BLOCKS.clear()
    SEGMENTS.clear()


def blocks(cache: FileCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file() and path.name != "size")


def held(cache: FileCache) -> int:
    return sum(path.stat().st_size for path in blocks(cache))


def counted(cache: FileCache) -> int:
    return int((cache.folder / "size").read_text())


def test_bytes_are_those_of_the_file(source: Path, cache: FileCache, reads: list[tuple[int, int]]) -> None:
    file, rng = File(source), np.random.default_rng(1)
    for run in range(3):
        for _ in range(60):
            offset = int(rng.integers(0, SIZE))
            count = int(rng.integers(1, min(SIZE - offset, 2 * BLOCK) + 1))
            assert file.read(offset, count) == DATA[offset : offset + count]
            view = bytearray(count)
            file.read_into(memoryview(view), offset)
            assert view == DATA[offset : offset + count]
        if run:
            assert not reads
        assert file.read(0, SIZE) == DATA
        assert counted(cache) == held(cache)
        forget()
        reads.clear()
    assert file.read(0, SIZE) == DATA
    assert file.read(BLOCK, BLOCK) == DATA[BLOCK : 2 * BLOCK]
    assert len(blocks(cache)) == 6
    with pytest.raises(ImageError, match="expected 10 bytes"):
        file.read(SIZE - 9, 10)
    with pytest.raises(ImageError, match="the file ended after 0"):
        file.read(SIZE + 7, 10)


def test_neighbours_are_fetched_in_one_read(source: Path, cache: FileCache, reads: list[tuple[int, int]]) -> None:
    file = File(source)
    file.read(2 * BLOCK + 5, 10)
    file.read(0, SIZE)
    assert reads == [(2 * BLOCK, BLOCK), (0, 2 * BLOCK), (3 * BLOCK, SIZE - 3 * BLOCK)]


def test_another_process_finds_them(source: Path, cache: FileCache, reads: list[tuple[int, int]]) -> None:
    File(source).read(0, SIZE)
    reads.clear()
    forget()
    again = FileCache(cache.folder, 1.0)
    number = os.open(source, os.O_RDONLY)
    assert again.read(str(source), number, 0, SIZE) == DATA
    os.close(number)
    assert not reads
    assert again.summary == f"0 MiB from the source, 100% from {cache.folder}"


@pytest.mark.parametrize("how", ["in place", "replaced", "longer"])
def test_a_changed_file_is_read_anew(source: Path, cache: FileCache, how: str) -> None:
    file = File(source)
    assert file.read(0, SIZE) == DATA
    changed = DATA[::-1] + (b"more" if how == "longer" else b"")
    before = source.stat()
    if how == "replaced":
        other = source.with_suffix(".new")
        other.write_bytes(changed)
        other.replace(source)
    else:
        source.write_bytes(changed)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    forget()
    assert file.read(0, SIZE) == (DATA if how == "replaced" else changed[:SIZE])  # the file that was opened
    assert File(source).read(0, len(changed)) == changed
    forget()
    assert File(source).read(0, len(changed)) == changed


def test_a_file_that_shrinks_is_told(source: Path, cache: FileCache) -> None:
    file = File(source)
    file.read(0, SIZE)
    os.truncate(source, 1000)
    with pytest.raises(ImageError, match="the file ended after 900"):
        file.read(100, 2000)


def test_what_changes_while_it_is_read_is_not_kept(
    source: Path, cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread

    def changing(number: int, count: int, offset: int) -> bytes:
        found = pread(number, count, offset)
        os.utime(source, ns=(1, time.time_ns()))
        return found

    monkeypatch.setattr(os, "pread", changing)
    assert File(source).read(0, 100) == DATA[:100]
    assert not blocks(cache)


@pytest.mark.parametrize("damage", ["one byte", "cut", "longer", "empty", "another block"])
def test_damaged_blocks_are_made_again(
    source: Path, cache: FileCache, reads: list[tuple[int, int]], damage: str
) -> None:
    file = File(source)
    file.read(0, SIZE)
    block = blocks(cache)[1]
    good = block.read_bytes()
    damaged = {
        "one byte": good[:999] + bytes([good[999] ^ 1]) + good[1000:],
        "cut": good[:-1],
        "longer": good + b"x",
        "empty": b"",
        "another block": blocks(cache)[2].read_bytes(),
    }[damage]
    block.write_bytes(damaged)
    forget()
    reads.clear()
    assert file.read(0, SIZE) == DATA
    assert reads == [(BLOCK, BLOCK)]
    assert block.read_bytes() == good
    assert counted(cache) == held(cache) + len(good) - len(damaged)
    forget()
    assert file.read(0, SIZE) == DATA
    assert len(reads) == 1


def test_it_stays_within_its_size_and_the_least_recently_used_go(
    tmp_path: Path, cache: FileCache, reads: list[tuple[int, int]]
) -> None:
    gigaxt.cache_files(tmp_path / "small", gib=4.5 * BLOCK / GIB)
    small = file_cache()
    assert small is not None
    paths = [tmp_path / f"{name}.bin" for name in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(DATA[i : i + BLOCK])
        File(path).read(0, 10)
        os.utime(small._path(key_of(path)), (time.time() - 1000 + i,) * 2)  # times of one tick tell no order
        forget()
        File(paths[0]).read(0, 10)  # used again and again
        assert held(small) <= small.most_bytes
        assert counted(small) == held(small)
        forget()
    assert len(reads) == 8  # the one that is used again and again was never gone
    there = set(blocks(small))
    assert small._path(key_of(paths[0])) in there
    assert small._path(key_of(paths[7])) in there
    assert small._path(key_of(paths[1])) not in there
    assert len(there) >= 3
    FileCache(small.folder, 2.5 * BLOCK / GIB)  # smaller from now on
    assert held(small) <= 2.5 * BLOCK


def key_of(path: Path) -> tuple[tuple[str, int, int], int]:
    stat = path.stat()
    return (os.path.realpath(path), stat.st_size, stat.st_mtime_ns), 0


def test_smaller_than_a_block_it_keeps_nothing(source: Path, tmp_path: Path, cache: FileCache) -> None:
    gigaxt.cache_files(tmp_path / "tiny", gib=1000 / GIB)
    assert File(source).read(0, SIZE) == DATA
    tiny = file_cache()
    assert tiny is not None
    assert [path.stat().st_size for path in blocks(tiny)] == []


def test_stale_unfinished_blocks_go(source: Path, tmp_path: Path, cache: FileCache) -> None:
    File(source).read(0, SIZE)
    old, new = (cache.folder / ("0" * 32) / f"00000000.{name * 32}.part" for name in "ab")
    old.parent.mkdir()
    for part in (old, new):
        part.write_bytes(b"x" * 100)
    for block in blocks(cache):
        os.utime(block, (time.time() - 9000,) * 2)
    os.utime(old, (time.time() - 7200,) * 2)
    os.utime(new, (time.time() + 5,) * 2)
    (cache.folder / "size").write_bytes(b"")  # as after a crash: counted again
    FileCache(cache.folder, 4 * BLOCK / GIB)
    assert not old.exists()
    assert new.exists()
    assert counted(cache) == held(cache)


def test_files_that_are_not_its_own_stay(source: Path, tmp_path: Path, cache: FileCache) -> None:
    mine = [tmp_path / "mixed" / name for name in ("a.tif", "scans/b.tif", f"{'0' * 32}/notes.txt", "scans/00000001")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DATA)
        os.utime(path, (1, 1))
    gigaxt.cache_files(tmp_path / "mixed", gib=2.5 * BLOCK / GIB)
    assert File(source).read(0, SIZE) == DATA
    assert all(path.read_bytes() == DATA for path in mine)
    mixed = file_cache()
    assert mixed is not None
    own = [path for path in blocks(mixed) if path not in mine]
    assert 0 < sum(path.stat().st_size for path in own) == counted(mixed) <= mixed.most_bytes


def test_a_full_disk_does_not_end_the_reading(
    source: Path,
    cache: FileCache,
    reads: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = File(source)
    file.read(0, BLOCK)
    with monkeypatch.context() as full:

        def no_space(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(Path, "replace", no_space)
        assert file.read(0, SIZE) == DATA
        forget()
        assert file.read(0, SIZE) == DATA
    assert len(blocks(cache)) == 1  # no unfinished one either
    assert counted(cache) == held(cache)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"cache: {cache.folder} cannot be written (No space left on device); going on without adding to it"
    )
    forget()
    reads.clear()
    file.read(0, BLOCK)
    assert not reads  # what is there is still used


def test_a_folder_that_is_removed_does_not_end_the_reading(
    source: Path, cache: FileCache, caplog: pytest.LogCaptureFixture
) -> None:
    file = File(source)
    file.read(0, BLOCK)
    for path in [*blocks(cache), cache.folder / "size"]:
        path.unlink()
    for folder in [*cache.folder.iterdir(), cache.folder]:
        folder.rmdir()
    forget()
    assert file.read(0, SIZE) == DATA
    assert len(caplog.records) == 1


@pytest.mark.parametrize("gib", [0.0, -1.0, float("nan"), float("inf")])
def test_sizes_that_are_none(tmp_path: Path, gib: float) -> None:
    with pytest.raises(ConfigError, match="expected a size above 0 GiB"):
        gigaxt.cache_files(tmp_path, gib=gib)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"cache: .*name a folder that can be written"):
        gigaxt.cache_files(tmp_path / "file")
    assert file_cache() is None


def test_threads_fetch_a_block_once(
    source: Path, cache: FileCache, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = os.pread

    def slowly(number: int, count: int, offset: int) -> bytes:
        time.sleep(0.02)
        return counting(number, count, offset)

    monkeypatch.setattr(os, "pread", slowly)
    file, start = File(source), threading.Barrier(8)

    def task(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        start.wait()
        for offset in rng.integers(0, SIZE - 2 * BLOCK, 10).tolist():
            if file.read(offset, BLOCK + 77) != DATA[offset : offset + BLOCK + 77]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(task, range(8)))
    fetched = [offset // BLOCK + i for offset, count in reads for i in range(-(-count // BLOCK))]
    assert len(fetched) == len(set(fetched))


def test_an_error_reaches_every_thread_that_waits(
    source: Path, cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(number: int, count: int, offset: int) -> bytes:
        time.sleep(0.05)
        raise OSError(errno.EIO, "Input/output error")

    pread = os.pread
    monkeypatch.setattr(os, "pread", broken)
    file = File(source)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(file.read, 0, 100) for _ in range(4)]
    assert all(isinstance(future.exception(), OSError) for future in waiting)
    monkeypatch.setattr(os, "pread", pread)
    assert file.read(0, 100) == DATA[:100]  # nothing is left of it


def in_process(paths: list[Path], folder: Path, gib: float, seed: int) -> None:
    gigaxt.cache_files(folder, gib=gib)
    rng = np.random.default_rng(seed)
    for _ in range(60):
        i, offset = int(rng.integers(len(paths))), int(rng.integers(SIZE - 2 * BLOCK))
        if File(paths[i]).read(offset, BLOCK) != DATA[offset : offset + BLOCK]:
            os._exit(1)
        BLOCKS.clear()
    os._exit(0)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.bin" for name in range(3)]
    for path in paths:
        path.write_bytes(DATA)
    most = 7.5 * BLOCK  # less than what is read, so that they take each other's room
    children = [
        multiprocessing.get_context("fork").Process(target=in_process, args=(paths, tmp_path / "c", most / GIB, seed))
        for seed in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    cache = FileCache(tmp_path / "c", most / GIB)
    assert held(cache) <= most
    assert not [path for path in blocks(cache) if path.suffix == ".part"]
    assert len(blocks(cache)) >= 3
    assert counted(cache) == held(cache)


def test_processes_write_in_turn(source: Path, cache: FileCache) -> None:
    with (cache.folder / "size").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=File(source).read, args=(0, 5))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert counted(cache) == held(cache) > 0


def test_a_fork_while_a_thread_reads(source: Path, cache: FileCache) -> None:
    file = File(source)
    file.read(0, 10)
    with cache._state.get().lock:
        child = os.fork()
        if not child:
            os._exit(0 if file.read(BLOCK - 5, 10) == DATA[BLOCK - 5 : BLOCK + 5] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_images_read_through_it(tmp_path: Path, cache: FileCache, reads: list[tuple[int, int]]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (600, 700, 3), dtype=np.uint8)
    paths = [tmp_path / name for name in ("tiles.tif", "strips.tif", "raw.tif", "a.png", "a.webp", "a.bmp")]
    tifffile.imwrite(paths[0], pixels, tile=(64, 64), compression="zlib", photometric="rgb")
    tifffile.imwrite(paths[1], pixels, rowsperstrip=9, compression="lzw", photometric="rgb")
    tifffile.imwrite(paths[2], pixels, rowsperstrip=9, photometric="rgb")
    for path in paths[3:]:
        PIL.Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    for run in range(2):
        for path in paths:
            image = open_image(path)
            np.testing.assert_array_equal(image.read(0, 0, 700, 600), pixels)
            np.testing.assert_array_equal(image.read(33, 44, 99, 88), pixels[44:132, 33:132])
        if not run:
            assert reads
        else:
            assert not reads
        forget()
        reads.clear()
    before = len(blocks(cache))
    other = tmp_path / "other.tif"
    tifffile.imwrite(other, pixels)
    np.testing.assert_array_equal(open_image(other, cached=False).read(0, 0, 700, 600), pixels)
    assert len(blocks(cache)) == before
    assert reads


def whole(path: Path) -> Any:
    """All pixels, or what the error says."""
    try:
        image = open_image(path)
        return image.read(0, 0, image.width, image.height)
    except ImageError as error:
        return str(error)


def test_the_real_fixtures(fixtures: Path, cache: FileCache) -> None:
    for path in sorted((fixtures / "geotiff").glob("*.tif")):
        gigaxt.cache_files(None)
        plain = whole(path)
        gigaxt.cache_files(cache.folder)
        for _ in range(2):
            forget()
            np.testing.assert_array_equal(whole(path), plain)
