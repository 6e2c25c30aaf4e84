"""Draws the newest results of bench_memory.py: memory and time of a training step against the side of the image.

python benchmarks/plot.py          # writes docs/images/memory_and_time.png
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

TARGET = Path(__file__).parents[1] / "docs" / "images" / "memory_and_time.png"


def main() -> None:
    newest = max(Path(__file__).parent.glob("results/memory_cpu*.json"), key=lambda path: path.stem.split("_")[-1])
    heads = json.loads(newest.read_text())["heads"]
    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (head, found), colour in zip(heads.items(), ("C0", "C1"), strict=False):
        rows = found["rows"]
        sides = [row["pixels"] ** 0.5 for row in rows]
        memory.plot(sides, [row["peak_gib"] for row in rows], "o-", color=colour, label=head)
        told = [(side, row["predicted_gib"]) for side, row in zip(sides, rows, strict=True) if "predicted_gib" in row]
        memory.plot(*zip(*told, strict=True), "x", color=colour, markersize=9, label=f"{head}, predicted")
        seconds.plot(sides, [row["cpu_s"] for row in rows], "o-", color=colour, label=head)
    high = 27_000
    start = heads["classify"]["rows"][0]
    seconds.plot(
        [start["pixels"] ** 0.5, high],
        [start["cpu_s"], start["cpu_s"] * high**2 / start["pixels"]],
        ":",
        color="grey",
        label="linear in pixels",
    )
    for axes, what in ((memory, "peak resident memory, GiB"), (seconds, "CPU time of a step, s")):
        axes.set(xscale="log", yscale="log", xlabel="side of the image, px (root of its pixels)", ylabel=what)
        ticks = [1024, 2048, 4096, 8192, 16384, 26926]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    memory.set_yticks([0.75, 1, 1.5, 2, 3, 5], ["0.75", "1", "1.5", "2", "3", "5"])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, dpi=110)
    print(TARGET)


if __name__ == "__main__":
    main()
