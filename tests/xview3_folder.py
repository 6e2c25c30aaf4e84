"""Small scenes in xView3-SAR's layout, with ships as bright spots."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

HEADER = [
    *("detect_lat", "detect_lon", "vessel_length_m", "source", "detect_scene_row", "detect_scene_column"),
    *("is_vessel", "is_fishing", "distance_from_shore_km", "scene_id", "confidence"),
    *("top", "left", "bottom", "right", "detect_id"),
]


def write_raster(
    path: Path,
    pixels: Any,
    pixel_m: float,
    left: float = 600_000.0,
    top: float = 4_220_000.0,
    nodata: str = "-32768",
) -> None:
    """A GeoTIFF in UTM zone 30."""
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32630)
    tags = [
        (33550, "d", 3, (pixel_m, pixel_m, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, left, top, 0.0), True),
        (34735, "H", len(keys), keys, True),
        (42113, "s", 0, nodata, True),
    ]
    tifffile.imwrite(path, pixels, photometric="minisblack", extratags=tags)


def write_scene(
    root: Path, scene: str, *, part: str = "validation", side: int = 128, seed: int = 0
) -> list[dict[str, str]]:
    """A scene with eight ships; the upper 16 rows have no data. Returns the lines of its labels."""
    random = np.random.default_rng(seed)
    folder = root / part / scene
    folder.mkdir(parents=True)
    vv, vh = (random.normal(mean, 1.0, (side, side)) for mean in (-17.0, -26.0))
    cells = random.choice((side - 40) // 12 * (side - 24) // 12, 8, replace=False)
    lines = []
    for i, cell in enumerate(cells.tolist()):
        row, col = 26 + 12 * (cell // ((side - 24) // 12)), 12 + 12 * (cell % ((side - 24) // 12))
        vessel, fishing = i % 4 != 3, i % 2 == 0
        vv[row - 1 : row + 2, col - 1 : col + 2] = 15 if vessel else 2
        vh[row - 1 : row + 2, col - 1 : col + 2] = 5 if fishing and vessel else -15
        line = dict.fromkeys(HEADER, "")
        line |= {"detect_lat": f"{38 + seed - row / 1e4}", "detect_lon": f"{-1 + col / 1e4}", "scene_id": scene}
        line |= {"detect_scene_row": str(row), "detect_scene_column": str(col), "is_vessel": str(vessel)}
        line |= {"is_fishing": str(fishing) if vessel else "", "vessel_length_m": "60" if vessel else ""}
        line |= {
            "distance_from_shore_km": "1.0",
            "confidence": "LOW" if i == 7 else "HIGH",
            "detect_id": f"{scene}_{i}",
        }
        lines.append(line)
    vv[:16], vh[:16] = -32768, -32768
    write_raster(folder / "VV_dB.tif", vv.astype(np.float16), 10.0)
    write_raster(folder / "VH_dB.tif", vh.astype(np.float16), 10.0)
    depth = random.normal(-80, 5, (-(-side // 50), -(-side // 50))).astype(np.float32)
    depth[-1, -1] = -32768
    write_raster(folder / "bathymetry.tif", depth, 500.0)
    shore = root / "shoreline" / part
    shore.mkdir(parents=True, exist_ok=True)
    np.save(shore / f"{scene}_shoreline.npy", np.array([[[0.0, col] for col in range(0, side, 4)]]))
    return lines


def write_root(root: Path, scenes: int = 3, *, part: str = "validation", side: int = 128) -> Path:
    """A folder with scenes of one part, at different places, and their labels."""
    lines = [
        line for i in range(scenes) for line in write_scene(root, f"{i:016x}{part[0]}", part=part, side=side, seed=i)
    ]
    with (root / f"{part}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        table.writeheader()
        table.writerows(lines)
    return root
