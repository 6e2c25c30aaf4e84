"""The head for points: its loss against a plain one, streamed against in memory, and what it answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gigaxt import ConfigError, DataError, GigaXT, Streaming, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import PointsConfig, PointsHead
from gigaxt.targets.points import NOTHING, UNKNOWN
from streamed import BUDGETS, assert_streamed_exactly
from tiny_models import tiny_model

POINTS = [[50.5, 20], [63.9, 64.2], [64.3, 63.7], [5, 5.5], [98, 140], [70, 100]]
TARGET = {
    "points": POINTS,
    "labels": [0, 1, 2, UNKNOWN, 0, 1],
    "ignored": [False] * 5 + [True],
    "moving": [1, 0, np.nan, np.nan, 1, np.nan],
    "length": [12.0, np.nan, 40, 100, np.nan, 3],
}
ATTRIBUTES = {"flags": ["moving"], "numbers": ["length"], "logarithmic": ["length"]}


def make(**head: Any) -> GigaXT:
    given = {"kind": "points", "classes": 3, "dim": 8, **ATTRIBUTES, "number_mean": [3.0], "number_std": [0.5], **head}
    return tiny_model(given, seed=1).double()


def image(seed: int = 0, **given: Any) -> Any:
    return open_image(np.random.default_rng(seed).integers(1, 255, (100, 150, 3), dtype=np.uint8), **given)


def plain_loss(model: GigaXT) -> torch.Tensor:
    """From the stitched map of the scene, cell by cell."""
    answers = model([image()])[0]
    drawn = {k: torch.from_numpy(v) for k, v in model.head.as_target(TARGET).draw(0, 0, 192, 128).items()}
    total, objects = torch.zeros((), dtype=torch.float64), 0
    for row, col in np.ndindex(*answers.shape[1:]):
        kind, z = int(drawn["classes"][row, col]), answers[:, row, col]
        p, h = z[0].sigmoid(), drawn["heat"][row, col].double()
        if kind == -2:
            continue
        if kind == -1:
            total = total - (1 - h) ** 4 * p**2 * (1 - p).log()
            continue
        objects += 1
        total = total - (1 - p) ** 2 * p.log()
        if kind >= 0:
            total = total - z[1:4].log_softmax(0)[kind]
        moving, length = drawn["attributes"][:, row, col].double()
        if not moving.isnan():
            total = total + F.binary_cross_entropy_with_logits(z[4], moving)
        if not length.isnan():
            total = total + F.smooth_l1_loss(z[5], (length.log() - 3) / 0.5, beta=0.1)
        total = total + 0.1 * (z[6:8] - drawn["offsets"][:, row, col]).abs().sum()
    assert objects == 5
    return total / objects


@pytest.mark.parametrize("stride", [2, 4])
def test_loss_equals_a_loop_over_cells(stride: int) -> None:
    model = make(stride=stride)
    loss = model.loss([image()], [TARGET])
    torch.testing.assert_close(loss, plain_loss(model), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("streaming", "forwards"), list(zip(BUDGETS, (3, 2, 1), strict=True)))
def test_streamed_loss_is_exact_in_few_passes(streaming: Streaming, forwards: int) -> None:
    """Gaussians reach across the borders of regions of 64 px."""
    assert assert_streamed_exactly(make(), image(), TARGET, streaming) == forwards * 6  # regions


def test_two_scenes_are_divided_by_the_objects_of_both() -> None:
    model = make()
    few = {"points": [[20, 20]], "labels": [1]}
    sums = [model._sums([image(i)], [t], 0, linear=False) for i, t in enumerate((TARGET, few))]
    expected = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    torch.testing.assert_close(model([image(0), image(1)], [TARGET, few]), expected, rtol=1e-12, atol=0)
    assert [int(s[1]) for s in sums] == [5, 1]


def test_scenes_without_objects_and_models_without_attributes_have_a_loss() -> None:
    for model in (make(), tiny_model({"kind": "points", "dim": 8})):
        loss = model([image()], [{"points": []}])
        loss.backward()
        assert 0 < loss < 100
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert any(g.any() for g in gradients)
        assert all(torch.isfinite(g).all() for g in gradients)
    assert model([image()])[0].shape == (3, 50, 75)
    assert model([image()], [{"points": [[3, 4]]}]).isfinite()


def test_nothing_is_learnt_where_there_is_no_data() -> None:
    model = make()
    pixels = np.random.default_rng(0).integers(1, 255, (100, 150, 3), dtype=np.uint8)
    pixels[40:60, :40] = 0
    bare = ArrayImage(pixels, nodata=0)
    assert int(model._sums([bare], [TARGET], 0, linear=False)[1]) == 4
    assert int(model._sums([open_image(pixels)], [TARGET], 0, linear=False)[1]) == 5


@pytest.mark.parametrize("stride", [2, 4])
def test_a_cell_counts_where_one_of_its_pixels_does(stride: int) -> None:
    """Single valid pixels in a map of cells that is no square."""
    head, (rows, cols) = make(stride=stride).head, (3, 5)
    answers = torch.zeros(1, sum(head.widths), rows, cols, dtype=torch.float64)
    answers[0, 0] = torch.linspace(-2, 2, rows * cols).reshape(rows, cols)
    p = answers[0, 0].sigmoid()  # another one in each cell
    of_cell = -(p**2) * (1 - p).log()
    targets = {
        "heat": torch.zeros(1, rows, cols),
        "classes": torch.full((1, rows, cols), NOTHING),
        "attributes": torch.zeros(1, 2, rows, cols),
        "offsets": torch.zeros(1, 2, rows, cols),
    }
    for row, col in ((0, 4), (2, 1), (1, 3)):
        for down, along in ((0, 0), (stride - 1, 0), (0, stride - 1), (stride - 1, stride - 1)):
            valid = torch.zeros(1, rows * stride, cols * stride, dtype=torch.bool)
            valid[0, row * stride + down, col * stride + along] = True
            total = head.loss_sums(answers, {**targets, "valid": valid})[0]
            torch.testing.assert_close(total, of_cell[row, col], rtol=1e-12, atol=0)


def test_what_an_object_is_is_told_by_the_context() -> None:
    head = make().head
    maps = [torch.randn(1, c, 64 // s, 64 // s).double() for c, s in zip((8, 8, 8, 16), (4, 8, 16, 32), strict=True)]
    one, other = (head(maps, context) for context in torch.randn(2, 1, 2, 2, 16).double())
    assert one.shape == (1, 8, 32, 32)
    assert (one[:, :5] - other[:, :5]).abs().min() > 1e-6


def test_answers_are_read_in_their_units() -> None:
    head = make().head
    answers = torch.tensor([[0.0, 1, 3, 2, -1.0, 2.0, 0.7, -0.25]])
    read = head.read(answers)
    assert (float(read["score"]), int(read["class"])) == (0.5, 1)
    torch.testing.assert_close(read["numbers"], torch.tensor([[4.0]]).double().exp())  # 2 * 0.5 + 3
    torch.testing.assert_close(read["flags"], torch.tensor([[-1.0]]).double().sigmoid())
    assert read["offsets"].tolist() == [[0.5, -0.25]]


def test_fresh_head_expects_few_objects() -> None:
    torch.manual_seed(0)
    head = PointsHead(PointsConfig(), 32, [8, 8], [4, 8])
    answers = head([torch.randn(4, 8, 16, 16), torch.randn(4, 8, 8, 8)], torch.randn(4, 2, 2, 32))
    assert answers.shape == (4, 3, 32, 32)
    assert answers[:, 0].sigmoid().mean() < 0.05


def test_settings_that_do_not_fit() -> None:
    for wrong, message in (
        ({"stride": 3}, r"head.stride: expected a divisor"),
        ({"stride": 64}, r"head.stride: expected a divisor"),
        ({"sigma_px": 0.0}, "head.sigma_px"),
        ({"offset_weight": float("nan")}, "head.offset_weight"),
        ({"score": 1.5}, "head.score"),
        ({"threshold": [0.5]}, "head.threshold: expected 3 values"),
        ({"flag_threshold": [0.5, 0.5]}, "head.flag_threshold: expected 1 values"),
        ({"numbers": ["moving"], "logarithmic": []}, "different columns"),
        ({"logarithmic": ["width"]}, "`width` is none of head.numbers"),
        ({"scoring": "xview3"}, "head.scoring xview3: expected flags"),
        ({"attribute_weights": [1.0]}, "head.attribute_weights: expected 2 values"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**wrong)
    assert make(stride=8)([image()])[0].shape == (8, 13, 19)
    with pytest.raises(DataError, match="expected a PointTarget"):
        make()([image()], [np.zeros((100, 150), np.uint8)])


def test_weights_weigh() -> None:
    def parts(**head: Any) -> Any:
        return make(**head)._sums([image()], [TARGET], 0, linear=False)[2]

    plain = parts()
    torch.testing.assert_close(parts(class_weights=[2.0] * 3)[1], 2 * plain[1])
    weighted = parts(attribute_weights=[3.0, 5.0], offset_weight=0.2)
    torch.testing.assert_close(weighted[2:], plain[2:] * torch.tensor([3.0, 5.0, 2.0]))
