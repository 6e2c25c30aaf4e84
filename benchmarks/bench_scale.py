"""How large a scene trains on one GPU: an exact step of a full-size model, from a JPEG TIFF on disk.

Swin V2-T (or another backbone), regions of 256 px, and four layers of Mamba-2 of dim 768, in bfloat16. Nothing of the
encoder is kept (`--budget-gib` keeps some), the context's layers keep what goes into them on the host
(`--host-gib`). Each scene runs in a process of its own: two steps on a small scene, so that kernels are loaded, then
`--steps` on the scene, of which the last is told (the first also pins the host's memory). Told are memory at the peak
(what tensors held, and what PyTorch had reserved for them), seconds of the step and of its parts, regions a second,
and with `--profile` the share of the step in which the device was at work: its kernels and copies over the clock.

The file is large on the outside: the offsets of its tiles point to a few that differ.

    python benchmarks/bench_scale.py 29000x25000:8 65536:4 131072:4 [--chunk 64] [--readers 4] [--profile] [--keep]
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from bench_memory import peak_bytes, size_of
from report import in_child, publish

REGION, TILE, GIB = 256, 256, 2**30


def make_scene(path: Path, size: tuple[int, int]) -> None:
    """A tiled JPEG BigTIFF (TIFF 6.0, and the BigTIFF proposal of 2007) of `size` (width, height) in a few MiB."""
    import imagecodecs

    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(8)]
    tiles = [imagecodecs.jpeg8_encode(a.repeat(16, 0).repeat(16, 1), level=85) for a in coarse]
    starts = np.cumsum([16, *(len(tile) for tile in tiles)])
    count = -(-size[0] // TILE) * -(-size[1] // TILE)
    which = np.random.default_rng(1).integers(0, len(tiles), count)
    offsets, lengths = starts[which].astype("<u8"), np.array([len(tile) for tile in tiles], "<u8")[which]
    at = int(starts[-1])
    arrays = {258: np.full(3, 8, "<u2"), 324: offsets, 325: lengths}  # bits a sample, tile offsets, tile byte counts
    # (tag, value): width, height, JPEG, YCbCr, 3 samples, interleaved, tile sides, chroma by 2 x 2
    values = {256: size[0], 257: size[1], 259: 7, 262: 6, 277: 3, 284: 1, 322: TILE, 323: TILE, 530: 2 | 2 << 16}
    body, entries = b"", []
    for tag in sorted({*arrays, *values}):
        if tag in values:
            kind, number = (3, 2) if tag == 530 else (4, 1)
            entries.append(struct.pack("<HHQQ", tag, kind, number, values[tag]))
            continue
        data = arrays[tag].tobytes()
        kind = 3 if tag == 258 else 16
        inline = data.ljust(8, b"\0") if len(data) <= 8 else struct.pack("<Q", at + len(body))
        entries.append(struct.pack("<HHQ", tag, kind, len(arrays[tag])) + inline)
        body += data if len(data) > 8 else b""
    directory = struct.pack("<Q", len(entries)) + b"".join(entries) + struct.pack("<Q", 0)
    path.write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, at + len(body)) + b"".join(tiles) + body + directory)


def build(options: argparse.Namespace, tokens: int) -> Any:
    import torch

    import gigaxt

    torch.manual_seed(0)
    config = {
        "region_encoder": {"name": options.backbone, "region": REGION, "tokens": tokens},
        "context": {
            "kind": options.context,
            "dim": options.dim,
            "depth": options.depth,
            "segment": options.segment,
            "keep_tokens": 0,
            "host_gib": options.host_gib,
        },
        "head": {"kind": "classify", "classes": 10},
    }
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).to(options.device).train()
    model.streaming = gigaxt.Streaming(
        budget_gib=options.budget_gib,
        chunk_regions=options.chunk,
        readers=options.readers,
        cuda_graphs=options.graphs,
    )
    if options.compile:
        model.encode.encoder.compile()
    return model


class Clock:
    """The seconds of a step's four parts, by waiting for the device where one ends and the next begins."""

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self.marks = [self.now()]
        model.context.register_forward_pre_hook(lambda module, given: self.mark(given[0]))
        model.context.register_forward_hook(lambda module, given, found: self.mark(found[0]))

    def now(self) -> float:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, tensor: Any) -> None:
        self.marks.append(self.now())
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self.marks.append(self.now()))

    def parts(self) -> dict[str, float]:
        """After the step. The marks: start, before and after the context, then its gradients' in turn, the end."""
        names = ("encode", "context", "head", "context again and backward", "encode again and backward")
        ends = [*self.marks, self.now()]
        return {name: round(b - a, 3) for name, a, b in zip(names, ends, ends[1:], strict=False)}


def busy_share(trace: Path) -> float:
    """Of the time from the first to the last work of a device, that in which it was at work."""
    events = json.loads(trace.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - spans[0][0])


@contextmanager
def profiled(trace: Path, on_cuda: bool) -> Iterator[None]:
    """Write what the device, or the CPU, does in the block as a Chrome trace."""
    import torch

    kind = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        yield
    profile.export_chrome_trace(str(trace))


def child(path: str, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import gigaxt
    from gigaxt.machine import peak_resident_gib

    on_cuda = options.device == "cuda"
    model = build(options, tokens)

    def step(image: Any) -> Any:
        model.zero_grad()
        with torch.autocast(options.device, torch.bfloat16):
            loss = model.loss([image], [1])
        loss.backward()
        return loss

    small = Path(path).with_name("small.tif")
    make_scene(small, (2 * REGION, options.chunk * REGION))  # two chunks
    image = gigaxt.open_image(path)
    for warm in [gigaxt.open_image(small)] * 2 + [image] * (options.steps - 1):
        step(warm)
    model.zero_grad()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trace = Path(path).with_suffix(".json")
    clock, cpu = Clock(model, options.device), time.process_time()
    with profiled(trace, on_cuda) if options.profile else nullcontext():
        loss, parts = step(image), clock.parts()
    cpu, seconds = time.process_time() - cpu, sum(parts.values())
    regions = -(-image.height // REGION) * -(-image.width // REGION)
    reserved = {"reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2)} if on_cuda else {}
    return {
        "size_px": [image.width, image.height],
        "regions": regions,
        "tokens": regions * tokens**2,
        "token_store_gib": round(regions * tokens**2 * options.dim * 2 / GIB, 3),
        "peak_gib": round(peak_bytes(options.device) / GIB, 2),
        **reserved,
        "host_peak_gib": round(peak_resident_gib(), 2),
        "step_s": round(seconds, 2),
        "cpu_s": round(cpu, 1),
        "parts_s": parts,
        "regions_a_second": round(regions / seconds, 1),
        **({"device_busy": round(busy_share(trace), 3)} if options.profile and on_cuda else {}),
        "loss": loss.item(),
    }


def run_child(scene: str) -> dict[str, Any]:
    """One scene in a process of its own, so that a failure stays alone."""
    size, _, tokens = scene.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.tif"
        make_scene(path, size_of(size))
        arguments = [*sys.argv[1:], "--child", str(path), tokens or "8"]
        return {
            "scene": scene,
            **in_child(__file__, arguments, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="+", help="width x height in px : tokens along a region's side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="swinv2_tiny_window16_256")
    parser.add_argument("--context", default="mamba2")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--segment", type=int, default=8192, help="context.segment")
    parser.add_argument("--host-gib", type=float, default=64.0, help="context.host_gib")
    parser.add_argument("--budget-gib", type=float, default=0.0, help="of the region encoder's activations")
    parser.add_argument("--chunk", type=int, default=64, help="regions encoded at once")
    parser.add_argument("--readers", type=int, default=4, help="threads that read ahead")
    parser.add_argument("--steps", type=int, default=1, help="on the scene")
    parser.add_argument("--compile", action="store_true", help="the region encoder")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs of its chunks")
    parser.add_argument("--profile", action="store_true", help="also tell how busy the device was")
    parser.add_argument("--name", default="scale", help="of the result file")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, tokens = options.child
        print(json.dumps(child(path, int(tokens), options)))
        return
    rows = []
    for scene in options.scenes:
        rows.append(run_child(scene))
        print(rows[-1], flush=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("scenes", "keep", "child", "name")}
    publish(options.name, {"settings": settings, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
