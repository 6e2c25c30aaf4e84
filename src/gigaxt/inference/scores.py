"""Class scores of images and cases, as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.errors import DataError, ImageError
from gigaxt.image import Image, open_image
from gigaxt.nn.heads import ClassifyConfig
from gigaxt.nn.heads.survival import event_probabilities
from gigaxt.nn.xt import GigaXT
from gigaxt.replaced_file import replaced_file

Progress = Callable[[int, int], None]
"""Called with (images or cases done, all)."""


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


def write_scores(
    output: Path,
    model: GigaXT,
    sources: Sequence[str | Path | Image],
    cases: Sequence[str] | None,
    skipped: dict[str, str] | None,
    progress: Progress | None,
) -> Path:
    """Write a CSV, a line for each image or case. See `gigaxt.predict`."""
    names = class_names(model)
    head = model.config.head
    bags = _bags(sources, cases)
    try:
        with replaced_file(output) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*(["case"] if cases is not None else []), "image", "prediction", *names])
            for done, (case, bag) in enumerate(bags, start=1):
                image = "|".join(str(name_of(source)) for source in bag)
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
    except OSError as error:
        raise ImageError(output, f"cannot write the scores: {error.strerror or error}") from error
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


def name_of(source: str | Path | Image) -> str | Path:
    """What an image is called in the CSV."""
    return source.name if isinstance(source, Image) else source
