"""Mask R-CNN: streamed against in memory, its losses against torchvision's, and what it answers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from gigaxt import ConfigError, DataError, GigaXT, Streaming, build_model, open_image
from gigaxt.found.boxes import detect, find
from gigaxt.nn.heads.mask_rcnn import cut_masks
from gigaxt.shapes.crops import Crop
from gigaxt.targets.base import WindowTarget
from gigaxt.targets.boxes import BoxTarget
from gigaxt.targets.instances import InstanceTarget
from gigaxt.testing.live_memory import LiveMemory
from streamed import BUDGETS, assert_streamed_exactly
from tiny_models import tiny_model

BOXES = [[50, 20, 75, 60], [5, 5, 12, 9], [10, 8, 140, 90], [100, 60, 145, 98]]
LABELS, IGNORED = [0, 1, 2, 0], [False, False, False, True]


def make(**head: Any) -> GigaXT:
    given = {"kind": "mask_rcnn", "classes": 3, "dim": 8, "hidden": 16, "samples": 64, "proposals": 50, **head}
    return tiny_model(given, seed=1).double()


def image(seed: int = 0, height: int = 100, width: int = 150) -> Any:
    return open_image(np.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=np.uint8))


def masks() -> np.ndarray:
    """Discs in the boxes."""
    y, x = np.mgrid[:100, :150] + 0.5
    return np.stack(
        [((x - (a + c) / 2) / (c - a)) ** 2 + ((y - (b + d) / 2) / (d - b)) ** 2 < 0.25 for a, b, c, d in BOXES]
    )


TARGET = {"boxes": BOXES, "labels": LABELS, "ignored": IGNORED, "masks": masks()}


def test_context_is_told_of_the_cell_that_a_box_lies_in() -> None:
    """A numbered map of the context, not square; features say nothing."""
    head = tiny_model({"kind": "mask_rcnn", "classes": 3, "dim": 2, "hidden": 4, "strides": [4, 8]}).head
    numbers = torch.arange(20.0).reshape(1, 1, 4, 5).expand(1, 2, 4, 5)
    maps = {"0": torch.zeros(1, 2, 8, 10), "1": torch.zeros(1, 2, 4, 5), "context": numbers}
    places = [(1, 1), (1, 3), (2, 2)]  # not at the border, beyond which the map goes on level
    boxes = torch.tensor([[8.0 * col + 3, 8 * row + 3, 8 * col + 5, 8 * row + 5] for row, col in places])
    features, told = head.roi_heads.box_roi_pool(maps, [boxes], [(32, 40)])
    assert features.shape == (3, 2, 7, 7)
    torch.testing.assert_close(told[:, 0, 0, 0], torch.tensor([5.0 * row + col for row, col in places]))
    logits, _ = head.roi_heads.box_predictor((torch.zeros(3, 4), told))
    assert logits.std(dim=0).min() > 0  # so that the context alone tells classes apart


@pytest.mark.parametrize(("streaming", "forwards"), list(zip(BUDGETS, (4, 2, 1), strict=True)))
def test_streamed_loss_is_exact_in_few_passes(streaming: Streaming, forwards: int) -> None:
    assert assert_streamed_exactly(make(), image(), TARGET, streaming) == forwards * 6  # regions


def test_every_weight_learns_and_far_pixels_count() -> None:
    """Encoder and context get a gradient; objects of one region depend on pixels of another through the context."""
    model = make()
    model([image()], [TARGET], seed=0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel())
    pixels = torch.rand(1, 3, 64, 192, dtype=torch.float64)
    changed = pixels.clone()
    changed[..., 128:] += 0.5
    with torch.no_grad():
        maps = [model._scene_maps(model.batch(given), 0)[0][0] for given in (pixels, changed)]
    assert (maps[0] - maps[1])[:, :, :8].abs().max() > 1e-6 * maps[0].abs().max()


def test_box_losses_equal_torchvisions() -> None:
    """Those that `RoIHeads.forward` gives from masks of the whole scene; ours takes crops."""
    model, seed = make(), 7
    head, target = model.head, model.head.as_target({**TARGET, "ignored": None})
    with torch.no_grad():
        maps = model._scene_maps(model.batch([image()]), 0)[0]
        ours = head.scene_losses(maps, (100, 150), target, seed)
        features, images = head._features(maps, (100, 150))
        wanted = {"boxes": torch.tensor(BOXES).double(), "labels": torch.tensor(LABELS) + 1}
        wanted["masks"] = torch.from_numpy(masks()).to(torch.uint8)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head.rpn.training = head.roi_heads.training = True
            proposals, first = head.rpn(
                images,
                features,
                [{**wanted, "areas": torch.zeros(0, 4).double(), "size": images.tensors.new_tensor((100, 150))}],
            )
            _, second = head.roi_heads(features, proposals, [(100, 150)], [wanted])
    expected = {"objectness": first["loss_objectness"], "proposal_box": first["loss_rpn_box_reg"]}
    expected |= {"class": second["loss_classifier"], "box": second["loss_box_reg"]}
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=0)
    # Masks are cut half a pixel aside, where torchvision takes a pixel's corner for its centre.
    torch.testing.assert_close(ours["mask"], second["loss_mask"], rtol=0.02, atol=0)


def test_masks_are_cut_as_by_torchvision_half_a_pixel_aside() -> None:
    crops = [
        Crop(x, y, mask[y : y + h, x : x + w])
        for mask, (x, y, w, h) in zip(
            masks(), ((45, 15, 40, 50), (0, 0, 20, 20), (0, 0, 150, 100), (95, 50, 55, 50)), strict=True
        )
    ]
    random = np.random.default_rng(0)
    boxes = torch.from_numpy(np.array(BOXES) + random.uniform(-4, 4, (4, 4))).clamp(min=1)
    found = cut_masks(crops, boxes, 28)
    expected = project_masks_on_boxes(torch.from_numpy(masks()), boxes - 0.5, torch.arange(4), 28)
    torch.testing.assert_close(found, expected.double())
    assert found.max() == 1


def test_nothing_is_learnt_where_it_is_ignored() -> None:
    model = make()
    everything = {"boxes": [[0, 0, 150, 100]], "labels": [0], "masks": np.ones((1, 100, 150), bool), "ignored": [True]}
    loss = model([image()], [everything])
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None for p in model.parameters())  # as DistributedDataParallel wants them
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 60, 140, 90], [50, 20, 75, 60]])
    wanted = {"boxes": torch.tensor([[50.0, 20, 75, 60]]), "areas": torch.tensor([[95.0, 55, 145, 98]])}
    wanted["size"] = torch.tensor([100, 150])
    labels, _ = model.head.rpn.assign_targets_to_anchors([anchors], [wanted])
    assert labels[0].tolist() == [0, -1, 1]


def test_samples_are_drawn_from_the_seed_alone() -> None:
    model = make(samples=8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = [model([image()], [TARGET], seed=seed) for seed in (1, 1, 2)]
    torch.testing.assert_close(torch.rand(3), expected)
    assert found[0] == found[1] != found[2]
    assert model.head.training == model.head.rpn.training is False


def test_loss_of_two_scenes_is_their_mean() -> None:
    model, other = make(), image(1, 64, 70)
    few = {"boxes": [[20, 20, 40, 44]], "labels": [1], "masks": np.ones((1, 64, 70), bool)}
    alone = [model.evaluate([image()], [TARGET]), model.evaluate([other], [few])]
    both = model.evaluate([image(), other], [TARGET, few])
    torch.testing.assert_close(both["loss"], sum(value for name, value in both.items() if name != "loss"))
    for name in ("objectness", "class"):  # the second scene draws other samples there
        assert abs(both[name] - (alone[0][name] + alone[1][name]) / 2) < 0.2 * both[name]


def test_scenes_without_objects_and_of_any_size() -> None:
    model = make(score=0.0)
    for height, width in ((9, 200), (100, 150), (1, 1)):
        nothing = {"boxes": [], "labels": [], "masks": np.zeros((0, height, width), bool)}
        loss = model([image(0, height, width)], [nothing])
        assert torch.isfinite(loss)
        assert 0 < loss < 100
        (found,) = model([image(0, height, width)])
        boxes = found["boxes"]
        assert found["masks"].shape == (len(boxes), 28, 28)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()
        assert (found["scores"].diff() <= 0).all()
        assert set(found["labels"].tolist()) <= {0, 1, 2}
    # torchvision infers them from the first image, which may be no multiple of them.
    assert model.head.roi_heads.box_roi_pool.features.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_regions_with_a_halo() -> None:
    """What is decoded around a core is cut off, and counts."""
    models = []
    for region, halo in ((128, 32), (64, 0)):
        given = {"kind": "mask_rcnn", "classes": 3, "dim": 8, "hidden": 16, "proposals": 50}
        models.append(tiny_model(given, seed=1, region=region, halo=halo).double())
    with_halo, without = models
    with_halo.load_state_dict(without.state_dict())
    loss = with_halo([image()], [TARGET], seed=0)
    assert torch.isfinite(loss)
    assert loss != without([image()], [TARGET], seed=0)
    shapes = [[m.shape for m in model._scene_maps(model.batch([image()]), 0)[0]] for model in models]
    assert shapes[0] == shapes[1] == [(8, -(-100 // s), -(-150 // s)) for s in (4, 8, 16, 32, 32)]


def test_found_in_one_pass_as_by_the_model() -> None:
    model = make(score=0.2)
    found, (expected,) = find(model, image(), TARGET), model([image()])
    torch.testing.assert_close(torch.from_numpy(found.objects.boxes_xyxy), expected["boxes"])
    torch.testing.assert_close(torch.from_numpy(found.objects.masks), expected["masks"].float())
    for name, value in model.evaluate([image()], [TARGET]).items():
        torch.testing.assert_close(found.sums[name], value)
    assert len(detect(model, image())) == len(found.objects) > 0


def test_boxes_stay_exact_in_half_precision() -> None:
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model([image()], [TARGET], seed=0)
        (found,) = model([image()])
    loss.backward()
    assert loss.dtype == found["boxes"].dtype == torch.float32
    torch.testing.assert_close(loss, model([image()], [TARGET], seed=0), rtol=0.05, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("side", "dim", "objects"), [(384, 16, 0), (512, 16, 100), (320, 32, 0)])
def test_memory_is_foretold(training: bool, side: int, dim: int, objects: int) -> None:
    model = make(dim=dim, proposals=200, max_objects=100, score=0.0).float()
    at = np.random.default_rng(0).uniform(0, side - 40, (objects, 2)).round()
    crops = [Crop(int(x), int(y), np.ones((40, 40), bool)) for x, y in at]
    boxes = BoxTarget(np.concatenate([at, at + 40], axis=1), np.zeros(objects), size_px=(side, side))
    given = [image(0, side, side)], [InstanceTarget(boxes, crops)]
    foretold = model.head.needed_bytes(model.batch(*given).scenes[0], training=training)
    with LiveMemory(model.parameters()) as memory:
        if training:
            model(*given, seed=0).backward()
        else:
            find(model, given[0][0], given[1][0])
    print(f"foretold {foretold / 2**20:.0f} MiB, peak {memory.peak / 2**20:.0f} MiB")
    assert 0.8 * memory.peak < foretold < 2 * memory.peak


def test_scenes_that_do_not_fit_are_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigaxt.nn.heads.scene.device_memory_gib", lambda device: (1.0, 0.001))
    model = make()
    message = r"the feature maps of 150 x 100 px.* need about 0\.0\d+ GiB; 0\.001 GiB are free on cpu\. Leave out"
    for call in (lambda: model([image()], [TARGET]), lambda: model([image()]), lambda: detect(model, image())):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(DataError, match=r"the 2 scenes of this step 0\.0\d+ GiB"):
        model([image(), image(1)], [TARGET, TARGET])


def test_settings_that_do_not_fit() -> None:
    for wrong, message in (
        ({"strides": [4, 16]}, "each to be twice the one before"),
        ({"strides": [4, 12]}, r"expected some of \[4, 8, 16, 32\]"),
        ({"class_weights": [1, 2, 3]}, "head.class_weights: mask_rcnn has none"),
        ({"samples": 0}, "head.samples: expected at least 1"),
        ({"anchor_cells": 0}, "head.anchor_cells"),
        ({"nms_iou": 2}, "head.nms_iou"),
        ({"category_ids": [1]}, "head.category_ids: expected 3 values"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**wrong)
    model = make(strides=[8, 16, 32])
    with pytest.raises(DataError, match="not windows"):
        model([image()], [WindowTarget(model.head.as_target(TARGET), (0, 0, 64, 64), (150, 100))])


def test_ready_heads_see_scenes() -> None:
    model = make()
    copied = build_model(model.config, head=copy.deepcopy(model.head)).double()
    assert torch.isfinite(copied([image()], [TARGET], seed=0))
    with pytest.raises(ConfigError, match=r"must be a gigaxt\.nn\.heads\.scene\.SceneHead, Identity is none"):
        build_model(model.config, head=torch.nn.Identity())
