"""DistributedDataParallel sees the streamed model as an ordinary one: two processes, one image each, gloo, CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gigaxt import GigaXT, ModelConfig, Streaming, build_model, open_image

SIZES = [(100, 150), (70, 64)]


def make(head: str) -> GigaXT:
    torch.manual_seed(0)
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 16]},
        },
        "context": {"dim": 16, "depth": 1, "summary": 2},
        "head": {"kind": head, "classes": 3, **({"dim": 8} if head == "segment" else {})},
    }
    model = build_model(ModelConfig.from_dict(config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.encode.norm.weight.requires_grad_(False)  # a frozen one
    return model


def sample(rank: int, head: str) -> tuple[Any, Any]:
    rng = np.random.default_rng(rank)
    pixels = rng.integers(0, 255, (*SIZES[rank], 3), dtype=np.uint8)
    mask = rng.integers(0, 3, SIZES[rank], dtype=np.uint8)
    return [open_image(pixels)], [mask if head == "segment" else rank]


HEADS = ("classify", "segment")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for head in HEADS:
        model = make(head)
        model.streaming = Streaming(chunk_regions=2)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        images, targets = sample(rank, head)
        with ddp.no_sync():  # accumulation: the first of two steps is not sent
            ddp(images, targets, seed=1).backward()
        ddp(images, targets, seed=1).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save(grads, f"{folder}/{head}{rank}.pt")
    dist.destroy_process_group()


def test_ddp_averages_the_exact_gradients(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for head in HEADS:
        expected: dict[str, Tensor] = {}
        for rank in range(2):
            model = make(head)
            model.streaming = Streaming(budget_gib=None, chunk_regions=1000)
            model.loss(*sample(rank, head), seed=1).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    expected[name] = expected.get(name, torch.zeros_like(p)) + p.grad  # twice, halved over two ranks
        for rank in range(2):
            found = torch.load(tmp_path / f"{head}{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, grad in found.items():
                assert (grad - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max(), (head, name)
