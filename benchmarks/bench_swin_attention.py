"""Swin V2's attention: timm's, written out, against gigaxt's, which keeps no scores, in the whole backbone.

Forward and backward of the region encoder on random regions in memory, with the same weights. Ratios are ours over
timm's: of time (the median of rounds that take turns), of what is kept for the backward pass, and on CUDA of the memory
that a step allocates at its peak.

    python benchmarks/bench_swin_attention.py [--device cuda] [--amp off bf16] [--regions 16] [--keep]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from report import publish

from gigaxt.nn import swin_attention
from gigaxt.nn.region_encoder import RegionEncoder, RegionEncoderConfig
from gigaxt.streaming.replay import counted_saves


def step(encoder: RegionEncoder, pixels: torch.Tensor, amp: str) -> None:
    encoder.zero_grad()
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=amp == "bf16"):
        tokens, _ = encoder(pixels)
    tokens.backward(torch.full_like(tokens, 1e-3))


def kept_mib(encoder: RegionEncoder, pixels: torch.Tensor, amp: str, fused: bool) -> float:
    """What a forward pass keeps for the backward pass, a region."""
    swin_attention.FusedWindowAttention.fused_attn = fused
    bf16 = torch.autocast(pixels.device.type, torch.bfloat16, enabled=amp == "bf16")
    with counted_saves([*encoder.parameters(), *encoder.buffers()]) as saved, bf16:
        encoder(pixels)
    return round(saved.bytes / len(pixels) / 2**20, 1)


def timed(encoder: RegionEncoder, pixels: torch.Tensor, amp: str, fused: bool) -> tuple[float, float]:
    """Seconds (CPU time, or of a CUDA device by the clock), and peak GiB above what was allocated (0 on a CPU)."""
    swin_attention.FusedWindowAttention.fused_attn = fused
    cuda = pixels.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = clock()
    step(encoder, pixels, amp)
    if cuda:
        torch.cuda.synchronize()
    seconds = clock() - start
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0


def compare(name: str, regions: int, rounds: int, device: str, amp: str) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = RegionEncoder(RegionEncoderConfig(name=name, region=256), maps=False).to(device).train()
    pixels = torch.randn(regions, 3, 256, 256, device=device)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for fused in (False, True):
        timed(encoder, pixels, amp, fused)  # what the first use loads
    for i in range(rounds):
        for fused in (False, True) if i % 2 == 0 else (True, False):
            found[fused].append(timed(encoder, pixels, amp, fused))
    seconds = {fused: statistics.median(s for s, _ in each) for fused, each in found.items()}
    peak = {fused: max(gib for _, gib in each) for fused, each in found.items()}
    row = {
        "backbone": name,
        "regions": regions,
        "amp": amp,
        "timm_kept_mib_a_region": kept_mib(encoder, pixels, amp, False),
        "kept_mib_a_region": kept_mib(encoder, pixels, amp, True),
        "timm_ms_a_region": round(1e3 * seconds[False] / regions, 2),
        "ms_a_region": round(1e3 * seconds[True] / regions, 2),
        "time_ratio": round(seconds[True] / seconds[False], 3),
        "rounds": [round(a / b, 3) for (a, _), (b, _) in zip(found[True], found[False], strict=True)],
        **({"timm_gib": round(peak[False], 3), "gib": round(peak[True], 3)} if device != "cpu" else {}),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["swinv2_tiny_window16_256", "swinv2_tiny_window8_256"])
    parser.add_argument("--regions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", nargs="+", choices=["off", "bf16"], default=["off"])
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    rows = [
        compare(name, options.regions, options.rounds, options.device, amp)
        for name in options.backbones
        for amp in options.amp
    ]
    publish("swin_attention", {"threads": torch.get_num_threads(), "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
