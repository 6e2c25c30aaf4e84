"""`gigaxt eval`: score a model, a run or folds on the images of a CSV, or predictions in a file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gigaxt.cli.flags import parse
from gigaxt.config import nearest
from gigaxt.datasets.split import Fold
from gigaxt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gigaxt.datasets.manifest import Manifest
    from gigaxt.tasks import Evaluation, Tally

ALL = 0
"""What `--folds` without a number means."""
FEW_CASES = 10
"""Smaller groups of `--by` are not scored."""


@dataclass(kw_only=True)
class EvalArguments:
    """Score a model on the images of a CSV, or COCO results against COCO JSON.

    $ gigaxt eval runs/a data.csv --split test
    $ gigaxt eval predictions.json truth.json --iou segm
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, of a run (its best model), or of folds (each on what it was not trained on); or a .json of
    COCO results."""
    csv: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CSV")]
    """The manifest; or the .json of COCO's truth."""
    split: Literal["train", "val", "test", "all"] = "val"
    """Which rows."""
    by: str | None = None
    """A column of the CSV: also score the cases of each of its values, such as each site."""
    folds: int | None = None
    """MODEL holds the runs of `gigaxt train --folds`; the number, which may be left out, is how many there must be."""
    split_seed: int | None = None
    """Divides a CSV without a `split` column; None: as the run did (0 for a model alone)."""
    iou: Literal["bbox", "segm"] = "bbox"
    """Of COCO results: compare boxes or masks."""
    categories: Literal["apart", "together"] = "apart"
    """Of COCO results: together takes all objects for one category."""
    max_dets: tuple[int, ...] = (1, 10, 100)
    """Of COCO results: how many of an image and category count, best first; raise it where there are more objects."""
    json: Path | None = None
    """Also write the scores to this file."""
    png: Path | None = None
    """Of a detector: draw the worst and the best images, with the boxes that are true and found, into this folder."""
    batch: int = 4
    """Images at once, for classification."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: CUDA where there is one."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 autocast; auto: on CUDA devices that have it."""
    budget_gib: float = 1.0
    """Memory for feature maps of regions that are else encoded twice: for masks, objects and points."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read does."""
    cache: Path | None = None
    """Folder on a fast disk for local copies of what is read of the images, where these lie on slow storage."""
    cache_gib: float = 50.0
    """Size of that folder, of which the least recently used copies make room."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model and how the data that it was trained on was divided."""

    folder: Path
    """Of the model."""
    split_seed: int = 0
    fold: Fold | None = None
    rows: str | None = None
    """Digest of the rows of its run, where that is known; see `gigaxt.training.run_folder.rows_digest`."""


def main(args: Sequence[str]) -> int:
    """Evaluate and print tables; exit status 0."""
    arguments = parse(EvalArguments, _with_fold_count(args), verb="eval")

    if arguments.model.suffix.lower() == ".json":
        if arguments.png is not None:
            raise ConfigError("--png: draws what a model finds; give the model, or use gigaxt predict --png")
        return score_files(arguments)

    from gigaxt.cli.progress import told_cache
    from gigaxt.training.folds import fold_folders

    folders = fold_folders(arguments.model)
    skipped: dict[str, str] | None = {} if arguments.on_bad_image == "skip" else None
    with told_cache(arguments.cache, arguments.cache_gib):
        if folders or arguments.folds is not None:
            _check_folds(arguments, len(folders))
            scores = _print_of_folds([_tally(find_model(folder), arguments, skipped) for folder in folders], arguments)
        else:
            scores = _print_of_model(_tally(find_model(arguments.model), arguments, skipped), arguments)
    for reason in (skipped or {}).values():
        print(f"skipped: {reason}")
    if arguments.json is not None:
        write_json(arguments.json, {**scores, "skipped": skipped or {}})
    return 0


def score_files(arguments: EvalArguments) -> int:
    """Print COCO's scores of results in a file; exit status 0."""
    from gigaxt.cli.tables import print_coco
    from gigaxt.metrics import coco_score

    apart, limits = arguments.categories == "apart", arguments.max_dets
    scores = coco_score(arguments.csv, arguments.model, iou=arguments.iou, max_dets=limits, use_categories=apart)
    print_coco(scores, f"{arguments.model} against {arguments.csv}, {arguments.iou}")
    if arguments.json is not None:
        write_json(arguments.json, dict(scores))
    return 0


def find_model(path: Path) -> Trained:
    """The model in `path`, and how its run's data was divided.

    Raises:
        ConfigError: `path` is neither a model nor a run.
    """
    if (path / "config.json").exists():
        return Trained(folder=path)
    if (path / "config.yaml").exists():
        if not (path / "model" / "config.json").exists():
            raise ConfigError(f"{path}: the run has no model yet; wait for its first evaluation")
        from gigaxt.config import from_dict
        from gigaxt.training.config import DataConfig, read_yaml
        from gigaxt.training.run_folder import trained_rows

        data = from_dict(DataConfig, read_yaml(path / "config.yaml")["data"], "data")
        rows = trained_rows(path)
        return Trained(folder=path / "model", split_seed=data.split_seed, fold=data.part, rows=rows)
    from gigaxt.training.folds import fold_folders

    hint = f"; it holds folds: choose one, such as {fold_folders(path)[0]}" if fold_folders(path) else ""
    raise ConfigError(f"{path}: expected the folder of a model (with config.json) or of a run (with config.yaml){hint}")


def draw_cases(result: Evaluation, folder: Path) -> None:
    """Draw the worst and the best images of a detector: worst_01_NAME.png, ..., best_01_NAME.png, ...

    Raises:
        ConfigError: a file cannot be written.
    """
    from gigaxt.draw import save_png, thumbnail, with_case
    from gigaxt.image import open_image

    for kind, cases in (("worst", result.worst), ("best", result.best_cases)):
        for number, case in enumerate(cases, start=1):
            image = open_image(case.image)
            picture = thumbnail(image)
            path = folder / f"{kind}_{number:02}_{Path(case.image).stem}.png"
            try:
                save_png(with_case(picture, case.boxes, picture.shape[1] / image.width), path)
            except OSError as error:
                raise ConfigError(f"--png {path}: cannot write: {error.strerror or error}") from error
            print(f"{path}: {case.caption}")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data as JSON, NaN as null.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(_without_nan(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot write: {error.strerror or error}") from error


def _tally(trained: Trained, arguments: EvalArguments, skipped: dict[str, str] | None) -> Tally:
    """The answers of a model to the rows that are asked for."""
    from gigaxt.pretrained import load
    from gigaxt.tasks import Detection, make_task, read_manifest
    from gigaxt.training.data import Samples
    from gigaxt.training.device import autocast, check_budgets, pick_device, precision_advice
    from gigaxt.training.evaluate import tallied

    device = pick_device(arguments.device)
    model = load(trained.folder).to(device)
    model.streaming = replace(model.streaming, budget_gib=arguments.budget_gib)
    check_budgets(model.streaming, device, flags=True)
    seed = trained.split_seed if arguments.split_seed is None else arguments.split_seed
    manifest = read_manifest(model.config.head, arguments.csv, split_seed=seed, fold=trained.fold)
    if trained.fold is not None and arguments.split != "test":
        _check_same_folds(trained, manifest)
    if arguments.by is not None:
        values_of(manifest, arguments.by)  # refused before hours of answering
    cases = manifest.cases(None if arguments.split == "all" else arguments.split)
    if not cases:
        raise ConfigError(f"{arguments.csv}: no row is in the split `{arguments.split}`; try --split all")
    task = make_task(model.config.head, manifest)
    if arguments.png is not None and not isinstance(task, Detection):
        raise ConfigError(
            f"--png: draws boxes, and the model's head is of kind {model.config.head.kind}; "
            "the report of a run and gigaxt predict --png draw others"
        )
    if slow := precision_advice(device, arguments.amp):
        print(slow, file=sys.stderr)
    with autocast(device, arguments.amp):
        return tallied(
            model, Samples(cases, task, rgb=model.config.input.rgb), task, batch=arguments.batch, skipped=skipped
        )


def _print_of_model(tally: Tally, arguments: EvalArguments) -> dict[str, Any]:
    """Print the scores of all cases, and of those of each value of `--by`; returns them as plain data."""
    from gigaxt.cli.tables import print_scores

    result = tally.compute()
    print_scores(result, f"{arguments.csv}, {arguments.split}: {result.size}")
    if arguments.png is not None:
        draw_cases(result, arguments.png)
    by = {} if arguments.by is None else {"by": _print_by(tally, arguments.by)}
    return {**asdict(result), **by}


def _print_of_folds(tallies: Sequence[Tally], arguments: EvalArguments) -> dict[str, Any]:
    """Print the scores of each fold and, where each case was answered once, of all together."""
    from gigaxt.cli.tables import print_folds
    from gigaxt.training.folds import spread

    spreads = spread([tally.compute() for tally in tallies])
    what = "each model on its own fold" if arguments.split == "val" else "each model on the same images"
    print_folds(spreads, f"{arguments.csv}, {arguments.split}, {what}")
    found: dict[str, Any] = {"folds": {name: asdict(values) for name, values in spreads.items()}}
    if arguments.split != "val":
        return found
    if len({tally.task.class_names for tally in tallies}) > 1:
        print("not pooled: each fold has bins of time of its own, so that risks cannot be compared across folds")
        return found
    return {**found, **_print_of_model(reduce(lambda a, b: a.merged(b), tallies), arguments)}


def _print_by(tally: Tally, column: str) -> dict[str, Any]:
    """Print a table for each value of a column of the CSV."""
    from gigaxt.cli.tables import print_scores

    column = column.strip().lower()
    values = values_of(tally.task.manifest, column)
    scores, not_scored = {}, {}
    for value in sorted({values[row.line] for row in tally.rows}, key=_as_number):
        name = f"{column} = {value or '(empty)'}"
        try:
            result = _of_value(tally, values, value)
        except DataError as error:
            not_scored[value] = str(error)
            print(f"{name}: not scored: {error}")
            continue
        print_scores(result, f"{name}: {result.size}", brief=True)
        scores[value] = asdict(result)
    return {"column": column, "values": scores, "not_scored": not_scored}


def _of_value(tally: Tally, values: Mapping[int, str], value: str) -> Evaluation:
    """Scores of the cases that have a value; a DataError where they are few, or none of their labels is known."""
    part = tally.select(lambda row: values[row.line] == value)
    if len(part.rows) < FEW_CASES:
        raise DataError(f"{len(part.rows)} of the {FEW_CASES} cases that a score needs at least")
    return part.compute()


def values_of(manifest: Manifest, column: str) -> dict[int, str]:
    """What a column of the CSV says of each case: line of its first row -> value.

    Raises:
        DataError: there is no such column, or the images of a case differ in it.
    """
    column = column.strip().lower()
    if column not in manifest.columns:
        raise DataError(f"{manifest.path}: column `{column}` is missing{nearest(column, manifest.columns)}")
    values = {}
    for first, *others in manifest.cases():
        values[first.line] = first.split if column == "split" else first.cells[column]  # folds have splits of their own
        for row in others:
            if row.cells[column] != first.cells[column]:
                raise DataError(
                    f"{manifest.path} lines {first.line} and {row.line}: case {row.case!r} has two values of "
                    f"`{column}`, {first.cells[column]!r} and {row.cells[column]!r}: it belongs to neither"
                )
    return values


def _with_fold_count(args: Sequence[str]) -> list[str]:
    """`--folds` alone means as many as there are, which the parser is told as `--folds 0`."""
    result = list(args)
    for i in reversed([i for i, arg in enumerate(result) if arg == "--folds"]):
        if not "".join(result[i + 1 : i + 2]).isdigit():
            result.insert(i + 1, str(ALL))
    return result


def _check_folds(arguments: EvalArguments, there: int) -> None:
    wanted = there if arguments.folds in (None, ALL) else arguments.folds
    if not there or there != wanted:
        raise ConfigError(
            f"{arguments.model}: expected {wanted or ''} folds (fold-1, fold-2, ... of `gigaxt train --folds`), "
            f"got {there or 'none'}"
        )
    if arguments.png is not None and arguments.split == "test":
        raise ConfigError("--png: on test each fold's model answers for all images; give one model, such as fold-1")
    if arguments.split not in ("val", "test"):
        raise ConfigError(f"--split {arguments.split}: models of folds are scored on val, each on its own, or on test")
    if arguments.by is not None and arguments.split == "test":
        raise ConfigError("--by: on test each fold's model answers for all images; give one model, such as fold-1")


def _check_same_folds(trained: Trained, manifest: Manifest) -> None:
    """Other rows are other folds, and a model would be scored on what it was trained on."""
    from gigaxt.training.run_folder import rows_digest

    if trained.rows is not None and trained.rows != rows_digest(manifest):
        raise ConfigError(
            f"{manifest.path}: expected the rows and the split seed that the folds of {trained.folder.parent} were "
            "made of, got others, which would be divided into other folds; use that CSV, or --split test"
        )


def _as_number(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
