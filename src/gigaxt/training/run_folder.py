"""The folder of a run: its files, and the settings that a run gets from its data before it starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import yaml

from gigaxt.config import to_dict
from gigaxt.datasets.labels import LABEL
from gigaxt.datasets.manifest import Manifest
from gigaxt.errors import CheckpointError, ConfigError, one_line
from gigaxt.nn.heads import ClassifyConfig, PointsConfig, SegmentConfig
from gigaxt.nn.heads.base import ObjectsConfig
from gigaxt.replaced_file import replaced_file
from gigaxt.tasks import Detection, Task, fitted, fitted_numbers, fitted_points, make_task, read_manifest
from gigaxt.training.checkpoint import checkpoints, recover_folder
from gigaxt.training.config import RunConfig, differences, read_yaml, run_config
from gigaxt.training.device import check_budgets, pick_device


class RunFolder:
    """Names in a run folder.

        config.yaml   checkpoints/   model/   metrics.csv   tensorboard/   log.txt   report.html

    Args:
        path: the folder.
        rows_digest: of the manifest's training and validation rows; a run continues with the same ones only.
    """

    def __init__(self, path: Path, rows_digest: str = "") -> None:
        self.path, self.rows_digest = path, rows_digest
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.metrics = path / "metrics.csv"
        self.report = path / "report.html"


def prepare_run(config: RunConfig, out: Path) -> tuple[RunFolder, RunConfig, Task]:
    """Make or check the run folder, and fill what the data decides into the config: class names and weights.

    Raises:
        ConfigError: `out` is no run folder, or one of a run with other settings; a budget beyond the machine.
        DataError: the manifest does not fit; files are missing and `on_bad_image` is `stop`.
        CheckpointError: the folder cannot be written.
    """
    check_budgets(config.train.streaming, pick_device(config.train.device), config.model.context)
    data = config.data
    manifest = read_manifest(config.model.head, data.csv, split_seed=data.split_seed, fold=data.part)
    if config.train.on_bad_image == "stop":
        manifest.check_files()
    folder = RunFolder(out, rows_digest(manifest))
    stored = run_config(read_yaml(folder.config)) if folder.config.exists() else None
    if stored is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: expected a new folder or one of a run (with config.yaml); use another --out")
    config = _resolved(config, manifest, stored)
    task = make_task(config.model.head, manifest)
    if stored is not None and checkpoints(folder.checkpoints):
        changed = differences(to_dict(stored), to_dict(config))
        if changed:
            raise ConfigError(
                f"{out} holds a run with other settings: {'; '.join(changed[:3])}; use these, or another --out"
            )
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        recover_folder(folder.model)
        with replaced_file(folder.config) as part:
            part.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{out}: cannot write the run folder: {one_line(error)}") from error
    return folder, config, task


def rows_digest(manifest: Manifest) -> str:
    """A digest of the rows that training sees; the folder of the CSV does not count, so that data may be moved."""
    base = manifest.path.parent
    rows = [
        [
            *(str(path and _relative(path, base)) for path in (row.image, row.target_path)),
            *([row.label] if manifest.answer_columns == LABEL else row.answer.numbers),
            row.split,
            *([row.case] if row.case else []),
            *([str(_relative(row.aoi, base))] if row.aoi else []),
        ]
        for row in manifest.rows
        if row.split in ("train", "val")
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def trained_rows(run: Path) -> str | None:
    """The `rows_digest` of the data of a run; None where it has no checkpoint that says so."""
    try:
        newest = checkpoints(run / "checkpoints")[-1]
        return str(json.loads((newest / "state.json").read_text(encoding="utf-8"))["state"]["rows"])
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None


def _relative(path: Path, base: Path) -> Path:
    return path.relative_to(base) if path.is_relative_to(base) else path


def _resolved(config: RunConfig, manifest: Manifest, stored: RunConfig | None) -> RunConfig:
    """The config with what its head has from the data: class names, units or bins, and, where asked, class weights."""
    head = config.model.head
    if isinstance(head, ClassifyConfig):
        head = fitted(head, manifest)
    elif isinstance(head, PointsConfig):
        head = fitted_points(head, manifest)
    elif isinstance(head, SegmentConfig):
        head = _in_units(head, manifest, stored)
    task = make_task(head, manifest)
    if head.class_names is None:
        head = replace(head, class_names=list(task.class_names))
    if isinstance(task, Detection) and isinstance(head, ObjectsConfig) and head.category_ids is None:
        ids = task.classes.ids
        head = replace(head, category_ids=None if ids is None else list(ids))
    if config.train.class_weights == "balanced":
        if head.class_weights is not None and (stored is None or stored.model.head.class_weights != head.class_weights):
            raise ConfigError("train.class_weights and model.head.class_weights are both set; remove one")
        if stored is not None and stored.train.class_weights == "balanced":
            weights = stored.model.head.class_weights  # counting pixels takes a while, and was done
        else:
            weights = balanced(task.class_counts("train"))
        head = replace(head, class_weights=weights)
    csv = str(Path(config.data.csv).resolve())
    cache = None if config.data.cache is None else str(Path(config.data.cache).resolve())
    if config.train.token_cache is not None:
        config = replace(config, train=replace(config.train, token_cache=str(Path(config.train.token_cache).resolve())))
    return replace(config, data=replace(config.data, csv=csv, cache=cache), model=replace(config.model, head=head))


def _in_units(head: SegmentConfig, manifest: Manifest, stored: RunConfig | None) -> SegmentConfig:
    """The head with the unit of its numbers, which takes a while to find and is found once."""
    known = None if stored is None else stored.model.head
    if isinstance(known, SegmentConfig) and head.target_mean is None and known.target == head.target:
        return replace(head, target_mean=known.target_mean, target_std=known.target_std)
    return fitted_numbers(head, manifest)


def balanced(counts: list[float]) -> list[float]:
    """Class weights: all counts / (classes * count), so that they average to 1 over the data; 1 for absent classes."""
    present = [count for count in counts if count]
    return [sum(counts) / (len(present) * count) if count else 1.0 for count in counts]
