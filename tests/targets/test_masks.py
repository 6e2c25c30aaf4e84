"""Masks brought onto the grid of their image: rasters by their transform, vectors drawn, limits of what is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gigaxt import ConfigError, DataError
from gigaxt.augment import dihedral
from gigaxt.datasets.manifest import Manifest
from gigaxt.image.base import Image
from gigaxt.image.memory import ArrayImage
from gigaxt.image.views import Cropped, resample
from gigaxt.nn.heads import SegmentConfig
from gigaxt.shapes.polygons import Polygon
from gigaxt.targets.base import MaskTarget
from gigaxt.targets.masks import class_number, field_values, open_mask
from gigaxt.targets.vector_mask import VectorMask, Within
from gigaxt.targets.vectors import is_vector, read_features
from gigaxt.tasks import Segmentation

UTM = "EPSG:32633"
TWO = SegmentConfig(classes=2)
KINDS = SegmentConfig(classes=3, class_names=["other", "wood", "lake"], class_field="kind")


def image_of(height: int, width: int, *, crs: str | None = UTM, pixel: float = 10.0, channels: int = 3) -> ArrayImage:
    """An image whose upper left corner is (500,000 m, 5,000,000 m)."""
    image = ArrayImage(np.ones((height, width, channels), np.uint8), name="scene.tif")
    if crs is not None:
        image.crs, image.transform = crs, (pixel, 0.0, 500_000.0, 0.0, -pixel, 5_000_000.0)
    return image


def raster(array: Any, transform: Any, crs: str | None = UTM, nodata: float | None = None) -> ArrayImage:
    mask = ArrayImage(np.asarray(array), nodata=nodata, name="mask.tif")
    mask.crs, mask.transform = crs, transform
    return mask


def whole(mask: Image) -> NDArray[Any]:
    pixels, valid = mask.read_valid(0, 0, mask.width, mask.height)
    assert pixels.shape[2] == 1
    return np.where(valid, pixels[..., 0].astype(np.int64), -1)


def in_windows(mask: Image, side: int) -> NDArray[Any]:
    """The same, window by window of a size that divides nothing; windows reach over the border."""
    found = np.full((mask.height + side, mask.width + side), -9)
    for y in range(0, mask.height, side):
        for x in range(0, mask.width, side):
            pixels, valid = mask.read_valid(x, y, side, side)
            found[y : y + side, x : x + side] = np.where(valid, pixels[..., 0].astype(np.int64), -1)
    return found[: mask.height, : mask.width]


def geojson(path: Path, *features: tuple[Any, Any], crs: str | None = None, kind: str = "Polygon") -> Path:
    data: dict[str, Any] = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": properties, "geometry": {"type": kind, "coordinates": coordinates}}
            for coordinates, properties in features
        ],
    }
    if crs is not None:
        data["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(data))
    return path


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


# Rasters.


def test_a_mask_of_half_the_pixel_size_and_another_offset() -> None:
    """5 m pixels over 10 m ones, two pixels further left and one higher: each centre is on a corner of four."""
    numbers = np.arange(30 * 40, dtype=np.int32).reshape(30, 40)
    mask = raster(numbers, (5.0, 0, 499_990.0, 0, -5.0, 5_000_005.0))
    found = whole(open_mask(mask, image_of(12, 17), TWO))
    rows, cols = 2 * np.arange(12) + 2, 2 * np.arange(17) + 3  # of four, the one below and to the right
    np.testing.assert_array_equal(found, numbers[rows[:, None], cols])
    np.testing.assert_array_equal(in_windows(open_mask(mask, image_of(12, 17), TWO), 5), found)


def test_a_coarse_mask_that_covers_a_part() -> None:
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    mask = raster(numbers, (40.0, 0, 500_020.0, 0, -40.0, 4_999_970.0), nodata=4)
    found = whole(open_mask(mask, image_of(12, 17), TWO))
    expected = np.full((12, 17), -1)
    expected[3:11, 2:14] = numbers.repeat(4, 0).repeat(4, 1)
    expected[expected == 4] = -1
    np.testing.assert_array_equal(found, expected)


def test_a_mask_with_the_south_on_top() -> None:
    numbers = np.arange(12 * 17, dtype=np.uint8).reshape(12, 17)
    mask = raster(numbers[::-1], (10.0, 0, 500_000.0, 0, 10.0, 4_999_880.0))
    np.testing.assert_array_equal(whole(open_mask(mask, image_of(12, 17), TWO)), numbers)


def test_a_mask_on_the_same_grid_is_left_as_it_is() -> None:
    mask = raster(np.zeros((12, 17), np.uint8), (10.0, 0, 500_000.000001, 0, -10.0, 5_000_000.0))
    assert open_mask(mask, image_of(12, 17), TWO) is mask
    same_size = ArrayImage(np.zeros((12, 17), np.uint8))
    assert open_mask(same_size, image_of(12, 17), TWO) is same_size


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            raster(np.zeros((6, 8), np.uint8), None, None),
            r"has 8 x 6 px, its image scene.tif has 17 x 12, and the mask",
        ),
        (raster(np.zeros((12, 17), np.uint8), (10.0, 0, 5e5, 0, -10.0, 5e6), "EPSG:32634"), "gdalwarp -r near -t_srs"),
        (raster(np.zeros((12, 17), np.uint8), (10.0, 0, 6e5, 0, -10.0, 5e6)), "does not overlap its image"),
    ],
)
def test_masks_that_do_not_fit(mask: Image, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_mask(mask, image_of(12, 17), TWO)


# Vectors.


def random_polygons(random: Any, count: int, size: float) -> list[Polygon]:
    """Stars around random places, every third with a hole; they overlap, and some lie outside."""
    found = []
    for i in range(count):
        angles = np.sort(random.random(12)) * 2 * np.pi
        radius, centre = random.uniform(2, size / 4, 12), random.uniform(-size / 8, size * 1.1, 2)
        ring = centre + radius[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
        found.append([ring, centre + 0.5 * (ring - centre)] if i % 3 == 0 else [ring])
    return found


@pytest.mark.parametrize(("height", "width"), [(300, 523), (40, 30)])
def test_drawn_as_rasterio_does_and_alike_in_every_window(height: int, width: int) -> None:
    features = pytest.importorskip("rasterio.features")
    polygons = random_polygons(np.random.default_rng(0), 60, max(height, width))
    numbers = [1 + i % 5 for i in range(60)]
    image = image_of(height, width)
    mask = VectorMask("x", polygons, numbers, image, bands=1, labels=False, empty=0, dtype="uint8")
    shapes = [
        ({"type": "Polygon", "coordinates": [[*ring.tolist(), ring[0].tolist()] for ring in polygon]}, number)
        for polygon, number in zip(polygons, numbers, strict=True)
    ]
    expected = features.rasterize(shapes, out_shape=(height, width), fill=0, dtype="uint8")
    assert len(np.unique(expected)) == 6
    np.testing.assert_array_equal(whole(mask), expected)
    for side in (64, 37, 300):
        np.testing.assert_array_equal(in_windows(mask, side), expected)


def test_labels_may_overlap() -> None:
    """Each band is drawn from its own polygons; where there is none at all, pixels may be unknown."""
    square, other = ([np.array(box(*corners))] for corners in ((1, 1, 5, 4), (3, 2, 8, 6)))
    for empty in (0, 255):
        mask = VectorMask(
            "x", [square, other], [1, 0], image_of(7, 9), bands=2, labels=True, empty=empty, dtype="uint8"
        )
        pixels = mask.read(0, 0, 9, 7)
        expected = np.zeros((7, 9, 2), np.uint8)
        expected[1:4, 1:5, 1], expected[2:6, 3:8, 0] = 1, 1
        expected[~expected.any(axis=2)] = empty
        np.testing.assert_array_equal(pixels, expected)


def test_views_of_a_drawn_mask_are_those_of_its_raster() -> None:
    """Turned, cropped and at other pixels, as augmentation and the model's pixel size make it."""
    polygons = random_polygons(np.random.default_rng(1), 20, 90)
    mask = VectorMask(
        "x", polygons, list(range(1, 21)), image_of(70, 90), bands=1, labels=False, empty=0, dtype="uint8"
    )
    limited = Within(mask, random_polygons(np.random.default_rng(2), 8, 90))
    pixels = whole(limited)
    assert 0.1 < (pixels < 0).mean() < 0.9
    same = ArrayImage(np.where(pixels < 0, 77, pixels).astype(np.uint8), nodata=77)
    for k in range(8):
        for change in (
            lambda x, k=k: dihedral(x, k),
            lambda x, k=k: dihedral(Cropped(x, 11, 5, 40, 33), k),
            lambda x, k=k: dihedral(resample(x, 1.7, 0.6, nearest=True), k),
        ):
            np.testing.assert_array_equal(whole(change(limited)), whole(change(same)))
    target = MaskTarget(limited).turned(5).cropped(3, 4, 20, 30).resampled(2.0, 2.0)
    reference = MaskTarget(same).turned(5).cropped(3, 4, 20, 30).resampled(2.0, 2.0)
    drawn, expected = target.draw(0, 0, 12, 12), reference.draw(0, 0, 12, 12)
    np.testing.assert_array_equal(drawn["valid"], expected["valid"])
    np.testing.assert_array_equal(drawn["target"][drawn["valid"]], expected["target"][drawn["valid"]])


def test_classes_by_name_and_number(tmp_path: Path) -> None:
    """In px where image and file have no CRS; a later polygon lies on top; holes show what is below."""
    path = geojson(
        tmp_path / "labels.geojson",
        ([box(1, 1, 9, 9)], {"kind": "wood"}),
        ([box(2, 2, 8, 8), box(4, 4, 6, 6)], {"kind": 2}),
    )
    assert is_vector(path)
    image = image_of(12, 11, crs=None)
    expected = np.zeros((12, 11), int)
    expected[1:9, 1:9] = 1
    expected[2:8, 2:8] = 2
    expected[4:6, 4:6] = 1
    np.testing.assert_array_equal(whole(open_mask(path, image, KINDS)), expected)
    unknown = SegmentConfig(classes=3, class_names=["other", "wood", "lake"], class_field="kind", unlabelled="ignore")
    np.testing.assert_array_equal(whole(open_mask(path, image, unknown)), np.where(expected == 0, 255, expected))
    assert field_values(path, "kind", image) == [2, "wood"]


def test_qupath_annotations(tmp_path: Path) -> None:
    """A bare list of features in px, with the class in a nested property."""
    feature = {
        "type": "Feature",
        "id": "1",
        "geometry": {"type": "MultiPolygon", "coordinates": [[box(0, 0, 2, 2)], [box(4, 4, 6, 6)]]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }
    path = tmp_path / "slide.geojson"
    path.write_text(json.dumps([feature]))
    head = SegmentConfig(classes=2, class_names=["other", "Tumor"], class_field="classification.name")
    found = whole(open_mask(path, image_of(7, 7, crs=None), head))
    assert found.sum() == 8
    assert (found[:2, :2] == 1).all()
    assert (found[4:6, 4:6] == 1).all()


@pytest.mark.parametrize("form", ["lon_lat", "other_crs", "gpkg", "shp"])
def test_reprojected_to_the_image(form: str, tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    features = pytest.importorskip("rasterio.features")
    from shapely.geometry import Polygon as Shape

    image = image_of(80, 120)
    random = np.random.default_rng(0)
    in_px = random_polygons(random, 12, 120)
    a, _, c, _, e, f = image.transform or ()
    metres = [Shape(*[[(a * x + c, e * y + f) for x, y in ring] for ring in [p[0]]], []) for p in in_px]
    frame = geopandas.GeoDataFrame({"kind": ["wood", "lake"] * 6}, geometry=metres, crs=UTM)
    path = tmp_path / {"gpkg": "labels.gpkg", "shp": "labels.shp"}.get(form, "labels.geojson")
    there = frame.to_crs({"lon_lat": "EPSG:4326", "other_crs": "EPSG:3857", "gpkg": "EPSG:3035", "shp": UTM}[form])
    if path.suffix == ".geojson":
        coordinates = [[list(shape.exterior.coords)] for shape in there.geometry]
        rows = [(c, {"kind": kind}) for c, kind in zip(coordinates, there.kind, strict=True)]
        geojson(path, *rows, crs=None if form == "lon_lat" else "urn:ogc:def:crs:EPSG::3857")
    else:
        there.to_file(path)
    assert is_vector(path)
    shapes = [(shape, 1 + i % 2) for i, shape in enumerate(frame.geometry)]
    expected = features.rasterize(shapes, out_shape=(80, 120), transform=_affine(image), fill=0, dtype="uint8")
    found = whole(open_mask(path, image, KINDS))
    assert (found != expected).mean() < 1e-3  # edges are straight in the CRS that they were drawn in
    assert 0.1 < (found > 0).mean() < 0.9


def _affine(image: Image) -> Any:
    import rasterio

    assert image.transform is not None
    return rasterio.Affine(*image.transform)


def test_the_images_own_crs_needs_no_pyproj(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyproj", None)
    corners = [box(500_010, 4_999_990, 500_030, 4_999_970)]
    path = geojson(tmp_path / "a.geojson", (corners, {}), crs=UTM)
    found = whole(open_mask(path, image_of(5, 5), TWO))
    assert found.sum() == 4
    assert (found[1:3, 1:3] == 1).all()
    other = geojson(tmp_path / "b.geojson", (corners, {}), crs="EPSG:32634")
    with pytest.raises(DataError, match=r"pip install 'gigaxt\[geo\]'"):
        open_mask(other, image_of(5, 5), TWO)


@pytest.mark.parametrize(
    ("content", "image", "message"),
    [
        ({"kind": "Point", "c": [1, 1]}, None, r"feature 1: expected a Polygon or MultiPolygon, got Point.*buffer"),
        ({"kind": "LineString", "c": [[0, 0], [1, 1]]}, None, "got LineString"),
        ({"p": {"kynd": "wood"}}, None, r"expected a property `kind`, got none; did you mean `kynd`"),
        ({"p": {"kind": None}}, None, "feature 1: expected a property `kind`"),
        ({"p": {"kind": "lakes"}}, None, r"`kind` is 'lakes', which is no class of the model; did you mean `lake`"),
        ({"p": {"kind": 3}}, None, r"`kind` is 3: expected a class from 0 to 2"),
        ({"c": [box(20, 20, 30, 30)]}, None, r"none of its polygons is on scene\.tif.* but x 20 to 30"),
        ({"crs": UTM}, None, r"is in EPSG:32633, but scene\.tif has no CRS"),
        ({}, UTM, "none of its polygons is on"),  # a degree east of Africa
        ({"c": [box(500_000, 5e6, 500_010, 4_999_990)]}, UTM, "longitude and latitude, but coordinates reach 500010"),
        ({"empty": True}, None, "expected polygons, got none"),
    ],
)
def test_bad_vectors(content: dict[str, Any], image: str | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("pyproj")
    feature = (content.get("c", [box(1, 1, 4, 4)]), content.get("p", {"kind": "wood"}))
    features = [] if content.get("empty") else [feature]
    path = geojson(tmp_path / "a.geojson", *features, crs=content.get("crs"), kind=content.get("kind", "Polygon"))
    with pytest.raises(DataError, match=message):
        open_mask(path, image_of(12, 11, crs=image), KINDS)


def test_bad_files(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    from shapely.geometry import LineString
    from shapely.geometry import box as rectangle

    bad = tmp_path / "bad.geojson"
    bad.write_text("{")
    with pytest.raises(DataError, match=r"bad\.geojson: expected GeoJSON"):
        open_mask(bad, image_of(9, 9), TWO)
    frame = geopandas.GeoDataFrame({"kind": ["wood"]}, geometry=[rectangle(5e5, 4_999_900, 500_050, 5e6)], crs=UTM)
    two = tmp_path / "two.gpkg"
    frame.to_file(two, layer="a")
    frame.to_file(two, layer="b")
    with pytest.raises(DataError, match="expected one layer, got a, b"):
        open_mask(two, image_of(9, 9), KINDS)
    one = tmp_path / "one.gpkg"
    frame.rename(columns={"kind": "class"}).to_file(one)
    with pytest.raises(DataError, match="expected a field `kind`, got none"):
        open_mask(one, image_of(9, 9), KINDS)
    line = tmp_path / "line.gpkg"
    frame.assign(geometry=[LineString([(5e5, 5e6), (500_050, 4_999_950)])]).to_file(line)
    with pytest.raises(DataError, match="got LineString"):
        open_mask(line, image_of(9, 9), KINDS)
    far = tmp_path / "far.gpkg"
    frame.set_geometry(frame.translate(1e5)).to_file(far)
    with pytest.raises(DataError, match=r"none of its polygons is on scene\.tif"):
        open_mask(far, image_of(9, 9), KINDS)
    broken = tmp_path / "broken.gpkg"
    broken.write_bytes(one.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"broken\.gpkg"):
        open_mask(broken, image_of(9, 9), KINDS)


def test_only_what_is_near_is_read(tmp_path: Path) -> None:
    """Of a large GeoPackage in another CRS: the polygons on the image and few beside it."""
    geopandas = pytest.importorskip("geopandas")
    from shapely.geometry import box as rectangle

    shapes = [rectangle(500_000 + 1000 * i, 4_999_500, 500_500 + 1000 * i, 4_999_900) for i in range(200)]
    frame = geopandas.GeoDataFrame({"kind": ["wood"] * 200}, geometry=shapes, crs=UTM).to_crs("EPSG:3035")
    frame.to_file(tmp_path / "many.gpkg")
    image = image_of(100, 250)  # 2.5 km: three of them
    found = read_features(tmp_path / "many.gpkg", "kind", near=image)
    assert 3 <= len(found.polygons) <= 5
    assert whole(open_mask(tmp_path / "many.gpkg", image, KINDS)).sum() == pytest.approx(3 * 50 * 40, rel=0.02)


def test_polygons_without_a_field() -> None:
    with pytest.raises(DataError, match=r"no class of the model; set model\.head\.class_names"):
        class_number("wood", SegmentConfig(classes=2, class_field="kind"), "a.geojson")
    assert class_number(1.0, KINDS, "a") == 1
    assert class_number("2", KINDS, "a") == 2


def test_several_classes_need_a_field(tmp_path: Path) -> None:
    path = geojson(tmp_path / "a.geojson", ([box(1, 1, 4, 4)], {}))
    image = image_of(9, 9, crs=None)
    with pytest.raises(ConfigError, match=r"model\.head\.class_field"):
        open_mask(path, image, SegmentConfig(classes=3))
    with pytest.raises(DataError, match="numbers are learnt from rasters"):
        open_mask(path, image, SegmentConfig(classes=1, target="regression"))
    label = open_mask(path, image, SegmentConfig(classes=1, target="multi"))
    assert label.read(0, 0, 9, 9).sum() == 9


def test_the_aoi_limits_what_is_known(tmp_path: Path) -> None:
    """A column of the manifest; of a raster mask, and of a drawn one. Balanced weights count inside only."""
    import tifffile

    for name in "abc":
        tifffile.imwrite(tmp_path / f"{name}.tif", np.ones((20, 30, 3), np.uint8), photometric="rgb")
    tifffile.imwrite(tmp_path / "mask.tif", np.ones((20, 30), np.uint8))
    geojson(tmp_path / "labels.geojson", ([box(0, 0, 15, 20)], {}))
    geojson(tmp_path / "aoi.geojson", ([box(10, 5, 20, 15)], {}))
    (tmp_path / "data.csv").write_text(
        "image,mask,aoi,split\na.tif,mask.tif,aoi.geojson,train\nb.tif,labels.geojson,aoi.geojson,val\n"
        "c.tif,mask.tif,,test\n"
    )
    manifest = Manifest.read(tmp_path / "data.csv")
    assert manifest.missing_files() == []
    task = Segmentation(manifest, TWO)
    first, second, third = (task.target(row, image_of(20, 30, crs=None)) for row in manifest.rows)
    inside = np.zeros((20, 30), bool)
    inside[5:15, 10:20] = True
    for target in (first, second):
        np.testing.assert_array_equal(target.draw(0, 0, 30, 20)["valid"], inside)
    assert third.draw(0, 0, 30, 20)["valid"].all()
    assert [task.class_counts(name) for name in ("train", "val", "test")] == [[0, 100], [50, 50], [0, 600]]
    (tmp_path / "aoi.geojson").unlink()
    assert [path.name for _, path in manifest.missing_files()] == ["aoi.geojson"] * 2
