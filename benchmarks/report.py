"""What all benchmarks share: the environment stamp, the result file, and the last line of JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        **_gpu(),
        **_load(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **{name: metadata.version(name) for name in packages},
    }


def publish(name: str, result: dict[str, Any], *, keep: bool) -> None:
    """Print the result as the last line; with `keep`, also write it to `results/`."""
    machine = environment()
    stamped = {"benchmark": name, "environment": machine, **result}
    if keep:
        RESULTS.mkdir(exist_ok=True)
        device = str(machine.get("gpu", f"{_processor()} {machine['cores']} cores"))
        short = re.sub(r"\([A-Z]+\)|Processor|CPU|@.*(?= \d+ cores)", "", device, flags=re.IGNORECASE)
        place = RESULTS / f"{name}_{'-'.join(short.split())}_{machine['date']}.json"
        place.write_text(json.dumps(stamped, indent=2) + "\n")
    print(json.dumps(stamped))


def newest(name: str) -> dict[str, Any] | None:
    """The last result of a benchmark on a CPU that is kept; None: there is none."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_*.json"))]
    own = [result for result in found if result["benchmark"] == name and "gpu" not in result["environment"]]
    return max(own, key=lambda result: str(result["environment"]["date"]), default=None)


def in_child(script: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a script prints as its last line, in a process of its own; or `failed`: why it did not.

    Resident memory never shrinks, and a failure stays alone. `env` is added to the environment.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def finished_runs(
    path: Path, wanted: Iterable[dict[str, Any]], one_run: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of all runs that are wanted: each is a line of the file `path`, and is run only if it is not there yet.

    Args:
        path: of the lines of JSON; continued.
        wanted: the arguments of each run, which are part of its row.
        one_run: makes a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = []
    for arguments in wanted:
        row = next((old for old in done if arguments.items() <= old.items()), None)
        if row is None:
            row = one_run(**arguments)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        rows.append(row)
    return rows


def lattice(tokens: int) -> Any:
    """(1, tokens, 2) as (row, col) of a lattice twice as wide as high."""
    import torch

    rows = int((tokens / 2) ** 0.5)
    while tokens % rows:
        rows -= 1
    return torch.cartesian_prod(torch.arange(rows), torch.arange(tokens // rows))[None].float()


def _load() -> dict[str, object]:
    """How busy the machine is; a warning where others are at work on it."""
    load = round(os.getloadavg()[0], 2)
    shared = load > (os.cpu_count() or 1) + 1
    return {
        "load": load,
        **({"shared": "other processes were running: seconds mean little, ratios more"} if shared else {}),
    }


def _gpu() -> dict[str, object]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
