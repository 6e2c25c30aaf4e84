"""iNaturalist 2018 as it is distributed, made into a manifest.

    FOLDER/train2018.json   val2018.json   categories.json   train_val2018/Reptilia/4264/....jpg

Van Horn et al.: The iNaturalist species classification and detection dataset (2018). One label an image. The names in
the first two files are obfuscated; `categories.json`, published later, has the real ones.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gigaxt.config import nearest
from gigaxt.errors import DataError
from gigaxt.replaced_file import replaced_file

FILES = {"train": "train2018.json", "val": "val2018.json"}
"""Split -> its file."""
CATEGORIES = "categories.json"
COLUMNS = ("image", "label", "label_id", "split", "supercategory")

# fmt: off
PUBLISHED_ORDER: tuple[int, ...] = (
    4264, 4344, 4347, 4290, 4293, 4267, 4527, 4339, 4462, 4265, 4436, 4517, 4386, 4501, 4528, 4450, 4420, 4378, 4463,
    4490, 4529, 4507, 4541, 4373, 4438, 4280, 4515, 4520, 4292, 4336, 4389, 4365, 4349, 4306, 4340, 4358, 4360, 4269,
    4362, 4421, 4474, 4401, 4341, 4318, 4468, 4295, 4357, 4300, 4399, 4441, 4508, 4455, 4496, 4296, 4473, 4404, 4382,
    4423, 4509, 4543, 4412, 4495, 4282, 4355, 4492, 4444, 4489, 4414, 4312, 4287, 4372, 4288, 4523, 4458, 4415, 4356,
    4429, 4407, 4370, 4297, 4387, 4342, 4330, 4521, 4394, 4408, 4491, 4410, 4319, 4419, 4532, 4427, 4400, 4442, 4374,
    4333, 4430, 4392, 4451, 4398, 4486, 4445, 4518, 4466, 4449, 4447, 4437, 4361, 4443, 4353, 4332, 4467, 4482, 4418,
    4484, 4338, 4498, 4481, 4542, 4307, 4526, 4422, 4274, 4519, 4278, 4343, 4272, 4439, 4540, 4477, 4337, 4487, 4346,
    4547, 4539, 4316, 4393, 4320, 4411, 4485, 4531, 4291, 4506, 4381, 4536, 4302, 4428, 4475, 4366, 4534, 4298, 4465,
    4493, 4380, 4513, 4377, 4275, 4310, 4546, 4397, 4270, 4354, 4432, 4367, 4375, 4537, 4403, 4311, 4516, 4266, 4416,
    4322, 4315, 4308, 4285, 4453, 4325, 4497, 4395, 4301, 4413, 4464, 4499, 4329, 4425, 4480, 4396, 4461, 4479, 4323,
    4284, 4334, 4503, 4350, 4276, 4525, 4351, 4452, 4345, 4273, 4512, 4471, 4331, 4327, 4314, 4324, 4530, 4388, 4426,
    4459, 4383, 4402, 4545, 4283, 4460, 4424, 4433, 4472, 4268, 4510, 4348, 4478, 4371, 4289, 4309, 4505, 4538, 4379,
    4409, 4476, 4385, 4488, 4294, 4522, 4286, 4277, 4368, 4363, 4313, 4369, 4303, 4304, 4524, 4454, 4384, 4391, 4483,
    4317, 4431, 4335, 4533, 4469, 4326, 4405, 4448, 4500, 4406, 4511, 4514, 4279, 4321, 4502, 4359, 4504, 4434, 4299,
    4435, 4281, 4390, 4364, 4535, 4494, 4271, 4328, 4352, 4305, 4446, 4544, 4440, 4417, 4376, 4456, 4457, 4470,
)
# fmt: on
"""Category ids of Reptilia in the order in which the published xT models have their classes."""


class Category(NamedTuple):
    """A species."""

    id: int
    name: str
    supercategory: str


class Photo(NamedTuple):
    """An image and what is on it."""

    id: int
    """Of the image, in its JSON."""
    path: Path
    category: int


def read_categories(path: str | Path) -> dict[int, Category]:
    """The categories of a JSON file, by id: those of categories.json, or of a file with images and annotations.

    Raises:
        DataError: the file is missing, is no such JSON, or has an id or a name twice.
    """
    path = Path(path)
    data = _read_json(path)
    if isinstance(data, dict):  # categories.json is a bare list
        data = _section(path, data, "categories")
    found: dict[int, Category] = {}
    names: dict[str, int] = {}
    for i, entry in enumerate(_entries(path, "categories", data)):
        number = _value(f"{path}: categories[{i}]", entry, "id", int)
        here = f"{path}: category {number}"
        category = Category(number, _value(here, entry, "name", str), _value(here, entry, "supercategory", str))
        if category.id in found:
            raise DataError(f"{path}: category {category.id} is there twice; keep one")
        if category.name in names:
            raise DataError(
                f"{path}: categories {names[category.name]} and {category.id} are both named {category.name!r}; "
                "classes are told apart by their names"
            )
        found[category.id], names[category.name] = category, category.id
    if not found:
        raise DataError(f"{path}: expected categories, got none")
    return found


def chosen(
    categories: Mapping[int, Category], supercategories: Sequence[str], where: str = CATEGORIES
) -> dict[int, Category]:
    """The categories of some supercategories, such as Reptilia; all where none is named.

    Raises:
        DataError: there is no such supercategory.
    """
    known = sorted({category.supercategory for category in categories.values()})
    for name in supercategories:
        if name not in known:
            raise DataError(f"{where}: no supercategory {name!r}{nearest(name, known)}")
    wanted = set(supercategories) or set(known)
    return {key: category for key, category in categories.items() if category.supercategory in wanted}


def label_ids(order: str | Path, categories: Mapping[int, Category]) -> dict[int, int]:
    """What orders the classes: category id -> number.

    Args:
        order: `ids`: by category id; `xt`: as the published xT models have them (Reptilia only); else a JSON file
            {category id: label}, such as the release's meta/category_label_reptilia_map.json.
        categories: those that need a number.

    Raises:
        DataError: a category without a number, or a file that is no such map.
    """
    if str(order) == "ids":
        return {key: key for key in categories}
    if str(order) == "xt":
        numbers, where = {key: label for label, key in enumerate(PUBLISHED_ORDER)}, "the published order"
    else:
        numbers, where = read_labels(Path(order)), str(order)
    for key, category in categories.items():
        if key not in numbers:
            raise DataError(f"{where}: category {key}, {category.name} ({category.supercategory}), has no label in it")
    return {key: numbers[key] for key in categories}


def read_labels(path: Path) -> dict[int, int]:
    """A JSON map of category ids to labels.

    Raises:
        DataError: the file is missing, is no such JSON, or gives two categories one label.
    """
    data = _read_json(path)
    if not isinstance(data, dict) or not data:
        raise DataError(f'{path}: expected category ids with their labels, such as {{"4264": 0}}')
    labels: dict[int, int] = {}
    owners: dict[int, int] = {}
    for key, label in data.items():
        if not key.isdecimal() or type(label) is not int:
            raise DataError(f"{path}: expected category ids with their labels, got {key!r}: {label!r}")
        labels[int(key)] = label
        if owners.setdefault(label, int(key)) != int(key):
            raise DataError(f"{path}: categories {owners[label]} and {key} have the same label {label}")
    return labels


def read_photos(path: str | Path, categories: Mapping[int, Category]) -> list[Photo]:
    """Every image of a split once, in the order of its file; the images themselves are not touched.

    Args:
        path: train2018.json or val2018.json; image paths are relative to its folder.
        categories: all of them, not only those that are of interest.

    Raises:
        DataError: the file is missing or no such JSON; ids that occur twice, or that stand for nothing.
    """
    path = Path(path)
    data = _read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object with images and annotations, got {type(data).__name__}")
    files = _files(path, data)
    labels: dict[int, int] = {}
    for i, entry in enumerate(_entries(path, "annotations", _section(path, data, "annotations"))):
        here = f"{path}: annotation {entry.get('id', f'number {i} (from 0)')}"
        image, category = _value(here, entry, "image_id", int), _value(here, entry, "category_id", int)
        if image not in files:
            raise DataError(f"{here}: image_id is {image}, but there is no image with this id")
        if category not in categories:
            raise DataError(f"{here}: category_id is {category}, but {CATEGORIES} has no such id")
        if image in labels:
            raise DataError(f"{path}: image {image} has two annotations, of categories {labels[image]} and {category}")
        labels[image] = category
    for image in files:
        if image not in labels:
            raise DataError(f"{path}: image {image} has no annotation")
    return [Photo(image, file, labels[image]) for image, file in files.items()]


def write_manifest(
    folder: str | Path,
    csv_path: str | Path,
    *,
    supercategories: Sequence[str] = (),
    order: str | Path = "ids",
) -> dict[str, int]:
    """Write a CSV of the training and validation images, for `gigaxt train`, `eval`, `check` and `predict`.

    Columns: `image`, `label` (the category's name), `label_id` (see `label_ids`), `split` (train, val),
    `supercategory`. Images in the CSV's folder or below have relative paths.

    Args:
        folder: with the files that are listed at the top of this module.
        csv_path: where to write; an older file is replaced once the new one is complete.
        supercategories: such as ["Reptilia"]; none: all.
        order: of the classes; see `label_ids`.

    Returns:
        Rows of each split, and `classes`.

    Raises:
        DataError: names the file and the id where something is missing, damaged, or does not fit.
    """
    folder, csv_path = Path(folder), Path(csv_path)
    categories = categories_of(folder)
    wanted = chosen(categories, supercategories, str(folder / CATEGORIES))
    numbers = label_ids(order, wanted)
    rows: list[tuple[str, ...]] = []
    counts = {}
    owners: dict[Path, str] = {}
    for split, name in FILES.items():
        photos = [photo for photo in read_photos(folder / name, categories) if photo.category in wanted]
        check_images(folder / name, photos)
        for photo in photos:
            owner = f"{name} image {photo.id}"
            if owners.setdefault(photo.path, owner) != owner:
                raise DataError(f"{folder}: {owners[photo.path]} and {owner} are the same file {photo.path}")
            category = wanted[photo.category]
            shown = _relative(photo.path, csv_path.parent)
            rows.append((shown, category.name, str(numbers[category.id]), split, category.supercategory))
        counts[split] = len(photos)
    _write(csv_path, rows)
    return {**counts, "classes": len({row[1] for row in rows})}


def categories_of(folder: Path) -> dict[int, Category]:
    """Those of categories.json; where it is not there, those beside the images of a split, with obfuscated names."""
    files = [folder / name for name in (CATEGORIES, *FILES.values())]
    return read_categories(next((file for file in files if file.exists()), files[0]))


def check_images(path: Path, photos: Sequence[Photo]) -> None:
    """Refuse photos of which there are none, or whose files are not there.

    Raises:
        DataError: names the JSON, and id and file of the first that is missing.
    """
    if not photos:
        raise DataError(f"{path}: none of its images is of the categories that are asked for")
    missing = [photo for photo in photos if not photo.path.is_file()]
    if missing:
        raise DataError(
            f"{path}: image {missing[0].id}: {missing[0].path} does not exist ({len(missing)} of {len(photos)} images "
            f"are missing); unpack train_val2018.tar.gz in {path.parent}"
        )


def _files(path: Path, data: dict[str, Any]) -> dict[int, Path]:
    """Image id -> file."""
    files: dict[int, Path] = {}
    for i, entry in enumerate(_entries(path, "images", _section(path, data, "images"))):
        image = _value(f"{path}: images[{i}]", entry, "id", int)
        if image in files:
            raise DataError(f"{path}: image {image} is there twice; keep one")
        files[image] = path.parent / _value(f"{path}: image {image}", entry, "file_name", str)
    return files


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read the JSON: {getattr(error, 'strerror', None) or error}") from error


def _section(path: Path, data: dict[str, Any], key: str) -> Any:
    if key not in data:
        raise DataError(f"{path}: expected `{key}` in it, as in iNaturalist 2018; got {', '.join(data) or 'nothing'}")
    return data[key]


def _entries(path: Path, name: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected `{name}` to be a list, got {type(entries).__name__}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: {name}[{i}]: expected keys and values, got {entry!r}")
    return entries


def _value(here: str, entry: dict[str, Any], key: str, kind: type) -> Any:
    value = entry.get(key)
    if type(value) is not kind or value == "":
        expected = "a whole number" if kind is int else "a text"
        raise DataError(f"{here}: expected `{key}` to be {expected}, got {value!r}")
    return value


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _write(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    try:
        with replaced_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            table.writerows(rows)
    except OSError as error:
        raise DataError(f"{path}: cannot write the CSV: {error.strerror or error}") from error
