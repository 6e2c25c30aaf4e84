"""Dense answers region by region: how often regions are encoded, and that it does not matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt import GigaXT, Image, Streaming, open_image, predict
from gigaxt.streaming.prefetch import READERS, read_ahead
from gigaxt.targets.base import WindowTarget, as_mask
from tiny_models import segmenter, tiny_model

POINTS = {"kind": "points", "classes": 2, "dim": 8, "stride": 2}
HALO = {"region": 128, "halo": 32}
REGIONS, COARSE = 11, 4
"""Regions of the scene, and of its overview."""


def scene() -> Image:
    """Three rows and four columns of regions, of which one is left out; another has a hole."""
    pixels = np.random.default_rng(0).random((150, 230, 3), np.float32)
    pixels[:64, 64:128] = np.nan
    pixels[64:110, :50] = np.nan
    return open_image(pixels, nodata=float("nan"))


def run(model: GigaXT, streaming: Streaming) -> tuple[int, list[Any]]:
    """How many regions were encoded, and the answers."""
    counts: list[int] = []
    hook = model.encode.register_forward_pre_hook(lambda module, args: counts.append(len(args[0]["pixels"])))
    model.streaming = streaming
    answers = list(model.predict_regions(model.batch([scene()])))
    hook.remove()
    return sum(counts), answers


def same(found: list[Any], expected: list[Any]) -> bool:
    assert len(found) == len(expected) == REGIONS
    return all(
        (a.x, a.y) == (b.x, b.y)
        and np.array_equal(a.valid, b.valid)
        and all(torch.equal(x, y) for x, y in zip(a.answers, b.answers, strict=True))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("given", [{}, {"overview": [2]}, HALO, {"context": "none", **HALO}])
def test_what_the_budgets_hold_is_not_encoded_again(given: dict[str, Any]) -> None:
    model = tiny_model(POINTS, **given).double()
    first = REGIONS + (COARSE if "overview" in given else 0)
    twice, expected = run(model, Streaming(chunk_regions=3))
    assert twice == first + REGIONS
    side = given.get("region", 64)
    chunk_bytes = 8 * 3 * sum(8 * (side // stride) ** 2 for stride in (4, 8, 16)) + 8 * 3 * 16 * (side // 32) ** 2
    chunk_gib = chunk_bytes / 2**30
    for streaming, again in (
        (Streaming(chunk_regions=3, budget_gib=1.0), 0),
        (Streaming(chunk_regions=3, host_gib=1.0), 0),
        (Streaming(chunk_regions=3, budget_gib=1.5 * chunk_gib, host_gib=1.1 * chunk_gib), REGIONS - 6),
    ):
        encoded, found = run(model, streaming)
        assert encoded == first + again
        assert same(found, expected)


def test_without_context_regions_are_encoded_once() -> None:
    model = segmenter(context="none", overview=[2]).double()
    encoded, found = run(model, Streaming(chunk_regions=3))
    assert encoded == REGIONS
    with torch.no_grad():
        (whole,) = model([scene()])
    for one in found:
        h, w = one.valid.shape
        torch.testing.assert_close(one.logits, whole[:, one.y : one.y + h, one.x : one.x + w], rtol=0, atol=1e-12)


def predict_regions(model: GigaXT, folder: Path) -> None:
    list(model.predict_regions(model.batch([scene()])))


def predict_mask(model: GigaXT, folder: Path) -> None:
    predict(model, scene(), folder / "mask.tif")


def learn_a_window(model: GigaXT, folder: Path) -> None:
    mask = as_mask(np.ones((150, 230), np.uint8))
    model([scene()], [WindowTarget(mask, (0, 0, 60, 60), (230, 150))])


@pytest.mark.parametrize("work", [predict_regions, predict_mask, learn_a_window])
def test_chunks_are_read_by_as_many_threads_as_asked_for(
    work: Callable[[GigaXT, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def read(load: Any, chunks: Any, device: torch.device, readers: int = READERS, known: Any = None) -> Any:
        asked.append(readers)
        return read_ahead(load, chunks, device, readers, known)

    model = segmenter()
    monkeypatch.setattr("gigaxt.streaming.rows.read_ahead", read)
    model.streaming = Streaming(chunk_regions=3, readers=5)
    work(model, tmp_path)
    assert len(asked) > 1
    assert set(asked) == {5}


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_an_evaluation_within_the_budget_encodes_once(budget: float) -> None:
    model = segmenter()
    model.streaming = Streaming(budget_gib=budget, chunk_regions=3)
    counts: list[int] = []
    model.encode.encoder.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    target = np.random.default_rng(1).integers(0, 4, (150, 230)).astype(np.uint8)
    found = model.evaluate([scene()], [target])
    assert sum(counts) == (REGIONS if budget else 2 * REGIONS)
    model.streaming = Streaming(chunk_regions=3)
    torch.testing.assert_close(found, model.evaluate([scene()], [target]), rtol=0, atol=0)
