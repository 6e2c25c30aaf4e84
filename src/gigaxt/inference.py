"""Scene in, streamed result out: scores to CSV, masks to tiled pyramidal TIFF."""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.errors import ConfigError, DataError, ImageError
from gigaxt.image import Image, open_image
from gigaxt.image.writer import TiffWriter
from gigaxt.nn.heads import ClassifyConfig, SegmentConfig
from gigaxt.nn.heads.survival import event_probabilities
from gigaxt.nn.xt import GigaXT
from gigaxt.pixel_answers import answer_raster, shares
from gigaxt.regions import Place, RegionGrid

Progress = Callable[[int, int], None]
"""Called with (regions or images done, all)."""


def predict(
    model: GigaXT,
    source: str | Path | Image | Sequence[str | Path | Image],
    output: str | Path,
    *,
    cases: Sequence[str] | None = None,
    skipped: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Answer for one scene, or class scores for several.

    Args:
        model: used in evaluation mode, on the device it is on; left in the mode it was in.
        source: file or Image; for a classifier also a list of them.
        output: a classifier writes CSV (columns `image`, `prediction`, one a class: probabilities, or numbers of a
            regression; of survival the risk as prediction, and the chance of the event in each bin of time). With
            `cases` a column `case` stands first, and `image` holds those of the case, separated by `|`. A segmentation
            model writes a tiled pyramidal TIFF of class numbers, with the scene's CRS and
            transform or pixel size and the classes' colours; pixels without data, and regions that the model's
            `foreground` leaves out, hold 255 as nodata (65535 from 256 classes on). Labels are bands of 0 and 1 (nodata
            255), numbers bands of float32 (nodata NaN).
        cases: of a classifier: which case each of the sources belongs to; one answer for all images of a case. Empty:
            the image is its own.
        skipped: images of a list that cannot be read or do not fit the model are left out of the CSV, with their case,
            and added here (name -> reason); None: the first one ends it.
        progress: told how far it is.

    Returns:
        The path written. Until the result is complete it has another name.

    Raises:
        ImageError: unreadable input, or output that cannot be written. DataError: an image that does not fit the model.
    """
    output = Path(output)
    sources = [source] if isinstance(source, str | Path | Image) else list(source)
    if not sources:
        raise DataError("predict: expected at least one image, got none")
    if cases is not None and (model.dense or len(cases) != len(sources)):
        raise ConfigError(
            "predict: `cases` are for models that classify"
            if model.dense
            else f"predict: expected a case for each of {len(sources)} images, got {len(cases)}"
        )
    training = model.training
    model.eval()
    try:
        if not model.dense:
            return _write_scores(output, model, sources, cases, skipped, progress)
        if len(sources) > 1:
            raise ConfigError(
                f"predict: a segmentation model writes one file a scene, got {len(sources)}: loop over them"
            )
        return _write_mask(output, model, open_image(sources[0], rgb=model.config.input.rgb), progress)
    finally:
        model.train(training)


def scores(model: GigaXT, image: Image | Sequence[Image]) -> NDArray[np.float64]:
    """Class probabilities, numbers of a regression, or chances of the event in each bin of time: (classes,).

    Args:
        model: that classifies.
        image: one, or those of a case.
    """
    head = model.config.head
    assert isinstance(head, ClassifyConfig)
    with torch.no_grad():
        logits: Tensor = model([image]).double().cpu()  # (1, classes)
    answers = {
        "single": lambda: logits.softmax(1),
        "multi": lambda: logits.sigmoid(),
        "regression": lambda: logits,
        "survival": lambda: event_probabilities(logits),
    }[head.target]()
    result: NDArray[np.float64] = answers[0].numpy()
    return result


def class_names(model: GigaXT) -> list[str]:
    """The names of the head's classes; their numbers where it has none."""
    head = model.config.head
    return head.class_names or [str(i) for i in range(head.classes)]


def _write_scores(
    output: Path,
    model: GigaXT,
    sources: Sequence[str | Path | Image],
    cases: Sequence[str] | None,
    skipped: dict[str, str] | None,
    progress: Progress | None,
) -> Path:
    names = class_names(model)
    head = model.config.head
    bags = _bags(sources, cases)
    part = output.with_name(output.name + ".part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*(["case"] if cases is not None else []), "image", "prediction", *names])
            for done, (case, bag) in enumerate(bags, start=1):
                image = "|".join(str(_name(source)) for source in bag)
                try:
                    values = scores(model, [open_image(source, rgb=model.config.input.rgb) for source in bag])
                except (ImageError, DataError) as error:
                    if skipped is None:
                        raise
                    skipped[image] = str(error)
                else:
                    shown = [image, _prediction(values, names, head), *(f"{value:.6g}" for value in values)]
                    table.writerow([*([case] if cases is not None else []), *shown])
                if progress:
                    progress(done, len(bags))
            file.flush()
            os.fsync(file.fileno())
        part.replace(output)
    except OSError as error:
        raise ImageError(output, f"cannot write the scores: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return output


def _bags(
    sources: Sequence[str | Path | Image], cases: Sequence[str] | None
) -> list[tuple[str, list[str | Path | Image]]]:
    """Names of the cases and their images, in the order of their first images."""
    bags: dict[str | int, tuple[str, list[str | Path | Image]]] = {}
    for i, (source, case) in enumerate(zip(sources, cases or [""] * len(sources), strict=True)):
        bags.setdefault(case or i, (case, []))[1].append(source)
    return list(bags.values())


def _prediction(values: NDArray[np.float64], names: Sequence[str], head: object) -> str:
    target = head.target if isinstance(head, ClassifyConfig) else "single"
    if target == "regression":
        return " ".join(f"{value:.6g}" for value in values)
    if target == "survival":
        return f"{values.cumsum().sum():.6g}"  # the risk, as in gigaxt.nn.heads.survival
    if target == "multi":
        return "|".join(name for name, value in zip(names, values, strict=True) if value >= 0.5)
    return names[int(values.argmax())]


def _write_mask(output: Path, model: GigaXT, image: Image, progress: Progress | None) -> Path:
    head = model.config.head
    assert isinstance(head, SegmentConfig)
    batch = model.batch([image])
    seen = batch.scenes[0].image
    assert isinstance(seen, Image)
    raster = answer_raster(head)
    with TiffWriter(output, seen.height, seen.width, like=seen, **raster.options) as writer:
        empty_cores = _left_out(batch.scenes[0].grid)
        for done, (x, y, (logits,), valid) in enumerate(model.predict_regions(batch), start=1):
            # In turn with the others: the writer holds what waits for its neighbours.
            while empty_cores and (empty_cores[0][1], empty_cores[0][0]) < (y, x):
                writer.leave_out(*empty_cores.popleft())
            writer.write(x, y, raster.encode(shares(head, logits), valid))
            if progress:
                progress(done, batch.full_size)
        for window in empty_cores:
            writer.leave_out(*window)
    return output


def _left_out(grid: RegionGrid) -> deque[tuple[int, int, int, int]]:
    """Windows (x, y, w, h) of the cores that are not encoded, row by row."""
    kept = {(place.row, place.col) for place in grid.places if place.level == 0}
    cells = ((row, col) for row in range(grid.rows) for col in range(grid.cols))
    return deque(grid.core_xywh(Place(*cell)) for cell in cells if cell not in kept)


def _name(source: str | Path | Image) -> str | Path:
    return source.name if isinstance(source, Image) else source
