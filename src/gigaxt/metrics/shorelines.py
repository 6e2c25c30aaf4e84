"""Shorelines as xView3 ships them: for each scene a list of contours, each a list of (row, col) points.

The official files are pickles in a `.npy`. They are read by an unpickler that builds arrays and nothing else, so that a
file cannot run code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError

Contours = Sequence[Any]
"""Of one scene: each (points, 2) as (row, col); arrays or nested lists."""
Points = NDArray[np.float64]
"""All points of a scene's shoreline, (points, 2) as (row, col) in pixels of the scene."""


class Shorelines:
    """The shoreline of each scene, read when it is asked for.

    Args:
        source: a folder with `<scene_id>_shoreline.npy` (or `.json`), a JSON file of contours by scene id, or a mapping
            of scene ids to contours.

    Raises:
        DataError: there is no such folder, or the file cannot be read.
    """

    def __init__(self, source: str | Path | Mapping[str, Contours]) -> None:
        self._folder: Path | None = None
        self._contours: Mapping[str, Contours] = {}
        if isinstance(source, Mapping):
            self._name, self._contours = "shorelines", source
            return
        path = Path(source)
        self._name = str(path)
        if path.is_dir():
            self._folder = path
            return
        contours = _read_json(path)
        if not isinstance(contours, dict):
            raise DataError(f"{path}: expected an object of contours by scene id, got {type(contours).__name__}")
        self._contours = contours

    def points(self, scene: str) -> Points:
        """All points of a scene's shoreline, none where the scene has no shore.

        Raises:
            DataError: there is nothing for this scene, or it is not readable as points.
        """
        if self._folder is not None:
            for suffix in (".npy", ".json"):
                path = self._folder / f"{scene}_shoreline{suffix}"
                if path.is_file():
                    return read_shoreline(path)
            raise DataError(f"{self._folder}: expected {scene}_shoreline.npy for scene {scene}, found none")
        if scene not in self._contours:
            raise DataError(f"{self._name}: expected contours for scene {scene} (none: an empty list), found none")
        return _stack(f"{self._name}, scene {scene}", self._contours[scene])


def read_shoreline(path: str | Path) -> Points:
    """Read all points of one scene's shoreline from a `.npy`, also of pickled arrays, or a JSON list of contours.

    Raises:
        DataError: the file is missing, broken, holds more than arrays of numbers, or no (row, col) points.
    """
    path = Path(path)
    return _stack(str(path), _read_json(path) if path.suffix == ".json" else _read_npy(path))


def _stack(name: str, contours: Contours) -> Points:
    try:
        parts = [part for part in (np.asarray(contour, dtype=np.float64) for contour in contours) if part.size]
        points = np.vstack(parts) if parts else np.empty((0, 2))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected contours of (row, col) points, got {error}") from None
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise DataError(f"{name}: expected contours of finite (row, col) points, got shape {points.shape}")
    return points


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a folder or a file of shorelines") from error
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error


def _read_npy(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, dtype = read(file)
            if dtype.hasobject:
                return _ArraysOnly(file).load()
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a shoreline file") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise DataError(f"{path}: not readable as a .npy of contours: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """Knows the three names that a pickled array consists of."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # the byte strings of Python 2

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        # numpy.core.multiarray, or numpy._core.multiarray as of numpy 2.
        if module.endswith("core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"expected arrays of numbers only, got {module}.{name}")
