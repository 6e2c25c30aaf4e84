"""What a step of a training waits for before it computes, on small images: files, windows, the first chunk.

`gigaxt train` opens the next step's images and reads their first chunk while a step computes (`training/ahead.py`).
Here a run of two epochs trains a small ConvNeXt on RGB images of 512 px (4 regions), four a step, once so and once with
each step opened in its turn, from a local disk and from storage that takes an artificial 5 ms before each answer and
sends 100 MB/s (as in `bench_storage.py`). The floor is the same step with the pixels in memory. By the clock; the first
step is left out, and what is told is the median of the others.

    python benchmarks/bench_ahead.py [--side 512] [--images 40] [--device cuda] [--keep]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_overhead import SMALL
from PIL import Image as Picture
from report import publish
from rich.console import Console

import gigaxt
from gigaxt.allocator import keep_freed_memory
from gigaxt.image.cache import FETCHED, SEGMENTS
from gigaxt.image.convert import convert_image
from gigaxt.training import run_config, train
from gigaxt.training.ahead import Ahead

BATCH = 4


def make_images(folder: Path, count: int, side: int, kind: str) -> Path:
    """Images of noise that is easy to compress, and their CSV."""
    rng = np.random.default_rng(0)
    lines = ["image,label,split"]
    for i in range(count):
        small = rng.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8)
        picture = folder / f"{i}.png"
        Picture.fromarray(small.repeat(16, 0).repeat(16, 1)).save(picture)
        if kind == "tif":
            convert_image(picture, picture.with_suffix(".tif"), tile=256)
        lines.append(f"{i}.{kind},{'ab'[i % 2]},train")
    csv = folder / f"{kind}.csv"
    csv.write_text("\n".join(lines))
    return csv


@contextmanager
def slow(folder: Path, latency_s: float, bytes_s: float) -> Iterator[None]:
    """All reads by position of files in `folder` wait, threads side by side."""
    pread, preadv = os.pread, os.preadv

    def wait(number: int, count: int) -> None:
        if Path(f"/proc/self/fd/{number}").readlink().is_relative_to(folder):
            time.sleep(latency_s + count / bytes_s)

    def slow_pread(number: int, count: int, offset: int) -> bytes:
        wait(number, count)
        return pread(number, count, offset)

    def slow_preadv(number: int, buffers: Any, offset: int) -> int:
        got = preadv(number, buffers, offset)
        wait(number, got)
        return got

    with patch("os.pread", slow_pread), patch("os.preadv", slow_preadv):
        yield


def config_of(csv: Path, device: str) -> gigaxt.training.RunConfig:
    model = {
        "region_encoder": {"name": "convnext_tiny", "region": 256, "options": SMALL},
        "context": {"kind": "none", "dim": 192},
        "head": {"kind": "classify", "classes": 2},
    }
    settings = {"device": device, "epochs": 2, "batch": BATCH, "amp": "off", "checkpoint_minutes": 1e9}
    return run_config({"data": {"csv": str(csv)}, "model": model, "train": settings})


def step_ms(csv: Path, device: str, out: Path, ahead: bool) -> float:
    """Median time of a step but the first."""
    ends: list[float] = []

    def on_step(_: int, __: int) -> None:
        ends.append(time.monotonic())
        SEGMENTS.clear()  # more images than are read again soon
        FETCHED.clear()

    with patch.object(Ahead, "_begin", Ahead._begin if ahead else lambda *_: None):
        train(config_of(csv, device), out, console=Console(quiet=True), on_step=on_step)
    return 1e3 * statistics.median(b - a for a, b in pairwise(ends))


def floor_ms(side: int, device: str) -> float:
    """The same step on pixels in memory, after the first."""
    config = config_of(Path("none.csv"), device)
    model = gigaxt.build_model(config.model).to(device).train()
    model.streaming = config.train.streaming
    optimizer = torch.optim.AdamW(model.parameters())
    images = [gigaxt.open_image(np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)) for i in range(4)]
    times = []
    for _ in range(8):
        started = time.monotonic()
        optimizer.zero_grad()
        model.loss(images, [0, 1, 0, 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # sync
        optimizer.step()
        times.append(time.monotonic() - started)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--images", type=int, default=40, help="more than the 32 that stay open")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--latency-ms", type=float, default=5.0)
    parser.add_argument("--mb-s", type=float, default=100.0)
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    rows: list[dict[str, Any]] = []
    storages: dict[str, Callable[[Path], Any]] = {
        "local": lambda _: nullcontext(),
        "slow": lambda folder: slow(folder, options.latency_ms / 1e3, options.mb_s * 1e6),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for kind in ("tif", "png"):
            csv = make_images(folder, options.images, options.side, kind)
            for storage, waiting in storages.items():
                floor = floor_ms(options.side, options.device)
                with waiting(folder):
                    found = {
                        how: round(step_ms(csv, options.device, folder / f"{kind} {storage} {how}", how == "ahead"), 1)
                        for how in ("in its turn", "ahead")
                    }
                row = {"images": kind, "storage": storage, "floor_ms": round(floor, 1), **found}
                row["ratios"] = {how: round(ms / floor, 3) for how, ms in found.items()}
                rows.append(row)
                print(row, flush=True)
    settings = {"side_px": options.side, "batch": BATCH, "latency_ms": options.latency_ms, "mb_s": options.mb_s}
    publish("ahead", {**settings, "device": options.device, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
