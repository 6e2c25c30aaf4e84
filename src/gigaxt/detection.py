"""A detector's answers for a scene as objects: whole, once, wherever the borders of regions lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.image.base import Image
from gigaxt.nms import suppress
from gigaxt.nn.heads.detect import DetectConfig, DetectHead, at_locations
from gigaxt.nn.xt import GigaXT, RegionAnswer
from gigaxt.objects import Objects

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

    Args:
        model: with a detection head; used as it is, in evaluation mode or not.
        image: the scene.
        progress: called with (regions done, all).

    Returns:
        Best first; boxes in px of `image`, whatever pixel size the model works at.

    Raises:
        ImageError: unreadable input. DataError: an image that does not fit the model.
    """
    batch = model.batch([image])
    seen = batch.scenes[0].image
    head = cast(DetectHead, model.head)
    pool = CandidatePool(seen.width, seen.height)
    for done, answer in enumerate(model.predict_regions(batch), start=1):
        pool.add(candidates(answer, head.lattice.strides, head.config))
        if progress is not None:
            progress(done, batch.full_size)
    return select(pool.all(), head.config).on(seen.height, seen.width, image.height, image.width)


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
