"""xView3-SAR: scenes as images, folders to a manifest, places that are never divided, submissions."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gigaxt import DataError, ImageError, open_image
from gigaxt.cli import main
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.xview3 import write_manifest, write_submission
from gigaxt.found.objects import Objects
from gigaxt.metrics.shorelines import read_shoreline
from tiny_models import tiny_model
from xview3_folder import write_raster, write_root, write_scene

FIXTURE = Path("/work/shared/fixtures/xview3_mini_scene")


def test_a_scene_is_one_image(tmp_path: Path) -> None:
    write_scene(tmp_path, "a")
    image = open_image(tmp_path / "validation" / "a")
    assert (image.band_names, image.nodata, image.height) == (("VV", "VH", "bathymetry"), -32768, 128)
    pixels, valid = image.read_valid(0, 0, 128, 128)
    vv = open_image(tmp_path / "validation" / "a" / "VV_dB.tif").read(0, 0, 128, 128)
    np.testing.assert_array_equal(pixels[..., :1], vv)
    assert not valid[:16].any()
    assert valid[16:].all()  # also where the depth is not known
    depth = pixels[..., 2]
    assert (depth[100:, 100:] == -32768).all()
    known = depth[depth != -32768]
    assert known.min() > -110
    assert known.max() < -50  # nothing is interpolated across nodata
    assert image.select(["VV", "VH"]).read_valid(0, 0, 128, 128)[1].sum() == 112 * 128


def test_a_depth_that_is_not_known_is_nodata_of_the_scene(tmp_path: Path) -> None:
    """Whatever its own file writes there; so that the network sees 0 in that band, and the pixel stays valid."""
    write_scene(tmp_path, "a", side=200)
    folder = tmp_path / "validation" / "a"
    depth = np.full((4, 4), -80.0, np.float32)
    depth[1, 2] = -9999
    write_raster(folder / "bathymetry.tif", depth, 500.0, nodata="-9999")
    image = open_image(folder)
    pixels, valid = image.read_valid(0, 0, 200, 200)
    unknown = np.zeros((200, 200), bool)
    unknown[50:100, 100:150] = True
    np.testing.assert_allclose(pixels[..., 2], np.where(unknown, -32768, -80), rtol=1e-6)
    np.testing.assert_array_equal(valid, np.arange(200)[:, None].repeat(200, axis=1) >= 16)
    assert (pixels[16:, :, :2] > -60).all()
    # Asked for alone, it has a validity of its own.
    alone, known = image.select(["bathymetry"]).read_valid(0, 0, 200, 200)
    np.testing.assert_array_equal(known, ~unknown)
    np.testing.assert_allclose(alone[known], -80, rtol=1e-6)
    # What the network is given.
    model = tiny_model({"kind": "points", "dim": 8}, mean=[-16.4, -26.3, -50.0], std=[4.8, 5.0, 10.0])
    batch = model.batch([image], None)
    loaded = batch.load(batch.chunks(100)[0])
    seen = torch.where(
        loaded["valid"], loaded["pixels"] * loaded["scale"][:, None, None] + loaded["shift"][:, None, None], 0
    )
    places = [(place.row, place.col) for _, _, place in batch.chunks(100)[0].places]
    region = seen[places.index((1, 2))]  # px 64 to 128 of rows, 128 to 192 of columns
    assert (region[: 100 - 64, : 150 - 128, 2] == 0).all()
    assert (region[100 - 64 :, :, 2] + 3).abs().max() < 1e-5
    assert (region[..., :2].abs() < 20).all()


def test_broken_scenes(tmp_path: Path) -> None:
    write_scene(tmp_path, "a")
    folder = tmp_path / "validation" / "a"
    with pytest.raises(ImageError, match="nor xView3 scene"):
        open_image(tmp_path)
    (folder / "VH_dB.tif").rename(folder / "VH.tif")
    with pytest.raises(ImageError, match=r"and VH_dB.tif in the folder of a scene, got no VH_dB.tif"):
        open_image(folder)
    data = (folder / "VH.tif").read_bytes()
    (folder / "VH_dB.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"VH_dB\.tif"):
        open_image(folder).read(0, 0, 128, 128)
    write_raster(folder / "VH_dB.tif", np.zeros((64, 64), np.float16), 10.0)
    with pytest.raises(ImageError, match="expected the extent"):
        open_image(folder)


def test_scenes_that_overlap_stay_together(tmp_path: Path) -> None:
    root = write_root(tmp_path, 6)
    for again in (6, 7):  # the same place as scene 0
        lines = write_scene(root, f"{again:016x}v", seed=0)
        with (root / "validation.csv").open("a", newline="") as file:
            csv.writer(file).writerows(line.values() for line in lines)
    counts = write_manifest(root, tmp_path / "x.csv")
    assert (counts["groups"], counts["objects"], counts["shorelines"]) == (6, 64, 8)
    assert counts["train"] + counts["val"] == 8
    assert counts["val"] >= 1
    manifest = Manifest.read(tmp_path / "x.csv", task="points")
    manifest.check_files()
    groups = {row.cells["scene_id"]: row.group for row in manifest.rows}
    assert groups["0000000000000006v"] == groups["0000000000000007v"] == groups["0000000000000000v"]
    for row in manifest.rows:
        assert len(read_shoreline(manifest.path.parent / row.cells["shoreline"])) == 32


def test_scenes_without_labels_and_labels_without_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_root(tmp_path, 2), tmp_path / "x.csv"
    write_scene(root, "feed", seed=5)  # whose labels are not written
    assert main(["import-xview3", str(root), str(out)]) == 0
    assert "scenes without a label, which count as scenes without an object: 1" in capsys.readouterr().out
    assert main(["check", str(out)]) == 0
    capsys.readouterr()
    shutil.rmtree(root / "validation" / f"{0:016x}v")
    assert write_manifest(root, out) | {"objects": 8, "empty": 1, "elsewhere": 8} == write_manifest(root, out)
    assert main(["check", str(out)]) == 2  # those of 0 may be those of feed
    assert "some have '0000000000000000v', which no row" in capsys.readouterr().out
    shutil.rmtree(root / "validation" / f"{1:016x}v")
    with pytest.raises(DataError, match=r"expected labels of the scenes in .*, such as feed, got those of 0000"):
        write_manifest(root, out)


def test_other_layouts_tests_and_tables_of_locations(tmp_path: Path) -> None:
    root = write_root(tmp_path / "a", 2)
    write_root(root, 2, part="public")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for name in ("validation", "public"):
        (root / name).rename(root / "images" / name)
        (root / f"{name}.csv").rename(root / "labels" / f"{name}.csv")
    out = tmp_path / "deeper" / "x.csv"
    out.parent.mkdir()
    assert write_manifest(root, out)["test"] == 2
    Manifest.read(out, task="points").check_files()
    table = tmp_path / "places.csv"
    table.write_text("scene_id,location\n0000000000000000v,here\n0000000000000001v,here\n")
    with pytest.raises(DataError, match="a location for each scene, got none for 0000000000000000p"):
        write_manifest(root, out, locations=table)
    with table.open("a") as file:
        file.write("0000000000000000p,here\n0000000000000001p,there\n")
    counts = write_manifest(root, out, locations=table)
    assert (counts["train"], counts["val"], counts["test"]) == (2, 0, 2)


def test_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="expected a folder validation/"):
        write_manifest(tmp_path, tmp_path / "x.csv")
    root = write_root(tmp_path, 1)
    assert main(["import-xview3", str(root), str(tmp_path / "x.csv")]) == 0
    said = "1 scene to train on, 0 to validate, 0 to test, in 1 place, with 8 objects and 1 shoreline\n"
    assert said in capsys.readouterr().out
    assert main(["import-xview3", str(root), str(tmp_path / "x.csv")]) == 2
    assert "exists" in capsys.readouterr().err
    (root / "validation.csv").unlink()
    with pytest.raises(DataError, match=r"expected labels validation.csv"):
        write_manifest(root, tmp_path / "x.csv")


def test_submission_is_whole_and_has_the_columns(tmp_path: Path) -> None:
    objects = Objects(
        places=np.array([[10.5, 20.99]]),
        classes=np.array([0]),
        scores=np.array([0.5]),
        attributes={
            "is_vessel": np.array([1], np.int8),
            "is_fishing": np.array([0], np.int8),
            "vessel_length_m": np.array([33.333]),
        },
    )
    path = write_submission(tmp_path / "s.csv", [("a", objects), ("b", objects.take(np.zeros(1, bool)))])
    assert path.read_text() == (
        "scene_id,detect_scene_row,detect_scene_column,is_vessel,is_fishing,vessel_length_m\na,10,20,True,False,33.33\n"
    )


@pytest.mark.skipif(not FIXTURE.exists(), reason=f"there is no {FIXTURE}")
def test_the_mini_scene_is_read() -> None:
    image = open_image(FIXTURE / "validation" / "00aa11bb22cc33ddv")
    assert (image.crs, image.dtype, image.channels) == ("EPSG:32630", np.float32, 3)
    pixels, valid = image.read_valid(0, 0, 512, 512)
    assert 0.86 < valid.mean() < 0.87
    assert pixels[valid][:, :2].min() > -60
