from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import gigaxt
from gigaxt import ConfigError, DataError, ImageError, open_image
from gigaxt.draw import class_palette
from tiny_models import classifier, segmenter


def scene(path: Path, height: int = 150, width: int = 200, bands: int = 3, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands)).astype(np.uint8)
    kind = "rgb" if bands == 3 else "minisblack"
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric=kind, planarconfig="contig")
    return path


def as_tensor(path: Path) -> torch.Tensor:
    """The network's input as `InputConfig` without mean and std makes it: (1, C, H, W)."""
    return torch.from_numpy(tifffile.imread(path)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize(("height", "width"), [(150, 200), (64, 128), (30, 20), (1, 300)])
def test_mask_is_the_argmax_of_the_whole_scene(tmp_path: Path, height: int, width: int, chunk: int) -> None:
    model, path = segmenter(), scene(tmp_path / "scene.tif", height, width)
    model.streaming = gigaxt.Streaming(chunk_regions=chunk)
    out = gigaxt.predict(model, path, tmp_path / "mask.tif")
    assert out == tmp_path / "mask.tif"
    expected = model(as_tensor(path))[0].argmax(0).numpy()
    assert len(np.unique(expected)) > 1 or height < 64
    mask = tifffile.imread(out)
    assert mask.shape == (height, width)
    assert (mask == expected).mean() > 0.999  # rounding may turn a tie


def test_halo_and_overview_are_stitched(tmp_path: Path) -> None:
    model, path = segmenter(halo=0, overview=[2]), scene(tmp_path / "scene.tif")
    mask = tifffile.imread(gigaxt.predict(model, path, tmp_path / "mask.tif"))
    (expected,) = model([open_image(path)])
    assert (mask == expected.argmax(0).numpy()).mean() > 0.999


def test_mask_is_a_tiled_pyramid_with_class_colours_and_nodata(tmp_path: Path) -> None:
    colours = [(1, 2, 3), (250, 0, 0), (0, 250, 0), (0, 0, 250)]
    model = segmenter(head={"class_colors": colours})
    out = gigaxt.predict(model, scene(tmp_path / "scene.tif", 700, 600), tmp_path / "mask.tif")
    image = open_image(out)
    assert [(level.width, level.height) for level in image.levels] == [(600, 700), (300, 350)]
    assert (image.dtype, image.channels, image.nodata) == (np.uint8, 1, 255)
    with tifffile.TiffFile(out) as tiff:
        page = tiff.pages[0]
        assert page.is_tiled
        assert [tuple(page.colormap[:, k] >> 8) for k in range(4)] == colours
    coarse = image.read(0, 0, 300, 350, level=1)
    assert set(np.unique(coarse)) <= {0, 1, 2, 3}  # classes are picked, not mixed


def test_without_colours_of_its_own_a_model_gets_the_palette(tmp_path: Path) -> None:
    out = gigaxt.predict(segmenter(), scene(tmp_path / "scene.tif"), tmp_path / "mask.tif")
    with tifffile.TiffFile(out) as tiff:
        assert [tuple(tiff.pages[0].colormap[:, k] >> 8) for k in range(4)] == class_palette(4)


def test_many_classes_are_written_as_uint16(tmp_path: Path) -> None:
    model, path = segmenter(classes=300, head={"ignore": 65535}), scene(tmp_path / "scene.tif", 64, 64)
    image = open_image(gigaxt.predict(model, path, tmp_path / "mask.tif"))
    assert (image.dtype, image.nodata) == (np.uint16, 65535)
    expected = model(as_tensor(path))[0].argmax(0).numpy()
    assert (image.read(0, 0, 64, 64)[..., 0] == expected).mean() > 0.999


@pytest.mark.parametrize("name", ["geotiff/RGB.byte.tif", "geotiff/cogeo.tif"])
def test_georeference_and_missing_pixels_as_rasterio_reads_them(fixtures: Path, tmp_path: Path, name: str) -> None:
    rasterio = pytest.importorskip("rasterio")
    out = gigaxt.predict(segmenter(), fixtures / name, tmp_path / "mask.tif")
    image = open_image(fixtures / name)
    valid = image.validity(0, 0, image.width, image.height)
    with rasterio.open(fixtures / name) as source, rasterio.open(out) as mask:
        assert mask.crs == source.crs
        assert mask.transform.almost_equals(source.transform)
        assert (mask.height, mask.width, mask.nodata) == (source.height, source.width, 255)
        values = mask.read(1)
        assert mask.colormap(1)[1][:3] == class_palette(4)[1]
    np.testing.assert_array_equal(values == 255, ~valid)


def test_regions_without_data_are_nodata(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(0, 1, (200, 260, 3)).astype(np.float32)
    pixels[60:140, 64:200] = np.nan  # the regions of column 1 and 2 in row 1 lack data as a whole
    out = gigaxt.predict(segmenter(), open_image(pixels, nodata=float("nan")), tmp_path / "mask.tif")
    np.testing.assert_array_equal(tifffile.imread(out) == 255, np.isnan(pixels[..., 0]))


def test_pixel_size_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "scene.ome.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 260, 3)).astype(np.uint8)
    micrometres = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(path, pixels, photometric="rgb", metadata={"axes": "YXS", **micrometres})
    image = open_image(gigaxt.predict(segmenter(mpp=1.0), path, tmp_path / "mask.tif"))
    assert (image.height, image.width, image.mpp) == (100, 130, pytest.approx((1.0, 1.0), rel=1e-3))


def test_scores_of_several_images(tmp_path: Path) -> None:
    model = classifier()
    paths = [scene(tmp_path / f"{i}.tif", 100 + i, 70, seed=i) for i in range(3)]
    told = []
    out = gigaxt.predict(model, paths, tmp_path / "scores.csv", progress=lambda done, count: told.append((done, count)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        expected = model(as_tensor(path))[0].softmax(0)
        values = [float(row[name]) for name in ("ash", "oak", "yew")]
        np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-5)
        assert row["prediction"] == ("ash", "oak", "yew")[int(expected.argmax())]


@pytest.mark.parametrize(
    ("target", "of", "prediction"),
    [
        ("multi", lambda x: x.sigmoid(), lambda v, n: "|".join(k for k, x in zip(n, v, strict=True) if x >= 0.5)),
        ("regression", lambda x: x, lambda v, _: " ".join(f"{x:.6g}" for x in v)),
    ],
)
def test_scores_of_other_targets(tmp_path: Path, target: str, of, prediction) -> None:
    model, path = classifier(target=target), scene(tmp_path / "scene.tif")
    gigaxt.predict(model, path, tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    names = ("ash", "oak", "yew")
    values = [float(row[name]) for name in names]
    np.testing.assert_allclose(values, of(model(as_tensor(path))[0]).detach().numpy(), atol=1e-5)
    assert row["prediction"] == prediction(values, names)


def test_bad_images_end_it_or_are_noted(tmp_path: Path) -> None:
    model, good = classifier(), scene(tmp_path / "good.tif")
    bad = tmp_path / "bad.tif"
    bad.write_bytes(good.read_bytes()[:5000])
    four = scene(tmp_path / "four.tif", bands=4)
    with pytest.raises(ImageError, match="bad"):
        gigaxt.predict(model, [good, bad], tmp_path / "scores.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tif", "four.tif", "good.tif"]
    skipped: dict[str, str] = {}
    out = gigaxt.predict(model, [bad, good, four], tmp_path / "scores.csv", skipped=skipped)
    assert list(skipped) == [str(bad), str(four)]
    assert "takes 3 bands, the image has 4" in skipped[str(four)]
    assert len(out.read_text().splitlines()) == 2


def test_wrong_number_of_bands_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        gigaxt.predict(segmenter(), scene(tmp_path / "scene.tif", bands=4), tmp_path / "mask.tif")
    assert str(caught.value) == f"{tmp_path / 'scene.tif'}: the model takes 3 bands, the image has 4"
    assert not (tmp_path / "mask.tif").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_is_not_complete_has_another_name_and_goes(tmp_path: Path, stop: type[BaseException]) -> None:
    seen: list[list[str]] = []
    folder = tmp_path / "out"
    folder.mkdir()
    for model, name in ((segmenter(), "mask.tif"), (classifier(), "scores.csv")):
        (folder / name).write_text("older")

        def progress(done: int, count: int) -> None:
            seen.append(sorted(path.name for path in folder.iterdir()))
            raise stop

        with pytest.raises(stop):
            gigaxt.predict(model, scene(tmp_path / "scene.tif"), folder / name, progress=progress)
        assert (folder / name).read_text() == "older"
    assert seen == [["mask.tif", "mask.tif.parts"], ["mask.tif", "scores.csv", "scores.csv.part"]]
    assert sorted(path.name for path in folder.iterdir()) == ["mask.tif", "scores.csv"]


def test_damage_in_the_middle_of_a_scene_leaves_no_file(tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif", 400, 400)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[-1]
    tifffile.imwrite(path, tifffile.imread(path), tile=(64, 64), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[-1]
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="level 0, tile"):
        gigaxt.predict(segmenter(), path, tmp_path / "mask.tif")
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif")
    for model, name in ((segmenter(), "mask.tif"), (classifier(), "scores.csv")):
        with pytest.raises(ImageError, match=name):
            gigaxt.predict(model, path, tmp_path / "no folder" / name)


def test_a_segmenter_takes_one_scene_and_nothing_is_refused(tmp_path: Path) -> None:
    path = scene(tmp_path / "scene.tif")
    with pytest.raises(ConfigError, match="loop over them"):
        gigaxt.predict(segmenter(), [path, path], tmp_path / "mask.tif")
    with pytest.raises(DataError, match="at least one image"):
        gigaxt.predict(classifier(), [], tmp_path / "scores.csv")


def test_the_model_stays_in_its_mode(tmp_path: Path) -> None:
    model = segmenter().train()
    with warnings.catch_warnings():
        gigaxt.predict(model, scene(tmp_path / "scene.tif"), tmp_path / "mask.tif")
    assert model.training
