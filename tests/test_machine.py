"""What this process holds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gigaxt.machine import peak_resident_gib

PEAK = "from gigaxt.machine import peak_resident_gib; print(peak_resident_gib())"


def test_peak_is_the_most_held_so_far() -> None:
    before = peak_resident_gib()
    block = np.ones(64 << 20, np.uint8)
    assert peak_resident_gib() >= before
    assert block[-1] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count is Linux's")
def test_a_process_does_not_count_the_one_that_started_it() -> None:
    def child() -> float:
        return float(subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout)

    alone = child()
    block = np.ones(1 << 30, np.uint8)
    assert child() < alone + 0.1
    assert block[-1] == 1
