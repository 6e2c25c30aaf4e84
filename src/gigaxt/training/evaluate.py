"""A model's score on one split: used while training and by `gigaxt eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from gigaxt.datasets.manifest import Row
from gigaxt.errors import DataError, ImageError
from gigaxt.tasks.base import Evaluation, Task
from gigaxt.training.data import Sample, Samples, guilty


class Stopping(Exception):  # noqa: N818  # no error: the user asked for it
    """The evaluation was given up half way because the process was asked to end."""


def evaluate(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    batch: int = 4,
    skipped: dict[str, str] | None = None,
    on_image: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Metrics of `model` on all `samples`, in evaluation mode and without gradients.

    Args:
        model: has `evaluate(images, targets)`; its mode is as before afterwards.
        samples: of one split.
        task: gathers the answers.
        batch: images that are given to the model at once, where the task allows it.
        skipped: images that cannot be read are left out and added here (path -> reason); None: they end the evaluation.
        on_image: called with the number of images done; may raise `Stopping`.

    Raises:
        ImageError: an image cannot be read and `skipped` is None.
        DataError: no image is left, or an image or target does not fit the model.
    """
    size = task.images_per_call or batch
    tally = task.tally()
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(samples), size):
            on_image(start)
            indices = range(start, min(start + size, len(samples)))
            group = open_samples([(samples.rows[i], partial(samples.plain, i)) for i in indices], skipped)
            while group:
                images, targets = [sample.image for sample in group], [sample.target for sample in group]
                try:
                    with torch.no_grad():
                        output: Mapping[str, Any] = model.evaluate(images, targets)  # type: ignore[operator]
                except ImageError as error:
                    group = without_guilty(group, error, skipped)
                    continue
                except DataError as error:
                    raise named(error, group) from error
                tally.update([sample.row for sample in group], targets, output)
                break
    finally:
        model.train(was_training)
    return tally.compute()


def open_samples(wanted: Iterable[tuple[Row, Callable[[], Sample]]], skipped: dict[str, str] | None) -> list[Sample]:
    """The samples that can be opened.

    Args:
        wanted: rows, each with what opens it.
        skipped: rows in here (by path of the image) are left out, and those that fail are added; None: failing raises.
    """
    opened = []
    for row, open_one in wanted:
        if skipped is not None and str(row.image) in skipped:
            continue
        try:
            opened.append(open_one())
        except ImageError as error:
            if skipped is None:
                raise
            skipped[str(row.image)] = str(error)
    return opened


def without_guilty(group: list[Sample], error: ImageError, skipped: dict[str, str] | None) -> list[Sample]:
    """`group` without the sample that `error` is about, which is noted in `skipped`; raises the error where it must."""
    position = guilty(group, error)
    if skipped is None or position is None:
        raise error
    skipped[str(group[position].row.image)] = str(error)
    return group[:position] + group[position + 1 :]


def named(error: DataError, group: list[Sample]) -> DataError:
    """The error with the image's name where it has none."""
    names = [sample.image.name for sample in group]
    if any(name in str(error) for name in names):
        return error
    return DataError(f"{', '.join(names)}: {error}")
