"""Memory of each context encoder of linear cost at 64k, 256k and 1M tokens: forward and backward of four layers.

dim 768, bfloat16 tokens and weights, defaults otherwise, nothing kept (`budget_gib: 0`). `stores`: bytes of live
tensors at the peak above the tokens and the weights, in token stores (tokens x dim x 2 bytes); gradients and the output
are in it. `gib`: the same in GiB with tokens and weights, which is what a device must hold.

Counted on PyTorch's meta device, which makes every tensor but no numbers, so a million tokens can be counted on any
machine (in minutes a kind). Fused attention is counted as if it made its scores, which it does not; what an allocator
wastes is not in it. (dim 192, depth 2, 8,192 tokens, CPU, for real: the same for `mamba2` and `xl`, 0.4 to 0.8 of the
count for `longformer`, `window` and `hyper`; `mamba` works in smaller pieces there.) With
`--device cuda` each is run for real, and stands beside the count of the last result file: `cuda_gib` is
`torch.cuda.max_memory_allocated`, `seconds` a second run of the same step.

    python benchmarks/bench_context_memory.py [--kinds mamba2 xl] [--tokens 65536 262144] [--device cuda] [--keep]
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from typing import Any

from report import in_child, lattice, newest, publish

KINDS = ("mamba2", "mamba", "xl", "longformer", "window", "hyper")
TOKENS = (65_536, 262_144, 1_048_576)
DIM, DEPTH = 768, 4
GIB = 2**30


def made(kind: str, tokens: int, device: str) -> tuple[Any, Any, Any]:
    """An encoder, tokens that want a gradient, and coordinates (on the host, where the scan order is made)."""
    import torch

    from gigaxt.nn.context import ContextConfig, build_context

    with torch.device(device):
        encoder = build_context(ContextConfig(kind=kind, dim=DIM, depth=DEPTH, keep_tokens=0)).to(torch.bfloat16)
        x = torch.randn(1, tokens, DIM, dtype=torch.bfloat16, requires_grad=True)
    return encoder, x, lattice(tokens)


def count(kind: str, tokens: int) -> dict[str, Any]:
    import torch

    from gigaxt.testing.live_memory import LiveMemory

    # The meta device knows no autocast; its state is asked for and set all the same.
    torch.is_autocast_enabled = lambda kind: False
    torch.get_autocast_dtype = lambda kind: torch.bfloat16
    torch.autocast = lambda *args, **kwargs: nullcontext()
    encoder, x, coords = made(kind, tokens, "meta")
    held = [x, *encoder.parameters(), *encoder.buffers()]
    with LiveMemory(held) as memory:
        encoder(x, coords)[0].sum().backward()
    total = memory.peak + sum(t.nbytes for t in held)
    return {"stores": round(memory.peak / x.nbytes, 1), "gib": round(total / GIB, 2)}


def run(kind: str, tokens: int) -> dict[str, Any]:
    import torch

    encoder, x, coords = made(kind, tokens, "cuda")
    for _ in range(2):  # the first loads and tunes kernels
        encoder.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        encoder(x, coords)[0].sum().backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return {"cuda_gib": round(torch.cuda.max_memory_allocated() / GIB, 2), "seconds": round(seconds, 3)}


def counts_so_far() -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of the last result file that was counted, by kind and tokens."""
    found = newest("context_memory") or {"rows": []}
    return {(row["kind"], row["tokens"]): row for row in found["rows"]}


def child(what: str, kind: str, tokens: int) -> dict[str, Any]:
    """One measurement in a process of its own, so that a failure stays alone."""
    return in_child(__file__, ["--child", what, kind, str(tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--device", choices=["meta", "cuda"], default="meta", help="count, or run for real")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, kind, tokens = options.child
        print(json.dumps({"count": count, "run": run}[what](kind, int(tokens))))
        return
    rows = []
    counted = counts_so_far() if options.device == "cuda" else {}
    for tokens in options.tokens:
        for kind in options.kinds:
            what = "run" if options.device == "cuda" else "count"
            rows.append(
                {"kind": kind, "tokens": tokens, **counted.get((kind, tokens), {}), **child(what, kind, tokens)}
            )
            print(rows[-1], flush=True)
    publish("context_memory", {"dim": DIM, "depth": DEPTH, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
