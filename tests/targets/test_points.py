"""Points as targets: Gaussians across every border, what is known at cells, and how they move with their image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gigaxt import DataError
from gigaxt.augment import turn
from gigaxt.image.memory import ArrayImage
from gigaxt.targets.points import IGNORED, NOTHING, UNKNOWN, PointLattice, PointTarget, as_points

LATTICE = PointLattice(2, 3.0)


def target(places: Any, *args: Any, size: tuple[int, int] = (128, 192), **given: Any) -> PointTarget:
    return PointTarget(places, *args, size_px=size, **given).on(LATTICE)


def plain_heat(places: Any, rows: int, cols: int) -> Any:
    """Cell by cell, from the definition, without a cut."""
    heat = np.zeros((rows, cols))
    for r, c in np.ndindex(rows, cols):
        for row, col in places:
            square = (2 * r + 1 - row) ** 2 + (2 * c + 1 - col) ** 2
            own = (r, c) == (int(row // 2), int(col // 2))
            heat[r, c] = max(heat[r, c], 1 if own else np.exp(-square / 18))
    return heat


def test_heat_is_the_largest_gaussian_and_knows_no_regions() -> None:
    """Subpixel centres, on and beside the corners of four regions, one outside of the image."""
    places = [[63.9, 64.1], [20.3, 7.75], [24, 10], [0, 191.5], [90, 65.2]]
    drawn = target([*places, [-3, 40]]).draw(0, 0, 192, 128)["heat"]
    np.testing.assert_allclose(drawn, plain_heat([*places, [-3, 40]], 64, 96), atol=4e-4)
    assert drawn[0, 20] > 0.2  # of the object outside
    for y in (0, 64):
        for x in (0, 64, 128):
            part = target([*places, [-3, 40]]).draw(x, y, 64, 64)["heat"]
            np.testing.assert_array_equal(part, drawn[y // 2 : y // 2 + 32, x // 2 : x // 2 + 32])


def test_cells_say_what_is_known() -> None:
    found = target([[10.5, 21], [11, 20.25], [50, 60]], [2, 1, UNKNOWN], [[np.nan, 5], [1, 6], [0, np.nan]]).draw(
        0, 0, 192, 128
    )
    assert found["classes"][5, 10] == 2  # of two in one cell the first
    assert found["classes"][25, 30] == UNKNOWN
    assert (found["classes"] == NOTHING).sum() == found["classes"].size - 2
    np.testing.assert_array_equal(found["attributes"][:, 5, 10], [np.nan, 5])
    np.testing.assert_array_equal(found["offsets"][:, 5, 10], [-0.25, 0])
    np.testing.assert_array_equal(found["offsets"][:, 25, 30], [-0.5, -0.5])


def test_ignored_objects_are_neither_background_nor_found() -> None:
    found = target([[31, 31], [41, 31]], ignored=[True, False]).draw(0, 0, 64, 64)
    assert found["classes"][15, 15] == IGNORED
    assert found["classes"][20, 15] == 0
    assert found["heat"][15, 15] < 0.01
    assert (found["classes"] == IGNORED).sum() == pytest.approx(np.pi * (6 / 2) ** 2, rel=0.1)


@pytest.mark.parametrize("k", range(8))
def test_turned_as_the_image_is(k: int) -> None:
    places = np.array([[10.5, 21.25], [91, 3]])  # on no line between cells
    whole = target(places).draw(0, 0, 192, 128)
    turned = target(places).turned(k)
    height, width = (192, 128) if k & 4 else (128, 192)
    drawn = turned.draw(0, 0, width, height)
    for name in ("heat", "classes"):
        np.testing.assert_allclose(drawn[name], turn(whole[name], k), atol=1e-6)
    turned.check(ArrayImage(np.zeros((height, width, 1), np.uint8)))


def test_a_window_sees_objects_beside_it() -> None:
    whole = target([[30.0, 30.0], [80, 90]])
    window = whole.cropped(32, 16, 64, 48)
    drawn, all_of_it = window.draw(0, 0, 64, 48), whole.draw(0, 0, 192, 128)
    np.testing.assert_array_equal(drawn["heat"], all_of_it["heat"][8:32, 16:48])
    assert drawn["heat"].max() > 0.5
    assert (drawn["classes"] == NOTHING).all()
    assert window.inside.tolist() == [False, False]
    # Cut again, turned: as the window of the turned.
    np.testing.assert_allclose(window.turned(3).draw(0, 0, 64, 48)["heat"], drawn["heat"][::-1, ::-1], atol=1e-6)


def test_other_pixel_sizes() -> None:
    np.testing.assert_array_equal(target([[30, 60]]).resampled(2, 3).places, [[10, 30]])
    assert target([[30, 60]]).resampled(2, 3).size_px == (43, 96)
    np.testing.assert_array_equal(target([[30, 60]]).resized(96, 256).places, [[60, 30]])


def test_places_on_the_last_edge_are_of_the_last_cell() -> None:
    found = target([[128, 192]]).draw(0, 0, 192, 128)
    assert found["classes"][63, 95] == 0
    np.testing.assert_array_equal(found["offsets"][:, 63, 95], 0.5)


def test_points_that_do_not_fit() -> None:
    image = ArrayImage(np.zeros((50, 40, 1), np.uint8))
    with pytest.raises(DataError, match=r"1 of 2 points lie outside of .*, 40 x 50 px, the first at row 3, column 41"):
        PointTarget([[50, 40], [3, 41]]).check(image)
    with pytest.raises(DataError, match="points of an image of 192 x 128 px"):
        target([[1, 1]]).check(image)
    with pytest.raises(DataError, match="finite"):
        PointTarget([[np.nan, 1]])
    with pytest.raises(DataError, match="class and attributes"):
        PointTarget([[1, 1]], [0, 1])
    with pytest.raises(DataError, match=r"class 2 is out of range 0\.\.1"):
        as_points({"points": [[1, 1]], "labels": [2]}, 2, [])
    with pytest.raises(DataError, match=r"unknown \['lenght'\]"):
        as_points({"points": [[1, 1]], "lenght": [2]}, 2, ["length"])
    with pytest.raises(DataError, match="expected a PointTarget"):
        as_points([[1, 1]], 2, [])
    with pytest.raises(DataError, match=r"attributes \['length'\]"):
        as_points(PointTarget([[1, 1]]), 2, ["length"])
    assert np.isnan(as_points({"points": [[1, 1]]}, 1, ["length"]).attributes).all()
