"""What this process holds."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gigaxt.machine import peak_resident_gib, resident_gib

PEAK = "from gigaxt.machine import peak_resident_gib; print(peak_resident_gib())"


def test_peak_is_the_most_held_so_far() -> None:
    block = np.ones(256 << 20, np.uint8)
    held = resident_gib(os.getpid())
    assert block[-1] == 1
    del block
    assert resident_gib(os.getpid()) < held - 0.2
    assert peak_resident_gib() > held - 0.01  # the kernel counts in batches of pages


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count is Linux's")
def test_a_process_does_not_count_the_one_that_started_it() -> None:
    def child() -> float:
        return float(subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout)

    alone = child()
    block = np.ones(1 << 30, np.uint8)
    assert child() < alone + 0.1
    assert block[-1] == 1
