"""Cost of each context encoder against the length of the scene: does a token cost the same in a long one?

Time: forward and backward of one layer (mixer, summary path and MLP; nothing kept, so the forward pass is run twice),
CPU seconds per token, as a ratio to a pair of linear layers dim -> 3 dim -> dim that is measured in the same process
just before and after. `growth` is the ratio at the longest length over that at the shortest.

What they need of memory, `bench_context_memory.py` counts.

    python benchmarks/bench_context.py [--kinds mamba2 xl] [--lengths 16384 65536 262144] [--keep]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from report import in_child, lattice, publish

KINDS = ("mamba2", "mamba", "xl", "longformer", "window", "hyper", "full")
LENGTHS = (16_384, 65_536, 262_144)
FULL_TO = 16_384
"""Tokens up to which the quadratic `full` is timed."""
DIM = 192


def baseline(tokens: int) -> float:
    """CPU seconds per token of the pair of linear layers, forward and backward; the best of three."""
    import torch

    pair = torch.nn.Sequential(torch.nn.Linear(DIM, 3 * DIM), torch.nn.Linear(3 * DIM, DIM))
    x = torch.randn(tokens, DIM, requires_grad=True)
    times = []
    for _ in range(3):
        start = time.process_time()
        pair(x).sum().backward()
        times.append(time.process_time() - start)
    return min(times) / tokens


def timed(kind: str, tokens: int) -> dict[str, Any]:
    import torch

    from gigaxt.nn.context import ContextConfig, build_context

    torch.manual_seed(0)
    encoder = build_context(ContextConfig(kind=kind, dim=DIM, depth=1, keep_tokens=0))
    coords = lattice(tokens)
    x = torch.randn(1, tokens, DIM, requires_grad=True)
    encoder(x[:, :4096], coords[:, :4096])[0].sum().backward()  # what the first use loads and allocates
    before = baseline(16_384)
    times = []
    for _ in range(3 if tokens <= LENGTHS[0] else 1):
        start = time.process_time()
        encoder(x, coords)[0].sum().backward()
        times.append((time.process_time() - start) / tokens)
    linear = (before + baseline(16_384)) / 2
    return {"tokens": tokens, "us": round(min(times) * 1e6, 1), "ratio": round(min(times) / linear, 2)}


def child(kind: str, tokens: int) -> dict[str, Any]:
    """Run one measurement in a process of its own; resident memory never shrinks, and a failure stays alone."""
    return {"tokens": tokens, **in_child(__file__, ["--child", kind, str(tokens)])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, tokens = options.child
        print(json.dumps(timed(kind, int(tokens))))
        return
    rows = []
    for kind in options.kinds:
        lengths = [n for n in options.lengths if kind != "full" or n <= FULL_TO]
        row: dict[str, Any] = {"kind": kind, "time": [child(kind, n) for n in lengths]}
        ratios = [entry["ratio"] for entry in row["time"] if "ratio" in entry]
        if len(ratios) > 1:
            row["growth"] = round(ratios[-1] / ratios[0], 2)
        rows.append(row)
        print(row, flush=True)
    publish("context", {"dim": DIM, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
