"""What streaming costs: a training step against the bare backbone on the same regions, already in memory.

Classification, context `none`. The floor is the region encoder's forward and backward, chunk by chunk, on normalised
float pixels in memory, by ordinary autograd. Against it: the streamed step, read from a JPEG TIFF on disk, with
nothing kept (4/3 of the floor is the recomputation; at most 1.40 is allowed) and with everything kept (at most 1.05).

Segmentation. The floor is made of the passes that DESIGN states, each timed on its own on tensors in memory: F forward
without a graph, F + B forward and backward, of the encoder with its maps, and of the decoder with the loss.

    all kept        encoder      F + B    decoder      F + B
    maps kept       encoder  F + F + B    decoder      F + B
    nothing kept    encoder 2F + F + B    decoder 2 (F + B)

At most 1.05 of it is allowed.

glibc hands large blocks back to the system at once, so that activations that are kept cost page faults at every step,
which the floor, a chunk at a time, does not have. The command line therefore keeps freed memory (`gigaxt.allocator`),
and so does the script; `--allocator default` measures without.

Contenders take turns in one process; the ratio of each round is of neighbours in time, and the median is told. CPU time
counts all threads, so reading ahead is not free in it. Everything kept takes memory: 60 MiB a region with
convnextv2_atto.

    python benchmarks/bench_overhead.py [--side 4096] [--rounds 3] [--backbones convnextv2_atto small] [--keep]
    python benchmarks/bench_overhead.py --device cuda --side 8192 --chunk 256 --readers 4 --amp bf16 --heads classify
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_memory import make_image, make_mask
from report import publish
from torch import Tensor

import gigaxt
from gigaxt.allocator import keep_freed_memory
from gigaxt.nn.stages import LossSums
from gigaxt.scenes.batch import SceneBatch
from gigaxt.targets.base import target_for

REGION = 256
SMALL = {"depths": [1, 1, 1, 1], "dims": [32, 64, 128, 256]}
"""Of the backbone `small`: ConvNeXt-T at a third of its width, one block a stage, so that all activations of a 4,096 px
image fit a small machine (18 MiB a region)."""
LIMITS = {
    "classify": {"nothing kept": 1.40, "all kept": 1.05},
    "segment": {"nothing kept": 1.05, "maps kept": 1.05, "all kept": 1.05},
}
BUDGETS = {"nothing kept": (0.0, 0.0), "maps kept": (0.0, 1000.0), "all kept": (1000.0, 0.0)}
"""GiB on the device and on the host."""
Times = tuple[float, float]
"""CPU and wall seconds."""


def build(backbone: str, head: str, device: str) -> gigaxt.GigaXT:
    torch.manual_seed(0)
    name, options = ("convnext_tiny", SMALL) if backbone == "small" else (backbone, {})
    config = {
        "region_encoder": {"name": name, "region": REGION, "options": options},
        "context": {"kind": "none", "dim": 192},
        "head": {"kind": head, "classes": 4},
    }
    return gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).to(device).train()


class Timer:
    """Times steps of a model that start without gradients, each under an autocast of its own."""

    def __init__(self, model: gigaxt.GigaXT, amp: str) -> None:
        self.model, self.bf16 = model, amp == "bf16"
        self.device = next(model.parameters()).device

    def __call__(self, step: Callable[[], None]) -> Times:
        self.model.zero_grad()
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() - cpu, time.perf_counter() - wall


def pixels_of(model: gigaxt.GigaXT, image: gigaxt.Image, regions: int) -> list[Tensor]:
    """The regions as the encoder sees them, channels last in memory, a chunk each."""
    device = next(model.parameters()).device
    found = []
    for chunk in model.batch([image]).chunks(regions):
        raw = [image.read(place.col * REGION, place.row * REGION, REGION, REGION) for _, _, place in chunk.places]
        found.append((torch.from_numpy(np.stack(raw)).to(device).float() / 255).permute(0, 3, 1, 2))
    return found


def bare(timed: Timer, image: gigaxt.Image, regions: int) -> Callable[[], dict[str, Times]]:
    """The floors of a classifier: forward and backward of the region encoder alone, on pixels in memory."""
    pixels, encoder = pixels_of(timed.model, image, regions), timed.model.encode.encoder

    def step() -> None:
        for x in pixels:
            tokens = encoder(x)[0]
            tokens.backward(torch.full_like(tokens, 1e-3))

    def floors() -> dict[str, Times]:
        once = timed(step)
        return dict.fromkeys(LIMITS["classify"], once)

    return floors


def bare_dense(timed: Timer, image: gigaxt.Image, mask: gigaxt.Image, regions: int) -> Callable[[], dict[str, Times]]:
    """The floors of a segmentation, made of the passes that each way of keeping takes."""
    model, device = timed.model, timed.device
    pixels, encoder = pixels_of(model, image, regions), model.encode.encoder
    decode = LossSums(model.head, model.encode)
    batch = model.batch([image], [target_for(model.head, mask)])
    drawn = [{k: t.to(device) for k, t in batch.load_targets(chunk).items()} for chunk in batch.chunks(regions)]
    tokens = (REGION // 32) ** 2

    def forward() -> None:
        with torch.no_grad():
            for x in pixels:
                encoder(x)

    def both() -> None:
        for x in pixels:
            found, maps = encoder(x)
            torch.autograd.backward([found, *maps], [torch.full_like(t, 1e-3) for t in (found, *maps)])

    def decoding() -> Times:
        spent = [0.0, 0.0]
        for x, targets in zip(pixels, drawn, strict=True):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=timed.bf16):
                maps = encoder(x)[1]
            leaves = tuple(t.requires_grad_() for t in maps)
            context = torch.zeros(len(x), tokens, 192, device=device, requires_grad=True)
            some = timed(lambda leaves=leaves, context=context, t=targets: decode(leaves, context, t)[0].backward())
            spent = [a + b for a, b in zip(spent, some, strict=True)]
        return spent[0], spent[1]

    def floors() -> dict[str, Times]:
        f, fb, d = timed(forward), timed(both), decoding()
        passes = {"all kept": (0, 1), "maps kept": (1, 1), "nothing kept": (2, 2)}  # encoder's F, decoder's F + B
        return {name: (n * f[0] + fb[0] + k * d[0], n * f[1] + fb[1] + k * d[1]) for name, (n, k) in passes.items()}

    return floors


def open_scene(folder: Path, side: int) -> tuple[gigaxt.Image, gigaxt.Image]:
    """The image and its mask, made where they are missing."""
    path, mask = folder / f"{side}.tif", folder / "mask.tif"
    if not path.exists():
        make_image(path, (side, side))
        make_mask(mask, (side, side))
    return gigaxt.open_image(path), gigaxt.open_image(mask)


def compare(backbone: str, head: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = options.device
    image, mask = open_scene(folder, options.side)
    model = build(backbone, head, device)
    target: Any = [1] if head == "classify" else [mask]
    chunk, timed = options.chunk, Timer(model, options.amp)
    floors = bare(timed, image, chunk) if head == "classify" else bare_dense(timed, image, target[0], chunk)
    small: Any = [1] if head == "classify" else [np.zeros((REGION, REGION), np.uint8)]
    timed(lambda: model.loss(torch.zeros(1, 3, REGION, REGION, device=device), small).backward())  # what is loaded once
    names = [name for name in LIMITS[head] if not options.only or name in options.only]

    reading = ThreadPoolExecutor(1)
    begun: list[Future[SceneBatch]] = []

    def streamed(name: str) -> Times:
        budget, host = BUDGETS[name]
        model.streaming = gigaxt.Streaming(
            budget_gib=budget,
            host_gib=host,
            chunk_regions=chunk,
            readers=options.readers,
            cuda_graphs=options.graphs,
        )
        given = begun.pop().result() if begun else [image]

        def step() -> None:  # as `gigaxt train` does, with the next step's first chunk read meanwhile
            begun.append(reading.submit(model.prepare, [image], target))
            model.loss(given, target).backward()

        return timed(step)

    failed = {}
    for name in list(names):
        try:
            streamed(name)  # the first time takes the memory that is used again from then on
        except (torch.OutOfMemoryError, gigaxt.GigaxtError) as error:  # all activations of a large image on a GPU
            failed[name] = {"failed": str(error).splitlines()[0]}
            names.remove(name)
    ratios: dict[str, list[Times]] = {name: [] for name in names}
    floor_s = []
    for round_ in range(options.rounds):
        first = floors() if round_ % 2 == 0 else None
        found = {name: streamed(name) for name in names}
        floor = first or floors()
        floor_s.append(floor["all kept"][0])
        for name, (cpu, wall) in found.items():
            ratios[name].append((cpu / floor[name][0], wall / floor[name][1]))
    regions = len(model.batch([image]).places)
    result = {
        "backbone": backbone,
        "head": head,
        "side_px": options.side,
        "regions": regions,
        "bare_ms_a_region": round(1e3 * statistics.median(floor_s) / regions, 2),
        **{name: summary(ratios[name], LIMITS[head][name]) for name in names},
        **failed,
    }
    reading.shutdown()
    print(result, flush=True)
    return result


def summary(ratios: Sequence[Times], limit: float) -> dict[str, Any]:
    """Of the ratios (CPU, wall) of all rounds."""
    return {
        "cpu_ratio": round(statistics.median(cpu for cpu, _ in ratios), 3),
        "rounds": [round(cpu, 3) for cpu, _ in ratios],
        "wall_ratio": round(statistics.median(wall for _, wall in ratios), 3),
        "limit": limit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", default=["convnextv2_atto"])
    parser.add_argument("--heads", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--only", nargs="+", choices=BUDGETS, help="these ways of keeping")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--device", default="cpu", help="on cuda the wall ratio is the one that counts")
    parser.add_argument("--chunk", type=int, default=8, help="regions encoded at once, by the floor too")
    parser.add_argument("--readers", type=int, default=2, help="threads that read ahead")
    parser.add_argument("--amp", choices=["off", "bf16"], default="off")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs of chunks that are not kept")
    parser.add_argument("--name", default="overhead", help="of the result file")
    parser.add_argument("--allocator", choices=["kept", "default"], default="kept")
    options = parser.parse_args()
    if options.allocator == "kept":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(name, head, options, Path(folder)) for name in options.backbones for head in options.heads]
    settings = {"chunk_regions": options.chunk, "readers": options.readers, "amp": options.amp}
    settings["graphs"] = options.graphs
    machine = {"threads": torch.get_num_threads(), "allocator": options.allocator}
    result = {**settings, **machine, "rows": rows}
    publish(options.name, result, keep=options.keep)


if __name__ == "__main__":
    main()
