"""Which images a step sees, in which order, with which random changes: pure functions of the run's seed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.augment import colour_augmented, dihedral, draw_augmentation
from gigaxt.datasets.manifest import Row
from gigaxt.errors import ConfigError, DataError, ImageError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.tasks import Classification, Task
from gigaxt.training.config import AugmentConfig

OPEN_IMAGES = 32
"""Images whose headers are kept parsed (and files open) between epochs."""


def derive_seed(*parts: int | str) -> int:
    """A seed from 0 to 2**63 - 1 that depends on all parts and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def epoch_order(seed: int, epoch: int, count: int, weights: Sequence[float] | None = None) -> NDArray[np.int64]:
    """Indices of the samples of an epoch in the order in which they are seen, (count,).

    Args:
        seed: of the run.
        epoch: from 0.
        count: samples in the training split.
        weights: chance of each sample; drawn with repetition. None: each sample once.
    """
    random = np.random.default_rng(derive_seed(seed, "order", epoch))
    if weights is None:
        return random.permutation(count)
    chances = np.asarray(weights, dtype=np.float64)
    return random.choice(count, size=count, p=chances / chances.sum())


def balanced_weights(task: Task) -> list[float]:
    """The chance of each training image, such that every class that occurs is drawn equally often.

    Raises:
        ConfigError: the images do not have one class each.
    """
    if not isinstance(task, Classification):
        raise ConfigError("train.sampling balanced needs a label for each image, and these have masks")
    counts = task.class_counts("train")
    return [1.0 / counts[task.manifest.class_indices(row)[0]] for row in task.manifest.split("train")]


class Sample(NamedTuple):
    """An image with its target, ready for the model."""

    row: Row
    image: Image
    target: Any


class Samples:
    """The rows of one split, opened when asked.

    Args:
        rows: of the manifest.
        task: makes the targets.
        verify_sha256: compare files with the manifest's digests when they are first opened.
    """

    def __init__(self, rows: Sequence[Row], task: Task, *, verify_sha256: bool = False) -> None:
        self.rows, self.task, self.verify_sha256 = list(rows), task, verify_sha256
        self._verified: set[int] = set()
        self._open: OrderedDict[int, tuple[Image, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def plain(self, index: int) -> Sample:
        """The sample as it is on disk.

        Raises:
            ImageError: the image cannot be opened, or is not the file that the manifest's digest describes.
            DataError: the target does not fit.
        """
        row = self.rows[index]
        if index not in self._open:
            if self.verify_sha256 and index not in self._verified:
                self._verify(row)
                self._verified.add(index)
            image = open_image(row.image)
            self._open[index] = (image, self.task.target(row, image))
            if len(self._open) > OPEN_IMAGES:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return Sample(row, *self._open[index])

    def augmented(self, index: int, seed: int, config: AugmentConfig) -> Sample:
        """The sample with the random changes that `seed` draws; raises as `plain`."""
        row, image, target = self.plain(index)
        if not config.dihedral and not config.colour:
            return Sample(row, image, target)
        k, gain, offset = draw_augmentation(seed, image.channels, dihedral=config.dihedral, colour=config.colour)
        if config.dihedral:
            image = dihedral(image, k)
            target = dihedral(target, k) if isinstance(target, Image) else target
        if config.colour:
            image = colour_augmented(image, gain, offset)
        return Sample(row, image, target)

    def _verify(self, row: Row) -> None:
        try:
            self.task.manifest.verify(row)
        except DataError as error:  # `on_bad_image` decides about damaged files, as about unreadable ones
            raise ImageError(row.image, str(error)) from error


def guilty(samples: Sequence[Sample], error: ImageError) -> int | None:
    """Which of `samples` an error is about, by its image or its target; None where it is about something else."""
    for position, (row, image, target) in enumerate(samples):
        names = {str(row.image), image.name, str(row.mask), target.name if isinstance(target, Image) else ""}
        if error.path in names:
            return position
    return None
