"""What the training loop makes of an image before the model sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from gigaxt.augment import ColourAugmented, Dihedral
from gigaxt.datasets.manifest import Manifest
from gigaxt.image.views import Cropped
from gigaxt.nn.heads import SegmentConfig
from gigaxt.randaugment import RandAugmented, draw_operations
from gigaxt.tasks import Classification, Segmentation
from gigaxt.training.config import AugmentConfig
from gigaxt.training.data import Samples

ALL = AugmentConfig(mirror=True, crop_area=0.2, randaugment=9.0, colour=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two RGB pictures and a grey one, each with a mask that holds its red."""
    random = np.random.default_rng(0)
    labels, masks = ["image,label,split"], ["image,mask,split"]
    for i in range(3):
        pixels = random.integers(0, 250, (30 + i, 40, 3)).astype(np.uint8)
        picture = Pillow.fromarray(pixels[..., 0] if i == 2 else pixels)
        picture.save(tmp_path / f"{i}.png")
        Pillow.fromarray(pixels[..., 0]).save(tmp_path / f"m{i}.png")
        labels.append(f"{i}.png,{'ab'[i % 2]},train")
        masks.append(f"{i}.png,m{i}.png,train")
    (tmp_path / "labels.csv").write_text("\n".join(labels))
    (tmp_path / "masks.csv").write_text("\n".join(masks))
    return tmp_path


def classified(folder: Path, *, rgb: bool = False) -> Samples:
    manifest = Manifest.read(folder / "labels.csv")
    return Samples(manifest.cases("train"), Classification(manifest), rgb=rgb)


def test_changes_are_those_of_the_seed(folder: Path) -> None:
    samples = classified(folder)
    read = []
    for seed in (5, 5, 6):
        (image,) = samples.augmented(0, seed, ALL).images
        read.append((image.read(0, 0, image.width, image.height), getattr(image, "colour", None)))
    np.testing.assert_array_equal(read[0][0], read[1][0])
    np.testing.assert_array_equal(read[0][1], read[1][1])
    assert read[0][0].shape != read[2][0].shape
    assert samples.augmented(0, 5, AugmentConfig()).images == samples.plain(0).images


def test_order_of_the_changes(folder: Path) -> None:
    """Window, mirror image, RandAugment, colours: sizes are changed right above the window."""
    samples = classified(folder)
    images = [samples.augmented(0, seed, ALL).images[0] for seed in range(20)]
    turned = set()
    for seed, image in enumerate(images):
        assert isinstance(image, ColourAugmented)
        assert isinstance(image.base, RandAugmented)
        assert image.base.operations == draw_operations(seed, 9.0)
        below = image.base.base
        turned.add(isinstance(below, Dihedral))
        assert isinstance(below.base if isinstance(below, Dihedral) else below, Cropped)
    assert turned == {True, False}


def test_masks_are_cut_and_turned_alike(folder: Path) -> None:
    manifest = Manifest.read(folder / "masks.csv")
    samples = Samples(manifest.cases("train"), Segmentation(manifest, SegmentConfig(classes=250)))
    config = AugmentConfig(dihedral=True, crop_area=0.2)
    for seed in range(12):
        _, (image,), target = samples.augmented(0, seed, config)
        mask = target.mask
        assert (image.height, image.width) == (mask.height, mask.width)
        window = (0, 0, image.width, image.height)
        np.testing.assert_array_equal(image.read(*window)[..., 0], mask.read(*window)[..., 0])
        assert image.width * image.height < 30 * 40


def test_grey_pictures_are_read_as_rgb_where_asked(folder: Path) -> None:
    assert classified(folder).plain(2).images[0].channels == 1
    (image,) = classified(folder, rgb=True).augmented(2, 0, ALL).images
    assert image.channels == 3
