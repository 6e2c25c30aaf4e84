"""Objects of a scene from the answers of a head for points, region by region."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.image.base import Image
from gigaxt.nn.heads.points import PointsConfig, PointsHead
from gigaxt.nn.xt import GigaXT, RegionAnswer
from gigaxt.objects import Objects
from gigaxt.peaks import PeakFinder, apart
from gigaxt.targets import SceneTarget

CELLS = 1.5
"""Of two objects that are nearer than so many cells, one is left out."""
THRESHOLD, FLAG_THRESHOLD = 0.3, 0.5
"""Where neither the user nor training set others."""


class Found(NamedTuple):
    """What a model says of a scene."""

    objects: Objects
    """All that score at least `head.score`, best first, in px of the image; flags as chances."""
    sums: dict[str, Tensor] | None
    """Of the loss, as `GigaXT.evaluate` gives them; None without a target."""


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
    sums: list[Tensor] = []
    for done, answer in enumerate(model.predict_regions(batch), start=1):
        peaks.add(answer.x, answer.y, answer.answers[0], answer.valid)
        if scene.target is not None:
            part = _sums(head, scene.target, answer)
            sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else list(part)
        if progress is not None:
            progress(done, batch.full_size)
    objects = _objects(head, *peaks.finish(), scene.image.height, scene.image.width)
    objects = objects.on(scene.image.height, scene.image.width, image.height, image.width)
    return Found(objects, head.scores(sums) if sums else None)


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


def _sums(head: PointsHead, target: SceneTarget, answer: RegionAnswer) -> tuple[Tensor, ...]:
    """What one region adds to the loss, from its answers cut at the image's border."""
    (maps,), stride = answer.answers, head.config.stride
    h, w = (side * stride for side in maps.shape[1:])
    drawn = {
        name: torch.from_numpy(part)[None].to(maps.device)
        for name, part in target.draw(answer.x, answer.y, w, h).items()
    }
    valid = np.zeros((1, h, w), np.bool_)
    valid[0, : answer.valid.shape[0], : answer.valid.shape[1]] = answer.valid
    return head.loss_sums(maps[None], {**drawn, "valid": torch.from_numpy(valid).to(maps.device)})
