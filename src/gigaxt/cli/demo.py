"""`gigaxt demo`: made-up scenes, two short trainings, a map, and what context is worth; offline, on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gigaxt.cli.flags import parse


@dataclass(kw_only=True)
class DemoArguments:
    """See it work, offline, on two CPU cores, in about three minutes: gigaxt demo

    Made-up scenes on disk, a training with context and one without, a map of a larger scene, pictures and a report.
    The same command goes on where it was stopped, and shows the results again once it is done.
    """

    out: Path = Path("gigaxt-demo")
    """Folder for everything that is made."""
    seed: int = 0
    """Another seed, other scenes and other first weights."""


def main(args: Sequence[str]) -> int:
    """Run the demo; exit status 0, or 128 + n where signal n stopped it (the same command goes on)."""
    arguments = parse(DemoArguments, args, verb="demo")

    from gigaxt.demo import DemoConfig, run_demo

    return run_demo(arguments.out, DemoConfig(seed=arguments.seed))
