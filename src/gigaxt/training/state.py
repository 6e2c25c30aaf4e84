"""Where a run is, and how it ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path

from gigaxt.tasks.base import Evaluation


@dataclass(kw_only=True)
class Best:
    """The evaluation that the folder `model/` comes from."""

    step: int
    """Steps done before it."""
    evaluation: Evaluation
    """Its result."""


@dataclass(kw_only=True)
class State:
    """Where a run is: beside weights, optimiser and random states, all that a checkpoint holds."""

    step: int = 0
    """Steps done; epoch and place in it follow from this."""
    evaluated: int = 0
    """Step after which the last evaluation was made."""
    seconds: float = 0.0
    """Time spent in steps."""
    best: Best | None = None
    """None before the first evaluation."""
    last: Evaluation | None = None
    """The latest evaluation."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Images that could not be read -> why."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How `train` ended."""

    out: Path
    """The run folder."""
    step: int
    """Steps done."""
    total_steps: int
    """Steps of the whole run."""
    signal: signal.Signals | None
    """What asked the run to stop; None: all epochs are done."""
    best: Evaluation | None
    """The best evaluation; None without one."""
