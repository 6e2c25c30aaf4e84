"""Training on small images in memory: what does it cost beyond the backbone?

The floor is a bare loop over the backbone: timm's network on the same regions, cut beforehand, forward and backward, at
the batch size and memory layout that are fastest here. Ours is a whole step of classification: cutting, region encoder,
context, head, loss, backward. With a context, its own forward and backward pass on tokens in memory is added to the
floor. Beside it the published training step, rebuilt from what is known of it: Swin-T of the shipped config 512/256
through `gigaxt.from_xt_release`, random weights, all regions in one batch, a plain loop in float32 without compilation;
with the anomaly detection that its trainer leaves on, and without; and the same model as this library trains it.

All contenders take turns in one process; medians of `--repetitions` turns of the ratio to the floor in the same turn:
wall time, and CPU time of all threads (which says nothing on a GPU).

    python benchmarks/bench_small_images.py [--backbone swinv2_tiny_window16_256] [--images 2] [--amp bf16] [--keep]
    python benchmarks/bench_small_images.py --device cuda --images 32 --batches 16 32 64 128 --amp bf16 --compile
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from bench_memory import peak_bytes
from report import in_child, publish
from torch import nn

import gigaxt
from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.swin_attention import FusedWindowAttention
from gigaxt.training.config import TrainConfig
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.published import PublishedConfig
from gigaxt.xt_release.weights import published_names

Step = Callable[[], Any]
K = TypeVar("K")
REGION, CLASSES = 256, 284
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
"""Of the pixels in memory: which is faster depends on the network."""
PUBLISHED = {
    "backbone_class": "swinv2_tiny_window16_256_timm",
    "backbone": {"input_size": REGION},
    "num_classes": CLASSES,
    "cls_head": "xl",
    "context": {"n_layer": 2, "hidden_size": 768, "attention_method": "hyper"},
}
"""What counts of the shipped config/swin-t/swin_v2_tiny_1e-4_hyper_512_256.yaml."""


class Bench:
    """The images, and what every contender does with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        random = np.random.default_rng(0)
        self.pixels = random.integers(0, 256, (options.images, options.side, options.side, 3), dtype=np.uint8)
        self.images = (torch.from_numpy(self.pixels).permute(0, 3, 1, 2).float() / 255).to(self.device)
        self.labels = [i % CLASSES for i in range(options.images)]
        n = options.side // REGION
        # (B, C, n * region, n * region) -> (B * n * n, C, region, region)
        cut = self.images.unflatten(2, (n, REGION)).unflatten(4, (n, REGION)).permute(0, 2, 4, 1, 3, 5)
        self.regions = cut.flatten(0, 2).contiguous()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    def backbone(self) -> nn.Module:
        """As a plain timm training would have it."""
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(self.options.backbone, features_only=True, **size(self.options.backbone))
        network.train().to(self.device)
        if self.options.compile:
            network.compile()
        return network

    def bare(self, batch: int, layout: str) -> Step:
        """Forward and backward over the regions, `batch` at a time, the gradient adding up."""
        network = self.backbone()
        regions_of_all = self.regions.contiguous(memory_format=LAYOUTS[layout])

        def step() -> None:
            network.zero_grad()
            for regions in regions_of_all.split(batch):
                with self.autocast():
                    last = network(regions)[-1]
                last.mean().backward()

        return step

    def context_alone(self, context: Mapping[str, Any]) -> Step:
        """The context's own pass on tokens that lie in memory, each image's by themselves."""
        encoder = build_context(ContextConfig(**context)).train().to(self.device)
        side = self.options.side // 32
        coords = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float().to(self.device)
        coords = coords.expand(len(self.images), -1, -1)
        tokens = torch.randn(len(self.images), side * side, encoder.config.dim, device=self.device, requires_grad=True)

        def step() -> None:
            encoder.zero_grad()
            with self.autocast():
                told, _ = encoder(tokens, coords)
            told.mean().backward()

        return step

    def ours(self, context: Mapping[str, Any], streaming: gigaxt.Streaming, *, files: bool = False) -> Step:
        """A step of training on the tensor, or on Images of uint8 pixels that the model normalises."""
        torch.manual_seed(0)
        sections = {
            "region_encoder": {"name": self.options.backbone, "region": REGION},
            "context": dict(context),
            "head": {"kind": "classify", "classes": CLASSES},
        }
        model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(sections)).train().to(self.device)
        model.streaming = streaming
        if self.options.compile:
            model.encode.encoder.compile()
        given: Any = [gigaxt.open_image(pixels) for pixels in self.pixels] if files else self.images
        return lambda: self._train(model, given, self.autocast)

    def published(self, *, anomalies: bool = False, float16: bool = False) -> Step:
        """The published step: every image's regions in one batch, no compilation."""
        model = published_model().train().to(self.device)
        for child in model.modules():
            if isinstance(child, FusedWindowAttention):
                child.fused_attn = False  # timm's own, as published
        model.streaming = gigaxt.Streaming(budget_gib=None, chunk_regions=len(self.regions))
        if float16:
            return lambda: self._train(model, self.images, lambda: torch.autocast(self.device.type, torch.float16))
        return lambda: self._train(model, self.images, lambda: torch.autograd.set_detect_anomaly(anomalies))

    def published_streamed(self, streaming: gigaxt.Streaming, *, compiled: bool = False) -> Step:
        """The same model, its context and head included, as this library trains it."""
        model = published_model().train().to(self.device)
        model.streaming = streaming
        if compiled or self.options.compile:
            model.encode.encoder.compile()
        return lambda: self._train(model, self.images, self.autocast)

    def _train(self, model: gigaxt.GigaXT, given: Any, around: Callable[[], AbstractContextManager[Any]]) -> None:
        model.zero_grad()
        with around():
            loss = model(given, self.labels)
            loss.backward()


def size(backbone: str) -> dict[str, int]:
    """What timm must be told for regions of this size."""
    return {} if backbone.startswith("convnext") else {"img_size": REGION}


def published_model() -> gigaxt.GigaXT:
    """The full-size model with random weights, through a file with the published names."""
    fresh = gigaxt.build_model(model_config(PublishedConfig({"model": PUBLISHED})))
    own = fresh.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "xt.ckpt"
        state = {f"module.{name}": own[mine] for name, mine in published_names(fresh).items()}
        torch.save({"epoch": 0, "state_dict": state}, path)
        return gigaxt.from_xt_release(path, {"model": PUBLISHED})


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(steps: Mapping[K, Step], repetitions: int, device: torch.device) -> dict[K, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each turn; the contenders take turns, after one turn that does not count."""
    times: dict[K, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(repetitions + 1):
        for name, step in steps.items():
            found = timed(step, device)
            if turn:
                times[name].append(found)
    return times


def contenders(bench: Bench, batch: int) -> dict[str, Callable[[], Step]]:
    """What makes each contender, by name."""
    kept = gigaxt.Streaming(budget_gib=None, chunk_regions=batch)
    default = TrainConfig().streaming
    nothing = gigaxt.Streaming(chunk_regions=batch, readers=4, cuda_graphs=bench.options.graphs)
    none = {"kind": "none", "dim": bench.options.dim}
    context = {"kind": bench.options.context, "dim": bench.options.dim, "depth": 2}
    makers: dict[str, Callable[[], Step]] = {
        "none, kept": partial(bench.ours, none, kept),
        "none, kept, uint8 images": partial(bench.ours, none, kept, files=True),
        "none, nothing kept, uint8 images": partial(bench.ours, none, nothing, files=True),
        "none, command line's streaming": partial(bench.ours, none, default),
        f"{bench.options.context}, kept": partial(bench.ours, context, kept),
        f"{bench.options.context}, command line's streaming": partial(bench.ours, context, default),
    }
    if not bench.options.without_published:
        makers["published's model, kept"] = partial(bench.published_streamed, kept)
        makers["published's model, nothing kept"] = partial(bench.published_streamed, nothing)
        makers["published"] = bench.published
        if bench.device.type == "cuda":
            makers["published's model, kept, compiled"] = partial(bench.published_streamed, kept, compiled=True)
            makers["published, float16 autocast"] = partial(bench.published, float16=True)
        makers["published, anomaly detection"] = partial(bench.published, anomalies=True)
    return {name: make for name, make in makers.items() if not bench.options.only or name in bench.options.only}


def peaks(names: Sequence[str], options: argparse.Namespace, batch: int) -> dict[str, dict[str, Any]]:
    """Peak resident memory of one step of each, in a process of its own."""
    same = ["--backbone", options.backbone, "--context", options.context, "--amp", options.amp]
    same += [f"--{name}={getattr(options, name)}" for name in ("dim", "images", "side")]
    found = {name: in_child(__file__, [*same, "--child", name, str(batch)]) for name in names}
    print(found, flush=True)
    return found


def child(bench: Bench, name: str, batch: int) -> dict[str, Any]:
    """What a process holds before and at the peak of a first step."""
    step = contenders(bench, batch)[name]()
    before = peak_bytes("cpu")
    step()
    return {"before_mib": before >> 20, "peak_mib": peak_bytes("cpu") >> 20}


def ratios(
    found: Mapping[str, list[tuple[float, float]]], floors: Mapping[str, Sequence[str]], device: torch.device
) -> list[dict[str, Any]]:
    """One row a contender: its time over that of its floor in the same turn, the median over the turns."""
    rows = []
    for name, parts in floors.items():
        row: dict[str, Any] = {"contender": name, "floor": " + ".join(parts)}
        for k, kind in enumerate(("wall",) if device.type == "cuda" else ("wall", "cpu")):
            floor = [sum(turn[k] for turn in turns) for turns in zip(*(found[part] for part in parts), strict=True)]
            of_turns = [turn[k] / least for turn, least in zip(found[name], floor, strict=True)]
            row[f"{kind}_ratio"] = round(statistics.median(of_turns), 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="swinv2_tiny_window16_256", help="any timm network for regions of 256 px")
    parser.add_argument("--context", default="mamba2", help="the kind that is measured beside `none`")
    parser.add_argument("--dim", type=int, default=768, help="width of the tokens")
    parser.add_argument("--images", type=int, default=2, help="a step")
    parser.add_argument("--side", type=int, default=512, help="of an image, px")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="regions, tried for the floor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the floor's backbone and of ours")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs in ours, where nothing is kept")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--without-published", action="store_true")
    parser.add_argument("--only", nargs="+", help="these contenders, beside the floor")
    parser.add_argument("--memory", action="store_true", help="peak resident memory of a step of each, too; on a CPU")
    parser.add_argument("--keep", action="store_true", help="write the result file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def made(makers: Mapping[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """The contenders' steps, each run once; and those that failed, with the reason."""
    steps, failed = {}, {}
    for name, make in makers.items():
        step = make()
        try:
            step()
        except Exception as error:  # such as a compiler's; the others shall be told of all the same
            failed[name] = str(error).splitlines()[0]
            print(name, "failed:", failed[name], flush=True)
        else:
            steps[name] = step
    return steps, failed


def main() -> None:
    options = parse()
    bench = Bench(options)
    if options.child:
        print(json.dumps(child(bench, options.child[0], int(options.child[1]))))
        return
    choices = {(n, layout): bench.bare(n, layout) for n in options.batches for layout in LAYOUTS}
    tried = race(choices, 2, bench.device)
    batch, layout = best = min(tried, key=lambda choice: min(tried[choice]))
    print(f"the backbone is fastest with {batch} regions of {options.batches}, {layout}", flush=True)
    makers = contenders(bench, batch)
    context = {"kind": options.context, "dim": options.dim, "depth": 2}
    own, failed = made(makers)
    floors = {name: ["backbone", *["context"] * name.startswith(options.context)] for name in own}
    steps = {"backbone": choices[best], "context": bench.context_alone(context), **own}
    found = race(steps, options.repetitions, bench.device)
    settings = {k: v for k, v in vars(options).items() if k not in ("keep", "batches", "only", "child")}
    card = (
        {"gpu": torch.cuda.get_device_name()} if bench.device.type == "cuda" else {"threads": torch.get_num_threads()}
    )
    seconds = {name: round(statistics.median(wall for wall, _ in turns), 4) for name, turns in found.items()}
    rows = ratios(found, floors, bench.device)
    result = {"settings": {**settings, **card}, "batch": batch, "layout": layout, "rows": rows, "seconds": seconds}
    if failed:
        result["failed"] = failed
    if options.memory:
        result["peaks"] = peaks(list(makers), options, batch)
    name = f"small_images_{options.backbone}_{options.amp}{'_compile' if options.compile else ''}"
    publish(name, result, keep=options.keep)


if __name__ == "__main__":
    main()
