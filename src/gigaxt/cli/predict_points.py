"""`gigaxt predict` with a model that finds points: one CSV of all images, or GeoJSON, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
    if any(image.exists() and out.exists() and image.samefile(out) for image in images):
        raise ConfigError(f"--out: {out} is one of the images; choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make the folder {out.parent}: {error.strerror or error}") from error

    def drawn(image: Image, objects: Objects) -> None:
        if arguments.png:
            draw(model, image, objects, out.parent / f"{Path(image.name).name}.points.png")

    with Steps(out.name, "regions") as steps:
        count = write_points(out, model, images, score=arguments.score, skipped=skipped, progress=steps, found=drawn)
    read = len(images) - len(skipped or ())
    print(f"{out}: {count:,} objects of {read} {'image' if read == 1 else 'images'}, {steps.summary}")


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
