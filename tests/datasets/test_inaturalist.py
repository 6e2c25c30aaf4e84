from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gigaxt import DataError
from gigaxt.datasets.inaturalist import (
    PUBLISHED_ORDER,
    categories_of,
    label_ids,
    read_categories,
    read_labels,
    read_photos,
    write_manifest,
)
from gigaxt.datasets.manifest import Manifest
from inat_folder import SPECIES, TRAIN, VAL, edit, make_inat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inat").mkdir()
    return make_inat(tmp_path / "inat")


def test_published_order_is_the_released_map(fixtures: Path) -> None:
    released = read_labels(fixtures / "inat/xt_category_label_reptilia_map.json")
    assert {key: label for label, key in enumerate(PUBLISHED_ORDER)} == released
    assert sorted(PUBLISHED_ORDER) == list(range(4264, 4548))


def test_reptilia_by_sorted_ids(folder: Path, tmp_path: Path) -> None:
    counts = write_manifest(folder, tmp_path / "reptilia.csv", supercategories=["Reptilia"])
    assert counts == {"train": 3 * TRAIN, "val": 3 * VAL, "classes": 3}
    manifest = Manifest.read(tmp_path / "reptilia.csv")
    assert manifest.classes == tuple(SPECIES[key][1] for key in (4264, 4265, 4344))
    assert manifest.class_counts("train") == dict.fromkeys(manifest.classes, TRAIN)
    assert manifest.class_counts("val") == dict.fromkeys(manifest.classes, VAL)
    manifest.check_files()
    assert len({row.image.resolve() for row in manifest.rows}) == len(manifest.rows)
    assert not Path(manifest.rows[0].cells["image"]).is_absolute()
    assert {row.cells["supercategory"] for row in manifest.rows} == {"Reptilia"}
    for row in manifest.rows:
        assert SPECIES[int(row.image.parent.name)][1] == row.label


def test_several_or_all_supercategories_anywhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    csv = tmp_path / "elsewhere/all.csv"
    for supercategories in ((), ("Reptilia", "Aves")):
        assert write_manifest(folder, csv, supercategories=supercategories)["classes"] == 4
        manifest = Manifest.read(csv)
        manifest.check_files()
        assert manifest.classes[0] == "Turdus merula"
    assert write_manifest(folder, csv, supercategories=["Aves"])["train"] == TRAIN


def test_order_of_the_published_models(folder: Path, tmp_path: Path) -> None:
    write_manifest(folder, tmp_path / "xt.csv", supercategories=["Reptilia"], order="xt")
    manifest = Manifest.read(tmp_path / "xt.csv")
    assert manifest.classes == tuple(SPECIES[key][1] for key in (4264, 4344, 4265))
    ids = {row.label: int(row.cells["label_id"]) for row in manifest.rows}
    assert [ids[name] for name in manifest.classes] == [0, 1, 9]  # those of all 284
    with pytest.raises(DataError, match=r"category 3111, Turdus merula \(Aves\), has no label"):
        write_manifest(folder, tmp_path / "xt.csv", order="xt")
    (tmp_path / "own.json").write_text('{"4265": 1, "4264": 2, "4344": 0}')
    own = label_ids(tmp_path / "own.json", {key: c for key, c in categories_of(folder).items() if key > 4000})
    assert own == {4265: 1, 4264: 2, 4344: 0}


def test_names_without_categories_json(folder: Path) -> None:
    (folder / "categories.json").unlink()
    assert categories_of(folder)[4264].name == str(4264 * 7)
    (folder / "train2018.json").unlink()
    assert categories_of(folder)[4264].supercategory == "Reptilia"


def test_photos_are_in_the_order_of_the_file(folder: Path) -> None:
    photos = read_photos(folder / "val2018.json", categories_of(folder))
    listed = json.loads((folder / "val2018.json").read_text())["images"]
    assert [photo.id for photo in photos] == [entry["id"] for entry in listed]
    assert [int(photo.path.parent.name) for photo in photos] == [photo.category for photo in photos]


Change = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("categories.json", lambda d: d.append(d[0]), r"categories\.json: category 3111 is there twice"),
        ("categories.json", lambda d: d[0].update(name="Chelonia mydas"), "3111 and 4265 are both named"),
        ("categories.json", lambda d: d[1].pop("name"), "category 4265: expected `name` to be a text, got None"),
        ("categories.json", lambda d: d[1].pop("supercategory"), "category 4265: expected `supercategory`"),
        ("categories.json", lambda d: d[2].update(id="4264"), r"categories\[2\]: expected `id` to be a whole number"),
        ("categories.json", lambda d: d.pop(1), "category_id is 4265, but categories.json has no such id"),
        ("categories.json", lambda d: d.clear(), "expected categories, got none"),
        ("categories.json", lambda d: d.append(7), r"categories\[4\]: expected keys and values, got 7"),
        ("val2018.json", lambda d: d.pop("annotations"), r"val2018\.json: expected `annotations` in it"),
        ("val2018.json", lambda d: d.update(images={}), "expected `images` to be a list, got dict"),
        ("val2018.json", lambda d: d["images"].append(d["images"][0]), r"val2018\.json: image 1017 is there twice"),
        ("val2018.json", lambda d: d["images"].pop(0), "annotation 1017: image_id is 1017, but there is no image"),
        ("val2018.json", lambda d: d["images"][0].pop("file_name"), "image 1017: expected `file_name` to be a text"),
        ("val2018.json", lambda d: d["annotations"].pop(0), r"image 1024 has no annotation"),
        ("val2018.json", lambda d: d["annotations"].append(d["annotations"][0]), "image 1024 has two annotations"),
        ("val2018.json", lambda d: d["annotations"][0].update(category_id=9999), "annotation 1024: category_id is"),
        ("val2018.json", lambda d: d["annotations"][0].pop("image_id"), "annotation 1024: expected `image_id`"),
        ("val2018.json", lambda d: (d["images"].clear(), d["annotations"].clear()), "none of its images is of"),
        (
            "val2018.json",
            lambda d: d["images"][0].update(file_name=d["images"][1]["file_name"]),
            "val2018.json image 1017 and val2018.json image 1018 are the same file",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path, file: str, change: Change, message: str) -> None:
    edit(folder / file, change)
    with pytest.raises(DataError, match=message) as caught:
        write_manifest(folder, tmp_path / "all.csv")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("all.csv*"))


def test_missing_and_damaged_files(folder: Path, tmp_path: Path) -> None:
    csv = tmp_path / "all.csv"
    image = min((folder / "train_val2018/Reptilia/4344").glob("*.jpg"))
    image.rename(image.with_suffix(".gone"))
    with pytest.raises(DataError, match=rf"image \d+: {image} does not exist \(1 of 16 images are missing\)"):
        write_manifest(folder, csv)
    write_manifest(folder, csv, supercategories=["Aves"])  # the others are not asked for
    for text, message in (
        ('{"images": [', "cannot read the JSON: Expecting value"),
        ("[" * 100_000, "cannot read the JSON: maximum recursion"),
        ("[]", "expected a JSON object with images and annotations, got list"),
    ):
        (folder / "val2018.json").write_text(text)
        with pytest.raises(DataError, match=message):
            write_manifest(folder, csv, supercategories=["Aves"])
    (folder / "val2018.json").unlink()
    with pytest.raises(DataError, match=r"val2018\.json: cannot read the JSON: No such file"):
        write_manifest(folder, csv, supercategories=["Aves"])
    with pytest.raises(DataError, match="no supercategory 'Reptlia'; did you mean `Reptilia`"):
        write_manifest(folder, csv, supercategories=["Reptlia"])
    with pytest.raises(DataError, match=r"none/x\.csv: cannot write the CSV: No such file"):
        write_manifest(make_inat(folder), tmp_path / "none/x.csv")


def test_json_without_categories(folder: Path, tmp_path: Path) -> None:
    (folder / "categories.json").unlink()
    edit(folder / "train2018.json", lambda data: data.pop("categories"))
    with pytest.raises(DataError, match=r"train2018\.json: expected `categories` in it"):
        write_manifest(folder, tmp_path / "all.csv")
    (folder / "categories.json").write_text('{"species": []}')
    with pytest.raises(DataError, match=r"categories\.json: expected `categories` in it.*got species"):
        read_categories(folder / "categories.json")
    (folder / "categories.json").write_text("7")
    with pytest.raises(DataError, match="expected `categories` to be a list, got int"):
        read_categories(folder / "categories.json")


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', '{"1": "a"}', '{"1": true}', '{"1": 0, "2": 0}'])
def test_labels_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DataError, match=r"labels\.json: "):
        read_labels(tmp_path / "labels.json")
