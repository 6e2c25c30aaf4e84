"""The published table, and a run of an imported model over the images that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gigaxt.config import from_dict
from gigaxt.datasets.inaturalist import (
    FILES,
    PUBLISHED_ORDER,
    categories_of,
    check_images,
    read_categories,
    read_labels,
    read_photos,
)
from gigaxt.errors import DataError
from gigaxt.image.open import open_image
from gigaxt.nn.xt import GigaXT, ModelConfig
from gigaxt.xt_release.context import POOLED_KIND, ReleaseOptions

TOP1 = {
    "Swin-T 256": 53.76,
    "Swin-T Hyper 256/256": 52.93,
    "Swin-T Hyper 512/256": 60.56,
    "Swin-T XL 512/256": 58.92,
    "Swin-T Mamba 512/256": 61.97,
    "Swin-S 256": 58.45,
    "Swin-S Hyper 256/256": 57.04,
    "Swin-S Hyper 512/256": 63.62,
    "Swin-S XL 512/256": 62.68,
    "Swin-B 256": 58.57,
    "Swin-B Hyper 256/256": 55.52,
    "Swin-B Hyper 512/256": 64.08,
    "Swin-B XL 512/256": 62.09,
    "Swin-B Mamba 512/256": 63.73,
    "Swin-L 256": 68.78,
    "Swin-L Hyper 256/256": 67.84,
    "Swin-L Hyper 512/256": 72.42,
    "Swin-L XL 512/256": 73.47,
    "Swin-L Mamba 512/256": 73.36,
}
"""Percent of the 852 Reptilia images of iNaturalist 2018's validation set, from the release's README. XL: windows."""

_SIZES = {
    "swinv2_tiny_window16_256": "Swin-T",
    "swinv2_small_window16_256": "Swin-S",
    "swinv2_base_window16_256": "Swin-B",
    "swinv2_large_window12to16_192to256": "Swin-L",
}
_LAYERS = {"Hyper": 2, "XL": 2, "Mamba": 4}


class Score(NamedTuple):
    """How many images were right."""

    images: int
    top1: int
    top5: int

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of top-1, in percent."""
        z, n, share = 1.959964, self.images, self.top1 / self.images
        middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return 100 * (middle - spread) / (1 + z * z / n), 100 * (middle + spread) / (1 + z * z / n)


def table_row(config: ModelConfig, side: int) -> str | None:
    """The row of `TOP1` that a model on images of `side` px belongs to; None: it was not published."""
    size, context = _SIZES.get(config.region_encoder.name), config.context
    if size is None or config.region_encoder.options:
        return None
    if context.kind == POOLED_KIND:
        row = f"{size} {side}"
    else:
        options = from_dict(ReleaseOptions, context.options, "context.options")
        kind = "XL" if options.window else options.attention.capitalize()
        row = f"{size} {kind} {side}/{config.region_encoder.region}"
        if context.depth != _LAYERS.get(kind):
            return None
    return row if row in TOP1 else None


def validation_images(folder: Path, order: str | Path = "xt") -> list[tuple[Path, int]]:
    """Image files of `val2018.json` whose categories have a label, each once, in the order of the file.

    Args:
        folder: of iNaturalist 2018, with val2018.json, categories.json, and the images where the former says.
        order: `xt`: the labels of the published models; or a JSON file, the release's map of category ids to labels.

    Raises:
        DataError: a file is missing or no such JSON, ids that do not fit, or no image is left.
    """
    labels = published_labels(order)
    photos = [photo for photo in read_photos(folder / FILES["val"], categories_of(folder)) if photo.category in labels]
    check_images(folder / FILES["val"], photos)
    return [(photo.path, labels[photo.category]) for photo in photos]


def published_labels(order: str | Path = "xt") -> dict[int, int]:
    """Category id -> the published models' class; `order` as of `validation_images`."""
    return {key: i for i, key in enumerate(PUBLISHED_ORDER)} if str(order) == "xt" else read_labels(Path(order))


def class_names(categories: Path, classes: int, order: str | Path = "xt") -> list[str]:
    """Names of a published model's classes, in its order.

    Args:
        categories: categories.json of iNaturalist 2018.
        classes: how many the model has.
        order: as of `validation_images`.

    Raises:
        DataError: a file is missing or no such JSON, lacks a category, or the labels are not those of the classes.
    """
    known, names = read_categories(categories), {}
    for key, label in published_labels(order).items():
        if key not in known:
            raise DataError(f"{categories}: category {key}, the model's class {label}, is not in it")
        names[label] = known[key].name
    if sorted(names) != list(range(classes)):
        raise DataError(f"the model has {classes} classes, and the labels are {len(names)}, up to {max(names)}")
    return [names[label] for label in range(classes)]


@torch.no_grad()
def measure(
    model: GigaXT,
    images: Sequence[tuple[Path, int]],
    *,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Answer as the release's evaluation does, in float32.

    Args:
        model: its `input` says how images are squashed.
        images: each with its label.
        batch: images at once.
        progress: told how many are done.

    Raises:
        ImageError: an image that cannot be read.
    """
    top1 = top5 = 0
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        logits = model([open_image(path, rgb=True) for path, _ in part])
        assert isinstance(logits, Tensor)
        best = logits.topk(min(5, model.config.head.classes)).indices.cpu()
        right = best == torch.tensor([label for _, label in part])[:, None]
        top1, top5 = top1 + int(right[:, 0].sum()), top5 + int(right.sum())
        if progress is not None:
            progress(start + len(part), len(images))
    return Score(len(images), top1, top5)
