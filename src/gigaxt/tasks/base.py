"""What training and evaluation ask of a task: targets from manifest rows, and metrics from a model's answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from gigaxt.amounts import amount
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.image.base import Image

COUNT_COLUMNS = ("boxes", "cases", "known", "pixels", "at_risk", "events")
"""Columns of `Evaluation.per_class` that are whole numbers."""
WORST_KEPT = 12
"""Worst cases that an evaluation remembers."""
BEST_KEPT = 4
"""Best ones, of detectors."""


@dataclass(kw_only=True)
class WorstCase:
    """An image on which the model did badly."""

    image: str
    """Path of the image; of a case the first."""
    badness: float
    """Higher is worse."""
    caption: str
    """What was expected and what came."""
    mask: str | None = None
    """Path of the target mask, for dense tasks."""
    others: list[str] = field(default_factory=list)
    """Paths of the other images of a case."""
    boxes: dict[str, list[list[float]]] = field(default_factory=dict)
    """What they are -> boxes (left, top, right, bottom) in px of the image, to be drawn over it; of detectors."""


@dataclass(kw_only=True)
class Evaluation:
    """The result of one pass over a split."""

    images: int
    """Images that counted."""
    loss: float
    """Mean loss."""
    metrics: dict[str, float]
    """Metrics of the whole split; NaN where undefined."""
    cases: int | None = None
    """Cases that counted; None where every image is its own."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metric -> the middle 95% of its values over bootstrap draws of groups; without those that have none."""
    notes: list[str] = field(default_factory=list)
    """What is not defined, and why."""
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """Class name -> metric -> value."""
    confusion: list[list[float]] | None = None
    """Rows: true class; columns: predicted class. Cases, or pixels for dense tasks."""
    worst: list[WorstCase] = field(default_factory=list)
    """Worst first."""
    best_cases: list[WorstCase] = field(default_factory=list)
    """Best first; of detectors."""

    @property
    def size(self) -> str:
        """How much was evaluated, in words."""
        images = amount(self.images, "image")
        return images if self.cases is None else f"{amount(self.cases, 'case')} of {images}"

    def interval(self, name: str) -> str:
        """The interval of a metric, in words; empty where it has none."""
        return "{:.4f} to {:.4f}".format(*self.intervals[name]) if name in self.intervals else ""


class Tally(ABC):
    """Gathers a model's answers over a split.

    Attributes:
        task: whose answers these are.
    """

    task: Task

    @property
    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """The first row of each case that was added."""

    @property
    def groups(self) -> list[str]:
        """What each case belongs to, as intervals want it: its group, else the case, else its image."""
        return [row.group or row.case or str(row.image) for row in self.rows]

    @abstractmethod
    def update(self, rows: Sequence[Row], targets: Sequence[Any], output: Mapping[str, Any]) -> None:
        """Add what `model.evaluate(images, targets)` returned for the cases that begin with `rows`."""

    @abstractmethod
    def select(self, keep: Callable[[Row], bool]) -> Self:
        """The tally of those cases whose first row is to be kept; without a loss where it is not known one by one."""

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """The tally of the cases of both, which are of one task."""

    @abstractmethod
    def compute(self) -> Evaluation:
        """Metrics of all that was added.

        Raises:
            DataError: nothing was added.
        """


class OfImage(Protocol):
    """What came of one image."""

    @property
    def row(self) -> Row:
        """Of the manifest."""


One = TypeVar("One", bound=OfImage)


class ImageTally(Tally, Generic[One]):
    """A tally of tasks in which each image is its own case.

    Attributes:
        images: what came of each.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.images: list[One] = []

    @property
    def rows(self) -> list[Row]:
        """The row of each image."""
        return [image.row for image in self.images]

    def select(self, keep: Callable[[Row], bool]) -> Self:
        """The tally of some images."""
        return self._of([image for image in self.images if keep(image.row)])

    def merged(self, other: Self) -> Self:
        """The tally of the images of both."""
        return self._of(self.images + other.images)

    def _of(self, images: list[One]) -> Self:
        tally = type(self)(self.task)
        tally.images = images
        return tally


class Task(ABC):
    """One kind of answer, for the images of one manifest.

    Attributes:
        manifest: where rows and their targets come from.
        best: the metric by which the best model is kept.
        higher_is_better: whether a larger value of it is better.
        metric_names: the metrics of an evaluation, in the order of tables.
        class_names: one name a class.
        takes_batches: whether `answer` takes what `GigaXT.prepare` made of the images in their place.
        images_per_call: how many cases `model.evaluate` may be given at once; None: any number.
        leaves_open: whether `settle` has something to set that the user did not.
    """

    manifest: Manifest
    best: str
    higher_is_better: bool = True
    metric_names: tuple[str, ...]
    class_names: tuple[str, ...]
    takes_batches: bool = True
    images_per_call: int | None = None
    leaves_open: bool = False

    @abstractmethod
    def target(self, row: Row, image: Image) -> Any:
        """What the model's answer for `image` is compared with.

        Raises:
            DataError: the manifest's target does not fit the image or the model.
            ImageError: a target raster cannot be read.
        """

    def answer(self, model: Any, images: Any, targets: Sequence[Any]) -> Mapping[str, Any]:
        """What a tally is given of some cases: the sums or logits of the model, and more where the task needs it.

        Args:
            model: has `evaluate(images, targets)`.
            images: of the cases, a list; or, where the task `takes_batches`, what `GigaXT.prepare` made of them.
            targets: of `target`, one a case.
        """
        output: Mapping[str, Any] = model.evaluate(images, targets)
        return output

    def settle(self, head: Any, evaluation: Evaluation) -> None:  # noqa: B027  # most tasks have nothing to settle
        """Set in the config of a head what follows from an evaluation of its model, which is now the best."""

    @abstractmethod
    def tally(self) -> Tally:
        """A fresh, empty tally."""

    @abstractmethod
    def class_counts(self, split: str) -> list[float]:
        """How often each class occurs in a split: cases, or pixels for dense tasks.

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


def as_table(columns: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Columns (classes,) -> class -> column -> value."""
    return {name: {key: float(column[i]) for key, column in columns.items()} for i, name in enumerate(names)}
