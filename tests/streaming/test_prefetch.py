"""Chunks that are read ahead: the first by all threads together, or not at all where it is there already."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt import open_image
from gigaxt.scenes.batch import Chunk, SceneBatch
from gigaxt.scenes.inputs import InputConfig
from gigaxt.streaming.prefetch import form, read_ahead
from gigaxt.streaming.single import Streaming, stream
from tiny_models import segmenter

CPU = torch.device("cpu")


@dataclass
class Span:
    """Rows start..stop; cut one by one."""

    start: int
    stop: int

    def parts(self, most: int) -> list[Span]:
        return [Span(i, i + 1) for i in range(self.start, self.stop)] if most > 1 else [self]


class Load:
    """Row numbers; notes what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, span: Span) -> dict[str, Tensor]:
        self.asked.append((span.start, span.stop))
        return {"x": torch.arange(span.start, span.stop)}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("readers", [1, 3])
def test_the_first_chunk_is_read_in_parts(readers: int, count: int) -> None:
    chunks, load = [Span(3 * i, 3 * i + 3) for i in range(count)], Load()
    found = list(read_ahead(load, chunks, CPU, readers))
    assert [chunk for chunk, _ in found] == chunks
    assert torch.cat([loaded["x"] for _, loaded in found]).tolist() == list(range(3 * count))
    first = [(0, 1), (1, 2), (2, 3)] if readers > 1 else [(0, 3)]
    assert sorted(load.asked) == sorted([*first, *((c.start, c.stop) for c in chunks[1:])])


def test_its_parts_are_read_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def load(span: Span) -> Tensor:
        if span.stop <= 3:
            barrier.wait()
        return torch.arange(span.start, span.stop)

    assert next(iter(read_ahead(load, [Span(0, 3), Span(3, 6)], CPU, 3)))[1].tolist() == [0, 1, 2]


def test_parts_that_are_unlike_are_read_as_one() -> None:
    def load(span: Span) -> dict[str, Tensor]:
        rows = torch.arange(span.start, span.stop)
        return {"x": rows, "valid": rows > 0} if span.start <= 1 < span.stop else {"x": rows}

    ((_, loaded),) = read_ahead(load, [Span(0, 3)], CPU, 3)
    assert loaded["x"].tolist() == [0, 1, 2]
    assert loaded["valid"].tolist() == [False, True, True]


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_known_is_not_read(count: int) -> None:
    chunks, load = [Span(2 * i, 2 * i + 2) for i in range(count)], Load()
    found = list(read_ahead(load, chunks, CPU, 2, known={"x": torch.tensor([8, 9])}))
    assert [loaded["x"].tolist() for _, loaded in found] == [[8, 9], [2, 3], [4, 5]][:count]
    assert sorted(load.asked) == [(c.start, c.stop) for c in chunks[1:]]


def test_a_stream_reads_its_first_chunk_once() -> None:
    module, load = torch.nn.Linear(1, 1), Load()
    chunks = [Span(0, 2), Span(2, 4)]

    def pixels(span: Span) -> Tensor:
        return load(span)["x"].float()[:, None]

    stream(module, pixels, chunks, streaming=Streaming(readers=1)).sum().backward()
    assert load.asked == [(0, 2), (2, 4), (2, 4)]
    assert module.weight.grad is not None
    assert module.weight.grad.item() == 0 + 1 + 2 + 3


@pytest.mark.parametrize("kind", ["whole regions", "ragged", "nodata", "numbers", "tensor"])
def test_regions_of_a_scene_are_cut_where_it_is_worth_it(kind: str) -> None:
    """The numbered image's regions, read by three threads, once; in a part of the chunk all pixels are valid."""
    height, width = (5 * 32, 7 * 32) if kind in ("whole regions", "nodata") else (5 * 32 - 3, 7 * 32 - 9)
    pixels = torch.arange(height * width).view(height, width, 1).numpy()
    if kind == "tensor":
        given: Any = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    else:
        given = [open_image(pixels.astype("f8" if kind == "numbers" else "i8"), nodata=3 if kind == "nodata" else None)]
    scenes = SceneBatch(given, InputConfig(), region=32, channels=1, tokens_per_core=2)
    (chunk,) = scenes.chunks(35)
    assert [(part.start, part.stop) for part in chunk.parts(3)] == [(0, 11), (11, 23), (23, 35)]
    assert len(chunk.parts(9)) == 4  # of 8 regions at least
    assert scenes.picked([0, 2], 8)[0].parts(9) == scenes.picked([0, 2], 8)
    (every_second,) = scenes.picked(range(0, 35, 2), 18)
    assert [part.rows for part in every_second.parts(2)] == [list(range(0, 18, 2)), list(range(18, 35, 2))]
    asked = []

    def load(chunk: Chunk) -> dict[str, Tensor]:
        asked.append(chunk.start)
        return scenes.load(chunk)

    ((_, loaded),) = read_ahead(load, [chunk], CPU, 3)
    assert sorted(asked) == [0, 11, 23]
    validity = scenes.token_validity.clone()
    whole: dict[str, Any] = scenes.load(chunk)
    assert loaded.keys() == whole.keys()
    assert ("valid" in whole) == (kind not in ("whole regions", "tensor"))
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    assert torch.equal(validity, scenes.token_validity)


def test_dense_models_read_it_in_parts_too() -> None:
    """Pixels and targets of one chunk of 24 regions, by three threads, against chunks of 4."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (4 * 64, 6 * 64, 3), dtype=torch.uint8, generator=draw)
    mask = (pixels[..., 0] % 4).numpy()
    found = []
    for chunk, readers in ((4, 1), (24, 3)):
        model = segmenter().double().train()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():  # a fresh head does not listen to the context, which knows regions by place
                p.add_(0.1 * torch.randn_like(p))
        model.streaming = Streaming(chunk_regions=chunk, readers=readers)
        loss = model.loss([open_image(pixels.numpy())], [mask], seed=0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_compared_is_no_hindrance() -> None:
    """Beside tensors, `load` may return anything."""
    module = Second()
    for _ in range(2):
        out = stream(module, lambda c: (np.ones(c + 3), torch.ones(2, 3)), range(3))
        assert out.shape == (6, 2)
    assert form(np.ones(3)) != form(np.ones(3))


class Second(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: tuple[Any, Tensor]) -> Tensor:
        return super().forward(x[1])
