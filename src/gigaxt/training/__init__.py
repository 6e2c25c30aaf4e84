"""Training: `train(RunConfig, folder)` makes a run folder, or continues the run in it."""

from __future__ import annotations

from gigaxt.training.config import AugmentConfig, DataConfig, RunConfig, TrainConfig, run_config
from gigaxt.training.loop import train
from gigaxt.training.state import RunResult

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "RunConfig",
    "RunResult",
    "TrainConfig",
    "run_config",
    "train",
]
