"""The objects of one scene to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from gigaxt.found.boxes import detect
from gigaxt.found.coco_results import write_coco_results
from gigaxt.found.objects import write_objects
from gigaxt.image import Image
from gigaxt.inference.scores import class_names
from gigaxt.nn.heads.base import ObjectsConfig
from gigaxt.nn.xt import GigaXT


def write_found(output: Path, model: GigaXT, image: Image, progress: Callable[[int, int], None] | None) -> Path:
    """Write the objects of an image; see `gigaxt.predict`.

    Raises:
        ConfigError: another suffix than .json, .geojson or .csv. ImageError: the file cannot be written.
    """
    head = cast(ObjectsConfig, model.config.head)
    objects = detect(model, image, progress=progress)
    if output.suffix.lower() == ".json":
        write_coco_results(output, [(Path(image.name).name, image, objects)], head.category_ids)
        return output
    return write_objects(output, image, objects.take(objects.scores >= head.counted_from), class_names(model))
