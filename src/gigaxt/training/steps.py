"""Which samples each step of a run sees: a pure function of the run's seed and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gigaxt.training.config import TrainConfig
from gigaxt.training.data import Sample, Samples, Skipped, derive_seed, epoch_order, open_samples


class Steps:
    """The samples of a run, step by step.

    Attributes:
        size: how many the model is given at once.
        per_epoch: steps of an epoch.
        total: steps of the run.

    Args:
        samples: of the training split.
        settings: of the run.
        weights: chance of each sample; None: each is seen once an epoch.
    """

    def __init__(self, samples: Samples, settings: TrainConfig, weights: Sequence[float] | None) -> None:
        self.samples, self.settings = samples, settings
        self.weights = None if weights is None else list(weights) * settings.windows_per_scene
        self.size = settings.batch
        self.samples_per_step = settings.batch * settings.accumulate
        self.samples_per_epoch = len(samples) * settings.windows_per_scene
        self.per_epoch = math.ceil(self.samples_per_epoch / self.samples_per_step)
        self.total = settings.epochs * self.per_epoch
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def open(self, step: int, skipped: Skipped) -> list[Sample]:
        """The augmented samples of a step, without those that cannot be opened and may be skipped.

        Raises:
            ImageError: an image cannot be opened, and none may be skipped. DataError: a target does not fit.
        """
        seed, most = self.settings.seed, self.samples_per_step
        epoch, place = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(seed, epoch, self.samples_per_epoch, self.weights))
        order = self._order[1]
        wanted = []
        for at in range(place * most, min((place + 1) * most, len(order))):
            index = int(order[at]) % len(self.samples)
            # Seeded by the place in the epoch, so that an image that is drawn twice is changed in two ways.
            change = (derive_seed(seed, "augment", epoch, at), self.settings.augment)
            wanted.append((self.samples.cases[index], partial(self.samples.augmented, index, *change)))
        return open_samples(wanted, skipped)
