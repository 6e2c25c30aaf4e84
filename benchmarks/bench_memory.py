"""Peak memory of one exact training step against the side of the image: is it flat but for the tokens?

Each size runs in a child process: a tiled JPEG TIFF on disk is read lazily, one forward and backward pass with budget
0. The peak is the child's resident memory as the kernel counts it (ru_maxrss), minus `K` token stores (tokens x dim x
4 bytes). K is stated below and the same for all sizes. The context works in segments of 1,024 tokens, so that the
smallest image needs as much for them as the largest.

    python benchmarks/bench_memory.py [--sides 1024 2048 4096 8192 16384] [--heads classify segment] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import publish

K = 10.5
"""Token stores: tokens, their gradient, each layer's input (2), position features and the context (2), what a layer's
backward pass holds at work (summary and both scan directions: output, gradient, permuted copies)."""
REGION, DIM, DEPTH, TOKENS = 256, 192, 2, 64
GIB = 2**30


def make_image(path: Path, side: int) -> None:
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
    count = (side // 256) ** 2

    def encoded() -> Iterator[bytes]:
        for i in range(count):
            yield tiles[i * 7 % 8]

    tifffile.imwrite(
        path,
        encoded(),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="ycbcr",
        compression="jpeg",
        bigtiff=True,
    )


def child(path: str, head: str) -> dict[str, Any]:
    import torch

    import gigaxt

    torch.manual_seed(0)
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": REGION,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
        },
        "context": {"kind": "mamba2", "dim": DIM, "depth": DEPTH, "segment": 1024, "keep_tokens": 0},
        "head": {"kind": head, "classes": 4, **({"dim": 16} if head == "segment" else {})},
    }
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).train()
    model.streaming = gigaxt.Streaming(budget_gib=0.0, chunk_regions=4)
    image = gigaxt.open_image(path)
    small = torch.zeros(1, 3, REGION, REGION)  # loads what the first use of each library loads
    target = [np.zeros((REGION, REGION), np.uint8)] if head == "segment" else [1]
    model.loss(small, target).backward()
    model.zero_grad()
    mask = path.replace(".tif", "_mask.tif")
    target = [gigaxt.open_image(mask)] if head == "segment" else [1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    loss = model.loss([image], target)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = (image.height // REGION) * (image.width // REGION) * TOKENS
    store = tokens * DIM * 4
    return {
        "side_px": image.height,
        "seconds": round(seconds, 1),
        "loss": loss.item(),
        "before_gib": round(before / GIB, 3),
        "peak_gib": round(peak / GIB, 3),
        "token_store_gib": round(store / GIB, 4),
        "stores_used": round((peak - before) / store, 2),
        "peak_minus_k_stores_gib": round((peak - K * store) / GIB, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--heads", nargs="+", default=["classify", "segment"])
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in options.sides:
            path = Path(folder) / f"{side}.tif"
            make_image(path, side)
            make_mask(path.with_name(f"{side}_mask.tif"), side)
            for head in options.heads:
                # glibc keeps freed blocks for itself otherwise, and resident memory would tell of it, not of us.
                env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
                command = [sys.executable, __file__, "--child", str(path), head]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                rows.append({"head": head, **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], flush=True)
    publish("memory", {"k": K, "rows": rows}, keep=options.keep)


def make_mask(path: Path, side: int) -> None:
    """A mask on the same grid, deflated."""
    import tifffile

    block = np.zeros((256, 256), np.uint8)
    block[:, 128:] = 1
    data = (block for _ in range((side // 256) ** 2))
    tifffile.imwrite(path, data, shape=(side, side), dtype=np.uint8, tile=(256, 256), compression="zlib", bigtiff=True)


if __name__ == "__main__":
    main()
