from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_release import released, section

import gigaxt
from gigaxt import DataError, ImageError
from gigaxt.datasets.inaturalist import PUBLISHED_ORDER
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.published import PublishedConfig
from gigaxt.xt_release.scores import TOP1, Score, class_names, measure, table_row, validation_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images in the layout of iNaturalist, six of them of the five labelled categories."""
    random, images, annotations = np.random.default_rng(0), [], []
    (tmp_path / "train_val2018" / "Reptilia").mkdir(parents=True)
    for i in range(7):
        name = f"train_val2018/Reptilia/{i}.jpg"
        pixels = random.integers(0, 256, (40 + 9 * i, 90 - 5 * i, 3)).astype(np.uint8)
        Image.fromarray(pixels if i else pixels[..., 0]).save(tmp_path / name)  # the first one is grey
        images.append({"id": 50 + i, "file_name": name, "width": 1, "height": 1})
        annotations.append({"id": i, "image_id": 50 + i, "category_id": 100 + i % 6})
    (tmp_path / "val2018.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    categories = [{"id": 100 + i, "name": f"species {i}", "supercategory": "Reptilia"} for i in range(6)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    (tmp_path / "labels.json").write_text(json.dumps({str(104 - label): label for label in range(5)}))
    return tmp_path


def test_images_and_their_labels(folder: Path) -> None:
    found = validation_images(folder, folder / "labels.json")
    assert [(path.stem, label) for path, label in found] == [
        ("0", 4), ("1", 3), ("2", 2), ("3", 1), ("4", 0), ("6", 4)
    ]  # fmt: skip


def test_score_is_that_of_single_answers(folder: Path, tmp_path: Path) -> None:
    model, _ = released(tmp_path, section(n_layer=1), data={"crop_size": 64})
    images = validation_images(folder, folder / "labels.json")
    right = 0
    with torch.no_grad():
        for path, label in images:
            pixels = np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)) / 255
            normed = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            tensor = torch.from_numpy(normed).float().permute(2, 0, 1)
            own = model([gigaxt.open_image(path, rgb=True)])
            torch.testing.assert_close(own, model(tensor[None]), rtol=0, atol=1e-5)
            right += int(model(tensor[None]).argmax() == label)
    seen: list[tuple[int, int]] = []
    score = measure(model, images, batch=4, progress=lambda *done: seen.append(done))
    assert score == Score(6, right, 6)  # five classes: always among the first five
    assert seen == [(4, 6), (6, 6)]


def test_interval() -> None:
    low, high = Score(852, 528, 700).interval()
    assert (low, high) == pytest.approx((58.66, 65.17), abs=0.01)


def test_damaged_data_sets(folder: Path) -> None:
    labels = folder / "labels.json"
    (folder / "train_val2018/Reptilia/3.jpg").write_bytes(b"\xff\xd8 no image")
    model, _ = released(folder, section(n_layer=1), data={"crop_size": 32})
    with pytest.raises(ImageError, match=r"3\.jpg: "):
        measure(model, validation_images(folder, labels))
    (folder / "train_val2018/Reptilia/3.jpg").unlink()
    with pytest.raises(DataError, match=r"image 53: .*3\.jpg does not exist \(1 of 6 images are missing\)"):
        validation_images(folder, labels)
    for text, message in {
        "{": "cannot read the JSON",
        "[]": "expected a JSON object with images",
        "{}": "expected `images` in it",
        '{"images": [], "annotations": []}': "none of its images",
    }.items():
        (folder / "val2018.json").write_text(text)
        with pytest.raises(DataError, match=message):
            validation_images(folder, labels)


def test_names_of_the_classes(folder: Path) -> None:
    names = class_names(folder / "categories.json", 5, folder / "labels.json")
    assert names == [f"species {4 - label}" for label in range(5)]
    with pytest.raises(DataError, match="the model has 4 classes, and the labels are 5, up to 4"):
        class_names(folder / "categories.json", 4, folder / "labels.json")
    with pytest.raises(DataError, match=r"categories\.json: category 4264, the model's class 0, is not in it"):
        class_names(folder / "categories.json", 284)
    categories = [{"id": key, "name": f"species {key}", "supercategory": "Reptilia"} for key in range(4264, 4548)]
    (folder / "categories.json").write_text(json.dumps(categories))
    names = class_names(folder / "categories.json", 284)
    assert names == [f"species {key}" for key in PUBLISHED_ORDER]


@pytest.mark.parametrize(
    ("backbone", "context", "side", "row"),
    [
        ("tiny", None, 256, "Swin-T 256"),
        ("tiny", None, 512, None),
        ("small", {"n_layer": 2}, 512, "Swin-S Hyper 512/256"),
        ("small", {"n_layer": 1}, 512, None),
        ("base", {"n_layer": 2, "in_context_patches": 128}, 512, "Swin-B XL 512/256"),
        ("large", {"n_layer": 4, "attention_method": "mamba"}, 512, "Swin-L Mamba 512/256"),
        ("large", {"n_layer": 4, "attention_method": "mamba"}, 256, None),
        ("tiny", {"n_layer": 2, "attention_method": "naive"}, 512, None),
    ],
)
def test_rows_of_the_table(backbone: str, context: dict[str, Any] | None, side: int, row: str | None) -> None:
    model = section(**{"hidden_size": 768, **context} if context else {})
    model |= {"backbone_class": f"swinv2_{backbone}_window16_256_timm", "backbone": {"input_size": 256}}
    assert table_row(model_config(PublishedConfig(model)), side) == row
    assert row is None or row in TOP1


def test_table_is_of_852_images() -> None:
    for percent in TOP1.values():
        right = percent * 8.52
        assert abs(right - round(right)) < 0.045, percent
