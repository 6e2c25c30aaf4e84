"""Draws the newest results of bench_memory.py: memory and time of a training step against the side of the image.

python benchmarks/plot.py          # writes docs/images/memory_and_time.png
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from report import newest

TARGET = Path(__file__).parents[1] / "docs" / "images" / "memory_and_time.png"


SERIES = {
    "memory": "8 x 8 tokens a region",
    "memory_segment": "8 x 8 tokens a region",
    "memory_4x4": "4 x 4 tokens a region",
}
"""Results that are drawn, and what they are called."""


def main() -> None:
    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = iter(("C0", "C1", "C2"))
    every = []
    for name, called in SERIES.items():
        for head, found in (newest(name) or {"heads": {}})["heads"].items():
            rows, colour = found["rows"], next(colours)
            sides = [row["pixels"] ** 0.5 for row in rows]
            every += list(zip(sides, [row["cpu_s"] for row in rows], strict=True))
            memory.plot(sides, [row["peak_gib"] for row in rows], "o-", color=colour, label=f"{head}, {called}")
            told = [(s, row["predicted_gib"]) for s, row in zip(sides, rows, strict=True) if "predicted_gib" in row]
            memory.plot(*zip(*told, strict=True), "x", color=colour, markersize=9, label="predicted")
            seconds.plot(sides, [row["cpu_s"] for row in rows], "o-", color=colour, label=f"{head}, {called}")
    (first, cpu_s), (last, _) = min(every), max(every)
    line = [cpu_s, cpu_s * (last / first) ** 2]
    seconds.plot([first, last], line, ":", color="grey", label="linear in pixels")
    for axes, what in ((memory, "peak resident memory, GiB"), (seconds, "CPU time of a step, s")):
        axes.set(xscale="log", yscale="log", xlabel="side of the image, px (root of its pixels)", ylabel=what)
        ticks = [1024, 2048, 4096, 8192, 16384, 26926, 65536]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    memory.set_yticks([0.75, 1, 1.5, 2, 3, 5, 8], ["0.75", "1", "1.5", "2", "3", "5", "8"])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, dpi=110)
    print(TARGET)


if __name__ == "__main__":
    main()
