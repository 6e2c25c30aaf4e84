"""A detector's answers for a scene as objects: whole, once, wherever the borders of regions lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.found.nms import suppress
from gigaxt.found.objects import Objects
from gigaxt.found.scene import Found, LossOfRegions, with_progress
from gigaxt.image.base import Image
from gigaxt.nn.heads.detect import DetectConfig, DetectHead, at_locations
from gigaxt.nn.heads.mask_rcnn import MaskRCNNHead
from gigaxt.nn.region_answers import RegionAnswer
from gigaxt.nn.xt import GigaXT
from gigaxt.scenes.batch import Scene

MOST_OF_REGION = 1000
"""Candidates of one region, those that score best."""
MOST_CANDIDATES = 1_000_000
"""Of a scene; of more, those that score best are kept as they come. 48 bytes each."""


class Candidates(NamedTuple):
    """What the cells of a scene say, n boxes; several for one object."""

    boxes_xyxy: NDArray[np.float64]
    """(n, 4) left, top, right, bottom in px."""
    scores: NDArray[np.float64]
    """(n,) 0 to 1."""
    classes: NDArray[np.int64]
    """(n,) from 0."""

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Candidates:
        """Some of them, by number, mask or slice."""
        return Candidates(self.boxes_xyxy[chosen], self.scores[chosen], self.classes[chosen])


def no_candidates() -> Candidates:
    """None at all."""
    return Candidates(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def joined(parts: list[Candidates]) -> Candidates:
    """Those of several, one after the other."""
    return Candidates(*(np.concatenate(same) for same in zip(no_candidates(), *parts, strict=True)))


def detect(model: GigaXT, image: Image, *, progress: Callable[[int, int], None] | None = None) -> Objects:
    """The objects of one scene; memory grows with its tokens and with its objects.

    Of a head of kind mask_rcnn they have masks, and memory grows with the scene's feature maps.

    Args:
        model: with a head that finds boxes; used as it is, in evaluation mode or not.
        image: the scene.
        progress: called with (regions done, all).

    Returns:
        Best first; boxes in px of `image`, whatever pixel size the model works at.

    Raises:
        ImageError: unreadable input. DataError: an image that does not fit the model, or the memory.
    """
    return find(model, image, progress=progress).objects


@torch.no_grad()
def find(
    model: GigaXT, image: Image, target: Any = None, *, progress: Callable[[int, int], None] | None = None
) -> Found:
    """As `detect`, and the loss where there is a target, in one pass over the scene.

    Args:
        model: as of `detect`.
        image: the scene.
        target: what `model(images, targets)` takes of it.
        progress: called with (regions done, all).
    """
    head = model.head
    assert isinstance(head, DetectHead | MaskRCNNHead)
    batch = model.batch([image], None if target is None else [head.as_target(target)])
    answers, scene = with_progress(model.predict_regions(batch), batch.full_size, progress), batch.scenes[0]
    if isinstance(head, MaskRCNNHead):
        head.check_fits(batch.scenes, next(model.parameters()).device, training=False)
        objects, sums = _find_with_masks(head, scene, answers)
    else:
        objects, sums = _find_boxes(head, scene, answers)
    seen = scene.image
    return Found(objects.on(seen.height, seen.width, image.height, image.width), sums)


def _find_boxes(
    head: DetectHead, scene: Scene, answers: Iterator[RegionAnswer]
) -> tuple[Objects, dict[str, Tensor] | None]:
    pool, loss = CandidatePool(scene.image.width, scene.image.height), LossOfRegions(head, scene)
    for answer in answers:
        pool.add(candidates(answer, head.lattice.strides, head.config))
        loss.add(answer)
    return select(pool.all(), head.config), loss.scores()


def _find_with_masks(
    head: MaskRCNNHead, scene: Scene, answers: Iterator[RegionAnswer]
) -> tuple[Objects, dict[str, Tensor] | None]:
    height, width = size = (scene.image.height, scene.image.width)
    maps: list[Tensor] = []
    for answer in answers:
        # Zeros where regions are left out, as in training.
        maps = maps or [
            found.new_zeros(found.shape[0], -(-height // s), -(-width // s))
            for found, s in zip(answer.answers, head.given_strides, strict=True)
        ]
        for whole, found, s in zip(maps, answer.answers, head.given_strides, strict=True):
            row, col = answer.y // s, answer.x // s
            whole[:, row : row + found.shape[1], col : col + found.shape[2]] = found
    losses = None if scene.target is None else head.scene_losses(maps, size, scene.target, seed=0)
    sums = None if losses is None else {"loss": torch.stack(list(losses.values())).sum(), **losses}
    answered = {name: part.cpu().numpy() for name, part in head.scene_answer(maps, size).items()}
    boxes = answered["boxes"].astype(np.float64)
    left, top, right, bottom = boxes.T
    objects = Objects(
        places=np.stack([top + bottom, left + right], axis=1) / 2,
        classes=answered["labels"].astype(np.int64),
        scores=answered["scores"].astype(np.float64),
        boxes_xyxy=boxes,
        masks=answered["masks"].astype(np.float32),
    )
    return objects, sums


def candidates(answer: RegionAnswer, strides: tuple[int, ...], config: DetectConfig) -> Candidates:
    """What one region's cells say, before suppression: boxes in px of the scene, which may reach beyond it."""
    classes = config.classes
    valid = torch.from_numpy(answer.valid)[None]
    boxes, scores = [], []
    for maps, stride in zip(answer.answers, strides, strict=True):
        here = at_locations(valid, stride)[0].to(maps.device)  # (rows, cols): a border cell may have no location
        rows, cols = here.shape
        cells = maps[:, :rows, :cols].double()
        score = (cells[:classes].sigmoid() * cells[-1:].sigmoid()).sqrt()  # (classes, rows, cols)
        x = answer.x + (torch.arange(cols, device=maps.device) + 0.5) * stride
        y = answer.y + (torch.arange(rows, device=maps.device) + 0.5) * stride
        left, top, right, bottom = cells[classes : classes + 4]
        box = torch.stack([x - left, y[:, None] - top, x + right, y[:, None] + bottom], dim=-1)  # (rows, cols, 4)
        boxes.append(box[here])
        scores.append(score.permute(1, 2, 0)[here])
    box, score = torch.cat(boxes), torch.cat(scores)  # (cells, 4), (cells, classes)
    return _best(box, score, config.score)


def _best(boxes: Tensor, scores: Tensor, least: float) -> Candidates:
    cell, class_ = (scores >= least).nonzero(as_tuple=True)
    score = scores[cell, class_]
    if len(score) > MOST_OF_REGION:
        score, best = score.topk(MOST_OF_REGION)
        cell, class_ = cell[best], class_[best]
    return Candidates(boxes[cell].cpu().numpy(), score.cpu().numpy(), class_.cpu().numpy())


class CandidatePool:
    """The candidates of a scene as they come, cut at its border.

    Args:
        width: of the scene, px.
        height: px.
        most: how many are kept, those that score best.
    """

    def __init__(self, width: int, height: int, most: int = MOST_CANDIDATES) -> None:
        self.limits, self.most = np.array([width, height, width, height], dtype=np.float64), most
        self._parts: list[Candidates] = []
        self._count = 0

    def add(self, found: Candidates) -> None:
        """Those of one region."""
        boxes = np.clip(found.boxes_xyxy, 0, self.limits)
        kept: NDArray[np.bool_] = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        self._parts.append(found._replace(boxes_xyxy=boxes).take(kept))
        self._count += len(self._parts[-1].scores)
        if self._count > 2 * self.most:
            best = self.all()
            self._parts, self._count = [best], len(best.scores)

    def all(self) -> Candidates:
        """The best of all."""
        found = joined(self._parts)
        if len(found.scores) > self.most:
            found = found.take(np.sort(np.argsort(-found.scores, kind="stable")[: self.most]))
        return found


def select(found: Candidates, config: DetectConfig) -> Objects:
    """One of each group that overlaps, best first, `max_objects` at most."""
    kept = suppress(found.boxes_xyxy, found.scores, config.nms_iou, found.classes if config.class_aware else None)
    best = found.take(kept[: config.max_objects])
    left, top, right, bottom = best.boxes_xyxy.T
    places = np.stack([top + bottom, left + right], axis=1) / 2
    return Objects(places=places, classes=best.classes, scores=best.scores, boxes_xyxy=best.boxes_xyxy)
