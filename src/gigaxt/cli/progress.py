"""Progress on the terminal: a bar with rate and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 15.0
"""Time between plain lines."""


@contextlib.contextmanager
def told_cache(folder: Path | None, gib: float) -> Iterator[None]:
    """Image files are read through a cache in `folder`; at the end a line says how much came from where."""
    from gigaxt.image.file_cache import files_cached

    with files_cached(folder, gib) as cache:
        yield
        if folder is not None and cache is not None:
            print(f"read: {cache.summary}", file=sys.stderr)


class Steps:
    """Shows how far a job is; a context manager that is called with (done, all).

    Args:
        what: the job, such as a file's name.
        unit: what is counted, such as "regions".
        console: where it goes; None: standard error.
        clock: seconds, for tests.
    """

    def __init__(
        self, what: str, unit: str, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console

        self.what, self.unit, self.clock = what, unit, clock
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self.started = self._last_line = self.clock()
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, count: int) -> None:
        """`done` of `count` are done."""
        self.done = done
        rate = done / max(self.seconds, 1e-9)
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self.what, total=count, unit=self.unit, rate="")
            self._bar.update(self._task, completed=done, rate=f"{rate:.3g} {self.unit}/s")
        elif self.clock() - self._last_line >= LINE_EVERY_S and done < count:
            self._last_line = self.clock()
            left = clock_text((count - done) / rate)
            self.console.print(
                f"{self.what}  {done}/{count} {self.unit}  {rate:.3g}/s  {left} left", markup=False, highlight=False
            )

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return self.clock() - self.started

    @property
    def summary(self) -> str:
        """Time and rate, such as "12 s, 83 regions/s"."""
        return f"{clock_text(self.seconds)}, {self.done / max(self.seconds, 1e-9):.3g} {self.unit}/s"


def clock_text(seconds: float) -> str:
    """Such as "0.4 s", "48 s", "3:05 min" or "2:10 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total} {task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
