"""A class mask of 29,000 x 25,000 px, written in regions of 256 px as inference does: wall, CPU, peak memory, size.

Each case runs in a child process of its own: TiffWriter with regions in raster order, in Hilbert-like (Z) order and
from two threads (one half of the image each), with zstd, and, where rasterio is installed, rasterio's tiled GeoTIFF
(DEFLATE 1) with overviews built afterwards, the best that `facts/io.md` found. `baseline` makes the regions and writes
nothing; its CPU time is taken off in the ratio. Seconds on a busy machine mean little: compare CPU within one run.

    python benchmarks/bench_write.py [--quick] [--keep]        # --quick: 5,800 x 5,000 px
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from report import publish

WIDTH, HEIGHT, REGION, CLASSES = 29_000, 25_000, 256, 6
COLORMAP = [(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)]
CASES = ("baseline", "raster", "z-order", "two threads", "zstd", "rasterio")


def region(x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
    """Blobs of six classes with ragged borders, cheap to make: about as compressible as a land-cover map."""
    rows = np.sin(np.arange(y, y + h, dtype=np.float32) / 310)[:, None]
    cols = np.sin(np.arange(x, x + w, dtype=np.float32) / 270)[None, :]
    ragged = ((np.arange(y, y + h)[:, None] * 7 ^ np.arange(x, x + w)[None, :] * 13) & 31).astype(np.float32) / 200
    return np.clip((rows + cols + ragged + 2) * (CLASSES / 4), 0, CLASSES - 1).astype(np.uint8)


def places(width: int, height: int, *, z_order: bool = False) -> list[tuple[int, int]]:
    found = [(x, y) for y in range(0, height, REGION) for x in range(0, width, REGION)]
    if z_order:
        found.sort(key=lambda place: spread(place[0] // REGION) | spread(place[1] // REGION) << 1)
    return found


def spread(value: int) -> int:
    return sum((value >> bit & 1) << 2 * bit for bit in range(16))


def regions(width: int, height: int, order: list[tuple[int, int]]) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    for x, y in order:
        yield x, y, region(x, y, min(REGION, width - x), min(REGION, height - y))


def write_ours(path: Path, width: int, height: int, case: str) -> None:
    from gigaxt.image.writer import TiffWriter

    order = places(width, height, z_order=case == "z-order")
    compression = "zstd" if case == "zstd" else "deflate"
    with TiffWriter(path, height, width, colormap=COLORMAP, compression=compression) as writer:
        if case == "two threads":
            with ThreadPoolExecutor(2) as pool:
                halves = order[: len(order) // 2], order[len(order) // 2 :]
                list(pool.map(lambda half: [writer.write(*item) for item in regions(width, height, half)], halves))
        else:
            for item in regions(width, height, order):
                writer.write(*item)


def write_rasterio(path: Path, width: int, height: int) -> None:
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    profile = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": "uint8", "tiled": True}
    tiles = {"blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1, "bigtiff": "yes"}
    with rasterio.Env(GDAL_CACHEMAX=64, GDAL_NUM_THREADS=1):
        with rasterio.open(path, "w", **profile, **tiles) as file:
            for x, y, pixels in regions(width, height, places(width, height)):
                file.write(pixels, 1, window=Window(x, y, pixels.shape[1], pixels.shape[0]))
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2, 4, 8, 16, 32, 64], Resampling.mode)


def run_case(case: str, width: int, height: int) -> dict[str, float]:
    """In the child: do it once and report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.tif"
        start, cpu = time.perf_counter(), time.process_time()
        if case == "baseline":
            import gigaxt.image.writer  # noqa: F401  # so that the memory of the imports is in the baseline

            for _ in regions(width, height, places(width, height)):
                pass
        elif case == "rasterio":
            write_rasterio(path, width, height)
        else:
            write_ours(path, width, height, case)
        return {
            "wall_s": round(time.perf_counter() - start, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "file_mib": round(path.stat().st_size / 2**20, 1) if path.exists() else 0.0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the size a side")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    width, height = (WIDTH // 5, HEIGHT // 5) if options.quick else (WIDTH, HEIGHT)
    if options.case:
        print(json.dumps(run_case(options.case, width, height)))
        return
    print(f"mask of {width} x {height} px, regions of {REGION} px, one uint8 band")
    found: dict[str, dict[str, float]] = {}
    for case in CASES:
        if case == "rasterio" and not util.find_spec("rasterio"):
            continue
        command = [sys.executable, __file__, "--case", case, *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(f"{case:12}", *(f"{name} {value:>8}" for name, value in found[case].items()))
    result: dict[str, object] = {"width": width, "height": height, "cases": found}
    if "rasterio" in found:
        made = found["baseline"]["cpu_s"]
        ratio = (found["raster"]["cpu_s"] - made) / (found["rasterio"]["cpu_s"] - made)
        result["cpu_over_rasterio"] = round(ratio, 3)
    publish("write", result, keep=options.keep)


if __name__ == "__main__":
    main()
