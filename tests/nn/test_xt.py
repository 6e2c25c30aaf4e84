from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt.augment import colour_augmented, dihedral
from gigaxt.errors import ConfigError, DataError
from gigaxt.image import Image, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.xt import GigaXT, ModelConfig, build_model
from gigaxt.streaming.single import Streaming

ENCODERS = {
    "swin": {
        "name": "swinv2_tiny_window16_256",
        "region": 64,
        "options": {
            "embed_dim": 8,
            "depths": [2, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "window_size": 8,
            "drop_path_rate": 0.4,
        },
    },
    "hiera": {
        "name": "hiera_tiny_224",
        "region": 96,
        "options": {"embed_dim": 8, "stages": [1, 1, 1, 1], "drop_path_rate": 0.4},
    },
    "convnext": {
        "name": "convnextv2_atto",
        "region": 64,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "drop_path_rate": 0.4},
    },
}
HEADS = {
    "classify": {"kind": "classify", "classes": 4},
    "segment": {"kind": "segment", "classes": 3, "dim": 8},
    "detect": {"kind": "detect", "classes": 3, "dim": 8, "depth": 1, "max_cells": 4.0},
}
BUDGETS = [Streaming(chunk_regions=1), Streaming(), Streaming(host_gib=1.0), Streaming(budget_gib=1.0)]


def make(encoder: str = "convnext", head: str = "classify", context: str = "mamba2", **sections: Any) -> GigaXT:
    torch.manual_seed(0)
    config = {
        "region_encoder": {**ENCODERS[encoder], **sections.pop("region_encoder", {})},
        "context": {"kind": context, "dim": 16, "depth": 2, "summary": 4, **sections.pop("context_options", {})},
        "head": {**HEADS[head], **sections.pop("head_options", {})},
        "input": sections,
    }
    model = build_model(ModelConfig.from_dict(config)).double()
    with torch.no_grad():  # a fresh Swin V2 has 156 of 217 gradients exactly zero
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def scenes() -> tuple[list[Image], list[Image]]:
    """Ragged sizes; the first has a hole of nodata that leaves out regions and cuts others."""
    rng = np.random.default_rng(0)
    first = rng.integers(1, 255, (150, 230, 3), dtype=np.uint8)
    first[40:, 60:200] = 0
    second = rng.integers(1, 255, (100, 64, 3), dtype=np.uint8)
    images: list[Image] = [ArrayImage(first, nodata=0), open_image(second)]
    masks = [open_image(rng.integers(0, 3, (i.height, i.width), dtype=np.uint8)) for i in images]
    return images, masks


def targets_of(head: str, masks: list[Image]) -> Any:
    """Boxes lie across borders of regions, in a hole of nodata, and over each other; one is a crowd."""
    boxes = [
        {"boxes": [[50, 20, 75, 60], [5, 5, 12, 9], [10, 8, 220, 140], [180, 100, 230, 150]], "labels": [0, 1, 2, 0]},
        {"boxes": [[30, 50, 64, 80], [2, 70, 30, 100]], "labels": [1, 0], "ignored": [False, True]},
    ]
    return {"classify": [1, 3], "segment": masks, "detect": boxes}[head]


def loss_and_grads(model: GigaXT, images: Sequence[Image], targets: Any, streaming: Streaming) -> list[Tensor]:
    model.streaming = streaming
    model.zero_grad()
    torch.manual_seed(1)  # of stochastic depth
    loss = model.loss(images, targets)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_streamed_equals_ordinary_autograd(encoder: str, head: str) -> None:
    """DESIGN: float64, 1e-10, stochastic depth on, ragged sizes, left-out regions, two images."""
    model = make(encoder, head).train()
    images, masks = scenes()
    targets = targets_of(head, masks)
    expected = loss_and_grads(model, images, targets, Streaming(budget_gib=None, chunk_regions=1000))
    assert all(bool(g.any()) for g in expected)
    for streaming in [*BUDGETS, Streaming(chunk_regions=1000)]:
        found = loss_and_grads(model, images, targets, streaming)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    model.eval()
    dropped = loss_and_grads(model, images, targets, Streaming())
    assert abs(dropped[0] - expected[0]) > 1e-6  # stochastic depth did something


@pytest.mark.parametrize(
    ("context", "head"),  # a context does not know of the head: each head with one of them, each context with maps
    [("mamba2", "classify"), ("mamba2", "segment"), ("full", "detect"), ("none", "segment"), ("none", "classify")],
)
def test_contexts_with_overview_and_halo(context: str, head: str) -> None:
    model = make("convnext", head, context, overview=[2, 4], halo=32, region_encoder={"region": 128}).train()
    images, masks = scenes()
    targets = targets_of(head, masks)
    model.streaming = Streaming(budget_gib=None)
    expected = loss_and_grads_allow_none(model, images, targets, Streaming(budget_gib=None))
    for streaming in BUDGETS[:3]:
        found = loss_and_grads_allow_none(model, images, targets, streaming)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max() + 1e-18


def loss_and_grads_allow_none(model: GigaXT, images: Any, targets: Any, streaming: Streaming) -> list[Tensor]:
    """With `none` an overview's tokens change no mask."""
    model.streaming = streaming
    model.zero_grad()
    loss = model.loss(images, targets, seed=5)
    loss.backward()
    return [loss.detach(), *(torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters())]


def test_in_memory_batch_equals_images() -> None:
    model = make("convnext", "segment").eval()
    rng = np.random.default_rng(1)
    pixels = rng.random((2, 100, 150, 3))
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    from_tensor, from_images = model(tensor), model([open_image(p.astype(np.float64)) for p in pixels])
    assert from_tensor.shape == (2, 3, 100, 150)
    for a, b in zip(from_tensor, from_images, strict=True):
        torch.testing.assert_close(a, b)
    classify = make("convnext", "classify").eval()
    both = classify(tensor)
    assert both.shape == (2, 4)
    torch.testing.assert_close(both, torch.cat([classify(tensor[:1]), classify(tensor[1:])]))
    torch.testing.assert_close(both, classify([open_image(p.astype(np.float64)) for p in pixels]))


def test_masks_of_a_tensor_are_differentiable() -> None:
    """The loss of the returned logits has the gradients of `model.loss`."""
    model = make("convnext", "segment").eval()
    tensor, target = torch.rand(1, 3, 100, 70, dtype=torch.float64), torch.randint(0, 3, (1, 100, 70))
    model.streaming = Streaming(chunk_regions=2)
    torch.nn.functional.cross_entropy(model(tensor), target).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.loss(tensor, target).backward()
    for a, p in zip(expected, model.parameters(), strict=True):
        assert p.grad is not None
        assert (a - p.grad).abs().max() <= 1e-10 * a.abs().max()


def test_regions_come_back_in_order() -> None:
    """A numbered image, not square and no multiple of the region, through read, grid, encode, decode and stitch."""
    model = make("convnext", "segment", "none").eval()
    image = torch.zeros(1, 3, 150, 230, dtype=torch.float64)
    base = model(image)
    for row, col in ((0, 0), (1, 2), (2, 1), (2, 3)):
        changed = image.clone()
        changed[:, :, row * 64 : (row + 1) * 64, col * 64 : (col + 1) * 64] += 1.0
        where = ((model(changed) - base).abs().amax(dim=(0, 1)) > 1e-9).nonzero()
        top, left = where.min(dim=0).values.tolist()
        bottom, right = where.max(dim=0).values.tolist()
        assert (top, left) == (row * 64, col * 64)
        assert bottom == min((row + 1) * 64, 150) - 1
        assert right == min((col + 1) * 64, 230) - 1


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (20, 30), (64, 64), (65, 63)])
@pytest.mark.parametrize("head", HEADS)
def test_any_size(size: tuple[int, int], head: str) -> None:
    model = make("convnext", head).train()
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    box = {"boxes": [[0, 0, size[1], size[0]]], "labels": [1]}
    target = {"segment": np.ones(size, dtype=np.uint8), "classify": 1, "detect": box}[head]
    loss = model.loss([open_image(pixels)], [target])
    loss.backward()
    assert torch.isfinite(loss)
    answer = model([open_image(pixels)])
    if head == "detect":
        assert [a.shape for a in answer[0]] == [(8, -(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    else:
        assert answer[0].shape == ((3, *size) if head == "segment" else (4,))


def test_far_region_matters_with_context_only() -> None:
    for context, matters in (("none", False), ("full", True), ("mamba2", True)):
        model = make("convnext", "segment", context).eval()
        a = torch.rand(1, 3, 64, 512, dtype=torch.float64)
        b = a.clone()
        b[..., :64] += 1.0
        change = (model(a) - model(b))[..., -64:].abs().max() / model(a).abs().max()
        assert (change > 1e-6) == matters, context


def test_normalisation_is_that_of_the_config() -> None:
    model = make(mean=[10.0, 20.0, 30.0], std=[2.0, 4.0, 8.0]).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    by_hand = (torch.from_numpy(pixels).double() - torch.tensor([10.0, 20, 30])) / torch.tensor([2.0, 4, 8])
    torch.testing.assert_close(model([open_image(pixels)]), model(by_hand.permute(2, 0, 1)[None]))
    gain, offset = np.array([0.5, 1, 2], dtype=np.float32), np.array([0.25, 0, -0.5], dtype=np.float32)
    coloured = by_hand * torch.from_numpy(gain) + torch.from_numpy(offset)
    augmented = colour_augmented(open_image(pixels), gain, offset)
    torch.testing.assert_close(model([augmented]), model(coloured.permute(2, 0, 1)[None]))
    default = make().eval()
    torch.testing.assert_close(
        default([open_image(pixels)]), default(torch.from_numpy(pixels).double().permute(2, 0, 1)[None] / 255)
    )


def test_what_is_not_valid_has_no_influence() -> None:
    """NaN and nodata pixels, whatever value they hold, and single bands that lack in float images."""
    model = make().eval()
    pixels = np.random.default_rng(0).random((100, 150, 3)).astype(np.float32)
    a, b = pixels.copy(), pixels.copy()
    a[10:40, 20:70] = np.nan
    b[10:40, 20:70] = -9999
    a[50, 60, 1], b[50, 60, 1] = np.nan, -9999
    torch.testing.assert_close(model([ArrayImage(a, nodata=np.nan)]), model([ArrayImage(b, nodata=-9999)]))


@pytest.mark.parametrize("nodata", [None, -9999.0, float("nan")])
def test_pixels_that_are_no_numbers_do_not_spoil_the_scene(nodata: float | None) -> None:
    """As if they were the mean of their band: a network input of zero, in the band where they stand."""
    model = make("convnext", "segment").eval()
    pixels = np.random.default_rng(0).random((100, 150, 3))
    broken = pixels.copy()
    broken[70, 90, 1], broken[10, 20], broken[80, 140, 0] = np.nan, np.inf, -np.inf
    filled = np.where(np.isfinite(broken), broken, 0.0)
    found, expected = model([ArrayImage(broken, nodata=nodata)])[0], model([ArrayImage(filled)])[0]
    assert found.isfinite().all()
    if nodata is None:
        torch.testing.assert_close(found, expected)


def test_augmented_views_train_with_their_masks() -> None:
    model = make("convnext", "segment").train()
    images, masks = scenes()
    plain = model.evaluate(images, masks)["weight_sum"]
    for k in (1, 5):
        turned = model.evaluate([dihedral(i, k) for i in images], [dihedral(m, k) for m in masks])
        torch.testing.assert_close(turned["weight_sum"], plain)


def test_evaluate_gives_what_metrics_need() -> None:
    images, masks = scenes()
    model = make("convnext", "segment").eval()
    sums = model.evaluate(images, masks)
    assert sums["confusion"].shape == (3, 3)
    torch.testing.assert_close(sums["confusion"].sum(), sums["weight_sum"])
    torch.testing.assert_close(sums["loss"], model.loss(images, masks))
    found = make().eval().evaluate(images, [1, 2])
    assert found["logits"].shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, i: m(i[0]), DataError, "list of Images"),
        (lambda m, i: m([]), DataError, "at least one image"),
        (lambda m, i: m(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), DataError, "float tensor"),
        (lambda m, i: m(torch.zeros(3, 64, 64)), DataError, "float tensor"),
        (lambda m, i: m([open_image(np.zeros((64, 64, 4), np.uint8))]), DataError, "takes 3 bands, the image has 4"),
        (lambda m, i: m([ArrayImage(np.zeros((64, 64, 3), np.uint8), nodata=0)]), DataError, "none of its 1 regions"),
        (lambda m, i: m.loss(i, [7, 1]), DataError, "out of range"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make(), scenes()[0])


def test_bad_masks() -> None:
    model, (images, masks) = make("convnext", "segment"), scenes()
    with pytest.raises(DataError, match="one target an image"):
        model.loss(images, masks[:1])
    with pytest.raises(DataError, match="the mask has 230 x 150 px"):
        model.loss(images[1:], masks[:1])
    with pytest.raises(DataError, match="class 3 is out of range"):
        model.loss(images[1:], [np.full((100, 64), 3, np.uint8)])
    ignored = model.loss(images[1:], [np.full((100, 64), 255, np.uint8)])
    assert ignored == 0.0


def test_bad_masks_on_a_device_of_its_own_are_refused_while_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, _) = make("convnext", "segment"), scenes()
    checked: list[int] = []
    check = model.head.check_targets

    def spy(targets: Mapping[str, Tensor]) -> None:
        checked.append(len(targets["target"]))
        check(targets)

    monkeypatch.setattr(model.head, "check_targets", spy)
    good = [np.zeros((100, 64), np.uint8)]
    model.loss(images[1:], good)
    assert not checked  # on a CPU the loss looks itself
    monkeypatch.setattr(type(model), "_device", torch.device("meta"))
    model.loss(images[1:], good)
    assert sum(checked) == len(model.batch(images[1:]).places)
    with pytest.raises(DataError, match="class 3 is out of range"):
        model.loss(images[1:], [np.full((100, 64), 3, np.uint8)])


def test_bad_config() -> None:
    good = {"region_encoder": ENCODERS["convnext"], "head": HEADS["classify"]}
    with pytest.raises(ConfigError, match=r"head.classs: unknown key; did you mean `classes`"):
        ModelConfig.from_dict({**good, "head": {"kind": "classify", "classs": 4}})
    with pytest.raises(ConfigError, match=r"head.kind: got 'classfy'; did you mean `classify`"):
        ModelConfig.from_dict({**good, "head": {"kind": "classfy", "classes": 4}})
    with pytest.raises(ConfigError, match="mean` and `std` together"):
        ModelConfig.from_dict({**good, "input": {"mean": [1.0]}})
    with pytest.raises(ConfigError, match="missing `region_encoder`"):
        ModelConfig.from_dict({"head": HEADS["classify"]})


@pytest.mark.parametrize("head", HEADS)
def test_nothing_outlives_the_step(head: str) -> None:
    """No cycle keeps images (open files), tokens or gradients until the next garbage collection."""
    model = make("convnext", head).train()
    gc.collect()
    gc.disable()
    try:
        for streaming, backward in product([Streaming(budget_gib=None), *BUDGETS[1:]], (True, False)):
            model.streaming = streaming
            images, masks = scenes()
            alive = [weakref.ref(image) for image in images]
            loss = model.loss(images, targets_of(head, masks))
            if backward:
                loss.backward()
            del images, masks, loss
            assert not [ref for ref in alive if ref() is not None], (streaming, backward)
    finally:
        gc.enable()
