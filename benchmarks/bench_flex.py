"""Longformer's sliding window through FlexAttention against the blocks of fused attention that `longformer` uses.

FlexAttention skips the third of the scores that a block's band masks, and makes no mask. Whether that is faster is
asked here before it is built into the encoder: it needs CUDA (on a CPU it has no backward pass), is compiled for each
shape of a segment (past `recompile_limit` PyTorch silently falls back to a form that makes all scores), and segments of
scenes have many shapes. Both sides get the same tokens and weights: one mixer without recomputation, forward and
backward, in bfloat16. `error` is the largest difference of outputs and gradients over the largest value, in float32.

    python benchmarks/bench_flex.py [--tokens 4096 65536] [--windows 64 128 256] [--dims 192 768] [--keep]

Without CUDA only the outputs are compared, at 1,024 tokens, so that the mask is known to be right before it is timed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from report import publish
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gigaxt.nn.context.global_tokens import NearAttention
from gigaxt.nn.context.longformer import SlidingWindow

SIDE = 128
"""Queries and keys in a block of FlexAttention's mask."""
COUNT = 4
"""Global tokens."""
attend = torch.compile(flex_attention, dynamic=False)


def band_mask(valid: Tensor, window: int) -> BlockMask:
    """Each token sees those at most `window` away that are valid, itself, and the global tokens behind them all.

    Made of blocks: a table (tokens / 128) x (tokens / 128), never tokens x tokens. A narrower one, of the blocks that
    are touched alone, would do but is refused by PyTorch 2.14's compiler.
    """
    tokens = valid.shape[1]
    device = valid.device

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = (q - k).abs()
        real = valid[b, k.clamp(max=tokens - 1)]
        return (k >= tokens) | (distance == 0) | (distance <= window) & real

    start = torch.arange(-(-tokens // SIDE), device=device).unsqueeze(1) * SIDE  # of each block of queries
    column = torch.arange(-(-(tokens + COUNT) // SIDE), device=device) * SIDE  # of each block of keys
    in_band = (column + SIDE > start - window) & (column < start + SIDE + window)
    touched = in_band | (column + SIDE > tokens)
    return BlockMask.from_kv_blocks(
        touched.sum(1, dtype=torch.int32)[None, None],
        (~touched).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)[None, None],
        BLOCK_SIZE=SIDE,
        mask_mod=near,
        seq_lengths=(tokens, tokens + COUNT),
    )


class FlexWindow(SlidingWindow):
    """`SlidingWindow` of one segment (no halo), through FlexAttention."""

    def forward(self, x: Tensor, coords: Tensor, valid: Tensor, global_tokens: Tensor) -> tuple[Tensor]:
        """See `SlidingWindow.forward`."""
        attention = self.attention
        global_scores, global_key, global_value = attention.of_global_tokens(global_tokens)
        normed = attention.norm(x)
        query = attention.queries(normed, coords, global_scores)
        key, value = attention.keys_values(normed, coords, COUNT)
        key, value = torch.cat((key, global_key), dim=1), torch.cat((value, global_value), dim=1)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))  # (batch, heads, n, width)
        found = attend(q, k, v, block_mask=band_mask(valid, self.window), scale=attention.size**-0.5)
        return (x + attention.out(found[..., : attention.size].transpose(1, 2).flatten(2)).to(x.dtype),)


def scene(tokens: int, dim: int, dtype: torch.dtype, device: str) -> tuple[NearAttention, tuple[Tensor, ...]]:
    """An attention, and tokens, coordinates, validity (the last hundred masked) and global tokens of two scenes."""
    torch.manual_seed(0)
    attention = NearAttention(dim, dim // 32, 1.0).to(device, dtype)
    x = torch.randn(2, tokens, dim, device=device, dtype=dtype, requires_grad=True)
    places = torch.arange(tokens, device=device)
    coords = torch.stack((places // 64, places % 64), dim=-1).float().expand(2, -1, -1)
    valid = (places < tokens - 100).expand(2, -1).clone()
    valid[0] = True
    return attention, (x, coords, valid, torch.randn(2, COUNT, dim, device=device, dtype=dtype, requires_grad=True))


def results(window: SlidingWindow, inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    """The output, with `backward` also the gradients of inputs and weights."""
    if not backward:
        with torch.no_grad():
            return [*window(*inputs)]
    (y,) = window(*inputs)
    leaves = [t for t in (*inputs, *window.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), leaves)]


def difference(tokens: int, dim: int, width: int, device: str) -> float:
    """Largest difference over the largest value, of outputs and (on CUDA) gradients, in float32."""
    attention, inputs = scene(tokens, dim, torch.float32, device)
    pairs = zip(
        *(results(kind(attention, width, 0), inputs, device == "cuda") for kind in (SlidingWindow, FlexWindow)),
        strict=True,
    )
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def measure(kind: type[SlidingWindow], tokens: int, dim: int, width: int) -> dict[str, float]:
    """Milliseconds of forward and backward, the least of five, and GiB at the peak."""
    attention, inputs = scene(tokens, dim, torch.bfloat16, "cuda")
    window, times = kind(attention, width, 0), []
    for _ in range(7):  # two to compile and tune
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        results(window, inputs, True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"ms": round(1e3 * min(times[2:]), 2), "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 65_536])
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dims", type=int, nargs="+", default=[192, 768])
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if not torch.cuda.is_available():
        rows = [{"tokens": 1024, "dim": 64, "window": w, "error": difference(1024, 64, w, "cpu")} for w in (64, 200)]
    else:
        for tokens in options.tokens:
            for dim in options.dims:
                for width in options.windows:
                    row = {"tokens": tokens, "dim": dim, "window": width}
                    error = difference(min(tokens, 4096), dim, width, "cuda")
                    kinds = {"blocked": SlidingWindow, "flex": FlexWindow}
                    found = {name: measure(kind, tokens, dim, width) for name, kind in kinds.items()}
                    ratio = round(found["blocked"]["ms"] / found["flex"]["ms"], 2)
                    rows.append({**row, "error": error, **found, "blocked over flex": ratio})
                    print(rows[-1], flush=True)
    publish("flex", {"batch": 2, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
