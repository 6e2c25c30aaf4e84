"""From a detector's maps to the objects of a 29,000 x 25,000 px scene with 20,000 objects: time, memory, duplicates.

The network is left out: what it costs is `bench_memory.py`'s. Each region's maps are made from the true boxes with
noise (every answering cell says another box, up to 6% of its side off), so that an object has about nine different
candidates, and one on a border has them in two or four regions. What is measured is what follows: candidates, pool,
suppression; and, for 200,000 candidates, `gigaxt.found.nms.suppress` beside torchvision's `nms`.

    python benchmarks/bench_detect.py [--width 29000 --height 25000 --objects 20000] [--keep]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from numpy.typing import NDArray
from report import publish
from torchvision.ops import nms

from gigaxt.found.boxes import CandidatePool, candidates, select
from gigaxt.found.nms import suppress
from gigaxt.nn.heads import DetectConfig
from gigaxt.nn.region_answers import RegionAnswer
from gigaxt.targets.boxes import BoxTarget, Lattice
from gigaxt.tasks.box_matching import FALSE, FOUND, match

REGION, CLASSES, STRIDES = 256, 4, (4, 8, 16, 32)
NOISE = 0.03
LARGE = 0.01
"""Share of objects that are larger than a region."""


def make_boxes(width: int, height: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Most in cells of a lattice of their own, 8 px and more; a hundredth of 300 to 700 px, anywhere."""
    rng = np.random.default_rng(0)
    large = round(count * LARGE)
    pitch = int(np.sqrt(width * height / count))
    cells = rng.permutation((width // pitch) * (height // pitch))[: count - large]
    row, col = np.divmod(cells, width // pitch)
    size = np.exp(rng.uniform(np.log(8), np.log(pitch * 0.9), (len(cells), 2)))
    low = np.stack([col, row], axis=1) * pitch + rng.random((len(cells), 2)) * (pitch - size)
    big = rng.uniform(300, 700, (large, 2))
    corner = rng.random((large, 2)) * ([width, height] - big)
    low, size = np.concatenate([low, corner]), np.concatenate([size, big])
    return np.concatenate([low, low + size], axis=1), rng.integers(0, CLASSES, len(low))


def noisy_maps(target: BoxTarget, x: int, y: int, w: int, h: int, rng: np.random.Generator) -> RegionAnswer:
    """What a good head would answer."""
    drawn = target.draw(x, y, REGION, REGION)
    classes, ltrb = drawn["classes"], drawn["distances_ltrb"]
    here = np.flatnonzero(classes >= 0)
    side = ltrb[here, :2] + ltrb[here, 2:]
    ltrb[here] += NOISE * np.tile(side, 2) * rng.uniform(-1, 1, (len(here), 4)).astype(np.float32)
    flat = np.full((CLASSES + 5, len(classes)), -9, dtype=np.float32)
    flat[classes[here], here] = rng.uniform(1, 5, len(here))
    flat[CLASSES : CLASSES + 4] = ltrb.T
    flat[-1] = 3
    maps, start = [], 0
    for stride in STRIDES:
        k = REGION // stride
        whole = torch.from_numpy(flat[:, start : start + k * k].reshape(-1, k, k))
        maps.append(whole[:, : -(-h // stride), : -(-w // stride)])
        start += k * k
    return RegionAnswer(x, y, tuple(maps), np.ones((h, w), np.bool_))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def find(width: int, height: int, count: int) -> dict[str, float]:
    boxes, classes = make_boxes(width, height, count)
    lattice = Lattice(STRIDES, max_cells=8.0, radius=1.5)
    target = BoxTarget(boxes, classes, size_px=(height, width), lattice=lattice)
    config = DetectConfig(classes=CLASSES)
    pool, rng, seconds, regions, given = CandidatePool(width, height), np.random.default_rng(1), 0.0, 0, 0
    before = peak_mib()
    for y in range(0, height, REGION):
        for x in range(0, width, REGION):
            answer = noisy_maps(target, x, y, min(REGION, width - x), min(REGION, height - y), rng)
            start = time.process_time()
            found = candidates(answer, STRIDES, config)
            pool.add(found)
            seconds += time.process_time() - start
            regions, given = regions + 1, given + len(found.scores)
    start = time.process_time()
    objects = select(pool.all(), config)
    suppression = time.process_time() - start
    assert objects.boxes_xyxy is not None
    ignored = np.zeros(len(boxes), np.bool_)
    matched = match(objects.boxes_xyxy, objects.classes, boxes, classes, ignored)
    return {
        "regions": regions,
        "objects": len(boxes),
        "candidates": given,
        "found": int((matched == FOUND).sum()),
        "duplicates_and_others": int((matched == FALSE).sum()),
        "candidates_cpu_s": round(seconds, 2),
        "suppression_cpu_s": round(suppression, 2),
        "peak_mib_more": round(peak_mib() - before, 1),
    }


def compare(count: int) -> dict[str, float]:
    """CPU time of the two on `count` candidates, about ten an object, and whether they agree."""
    rng = np.random.default_rng(2)
    which = rng.integers(0, count // 10, count)
    centre = rng.uniform(0, 29_000, (count // 10, 2))[which] + rng.normal(0, 3, (count, 2))
    size = np.exp(rng.uniform(2, 4.5, (count // 10, 2)))[which]
    boxes, scores = np.concatenate([centre - size / 2, centre + size / 2], axis=1), rng.random(count)
    start = time.process_time()
    ours = suppress(boxes, scores, 0.6)
    middle = time.process_time()
    theirs = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.6).numpy()
    end = time.process_time()
    return {
        "nms_candidates": count,
        "nms_equal": bool((ours == theirs).all()) if len(ours) == len(theirs) else False,
        "nms_cpu_s": round(middle - start, 2),
        "nms_torchvision_cpu_s": round(end - middle, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=29_000)
    parser.add_argument("--height", type=int, default=25_000)
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--nms", type=int, default=200_000, help="candidates of the comparison")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scene = find(options.width, options.height, options.objects)
    for name, value in scene.items():
        print(f"{name:>24}  {value:,}")
    size = {"width": options.width, "height": options.height}
    publish("detect", {**size, **scene, **compare(options.nms)}, keep=options.keep)


if __name__ == "__main__":
    main()
