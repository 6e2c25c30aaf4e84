from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from gigaxt import draw
from gigaxt.image import open_image
from gigaxt.nn.heads import SegmentConfig
from gigaxt.pixel_answers import with_mask


def test_palette_is_fixed_and_distinct() -> None:
    colours = draw.class_palette(100)
    assert colours[0] == (0, 0, 0)
    assert colours[:5] == draw.class_palette(5)
    assert len(set(draw.class_palette(349))) == 349
    assert all(0 <= value <= 255 for colour in colours for value in colour)
    far = np.asarray(draw.class_palette(32), dtype=float)
    apart = np.sqrt(((far[:, None] - far[None]) ** 2).sum(axis=2))
    assert apart[np.triu_indices(32, 1)].min() > 60


def test_thumbnail_shows_small_images_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    np.testing.assert_array_equal(draw.thumbnail(open_image(pixels)), pixels[:, :, :3])
    grey = draw.thumbnail(open_image(pixels[:, :, :1]))
    np.testing.assert_array_equal(grey, np.repeat(pixels[:, :, :1], 3, axis=2))
    assert draw.thumbnail(open_image(pixels[:, :, :2])).shape == (40, 60, 3)


@pytest.mark.parametrize("strip_pixels", [1 << 24, 1000])
def test_thumbnail_of_a_large_image_is_bounded_and_averaged(monkeypatch, strip_pixels: int) -> None:
    monkeypatch.setattr(draw, "STRIP_PIXELS", strip_pixels)
    pixels = np.zeros((400, 200, 3), dtype=np.uint8)
    pixels[::2, ::2] = 200
    pixels[200:] = 80
    small = draw.thumbnail(open_image(pixels), max_px=50)
    assert small.shape == (50, 25, 3)
    assert (small[:25] == 50).all()
    assert (small[25:] == 80).all()


def test_thumbnail_stretches_what_is_not_uint8_and_blackens_nodata() -> None:
    pixels = np.linspace(0, 60000, 50 * 50).reshape(50, 50, 1).astype(np.float32)
    pixels[:5] = np.nan
    picture = draw.thumbnail(open_image(pixels))
    assert (picture[:5] == 0).all()
    assert picture[6, 0, 0] < 10
    assert picture[-1, -1, 0] == 255
    assert (np.diff(picture[:, 25, 0].astype(int)) >= 0).all()
    constant = draw.thumbnail(open_image(np.full((4, 4, 1), 7, dtype=np.uint16)))
    assert (constant == 0).all()


def test_mask_thumbnail_picks_values() -> None:
    mask = np.zeros((300, 300, 1), dtype=np.uint8)
    mask[150:] = 7
    small = draw.mask_thumbnail(open_image(mask), max_px=100)
    assert small.shape == (100, 100)
    assert set(np.unique(small)) == {0, 7}
    assert (small[:49] == 0).all()
    assert (small[51:] == 7).all()


def test_overlay_leaves_background_ignored_and_unknown_classes() -> None:
    picture = np.full((1, 5, 3), 100, dtype=np.uint8)
    values = np.array([[0, 1, 2, 255, -1]])
    result = draw.overlay_mask(picture, values, [(0, 0, 0), (200, 0, 0), (0, 0, 200)], opacity=0.5)
    assert result[0].tolist() == [[100] * 3, [150, 50, 50], [50, 50, 150], [100] * 3, [100] * 3]
    assert (picture == 100).all()


def test_outline_frames_kept_regions() -> None:
    picture = np.full((30, 50, 3), 200, dtype=np.uint8)
    keep = np.array([[True, False], [False, False]])
    result = draw.outline_regions(picture, keep, 25.6, (255, 0, 0))
    assert result[10, 10].tolist() == [200, 200, 200]
    assert result[10, 40].tolist() == [100, 100, 100]
    assert result[29, 10].tolist() == [100, 100, 100]
    for row, col in ((0, 10), (10, 0), (10, 25), (25, 10)):
        assert result[row, col].tolist() == [255, 0, 0]
    assert (draw.outline_regions(picture, np.zeros((2, 2), dtype=bool), 25.6) == 100).all()


def test_legend_holds_every_colour_or_says_how_many_are_left_out() -> None:
    picture = np.full((200, 100, 3), 9, dtype=np.uint8)
    colours = draw.class_palette(30)
    few = draw.with_legend(picture, ["background", "cross", "x" * 80], colours[:3])
    assert few.shape[0] == 200
    assert 100 < few.shape[1] < 450
    np.testing.assert_array_equal(few[:, :100], picture)
    for colour in colours[:3]:
        assert (few[:, 100:] == colour).all(axis=2).sum() >= 100
    many = draw.with_legend(picture, [f"class {i}" for i in range(30)], colours)
    assert many.shape[0] == 200
    assert (many[:, 100:] == colours[8]).all(axis=2).any()
    assert not (many[:, 100:] == colours[9]).all(axis=2).any()


def test_a_mask_over_a_picture_as_png(tmp_path: Path) -> None:
    image = open_image(np.full((60, 80, 3), 120, dtype=np.uint8))
    mask = np.zeros((60, 80, 1), dtype=np.uint8)
    mask[:30] = 2
    mask[0, 0] = 255
    path = draw.save_png(
        with_mask(draw.thumbnail(image), open_image(mask), SegmentConfig(classes=3)), tmp_path / "new" / "overlay.png"
    )
    with Pillow.open(path) as drawn:
        picture = np.asarray(drawn)
    assert picture.shape[0] == 60
    assert picture.shape[1] > 80
    assert (picture[40, :80] == 120).all()
    assert (picture[20, :80] == picture[20, 0]).all()
    assert (picture[20, 0] != 120).any()
