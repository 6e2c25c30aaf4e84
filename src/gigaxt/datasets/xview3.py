"""xView3-SAR: its folders to a manifest, its labels to places on Earth, detections to a submission.

The layout, whose folders and label files may also stand in `images/` and `labels/`:

    ROOT/{train,validation,public}/SCENE/VV_dB.tif, VH_dB.tif, ...
    ROOT/{train,validation,public}.csv
    ROOT/shoreline/{train,validation,public}/SCENE_shoreline.npy
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gigaxt.datasets.split import divide
from gigaxt.errors import DataError
from gigaxt.found.objects import Objects
from gigaxt.image.part_file import PartFile
from gigaxt.image.xview3 import is_scene
from gigaxt.metrics.tables import Table

PARTS = ("train", "validation", "public")
SUBMISSION = ("scene_id", "detect_scene_row", "detect_scene_column", "is_vessel", "is_fishing", "vessel_length_m")
COLUMNS = ("image", "points", "scene_id", "shoreline", "group", "split")
VAL_SHARE = 0.15


def scene_id(image: str | Path) -> str:
    """The id of a scene: the name of its folder."""
    return Path(image).name


def write_manifest(
    root: Path,
    out: Path,
    *,
    learn: Sequence[str] = ("validation",),
    test: str = "public",
    locations: Path | None = None,
) -> dict[str, int]:
    """Write the CSV that check, train, eval and predict take.

    Scenes that overlap are of one `group`, by the boxes around their labels' coordinates, so that the same coast is
    never in `train` and in `val`, 15% of the scenes. The challenge's own parts do share places: the groups of its test
    are counted apart.

    Args:
        root: the folder with the data.
        out: the CSV to write.
        learn: parts to train and validate on. The labels of `train` are incomplete: the best teams left it out.
        test: the part that is `test`, where it is there.
        locations: a CSV with columns `scene_id` and `location`, which then are the groups.

    Returns:
        `train`, `val`, `test`: how many scenes; `groups`; `objects`; `empty`, how many scenes have none; `elsewhere`,
        how many label lines are of scenes that are not there; `shorelines`, how many scenes have one.

    Raises:
        DataError: no scenes, no labels, labels of other scenes alone, or a label file that cannot be read.
        ImageError: `out` cannot be written.
    """
    rows: list[dict[str, str]] = []
    boxes: dict[str, NDArray[np.float64]] = {}
    objects: Counter[str] = Counter()
    for part in dict.fromkeys((*learn, test)):
        folder = _first(root / part, root / "images" / part)
        if folder is None:
            if part == test:
                continue
            raise DataError(f"{root}: expected a folder {part}/ or images/{part}/ with scenes, got none")
        labels = _first(root / f"{part}.csv", root / "labels" / f"{part}.csv")
        if labels is None:
            raise DataError(f"{root}: expected labels {part}.csv or labels/{part}.csv, got none")
        table = Table(labels, str(labels))
        boxes |= _boxes(table)
        objects.update(table.words("scene_id"))
        rows += _rows_of(part, root, folder, labels, table, out)
    if not rows:
        raise DataError(f"{root}: expected folders of scenes with VV_dB.tif and VH_dB.tif, got none")
    groups = _named(locations, [row["scene_id"] for row in rows]) if locations else _overlapping(rows, boxes)
    splits = _splits(rows, groups, test)
    for row, group, split in zip(rows, groups, splits, strict=True):
        row |= {"group": f"test {group}" if split == "test" else group, "split": split}
    _write(out, rows)
    counts = {split: splits.count(split) for split in ("train", "val", "test")}
    here = [objects[row["scene_id"]] for row in rows]
    return {
        **counts,
        "groups": len(set(groups)),
        "objects": sum(here),
        "empty": here.count(0),
        "elsewhere": objects.total() - sum(here),
        "shorelines": sum(bool(row["shoreline"]) for row in rows),
    }


def submission_columns(objects: Objects, scene: str) -> dict[str, list[Any]]:
    """The columns of a submission, from decided objects in px of their scene."""
    cells = np.floor(objects.places).astype(int)
    return {
        "scene_id": [scene] * len(objects),
        "detect_scene_row": cells[:, 0].tolist(),
        "detect_scene_column": cells[:, 1].tolist(),
        "is_vessel": [bool(flag) for flag in objects.attributes["is_vessel"]],
        "is_fishing": [bool(flag) for flag in objects.attributes["is_fishing"]],
        "vessel_length_m": [round(float(length), 2) for length in objects.attributes["vessel_length_m"]],
    }


def write_submission(path: str | Path, found: Iterable[tuple[str, Objects]]) -> Path:
    """Write the CSV of the challenge; until it is complete it has another name.

    Args:
        path: of the CSV.
        found: scene ids, each with its decided objects in px of the scene.

    Raises:
        ImageError: it cannot be written; an older one stays.
    """
    file = PartFile(Path(path))
    try:
        file.append((",".join(SUBMISSION) + "\n").encode())
        for scene, objects in found:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(
                zip(*submission_columns(objects, scene).values(), strict=True)
            )
            file.append(text.getvalue().encode())
        file.commit()
    finally:
        file.discard()
    return Path(path)


def _boxes(table: Table) -> dict[str, NDArray[np.float64]]:
    """South, west, north, east of the labels of each scene."""
    words = np.array(table.words("scene_id"))
    places = np.stack([table.numbers("detect_lat"), table.numbers("detect_lon")], axis=1)
    found = {}
    for scene in np.unique(words):
        own = places[(words == scene) & np.isfinite(places).all(axis=1)]
        if len(own):
            found[str(scene)] = np.concatenate([own.min(axis=0), own.max(axis=0)])
    return found


def _overlapping(rows: Sequence[Mapping[str, str]], boxes: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """Groups of scenes whose boxes overlap, called after their first scene; a scene without labels is its own."""
    names = [row["scene_id"] for row in rows]
    nowhere = np.array([np.inf, np.inf, -np.inf, -np.inf])
    box = np.array([boxes.get(name, nowhere) for name in names])
    low, high = np.maximum(box[:, None, :2], box[None, :, :2]), np.minimum(box[:, None, 2:], box[None, :, 2:])
    first, second = np.nonzero((low <= high).all(axis=2))
    _, label = connected_components(coo_array((np.ones(len(first)), (first, second)), shape=(len(names),) * 2))
    return [names[int(np.flatnonzero(label == group)[0])] for group in label]


def _named(path: Path, scenes: Sequence[str]) -> list[str]:
    table = Table(path, str(path))
    location = dict(zip(table.words("scene_id"), table.words("location"), strict=True))
    missing = [scene for scene in scenes if not location.get(scene)]
    if missing:
        raise DataError(f"{path}: expected a location for each scene, got none for {missing[0]}")
    return [location[scene] for scene in scenes]


def _splits(rows: Sequence[Mapping[str, str]], groups: Sequence[str], test: str) -> list[str]:
    learnt = [(f"group {group}", "") for row, group in zip(rows, groups, strict=True) if row["part"] != test]
    if len({unit for unit, _ in learnt}) > 1:
        parts = iter(divide(learnt, 0, {"train": 1 - VAL_SHARE, "val": VAL_SHARE}))
    else:
        parts = iter(["train"] * len(learnt))
    return ["test" if row["part"] == test else next(parts) for row in rows]


def _write(out: Path, rows: Sequence[Mapping[str, str]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    file = PartFile(out)
    try:
        file.append(text.getvalue().encode())
        file.commit()
    finally:
        file.discard()


def _rows_of(part: str, root: Path, folder: Path, labels: Path, table: Table, out: Path) -> list[dict[str, str]]:
    """A row for each scene of a part, whose scenes are in `folder` and whose labels are `table`, read from `labels`.

    Raises:
        DataError: the labels are of other scenes alone.
    """
    scenes = sorted(path for path in folder.iterdir() if path.is_dir() and is_scene(path))
    words = table.words("scene_id")
    if scenes and words and not {scene.name for scene in scenes}.intersection(words):
        raise DataError(
            f"{labels}: expected labels of the scenes in {folder}, such as {scenes[0].name}, got those of {words[0]}"
        )
    rows = []
    for scene in scenes:
        shore = _first(*(root / "shoreline" / sub / f"{scene.name}_shoreline.npy" for sub in (part, ".")))
        rows.append(
            {
                "image": _relative(scene, out),
                "points": _relative(labels, out),
                "scene_id": scene.name,
                "shoreline": "" if shore is None else _relative(shore, out),
                "part": part,
            }
        )
    return rows


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _relative(path: Path, out: Path) -> str:
    return Path(relpath(path.resolve(), out.resolve().parent)).as_posix()
