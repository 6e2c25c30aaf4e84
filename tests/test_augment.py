from __future__ import annotations

import pickle

import numpy as np
import pytest

from array_image import ArrayImage
from gigaxt.augment import (
    ColourAugmented,
    below_turns,
    colour_augmented,
    compose,
    dihedral,
    draw_augmentation,
    draw_crop,
    inverse,
    resample_below,
    turn,
)
from gigaxt.errors import ConfigError, ImageError
from gigaxt.image.views import resample

ELEMENTS = range(8)


def pyramid(channels: int = 2, **kwargs: object) -> ArrayImage:
    rng = np.random.default_rng(0)
    shapes = [(13, 22), (7, 11), (3, 5)]
    arrays = [rng.integers(0, 4, (h, w, channels), dtype=np.uint8) for h, w in shapes]
    return ArrayImage(*arrays, **kwargs)


def numpy_turn(array: np.ndarray, k: int) -> np.ndarray:
    """Independent of `turn`: the elements by name, as the module's text lists them."""
    return [
        lambda a: a,
        np.fliplr,
        np.flipud,
        lambda a: np.rot90(a, 2),
        lambda a: np.swapaxes(a, 0, 1),
        lambda a: np.rot90(a, -1),
        lambda a: np.rot90(a, 1),
        lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    ][k](array)


@pytest.mark.parametrize("k", ELEMENTS)
def test_every_window_of_every_level_equals_the_turned_whole(k: int) -> None:
    masks = tuple(np.random.default_rng(1).random(shape) < 0.5 for shape in [(13, 22), (7, 11), (3, 5)])
    image = pyramid(nodata=3, masks=masks)
    view = dihedral(image, k)
    assert (view.height, view.width) == numpy_turn(image.arrays[0], k).shape[:2]
    for level, array in enumerate(image.arrays):
        whole = numpy_turn(array, k)
        valid = numpy_turn(masks[level] & ~(array == 3).all(axis=2), k)
        height, width = whole.shape[:2]
        assert (view.levels[level].height, view.levels[level].width) == (height, width)
        padded = np.pad(whole, ((4, 4), (4, 4), (0, 0)), constant_values=3)
        padded_valid = np.pad(valid, 4)
        for x in range(-4, width, 3):
            for y in range(-4, height, 3):
                for w, h in [(1, 1), (3, 4), (width + 4 - x, 2)]:
                    if y + h > height + 4 or x + w > width + 4:
                        continue
                    window = (slice(y + 4, y + 4 + h), slice(x + 4, x + 4 + w))
                    pixels, mask = view.read_valid(x, y, w, h, level)
                    np.testing.assert_array_equal(pixels, padded[window])
                    np.testing.assert_array_equal(mask, padded_valid[window])
                    np.testing.assert_array_equal(view.read(x, y, w, h, level), padded[window])
                    np.testing.assert_array_equal(view.validity(x, y, w, h, level), padded_valid[window])


def test_one_decode_gives_pixels_and_validity() -> None:
    image = pyramid(nodata=0)
    dihedral(image, 6).read_valid(0, 0, 5, 5)
    assert len(image.windows) == 1


@pytest.mark.parametrize("k", ELEMENTS)
def test_inverse_and_composition_are_those_of_arrays(k: int) -> None:
    array = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(turn(array, k), numpy_turn(array, k))
    np.testing.assert_array_equal(turn(turn(array, k), inverse(k)), array)
    for then in ELEMENTS:
        np.testing.assert_array_equal(turn(array, compose(k, then)), turn(turn(array, k), then))


def test_views_of_views_are_one_view_and_undo_each_other() -> None:
    image = pyramid()
    for k in ELEMENTS:
        assert dihedral(dihedral(image, k), inverse(k)) is image
    nested = dihedral(dihedral(image, 5), 3)
    np.testing.assert_array_equal(
        nested.read(0, 0, nested.width, nested.height), np.rot90(np.rot90(image.arrays[0], -1), 2)
    )


@pytest.mark.parametrize("k", ELEMENTS)
def test_transform_and_pixel_size_follow_the_turn(k: int) -> None:
    image = pyramid()
    image.transform, image.crs, image.mpp = (10.0, 0.5, 500.0, -0.25, -20.0, 900.0), "EPSG:32633", (0.25, 0.5)
    view = dihedral(image, k)
    assert view.transform is not None
    assert view.gsd_m == pytest.approx(image.gsd_m if k < 4 else image.gsd_m[::-1])
    assert view.mpp == (image.mpp if k < 4 else image.mpp[::-1])

    def centres(transform: tuple[float, ...], height: int, width: int) -> np.ndarray:
        a, b, c, d, e, f = transform
        row, col = np.mgrid[:height, :width] + 0.5
        return np.stack([a * col + b * row + c, d * col + e * row + f], axis=-1)

    below = centres(image.transform, image.height, image.width)
    np.testing.assert_allclose(centres(view.transform, view.height, view.width), numpy_turn(below, k))


@pytest.mark.parametrize("k", ELEMENTS)
def test_a_lattice_found_below_turns_into_that_of_the_view(k: int) -> None:
    view = colour_augmented(dihedral(pyramid(1), k), [1], [0])
    rows, cols = np.array([0, 4, 8, view.height]), np.array([0, 9, view.width])
    below, row_edges, col_edges, turned_by = below_turns(view, rows, cols)
    sums = np.add.reduceat(
        np.add.reduceat(view.read(0, 0, view.width, view.height)[..., 0], rows[:-1], 0), cols[:-1], 1
    )
    array = below.read(0, 0, below.width, below.height)[..., 0]
    found = np.add.reduceat(np.add.reduceat(array, row_edges[:-1], 0), col_edges[:-1], 1)
    np.testing.assert_array_equal(turn(found, turned_by), sums)


def test_errors_keep_the_name_of_the_file() -> None:
    view = dihedral(pyramid(), 5)
    for level in (-1, 3):
        with pytest.raises(ImageError, match="array: expected a level from 0 to 2"):
            view.read(0, 0, 1, 1, level)
    with pytest.raises(ImageError, match="at least 1 x 1 px, got 0 x 0"):
        view.read(0, 0, 0, 0)
    with pytest.raises(ConfigError, match="0 to 7"):
        dihedral(pyramid(), 8)


def test_colours_are_carried_and_pixels_left_alone() -> None:
    image = pyramid()
    view = colour_augmented(image, [1.5, 0.5], [0, -1])
    np.testing.assert_array_equal(view.read(1, 2, 5, 5, 1), image.read(1, 2, 5, 5, 1))
    assert view.all_valid
    once_more = dihedral(colour_augmented(view, [2, 2], [1, 0]), 5)
    assert isinstance(once_more, ColourAugmented)
    gain, offset = once_more.colour
    np.testing.assert_array_equal(gain, np.array([3, 1], dtype=np.float32))
    np.testing.assert_array_equal(offset, np.array([1, -2], dtype=np.float32))
    np.testing.assert_array_equal(once_more.read(0, 0, 13, 22), np.rot90(image.arrays[0], -1))
    for wrong in ([1.0], [1.0, np.nan], 1.0):
        with pytest.raises(ConfigError, match="2 finite numbers"):
            colour_augmented(image, wrong, [0, 0])


@pytest.mark.parametrize("k", ELEMENTS)
def test_bands_are_selected_below_the_views(k: int) -> None:
    masks = tuple(np.random.default_rng(1).random(shape) < 0.5 for shape in [(13, 22), (7, 11), (3, 5)])
    image = pyramid(3, nodata=3, masks=masks)
    view = colour_augmented(dihedral(image, k), [1, 2, 3], [4, 5, 6]).select(["3", 0])
    assert isinstance(view, ColourAugmented)
    assert [colour.tolist() for colour in view.colour] == [[3, 1], [6, 4]]
    pixels, mask = view.read_valid(-1, 2, 7, 6, 1)
    expected, valid = dihedral(image.select([2, 0]), k).read_valid(-1, 2, 7, 6, 1)
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(mask, valid)
    np.testing.assert_array_equal(pixels, dihedral(image, k).read(-1, 2, 7, 6, 1)[..., [2, 0]])
    assert below_turns(view, np.array([0, 1]), np.array([0, 1]))[3] == k


@pytest.mark.parametrize("k", ELEMENTS)
def test_resampling_goes_below_the_views(k: int) -> None:
    image = pyramid()
    view = resample_below(colour_augmented(dihedral(image, k), [1, 2], [0, 0]), 2, 3)
    assert isinstance(view, ColourAugmented)
    assert view.colour[0].tolist() == [1, 2]
    below = resample(image, *((3, 2) if k & 4 else (2, 3)))
    assert (view.height, view.width) == tuple(
        max(1, round(size / by)) for size, by in zip(turn(image.arrays[0], k).shape[:2], (3, 2), strict=True)
    )
    expected = numpy_turn(below.read(0, 0, below.width, below.height), k)
    np.testing.assert_array_equal(view.read(0, 0, view.width, view.height), expected)
    found = resample_below(image, 2, 2, nearest=True)
    np.testing.assert_array_equal(found.read(0, 0, 11, 6), resample(image, 2, nearest=True).read(0, 0, 11, 6))


def test_views_pickle() -> None:
    view = pickle.loads(pickle.dumps(colour_augmented(dihedral(pyramid(), 6), [1, 2], [0, 0])))
    np.testing.assert_array_equal(view.read(0, 0, 13, 22), np.rot90(pyramid().arrays[0]))
    np.testing.assert_array_equal(view.colour[0], [1, 2])


def test_draws_are_a_function_of_the_seed_alone() -> None:
    drawn = [draw_augmentation(seed, 3, dihedral=True, colour=0.2) for seed in range(400)]
    again = draw_augmentation(7, 3, dihedral=True, colour=0.2)
    assert again.k == drawn[7].k
    np.testing.assert_array_equal(again.gain, drawn[7].gain)
    counts = np.bincount([a.k for a in drawn], minlength=8)
    assert counts.min() > 25
    gains, offsets = np.stack([a.gain for a in drawn]), np.stack([a.offset for a in drawn])
    assert gains.dtype == offsets.dtype == np.float32
    assert np.abs(np.log(gains)).max() <= 0.2
    assert 0.15 < np.abs(offsets).max() <= 0.2
    assert abs(np.log(gains).mean()) < 0.01
    assert 0.3 < np.corrcoef(np.log(gains[:, 0]), np.log(gains[:, 1]))[0, 1] < 0.7


def test_a_switch_changes_only_its_own_draw() -> None:
    both, plain = (draw_augmentation(3, 4, dihedral=True, colour=c) for c in (0.3, 0.0))
    upright = draw_augmentation(3, 4, dihedral=False, colour=0.3)
    assert both.k == plain.k
    assert upright.k == 0
    np.testing.assert_array_equal(upright.gain, both.gain)
    np.testing.assert_array_equal(plain.gain, np.ones(4))
    np.testing.assert_array_equal(plain.offset, np.zeros(4))
    with pytest.raises(ConfigError, match="at least 0"):
        draw_augmentation(-1, 3, dihedral=True, colour=0.1)


def test_mirror_images_are_drawn_half_of_the_time() -> None:
    drawn = [draw_augmentation(seed, 3, dihedral=False, mirror=True, colour=0.0).k for seed in range(400)]
    assert set(drawn) == {0, 1}
    assert 150 < sum(drawn) < 250
    both = [draw_augmentation(seed, 3, dihedral=True, mirror=True, colour=0.0).k for seed in range(50)]
    assert both == [draw_augmentation(seed, 3, dihedral=True, colour=0.0).k for seed in range(50)]


def test_random_crops_are_inside_and_spread_as_asked() -> None:
    x, y, w, h = np.array([draw_crop(300, 400, seed, 0.25) for seed in range(2000)]).T
    assert draw_crop(300, 400, 3, 0.25) == (x[3], y[3], w[3], h[3])
    assert min(x.min(), y.min()) == 0
    assert (x + w).max() == 400
    assert (y + h).max() == 300
    areas, ratios = w * h / 300 / 400, w / h
    assert 0.24 < areas.min() < 0.26
    assert areas.max() > 0.9
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.35
    fits = areas < 0.5  # of the larger ones some ratios do not fit, and are drawn again
    assert np.mean(areas[fits]) == pytest.approx(0.375, abs=0.01)
    assert np.mean(np.log(ratios[fits])) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 1000), (13, 10)), ((1000, 10), (10, 13)), ((1, 1), (1, 1)), ((1, 50), (1, 1)), ((50, 1), (1, 1))],
)
def test_crops_of_narrow_images_are_the_middle(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """(height, width) of the image; (width, height) of the crop."""
    for seed in range(20):
        x, y, *crop = draw_crop(*size, seed, 1.0)
        assert tuple(crop) == expected
        assert (x, y) == ((size[1] - crop[0]) // 2, (size[0] - crop[1]) // 2)
