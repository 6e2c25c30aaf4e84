"""Objects with boxes and masks in scenes whose feature maps fit in memory: Mask R-CNN from torchvision's parts.

He, Gkioxari, Dollár, Girshick: Mask R-CNN (2017). The feature maps are those of all regions with the context mixed in,
stitched; over them torchvision's region proposal network, box head and mask head see across the regions' borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image, roi_align

from gigaxt.errors import ConfigError
from gigaxt.nn.heads.base import ObjectsConfig, widened
from gigaxt.nn.heads.levels import ContextClassifier, Level, chosen_strides, joined_levels, resize
from gigaxt.nn.heads.scene import SceneHead, Size
from gigaxt.scenes.batch import Scene
from gigaxt.shapes.crops import Crop
from gigaxt.targets.base import SceneTarget
from gigaxt.targets.instances import InstanceTarget, as_instances

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""
BOX_SIDE, MASK_SIDE = 7, 14
"""Cells that an object's features are pooled to; masks have twice as many."""
MASK_CONVOLUTIONS = 4
CONTEXT = "context"
"""What the map of the context is called among the feature maps."""
RPN_SAMPLES = 256
"""Anchors of a scene that the loss of the proposals is taken of."""
LOOKED_AT = 2
"""Times as many proposals of each map are looked at before those that overlap are left out."""
MOSTLY = 0.5
"""Share of an anchor or proposal in an area where nothing is learnt, from which on it is no background."""

COPIES = 3
"""Of the feature maps at the peak of memory."""
KEPT_OF_CELL, SEEN_OF_CELL, COMPARED = 170, 30, 4
"""Numbers that a cell's anchors take: for a backward pass, without one, and for each object they are compared with."""


@dataclass(kw_only=True)
class MaskRCNNConfig(ObjectsConfig):
    """Settings of the head for objects with boxes and masks."""

    kind: Literal["mask_rcnn"] = "mask_rcnn"
    dim: int = 64
    """channels of the feature maps; torchvision's models have 256"""
    hidden: int = 256
    """features of an object that its class and box are read from; torchvision's models have 1024"""
    anchor_cells: float = 8.0
    """side of the anchors, in cells of their map: with strides from 4 on, 32 px and more"""
    proposals: int = 1000
    """places of a scene that may hold an object; raise it where there are more objects"""
    samples: int = 512
    """of these, how many the loss of a scene is taken of"""
    nms_iou: float = 0.5
    """of two objects of a class that overlap more, the one that scores less is left out"""
    max_objects: int = 1000
    """of a scene, those that score best"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "hidden", "proposals", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"head.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0.0 < self.anchor_cells < float("inf"):
            raise ConfigError(f"head.anchor_cells: expected a positive number, got {self.anchor_cells}")
        if self.class_weights is not None:
            raise ConfigError("head.class_weights: mask_rcnn has none; remove it, or use head.kind detect")


class MaskRCNNHead(SceneHead):
    """Feature maps and context of regions to maps of the scene, and these to objects with boxes and masks.

    Every map joins from coarse to fine, scaled and shifted by the context at its place, as in `DetectHead`. The context
    also stands in a map of its own, at the coarsest stride: an object's class is that of a `ContextClassifier` of its
    features and of what the context says in its box, so that it may depend on what is far away.

    Args:
        config: see `MaskRCNNConfig`.
        dim: channels of the context.
        map_channels: channels of each feature map, fine to coarse.
        map_strides: px per cell of each, fine to coarse.

    Raises:
        ConfigError: `strides` are none of the maps', or not powers of two that double.
    """

    def __init__(
        self, config: MaskRCNNConfig, dim: int, map_channels: Sequence[int], map_strides: Sequence[int]
    ) -> None:
        super().__init__()
        self.config = config
        self.strides = chosen_strides(config.strides, map_strides, "mask_rcnn")
        if any(fine * 2 != coarse for fine, coarse in zip(self.strides, self.strides[1:], strict=False)):
            raise ConfigError(f"head.strides: expected each to be twice the one before, got {self.strides}")
        if self.strides[0] & (self.strides[0] - 1):
            raise ConfigError(f"head.strides: expected powers of two, got {self.strides}; choose another backbone")
        self.answering = [stride in self.strides for stride in map_strides]
        self.context_norm = nn.LayerNorm(dim)
        self.levels = nn.ModuleList(Level(channels, dim, config.dim) for channels in map_channels)
        self.passed_on = nn.Conv2d(dim, config.dim, 1)
        self.rpn = _proposals(config, self.strides)
        self.roi_heads = _roi_heads(config, self.strides)

    @property
    def given_strides(self) -> tuple[int, ...]:
        """Px per cell of what `forward` gives."""
        return (*self.strides, self.strides[-1])

    def forward(self, maps: Sequence[Tensor], context: Tensor) -> tuple[Tensor, ...]:
        """The maps of regions that the second stage takes.

        Returns:
            (n, config.dim, h_i, w_i) for each of `strides`, and the context's, of the size of the last one.
        """
        context = self.context_norm(context).permute(0, 3, 1, 2)  # (n, rows, cols, dim) -> (n, dim, rows, cols)
        joined = joined_levels(self.levels, maps, context, self.answering)
        return (*joined, resize(self.passed_on(context), joined[-1].shape[2:]))

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        """A map for each stride, and the context's."""
        return [(self.config.dim, region_px // stride, region_px // stride) for stride in self.given_strides]

    def as_target(self, target: Any) -> InstanceTarget:
        """An InstanceTarget, or a mapping with `boxes`, `labels` from 0 and `masks` (n, height, width)."""
        return as_instances(target, self.config.classes)

    def scene_losses(self, maps: Sequence[Tensor], size: Size, target: SceneTarget, seed: int) -> dict[str, Tensor]:
        """Of the proposals `objectness` and `proposal_box`, of the objects `class`, `box` and `mask`."""
        assert isinstance(target, InstanceTarget)
        features, images = self._features(maps, size)
        wanted, crops, areas = _as_torchvision(target, features["0"])
        with _full_precision(maps[0].device), _in_mode(self, training=True), _seeded(maps[0].device, seed):
            proposals, losses = self.rpn(images, features, [{**wanted, "areas": areas, "size": areas.new_tensor(size)}])
            # Those in areas where nothing is learnt would be taught to be background.
            proposals = [found[~_mostly_in(found, areas)] for found in proposals]
            found = self._object_losses(features, proposals, images.image_sizes, wanted, crops)
        return {"objectness": losses["loss_objectness"], "proposal_box": losses["loss_rpn_box_reg"], **found}

    def _object_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[Size],
        wanted: dict[str, Tensor],
        crops: list[Crop],
    ) -> dict[str, Tensor]:
        """As `RoIHeads.forward`, which would need a mask of the size of the scene for each of its objects."""
        heads = self.roi_heads
        boxes, matched, labels, shifts = heads.select_training_samples(proposals, [wanted])
        logits, regressed = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
        # Of no samples, where nothing is learnt in all of the scene, a mean is not defined.
        class_loss, box_loss = (
            fastrcnn_loss(logits, regressed, labels, shifts) if len(logits) else (logits.sum(), regressed.sum())
        )
        found = labels[0] > 0
        masked, numbers = boxes[0][found], matched[0][found]
        pooled = heads.mask_roi_pool(features, [masked], sizes)
        masks = heads.mask_predictor(heads.mask_head(pooled))  # logits, (m, classes + 1, 28, 28)
        truth = cut_masks([crops[i] for i in numbers.tolist()], masked, masks.shape[-1])
        chosen = masks[torch.arange(len(masks), device=masks.device), labels[0][found]]
        crossed = F.binary_cross_entropy_with_logits(chosen, truth, reduction="sum") / max(truth.numel(), 1)
        return {"class": class_loss, "box": box_loss, "mask": crossed}

    def scene_answer(self, maps: Sequence[Tensor], size: Size) -> dict[str, Tensor]:
        """Objects, best first, with those of all classes together.

        Returns:
            boxes (n, 4) left, top, right, bottom in px; labels (n,) from 0; scores (n,); masks (n, 28, 28), the chance
            that each cell of the box is covered.
        """
        features, images = self._features(maps, size)
        with _full_precision(maps[0].device), _in_mode(self, training=False):
            proposals, _ = self.rpn(images, features)
            (found,), _ = self.roi_heads(features, proposals, images.image_sizes)
        labels, masks = found["labels"] - 1, found["masks"].squeeze(1)
        return {"boxes": found["boxes"], "labels": labels, "scores": found["scores"], "masks": masks}

    def needed_bytes(self, scene: Scene, *, training: bool) -> int:
        """See `SceneHead.needed_bytes`; counted in runs of the CPU, see tests/nn/heads/test_mask_rcnn.py."""
        config, target = self.config, scene.target
        objects = len(target.crops) if isinstance(target, InstanceTarget) else 0
        cells = sum(-(-scene.image.height // s) * -(-scene.image.width // s) for s in self.given_strides)
        a_cell = COPIES * config.dim + (KEPT_OF_CELL if training else SEEN_OF_CELL) + COMPARED * objects
        masks, layers = (config.samples // 4, 1 + MASK_CONVOLUTIONS) if training else (config.max_objects, 1)
        outputs = (2 * MASK_SIDE) ** 2
        a_mask = config.dim * (layers * MASK_SIDE**2 + outputs) + (config.classes + 1) * outputs
        boxes = (config.samples if training else config.proposals) * config.dim * BOX_SIDE**2
        size = max(4, next(self.parameters()).element_size())
        return size * (cells * a_cell + masks * a_mask + boxes)

    def _features(self, maps: Sequence[Tensor], size: Size) -> tuple[dict[str, Tensor], ImageList]:
        """Maps as torchvision takes them: by name, the context's last, a batch of one, zeros up to whole cells."""
        unit = 2 * self.strides[-1]  # the proposals have one more map, of twice the stride
        height, width = (-(-side // unit) * unit for side in size)
        features = {}
        names = [*map(str, range(len(self.strides))), CONTEXT]
        for name, found, stride in zip(names, maps, self.given_strides, strict=True):
            missing = (0, width // stride - found.shape[2], 0, height // stride - found.shape[1])
            features[name] = F.pad(widened(found)[None], missing)
        # Of the pixels only their number is asked.
        return features, ImageList(features["0"].new_empty(1).expand(1, 1, height, width), [size])


class _Proposals(RegionProposalNetwork):  # type: ignore[misc]  # torchvision has no types
    """With a coarser map in place of the context's, and areas in which no anchor is background."""

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = {name: found for name, found in features.items() if name != CONTEXT}
        coarsest = F.max_pool2d(list(maps.values())[-1], 1, 2)
        return cast(
            tuple[list[Tensor], dict[str, Tensor]], super().forward(images, {**maps, "pool": coarsest}, targets)
        )

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            height, width = target["size"].tolist()
            label[(label == 0) & _mostly_in(clip_boxes_to_image(anchor, (height, width)), target["areas"])] = -1
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], shifts: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not any((label >= 0).any() for label in labels):  # a mean of nothing
            return objectness.sum() * 0, deltas.sum() * 0
        return cast(tuple[Tensor, Tensor], super().compute_loss(objectness, deltas, labels, shifts))


def _proposals(config: MaskRCNNConfig, strides: Sequence[int]) -> _Proposals:
    sides = tuple((stride * config.anchor_cells,) for stride in [*strides, 2 * strides[-1]])
    most = {"training": config.proposals, "testing": config.proposals}
    found = _Proposals(
        AnchorGenerator(sides, (RATIOS,) * len(sides)),
        RPNHead(config.dim, len(RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=RPN_SAMPLES,
        positive_fraction=0.5,
        pre_nms_top_n={mode: LOOKED_AT * count for mode, count in most.items()},
        post_nms_top_n=most,
        nms_thresh=0.7,
    )
    found.box_similarity = _overlaps
    return found


def _overlaps(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Intersection over union of all with all, object by object: all at once takes many times as much on the way."""
    found = boxes.new_empty(len(boxes), len(anchors))
    for row, box in zip(found, boxes, strict=True):
        row.copy_(box_iou(box[None], anchors)[0])
    return found


class _BoxPooling(nn.Module):
    """Features of boxes, (m, dim, 7, 7), and the mean of the context's map in them, (m, dim, 1, 1)."""

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__()
        self.features = _pooling(strides, BOX_SIDE)
        self.stride = strides[-1]

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[Size]) -> tuple[Tensor, Tensor]:
        told = roi_align(features[CONTEXT], boxes, 1, 1 / self.stride, sampling_ratio=2, aligned=True)
        return self.features(features, boxes, sizes), told


class _BoxHead(TwoMLPHead):  # type: ignore[misc]  # torchvision has no types
    """Leaves the context as it is."""

    def forward(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super().forward(found[0]), found[1]


class _BoxPredictor(nn.Module):
    """Class logits (m, outputs) of features (m, hidden) and context, and shifts of the box (m, 4 * outputs)."""

    def __init__(self, config: MaskRCNNConfig, outputs: int) -> None:
        super().__init__()
        self.classifier = ContextClassifier(config.hidden, config.dim, outputs)
        self.shifts = nn.Linear(config.hidden, 4 * outputs)

    def forward(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        features, context = found
        logits = self.classifier(features[:, :, None, None], context).flatten(1)  # (m, outputs, 1, 1) -> (m, outputs)
        return logits, self.shifts(features)


def _roi_heads(config: MaskRCNNConfig, strides: Sequence[int]) -> RoIHeads:
    outputs = config.classes + 1  # class 0 is none of them
    return RoIHeads(
        _BoxPooling(strides),
        _BoxHead(config.dim * BOX_SIDE**2, config.hidden),
        _BoxPredictor(config, outputs),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.samples,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score,
        nms_thresh=config.nms_iou,
        detections_per_img=config.max_objects,
        mask_roi_pool=_pooling(strides, MASK_SIDE),
        mask_head=MaskRCNNHeads(config.dim, (config.dim,) * MASK_CONVOLUTIONS, 1),
        mask_predictor=MaskRCNNPredictor(config.dim, config.dim, outputs),
    )


def _pooling(strides: Sequence[int], side: int) -> MultiScaleRoIAlign:
    pooling = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, 2)
    # It keeps the strides that it infers from the first image, and would infer wrong ones where maps reach beyond it.
    px = strides[-1]
    with torch.device("cpu"):
        maps = {str(i): torch.zeros(1, 1, px // stride, px // stride) for i, stride in enumerate(strides)}
        pooling(maps, [torch.tensor([[0.0, 0.0, px, px]])], [(px, px)])
    return pooling


def cut_masks(crops: Sequence[Crop], boxes_xyxy: Tensor, side: int) -> Tensor:
    """The masks of objects in boxes (m, 4), one each: (m, side, side), the share of each cell that is covered."""
    found = boxes_xyxy.new_zeros(len(boxes_xyxy), side, side)
    for i, crop in enumerate(crops):
        # Zeros around: beyond a border, RoIAlign would take what lies on it.
        pixels = F.pad(torch.from_numpy(crop.pixels.copy()).to(boxes_xyxy), (2, 2, 2, 2))
        x, y = crop.x - 2, crop.y - 2
        box = boxes_xyxy[i : i + 1] - boxes_xyxy.new_tensor([x, y, x, y])
        found[i] = roi_align(pixels[None, None], [box], side, aligned=True)[0, 0]
    return found


def _as_torchvision(target: InstanceTarget, like: Tensor) -> tuple[dict[str, Tensor], list[Crop], Tensor]:
    """Boxes and labels (class 0 is none) of what is learnt, its masks, and areas (n, 4) where nothing is learnt."""
    boxes = torch.from_numpy(target.boxes.boxes_xyxy).to(like)
    labels = torch.from_numpy(target.boxes.classes).to(like.device) + 1
    ignored = torch.from_numpy(target.boxes.ignored)
    crops = [crop for crop, left_out in zip(target.crops, ignored.tolist(), strict=True) if not left_out]
    ignored = ignored.to(like.device)
    # It looks whether there are masks, and then for nothing in them.
    return {"boxes": boxes[~ignored], "labels": labels[~ignored], "masks": labels[:0]}, crops, boxes[ignored]


def _mostly_in(boxes_xyxy: Tensor, areas_xyxy: Tensor) -> Tensor:
    """Which of n boxes lie in one of the areas for the greater part: (n,) bool."""
    inside = torch.zeros(len(boxes_xyxy), dtype=torch.bool, device=boxes_xyxy.device)
    size = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0).prod(dim=1)
    for area in areas_xyxy:
        shared = torch.minimum(boxes_xyxy[:, 2:], area[2:]) - torch.maximum(boxes_xyxy[:, :2], area[:2])
        inside |= shared.clamp(min=0).prod(dim=1) >= MOSTLY * size  # what has no area says nothing
    return inside


@contextmanager
def _in_mode(head: MaskRCNNHead, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode decides whether torchvision's parts return a loss or an answer, and nothing else."""
    parts: list[tuple[nn.Module, bool]] = [(part, part.training) for part in (head.rpn, head.roi_heads)]
    try:
        for part, _ in parts:
            part.training = training
        yield
    finally:
        for part, before in parts:
            part.training = before


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Corners of boxes in bfloat16 would be off by whole pixels."""
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The parts draw samples from the global generators: here from a seed, and without a trace in them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
