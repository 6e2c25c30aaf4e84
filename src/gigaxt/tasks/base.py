"""What training and evaluation ask of a task: targets from manifest rows, and metrics from a model's answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gigaxt.datasets.manifest import Manifest, Row
from gigaxt.image.base import Image

WORST_KEPT = 12
"""Worst cases that an evaluation remembers."""


@dataclass(kw_only=True)
class WorstCase:
    """An image on which the model did badly."""

    image: str
    """Path of the image."""
    badness: float
    """Higher is worse."""
    caption: str
    """What was expected and what came."""
    mask: str | None = None
    """Path of the target mask, for dense tasks."""


@dataclass(kw_only=True)
class Evaluation:
    """The result of one pass over a split."""

    images: int
    """Images that counted."""
    loss: float
    """Mean loss."""
    metrics: dict[str, float]
    """Metrics of the whole split; NaN where undefined."""
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """Class name -> metric -> value."""
    confusion: list[list[float]] | None = None
    """Rows: true class; columns: predicted class. Images, or pixels for dense tasks."""
    worst: list[WorstCase] = field(default_factory=list)
    """Worst first."""


class Tally(ABC):
    """Gathers a model's answers over a split."""

    @abstractmethod
    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add what `model.evaluate(images, targets)` returned for `rows`."""

    @abstractmethod
    def compute(self) -> Evaluation:
        """Metrics of all that was added.

        Raises:
            DataError: nothing was added.
        """


class Task(ABC):
    """One kind of answer, for the images of one manifest.

    Attributes:
        manifest: where rows and their targets come from.
        best: the metric by which the best model is kept.
        higher_is_better: whether a larger value of it is better.
        metric_names: the metrics of an evaluation, in the order of tables.
        class_names: one name a class.
        images_per_call: how many images `model.evaluate` may be given at once; None: any number.
    """

    manifest: Manifest
    best: str
    higher_is_better: bool = True
    metric_names: tuple[str, ...]
    class_names: tuple[str, ...]
    images_per_call: int | None = None

    @abstractmethod
    def target(self, row: Row, image: Image) -> Any:
        """What the model's answer for `image` is compared with.

        Raises:
            DataError: the manifest's target does not fit the image or the model.
            ImageError: a target raster cannot be read.
        """

    @abstractmethod
    def tally(self) -> Tally:
        """A fresh, empty tally."""

    @abstractmethod
    def class_counts(self, split: str) -> list[float]:
        """How often each class occurs in a split: images, or pixels for dense tasks.

        Raises:
            ConfigError: the task has no classes to balance.
        """

    def better(self, new: float, old: float) -> bool:
        """Whether `new` is a better value of `best` than `old`; NaN is never better, anything is better than NaN."""
        if new != new or old != old:
            return new == new
        return new > old if self.higher_is_better else new < old


def worst_first(cases: list[WorstCase]) -> list[WorstCase]:
    """The `WORST_KEPT` worst of `cases`; equal ones by path, so that the result does not depend on the order."""
    return sorted(cases, key=lambda case: (-case.badness, case.image))[:WORST_KEPT]
