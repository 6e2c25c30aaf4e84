"""`gigaxt predict` with a model that finds points: one CSV of all images, or GeoJSON, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gigaxt.amounts import amount
from gigaxt.cli.image_lists import scene_outputs
from gigaxt.cli.outputs import check_not_input, input_files, make_folder
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.cli.predict import PredictArguments
    from gigaxt.found.objects import Objects
    from gigaxt.image.base import Image
    from gigaxt.nn.xt import GigaXT

MARK_PX = 4
"""Half the side of the square that marks a point in a picture."""


def predict_points(
    model: GigaXT, images: Sequence[Path], arguments: PredictArguments, skipped: dict[str, str] | None
) -> None:
    """Write the objects of all images into one file.

    Raises:
        ConfigError: `--out` is no .csv or .geojson, or flags that are for masks.
    """
    from gigaxt.cli.progress import Steps
    from gigaxt.inference.points import write_points

    out = arguments.out
    if arguments.probabilities or arguments.overlap is not None or arguments.dihedral != 1:
        raise ConfigError("--probabilities, --overlap, --dihedral: the model finds points, these are for masks")
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        raise ConfigError(f"--score: expected 0 to 1, got {arguments.score}")
    if out.is_dir() or out.suffix.lower() not in (".csv", ".geojson"):
        raise ConfigError(f"--out {out}: the model finds points: expected the name of a .csv or .geojson file")
    folder, inputs = out.parent, input_files(arguments.images, images)
    check_not_input(out, inputs)
    pictures: dict[str | Path | Image, Path] = {}
    if arguments.png:
        drawn_to = scene_outputs(folder, images, as_file=False, suffix=".points.png")
        pictures = dict(zip(images, drawn_to, strict=True))
    for picture in pictures.values():
        check_not_input(picture, inputs, flag="--png")
    make_folder(folder)

    drawn: list[Path] = []

    def look(source: str | Path | Image, image: Image, objects: Objects) -> None:
        if source in pictures:
            drawn.append(draw(model, image, objects, pictures[source]))

    with Steps(out.name, "regions") as steps:
        count = write_points(out, model, images, score=arguments.score, skipped=skipped, progress=steps, found=look)
    for picture in drawn:
        print(f"{picture}: the points over the image")
    print(f"{out}: {amount(count, 'object')} of {amount(len(images) - len(skipped or ()), 'image')}, {steps.summary}")


def draw(model: GigaXT, image: Image, objects: Objects, path: Path) -> Path:
    """Write a small picture of an image, as the model sees it, with a square around each of its objects."""
    from gigaxt.draw import save_png, thumbnail, with_boxes
    from gigaxt.inference import class_names

    names = model.config.input.band_names
    picture = thumbnail(image.select(names) if names is not None and set(names) <= set(image.band_names) else image)
    places = objects.places * (picture.shape[0] / image.height, picture.shape[1] / image.width)
    corner = places[:, ::-1]  # as (x, y)
    boxes = np.concatenate([corner - MARK_PX, corner + MARK_PX], axis=1)
    return save_png(with_boxes(picture, boxes, objects.classes, class_names(model)), path)
