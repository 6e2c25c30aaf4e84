"""What streaming costs: a training step against the bare backbone on the same regions, already in memory.

Classification, context `none`. The floor is the region encoder's forward and backward, chunk by chunk, on normalised
float pixels in memory, by ordinary autograd. Against it: the streamed step, read from a JPEG TIFF on disk, with
nothing kept (4/3 of the floor is the recomputation; at most 1.40 is allowed) and with everything kept (at most 1.05).

glibc hands large blocks back to the system at once, so that activations that are kept cost page faults at every step,
which the floor, a chunk at a time, does not have. By default the script therefore runs with settings under which freed
memory is used again (`REUSE`; worth having in every run on a CPU); `--allocator default` measures without.

Contenders take turns in one process; the ratio of each round is of neighbours in time, and the median is told. CPU time
counts all threads, so reading ahead is not free in it.

    python benchmarks/bench_overhead.py [--side 4096] [--rounds 3] [--backbones convnextv2_atto] [--keep]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_memory import make_image
from report import publish
from torch import Tensor

import gigaxt

REGION, CHUNK = 256, 8
REUSE = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "68719476736"}
"""Settings of glibc: no block is mapped on its own, and freed memory stays with the process."""
LIMITS = {"nothing kept": 1.40, "all kept": 1.05}


def build(backbone: str, device: str) -> gigaxt.GigaXT:
    torch.manual_seed(0)
    config = {
        "region_encoder": {"name": backbone, "region": REGION},
        "context": {"kind": "none", "dim": 192},
        "head": {"kind": "classify", "classes": 4},
    }
    return gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).to(device).train()


def bare(model: gigaxt.GigaXT, image: gigaxt.Image) -> Callable[[], None]:
    """Forward and backward of the region encoder alone, on pixels in memory."""
    batch, device = model.batch([image]), next(model.parameters()).device
    pixels: list[Tensor] = []
    for chunk in batch.chunks(CHUNK):
        raw = [image.read(place.col * REGION, place.row * REGION, REGION, REGION) for _, _, place in chunk.places]
        # Channels last in memory, as the model itself sees them.
        pixels.append((torch.from_numpy(np.stack(raw)).to(device).float() / 255).permute(0, 3, 1, 2))
    encoder = model.encode.encoder

    def step() -> None:
        for x in pixels:
            tokens = encoder(x)[0]
            tokens.backward(torch.full_like(tokens, 1e-3))

    return step


def streamed(model: gigaxt.GigaXT, image: gigaxt.Image, budget_gib: float) -> Callable[[], None]:
    def step() -> None:
        model.streaming = gigaxt.Streaming(budget_gib=budget_gib, chunk_regions=CHUNK)
        model.loss([image], [1]).backward()

    return step


def timed(step: Callable[[], None], model: gigaxt.GigaXT) -> tuple[float, float]:
    """CPU and wall seconds."""
    model.zero_grad()
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(backbone: str, side: int, rounds: int, folder: Path, device: str) -> dict[str, Any]:
    path = folder / f"{side}.tif"
    if not path.exists():
        make_image(path, (side, side))
    image = gigaxt.open_image(path)
    model = build(backbone, device)
    contenders = {
        "bare": bare(model, image),
        "nothing kept": streamed(model, image, 0.0),
        "all kept": streamed(model, image, 1000.0),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    model.loss(
        torch.zeros(1, 3, REGION, REGION, device=device), [1]
    ).backward()  # what the first use of each library loads
    for round_ in range(rounds):
        order = list(contenders) if round_ % 2 == 0 else list(contenders)[::-1]
        for name in order:
            times[name].append(timed(contenders[name], model))
    result: dict[str, Any] = {"backbone": backbone, "side_px": side, "regions": len(model.batch([image]).places)}
    result["bare_ms_a_region"] = round(1e3 * statistics.median(cpu for cpu, _ in times["bare"]) / result["regions"], 2)
    for name, limit in LIMITS.items():
        cpu = [a[0] / b[0] for a, b in zip(times[name], times["bare"], strict=True)]
        wall = [a[1] / b[1] for a, b in zip(times[name], times["bare"], strict=True)]
        result[name] = {
            "cpu_ratio": round(statistics.median(cpu), 3),
            "rounds": [round(ratio, 3) for ratio in cpu],
            "wall_ratio": round(statistics.median(wall), 3),
            "limit": limit,
        }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", default=["convnextv2_atto"])
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--device", default="cpu", help="on cuda the wall ratio is the one that counts")
    parser.add_argument("--allocator", choices=["reuse", "default"], default="reuse")
    options = parser.parse_args()
    if options.allocator == "reuse" and not REUSE.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **REUSE})  # read when a process starts
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(name, options.side, options.rounds, Path(folder), options.device) for name in options.backbones]
    result = {"chunk_regions": CHUNK, "threads": torch.get_num_threads(), "allocator": options.allocator, "rows": rows}
    publish("overhead", result, keep=options.keep)


if __name__ == "__main__":
    main()
