from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image as Pillow

from gigaxt.config import from_dict
from gigaxt.datasets.check import check_manifest, write_config
from gigaxt.datasets.legend import LegendConfig, make_dataset
from gigaxt.errors import DataError
from gigaxt.image import open_image
from gigaxt.nn.heads import SegmentConfig
from gigaxt.nn.region_encoder import RegionEncoderConfig
from gigaxt.training.config import read_yaml, run_config


@pytest.fixture
def real(tmp_path: Path, fixtures: Path) -> Path:
    for path in (fixtures / "geotiff").iterdir():
        if path.suffix in (".tif", ".jpg"):
            shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LegendConfig(rule="beacon", size_px=(300, 340), kinds=3)
    return make_dataset(config, tmp_path_factory.mktemp("legend"), scenes=6, val=2)


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_real_files(real: Path) -> None:
    (real / "notes.tif").write_text("no image")
    (real / "empty.tif").write_bytes(b"")
    (real / "cut.tif").write_bytes((real / "cogeo.tif").read_bytes()[:150_000])
    names = ["RGB.byte.tif", "cogeo.tif", "389225main_sw_1965_1024.jpg", "RGBA.uint16.tif", "float_nan.tif"]
    names += ["all-nodata.tif", "gone.tif", "notes.tif", "empty.tif", "cut.tif"]
    csv = table(
        real / "data.csv", "image,label,split\n" + "".join(f"{n},{'ab'[i % 2]},train\n" for i, n in enumerate(names))
    )
    done: list[tuple[int, int]] = []
    report = check_manifest(csv, progress=lambda *state: done.append(state))
    assert done[-1] == (9, 9)
    assert not report.ok
    assert [(p.line, p.path.name) for p in report.missing] == [(8, "gone.tif")]
    assert [p.path.name for p in report.unreadable] == ["notes.tif", "empty.tif", "cut.tif"]
    assert [p.path.name for p in report.empty] == ["all-nodata.tif"]
    facts = {fact.path.name: fact for fact in report.images}
    assert (facts["RGB.byte.tif"].height, facts["RGB.byte.tif"].width) == (718, 791)
    assert facts["RGB.byte.tif"].gsd_m == pytest.approx((300.04, 300.04), rel=1e-4)
    assert facts["RGBA.uint16.tif"].channels == 4
    text = "\n".join(report.lines())
    for part in ("line 8:", "gone.tif: does not exist", "bands  3 (", "train", "what to do:", "images have 3 ("):
        assert part in text
    assert all("\n" not in line for line in report.lines())


def test_statistics_of_a_real_file_are_exact_and_of_valid_pixels(real: Path) -> None:
    csv = table(real / "data.csv", "image,label,split\nRGB.byte.tif,a,train\nRGB.byte.tif,a,train\n")
    report = check_manifest(csv)
    assert report.ok
    assert len(report.images) == 1
    pixels = tifffile.imread(real / "RGB.byte.tif").reshape(718, 791, 3)
    valid = pixels[open_image(real / "RGB.byte.tif").validity(0, 0, 791, 718)].astype(float)
    assert len(valid) < 718 * 791
    np.testing.assert_allclose(report.statistics.mean, valid.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(report.statistics.std, valid.std(axis=0), rtol=1e-12)


def test_masks_and_pictures(scenes: Path, tmp_path: Path) -> None:
    report = check_manifest(scenes / "masks.csv", overlay_folder=tmp_path / "pictures", max_overlays=3)
    assert report.ok, report.lines()
    masks = [tifffile.imread(path, key=0) for path in sorted((scenes / "masks").iterdir())]
    values, counts = np.unique(masks, return_counts=True)
    assert report.mask.pixels == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert report.mask.known == counts.sum()
    assert not report.mask.sampled
    assert report.mask_classes == 4
    assert [path.name for path in report.overlays] == [f"line0000{i + 2}_00000{i}.png" for i in range(3)]
    with Pillow.open(report.overlays[0]) as picture:
        assert picture.height == 300
        assert picture.width > 340
    assert any(line.startswith("mask values:") for line in report.lines())


def test_large_masks_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((3000, 2500), dtype=np.uint8)
    mask[:1500] = 1
    tifffile.imwrite(tmp_path / "m.tif", mask, tile=(256, 256))
    tifffile.imwrite(tmp_path / "i.tif", mask, tile=(256, 256))
    monkeypatch.setattr("gigaxt.datasets.check.MASK_PIXELS_IN_ALL", 0)  # the least: 4 megapixels a mask
    report = check_manifest(table(tmp_path / "d.csv", "image,mask,split\ni.tif,m.tif,train\n"))
    assert report.mask.sampled
    assert report.mask.known <= 1 << 22
    assert report.mask.pixels[0] / report.mask.known == pytest.approx(0.5, abs=0.1)


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((64, 48, 3), np.uint8))
    for name, mask in {
        "small": np.zeros((64, 47), np.uint8),
        "float": np.zeros((64, 48), np.float32),
        "rgb": np.zeros((64, 48, 3), np.uint8),
    }.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", mask)
        shutil.copyfile(tmp_path / "i.tif", tmp_path / f"i_{name}.tif")
    rows = "".join(f"i_{name}.tif,{name}.tif,train\n" for name in ("small", "float", "rgb"))
    report = check_manifest(table(tmp_path / "d.csv", "image,mask,split\n" + rows))
    assert not report.ok
    assert report.mismatched[0].cause.startswith("the mask has 47 x 64 px, its image")
    assert [p.cause for p in report.mismatched[1:]] == [
        "mask is float32; expected class numbers in an integer type",
        "mask has 3 bands; expected one band of class numbers",
    ]


def test_damage_that_only_the_digest_shows(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((64, 48, 3), np.uint8))
    report = check_manifest(table(tmp_path / "d.csv", f"image,label,split,sha256\ni.tif,a,train,{'0' * 64}\n"))
    assert "damaged or another one" in report.unreadable[0].cause


def test_foreground_is_drawn_and_statistics_are_of_it(tmp_path: Path) -> None:
    pixels = np.full((1024, 1024, 3), 240, np.uint8)
    pixels[296:472, 552:728] = (200, 30, 120)
    tifffile.imwrite(tmp_path / "slide.tif", pixels, tile=(256, 256), photometric="rgb")
    csv = table(tmp_path / "d.csv", "image,label,split\nslide.tif,a,train\n")
    report = check_manifest(csv, foreground="tissue", overlay_folder=tmp_path / "pictures")
    assert report.images[0].kept == 1 / 16
    np.testing.assert_allclose(report.statistics.mean, pixels[256:512, 512:768].mean(axis=(0, 1)))
    with Pillow.open(report.overlays[0]) as picture:
        drawn = np.asarray(picture)
    assert drawn[400, 600].tolist() == [200, 30, 120]
    assert drawn[100, 100].tolist() == [120, 120, 120]
    assert drawn[300, 512].tolist() == [255, 64, 64]
    assert any("foreground keeps 6%" in line for line in report.lines())


def test_config_of_a_classification(real: Path) -> None:
    (real / "no").mkdir()
    rows = "RGB.byte.tif,no,train\nno/a.tif,yes: it is,val\n"
    shutil.copyfile(real / "RGB.byte.tif", real / "no" / "a.tif")
    csv = table(real / "data.csv", "image,label,split\n" + rows)
    report = check_manifest(csv)
    path = write_config(report, csv, real / "run.yaml")
    config = yaml.safe_load(path.read_text())
    assert config["data"] == {"csv": str(csv.resolve())}
    assert config["model"]["head"] == {"kind": "classify", "classes": 2, "class_names": ["no", "yes: it is"]}
    assert config["model"]["context"] == {"kind": "mamba2", "dim": 192, "depth": 2}
    encoder = from_dict(RegionEncoderConfig, config["model"]["region_encoder"])
    assert (encoder.name, encoder.region, encoder.in_channels) == ("convnextv2_atto", 256, 3)
    assert config["model"]["input"]["gsd_m"] == pytest.approx(300, abs=0.1)
    np.testing.assert_allclose(config["model"]["input"]["mean"], report.statistics.mean, rtol=1e-5)
    np.testing.assert_allclose(config["model"]["input"]["std"], report.statistics.std, rtol=1e-5)
    assert set(config["train"]) == {"epochs", "batch", "lr", "seed"}
    assert all(isinstance(value, int | float) for value in config["train"].values())
    assert path.read_text().count("#") > 12


def test_config_of_a_segmentation(scenes: Path, tmp_path: Path) -> None:
    report = check_manifest(scenes / "masks.csv")
    config = yaml.safe_load(write_config(report, scenes / "masks.csv", tmp_path / "run.yaml").read_text())
    head = config["model"]["head"]
    assert head.pop("class_names")[:2] == ["background", "class 1"]
    assert head == {"kind": "segment", "classes": 4, "ignore": 255}
    assert config["model"]["region_encoder"]["region"] == 128
    assert set(config["model"]["input"]) == {"mean", "std"}


def test_config_of_regression_and_tiny_statistics(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(0, 1e-5, (64, 64, 2)).astype(np.float32)
    pixels[:, :, 1] = 1e-5
    tifffile.imwrite(tmp_path / "i.tif", pixels, planarconfig="contig")
    csv = table(tmp_path / "d.csv", "image,label,split\ni.tif,1|2,train\n")
    report = check_manifest(csv, target="regression")
    config = yaml.safe_load(write_config(report, csv, tmp_path / "run.yaml").read_text())
    assert config["model"]["head"] == {"kind": "classify", "classes": 2, "target": "regression"}
    assert config["model"]["input"]["mean"][0] == pytest.approx(5e-6, rel=0.1)
    assert config["model"]["input"]["mean"][1] == 1e-5  # YAML 1.1 reads 1e-05 as text
    assert config["model"]["input"]["std"][1] == 1
    assert "band 1 (from 0) has one value everywhere: leave it out" in report.proposals()


def test_config_is_not_overwritten_nor_written_from_nothing(scenes: Path, tmp_path: Path) -> None:
    report = check_manifest(scenes / "scenes.csv")
    path = write_config(report, scenes / "scenes.csv", tmp_path / "run.yaml")
    path.write_text("mine")
    with pytest.raises(DataError, match="exists; choose another name, or use --force"):
        write_config(report, scenes / "scenes.csv", path)
    assert path.read_text() == "mine"
    write_config(report, scenes / "scenes.csv", path, force=True)
    assert path.read_text() != "mine"
    csv = table(tmp_path / "d.csv", "image,label\ngone.tif,a\n")
    with pytest.raises(DataError, match="no image could be read"):
        write_config(check_manifest(csv), csv, tmp_path / "other.yaml")


def test_bands_are_matched_by_name(tmp_path: Path) -> None:
    """Bands in another order, and one more: statistics and config are of those that all have, name by name."""
    rasterio = pytest.importorskip("rasterio")
    values = {"red": 10, "green": 20, "nir": 30, "quality": 99}
    for i, names in enumerate([("red", "green", "nir"), ("nir", "quality", "green", "red"), ("red", "green", "nir")]):
        profile = {"driver": "GTiff", "height": 64, "width": 48, "count": len(names), "dtype": "uint16"}
        place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
        with rasterio.open(tmp_path / f"{i}.tif", "w", **profile, **place) as file:
            file.descriptions = names
            for k, name in enumerate(names, start=1):
                file.write(np.full((64, 48), values[name] + i, np.uint16), k)
    csv = table(tmp_path / "d.csv", "image,label,split\n0.tif,a,train\n1.tif,b,train\n2.tif,a,val\n")
    report = check_manifest(csv)
    assert report.bands == ("red", "green", "nir")
    assert report.statistics is not None
    np.testing.assert_allclose(report.statistics.mean, [11, 21, 31])  # of 10, 11, 12 and so on
    assert any("model.input.band_names: [red, green, nir]" in text for text in report.proposals())
    assert "(of red green nir, in the files' units)" in "\n".join(report.lines())
    given = yaml.safe_load(write_config(report, csv, tmp_path / "run.yaml").read_text())["model"]
    assert given["region_encoder"]["in_channels"] == 3
    assert given["input"]["band_names"] == ["red", "green", "nir"]


def test_advice(tmp_path: Path) -> None:
    for name in ("i", "j"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.arange(64 * 48, dtype=np.uint16).reshape(64, 48))
    mask = np.zeros((64, 48), np.uint8)
    mask[0] = 3
    tifffile.imwrite(tmp_path / "m.tif", mask)
    report = check_manifest(table(tmp_path / "d.csv", "image,mask,split\ni.tif,m.tif,train\n"))
    assert "mask values 1, 2 do not occur: number classes 0, 1, 2, ... without gaps" in report.proposals()
    assert any("no row is in split val: training keeps the last model" in text for text in report.proposals())
    report = check_manifest(table(tmp_path / "e.csv", "image,mask,split\ni.tif,m.tif,val\n"))
    assert "no row is in split train: there is nothing to train on" in report.proposals()
    report = check_manifest(table(tmp_path / "d.csv", "image,label,split\ni.tif,a,train\nj.tif,b,val\n"))
    assert "class b does not occur in train: it cannot be learnt" in report.proposals()


def test_indices_of_a_palette_are_no_brightness(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture = Pillow.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "L").convert("P")
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "data.csv").write_text("image,label\na.png,x\nb.png,y\n")
    lines = "\n".join(check_manifest(tmp_path / "data.csv").lines())
    assert "indices of a palette would be learnt as brightness (2 images): model.input.rgb: true" in lines


def test_stacks_of_pages(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 32, 32), np.uint16), photometric="minisblack")
    report = check_manifest(table(tmp_path / "d.csv", "image,label\na.tif,x\n"))
    assert "only the first page of stacks is read (1 image): see gigaxt info" in report.proposals()


def test_labels_with_decimals(tmp_path: Path) -> None:
    for name in ("i", "j"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.arange(64 * 48, dtype=np.uint16).reshape(64, 48))
    for labels, expected in ((("1.50", "2"), True), (("1", "2"), False), (("a", "nan"), False)):
        text = "image,label\n" + "".join(f"{name}.tif,{label}\n" for name, label in zip("ij", labels, strict=True))
        said = check_manifest(table(tmp_path / "d.csv", text)).proposals()
        assert any("--target regression" in line for line in said) == expected


def test_names_of_classes_that_mean_the_same_or_nothing(tmp_path: Path) -> None:
    for name in "ijklm":
        tifffile.imwrite(tmp_path / f"{name}.tif", np.arange(64 * 48, dtype=np.uint16).reshape(64, 48))
    csv = table(tmp_path / "d.csv", "image,label\ni.tif,1\nj.tif,1.0\nk.tif,Cat\nl.tif,cat\nm.tif,NaN\n")
    said = check_manifest(csv).proposals()
    assert "classes 1, 1.0 differ in spelling alone and are learnt as 2: write them alike" in said
    assert "classes Cat, cat differ in spelling alone and are learnt as 2: write them alike" in said
    assert "NaN is learnt as a class: leave out the rows whose class is not known" in said


def test_an_image_in_several_rows(tmp_path: Path) -> None:
    for name in ("i", "j"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.arange(64 * 48, dtype=np.uint16).reshape(64, 48))
    report = check_manifest(table(tmp_path / "d.csv", "image,label\ni.tif,a\nj.tif,b\ni.tif,b\nj.tif,b\n"))
    said = "\n".join(report.proposals())
    assert f"1 image is in several rows that contradict each other, such as {tmp_path}/i.tif (lines 2, 4)" in said
    assert f"1 image is in several rows, so that it counts as often, such as {tmp_path}/j.tif (lines 3, 5)" in said


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ((0, 255), "only class 0 occurs in the masks, and 255 means not labelled: where 255 is a class, write it as 1"),
        ((255,), "no class occurs in the masks, and 255 means not labelled"),
        ((0,), "only class 0 occurs in the masks, and nothing can be learnt from that"),
    ],
)
def test_masks_of_one_class(pixels: tuple[int, ...], message: str, tmp_path: Path) -> None:
    mask = np.resize(np.array(pixels, np.uint8), (64, 48))
    for name in ("i", "m"):
        Pillow.fromarray(mask).save(tmp_path / f"{name}.png")
    report = check_manifest(table(tmp_path / "d.csv", "image,mask\ni.png,m.png\n"))
    assert any(message in text for text in report.proposals())
    assert ("255   50.000%  (not labelled)" in "\n".join(report.lines())) == (len(pixels) == 2)


def test_a_picture_in_colours_is_no_mask(tmp_path: Path) -> None:
    for name in ("i", "m"):
        Pillow.fromarray(np.resize(np.array([0, 255, 0, 0, 0, 0], np.uint8), (64, 48, 3))).save(
            tmp_path / f"{name}.png"
        )
    report = check_manifest(table(tmp_path / "d.csv", "image,mask\ni.png,m.png\n"))
    assert any(text.startswith("no label is 1 anywhere: the 3 bands") for text in report.proposals())


def test_masks_that_are_vectors(tmp_path: Path) -> None:
    """Class names are found in all files, written to the config, and the polygons are drawn over the picture."""
    square = [[[2, 2], [40, 2], [40, 30], [2, 30], [2, 2]]]
    lines = []
    for name, kind in (("a", "wood"), ("b", "lake")):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.full((64, 96, 3), 90, np.uint8), photometric="rgb")
        feature = {
            "type": "Feature",
            "properties": {"classification": {"name": kind}},
            "geometry": {"type": "Polygon", "coordinates": square},
        }
        (tmp_path / f"{name}.geojson").write_text(json.dumps([feature]))
        lines.append(f"{name}.tif,{name}.geojson,train")
    csv = table(tmp_path / "d.csv", "\n".join(["image,mask,split", *lines]))
    report = check_manifest(csv, class_field="classification.name", overlay_folder=tmp_path / "pictures")
    assert report.ok, report.lines()
    assert report.head is not None
    assert report.head.class_names == ["background", "lake", "wood"]
    assert report.mask.pixels == {0: 2 * (64 * 96 - 38 * 28), 1: 38 * 28, 2: 38 * 28}
    with Pillow.open(report.overlays[0]) as picture:
        assert (np.asarray(picture)[10, 10] != 90).any()
        assert (np.asarray(picture)[50, 50] == 90).all()
    text = write_config(report, csv, tmp_path / "run.yaml").read_text()
    head = run_config(read_yaml(tmp_path / "run.yaml")).model.head
    assert isinstance(head, SegmentConfig)
    assert (head.classes, head.class_names, head.class_field) == (3, report.head.class_names, "classification.name")
    assert "unlabelled: background" in text
    one_class = check_manifest(csv)
    assert one_class.mask_classes == 2
    assert any("--class-field" in line for line in one_class.lines())
    (tmp_path / "b.geojson").write_text("[]")
    broken = check_manifest(csv, class_field="classification.name")
    assert [(p.line, p.cause) for p in broken.mismatched] == [(3, "expected polygons, got none")]


@pytest.mark.parametrize("target", ["multi", "regression"])
def test_masks_of_labels_and_numbers(target: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "i.tif", np.full((64, 96, 3), 90, np.uint8), photometric="rgb")
    if target == "multi":
        bands = random.integers(0, 2, (64, 96, 2)).astype(np.uint8)
        bands[..., 1] = 0
        bands[0, 0] = 255
    else:
        bands = random.normal(20, 5, (64, 96, 2)).astype(np.float32)
        bands[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "m.tif", bands, planarconfig="contig", photometric="minisblack")
    csv = table(tmp_path / "d.csv", "image,mask,split\ni.tif,m.tif,train\n")
    report = check_manifest(csv, overlay_folder=tmp_path / "pictures")
    assert report.ok, report.lines()
    text = "\n".join(report.lines())
    assert f"1 row, segmentation, {target}" in text
    if target == "multi":
        assert report.mask.pixels == {0: int((bands[..., 0] == 1).sum()), 1: 0}
        assert "labels 1 (from 0) are nowhere 1" in text
    else:
        assert report.mask.numbers is not None
        np.testing.assert_allclose(report.mask.numbers.mean, np.nanmean(bands, (0, 1)), rtol=1e-5)
    write_config(report, csv, tmp_path / "run.yaml")
    head = run_config(read_yaml(tmp_path / "run.yaml")).model.head
    assert (head.classes, head.target) == (2, target)


def test_pictures_of_numbers_show_their_spread(tmp_path: Path) -> None:
    """Low numbers are blue and high ones yellow, whatever their unit; what is not known shows the image."""
    heights = np.full((40, 60), 1000.0, np.float32)
    heights[:, 30:], heights[30:] = 1400.0, np.nan
    tifffile.imwrite(tmp_path / "a.tif", np.full((40, 60, 3), 9, np.uint8), photometric="rgb")
    tifffile.imwrite(tmp_path / "h.tif", heights)
    (tmp_path / "x.csv").write_text("image,mask\na.tif,h.tif\n")
    report = check_manifest(tmp_path / "x.csv", overlay_folder=tmp_path / "pictures")
    with Pillow.open(report.overlays[0]) as picture:
        low, high, unknown = (picture.getpixel(at) for at in ((10, 10), (50, 10), (10, 35)))
    assert unknown == (9, 9, 9)
    assert low[2] > low[0]  # bluer
    assert high[1] > low[1]
    assert low != high
