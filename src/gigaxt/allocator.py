"""The C library's allocator, told to keep what it is given back: every step of a training needs the same memory."""

from __future__ import annotations

import ctypes
import os

SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets the same; nothing is changed where one of them is there."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MAPPED_FROM = 64 << 20
"""Bytes. Larger blocks, such as the tokens of a large scene, are few and go back to the system at once; smaller ones,
such as the activations of a chunk, are kept. By itself glibc gives back all from 32 MiB on, and smaller ones often."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of this process, which else cost page faults wherever they are needed again.

    On a CPU that is 3 to 7% of a training step, more on a busy machine, and takes no more memory (BENCHMARKS.md).

    Returns:
        Whether it was done: not with another C library, nor where the environment sets it (`SETTINGS`).
    """
    if any(os.environ.get(name) for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, MAPPED_FROM)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
