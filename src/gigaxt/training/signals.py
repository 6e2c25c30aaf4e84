"""SIGTERM, SIGUSR1 and Ctrl-C ask a run to end between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

ASKED = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Signals:
    """While it is entered, the first such signal is only noted in `caught`; a second Ctrl-C interrupts at once.

    In another thread than the main one, where Python admits no handlers, it notes nothing.
    """

    caught: signal.Signals | None = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = (
            {number: signal.signal(number, self._note) for number in ASKED} if main else {}
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number)
