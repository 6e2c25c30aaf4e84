"""What this process holds, and where it may write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gigaxt.machine import free_disk_gib, peak_resident_gib, resident_gib, what_closes

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


def test_what_closes_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert what_closes(tmp_path / "new" / "folder") is None
    assert what_closes(tmp_path / "file" / "folder") == f"{tmp_path / 'file'} is a file"
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    assert what_closes(tmp_path / "new") == f"{tmp_path} is closed to this user"


def test_a_folder_above_that_is_closed_hides_what_is_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os.path, "exists", lambda path: path in (tmp_path, Path("/")))
    monkeypatch.setattr(Path, "exists", closed)
    assert free_disk_gib(tmp_path / "new") > 0
