"""Objects of a scene from the answers of a head for points, region by region."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from gigaxt.found.objects import Objects
from gigaxt.found.peaks import PeakFinder, apart
from gigaxt.found.scene import Found, LossOfRegions, with_progress
from gigaxt.image.base import Image
from gigaxt.nn.heads.base import THRESHOLD
from gigaxt.nn.heads.points import PointsConfig, PointsHead
from gigaxt.nn.xt import GigaXT
from gigaxt.targets.base import SceneTarget

CELLS = 1.5
"""Of two objects that are nearer than so many cells, one is left out."""
FLAG_THRESHOLD = 0.5
"""Chance from which on a flag is set where neither the user nor training set another."""


@torch.no_grad()
def find(
    model: GigaXT,
    image: Image,
    target: SceneTarget | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The objects of one scene, and its loss where there is a target, in one pass.

    Memory grows with the scene's tokens, with 4 cells along the border of each region, and with its objects.

    Args:
        model: with a head of kind points, in evaluation mode.
        image: of any size.
        target: of the image.
        progress: called with (regions done, all).

    Raises:
        ImageError: unreadable input. DataError: an image or target that does not fit the model.
    """
    head = model.head
    assert isinstance(head, PointsHead)
    config = head.config
    batch = model.batch([image], None if target is None else [head.as_target(target)])
    scene = batch.scenes[0]
    side = scene.grid.core // config.stride
    peaks = PeakFinder(stride=config.stride, side=side, score=config.score, max_objects=config.max_objects)
    loss = LossOfRegions(head, scene)
    for answer in with_progress(model.predict_regions(batch), batch.full_size, progress):
        peaks.add(answer.x, answer.y, answer.answers[0], answer.valid)
        loss.add(answer)
    objects = _objects(head, *peaks.finish(), scene.image.height, scene.image.width)
    objects = objects.on(scene.image.height, scene.image.width, image.height, image.width)
    return Found(objects, loss.scores())


def decided(objects: Objects, config: PointsConfig) -> Objects:
    """The objects that score enough for their class, with flags as yes (1) or no (0)."""
    thresholds = np.array(config.threshold or [THRESHOLD] * config.classes)
    kept = objects.take(objects.scores >= thresholds[objects.classes])
    flags = zip(config.flags, config.flag_threshold or [FLAG_THRESHOLD] * len(config.flags), strict=True)
    yes = {name: (kept.attributes[name] >= threshold).astype(np.int8) for name, threshold in flags}
    return Objects(places=kept.places, classes=kept.classes, scores=kept.scores, attributes={**kept.attributes, **yes})


def _objects(
    head: PointsHead, cells: NDArray[np.int64], values: NDArray[np.float64], height: int, width: int
) -> Objects:
    config = head.config
    if not len(cells):
        values = np.zeros((0, sum(head.widths)))
    read = {
        name: part.cpu().numpy()
        for name, part in head.read(torch.from_numpy(values).to(head.number_mean.device)).items()
    }
    places = np.clip((cells + 0.5 + read["offsets"]) * config.stride, 0, (height, width))
    kept = apart(places, config.min_distance_px or CELLS * config.stride)
    columns = np.concatenate([read["flags"], read["numbers"]], axis=1)
    return Objects(
        places=places[kept],
        classes=read["class"][kept],
        scores=read["score"][kept],
        attributes={name: columns[kept, i] for i, name in enumerate(config.attributes)},
    )
