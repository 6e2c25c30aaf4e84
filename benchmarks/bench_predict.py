"""Large scenes segmented on the CPU: peak memory above the model, and pixels a second.

Each case runs in a child process: an RGB JPEG TIFF on disk is read lazily, a small model writes its class raster. The
peak is the child's resident memory as the kernel counts it (VmHWM), less what it was once the model had segmented a
scene of one region. `plain` decodes each pixel once; `overlap` blends windows that overlap by a quarter, the default;
`probabilities` writes these, too. `objects` and `points` are models that find these, with fresh weights, which find
hardly any: what the network, context and maps of the scene cost (`bench_detect.py`: what objects cost). Seconds on a
busy machine mean little; CPU time a pixel is given beside them.

The size in question is 29000x25000 (width x height): 725 million px, nine minutes of CPU time. Memory has two parts
that grow: with the width, the rows of windows that are blended and written; with the area, the tokens. Strips of the
full width show the first at a fraction of the time, and `token_store_gib` says what the second is.

    python benchmarks/bench_predict.py [--sizes 2048x2048 29000x25000] [--cases plain overlap probabilities] [--keep]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_memory import make_image, peak_bytes, size_of
from report import in_child, publish

REGION, DIM, DEPTH, CLASSES = 256, 64, 1, 4
SEGMENT = {"kind": "segment", "classes": CLASSES, "dim": 16}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "plain": (SEGMENT, ".mask.tif", {"overlap": 0}),
    "overlap": (SEGMENT, ".mask.tif", {}),
    "probabilities": (SEGMENT, ".mask.tif", {"probabilities": "uint8"}),
    "objects": ({"kind": "detect", "classes": CLASSES, "dim": 16}, ".found.geojson", {}),
    "points": ({"kind": "points", "classes": CLASSES, "dim": 16}, ".found.csv", {}),
}
"""Case -> head, suffix of the answer, arguments of `gigaxt.predict`."""
LIMIT_GIB = 3.0
GIB = 2**30


def child(path: Path, case: str) -> dict[str, Any]:
    import torch

    import gigaxt
    from gigaxt.allocator import keep_freed_memory

    keep_freed_memory()  # as the command line does
    torch.manual_seed(0)
    head, suffix, arguments = CASES[case]
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": REGION,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
        },
        "context": {"kind": "mamba2", "dim": DIM, "depth": DEPTH, "segment": 1024},
        "head": head,
    }
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).eval()
    out = path.with_suffix(suffix)
    small = gigaxt.open_image(np.zeros((REGION, REGION, 3), np.uint8))  # loads what the first use of a library loads
    gigaxt.predict(model, small, out, **arguments)
    before = peak_bytes("cpu")
    image = gigaxt.open_image(path)
    pixels = image.height * image.width
    start, cpu = time.perf_counter(), time.process_time()
    gigaxt.predict(model, path, out, **arguments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    tokens = -(-image.height // REGION) * -(-image.width // REGION) * (REGION // 32) ** 2
    return {
        "height": image.height,
        "width": image.width,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "mp_per_s": round(pixels / seconds / 1e6, 3),
        "mp_per_cpu_s": round(pixels / cpu_seconds / 1e6, 3),
        "before_gib": round(before / GIB, 3),
        "above_model_gib": round((peak_bytes("cpu") - before) / GIB, 3),
        "token_store_gib": round(tokens * DIM * 4 / GIB, 4),
        "files_mib": round(sum(p.stat().st_size for p in path.parent.glob(f"{out.stem}*")) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["1024x1024", "2048x2048", "4096x4096"], help="width x height, px"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["overlap"])
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(Path(options.child[0]), options.child[1])))
        return
    rows: list[dict[str, Any]] = []
    sizes = [size_of(size) for size in options.sizes]
    for size in sizes:
        for case in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "scene.tif"
                make_image(path, size)
                found = in_child(__file__, ["--child", str(path), case])
                if "failed" in found:
                    sys.exit(found["failed"])
                rows.append({"case": case, **found})
                print(rows[-1], flush=True)
    most = max(row["above_model_gib"] for row in rows)
    publish("predict", {"limit_gib": LIMIT_GIB, "within_limit": most < LIMIT_GIB, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
