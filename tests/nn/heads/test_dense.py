"""A dense head that answers with several maps, and what every dense head learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigaxt import ConfigError, DataError, GigaXT, ModelConfig, build_model, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads.dense import Answers, DenseHead
from gigaxt.scenes.batch import SceneBatch
from gigaxt.streaming.single import Streaming
from gigaxt.targets.base import MaskTarget, as_mask


class TwoMaps(DenseHead):
    """Maps at strides 4 and 8; the loss is a ratio of two sums that both have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(6, 2, 1), nn.Conv2d(8, 3, 1)
        self.tell = nn.Linear(16, 1)

    def forward(self, maps: Sequence[Tensor], context: Tensor) -> Answers:
        told = self.tell(context).mean((1, 2))[..., None, None]
        return self.fine(maps[0]) * told, self.coarse(maps[1]) + told

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        return [(2, region_px // 4, region_px // 4), (3, region_px // 8, region_px // 8)]

    def as_target(self, target: Any) -> MaskTarget:
        return as_mask(target)

    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        fine, coarse = answers
        kept = targets["valid"][:, None, ::4, ::4]
        return (fine.square() * kept).sum().double(), coarse.square().sum().double(), kept.sum().double()

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        return sums[0] / (1 + sums[1]) / sums[2]

    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"loss": self.loss(sums)}


def config(**given: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "region_encoder": {
                "name": "convnextv2_atto",
                "region": 64,
                "options": {"depths": [1, 1, 1, 1], "dims": [6, 8, 8, 16]},
            },
            "context": {"dim": 16, "depth": 1, "summary": 2},
            "head": {"kind": "segment", "classes": 2},
            "input": given,
        }
    )


def make(**given: Any) -> GigaXT:
    torch.manual_seed(0)
    return build_model(config(**given), head=TwoMaps()).double().eval()


def test_several_maps_are_stitched_at_their_strides() -> None:
    """A scene of three columns and two rows of regions; predicted region by region it is the same."""
    model = make()
    pixels = np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8)
    image = open_image(pixels)
    ((fine, coarse),) = model([image])
    assert (fine.shape, coarse.shape) == ((2, 25, 38), (3, 13, 19))  # cells that begin inside of the image
    for answer in model.predict_regions(model.batch([image])):
        for stride, whole, part in zip((4, 8), (fine, coarse), answer.answers, strict=True):
            col, row = answer.x // stride, answer.y // stride
            assert torch.equal(part, whole[:, row : row + part.shape[1], col : col + part.shape[2]])
    fine_of_batch, coarse_of_batch = model(torch.rand(2, 3, 100, 150, dtype=torch.float64))
    assert (fine_of_batch.shape, coarse_of_batch.shape) == ((2, 2, 25, 38), (2, 3, 13, 19))


@pytest.mark.parametrize(
    "streaming", [Streaming(), Streaming(host_gib=1.0), Streaming(budget_gib=1.0, chunk_regions=2)]
)
def test_a_loss_of_several_sums_is_exact(streaming: Streaming) -> None:
    model = make()
    image = ArrayImage(np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8), nodata=0)
    mask = np.zeros((100, 150), np.uint8)
    grads = []
    for setting in (Streaming(budget_gib=None), streaming):
        model.streaming = setting
        model.zero_grad()
        model([image], [mask], seed=0).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-10 * a.abs().max()


def test_maps_of_another_shape_are_refused() -> None:
    model = make()
    model.head.shapes = lambda region_px: [(2, region_px // 4, region_px // 4)]
    with pytest.raises(ConfigError, match="head: expected 1 maps, got 2"):
        model(torch.rand(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_a_mask_of_another_size_is_refused(kind: str) -> None:
    model = make()
    images: Any = torch.rand(1, 3, 70, 64, dtype=torch.float64)
    if kind == "image":
        images = [open_image(np.zeros((70, 64, 3), np.uint8))]
    with pytest.raises(DataError, match=r"the mask has 70 x 64 px, its image .* has 64 x 70"):
        model(images, [np.zeros((64, 70), np.uint8)])


def test_where_a_target_counts() -> None:
    """In the image, where it has data, and where the target is known; of tensors in the image."""
    pixels = np.full((70, 100, 3), 9, np.uint8)
    pixels[:40, :10] = 0
    known = ArrayImage(np.where(np.arange(100) < 50, 1, 7).astype(np.uint8)[None].repeat(70, 0), nodata=7)
    expected = np.zeros((128, 128), bool)
    expected[:70, :50] = True
    model = make()
    for images, holes in (([ArrayImage(pixels, nodata=0)], True), (torch.zeros(1, 3, 70, 100), False)):
        batch: SceneBatch = model.batch(images, [as_mask(known)])
        drawn = batch.load_targets(batch.chunks(4)[0])
        # (rows * cols, core, core) -> (rows * core, cols * core)
        valid = drawn["valid"].unflatten(0, (2, 2)).permute(0, 2, 1, 3).reshape(128, 128).numpy()
        found = expected.copy()
        found[:40, :10] &= not holes
        np.testing.assert_array_equal(valid, found)
        assert drawn["target"].dtype == torch.int64
