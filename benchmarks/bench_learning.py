"""What each context encoder learns of far content, against `none`, at equal size and steps.

Two rules of `gigaxt.datasets.legend`, as masks. `beacon`: the mark in a corner names the class of all glyphs. `legend`:
glyphs of the mark's kind are to be found among others. Scenes of 128 px, regions of 64 px: no glyph lies in the region
of the mark (one in fifty touches it), so without context both rules are at chance. Every step sees fresh scenes.

The score is the mean IoU of the glyph classes on the pixels of glyphs, over test scenes that were not trained on: it
asks what a glyph is told to be, not where its edge is. Guessing gives 0.14 (`beacon`), calling all glyphs a match 0.25
(`legend`). Options keep the local kinds local: at their defaults all 16 tokens would be within reach.

Each finished run is a line of the runs file, and is not run again: after a change of the recipe use another file, or
remove it. One run takes one to two and a half minutes of one core.

    python benchmarks/bench_learning.py [--kinds none mamba2] [--rules legend] [--seeds 0 1 2] [--steps 100] [--keep]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from report import RESULTS, finished_runs, publish
from torch import Tensor

import gigaxt
from gigaxt.datasets.legend import LegendConfig, draw_scene, render

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {},
    "mamba2": {},
    "mamba": {},
    "xl": {"segment": 4},
    "hyper": {"block": 4, "samples": 4, "exact_below": 0},
    "longformer": {"window": 2},
    "window": {"radius": 1},
}
"""Each kind's own, for 16 tokens."""
STEPS = {"beacon": 250, "legend": 450}
"""Of each rule."""
BATCH, WARMUP = 16, 40
LR, DECAY = 1.5e-3, 0.05
KINDS, SIDE, REGION, DIM = 4, 128, 64, 128
TEST_SCENES, FIRST_TEST = 96, 10**8


def scene_config(rule: str, seed: int) -> LegendConfig:
    """Easier to tell apart than the data set's own settings, so that minutes are enough."""
    return LegendConfig(
        rule=rule,
        size_px=(SIDE, SIDE),
        kinds=KINDS,
        density=400.0,
        distance=0.2,
        contrast=0.8,
        texture=0.1,
        noise=0.03,
        rotation_deg=10.0,
        seed=seed,
    )


def make_model(rule: str, kind: str, seed: int) -> gigaxt.GigaXT:
    """The same but for the context's kind; all activations are kept."""
    classes = len(scene_config(rule, seed).mask_classes)
    config = {
        "region_encoder": {
            "name": "convnext_atto",
            "region": REGION,
            "options": {"depths": [1, 1, 2, 1], "dims": [24, 48, 96, DIM]},
        },
        "context": {"kind": kind, "dim": DIM, "depth": 1, "summary": 16, "options": OPTIONS[kind]},
        # Glyphs are a twentieth of the pixels: the background would drown their kind.
        "head": {"kind": "segment", "classes": classes, "dim": 24, "class_weights": [0.1] + [1.0] * (classes - 1)},
    }
    torch.manual_seed(seed)
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).train()
    model.streaming = gigaxt.Streaming(budget_gib=None, chunk_regions=1024)
    return model


def scenes(config: LegendConfig, first: int) -> tuple[Tensor, NDArray[np.uint8], NDArray[np.bool_]]:
    """A batch from scene `first` on: images (B, 3, H, W), masks (B, H, W), and where glyphs of any kind are."""
    drawn = [draw_scene(config, first + i) for i in range(BATCH)]
    pixels, masks = zip(*(render(config, scene, 0, 0, SIDE, SIDE) for scene in drawn), strict=True)
    shown = [replace(scene, classes=np.ones_like(scene.classes)) for scene in drawn]
    glyphs = np.stack([render(config, scene, 0, 0, SIDE, SIDE)[1] for scene in shown]) > 0
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return (images - 115) / 30, np.stack(masks), glyphs


def lr_share(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate that step `step` of `steps` uses: linear up, then half a cosine down to 0."""
    rest = max(0, step - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * rest)))


def train(model: gigaxt.GigaXT, config: LegendConfig, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps, WARMUP))
    for step in range(steps):
        images, masks, _ = scenes(config, step * BATCH)
        model(images, list(masks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def glyph_iou(model: gigaxt.GigaXT, config: LegendConfig) -> float:
    """`iou_on_glyphs` of all test scenes."""
    shown = []
    for first in range(FIRST_TEST, FIRST_TEST + TEST_SCENES, BATCH):
        images, masks, glyphs = scenes(config, first)
        logits = model(images)
        assert isinstance(logits, Tensor)
        shown.append((masks[glyphs], logits.argmax(1).numpy()[glyphs]))
    return iou_on_glyphs(shown, len(config.mask_classes))


def iou_on_glyphs(shown: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]], classes: int) -> float:
    """Mean IoU of the glyph classes, of pairs of true and answered classes (n,) of the pixels of glyphs."""
    counts = np.zeros((classes, classes))  # true class as row
    for true, answered in shown:
        cells = true.astype(np.int64) * classes + answered
        counts += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    return float((right / union)[1:].mean())


def one_run(rule: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    start = time.process_time()
    model, config = make_model(rule, kind, seed), scene_config(rule, seed)
    train(model, config, steps)
    return {
        "rule": rule,
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "iou": round(glyph_iou(model, config), 3),
        "cpu_s": round(time.process_time() - start),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def table(rows: Sequence[dict[str, Any]], rules: Sequence[str], kinds: Sequence[str]) -> str:
    """Markdown: min and mean over the seeds, a line a kind."""
    lines = [
        "| kind | " + " | ".join(f"{rule}: min, mean (seeds)" for rule in rules) + " |",
        "|---" * (1 + len(rules)) + "|",
    ]
    for kind in kinds:
        cells = []
        for rule in rules:
            ious = [row["iou"] for row in rows if (row["rule"], row["kind"]) == (rule, kind)]
            cells.append(f"{min(ious):.2f}, {np.mean(ious):.2f} ({len(ious)})" if ious else "-")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--rules", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="for a quick look; the table has the steps of `STEPS`")
    parser.add_argument("--runs", type=Path, default=RESULTS / "learning_runs.jsonl", help="finished runs; continued")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        {"rule": rule, "kind": kind, "seed": seed, "steps": options.steps or STEPS[rule]}
        for seed in options.seeds  # outermost: what is there early has all kinds
        for rule in options.rules
        for kind in options.kinds
    )
    rows = finished_runs(options.runs, wanted, one_run)
    print(table(rows, options.rules, options.kinds), flush=True)
    publish("learning", {"lr": LR, "batch": BATCH, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
