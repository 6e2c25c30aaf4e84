from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from test_loop import assert_same, final_state, numbers
from tiny_run import KILLED_SETTINGS, TinyModel, tiny_config

from gigaxt.training import train
from gigaxt.training.log import read_metrics

KILL_AFTER = 10


def test_a_killed_process_loses_nothing_but_time(csv: Path, models: list[TinyModel], tmp_path: Path) -> None:
    script = Path(__file__).with_name("tiny_run.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(csv.parent), str(tmp_path / "killed")],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "killed/metrics.csv")) < KILL_AFTER:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
    assert KILL_AFTER <= len(numbers(tmp_path / "killed")) < 80 + 20

    train(tiny_config(csv, **KILLED_SETTINGS), tmp_path / "killed")
    train(tiny_config(csv, **KILLED_SETTINGS), tmp_path / "whole")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert_same(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))
