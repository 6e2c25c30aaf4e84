"""Error of HyperAttention against exact attention, and from which length on it is the cheaper of the two.

    python benchmarks/bench_hyper_error.py [--lengths 8192 16384] [--repeats 3] [--keep]

The error is the Frobenius norm of the difference of the outputs over that of the exact output, the mean of `repeats`
draws of directions and samples; the baseline, `mean`, answers every query with the mean of all values. Two heads of 32
channels. `random`: queries, keys and values are independent normal numbers. `clustered`: queries and keys lie around
the same 64 centres, so that nearly all of a query's weight is on its own cluster (a 64th of the keys); the values have
a mean of each cluster and noise of the same size. `clustered keys`: the same without the clusters' means of the values.
The cost is CPU time of an encoder of one layer (dim 192, 6 heads, summary path and MLP included), forward and
backward, over that of the same encoder with exact attention in the same process, each the least of `repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from report import publish
from torch import Tensor

from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.context.hyper import DRAW_STEPS, HyperOptions, hyper_attention

HEADS, WIDTH, CLUSTERS = 2, 32, 64
SETTINGS = ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
"""(block, samples); the first is the default."""
COST_LENGTHS = (1024, 2048, 4096, 8192)


def draw_scene(kind: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, HEADS, n, WIDTH)."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, HEADS, *shape, WIDTH, generator=generator)

    q, k, v = normal(n), normal(n), normal(n)
    if kind == "random":
        return q, k, v
    centres, of_query, of_key = normal(CLUSTERS), *torch.randint(CLUSTERS, (2, n), generator=generator)
    # Scores are 11 on average within a cluster and 0 outside, with standard deviation 2.
    q, k = 0.3 * q + 2**0.5 * centres[:, :, of_query], 0.3 * k + 2**0.5 * centres[:, :, of_key]
    return q, k, v + normal(CLUSTERS)[:, :, of_key] if kind == "clustered" else v


def draw_sample(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Directions and draws, as a mixer has them at the start."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(HEADS, WIDTH, HyperOptions().hashes, generator=generator)
    return directions, torch.randint(DRAW_STEPS, (HEADS, samples), generator=generator)


def measure_errors(kind: str, n: int, repeats: int) -> dict[str, object]:
    q, k, v = draw_scene(kind, n)
    exact = F.scaled_dot_product_attention(q, k, v)

    def error(found: Tensor) -> float:
        return ((found - exact).norm() / exact.norm()).item()

    row: dict[str, object] = {"keys": kind, "tokens": n, "mean": round(error(v.mean(2, keepdim=True)), 3)}
    for block, samples in SETTINGS:
        found = (hyper_attention(q, k, v, *draw_sample(samples, seed), block) for seed in range(repeats))
        row[f"block {block} samples {samples}"] = round(statistics.mean(map(error, found)), 3)
    return row


def measure_cost(n: int, repeats: int) -> dict[str, float]:
    """CPU time of a layer over that of a layer with exact attention."""
    tokens = torch.randn(1, n, 192, generator=torch.Generator().manual_seed(n))
    coords = torch.stack((torch.arange(n) // 64, torch.arange(n) % 64), -1)[None]
    times: dict[int, list[float]] = {0: [], n: []}
    for _ in range(repeats):
        for exact_below, seconds in times.items():
            encoder = build_context(ContextConfig(kind="hyper", depth=1, options={"exact_below": exact_below}))
            start = time.process_time()
            y, _ = encoder(tokens, coords)
            y.sum().backward()
            seconds.append(time.process_time() - start)
    return {"tokens": n, "ratio": round(min(times[0]) / min(times[n]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    errors, costs = [], []
    with torch.no_grad():
        for kind in ("random", "clustered", "clustered keys"):
            for n in options.lengths:
                errors.append(measure_errors(kind, n, options.repeats))
                print(errors[-1], flush=True)
    for n in COST_LENGTHS:
        costs.append(measure_cost(n, options.repeats))
        print(costs[-1], flush=True)
    publish("hyper_error", {"hashes": HyperOptions().hashes, "errors": errors, "costs": costs}, keep=options.keep)


if __name__ == "__main__":
    main()
