"""Points of images from CSV and GeoJSON: places, classes, attributes, each file one image or many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import nearest
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.metrics.tables import Table
from gigaxt.nn.heads.points import PointsConfig
from gigaxt.shapes.projection import geojson_to_px, to_px
from gigaxt.targets.points import UNKNOWN, PointTarget

Frame = str
"""`index`: whole numbers are pixel centres; `px` from the upper left corner; `map`: the CRS of the image; or a CRS. Of
GeoJSON `geojson:` and the CRS that it names, if any."""
GEOJSON = "geojson:"
LON_LAT = "EPSG:4326"
PLACES: dict[tuple[str, str], Frame] = {
    ("row", "col"): "index",
    ("row", "column"): "index",
    ("detect_scene_row", "detect_scene_column"): "index",
    ("y", "x"): "px",
    ("map_y", "map_x"): "map",
    ("lat", "lon"): LON_LAT,
    ("latitude", "longitude"): LON_LAT,
}
"""Columns with places, the first that a file has count, and what they are in."""
SHORE_KM = 2.0
LOW = "LOW"
"""`confidence` of objects in xView3-SAR that are not scored."""


class Spec(NamedTuple):
    """Which columns are read; hashable."""

    class_column: str
    class_names: tuple[str, ...] | None
    flags: tuple[str, ...]
    numbers: tuple[str, ...]
    logarithmic: tuple[str, ...]
    low_confidence: str

    @classmethod
    def of(cls, head: PointsConfig) -> Spec:
        """Those that a head asks for; classes of one class have no column."""
        names = None if head.classes == 1 else tuple(head.class_names or ())
        low = head.low_confidence if head.scoring == "xview3" else "object"
        flags, numbers, logarithmic = (
            tuple(name.lower() for name in columns) for columns in (head.flags, head.numbers, head.logarithmic)
        )
        return cls(head.class_column.lower(), names, flags, numbers, logarithmic, low)


@dataclass(frozen=True)
class PointTable:
    """All points of a file, as they stand in it."""

    table: Table
    name_column: str | None
    """That says of which image a row is; None: all are of one."""
    rows_of: Mapping[str, NDArray[np.intp]]
    """The rows of each name in it."""
    places: NDArray[np.float64]
    """(n, 2) as (row, col) or (y, x)."""
    frame: Frame
    classes: list[str]
    """As written, empty where not known; none where they are not asked for."""
    attributes: NDArray[np.float64]
    """(n, k), NaN where not known."""
    ignored: NDArray[np.bool_]
    weights: NDArray[np.float64]
    """How often windows are drawn around each, see `_shore_weights`."""
    background: NDArray[np.bool_]
    """Objects that are left out, as if they were not there."""


def row_points(manifest: Manifest, row: Row, image: Image, spec: Spec) -> PointTarget:
    """The points of a row's image, none where its file has points of other rows' images alone; see `read_points`."""
    assert row.target_path is not None, "a manifest of points has no labels"
    of_file = (other for other in manifest.rows if other.target_path == row.target_path)
    listed = (name for other in of_file for name in (other.cells.get("scene_id"), other.image.name) if name)
    return read_points(row.target_path, spec, image, row.cells.get("scene_id") or None, listed)


def read_points(
    path: Path, spec: Spec, image: Image, scene: str | None = None, listed: Iterable[str] = ()
) -> PointTarget:
    """The points of one image.

    Args:
        path: CSV or GeoJSON; its places are in one of `PLACES`.
        spec: which columns.
        image: that they lie on.
        scene: of a CSV with a column `scene_id`, which rows count; None: those of the image's file or folder
            name, as of a CSV with a column `image`.
        listed: all scenes or images that the file may be about; looked at where no row is of this image.

    Raises:
        DataError: a column is missing, a cell does not fit (with its line), points outside of the image, or a file with
            rows of which none is of this image and some are of one that is not listed.
    """
    found = _current(path, spec)
    rows = _rows_of(found, image, scene, listed)
    rows = rows[~found.background[rows]]
    target = PointTarget(
        _in_px(found.places[rows], found.frame, image, str(path)),
        _indices(found, rows, spec),
        found.attributes[rows],
        found.ignored[rows],
        weights=found.weights[rows],
        name=str(path),
    )
    target.check(image)
    return target


def class_words(path: Path, spec: Spec) -> set[str]:
    """The classes that occur in a file."""
    return {word for word in _current(path, spec).classes if word}


def columns_of(path: Path) -> list[str]:
    """The names of a file's columns, in lower case; of GeoJSON its properties."""
    return _current(path, Spec("", None, (), (), (), "object")).table.columns


def table_of(path: Path, spec: Spec) -> Table:
    """All columns of a file that was read for points, with names in lower case."""
    return _current(path, spec).table


def _rows_of(found: PointTable, image: Image, scene: str | None, listed: Iterable[str]) -> NDArray[np.intp]:
    """Which rows are of an image; see `read_points`."""
    if found.name_column is None:
        return np.arange(len(found.table))
    own = Path(image.name).name
    wanted = scene or own if found.name_column == "scene_id" else own
    if wanted in found.rows_of:
        return found.rows_of[wanted]
    stray = sorted(set(found.rows_of).difference(listed))
    if stray:  # which may be this image under another name
        raise DataError(
            f"{found.table.name}: none of its {len(found.table)} points has the {found.name_column} {wanted!r} of "
            f"{image.name}, and some have {stray[0]!r}, which no row of the manifest has; correct one of them, or give "
            "an image without points a file without lines"
        )
    return np.empty(0, np.intp)


def _by_name(table: Table) -> tuple[str | None, dict[str, NDArray[np.intp]]]:
    """The column that says of which scene or image a row is, and the rows of each."""
    column = next((name for name in ("scene_id", "image") if name in table), None)
    rows: dict[str, list[int]] = {}
    for row, word in enumerate([] if column is None else table.words(column)):
        rows.setdefault(word if column == "scene_id" else Path(word).name, []).append(row)
    return column, {name: np.array(own, np.intp) for name, own in rows.items()}


def _current(path: Path, spec: Spec) -> PointTable:
    return _read(path, path.stat().st_mtime_ns if path.exists() else 0, spec)


@lru_cache(maxsize=16)
def _read(path: Path, changed: int, spec: Spec) -> PointTable:
    geojson = path.suffix.lower() in (".geojson", ".json")
    table, frame, columns = _geojson(path) if geojson else _csv(path)
    places = np.stack([table.numbers(column) for column in columns], axis=1)
    broken = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if len(broken):
        raise DataError(
            f"{table.row(broken[0])}: expected a place in columns `{columns[0]}` and `{columns[1]}`, got "
            f"{places[broken[0], 0]} and {places[broken[0], 1]}"
        )
    attributes = [np.where(flag < 0, np.nan, flag) for flag in (table.flags(name) for name in spec.flags)]
    attributes += [_number(table, name, positive=name in spec.logarithmic) for name in spec.numbers]
    low = np.zeros(len(table), np.bool_)
    if spec.low_confidence != "object" and "confidence" in table:
        low = np.array([word == LOW for word in table.words("confidence")], np.bool_)
    ignored = table.flags("ignored") == 1 if "ignored" in table else np.zeros(len(table), np.bool_)
    return PointTable(
        table,
        *_by_name(table),
        places,
        frame,
        [] if spec.class_names is None else table.words(spec.class_column),
        np.stack(attributes, axis=1) if attributes else np.zeros((len(table), 0)),
        ignored | (low & (spec.low_confidence == "ignore")),
        _shore_weights(table),
        low & (spec.low_confidence == "background"),
    )


def _shore_weights(table: Table) -> NDArray[np.float64]:
    """Half of all windows around objects near the shore, where xView3-SAR is scored apart; other files: all equal."""
    if "distance_from_shore_km" not in table:
        return np.ones(len(table))
    near = table.numbers("distance_from_shore_km") <= SHORE_KM
    return np.where(near, 0.5 / max(int(near.sum()), 1), 0.5 / max(int((~near).sum()), 1))


def _number(table: Table, name: str, *, positive: bool) -> NDArray[np.float64]:
    values = table.numbers(name)
    broken = np.flatnonzero(np.isinf(values) | ((values <= 0) if positive else np.zeros(len(values), np.bool_)))
    if len(broken):
        raise DataError(
            f"{table.row(broken[0])}: expected a {'number above 0' if positive else 'finite number'} in column "
            f"`{name}`, got {values[broken[0]]:g}; leave it empty where it is not known"
        )
    return values


def _csv(path: Path) -> tuple[Table, Frame, tuple[str, str]]:
    table = Table(path, str(path))
    for columns, frame in PLACES.items():
        if all(column in table for column in columns):
            return table, frame, columns
    known = "; ".join(f"{a}, {b}" for a, b in PLACES)
    raise DataError(f"{path}: expected columns with places, one of: {known}; got {', '.join(table.columns)}")


def _geojson(path: Path) -> tuple[Table, Frame, tuple[str, str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected GeoJSON, got {error}") from error
    features = data.get("features") if isinstance(data, dict) else data
    if not isinstance(features, list):
        raise DataError(f"{path}: expected a GeoJSON FeatureCollection of points")
    lines: list[dict[str, Any]] = []
    for number, feature in enumerate(features, start=1):
        geometry = feature.get("geometry") if isinstance(feature, Mapping) else None
        kind = geometry.get("type") if isinstance(geometry, Mapping) else None
        if not isinstance(geometry, Mapping) or kind not in ("Point", "MultiPoint"):
            raise DataError(f"{path} feature {number}: expected a Point or MultiPoint, got {kind}")
        places = [geometry["coordinates"]] if kind == "Point" else geometry["coordinates"]
        properties = {str(key).lower(): value for key, value in (feature.get("properties") or {}).items()}
        nested = properties.get("classification")
        if isinstance(nested, Mapping):  # as QuPath writes it
            properties.setdefault("class", nested.get("name"))
        lines += [{**properties, "y": place[1], "x": place[0]} for place in places]
    names = sorted({name for line in lines for name in line} | {"y", "x"})
    table = Table({name: [line.get(name) for line in lines] for name in names}, str(path))
    crs = data.get("crs") if isinstance(data, dict) else None
    named = crs.get("properties", {}).get("name") if isinstance(crs, Mapping) else crs
    return table, GEOJSON + ("" if named is None else str(named)), ("y", "x")


def _indices(found: PointTable, rows: NDArray[np.intp], spec: Spec) -> NDArray[np.int64]:
    if spec.class_names is None:
        return np.zeros(len(rows), np.int64)
    numbers = {name: i for i, name in enumerate(spec.class_names)} | {"": UNKNOWN}
    for row in rows:
        if found.classes[row] not in numbers:
            raise DataError(
                f"{found.table.row(row)}: no class {found.classes[row]!r} in column `{spec.class_column}`"
                f"{nearest(found.classes[row], spec.class_names)}"
            )
    return np.array([numbers[found.classes[row]] for row in rows], np.int64)


def _in_px(places: NDArray[np.float64], frame: Frame, image: Image, name: str) -> NDArray[np.float64]:
    """Places as (row, col) in px from the upper left corner of the image."""
    placed = image.crs is not None and image.transform is not None
    if frame == "index":
        return places + 0.5
    if frame == "px":
        return places
    at = places[:, ::-1]  # (n, 2) as x, y
    if frame.startswith(GEOJSON):
        return geojson_to_px(frame.removeprefix(GEOJSON) or None, at, image, name)(at)[:, ::-1]
    if not placed:
        raise DataError(f"{name}: places are in {frame}, but {image.name} has no CRS and transform to place them by")
    assert image.crs is not None
    return to_px(image.crs if frame == "map" else frame, image, name)(at)[:, ::-1]


def known_numbers(paths: Sequence[Path], spec: Spec) -> NDArray[np.float64]:
    """The numbers of all points of some files, as they are learnt: (n, numbers), NaN where not known."""
    columns = [_current(path, spec).attributes[:, len(spec.flags) :] for path in paths]
    values = np.concatenate(columns) if columns else np.zeros((0, len(spec.numbers)))
    which = [name in spec.logarithmic for name in spec.numbers]
    values[:, which] = np.log(values[:, which])
    return values
