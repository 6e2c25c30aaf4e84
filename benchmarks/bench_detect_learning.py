"""What detection learns of far content: AP50 on `beacon` and `legend` with a context against `none`.

As `bench_learning.py`, with boxes in place of masks: scenes of 128 px, regions of 64 px, no glyph in the region of the
mark. `beacon`: the mark names the class of all glyphs, so that without context a box is found and its class is a guess
of four. `legend`: only glyphs of the mark's kind are objects; without context all are, which gives the share of
matching glyphs among all. Test scenes were not trained on; every step sees fresh ones. With `--head mask_rcnn` objects
have masks too; what is scored are their boxes.

    python benchmarks/bench_detect_learning.py [--head detect] [--kinds none mamba2] [--rules legend] [--keep]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_learning import BATCH, DECAY, DIM, FIRST_TEST, KINDS, OPTIONS, REGION, SIDE, lr_share, scene_config
from report import RESULTS, finished_runs, publish

import gigaxt
from gigaxt.datasets.legend import LegendConfig, boxes, draw_scene, render
from gigaxt.found.boxes import detect
from gigaxt.metrics import coco_score

LR, WARMUP, STEPS = 2e-3, 30, 400
TEST_SCENES = 64
HEADS = {
    "detect": {"dim": 32, "depth": 1, "strides": [8]},
    "mask_rcnn": {"dim": 32, "hidden": 128, "strides": [4, 8], "anchor_cells": 4.0, "proposals": 100, "samples": 64},
}
MEAN, STD = 115.0, 30.0


def make_model(head: str, rule: str, kind: str, seed: int) -> gigaxt.GigaXT:
    """The same but for the context's kind; all activations are kept."""
    config = {
        "region_encoder": {
            "name": "convnext_atto",
            "region": REGION,
            "options": {"depths": [1, 1, 2, 1], "dims": [24, 48, 96, DIM]},
        },
        "context": {"kind": kind, "dim": DIM, "depth": 1, "summary": 16, "options": OPTIONS[kind]},
        "head": {"kind": head, "classes": KINDS if rule == "beacon" else 1, **HEADS[head]},
        "input": {"mean": [MEAN] * 3, "std": [STD] * 3},
    }
    torch.manual_seed(seed)
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).train()
    model.streaming = gigaxt.Streaming(budget_gib=None, chunk_regions=1024)
    return model


def scene(config: LegendConfig, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels (H, W, 3), and the boxes to find, with masks."""
    drawn = draw_scene(config, index)
    xywh, _, classes = boxes(config, drawn)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    pixels, mask = render(config, drawn, 0, 0, SIDE, SIDE)
    masks = np.zeros((len(xyxy), SIDE, SIDE), bool)  # glyphs do not touch: what is in its box is an object's
    for own, (left, top, right, bottom) in zip(masks, xyxy, strict=True):
        own[top:bottom, left:right] = mask[top:bottom, left:right] > 0
    return pixels, {"boxes": xyxy, "labels": classes - 1, "masks": masks}


def train(model: gigaxt.GigaXT, config: LegendConfig, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps, WARMUP))
    for step in range(steps):
        pixels, targets = zip(*(scene(config, step * BATCH + i) for i in range(BATCH)), strict=True)
        if model.config.head.kind == "detect":
            targets = tuple({"boxes": target["boxes"], "labels": target["labels"]} for target in targets)
        images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() - MEAN) / STD
        loss = model(images, list(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def score(model: gigaxt.GigaXT, config: LegendConfig) -> dict[str, float]:
    """AP50 over the classes of glyphs, and over all boxes whatever their class."""
    model.eval()
    images: list[dict[str, int]] = []
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for index in range(FIRST_TEST, FIRST_TEST + TEST_SCENES):
        pixels, target = scene(config, index)
        images.append({"id": index, "height": SIDE, "width": SIDE})
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            place = {"image_id": index, "category_id": label + 1, "iscrowd": 0}
            truth.append({"id": len(truth) + 1, **place, "bbox": xywh_of(box), "area": 1})
        objects = detect(model, gigaxt.open_image(pixels))
        assert objects.boxes_xyxy is not None
        columns = objects.boxes_xyxy.tolist(), objects.classes.tolist(), objects.scores.tolist()
        for box, class_, confidence in zip(*columns, strict=True):
            entry = {"image_id": index, "category_id": class_ + 1, "bbox": xywh_of(box), "score": confidence}
            found.append(entry)
    categories = [{"id": i + 1} for i in range(model.config.head.classes)]
    data = {"images": images, "categories": categories, "annotations": truth}
    scores = [coco_score(data, found, use_categories=use)["stats"]["AP50"] for use in (True, False)]
    return {"AP50": round(scores[0], 3), "AP50_any_class": round(scores[1], 3)}


def xywh_of(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def one_run(head: str, rule: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    start = time.process_time()
    model, config = make_model(head, rule, kind, seed), scene_config(rule, seed)
    train(model, config, steps)
    scores = score(model, config)
    seconds = round(time.process_time() - start)
    return {"head": head, "rule": rule, "kind": kind, "seed": seed, "steps": steps, **scores, "cpu_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="detect")
    parser.add_argument("--kinds", nargs="+", choices=OPTIONS, default=["none", "mamba2"])
    parser.add_argument("--rules", nargs="+", choices=("beacon", "legend"), default=["beacon", "legend"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=Path, default=RESULTS / "detect_learning_runs.jsonl", help="finished runs")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        {"head": options.head, "rule": rule, "kind": kind, "seed": seed, "steps": options.steps}
        for seed in options.seeds
        for rule in options.rules
        for kind in options.kinds
    )
    rows = finished_runs(options.runs, wanted, one_run)
    publish("detect_learning", {"lr": LR, "batch": BATCH, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
