"""Places in a coordinate reference system to px of an image, and the one rule of what GeoJSON's coordinates are in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gigaxt.errors import DataError
from gigaxt.image.base import Image
from gigaxt.shapes.polygons import epsg_code

LON_LAT = "OGC:CRS84"
"""Of GeoJSON that names no other (RFC 7946)."""

Change = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From (n, 2) of x, y to (n, 2) of x, y."""


def geojson_to_px(crs: str | None, corners: NDArray[np.float64], image: Image, name: str) -> Change:
    """What brings the coordinates of a GeoJSON file to level-0 px of an image.

    They are in the CRS that the file's `crs` member names, else in longitude and latitude, as the standard says. Where
    the image has no CRS, or no transform, and the file names none, they are px of the image, as QuPath writes them.

    Args:
        crs: of the `crs` member, None without.
        corners: (n, 2) all coordinates of the file, which are looked at.
        image: that they lie on.
        name: of the file, for messages.

    Raises:
        DataError: the file names a CRS and the image has none; coordinates that are no longitude and latitude.
    """
    if image.crs is None or image.transform is None:
        if crs is not None:
            raise DataError(
                f"{name}: is in {crs}, but {image.name} has no CRS to place it by; "
                "write px of the image, without a `crs`"
            )
        return lambda at: at
    most = np.abs(corners).max(axis=0) if len(corners) else np.zeros(2)
    if crs is None and (most > (180 + 1e-6, 90 + 1e-6)).any():
        raise DataError(
            f"{name}: GeoJSON without a `crs` member is in longitude and latitude, but coordinates reach "
            f"{most[0]:.6g}, {most[1]:.6g}; name its CRS with a `crs` member, or use "
            f"ogr2ogr -lco RFC7946=YES new.geojson {name}"
        )
    return to_px(crs or LON_LAT, image, name)


def to_px(crs: str, image: Image, name: str) -> Change:
    """What brings x, y in a CRS to level-0 px of an image with CRS and transform; `name` is that of the file.

    Raises:
        DataError: see `projection`.
    """
    assert image.transform is not None
    assert image.crs is not None
    project = projection(crs, image.crs, name)
    a, b, c, d, e, f = image.transform
    from_crs = np.linalg.inv(np.array([[a, b], [d, e]]))
    return lambda at: np.asarray((project(at) - (c, f)) @ from_crs.T)


def projection(source: str, target: str, name: str) -> Change:
    """What brings x, y from a CRS to another; nothing is needed where they are the same.

    Raises:
        DataError: pyproj is not installed, a CRS is not known; when called, a place that the target does not have.
    """
    if source == target or (epsg_code(source) is not None and epsg_code(source) == epsg_code(target)):
        return lambda at: at
    try:
        from pyproj import Transformer
        from pyproj.exceptions import ProjError
    except ImportError as error:
        raise DataError(
            f"{name}: is in {source}, the image in {target}; to bring one to the other, pip install 'gigaxt[geo]'"
        ) from error
    try:
        transformer = Transformer.from_crs(source, target, always_xy=True)
    except ProjError as error:
        raise DataError(f"{name}: cannot be brought from {source} to {target}: {error}") from error

    def project(at: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.column_stack(transformer.transform(at[:, 0], at[:, 1]))
        if not np.isfinite(found).all():
            x, y = at[~np.isfinite(found).all(axis=1)][0]
            raise DataError(f"{name}: ({x:.6g}, {y:.6g}) in {source} is no place in {target}, the image's CRS")
        return found

    return project
