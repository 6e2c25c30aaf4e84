from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt import open_image
from gigaxt.cli import main
from gigaxt.cli.info import file_size, image_facts, named
from tiny_models import segmenter, tiny_model


def facts(text: str) -> dict[str, str]:
    """Names and values of one block of output."""
    return {line.split("  ")[1]: line.strip().split("  ", 1)[1].strip() for line in text.splitlines()[1:]}


def test_image(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fixtures / "geotiff/cogeo.tif"
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(path)
    found = facts(out)
    assert found["size"] == "1,024 x 1,024 px"
    assert found["levels"].startswith("1024 x 1024, 512 x 512, 256 x 256")
    assert (found["bands"], found["dtype"], found["crs"]) == ("3", "uint8", "EPSG:3857")
    assert found["storage"] == "tiles of 512 x 512 px, jpeg"
    assert found["nodata"] == "by a mask"
    assert found["pixel size"] == "0.597164 x 0.597164 m"
    assert found["transform"] == "0.5971640348, 0, 14321853.12, 0, -0.5971640348, 4533021.525"
    assert found["regions"] == "4 x 4 = 16 of 256 px"
    assert found["tokens"] == "1,024 of 32 px"


def test_regions_are_rounded_up_and_orientation_is_told() -> None:
    image = open_image(np.zeros((257, 10, 2), np.float32))
    image.orientation = 6
    found = image_facts(image, 128)
    assert found["regions"] == "3 x 1 = 3 of 128 px"
    assert found["tokens"] == "48 of 32 px"
    assert found["orientation"].startswith("6 ")
    assert not {"crs", "pixel size", "nodata", "storage"} & found.keys()


@pytest.mark.parametrize(
    ("options", "storage"),
    [
        ({"tile": (32, 48), "compression": "zlib"}, "tiles of 48 x 32 px, deflate"),
        ({"rowsperstrip": 1}, "strips of 1 row, uncompressed"),
        ({"rowsperstrip": 500, "compression": "zstd"}, "strips of 100 rows, zstd"),
    ],
)
def test_storage_of_tiffs(tmp_path: Path, options: dict[str, object], storage: str) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((100, 90), np.uint8), **options)
    assert image_facts(open_image(tmp_path / "x.tif"), 64)["storage"] == storage


def test_pages_that_are_not_read_are_told(tmp_path: Path) -> None:
    path, stack = tmp_path / "x.ome.tif", np.zeros((4, 3, 70, 90), np.uint8)

    def pages() -> str:
        return image_facts(open_image(path), 64).get("pages", "")

    tifffile.imwrite(path, stack[:, 0], photometric="minisblack", ome=False)
    assert pages() == "4 of this size, of which the first is read"
    tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "ZCYX"})
    assert pages() == "12 of this size, of which 3 are read"
    tifffile.imwrite(path, stack[0], photometric="minisblack", metadata={"axes": "CYX"})
    assert pages() == ""
    with tifffile.TiffWriter(path, ome=False) as tiff:  # a mask, an overview, a label
        tiff.write(stack[0, 0], metadata=None)
        tiff.write(stack[0, 0] > 0, photometric="mask", subfiletype=4, metadata=None)
        tiff.write(stack[0, 0, ::2, ::2], subfiletype=1, metadata=None)
        tiff.write(stack[0, 0, :30, :40], metadata=None)
    assert pages() == ""


def test_folder_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told as any other path that is no image, and the next one is described."""
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((100, 90), np.uint8))
    (tmp_path / "closed").mkdir()

    is_file = Path.is_file

    def denied(path: Path) -> bool:
        if "closed" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    assert main(["info", str(tmp_path / "closed"), str(tmp_path / "x.tif")]) == 2
    told = capsys.readouterr()
    assert "closed: cannot be opened: Permission denied" in told.err
    assert "90 x 100 px" in told.out


def test_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = segmenter(
        bands=2, head={"class_names": ["sea", "land", "ice", "town"]}, mean=[1, 2], std=[3, 4], gsd_m=10, overview=[8]
    )
    model.save(tmp_path / "model")
    assert main(["info", str(tmp_path / "model")]) == 0
    found = facts(capsys.readouterr().out)
    assert found["region encoder"] == "convnextv2_atto, regions of 64 px, 2 x 2 tokens each"
    assert found["context"] == "mamba2, 1 x 16, summary 2"
    assert (found["head"], found["classes"], found["bands"]) == ("segment", "4: sea, land, ice, town", "2")
    assert (found["mean"], found["std"], found["overview"]) == ("1, 2", "3, 4", "1:8")
    assert found["pixel size"].startswith("10 m")
    encoder = sum(p.numel() for p in model.encode.parameters())
    assert found["parameters"].startswith(f"{encoder / 1e6:.2f} M encoder + ")


def test_kind_of_answer_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model({"kind": "classify", "classes": 2, "target": "regression"}).save(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    found = facts(capsys.readouterr().out)
    assert (found["head"], found["classes"]) == ("classify (regression)", "2")


def test_several_paths_go_on_after_a_bad_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 30), np.uint8))
    (tmp_path / "b.tif").write_bytes(b"")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{")
    paths = [str(tmp_path / name) for name in ("model", "b.tif", "a.tif")]
    assert main(["info", *paths]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(paths[2])
    first, second = captured.err.splitlines()
    assert first.startswith(f"error: {paths[0]}/config.json: damaged")
    assert second == f"error: {paths[1]}: expected an image, got an empty file"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected an image or a model folder"),
        (["no such.tif"], "No such file"),
        (["."], "got a folder"),
        (["x.tif", "--region", "100"], "multiple of 32 px, got 100"),
        (["x.tif", "--regoin", "64"], "--region"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info", *args]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert message in text


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="cannot be opened"):
        main(["info", "no such.tif", "--debug"])


def test_small_texts(tmp_path: Path) -> None:
    assert named(2, ("1", "2")) == "2"
    assert named(20, [f"b{i}" for i in range(20)]).endswith("b11, ...")
    for size, text in ((0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (12_345_678, "12.3 MB")):
        (tmp_path / "file").write_bytes(bytes(size))
        assert file_size(tmp_path / "file") == text
    assert file_size(tmp_path) == "12.3 MB"
