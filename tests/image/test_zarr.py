"""OME-Zarr of both formats, against the arrays that were written."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from gigaxt.errors import ImageError
from gigaxt.image import open_image

RNG = np.random.default_rng(0)


def write(path: Path, data: np.ndarray, axes: str, zarr_format: int, **extra: Any) -> np.ndarray:
    """A two-level image; the lower level is every second pixel. Returns that level."""
    step = tuple(slice(None, None, 2 if axis in "yx" else 1) for axis in axes)
    spaces = {"x", "y", "z"}
    multiscales = {
        "axes": [{"name": a, "type": "space", "unit": "micrometer"} if a in spaces else {"name": a} for a in axes],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [0.5 * 2**level if a == "x" else 0.25 * 2**level for a in axes]}
                ],
            }
            for level in (0, 1)
        ],
    }
    version = "0.5" if zarr_format == 3 else "0.4"
    omero = {"channels": [{"label": "DAPI"}, {"label": "FITC"}]}
    metadata: dict[str, Any] = {"multiscales": [multiscales | {"version": version}], "omero": omero}
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    group.attrs.update({"ome": metadata | {"version": version}} if zarr_format == 3 else metadata)
    for level, pixels in enumerate((data, data[step])):
        chunks = tuple(16 if axis in "yx" else 1 for axis in axes)
        array = group.create_array(str(level), shape=pixels.shape, dtype=pixels.dtype, chunks=chunks, **extra)
        array[...] = pixels
    return data[step]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axes", ["tczyx", "czyx", "cyx", "yx", "zyx", "yxc", "tyx"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_axes(tmp_path: Path, zarr_format: int, axes: str, dtype: str) -> None:
    sizes = {"t": 2, "c": 2, "z": 3, "y": 40, "x": 52}
    data = RNG.integers(0, 250, [sizes[axis] for axis in axes]).astype(dtype)
    below = write(tmp_path, data, axes, zarr_format)
    image = open_image(tmp_path)

    def expected(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels[tuple(0 if axis in "tz" else slice(None) for axis in axes)]
        left = [axis for axis in axes if axis in "cyx"]
        return pixels[..., None] if "c" not in left else pixels.transpose([left.index(axis) for axis in "yxc"])

    full = expected(data)
    assert (image.height, image.width, image.channels) == full.shape
    assert image.dtype == np.dtype(dtype)
    assert image.mpp == (0.5, 0.25)
    assert image.band_names == (("DAPI", "FITC") if "c" in axes else ("1",))
    assert [level[:2] for level in image.levels] == [(52, 40), (26, 20)]
    np.testing.assert_array_equal(image.read(0, 0, 52, 40), full)
    np.testing.assert_array_equal(image.read(-4, 10, 20, 50)[:30, 4:], full[10:, :16])
    np.testing.assert_array_equal(image.read(3, 2, 20, 10, 1), expected(below)[2:12, 3:23])
    np.testing.assert_array_equal(image.select([-1 + image.channels]).read(0, 0, 52, 40), full[..., -1:])


def test_shards_and_missing_chunks(tmp_path: Path) -> None:
    data = RNG.integers(0, 250, (2, 64, 64), dtype=np.uint8)
    write(tmp_path, data, "cyx", 3, fill_value=7, shards=(1, 32, 32))
    image = open_image(tmp_path)
    np.testing.assert_array_equal(image.read(0, 0, 64, 64), np.moveaxis(data, 0, -1))
    (tmp_path / "0" / "c" / "1" / "0" / "0").unlink()
    pixels = image.read(0, 0, 64, 64)
    assert (pixels[:32, :32, 1] == 7).all()
    np.testing.assert_array_equal(pixels[..., 0], data[0])


def test_real_format_2_image(fixtures: Path) -> None:
    path = fixtures / "ome_zarr" / "v2"
    image = open_image(path)
    assert (image.height, image.width, image.channels, image.dtype) == (16, 16, 2, np.uint8)
    expected = np.asarray(zarr.open_array(path / "0", mode="r"))[0, :, 0]
    np.testing.assert_array_equal(image.read(0, 0, 16, 16), np.moveaxis(expected, 0, -1))


def test_threads_fork_and_pickle(tmp_path: Path) -> None:
    data = RNG.integers(0, 250, (2, 64, 64), dtype=np.uint8)
    write(tmp_path, data, "cyx", 3)
    image = open_image(tmp_path)
    expected = np.moveaxis(data, 0, -1)

    def right(seed: int) -> bool:
        x, y = np.random.default_rng(seed).integers(0, 40, 2)
        return bool(np.array_equal(image.read(int(x), int(y), 24, 24), expected[y : y + 24, x : x + 24]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(20)))
    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            os._exit(0 if right(seed) else 1)
        children.append(child)
    assert right(5)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    again = pickle.loads(pickle.dumps(image))
    np.testing.assert_array_equal(again.read(0, 0, 64, 64), expected)


def test_bioformats2raw_layout(tmp_path: Path) -> None:
    data = RNG.integers(0, 250, (2, 40, 40), dtype=np.uint8)
    zarr.open_group(tmp_path, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write(tmp_path / "0", data, "cyx", 2)
    np.testing.assert_array_equal(open_image(tmp_path).read(0, 0, 40, 40), np.moveaxis(data, 0, -1))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_broken_chunks(tmp_path: Path, zarr_format: int) -> None:
    data = RNG.integers(0, 250, (2, 40, 40), dtype=np.uint8)
    write(tmp_path, data, "cyx", zarr_format)
    chunk = next(path for path in sorted((tmp_path / "0").rglob("*")) if path.is_file() and path.name.endswith("0"))
    image = open_image(tmp_path)
    for content in (b"", chunk.read_bytes()[:30], bytes(300), RNG.bytes(200)):
        chunk.write_bytes(content)
        with pytest.raises(ImageError, match=r"\(level 0, x 0, y 0, 40 x 40 px\): a chunk cannot be read"):
            image.read(0, 0, 40, 40)


def test_broken_metadata(tmp_path: Path) -> None:
    data = RNG.integers(0, 250, (2, 40, 40), dtype=np.uint8)
    write(tmp_path, data, "cyx", 2)
    good = json.loads((tmp_path / ".zattrs").read_text())
    array = json.loads((tmp_path / "0" / ".zarray").read_text())

    def refused(attributes: Any, shape: dict[str, Any] | None = None) -> str:
        (tmp_path / ".zattrs").write_text(json.dumps(attributes) if attributes is not None else "{")
        (tmp_path / "0" / ".zarray").write_text(json.dumps(array | (shape or {})))
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    image = good["multiscales"][0]
    assert "cannot be opened as OME-Zarr: JSONDecodeError" in refused(None)
    assert "expected OME-Zarr metadata" in refused({})
    assert "KeyError: 'datasets'" in refused({"multiscales": [{}]})
    assert "expected axes out of t c z y x" in refused({"multiscales": [image | {"axes": ["q", "y", "x"]}]})
    assert "cannot be opened" in refused({"multiscales": [image | {"datasets": [{"path": "9"}]}]})
    assert "expected 1 to" in refused(good, {"shape": [2, 2**31, 2**31]})
    assert "expected chunks of at most" in refused(good, {"shape": [2, 40_000, 40_000], "chunks": [1, 40_000, 40_000]})
    assert "expected integer or float pixels" in refused(good, {"dtype": "<c8", "fill_value": [0, 0]})
