"""What each context encoder finds in scenes of 1,024 px, where the mark is up to 16 regions away from a glyph.

The rules, models and score of `bench_learning.py`. A model first learns at 128 px, as there; then it takes some steps
on larger and larger scenes, at last on whole scenes of 1,024 px (256 regions, 1,024 tokens), through their exact
gradient; then it is scored on scenes of that size that it has not seen. `iou_before` is its score on them after the
first part: how far what was learnt at 4 regions carries over by itself.

Each finished run is a line of the runs file, and is not run again. One run takes five to eight minutes of one core.

    python benchmarks/bench_scene_learning.py [--kinds none mamba2] [--rules legend] [--seeds 0] [--keep]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_learning import DECAY, OPTIONS, STEPS, iou_on_glyphs, lr_share, make_model, scene_config, table, train
from numpy.typing import NDArray
from report import RESULTS, finished_runs, publish
from torch import Tensor

import gigaxt
from gigaxt.datasets.legend import LegendConfig, draw_scene, render

SIDE = 1024
STAGES = ((256, 8, 80), (512, 4, 50), (SIDE, 2, 40))
"""Side in px, scenes a step, steps."""
LARGE_LR, LARGE_WARMUP = 5e-4, 10
TEST_SCENES, FIRST_TRAIN, FIRST_TEST = 12, 10**7, 10**8


def large_scene(config: LegendConfig, index: int) -> tuple[Tensor, NDArray[np.uint8], NDArray[np.bool_]]:
    """A scene: image (3, H, W), mask (H, W), and where glyphs of any kind are."""
    scene, (height, width) = draw_scene(config, index), config.size_px
    pixels, mask = render(config, scene, 0, 0, width, height)
    shown = replace(scene, classes=np.ones_like(scene.classes))
    glyphs = render(config, shown, 0, 0, width, height)[1] > 0
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() - 115) / 30, mask, glyphs


def go_on(model: gigaxt.GigaXT, config: LegendConfig) -> None:
    """The stages, under one learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), LARGE_LR, weight_decay=DECAY)
    steps = [(side, batch) for side, batch, count in STAGES for _ in range(count)]
    index = FIRST_TRAIN
    for step, (side, batch) in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = LARGE_LR * lr_share(step, len(steps), LARGE_WARMUP)
        sized = replace(config, size_px=(side, side))
        images, masks, _ = zip(*(large_scene(sized, index + i) for i in range(batch)), strict=True)
        index += batch
        model(torch.stack(images), list(masks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def glyph_iou(model: gigaxt.GigaXT, config: LegendConfig) -> float:
    """`iou_on_glyphs` of all test scenes."""
    shown = []
    for index in range(FIRST_TEST, FIRST_TEST + TEST_SCENES):
        image, mask, glyphs = large_scene(config, index)
        shown.append((mask[glyphs], model(image[None]).argmax(1)[0].numpy()[glyphs]))
    return iou_on_glyphs(shown, len(config.mask_classes))


def one_run(rule: str, kind: str, seed: int) -> dict[str, Any]:
    start = time.process_time()
    config = scene_config(rule, seed)
    model = make_model(rule, kind, seed)
    train(model, config, STEPS[rule])
    large = replace(config, size_px=(SIDE, SIDE))
    before = glyph_iou(model, large)
    go_on(model, config)
    return {
        "rule": rule,
        "kind": kind,
        "seed": seed,
        "steps": [STEPS[rule], *(count for _, _, count in STAGES)],
        "iou_before": round(before, 3),
        "iou": round(glyph_iou(model, large), 3),
        "cpu_s": round(time.process_time() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--rules", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=RESULTS / "scene_learning_runs.jsonl", help="continued")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        {"rule": rule, "kind": kind, "seed": seed}
        for seed in options.seeds
        for rule in options.rules
        for kind in options.kinds
    )
    rows = finished_runs(options.runs, wanted, one_run)
    print(table(rows, options.rules, options.kinds), flush=True)
    publish("scene_learning", {"side_px": SIDE, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
