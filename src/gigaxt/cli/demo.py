"""`gigaxt demo`: made-up scenes, two short trainings, a map, and what context is worth; offline, on two cores."""

from __future__ import annotations

import io
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gigaxt.cli.flags import parse
from gigaxt.cli.progress import Steps, clock_text
from gigaxt.errors import ConfigError
from gigaxt.replaced_file import replaced_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gigaxt.datasets.legend import LegendConfig
    from gigaxt.image import Image
    from gigaxt.training import RunResult

T = TypeVar("T")
REGION = 64
"""Side of a region, px."""

RUNS = {"with context": "with_context", "without context": "without_context"}
"""What the two trainings are called -> their folders."""
LARGE = 840_000
"""Number of the first large scene: far from the others', and where a block begins that holds every kind once."""


@dataclass(kw_only=True)
class DemoArguments:
    """See it work, offline, on two CPU cores, in three to eight minutes.

    Made-up scenes on disk, a training with context and one without, a map of a larger scene, pictures and a report.
    The same command goes on where it was stopped, and shows the results again once it is done.
    """

    out: Path = Path("gigaxt-demo")
    """Folder for everything that is made."""
    seed: int = 0
    """Another seed, other scenes and other first weights."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How much is made and trained; the folder remembers it."""

    seed: int = 0
    kinds: int = 4
    """What the mark and the glyphs can be."""
    train_px: int = 128
    """Side of the scenes to train on. Small ones, for what counts is how many marks are seen."""
    train_scenes: int = 1280
    """Half as many, seen twice as often, take as long, and then some seeds misread a mark for good."""
    test_px: int = 256
    test_scenes: int = 24
    large_px: int = 2048
    epochs: int = 4
    batch: int = 16
    lr: float = 2e-3
    dims: tuple[int, ...] = (24, 48, 96, 128)
    """Widths of the region encoder's four stages."""


def main(args: Sequence[str]) -> int:
    """Run the demo; exit status 0, or 128 + n where signal n stopped it."""
    arguments = parse(DemoArguments, args, verb="demo")
    return run_demo(arguments.out, DemoConfig(seed=arguments.seed))


def run_demo(out: Path, config: DemoConfig) -> int:
    """Make everything in `out`, or what is still missing there.

    Returns:
        0, or 128 + n where signal n stopped a training.

    Raises:
        ConfigError: the folder holds something else.
    """
    began = time.monotonic()
    claim(out, config)
    print("In a corner of each scene a large mark says what all the small glyphs far from it are:", flush=True)
    print("who sees one region of 64 px at a time cannot know. Two models learn to name the glyphs.\n", flush=True)

    others = f"{config.test_scenes} of {config.test_px} px, {config.kinds} of {config.large_px:,} px"
    title = f"{config.train_scenes} scenes of {config.train_px} px, {others}"
    csv = timed(title, partial(make_scenes, out, config), "scenes")
    results: dict[str, RunResult] = {}
    for name, folder in RUNS.items():
        results[name] = timed(f"training {name}", partial(train_run, csv, config, name, out / folder), "steps")
        signal = results[name].signal
        if signal is not None:
            print(f"\nstopped by {signal.name}; the same command goes on from there")
            return 128 + int(signal)
    title = f"masks of the {config.kinds} large scenes"
    large = {name: timed(f"{title}, {name}", partial(map_large, out, config, name), "regions") for name in RUNS}

    from gigaxt.cli.demo_report import draw_pictures, write_page

    scores = {name: (kinds_iou(tested(results[name])), kinds_iou(large[name])) for name in RUNS}
    table = score_table(config, scores)
    first = {what: large_path(out, what, 0) for what in ("scene", "target", *RUNS)}
    pictures = timed("pictures and report", lambda steps: draw_pictures(out, RUNS, first, steps), "pictures")
    page = write_page(out, table, pictures, RUNS, next_commands(out))
    print(f"\n{aligned(table)}\n")
    for path, what in {
        page: "all of this on one page, with the pictures",
        first["with context"]: "a mask of a large scene: a pyramid for QGIS and QuPath",
        out / RUNS["with context"]: "the run: model, metrics, its own report",
    }.items():
        print(f"  {path!s:<{len(str(out)) + 28}} {what}")
    print(f"\nnext:\n{next_commands(out)}\n\ndone in {clock_text(time.monotonic() - began)}")
    return 0


def claim(out: Path, config: DemoConfig) -> None:
    """Make the folder, or see that it holds this very demo.

    Raises:
        ConfigError: it holds something else. CheckpointError: it cannot be written.
    """
    marker = out / "demo.json"
    settings = json.loads(json.dumps({"gigaxt": version("gigaxt"), **asdict(config)}))
    try:
        if marker.exists():
            if json.loads(marker.read_text(encoding="utf-8")) != settings:
                raise ConfigError(
                    f"{out}: holds a demo of other settings or another version; use another --out, or remove the folder"
                )
            print(f"{out} holds this demo already: what is done is not done again.\n")
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out}: expected a new folder, or one of an earlier demo; use another --out")
        out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out}: cannot be used: {getattr(error, 'strerror', None) or error}") from error


def timed(title: str, work: Callable[[Steps], T], unit: str) -> T:
    """Do a part of the demo, and print its line with the time that it took."""
    with Steps(title, unit) as steps:
        result = work(steps)
        seconds = steps.seconds
    print(f"  {title + ' ':.<68} {clock_text(seconds):>8}", flush=True)
    return result


def make_scenes(out: Path, config: DemoConfig, progress: Steps) -> Path:
    """Write the scenes and their CSV, which comes last: where it is, all is there."""
    from gigaxt.datasets.legend import write_scene

    folder, csv = out / "data", out / "data/scenes.csv"
    if csv.exists():
        return csv
    large_path(out, "scene", 0).parent.mkdir(exist_ok=True)
    for number in range(config.kinds):
        files = write_scene(scene_config(config, config.large_px), LARGE + number, folder)
        files.image.replace(large_path(out, "scene", number))
        files.mask.replace(large_path(out, "target", number))
    splits = ["train"] * config.train_scenes + ["val"] * config.test_scenes
    lines = ["image,mask,split"]
    for index, split in enumerate(splits):
        size = config.train_px if split == "train" else config.test_px
        files = write_scene(scene_config(config, size), index, folder)
        lines.append(f"{files.image.relative_to(folder)},{files.mask.relative_to(folder)},{split}")
        progress(index + 1, len(splits))
    with replaced_file(csv) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return csv


def scene_config(config: DemoConfig, size_px: int) -> LegendConfig:
    """Scenes of one size: easier to tell apart than the data set's own settings, so that minutes are enough."""
    from gigaxt.datasets.legend import LegendConfig

    return LegendConfig(
        rule="beacon",
        size_px=(size_px, size_px),
        kinds=config.kinds,
        mark_px=48,
        density=120.0,
        distance=0.2,
        contrast=0.8,
        texture=0.1,
        noise=0.03,
        rotation_deg=10.0,
        seed=config.seed,
    )


def train_run(csv: Path, config: DemoConfig, name: str, out: Path, progress: Steps) -> RunResult:
    """Train one of the two models with the real loop, or what is missing of it."""
    from rich.console import Console

    from gigaxt.training import run_config, train

    settings = run_config(run_settings(csv, config, "mamba2" if name == "with context" else "none"))
    # The loop's own lines are in the run's log.txt.
    return train(settings, out, console=Console(file=io.StringIO()), on_step=progress)


def run_settings(csv: Path, config: DemoConfig, context: str) -> dict[str, Any]:
    """What would stand in the run's YAML file."""
    from gigaxt.datasets.glyphs import KINDS

    return {
        "data": {"csv": str(csv)},
        "model": {
            "region_encoder": {
                "name": "convnext_atto",
                "region": REGION,
                "options": {"depths": [1, 1, 2, 1], "dims": list(config.dims)},
            },
            "context": {"kind": context, "dim": config.dims[-1], "depth": 1, "summary": 16},
            "head": {
                "kind": "segment",
                "classes": config.kinds + 1,
                "dim": 24,
                # Glyphs are a fiftieth of the pixels: the background's edge would drown their kind.
                "class_weights": [0.05] + [1.0] * config.kinds,
                "class_names": ["background", *KINDS[: config.kinds]],
            },
            "input": {"mean": [115.0] * 3, "std": [30.0] * 3},
        },
        "train": {
            "epochs": config.epochs,
            "batch": config.batch,
            "lr": config.lr,
            "augment": {"dihedral": True},
            "seed": config.seed,
            "streaming": {"budget_gib": 2.0, "chunk_regions": 64},
            "eval_every": config.epochs,
        },
    }


def map_large(out: Path, config: DemoConfig, name: str, progress: Steps) -> NDArray[np.float64]:
    """Write one model's masks of the large scenes; their confusion with the true ones."""
    from gigaxt.image import open_image
    from gigaxt.inference import predict
    from gigaxt.pretrained import load

    model = load(out / RUNS[name] / "model")
    model.streaming = replace(model.streaming, chunk_regions=64)
    counts = np.zeros((config.kinds + 1, config.kinds + 1))
    for number in range(config.kinds):

        def told(done: int, count: int, before: int = number) -> None:
            progress(before * count + done, config.kinds * count)

        answer = predict(model, large_path(out, "scene", number), large_path(out, name, number), progress=told)
        counts += confusion(open_image(large_path(out, "target", number)), open_image(answer), len(counts))
    return counts


def large_path(out: Path, what: str, number: int) -> Path:
    """A large scene (`scene`), its `target`, or one of the models' masks of it."""
    return out / "large" / f"{RUNS.get(what, what)}_{number + 1}.tif"


def confusion(target: Image, answer: Image, classes: int) -> NDArray[np.float64]:
    """Pixel counts (classes, classes) with the true class as row."""
    true, given = (image.read(0, 0, image.width, image.height)[..., 0].astype(np.int64) for image in (target, answer))
    counts = np.bincount((true * classes + given).ravel(), minlength=classes**2)
    return counts.reshape(classes, classes).astype(np.float64)


def tested(result: RunResult) -> NDArray[np.float64]:
    """The confusion of a run's best model on the test scenes."""
    assert result.best is not None
    assert result.best.confusion is not None
    return np.asarray(result.best.confusion)


def kinds_iou(confusion: NDArray[np.float64]) -> float:
    """Mean IoU over the kinds that occur, on the pixels of glyphs: what is asked is which kind, not where its edge is.

    Args:
        confusion: (1 + kinds, 1 + kinds) pixel counts, true class as row, 0 the background.
    """
    glyphs = confusion[1:]  # (kinds, 1 + kinds): true glyph pixels
    right, true, answered = glyphs[:, 1:].diagonal(), glyphs.sum(axis=1), glyphs[:, 1:].sum(axis=0)
    occurs = true > 0
    return float((right[occurs] / (true + answered - right)[occurs]).mean())


def score_table(config: DemoConfig, scores: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """Header and rows of what the terminal and the report show."""
    header = ["mean IoU of the kinds, on glyphs", f"{config.test_scenes} test scenes", f"{config.kinds} large scenes"]
    chance = 1 / (2 * config.kinds - 1)  # of who names k kinds that are alike in number at random
    guess = ("guessing", (chance, chance))
    return [header, *([name, *(f"{value:.2f}" for value in values)] for name, values in [*scores.items(), guess])]


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows as lines: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  " + "    ".join(cells))
    return "\n".join(lines)


def next_commands(out: Path) -> str:
    """What to try next."""
    scene, run = shlex.quote(str(large_path(out, "scene", 0))), shlex.quote(str(out / RUNS["with context"]))
    return f"""  gigaxt predict {run} {scene} --out mask.tif
  gigaxt check your.csv --write run.yaml      # your images: columns image,mask or image,label
  gigaxt train --config run.yaml --out runs/first
  gigaxt predict runs/first scene.tif --out answer.tif"""
