"""A batch that was prepared ahead: the same numbers, and its first chunk is not read again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.errors import DataError
from gigaxt.image import Image, open_image
from gigaxt.nn.xt import GigaXT, ModelConfig, build_model
from gigaxt.scenes.batch import Chunk, SceneBatch
from gigaxt.streaming.single import Streaming
from gigaxt.targets.base import WindowTarget, target_for

HEADS: dict[str, dict[str, Any]] = {
    "classify": {"kind": "classify", "classes": 3},
    "segment": {"kind": "segment", "classes": 3, "dim": 8},
    "points": {"kind": "points", "classes": 2, "dim": 8, "stride": 4},
}


def make(head: str, **sections: Any) -> GigaXT:
    torch.manual_seed(0)
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8], "drop_path_rate": 0.3},
        },
        "context": {"kind": "mamba2", "dim": 16, "depth": 1, "summary": 2},
        "head": HEADS[head],
        "input": sections,
    }
    return build_model(ModelConfig.from_dict(config)).double().train()


def scene() -> tuple[Image, Image]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (300, 520, 3), dtype=np.uint8)  # 5 x 9 regions, cut at the border
    return open_image(pixels), open_image(rng.integers(0, 3, (300, 520), dtype=np.uint8))


def numbers(model: GigaXT, images: Any, targets: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(images, targets, seed=3)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Regions that were read, read by read."""
    counts: list[int] = []
    read = SceneBatch._read

    def counted(batch: SceneBatch, places: Any) -> Any:
        counts.append(len(places))
        return read(batch, places)

    monkeypatch.setattr(SceneBatch, "_read", counted)
    return counts


@pytest.mark.parametrize("regions", [4, 32])  # 32: the first chunk is read in parts
@pytest.mark.parametrize("head", ["classify", "segment", "points", "window"])
def test_the_same_numbers_from_as_many_reads(head: str, regions: int, reads: list[int]) -> None:
    model, (image, mask) = make("segment" if head == "window" else head), scene()
    model.streaming = Streaming(chunk_regions=regions)
    targets: Any = {
        "classify": [1],
        "segment": [mask],
        "points": [{"points": [[30.0, 40.0], [200.0, 500.0]], "labels": [0, 1]}],
    }.get(head)
    if head == "window":  # the regions beside it are read first
        targets = [WindowTarget(target_for(model.head, mask), (70, 10, 60, 50), (520, 300))]
    expected = numbers(model, [image], targets)
    once, reads[:] = sum(reads), []
    batch = model.prepare([image], targets)
    ahead = sum(reads)
    assert ahead == min(regions, batch.beside or batch.full_size)
    found = numbers(model, batch, targets)
    assert sum(reads) == once
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_overviews_of_a_classifier_belong_to_its_first_chunk(reads: list[int]) -> None:
    model, (image, _) = make("classify", overview=[4]), scene()
    model.streaming = Streaming(chunk_regions=100)
    batch = model.prepare([image])
    before = sum(reads)
    assert before == len(batch.places) > batch.full_size
    with torch.no_grad():
        found = model(batch, seed=0)
    assert sum(reads) == before  # no gradient: a single pass
    with torch.no_grad():
        assert torch.equal(found, model([image], seed=0))


def test_what_another_stream_begins_with_is_not_read_ahead(reads: list[int]) -> None:
    model, (image, _) = make("classify"), scene()
    model.grad_share = 0.5
    model.prepare([image], [1])
    assert not reads


def test_what_is_loaded_ahead_is_given_once() -> None:
    image, _ = scene()
    batch = make("classify").batch([image])
    chunk = Chunk(batch, 0, 20)
    plain = batch.load(chunk)
    batch.load_ahead(chunk, 2, torch.device("cpu"))
    parts = [batch.load(part) for part in chunk.parts(2)]
    assert torch.equal(torch.cat([part["pixels"] for part in parts]), plain["pixels"])
    batch.load_ahead(Chunk(batch, 0, 4), 2, torch.device("cpu"))
    first, again = batch.load(Chunk(batch, 0, 4)), batch.load(Chunk(batch, 0, 4))
    assert first["pixels"] is not again["pixels"]
    assert torch.equal(first["pixels"], again["pixels"])


def test_what_does_not_fit_is_refused() -> None:
    model, (image, mask) = make("segment"), scene()
    with pytest.raises(DataError, match="prepared with its targets, got one without"):
        model(model.prepare([image]), [mask])
    with pytest.raises(DataError, match="expected a batch that this model prepared"):
        make("segment", halo=0, mean=[0.0] * 3, std=[1.0] * 3)(model.prepare([image], [mask]), [mask])
    with pytest.raises(DataError, match="expected a list of Images, got one Image"):
        model.prepare(image)  # type: ignore[arg-type]  # what is tested
