"""Scenes in, tables of objects out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gigaxt.datasets.xview3 import scene_id, write_submission
from gigaxt.errors import ConfigError, DataError, ImageError
from gigaxt.found.objects import GEOJSON_SUFFIXES, Objects, write_csv, write_geojson
from gigaxt.found.points import decided, find
from gigaxt.image import Image, open_image
from gigaxt.inference.scores import class_names, name_of
from gigaxt.nn.heads.points import PointsConfig
from gigaxt.nn.xt import GigaXT

Progress = Callable[[int, int], None]


def write_points(
    output: Path,
    model: GigaXT,
    sources: Sequence[str | Path | Image],
    *,
    score: float | None = None,
    skipped: dict[str, str] | None = None,
    progress: Progress | None = None,
    found: Callable[[str | Path | Image, Image, Objects], None] | None = None,
) -> int:
    """Write the objects of images: CSV of any number of them, GeoJSON of one, or the submission of xView3-SAR.

    A model whose `head.scoring` is `xview3` writes the submission as its CSV. As the challenge's program does not score
    scenes without a line, a scene where nothing reaches the threshold gets the one that scores best, if anything was
    found at all.

    Args:
        output: a .csv or .geojson.
        model: with a head of kind points, in evaluation mode.
        sources: files or Images.
        score: objects of any class that score less are left out; None: the thresholds of the head.
        skipped: images that cannot be read or do not fit are left out and added here (name -> reason); None: the first
            one ends it.
        progress: called with (regions done, regions in all) of each image in turn.
        found: called with each source, its image and its objects.

    Returns:
        How many objects were written.

    Raises:
        ConfigError: another suffix, or GeoJSON of several. ImageError, DataError: as `gigaxt.predict`.
    """
    config = model.config.head
    assert isinstance(config, PointsConfig)
    suffix, names = output.suffix.lower(), class_names(model)
    _check_suffix(output, len(sources))
    if score is not None:
        config = replace(config, threshold=[score] * config.classes)
    for_xview3 = config.scoring == "xview3" and suffix == ".csv"
    count = 0

    def answers() -> Iterator[tuple[Image, Objects]]:
        nonlocal count
        for source in sources:
            try:
                image = open_image(source, rgb=model.config.input.rgb)
                everything = find(model, image, progress=progress).objects
            except (ImageError, DataError) as error:
                if skipped is None:
                    raise
                skipped[str(name_of(source))] = str(error)
                continue
            kept = decided(everything, config)
            if for_xview3 and not len(kept) and len(everything):  # the best one, as every scene needs a line
                kept = decided(everything.take(np.arange(1)), replace(config, threshold=[0.0] * config.classes))
            count += len(kept)
            if found is not None:
                found(source, image, kept)
            yield image, kept

    if suffix != ".csv":
        for image, objects in answers():
            write_geojson(output, image, objects, names)
    elif for_xview3:
        write_submission(output, ((scene_id(image.name), objects) for image, objects in answers()))
    else:
        write_csv(output, answers(), names)
    return count


def _check_suffix(output: Path, images: int) -> None:
    suffix = output.suffix.lower()
    if suffix not in (".csv", *GEOJSON_SUFFIXES):
        raise ConfigError(f"{output}: the model finds points: expected the name of a .csv or .geojson file")
    if suffix != ".csv" and images > 1:
        raise ConfigError(f"{output}: expected a .csv for the points of {images} images, or one image")
