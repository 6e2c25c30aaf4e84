"""A model's score on one split: used while training and by `gigaxt eval`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gigaxt.errors import DataError, ImageError
from gigaxt.tasks.base import Tally, Task
from gigaxt.training.ahead import Ahead, Opened
from gigaxt.training.data import Sample, Samples, Skipped, open_samples, with_names, without_failed


class Stopping(Exception):  # noqa: N818  # no error: the user asked for it
    """The evaluation was given up half way because the process was asked to end."""


def tallied(
    model: Any,
    samples: Samples,
    task: Task,
    *,
    batch: int = 4,
    skipped: Skipped = None,
    on_image: Callable[[int], None] = lambda _: None,
) -> Tally:
    """The answers of `model` to all `samples`, in evaluation mode and without gradients.

    Args:
        model: a module with `evaluate` and `prepare`, as GigaXT; its mode is as before afterwards.
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
    ahead = Ahead(InOrder(samples, task.images_per_call or batch), model if task.takes_batches else None)
    tally = task.tally()
    was_training = model.training
    model.eval()
    try:
        for step in range(ahead.steps.total):
            on_image(step * ahead.steps.size)
            opened = ahead.step(step, skipped)
            while opened.samples:
                (group, given), *_ = ahead.groups(step, opened, skipped)
                targets = [sample.target for sample in group]
                try:
                    with torch.no_grad():
                        output = task.answer(model, given, targets)
                except ImageError as error:
                    opened = Opened(without_failed(group, error, skipped), None, skipped)
                    continue
                except DataError as error:
                    raise with_names(error, group) from error
                tally.update([sample.case[0] for sample in group], targets, output)
                break
    finally:
        ahead.drop()
        model.train(was_training)
    return tally


class InOrder:
    """All samples as they are, some at a time, as `Ahead` opens them."""

    def __init__(self, samples: Samples, size: int) -> None:
        self.samples, self.size = samples, size
        self.total = -(-len(samples) // size)

    def open(self, step: int, skipped: Skipped) -> list[Sample]:
        """See `Steps.open`."""
        start = step * self.size
        indices = range(start, min(start + self.size, len(self.samples)))
        return open_samples([(self.samples.cases[i], partial(self.samples.plain, i)) for i in indices], skipped)
