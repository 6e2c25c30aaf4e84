"""Is `gigaxt plan` right? What it predicts against the training run itself, both in child processes.

Configurations of different kinds: classification and segmentation, nothing kept and everything kept. Memory: the run's
peak is the resident memory of the whole process as the kernel counts it, from the import of Python to the last
checkpoint. Time: of an epoch's steps, the median of the run's epochs.

    python benchmarks/bench_plan.py [--side 768] [--keep]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from bench_memory import make_image, make_mask
from report import publish

from gigaxt.training import run_config
from gigaxt.training.log import read_metrics
from gigaxt.training.plan import make_plan

EPOCHS = 3
CASES = (("classify", 0.0), ("classify", 8.0), ("segment", 0.0), ("segment", 8.0))
VERB = "import sys; from gigaxt.cli import main; sys.exit(main())"


def make_data(folder: Path, side: int) -> Path:
    """Six training scenes of two sizes, and one to evaluate on."""
    lines = ["image,label,mask,split"]
    train = [(name, px, "train") for name, px in zip("abcdef", [side, side // 2] * 3, strict=True)]
    for name, px, split in (*train, ("v", side // 2, "val")):
        make_image(folder / f"{name}.tif", (px, px))
        make_mask(folder / f"{name}_mask.tif", (px, px))
        lines.append(f"{name}.tif,{'y' if name in 'bdf' else 'x'},{name}_mask.tif,{split}")
    (folder / "data.csv").write_text("\n".join(lines))
    return folder / "data.csv"


def peak_gib(command: list[str]) -> float:
    """The most that a process held."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    told = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(told.decode())
    return usage.ru_maxrss / 2**20


def compare(kind: str, budget_gib: float, folder: Path, csv: Path) -> dict[str, Any]:
    data: dict[str, Any] = {
        "data": {"csv": str(csv)},
        "model": {
            "region_encoder": {"name": "convnextv2_atto", "region": 256},
            "context": {"kind": "mamba2", "dim": 64, "depth": 1},
            "head": {"kind": kind, "classes": 2, **({"dim": 16} if kind == "segment" else {})},
        },
        "train": {"epochs": EPOCHS, "batch": 1, "streaming": {"budget_gib": budget_gib}},
    }
    plan = make_plan(run_config(data), probe=False)
    assert plan.found is not None
    name = f"{kind}-{budget_gib:g}"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    run = [sys.executable, "-c", VERB, "train", "--config", str(folder / f"{name}.yaml"), "--out", str(folder / name)]
    row = {"head": kind, "budget_gib": budget_gib, "regions": plan.found.regions, "passes": plan.found.passes}
    pairs = {
        "gib": (plan.found.host_gib, peak_gib(run)),
        "epoch_s": (plan.epoch_s, epoch_s(folder / name)),
    }
    for what, (predicted, measured) in pairs.items():
        row[what] = {"predicted": round(predicted, 3), "measured": round(measured, 3)}
        row[what]["ratio"] = round(predicted / measured, 3)
    return row


def epoch_s(run: Path) -> float:
    """Time of an epoch's steps, by the run's own clock."""
    steps = [float(row["s_per_step"]) for row in read_metrics(run / "metrics.csv") if row["split"] == "train"]
    each = len(steps) // EPOCHS
    return statistics.median(sum(steps[i : i + each]) for i in range(0, len(steps), each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=768)
    parser.add_argument("--keep", action="store_true", help="write the result file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csv = make_data(folder, options.side)
        for kind, budget_gib in CASES:
            rows.append(compare(kind, budget_gib, folder, csv))
            print(rows[-1], flush=True)
    publish("plan", {"side_px": options.side, "rows": rows}, keep=options.keep)


if __name__ == "__main__":
    main()
