"""`gigaxt predict` never writes over what it was given, nor one picture over another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from gigaxt.cli import main
from tiny_models import tiny_model

HEADS = {"boxes": {"kind": "detect", "dim": 8}, "points": {"kind": "points", "dim": 8}, "mask": {"kind": "segment"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two images called `0.png`, labels beside them, and a CSV that names all."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "labels"):
        Path(name).mkdir()
        Pillow.fromarray(np.full((70, 80, 3), 90, np.uint8)).save(f"{name}/0.png")
    for label in ("labels/0.geojson", "labels/0.csv", "labels/0.tif"):
        Path(label).write_text("drawn by hand")
    Path("data.csv").write_text("image,boxes,points,mask\na/0.png,labels/0.geojson,labels/0.csv,labels/0.tif\n")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "out", "message"),
    [
        ("boxes", "data.csv", "--out: data.csv is the CSV of the images; choose another name"),
        ("points", "data.csv", "--out: data.csv is the CSV of the images; choose another name"),
        ("boxes", "labels", "--out: labels/0.geojson is one of the files that data.csv names"),
        ("points", "labels/0.csv", "--out: labels/0.csv is one of the files that data.csv names"),
        ("mask", "labels", "--out: labels/0.tif is one of the files that data.csv names"),
    ],
)
def test_what_was_given_stays(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, out: str, message: str
) -> None:
    tiny_model({**HEADS[kind], "classes": 2}).save(folder / "m")
    files = [folder / "data.csv", *(folder / "labels").iterdir()]
    before = [path.read_bytes() for path in files]
    assert main(["predict", "m", "data.csv", "--out", out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize(("kind", "ending"), [("boxes", ".png"), ("points", ".points.png")])
def test_images_of_one_name_get_a_picture_each(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str, ending: str
) -> None:
    tiny_model({**HEADS[kind], "classes": 2}).save(folder / "m")
    assert main(["predict", "m", "a/0.png", "b/0.png", "--out", "found/all.csv", "--score", "1", "--png"]) == 0
    pictures = sorted(path.name for path in Path("found").glob("*.png"))
    assert pictures == [f"a_0{ending}", f"b_0{ending}"]
    out = capsys.readouterr().out
    assert all(f"found/{picture}: the " in out for picture in pictures)
    assert "found/all.csv: 0 objects of 2 images" in out
