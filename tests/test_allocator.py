"""Freed memory stays with the process, as far as page faults tell."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from gigaxt.allocator import SETTINGS

FAULTS = """
import resource, sys
import numpy as np
from gigaxt.allocator import keep_freed_memory

done = keep_freed_memory() if sys.argv[1] == "keep" else None
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(40 << 20, np.uint8).fill(1)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HELD = """
import numpy as np
from gigaxt.allocator import give_back_freed_memory, keep_freed_memory
from pathlib import Path

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) >> 8

keep_freed_memory()
np.empty(40 << 20, np.uint8).fill(1)
before = held()
give_back_freed_memory()
print(before - held())
"""
"""Prints the MiB that were given back."""
PAGES = 40 << 20 >> 12
"""Of 4 KiB. Huge pages make less of them, so the test looks at shares."""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def faults(how: str, **settings: str) -> tuple[str, int]:
    """Whether it was done, and the page faults of filling 40 MiB for the third time."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env=environment | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    told, count = done.stdout.split()
    return told, int(count)


def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    _, before = faults("leave")
    done, after = faults("keep")
    assert done == "True"
    assert after < before / 10
    assert after < PAGES / 100


def test_what_the_user_set_is_left_alone() -> None:
    done, count = faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")
    assert done == "False"
    assert count > PAGES / 1000


def test_what_is_kept_can_be_given_back() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run([sys.executable, "-c", HELD], env=environment, capture_output=True, text=True, check=True)
    assert 35 <= int(done.stdout) <= 60
