"""`gigaxt predict` for models that find objects: COCO JSON, GeoJSON, CSV, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from gigaxt.amounts import amount
from gigaxt.cli.image_lists import scene_outputs
from gigaxt.cli.outputs import check_not_input, input_files, make_folder
from gigaxt.csv_cells import read_cells
from gigaxt.errors import ConfigError, DataError, ImageError

if TYPE_CHECKING:
    from gigaxt.cli.predict import PredictArguments
    from gigaxt.found.objects import Objects
    from gigaxt.image.base import Image
    from gigaxt.nn.heads.base import ObjectsConfig
    from gigaxt.nn.xt import GigaXT

FILES = (".json", ".geojson", ".csv")


def predict_objects(
    model: GigaXT, images: Sequence[Path], arguments: PredictArguments, skipped: dict[str, str] | None
) -> None:
    """Write the objects of all images to one file, or those of each to a GeoJSON in a folder."""
    from gigaxt.found.coco_results import write_coco_results
    from gigaxt.found.objects import write_csv, write_geojson
    from gigaxt.inference import class_names

    if arguments.probabilities or arguments.overlap is not None or arguments.dihedral != 1:
        raise ConfigError("--probabilities, --overlap, --dihedral: the model gives objects, these are for masks")
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        raise ConfigError(f"--score: expected 0 to 1, got {arguments.score}")
    out, names = arguments.out, class_names(model)
    suffix = _check_out(out, images)
    paths = _geojson_paths(out, images) if suffix == "" else [out] * len(images)
    folder = out.parent if suffix else out
    pictures = scene_outputs(folder, images, as_file=False, suffix=".png") if arguments.png else []
    inputs = input_files(arguments.images, images)
    for path in dict.fromkeys(paths):
        check_not_input(path, inputs)
    for path in pictures:
        check_not_input(path, inputs, flag="--png")
    make_folder(folder)
    found = _found(model, images, arguments, skipped, pictures, as_coco=suffix == ".json")
    if suffix == ".json":
        ids = image_ids(arguments.images)
        with_ids = ((ids.get(path, path.name), image, objects) for path, image, objects in found)
        count = write_coco_results(out, with_ids, cast("ObjectsConfig", model.config.head).category_ids)
        print(f"{out}: {amount(count, 'object')} as COCO results")
    elif suffix == ".csv":
        counts: list[int] = []
        write_csv(out, ((image, objects) for _, image, objects in _counted(found, counts)), names)
        print(f"{out}: {amount(sum(counts), 'object')} of {amount(len(counts), 'image')}")
    else:
        place = dict(zip(images, paths, strict=True))
        for path, image, objects in found:
            write_geojson(place[path], image, objects, names)
            print(f"{place[path]}: {amount(len(objects), 'object')}")


def image_ids(paths: Sequence[Path]) -> dict[Path, int | str]:
    """The ids of images in CSVs: those of the COCO JSON in `boxes`, else those in `image_id`, whole numbers as such."""
    ids: dict[Path, int | str] = {}
    for path in paths:
        for _, cells in read_cells(path)[1] if path.suffix.lower() == ".csv" else ():
            if not cells.get("image"):
                continue
            image, id_ = path.parent / cells["image"], cells.get("image_id", "")
            of_file = _id_in_coco(path.parent / cells["boxes"], image, id_) if cells.get("boxes") else None
            if of_file is not None:
                ids[image] = of_file
            elif id_:
                ids[image] = int(id_) if id_.lstrip("-").isdigit() else id_
    return ids


def _id_in_coco(path: Path, image: Path, image_id: str) -> int | str | None:
    """The id of an image in a COCO JSON; None where that is none, or does not know the image."""
    from gigaxt.datasets.coco import read_coco

    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        id_: int | str = read_coco(path).find(image, image_id).id
    except DataError:  # what is to be predicted need not have been annotated
        return None
    return id_


def _found(
    model: GigaXT,
    images: Sequence[Path],
    arguments: PredictArguments,
    skipped: dict[str, str] | None,
    pictures: Sequence[Path],
    *,
    as_coco: bool,
) -> Iterator[tuple[Path, Image, Objects]]:
    """Path, image and objects that score enough, image by image; `pictures`, one an image or none, are drawn."""
    from gigaxt.cli.progress import Steps
    from gigaxt.found.boxes import detect
    from gigaxt.image import open_image

    head = cast("ObjectsConfig", model.config.head)
    counted = head.counted_from if arguments.score is None else arguments.score
    least = head.score if as_coco and arguments.score is None else counted
    model.eval()
    for i, path in enumerate(images):
        try:
            image = open_image(path, rgb=model.config.input.rgb)
            with Steps(path.name, "regions") as steps:
                objects = detect(model, image, progress=steps)
        except (ImageError, DataError) as error:
            if skipped is None:
                raise
            skipped[str(path)] = str(error)
            continue
        objects = objects.take(objects.scores >= least)
        if pictures:
            shown = objects.take(objects.scores >= counted)  # of COCO results, which go far below, not all
            print(f"{draw(model, image, shown, pictures[i])}: the objects over the image")
        yield path, image, objects


def _counted(found: Iterator[tuple[Path, Image, Objects]], counts: list[int]) -> Iterator[tuple[Path, Image, Objects]]:
    """The same; the number of each image's objects is added to `counts`."""
    for path, image, objects in found:
        counts.append(len(objects))
        yield path, image, objects


def draw(model: GigaXT, image: Image, objects: Objects, path: Path) -> Path:
    """Write a small picture of an image with the boxes and masks of its objects; raises as `open_image`."""
    from gigaxt.draw import class_palette, overlay_mask, save_png, thumbnail, with_boxes
    from gigaxt.inference import class_names

    picture, names = thumbnail(image), class_names(model)
    assert objects.boxes_xyxy is not None
    scale = np.tile([picture.shape[1] / image.width, picture.shape[0] / image.height], 2)
    worst_first = np.argsort(objects.scores, kind="stable")  # the best are on top
    objects = objects.take(worst_first)
    boxes = np.asarray(objects.boxes_xyxy) * scale
    if objects.masks is not None:
        covered = classes_covered(objects.masks, boxes, objects.classes, *picture.shape[:2])
        picture = overlay_mask(picture, covered, class_palette(len(names) + 1))
    return save_png(with_boxes(picture, boxes, objects.classes, names), path)


def classes_covered(
    masks: NDArray[np.float32], boxes_xyxy: NDArray[np.float64], classes: NDArray[np.int64], height: int, width: int
) -> NDArray[np.int64]:
    """For each pixel of a picture (height, width) the class, from 1 on, of the last object that covers it; else 0."""
    from gigaxt.shapes.crops import painted

    canvas = np.zeros((height, width), dtype=np.int64)
    for mask, box, class_ in zip(masks, boxes_xyxy.tolist(), classes.tolist(), strict=True):
        crop = painted(mask, box, height, width)
        h, w = crop.pixels.shape
        canvas[crop.y : crop.y + h, crop.x : crop.x + w][crop.pixels] = class_ + 1
    return canvas


def _check_out(out: Path, images: Sequence[Path]) -> str:
    """The suffix that says what is written; empty for a folder."""
    suffix = "" if out.is_dir() else out.suffix.lower()
    if suffix and suffix not in FILES:
        raise ConfigError(f"--out {out}: the model gives objects: expected a .json, .geojson or .csv file, or a folder")
    if suffix == ".geojson" and len(images) > 1:
        raise ConfigError(f"--out {out}: a .geojson holds one image's objects, got {len(images)}: give a folder")
    return suffix


def _geojson_paths(out: Path, images: Sequence[Path]) -> list[Path]:
    paths = [out / f"{image.name.removesuffix(image.suffix)}.geojson" for image in images]
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice is not None:
        raise ConfigError(f"--out: two images would both become {twice}: predict them in two calls")
    return paths
