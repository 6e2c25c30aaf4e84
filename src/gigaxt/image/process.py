"""What belongs to one process: file descriptors, handles and locks that must not cross a fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value that every process makes for itself on first use; a forked child drops what it inherited.

    Needs no lock (a lock may be held by another thread at the moment of a fork): `dict.setdefault` is atomic, so of
    two threads that make the value at once, both get the same one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """This process's value, made now if there is none yet."""
        pid = os.getpid()
        value = self._values.get(pid)
        if value is None:
            value = self._values.setdefault(pid, self._make())
            for other in [key for key in self._values if key != pid]:
                self._values.pop(other, None)
        return value

    def drop(self) -> None:
        """Forget the value; the next `get` makes a new one."""
        self._values.pop(os.getpid(), None)
