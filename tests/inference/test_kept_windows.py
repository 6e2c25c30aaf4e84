"""Windows that are regions: their feature maps are kept from the first pass as far as the budget goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import gigaxt
from gigaxt import GigaXT, Streaming
from tiny_models import segmenter

HALO = {"region": 128, "halo": 32}
REGIONS = 4 * 3
SETTINGS: dict[str, Any] = {"overlap": 0, "dihedral": 4, "probabilities": "uint8"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 150, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", pixels, tile=(64, 64), photometric="rgb")
    return tmp_path / "scene.tif"


def predicted(model: GigaXT, path: Path, name: str, budget: float, **settings: Any) -> tuple[int, list[bytes]]:
    """How many regions and windows were encoded, and the files' bytes."""
    out = path.parent / name
    out.mkdir(exist_ok=True)
    counts: list[int] = []
    hook = model.encode.register_forward_pre_hook(lambda module, args: counts.append(len(args[0]["pixels"])))
    model.streaming = Streaming(budget_gib=budget, chunk_regions=3)
    try:
        gigaxt.predict(model, path, out / "mask.tif", **SETTINGS | settings)
    finally:
        hook.remove()
    return sum(counts), [(out / name).read_bytes() for name in ("mask.tif", "mask_probabilities.tif")]


@pytest.mark.parametrize("given", [{}, {"overview": [2]}, HALO, {"context": "none", **HALO}])
def test_kept_ones_are_not_encoded_again(path: Path, given: dict[str, Any]) -> None:
    model = segmenter(**given)
    first = 4 * (REGIONS + (2 * 2 if "overview" in given else 0))
    twice, expected = predicted(model, path, "twice", 0.0)
    assert twice == first + 4 * REGIONS
    once, found = predicted(model, path, "once", 1.0)
    assert (once, found == expected) == (first, True)
    some, found = predicted(model, path, "some", 2e-4)
    assert first < some < twice
    assert found == expected


def test_overlapping_windows_are_encoded_all(path: Path) -> None:
    model = segmenter()
    assert predicted(model, path, "overlap", 1.0, overlap=32)[0] == 4 * (REGIONS + 6 * 4)


@pytest.mark.parametrize("stop", [30, 60])
def test_a_stopped_prediction_ends_the_same(path: Path, stop: int) -> None:
    """Where it goes on, maps of what was done before are not there."""

    def progress(done: int, count: int) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    model = segmenter()
    _, expected = predicted(model, path, "unbroken", 1.0)
    with pytest.raises(KeyboardInterrupt):
        predicted(model, path, "broken", 1.0, progress=progress)
    assert (path.parent / "broken/mask.tif.parts").is_dir()
    assert predicted(model, path, "broken", 1.0)[1] == expected
