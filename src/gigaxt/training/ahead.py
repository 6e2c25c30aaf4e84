"""The samples of the next step: opened, cut into regions and begun to be read while the device computes this one.

Without it the device would wait, at each step, for files to be opened, windows and foreground to be found, and the
first chunk to be read; of small images, whose regions are one chunk, for all of the reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from gigaxt.nn.xt import GigaXT
from gigaxt.scenes.batch import SceneBatch
from gigaxt.training.data import Sample, Skipped


class Opens(Protocol):
    """What samples each step has."""

    @property
    def size(self) -> int:
        """How many the model is given at once."""

    @property
    def total(self) -> int:
        """Steps that there are."""

    def open(self, step: int, skipped: Skipped) -> list[Sample]:
        """The samples of a step; may add to `skipped`."""


S = TypeVar("S", bound=Opens)


class Opened(NamedTuple):
    """Samples of a step that are ready for the model."""

    samples: list[Sample]
    """Those of the step that are not done yet."""
    batch: SceneBatch | None
    """What the model makes of those that it is given first; None: it has them still to open."""
    skipped: Skipped
    """The images that were skipped when they were opened."""


class Ahead(Generic[S]):
    """Opens what comes next in a thread.

    What is opened is a pure function of the step and of the images that are skipped: opened ahead or in its turn, it
    is the same. What fails ahead is opened again in its turn, so that the error comes where it is dealt with.

    Args:
        steps: what is to be opened.
        model: prepares the samples that it is given at once; None: they are only opened.
    """

    def __init__(self, steps: S, model: GigaXT | None) -> None:
        self.steps, self.model = steps, model
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gigaxt-ahead")
        self._begun: tuple[tuple[int, int], Future[Opened]] | None = None

    def step(self, step: int, skipped: Skipped) -> Opened:
        """The samples of a step, opened ahead or now; raises as `open`."""
        return self._taken((step, 0), skipped) or Opened(self.steps.open(step, skipped), None, skipped)

    def groups(self, step: int, opened: Opened, skipped: Skipped) -> Iterator[tuple[list[Sample], Any]]:
        """The samples of a step, some at a time, each time with what the model is given of them.

        While the caller works on one group the next is opened, or the next step.
        """
        samples, batch, _ = opened
        for start in range(0, len(samples), self.steps.size):
            group = samples[start : start + self.steps.size]
            if start:
                found = self._taken((step, start), skipped)
                batch = None if found is None else found.batch
            self._begin(step, samples, start + self.steps.size, None if skipped is None else dict(skipped))
            yield group, [sample.given for sample in group] if batch is None else batch

    def drop(self) -> None:
        """Forget what was begun, and wait until the thread is at rest."""
        begun, self._begun = self._begun, None
        if begun is not None:
            wait([begun[1]])

    def _begin(self, step: int, samples: list[Sample], start: int, skipped: Skipped) -> None:
        """Open, from now on, what comes after the first `start` samples of a step; nothing after the last step."""

        def opened() -> Opened:
            rest = samples[start:] or self.steps.open(step + 1, skipped)
            return Opened(rest, self._prepared(rest[: self.steps.size]), skipped)

        self.drop()
        if start < len(samples):
            self._begun = (step, start), self._executor.submit(opened)
        elif step + 1 < self.steps.total:
            self._begun = (step + 1, 0), self._executor.submit(opened)

    def _prepared(self, group: list[Sample]) -> SceneBatch | None:
        if self.model is None or not group:
            return None
        return self.model.prepare([sample.given for sample in group], [sample.target for sample in group])

    def _taken(self, key: tuple[int, int], skipped: Skipped) -> Opened | None:
        """What was begun for `key`, as soon as it is there; None: nothing was, it failed, or others are skipped now."""
        begun = self._begun
        self.drop()  # waits even for what is not wanted: the thread opens what the caller may be about to open
        if begun is None or begun[0] != key or begun[1].exception() is not None:
            return None
        found = begun[1].result()
        return found if found.skipped == skipped else None
