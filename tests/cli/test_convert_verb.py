from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from gigaxt import open_image
from gigaxt.cli import main


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """`photo.png` in the working directory."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 700, 3)).astype(np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return pixels


@pytest.mark.parametrize("compression", ["deflate", "zstd", "none"])
def test_pyramid(picture: np.ndarray, compression: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "photo.png", "out.tif", "--tile", "256", "--compression", compression]) == 0
    out = capsys.readouterr().out
    assert out.startswith("out.tif: 700 x 300 px, 3 levels, ")
    assert out.count("\n") == 1
    image = open_image("out.tif")
    assert len(image.levels) == 3
    np.testing.assert_array_equal(image.read(0, 0, 700, 300), picture)
    with tifffile.TiffFile("out.tif") as tiff:
        assert tiff.pages[0].tile == (256, 256)
        assert tiff.pages[0].compression.name.lower().removeprefix("adobe_") == compression


def test_pages_that_are_left_out_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("stack.tif", np.zeros((5, 40, 40), np.uint8), photometric="minisblack")
    assert main(["convert", "stack.tif", "out.tif"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["stack.tif: pages: 5 of this size, of which the first is read"]


def test_nodata(picture: np.ndarray) -> None:
    assert main(["convert", "photo.png", "out.tif", "--nodata", "7"]) == 0
    assert open_image("out.tif").nodata == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["photo.png"], "OUT"),
        (["photo.png", "out.tif", "--tile", "100"], "multiple of 16"),
        (["photo.png", "out.tif", "--compression", "lzw"], "lzw"),
        (["photo.png", "out.tif", "--max-memory-gib", "0.000001"], "allow more"),
        (["photo.png", "photo.png"], "is not the source"),
        (["none.png", "out.tif"], "none.png: cannot be opened"),
        (["photo.png", "."], "got a folder"),
        (["photo.png", "none/out.tif"], "none/out.tif"),
    ],
)
def test_mistakes_are_told_in_one_line(
    picture: np.ndarray, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *args]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert message in text
    assert [path.name for path in Path().iterdir()] == ["photo.png"]
