"""What all benchmarks share: the environment stamp, the result file, and the last line of JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, object]:
    """Machine and versions, as they stand in every result file."""
    packages = ("gigaxt", "torch", "timm", "numpy", "tifffile", "imagecodecs")
    return {
        "machine": f"{platform.machine()} {_processor()}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **{name: metadata.version(name) for name in packages},
    }


def publish(name: str, result: dict[str, Any], *, keep: bool) -> None:
    """Print the result as the last line; with `keep`, also write it to `results/`."""
    stamped = {"benchmark": name, "environment": environment(), **result}
    if keep:
        RESULTS.mkdir(exist_ok=True)
        cores, date = os.cpu_count(), stamped["environment"]["date"]
        (RESULTS / f"{name}_cpu{cores}_{date}.json").write_text(json.dumps(stamped, indent=2) + "\n")
    print(json.dumps(stamped))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
