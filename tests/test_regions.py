from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from array_image import ArrayImage
from gigaxt import regions
from gigaxt.augment import dihedral, turn
from gigaxt.errors import ConfigError, DataError
from gigaxt.image import open_image
from gigaxt.regions import Order, Place, RegionGrid, hilbert_key, keep_valid, lattice_edges, scan_order

ORDERS: tuple[Order, ...] = ("raster", "snake", "hilbert")
SIZES = [(1, 1), (1, 1000), (1000, 1), (40, 50), (64, 64), (130, 300), (256, 192)]


@pytest.mark.parametrize("halo", [0, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_an_image_of_region_numbers_comes_back_in_order(height: int, width: int, order: Order, halo: int) -> None:
    grid = RegionGrid(height, width, 96, halo=halo, order=order)
    numbers = np.arange(height * width, dtype=np.int32).reshape(height, width)
    image = ArrayImage(numbers)
    back = np.full((height, width), -1, dtype=np.int32)
    written = np.zeros((height, width), dtype=np.int32)
    for place in grid.places:
        pixels, valid = image.read_valid(*grid.window_xywh(place))
        np.testing.assert_array_equal(valid, grid.pixel_validity(place))
        core = pixels[halo : halo + grid.core, halo : halo + grid.core, 0]
        x, y, w, h = grid.core_xywh(place)
        back[y : y + h, x : x + w] = core[:h, :w]
        written[y : y + h, x : x + w] += 1
    np.testing.assert_array_equal(back, numbers)
    assert (written == 1).all()
    assert len(grid) == grid.rows * grid.cols == -(-height // grid.core) * -(-width // grid.core)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_overviews_cover_the_whole_image(height: int, width: int) -> None:
    grid = RegionGrid(height, width, 32, overview=(2, 8))
    levels = [place.level for place in grid.places]
    assert levels == sorted(levels)
    for level in (1, 2):
        shape = grid.level_shape(level)
        assert shape == tuple(max(1, round(size / grid.factor(level))) for size in (height, width))
        written = np.zeros(shape, dtype=np.int32)
        for place in grid.places:
            if place.level == level:
                x, y, w, h = grid.core_xywh(place)
                assert min(w, h) > 0
                written[y : y + h, x : x + w] += 1
        assert (written == 1).all()


def test_an_overview_region_stays_where_a_kept_region_lies_under_it() -> None:
    keep = np.zeros((9, 5), dtype=np.bool_)
    keep[0, 4] = keep[5, 1] = keep[8, 0] = True
    # 9 rows of 32 px are 260 px, 65 px at factor 4: the third overview row covers what is left.
    grid = RegionGrid(260, 160, 32, overview=(4,), order="raster", keep=keep)
    assert grid.places == (Place(0, 4), Place(5, 1), Place(8, 0), Place(0, 1, 1), Place(1, 0, 1), Place(2, 0, 1))
    # 257 px are 64 at factor 4: the last pixel row is rounded away, and its region belongs to the last overview row.
    grid = RegionGrid(257, 160, 32, overview=(4,), order="raster", keep=keep)
    assert grid.places[3:] == (Place(0, 1, 1), Place(1, 0, 1))


def test_token_coords_are_centres_on_the_lattice() -> None:
    grid = RegionGrid(100, 180, 64, overview=(2,), order="raster")
    coords = grid.token_coords(2)
    assert coords.dtype == np.float32
    assert coords.shape == (2 * 3 + 1 * 2, 4, 2)
    assert grid.lattice_shape(2) == (4, 6)
    assert coords[4].tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]  # Place(1, 1)
    assert coords[7].tolist() == [[0.5, 4.5], [0.5, 6.5], [2.5, 4.5], [2.5, 6.5]]  # Place(0, 1, 1)
    level0 = coords[:6].reshape(-1, 2)
    assert len(np.unique(level0, axis=0)) == 4 * 6
    # The coordinate of any token is that of the centre of the pixels that it covers.
    for place, tokens in zip(grid.places, coords, strict=True):
        x, y, _, _ = grid.window_xywh(place)
        centre_px = np.array([[y + 32 * i + 16, x + 32 * j + 16] for i in range(2) for j in range(2)])
        np.testing.assert_array_equal(tokens, centre_px * grid.factor(place.level) / 32 - 0.5)


def test_token_coords_leave_the_halo_out() -> None:
    grid = RegionGrid(192, 192, 128, halo=32, order="raster")
    assert grid.core == 64
    assert grid.window_xywh(Place(0, 1)) == (32, -32, 128, 128)
    assert grid.token_coords(2)[1].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize("order", ["raster", "snake", "hilbert"])
@pytest.mark.parametrize(("t", "k"), [(2, 1), (3, 2), (1, 3), (2, 0)])
def test_regions_with_the_tokens_of_their_neighbours(order: Order, t: int, k: int) -> None:
    """A numbered lattice that is not square, with a hole: each region's square of it, -1 where there is no token."""
    keep = np.ones((3, 4), bool)
    keep[1, 2] = keep[0, 0] = False
    grid = RegionGrid(90, 128, 32, overview=(2,), order=order, keep=keep)
    lattice = np.full((3 * t + 2 * k, 4 * t + 2 * k), -1)
    coords = grid.token_coords(t)[: grid.full_size].astype(int) + k
    lattice[coords[..., 0], coords[..., 1]] = np.arange(10 * t * t).reshape(10, t * t)
    found = grid.tokens_with_halo(t, k)
    assert grid.full_size == len(found) == 10
    for place, tokens in zip(grid.places, found, strict=False):
        row, col, side = place.row * t, place.col * t, t + 2 * k
        np.testing.assert_array_equal(tokens.reshape(side, side), lattice[row : row + side, col : col + side])


def test_33_000_regions_cover_their_scene_once() -> None:
    grid = RegionGrid(180 * 256 - 3, 184 * 256, 256, overview=(8,))
    windows = np.array([grid.window_xywh(place) for place in grid.places])
    assert len(windows) == len(grid.token_coords(8)) > grid.full_size == 180 * 184
    corners = {(x, y) for x, y, _, _ in windows[: grid.full_size].tolist()}
    assert corners == {(col * 256, row * 256) for row in range(180) for col in range(184)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"region": 100}, r"region: expected a multiple of 32 px, got 100; the nearest is 96"),
        ({"region": 0}, r"got 0; the nearest is 32"),
        ({"region": 256, "halo": 20}, r"halo: .* below half of region=256, got 20; the nearest is 32"),
        ({"region": 256, "halo": 128}, r"got 128; the nearest is 96"),
        ({"region": 256, "halo": -32}, r"got -32; the nearest is 0"),
        ({"region": 32, "halo": 32}, r"got 32; the nearest is 0"),
        ({"region": 64, "overview": (8, 4)}, r"ascending integers from 2, such as \(8, 64\), got \(8, 4\)"),
        ({"region": 64, "overview": (1,)}, "ascending integers"),
        ({"region": 64, "order": "hilber"}, "order: got 'hilber'; did you mean `hilbert`"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_nearest(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RegionGrid(500, 500, **settings)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected 2 x 3 regions, got an array of shape \(3, 2\)"):
        RegionGrid(64, 96, 32, keep=np.ones((3, 2), dtype=np.bool_))
    with pytest.raises(DataError, match="none of 6 regions is kept"):
        RegionGrid(64, 96, 32, keep=np.zeros((2, 3), dtype=np.bool_))
    with pytest.raises(DataError, match="at least 1 x 1 px"):
        RegionGrid(0, 96, 32)


def all_cells(rows: int, cols: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1).reshape(-1, 2)


def near_in_scan(rows: int, cols: int, kind: Order) -> float:
    """Share of 4-neighbours within 256 steps of each other."""
    position = np.empty(rows * cols, dtype=np.int64)
    position[scan_order(all_cells(rows, cols), kind)] = np.arange(rows * cols)
    position = position.reshape(rows, cols)
    steps = [np.abs(np.diff(position, axis=axis)).ravel() for axis in (0, 1)]
    return float((np.concatenate(steps) < 256).mean())


def test_neighbours_stay_near_along_hilbert() -> None:
    assert near_in_scan(512, 512, "raster") == pytest.approx(0.50, abs=0.01)
    assert near_in_scan(512, 512, "snake") == pytest.approx(0.63, abs=0.01)
    assert near_in_scan(512, 512, "hilbert") == pytest.approx(0.96, abs=0.01)
    assert near_in_scan(1024, 684, "hilbert") == pytest.approx(0.96, abs=0.01)


@pytest.mark.parametrize("side", [1, 2, 4, 32])
def test_hilbert_steps_from_neighbour_to_neighbour(side: int) -> None:
    path = all_cells(side, side)[scan_order(all_cells(side, side), "hilbert")]
    assert (np.abs(np.diff(path, axis=0)).sum(axis=1) == 1).all()
    assert path[0].tolist() == [0, 0]


def test_hilbert_key_equals_the_textbook() -> None:
    def textbook(x: int, y: int, n: int) -> int:  # https://en.wikipedia.org/wiki/Hilbert_curve, xy2d
        d, s = 0, n // 2
        while s > 0:
            rx, ry = int((x & s) > 0), int((y & s) > 0)
            d += s * s * ((3 * rx) ^ ry)
            if ry == 0:
                if rx == 1:
                    x, y = n - 1 - x, n - 1 - y
                x, y = y, x
            s //= 2
        return d

    cells = np.random.default_rng(0).integers(0, 2**14, (200, 2))
    cells[0] = 2**14 - 1
    expected = [textbook(int(col), int(row), 2**14) for row, col in cells]
    assert hilbert_key(cells[:, 0], cells[:, 1]).tolist() == expected
    corners = hilbert_key(np.array([0, 0, 2**31 - 1, 2**31 - 1]), np.array([0, 2**31 - 1, 0, 2**31 - 1]))
    assert corners[0] == 0 == corners.min()
    assert len(set(corners.tolist())) == 4


@pytest.mark.parametrize("kind", ORDERS)
def test_gaps_do_not_change_the_order_of_the_rest(kind: Order) -> None:
    cells = all_cells(21, 13)
    order = scan_order(cells, kind)
    assert sorted(order.tolist()) == list(range(len(cells)))
    for some in (np.random.default_rng(0).random(len(cells)) < 0.4, (cells < 3).all(axis=1), cells[:, 0] == 5):
        kept = np.flatnonzero(some)
        np.testing.assert_array_equal(kept[scan_order(cells[kept], kind)], order[some[order]])


def test_scan_order_of_rows_and_of_fractions() -> None:
    cells = all_cells(3, 3)
    assert scan_order(cells, "raster").tolist() == list(range(9))
    assert scan_order(cells, "snake").tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert scan_order(np.empty((0, 2)), "hilbert").tolist() == []
    assert scan_order(cells - 1, "raster").tolist() == list(range(9))
    # An overview token follows the token beneath it.
    with_overview = np.concatenate([cells, [[0.5, 1.5]]])
    for kind in ORDERS:
        order = scan_order(with_overview, kind).tolist()
        assert order[order.index(9) - 1] == 1
    with pytest.raises(ConfigError, match="known: raster, snake, hilbert"):
        scan_order(cells, "zzz")


def expected_keep(valid: np.ndarray, core: int) -> np.ndarray:
    rows, cols = (-(-size // core) for size in valid.shape)
    padded = np.pad(valid, ((0, rows * core - valid.shape[0]), (0, cols * core - valid.shape[1])))
    return padded.reshape(rows, core, cols, core).any(axis=(1, 3))


def sparse(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Mostly nodata (0): a solid corner, and single valid pixels far away."""
    rng = np.random.default_rng(seed)
    array = np.zeros((height, width), dtype=np.uint8)
    array[: height // 2, : width // 3] = 7
    array[rng.integers(0, height, 5), rng.integers(0, width, 5)] = 1
    return array


@pytest.mark.parametrize("halo", [0, 32])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (700, 520)])
def test_no_valid_pixel_is_lost(height: int, width: int, halo: int) -> None:
    array = sparse(height, width)
    image = ArrayImage(array, nodata=0)
    keep = keep_valid(image, 96, halo)
    np.testing.assert_array_equal(keep, expected_keep(array > 0, 96 - 2 * halo))
    assert (image.times_read() == 1).all()


@pytest.mark.parametrize("read_bytes", [2, 1000, 5000, 30_000])
def test_bounded_reads_cover_every_pixel_once(read_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "READ_BYTES", read_bytes)
    array = sparse(300, 210)
    image = ArrayImage(array, nodata=0)
    np.testing.assert_array_equal(keep_valid(image, 32), expected_keep(array > 0, 32))
    assert (image.times_read() == 1).all()
    assert max(w * h for _, _, w, h, _ in image.windows) <= max(read_bytes // 2, 32 * 32)


def test_nothing_is_read_where_all_is_valid() -> None:
    image = ArrayImage(np.zeros((70, 130), dtype=np.uint8))
    assert keep_valid(image, 32).all()
    assert keep_valid(dihedral(image, 4), 32).shape == (5, 3)
    assert not image.windows


@pytest.mark.parametrize("k", range(8))
def test_turned_images_are_read_in_the_direction_of_the_file(k: int) -> None:
    array = sparse(150, 70)
    image = ArrayImage(array, nodata=0)
    np.testing.assert_array_equal(keep_valid(dihedral(image, k), 32), expected_keep(turn(array > 0, k), 32))
    assert image.windows == [(0, 0, 70, 150, 0)]


def averaged(array: np.ndarray, factor: int) -> np.ndarray:
    height, width = array.shape
    return array.reshape(height // factor, factor, width // factor, factor).mean(axis=(1, 3)).astype(array.dtype)


def test_a_pyramid_saves_reading_and_loses_nothing() -> None:
    array = np.zeros((1024, 1536), dtype=np.uint8)
    array[:, :1000] = 200
    array[1001, 1501] = 3  # averaged away in the pyramid
    image = ArrayImage(array, averaged(array, 2), averaged(array, 4), averaged(array, 8), nodata=0)
    np.testing.assert_array_equal(keep_valid(image, 128), expected_keep(array > 0, 128))
    assert (image.times_read(2) <= 1).all()
    assert not image.times_read()[:, :768].any()
    assert (image.times_read()[:, 1024:] == 1).all()


def test_a_pyramid_that_lost_everything_is_not_believed() -> None:
    array = sparse(512, 512)
    image = ArrayImage(array, np.zeros((128, 128), dtype=np.uint8), nodata=0)
    np.testing.assert_array_equal(keep_valid(image, 128), expected_keep(array > 0, 128))


def test_pixels_that_bleed_over_a_border_do_not_count() -> None:
    array = np.zeros((512, 512), dtype=np.uint8)
    array[:, :256] = 100
    small = averaged(array, 4)
    small[:, 64 : 64 + 7] = 1  # as a wide kernel or a lossy codec leaves it
    np.testing.assert_array_equal(keep_valid(ArrayImage(array, small, nodata=0), 128), expected_keep(array > 0, 128))


def test_floats_and_masks_are_decided_at_full_resolution() -> None:
    array = np.full((256, 256), -9999, dtype=np.float32)
    image = ArrayImage(array, np.full((64, 64), -9998.999, dtype=np.float32), nodata=-9999)
    assert not keep_valid(image, 128).any()
    nan = np.full((256, 256), np.nan, dtype=np.float32)
    nan[200, 10] = 0
    assert keep_valid(ArrayImage(nan, nodata=np.nan), 128).tolist() == [[False, False], [True, False]]
    mask = sparse(256, 256) > 0
    masked = ArrayImage(np.ones((256, 256)), np.ones((64, 64)), masks=(mask, np.ones((64, 64), dtype=np.bool_)))
    np.testing.assert_array_equal(keep_valid(masked, 128), expected_keep(mask, 128))


def test_lattice_edges() -> None:
    assert lattice_edges(100, 32).tolist() == [0, 32, 64, 96, 100]
    assert lattice_edges(1, 32).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["RGB.byte.tif", "all-nodata.tif", "cogeo.tif"])
def test_real_files_keep_the_regions_that_hold_valid_pixels(name: str, fixtures: Path) -> None:
    image = open_image(fixtures / "geotiff" / name)
    valid = image.validity(0, 0, image.width, image.height)
    for k in (0, 5):
        keep = keep_valid(dihedral(image, k), 64)
        np.testing.assert_array_equal(keep, expected_keep(turn(valid, k), 64))
