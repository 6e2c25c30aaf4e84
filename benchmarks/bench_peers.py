"""gigaxt against its peers, in the same run on the same files: a training step, and the segmentation of a scene.

    train     floor         timm's network on regions in memory, a chunk at a time: nothing read, nothing kept
              whole         timm's network on the whole image
              checkpointed  the same with timm's gradient checkpointing
              lightstream   streams the convolutions of a CNN; exact for the whole image, normalisation frozen
              gigaxt        nothing kept, read lazily
    predict   monai         sliding_window_inference
              sahi          slice_image, the network on each slice
              gigaxt        predict

Networks are small and the same within a part (no context: the peers have none), on one thread. Every measurement is
a process of its own with a limit to its memory (RLIMIT_DATA); a contender that fails at a size is not tried at larger
ones. Peaks are resident memory as the kernel counts it, `before` what was held before the step (Python, torch, the
network; of the floor its regions, too). glibc's allocator is left as it is for all. Time is that of the CPU, since the
machine may be shared; reading (not of the floor) and writing count.

A peer that is not installed is left out with the reason. None is a dependency of gigaxt; to have them beside it:

    pip install --no-deps --target DIR monai sahi lightstream lightning pytorch-lightning fire termcolor click \
        opencv-python-headless tqdm requests
    PYTHONPATH=DIR python benchmarks/bench_peers.py [--parts train predict] [--sizes 1024 2048 29000x25000] [--keep]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench_memory import GIB, Size, make_image, peak_bytes, size_of
from peers import CONTENDERS, NEEDS
from report import publish

SCENE = (29_000, 25_000)
"""For which memory is extrapolated."""
BASE = {"train": "floor", "predict": "gigaxt"}
"""Whose time the others' are compared with."""
CLEAR_GIB = 0.1
"""A step that holds less than this beyond what was held before says nothing of how memory grows."""


def child(part: str, name: str, path: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    step = CONTENDERS[part][name](Path(path))
    before = peak_bytes("cpu")
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 1),
        "before_gib": round(before / GIB, 3),
        "peak_gib": round(peak_bytes("cpu") / GIB, 3),
    }


def run_child(part: str, name: str, path: Path, limit_gib: float) -> dict[str, Any]:
    """What it measured, or `failed`: why it did not."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", part, name, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * GIB),) * 2),
    )
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    memory = "memory" in done.stderr.lower()
    return {"failed": f"out of memory within {limit_gib:g} GiB" if memory else last[:200]}


def missing(name: str) -> str | None:
    """Why a peer cannot be asked."""
    lacking = [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def measure(part: str, names: list[str], sizes: list[Size], limit_gib: float, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    out = {name: reason for name in names if (reason := missing(name))}
    for name, reason in out.items():
        rows.append({"contender": name, "skipped": reason})
        print(rows[-1], flush=True)
    for size in sizes:
        path = folder / f"{size[0]}x{size[1]}.tif"
        if not path.exists():
            make_image(path, size)
        for name in names:
            if name in out:
                continue
            row = {
                "contender": name,
                "size_px": list(size),
                "pixels": size[0] * size[1],
                **run_child(part, name, path, limit_gib),
            }
            if "failed" in row:
                out[name] = row["failed"]
            else:
                row["mp_per_cpu_s"] = round(row["pixels"] / 1e6 / row["cpu_s"], 2)
            rows.append(row)
            print(row, flush=True)
    return rows


def extrapolated_gib(rows: list[dict[str, Any]]) -> float | None:
    """Of a scene of 29,000 x 25,000 px, by the line through one contender's two largest images.

    None: they are too small to tell, or that scene was measured; of gigaxt it always is (`bench_memory.py`).
    """
    last = [row for row in rows if row["peak_gib"] > row["before_gib"] + CLEAR_GIB][-2:]
    if len(last) < 2 or rows[0]["contender"] == "gigaxt" or last[1]["pixels"] >= SCENE[0] * SCENE[1]:
        return None
    (a, x), (b, y) = ((row["pixels"], row["peak_gib"]) for row in last)
    return round(y + (y - x) / (b - a) * (SCENE[0] * SCENE[1] - b), 1)


def summary(part: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contender: CPU time over that of `BASE` at each size, and memory of the large scene."""
    measured = [row for row in rows if "cpu_s" in row]
    base = {row["pixels"]: row["cpu_s"] for row in measured if row["contender"] == BASE[part]}
    found = []
    for name in dict.fromkeys(row["contender"] for row in measured):
        own = [row for row in measured if row["contender"] == name]
        ratios = {str(r["size_px"][0]): round(r["cpu_s"] / base[r["pixels"]], 2) for r in own if r["pixels"] in base}
        found.append({"contender": name, "cpu_ratio": ratios, "gib_at_29000x25000": extrapolated_gib(own)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    squares = [(side, side) for side in (1024, 2048, 4096)]
    parser.add_argument("--sizes", nargs="+", type=size_of, default=squares, help="px; of the floor multiples of 256")
    parser.add_argument("--contenders", nargs="+", help="only these")
    parser.add_argument("--limit-gib", type=float, default=6.0, help="memory that a process may have")
    parser.add_argument("--name", default="peers", help="first part of the result file's name")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    versions = {
        module: metadata.version(module)
        for module in ("monai", "sahi", "lightstream")
        if importlib.util.find_spec(module)
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            names = [name for name in CONTENDERS[part] if not options.contenders or name in options.contenders]
            rows = measure(part, names, options.sizes, options.limit_gib, Path(folder))
            result = {"limit_gib": options.limit_gib, "peers": versions, "rows": rows, "summary": summary(part, rows)}
            publish(f"{options.name}_{part}", result, keep=options.keep)


if __name__ == "__main__":
    main()
