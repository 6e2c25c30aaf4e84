"""A model's score on one split: used while training and by `gigaxt eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from gigaxt.datasets.row import Case
from gigaxt.errors import DataError, ImageError
from gigaxt.tasks.base import Tally, Task
from gigaxt.training.data import Sample, Samples, failed_sample


class Stopping(Exception):  # noqa: N818  # no error: the user asked for it
    """The evaluation was given up half way because the process was asked to end."""


def tallied(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    batch: int = 4,
    skipped: dict[str, str] | None = None,
    on_image: Callable[[int], None] = lambda _: None,
) -> Tally:
    """The answers of `model` to all `samples`, in evaluation mode and without gradients.

    Args:
        model: has `evaluate(images, targets)`; its mode is as before afterwards.
        samples: of one split.
        task: gathers the answers.
        batch: cases that are given to the model at once, where the task allows it.
        skipped: images that cannot be read are added here (path -> reason), and their cases left out; None: they end
            the evaluation.
        on_image: called with the number of cases done; may raise `Stopping`.

    Raises:
        ImageError: an image cannot be read and `skipped` is None.
        DataError: an image or target does not fit the model.
    """
    size = task.images_per_call or batch
    tally = task.tally()
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(samples), size):
            on_image(start)
            indices = range(start, min(start + size, len(samples)))
            group = open_samples([(samples.cases[i], partial(samples.plain, i)) for i in indices], skipped)
            while group:
                images, targets = [sample.given for sample in group], [sample.target for sample in group]
                try:
                    with torch.no_grad():
                        output = task.answer(model, images, targets)
                except ImageError as error:
                    group = without_failed(group, error, skipped)
                    continue
                except DataError as error:
                    raise with_names(error, group) from error
                tally.update([sample.case[0] for sample in group], targets, output)
                break
    finally:
        model.train(was_training)
    return tally


def open_samples(wanted: Iterable[tuple[Case, Callable[[], Sample]]], skipped: dict[str, str] | None) -> list[Sample]:
    """The samples that can be opened. Where one image of a case cannot be read, the whole case is left out.

    Args:
        wanted: cases, each with what opens it.
        skipped: cases with an image in here (by path) are left out, and images that fail are added; None: failing
            raises.
    """
    opened = []
    for case, open_one in wanted:
        if skipped is not None and any(str(row.image) in skipped for row in case):
            continue
        try:
            opened.append(open_one())
        except ImageError as error:
            if skipped is None:
                raise
            names = [str(row.image) for row in case]
            skipped[error.path if error.path in names else names[0]] = str(error)
    return opened


def without_failed(group: list[Sample], error: ImageError, skipped: dict[str, str] | None) -> list[Sample]:
    """`group` without the case that `error` is about, whose image is noted in `skipped`.

    Raises:
        ImageError: the error itself, where nothing may be skipped (`skipped` is None) or it is about no case.
    """
    found = failed_sample(group, error)
    if skipped is None or found is None:
        raise error
    position, row = found
    skipped[str(row.image)] = str(error)
    return group[:position] + group[position + 1 :]


def with_names(error: DataError, group: list[Sample]) -> DataError:
    """The error with the images' names ahead of it, where it names none of them."""
    names = [image.name for sample in group for image in sample.images]
    if any(name in str(error) for name in names):
        return error
    return DataError(f"{', '.join(names)}: {error}")
