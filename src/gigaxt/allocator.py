"""Settings of the C library's allocator: keep freed memory, as every training step needs the same amount again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets the same; nothing is changed where one of them is there."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MAPPED_FROM = 64 << 20
"""Bytes. Larger blocks, such as the tokens of a large scene, are few and go back to the system at once; smaller ones,
such as the activations of a chunk, are kept. By itself glibc gives back all from 32 MiB on, and smaller ones often."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of this process; otherwise each block that is needed again costs page faults.

    On a CPU that is 3 to 7% of a training step, more on a busy machine, and takes no more memory (BENCHMARKS.md).

    Returns:
        Whether it was done: not with another C library, nor where the environment sets it (`SETTINGS`).
    """
    if any(os.environ.get(name) for name in SETTINGS):
        return False
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, MAPPED_FROM) and mallopt(_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> None:
    """Give kept memory back to the system, ahead of a phase that needs other blocks: evaluation, or the report."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None if this C library does not have it."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found
