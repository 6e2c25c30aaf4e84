"""Seams: is a trained decoder's error larger at the borders of regions than inside of them?

A small model learns a smooth target, the mean of an image over a neighbourhood, as numbers; its error within 8 px of
the lines between cores is divided by that farther than 24 px from any line. Baseline in the same run: no halo.

    python benchmarks/bench_seams.py [--steps 300] [--halos 0 32]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from report import publish
from scipy.ndimage import gaussian_filter

from gigaxt import GigaXT, ModelConfig, Streaming, build_model, open_image

CORE, SIDE, REACH_PX = 128, 384, 6.0
NEAR_PX, FAR_PX = 8, 24


def scene(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """An image of soft noise (side, side, 1), and its mean around each pixel."""
    noise = np.random.default_rng(seed).normal(size=(SIDE, SIDE))
    image = gaussian_filter(noise, 1.5, mode="wrap")
    image /= image.std()
    target = gaussian_filter(image, REACH_PX, mode="nearest")
    return image[..., None].astype(np.float32), (target / target.std()).astype(np.float32)


def train(halo: int, steps: int, seed: int = 0) -> GigaXT:
    """A model whose regions answer for `CORE` px, whatever the halo."""
    torch.manual_seed(seed)
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": CORE + 2 * halo,
            "in_channels": 1,
            "options": {"depths": [2, 2, 2, 2], "dims": [16, 24, 32, 48]},
        },
        "context": {"kind": "mamba2", "dim": 32, "depth": 1, "summary": 8},
        "head": {
            "kind": "segment",
            "classes": 1,
            "dim": 24,
            "target": "regression",
            "target_mean": [0.0],
            "target_std": [1.0],
        },
        "input": {"mean": [0.0], "std": [1.0], "halo": halo},
    }
    model = build_model(ModelConfig.from_dict(config))
    model.streaming = Streaming(budget_gib=None, chunk_regions=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        image, target = scene(1000 + step)
        loss = model([open_image(image)], [open_image(target)], seed=step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def seam_ratio(model: GigaXT, scenes: int = 6) -> tuple[float, float]:
    """Root mean square error near the lines between cores over that far from them, and the latter."""
    lines = np.arange(CORE, SIDE, CORE)
    distance = np.abs(np.arange(SIDE)[:, None] + 0.5 - lines).min(axis=1)
    nearest = np.minimum(distance[:, None], distance)
    inside = np.zeros((SIDE, SIDE), bool)
    inside[FAR_PX:-FAR_PX, FAR_PX:-FAR_PX] = True  # the scene's own border is another matter
    squares: dict[str, list[Any]] = {"near": [], "far": []}
    for seed in range(scenes):
        image, target = scene(seed)
        with torch.no_grad():
            error = (model([open_image(image)])[0][0].numpy() - target) ** 2
        squares["near"].append(error[(nearest < NEAR_PX) & inside])
        squares["far"].append(error[(nearest > FAR_PX) & inside])
    near, far = (float(np.sqrt(np.concatenate(squares[name]).mean())) for name in ("near", "far"))
    return near / far, far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--halos", type=int, nargs="+", default=[0, 32])
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    results = {}
    for halo in arguments.halos:
        ratio, far = seam_ratio(train(halo, arguments.steps))
        cost = ((CORE + 2 * halo) / CORE) ** 2
        print(
            f"halo {halo:>3} px: error at borders / inside {ratio:.3f}, inside {far:.4f}, pixels read x {cost:.2f}",
            flush=True,
        )
        results[str(halo)] = {"ratio": ratio, "inside": far, "pixels": cost}
    publish("seams", {"steps": arguments.steps, "halos": results}, keep=arguments.keep)


if __name__ == "__main__":
    main()
