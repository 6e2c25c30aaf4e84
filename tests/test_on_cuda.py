"""Whole models on a GPU against the CPU: the same losses, gradients, runs and answers."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import gigaxt
from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.streaming import known
from gigaxt.training import run_config, train
from tiny_models import classifier, segmenter, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

WAYS = {
    "nothing kept": {"budget_gib": 0.0},
    "CUDA graphs": {"budget_gib": 0.0, "cuda_graphs": True},
    "some kept on the device": {"budget_gib": 2e-3},
    "kept on the host": {"budget_gib": 0.0, "host_gib": 4.0},
    "all kept": {"budget_gib": 4.0},
    "ordinary autograd": {"budget_gib": None},
}
HEADS: dict[str, dict[str, Any]] = {
    "classify": {"kind": "classify", "classes": 3},
    "segment": {"kind": "segment", "classes": 4, "dim": 8},
    "dice": {"kind": "segment", "classes": 4, "dim": 8, "loss": {"cross_entropy": 1.0, "dice": 1.0}},
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    return path


def close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """In float64, but sines of the coordinates are float32 and round differently."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def loss_and_gradients(head: dict[str, Any], scene: Path, device: str, **streaming: Any) -> list[torch.Tensor]:
    model = tiny_model(head, seed=1).double().train().to(device)
    model.streaming = gigaxt.Streaming(chunk_regions=7, readers=3, **streaming)
    target = [2] if head["kind"] == "classify" else [np.arange(300 * 500).reshape(300, 500) % 4]
    loss = model.loss([gigaxt.open_image(scene)], target, seed=5)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return [loss.detach().cpu(), *(torch.zeros(()) if g is None else g.cpu() for g in grads)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_the_cpu(head: str, way: str, scene: Path) -> None:
    on_cpu = loss_and_gradients(HEADS[head], scene, "cpu")
    close(loss_and_gradients(HEADS[head], scene, "cuda", **WAYS[way]), on_cpu)


@pytest.mark.parametrize("backbone", ["swinv2_tiny_window16_256", "convnext_tiny", "hiera_tiny_224"])
@pytest.mark.parametrize("amp", [False, True])
def test_steps_with_cuda_graphs(backbone: str, amp: bool, tmp_path: Path) -> None:
    """Weights change in between, not by the gradients: rounding would grow from step to step. The last chunk is short.

    bfloat16 differs by more where cuBLAS takes another kernel in a graph.
    """
    path, region = tmp_path / "scene.tif", 224 if "224" in backbone else 256
    pixels = np.random.default_rng(0).integers(0, 255, (3 * region, 6 * region, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="zlib")
    config = {
        "region_encoder": {"name": backbone, "region": region, "options": {"drop_path_rate": 0.1}},
        "context": {"kind": "none", "dim": 16},
        "head": {"kind": "classify", "classes": 3},
    }
    found: list[list[torch.Tensor]] = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).train().cuda()
        model.streaming = gigaxt.Streaming(chunk_regions=4, cuda_graphs=graphs)
        found.append([])
        for step in range(3):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss = model.loss([gigaxt.open_image(path)], [step], seed=step)
            loss.backward()
            found[-1] += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
        recordings = known._known[next(model.encode.parameters())].graphs
        assert {name for name, _ in recordings._made} == ({"outputs", "gradients"} if graphs else set())
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (0.05 if amp else 1e-3) * b.norm() + 1e-6


def test_what_layers_keep_may_wait_on_the_host() -> None:
    found, peaks = [], []
    for host_gib in (0.0, 1.0):
        torch.manual_seed(0)
        config = {"kind": "mamba2", "dim": 64, "depth": 4, "keep_tokens": 0, "segment": 1024, "host_gib": host_gib}
        context = build_context(ContextConfig(**config)).cuda()
        x = torch.randn(1, 40_000, 64, device="cuda", requires_grad=True)
        coords = torch.cartesian_prod(torch.arange(200), torch.arange(200))[None].float()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        context(x, coords)[0].square().mean().backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / x.nbytes)
        found.append([x.grad, *(p.grad for p in context.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert peaks[1] < peaks[0] - 5  # of the two token stores that each of four layers keeps


@pytest.fixture
def little_memory() -> Iterator[None]:
    """0.3 GiB more than is in use."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.3 * 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("graphs", [False, True])
def test_out_of_memory_halves_the_chunk_and_changes_nothing(graphs: bool, tmp_path: Path) -> None:
    path = tmp_path / "scene.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="zlib")
    found = []
    for chunk in (2, 64):
        model = tiny_model({"kind": "classify", "classes": 3}, region=256).double().train().cuda()
        model.streaming = gigaxt.Streaming(chunk_regions=chunk, cuda_graphs=graphs)
        model.loss([gigaxt.open_image(path)], [1], seed=0).backward()
        found.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
        if chunk == 64:
            assert model.streaming.most_regions is not None
            assert 1 <= model.streaming.most_regions < 64
    close(found[1], found[0])


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_stopped_run_goes_on(amp: str, scene: Path, tmp_path: Path) -> None:
    """To the numbers of the unbroken run, but for the rounding of sums that a GPU adds in any order."""
    manifest = tmp_path / "data.csv"
    for i in range(6):
        shutil.copy(scene, tmp_path / f"{i}.tif")
    rows = [f"{i}.tif,{'ab'[i % 2]},{'train' if i < 4 else 'val'}" for i in range(6)]
    manifest.write_text("\n".join(["image,label,split", *rows]))
    model = {
        "region_encoder": {"name": "convnextv2_atto", "region": 64, "options": {"depths": [1, 1, 1, 1]}},
        "context": {"kind": "mamba2", "dim": 16, "depth": 1, "keep_tokens": 0, "host_gib": 1.0},
        "head": {"kind": "classify", "classes": 2},
    }
    settings = {"epochs": 2, "batch": 2, "amp": amp, "device": "cuda"}
    config = run_config({"data": {"csv": str(manifest)}, "model": model, "train": settings})

    def stop(step: int, steps: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(config, tmp_path / "stopped", on_step=stop).signal == signal.SIGTERM
    assert train(config, tmp_path / "stopped").step == train(config, tmp_path / "whole").step == 4
    tables = [rows_of(tmp_path / name / "metrics.csv") for name in ("stopped", "whole")]
    for stopped, whole in zip(*tables, strict=True):
        assert stopped["step"] == whole["step"]
        assert float(stopped["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-3)
    loaded = gigaxt.load(tmp_path / "whole/model").cuda()
    assert loaded([gigaxt.open_image(scene)]).isfinite().all()


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


def test_predictions_equal_the_cpu(scene: Path, tmp_path: Path) -> None:
    for model in (segmenter(), classifier()):
        found = []
        for device in ("cpu", "cuda"):
            found.append(model.double().to(device)([gigaxt.open_image(scene)]))
        close([answer.cpu() for answer in found[1]], list(found[0]))
