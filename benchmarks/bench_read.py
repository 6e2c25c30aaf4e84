"""Cost of reading windows of a tiled TIFF against the bare decode of the tiles that they touch, in CPU time.

    python benchmarks/bench_read.py [--size 8192] [--seconds 0.15] [--rounds 15] [--keep]

The scene is a synthetic RGB pyramid, JPEG 4:2:0, tiles of 256 px, made once under /tmp. Both sides read the same
windows in turn, each round in the other order; the figure is the median of the rounds' ratios. The bare decode is
os.pread and imagecodecs only, without assembly. `ratio` is without the store of decoded tiles, `cached` with it. Freed
memory is kept, as the command line does; under glibc's own settings page faults decide, of which assembly has more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from report import publish

import gigaxt.image.cache
from gigaxt.allocator import keep_freed_memory
from gigaxt.image import open_image

Windows = list[tuple[int, int, int]]


def scene(size: int) -> Path:
    """Texture with detail at every scale, so that JPEG has about as much to do as with tissue."""
    path = Path(f"/tmp/gigaxt_bench_read_{size}.tif")
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    image = np.zeros((size, size, 3), np.float32)
    for scale in (2, 8, 32, 128):
        coarse = rng.normal(size=(size // scale, size // scale, 3)).astype(np.float32)
        image += np.kron(coarse, np.ones((scale, scale, 1), np.float32)) * (5 + scale / 8)
    pixels = np.clip(image + 170, 0, 255).astype(np.uint8)
    part = path.with_suffix(".part")
    options = {"tile": (256, 256), "compression": "jpeg", "compressionargs": {"level": 89}, "photometric": "rgb"}
    with tifffile.TiffWriter(part, bigtiff=True) as tiff:
        tiff.write(pixels, subifds=3, **options)
        for level in (1, 2, 3):
            tiff.write(pixels[:: 2**level, :: 2**level], subfiletype=1, **options)
    part.rename(path)
    return path


def bare_decoder(path: Path) -> Callable[[int, int, int], None]:
    """The floor: read and decode each touched tile of level 0, put nothing together."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offsets, counts, tables = page.dataoffsets, page.databytecounts, page.jpegtables
        across = -(-page.imagewidth // 256)
    number = os.open(path, os.O_RDONLY)

    def decode(x: int, y: int, side: int) -> None:
        for row in range(y // 256, (y + side - 1) // 256 + 1):
            for col in range(x // 256, (x + side - 1) // 256 + 1):
                index = row * across + col
                data = os.pread(number, counts[index], offsets[index])
                imagecodecs.jpeg8_decode(data, tables=tables, colorspace="YCBCR", outcolorspace="RGB")

    return decode


def cpu_ms(read: Callable[[int, int, int], object], windows: Windows, seconds: float) -> float:
    """CPU milliseconds a window, all threads, over at least `seconds`."""
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        for window in windows:
            read(*window)
        done += len(windows)
    return 1e3 * (time.process_time() - start) / done


def patterns(size: int) -> dict[str, Windows]:
    rng = np.random.default_rng(1)
    found: dict[str, Windows] = {}
    for side in (256, 512, 1024):
        found[f"rand {side}"] = [(int(x), int(y), side) for x, y in rng.integers(0, size - side, (24, 2))]
    found["aligned 512"] = [(x, y, 512) for y in range(0, 2048, 512) for x in range(0, size, 512)]
    return found


def measure(path: Path, size: int, seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    image, bare = open_image(path), bare_decoder(path)

    def read(x: int, y: int, side: int) -> object:
        return image.read(x, y, side, side)

    results = {}
    limit = gigaxt.image.cache.SEGMENTS.limit
    for name, windows in patterns(size).items():
        floors, reads, cached = [], [], []
        for number in range(rounds):
            gigaxt.image.cache.SEGMENTS.clear()
            gigaxt.image.cache.SEGMENTS.limit = 0
            pair = [(floors, bare), (reads, read)]
            for times, function in pair if number % 2 else pair[::-1]:
                times.append(cpu_ms(function, windows, seconds))
            gigaxt.image.cache.SEGMENTS.limit = limit
            cached.append(cpu_ms(read, windows, seconds))
        ratio = statistics.median(b / a for a, b in zip(floors, reads, strict=True))
        with_store = statistics.median(b / a for a, b in zip(floors, cached, strict=True))
        results[name] = {"bare_ms": statistics.median(floors), "ratio": ratio, "cached": with_store}
        bare_ms = results[name]["bare_ms"]
        print(f"{name:12}  bare {bare_ms:7.2f} ms  read {ratio:5.2f}x  with the tile store {with_store:5.2f}x")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", action="store_true", help="write the result file")
    arguments = parser.parse_args()
    keep_freed_memory()
    path = scene(arguments.size)
    start = time.process_time()
    open_image(path)
    opened = 1e3 * (time.process_time() - start)
    results = measure(path, arguments.size, arguments.seconds, arguments.rounds)
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    found = {"size": arguments.size, "open_ms": round(opened, 1), "results": rounded}
    publish("read", found, keep=arguments.keep)


if __name__ == "__main__":
    main()
