from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gigaxt.errors import DataError
from gigaxt.metrics import xview3_score
from gigaxt.metrics.shorelines import Shorelines, read_shoreline

CONTOURS = [[[0.0, 1.0], [2.0, 3.5], [4.0, 5.0]], [[7.0, 8.0], [9.0, 9.0]]]
POINTS = [point for contour in CONTOURS for point in contour]


def _save(path: Path, contours: list[Any]) -> Path:
    """As the official files: an object array of arrays, pickled."""
    array = np.empty(len(contours), dtype=object)
    array[:] = [np.array(contour) for contour in contours]
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize("contours", [CONTOURS, CONTOURS[:1], []])
def test_pickled_contours(contours: list[Any], tmp_path: Path) -> None:
    path = _save(tmp_path / "s_shoreline.npy", contours)
    expected = np.array([point for contour in contours for point in contour]).reshape(-1, 2)
    np.testing.assert_array_equal(read_shoreline(path), expected)
    np.testing.assert_array_equal(Shorelines(tmp_path).points("s"), expected)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_files_of_any_numpy(module: bytes, tmp_path: Path) -> None:
    array = np.load(_save(tmp_path / "a.npy", CONTOURS), allow_pickle=True)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (2,)})
    pickled = pickle.dumps(array, protocol=3)  # the official files' protocol
    assert pickled.count(b"core.multiarray") == 1
    pickled = pickled.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
    (tmp_path / "b.npy").write_bytes(header.getvalue() + pickled)
    assert read_shoreline(tmp_path / "b.npy").tolist() == POINTS


def test_plain_arrays_and_json(tmp_path: Path) -> None:
    np.save(tmp_path / "a_shoreline.npy", np.array(CONTOURS[:1]))  # one contour: (1, points, 2)
    np.save(tmp_path / "b_shoreline.npy", np.array(CONTOURS[0]))
    (tmp_path / "c_shoreline.json").write_text(json.dumps(CONTOURS[:1]))
    folder = Shorelines(tmp_path)
    for scene in "abc":
        assert folder.points(scene).tolist() == CONTOURS[0]
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"a": CONTOURS, "none": [], "empty": [[]]}))
    for source in (path, json.loads(path.read_text())):
        assert Shorelines(source).points("a").tolist() == POINTS
        assert Shorelines(source).points("none").shape == Shorelines(source).points("empty").shape == (0, 2)


def test_real_mini_scene(fixtures: Path) -> None:
    folder = fixtures / "xview3_mini_scene"
    scene = "00aa11bb22cc33ddv"
    shorelines = folder / "shoreline" / "validation"
    points = Shorelines(shorelines).points(scene)
    np.testing.assert_allclose(points, read_shoreline(shorelines / f"{scene}_shoreline.json"), atol=1e-12)
    truth = folder / "validation.csv"
    scores = xview3_score(truth, truth, shorelines)["scores"]
    assert scores["loc_fscore"] == 1
    assert scores["loc_fscore_shore"] > 0.8  # the objects within 2 to 2.2 km are false alarms there


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil",)


def test_a_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.empty(1, dtype=object)
    array[0] = _Evil()
    np.save("a_shoreline.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=r"a_shoreline.npy: .* expected arrays of numbers only, got \w+.mkdir"):
        Shorelines(tmp_path).points("a")
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"not an array at all", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'}"]
)
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a_shoreline.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"a_shoreline\.npy: not readable as a \.npy of contours"):
        Shorelines(tmp_path).points("a")


def test_truncated_pickle(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.npy", CONTOURS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not readable"):
        read_shoreline(path)


@pytest.mark.parametrize(
    "contours", [[[1, 2, 3]], [[[1, 2, 3]]], [[[1, float("nan")]]], 3, [[["a", "b"]]], [[[1, 2], [3]]]]
)
def test_points_that_are_none(contours: Any) -> None:
    with pytest.raises(DataError, match="shorelines, scene a: expected contours of"):
        Shorelines({"a": contours}).points("a")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a_shoreline\.npy for scene a, found none"):
        Shorelines(tmp_path).points("a")
    with pytest.raises(DataError, match=r"expected contours for scene a \(none: an empty list\)"):
        Shorelines({}).points("a")
    with pytest.raises(DataError, match=r"nowhere: No such file"):
        Shorelines(tmp_path / "nowhere")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list\.json: expected an object of contours by scene id, got list"):
        Shorelines(tmp_path / "list.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad\.json: not readable as JSON"):
        Shorelines(tmp_path / "bad.json")
