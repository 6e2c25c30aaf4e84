"""Memory and time of one training step against the size of the image: are they linear in its pixels, and where from?

Each size runs in a child process: a tiled JPEG TIFF on disk is read lazily, one forward and backward pass with budget
0. The peak is the child's resident memory as the kernel counts it (VmHWM). Beside it stands what is predicted from
the number of tokens alone:

    before + WORK + K token stores            (a token store: tokens x dim x 4 bytes)

`before` is what the process held before the step (Python, torch, timm, the model), WORK one chunk of the region encoder
and one segment of the context at work, from the smallest image of two segments (2,048 px with 8 x 8 tokens a region).
K is the same for all sizes: see `K`. Time is that of the CPU, of all threads, because the machine may be shared.

    python benchmarks/bench_memory.py [--sizes 1024 2048 29000x25000] [--heads classify segment] [--tokens 8] [--keep]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import in_child, publish

from gigaxt.machine import peak_resident_gib

K = {"classify": 7.4, "segment": 9.4}
"""Token stores at the peak, in the backward pass of the last layer's mixer: the tokens (1), what went into both layers
(2) and into the first one's MLP (1), the gradient that comes in (1) and those of the two directions (2), and 0.4 of
states at the segments' borders. A dense model also holds the context and its gradient (2)."""
REGION, DIM, DEPTH, SEGMENT = 256, 192, 2, 2048
GIB = 2**30
ALLOCATORS = {"kept": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}}
"""Settings of glibc: as the command line has it, which keeps freed memory; or each block on its own, which is slower,
but so that resident memory tells of us alone."""
Size = tuple[int, int]
"""Width and height, px."""


def size_of(text: str) -> Size:
    """From "4096" or "29000x25000"."""
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def tiles_of(size: Size) -> int:
    return -(-size[0] // 256) * -(-size[1] // 256)


def make_image(path: Path, size: Size) -> None:
    """A JPEG TIFF of a few distinct tiles; big on the outside, quick to make."""
    import imagecodecs
    import tifffile

    rng = np.random.default_rng(0)
    tiles = [
        imagecodecs.jpeg8_encode(
            rng.integers(0, 255, (16, 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1), level=85
        )
        for _ in range(8)
    ]

    def encoded() -> Iterator[bytes]:
        for i in range(tiles_of(size)):
            yield tiles[i * 7 % 8]

    tifffile.imwrite(
        path,
        encoded(),
        shape=(size[1], size[0], 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="ycbcr",
        compression="jpeg",
        bigtiff=True,
    )


def make_mask(path: Path, size: Size) -> None:
    """A mask on the same grid, deflated."""
    import tifffile

    block = np.zeros((256, 256), np.uint8)
    block[:, 128:] = 1
    data = (block for _ in range(tiles_of(size)))
    shape = (size[1], size[0])
    tifffile.imwrite(path, data, shape=shape, dtype=np.uint8, tile=(256, 256), compression="zlib", bigtiff=True)


def build(head: str, device: str, tokens_a_side: int) -> Any:
    """A small model that keeps nothing for the backward pass."""
    import torch

    import gigaxt

    torch.manual_seed(0)
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": REGION,
            "tokens": tokens_a_side,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
        },
        "context": {"kind": "mamba2", "dim": DIM, "depth": DEPTH, "segment": SEGMENT, "keep_tokens": 0},
        "head": {"kind": head, "classes": 4, **({"dim": 16} if head == "segment" else {})},
    }
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).to(device).train()
    model.streaming = gigaxt.Streaming(budget_gib=0.0, chunk_regions=4)
    return model


def child(path: str, head: str, device: str, per_side: str) -> dict[str, Any]:
    import torch

    import gigaxt
    from gigaxt.allocator import keep_freed_memory

    keep_freed_memory()  # unless the environment says otherwise
    model = build(head, device, int(per_side))
    image = gigaxt.open_image(path)
    small = torch.zeros(1, 3, REGION, REGION, device=device)  # loads what the first use of each library loads
    target = [np.zeros((REGION, REGION), np.uint8)] if head == "segment" else [1]
    model.loss(small, target).backward()
    model.zero_grad()
    target = [gigaxt.open_image(path.replace(".tif", "_mask.tif"))] if head == "segment" else [1]
    before = peak_bytes(device)
    start, cpu = time.perf_counter(), time.process_time()
    loss = model.loss([image], target)
    loss.backward()
    peak = peak_bytes(device)
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - start
    regions = -(-image.height // REGION) * -(-image.width // REGION)
    tokens = regions * int(per_side) ** 2
    return {
        "size_px": [image.width, image.height],
        "pixels": image.width * image.height,
        "regions": regions,
        "tokens": tokens,
        "cpu_s": round(cpu, 2),
        "wall_s": round(seconds, 1),
        "loss": loss.item(),
        "before_gib": round(before / GIB, 3),
        "peak_gib": round(peak / GIB, 3),
        "token_store_gib": round(tokens * DIM * 4 / GIB, 4),
    }


def peak_bytes(device: str) -> int:
    """Of the process, or of a CUDA device."""
    if device == "cpu":
        return int(peak_resident_gib() * GIB)
    import torch

    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def run_child(path: Path, head: str, device: str, per_side: int, allocator: str) -> dict[str, Any]:
    found = in_child(__file__, ["--child", str(path), head, device, str(per_side)], ALLOCATORS[allocator])
    if "failed" in found:
        sys.exit(found["failed"])
    return found


def predict(rows: list[dict[str, Any]], head: str) -> None:
    """Add `predicted_gib` to the rows of one head; the row that WORK comes from is no prediction and gets none."""
    first = base_of(rows)
    if first is None:
        return
    work = first["peak_gib"] - first["before_gib"] - K[head] * first["token_store_gib"]
    for row in rows:
        if row["regions"] > first["regions"]:
            row["predicted_gib"] = round(row["before_gib"] + work + K[head] * row["token_store_gib"], 3)


def base_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The smallest image that has two full segments, so that it needs as much for one at work as the largest."""
    return next((row for row in rows if row["tokens"] >= 2 * SEGMENT), None)


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents in pixels, by least squares on logarithms: of the CPU time, and of the memory that grows.

    Memory has a constant part; what grows is the peak above `before`, less that of the base row, against the pixels
    that are more than in that row.
    """

    def slope(x: list[float], y: list[float]) -> float:
        return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 3)

    found = {"cpu_time": slope([row["pixels"] for row in rows], [row["cpu_s"] for row in rows])}
    first = base_of(rows)
    larger = [row for row in rows if first is not None and row["regions"] > first["regions"]]
    if first is not None and len(larger) > 1:
        base = first["peak_gib"] - first["before_gib"]
        grown = [row["peak_gib"] - row["before_gib"] - base for row in larger]
        found["memory"] = slope([row["pixels"] - first["pixels"] for row in larger], grown)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size_of, nargs="+", default=[(side, side) for side in (1024, 2048, 4096)])
    parser.add_argument("--heads", nargs="+", default=["classify", "segment"])
    parser.add_argument("--tokens", type=int, default=8, help="tokens along a side of a region")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="kept")
    parser.add_argument("--device", default="cpu", help="cuda: its memory in place of the process's")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--name", default="memory", help="of the result file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    setting = {"segment": SEGMENT, "tokens_a_side": options.tokens, "allocator": options.allocator}
    result: dict[str, Any] = {"k": K, **setting, "heads": {}}
    for head in options.heads:
        rows: list[dict[str, Any]] = []
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "scene.tif"
                make_image(path, size)
                if head == "segment":
                    make_mask(path.with_name("scene_mask.tif"), size)
                rows.append({"head": head, **run_child(path, head, options.device, options.tokens, options.allocator)})
            predict(rows, head)
            print(rows[-1], flush=True)
        result["heads"][head] = {"rows": rows, "exponents": exponents(rows) if len(rows) > 2 else {}}
    publish(options.name, result, keep=options.keep)


if __name__ == "__main__":
    main()
