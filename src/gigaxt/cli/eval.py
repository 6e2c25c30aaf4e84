"""`gigaxt eval`: score a model or a run on the images of a CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.tasks import Evaluation


@dataclass(kw_only=True)
class EvalArguments:
    """Score a model on the images of a CSV: gigaxt eval runs/a data.csv --split test."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, or of a run (its best model)."""
    csv: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CSV")]
    """The manifest."""
    split: Literal["train", "val", "test", "all"] = "val"
    """Which rows."""
    split_seed: int | None = None
    """Divides a CSV without a `split` column; None: as the run did (0 for a model alone)."""
    json: Path | None = None
    """Also write the scores to this file."""
    batch: int = 4
    """Images at once, for classification."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: CUDA where there is one."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 autocast; auto: on CUDA devices that have it."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read does."""


def main(args: Sequence[str]) -> int:
    """Evaluate and print tables; exit status 0."""
    arguments = parse(EvalArguments, args, verb="eval")

    from gigaxt.pretrained import load
    from gigaxt.tasks import make_task, read_manifest
    from gigaxt.training.data import Samples
    from gigaxt.training.device import autocast, pick_device
    from gigaxt.training.evaluate import evaluate

    folder, split_seed = find_model(arguments.model)
    if arguments.split_seed is not None:
        split_seed = arguments.split_seed
    device = pick_device(arguments.device)
    model = load(folder).to(device)
    manifest = read_manifest(model.config.head, arguments.csv, split_seed=split_seed)
    task = make_task(model.config.head, manifest)
    rows = manifest.rows if arguments.split == "all" else manifest.split(arguments.split)
    if not rows:
        raise ConfigError(f"{arguments.csv}: no row is in the split `{arguments.split}`; try --split all")
    samples = Samples(rows, task)
    skipped: dict[str, str] | None = {} if arguments.on_bad_image == "skip" else None
    with autocast(device, arguments.amp):
        result = evaluate(model, samples, task, batch=arguments.batch, skipped=skipped)
    print_tables(result, title=f"{arguments.csv}, {arguments.split}: {result.images} images")
    for reason in (skipped or {}).values():
        print(f"skipped: {reason}")
    if arguments.json is not None:
        write_json(arguments.json, {**asdict(result), "skipped": skipped or {}})
    return 0


def find_model(path: Path) -> tuple[Path, int]:
    """The model folder in `path`, and the seed that divided the run's data.

    Raises:
        ConfigError: `path` is neither a model nor a run.
    """
    if (path / "config.json").exists():
        return path, 0
    if (path / "config.yaml").exists():
        if not (path / "model" / "config.json").exists():
            raise ConfigError(f"{path}: the run has no model yet; wait for its first evaluation")
        from gigaxt.training.config import read_yaml

        return path / "model", int(read_yaml(path / "config.yaml")["data"].get("split_seed", 0))
    raise ConfigError(f"{path}: expected the folder of a model (with config.json) or of a run (with config.yaml)")


def print_tables(result: Evaluation, title: str) -> None:
    """Scores of the whole split, then of each class."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in {"loss": result.loss, **result.metrics}.items():
        table.add_row(name, _number(value))
    console.print(table)
    if result.per_class:
        table = Table()
        table.add_column("class")
        for name in next(iter(result.per_class.values())):
            table.add_column(name, justify="right")
        for name, values in result.per_class.items():
            table.add_row(name, *map(_number, values.values()))
        console.print(table)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data as JSON, NaN as null.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(_without_nan(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot write: {error.strerror or error}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4f}"
