from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from gigaxt import DataError, ImageError, open_image
from gigaxt.cli import main
from gigaxt.cli.image_lists import expand
from tiny_models import classifier, segmenter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    segmenter(head={"class_names": ["sea", "land", "ice", "town"]}).save(folder / "seg")
    classifier().save(folder / "cls")
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three scenes in `scenes/`, a truncated one in `bad/`, a segmenter and a classifier; the working directory."""
    random = np.random.default_rng(0)
    (tmp_path / "scenes").mkdir()
    (tmp_path / "bad").mkdir()
    for name, height in (("a", 70), ("b", 64), ("c", 130)):
        pixels = random.integers(0, 256, (height, 100, 3)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"scenes/{name}.tif", pixels, tile=(32, 32), photometric="rgb")
    tifffile.imwrite(
        tmp_path / "four.tif", np.ones((64, 64, 4), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "scenes/notes.txt").write_text("no image")
    (tmp_path / "bad/x.tif").write_bytes((tmp_path / "scenes/c.tif").read_bytes()[:9000])
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text


def test_one_mask_and_its_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "seg", "scenes/a.tif", "--out", "masks/a_mask.tif", "--png", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("masks/a_mask.tif: 100 x 70 px, ")
    assert out[1].startswith("masks/a_mask.png: ")
    mask = open_image("masks/a_mask.tif")
    assert (mask.height, mask.width, mask.nodata) == (70, 100, 255)
    with Pillow.open("masks/a_mask.png") as picture:
        assert picture.height >= 70
        assert picture.width > 100  # the legend stands beside it
    assert sorted(path.name for path in Path("masks").iterdir()) == ["a_mask.png", "a_mask.tif", "a_mask.tif.json"]


def test_folder_of_images_to_folder_of_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "seg", "scenes", "--out", "masks", "--chunk-regions", "2"]) == 0
    assert sorted(path.name for path in Path("masks").glob("*.tif")) == ["a.tif", "b.tif", "c.tif"]
    assert capsys.readouterr().out.splitlines()[3:] == ["3 scenes: 3 predicted"]


def test_csv_of_images_to_csv_of_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "scenes/list.csv").write_text("\ufeffimage, name\n a.tif, one\nc.tif, two\n\n")
    assert main(["predict", "cls", "scenes/list.csv", "--out", "new/scores.csv"]) == 0
    assert "new/scores.csv: scores of 2 images" in capsys.readouterr().out
    with Path("new/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["scenes/a.tif", "scenes/c.tif"]
    assert all(sum(float(row[name]) for name in ("ash", "oak", "yew")) == pytest.approx(1, abs=1e-4) for row in rows)


def test_run_folder_is_its_best_model(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text("data: {csv: x.csv}\n")
    (folder / "seg").rename(folder / "run/model")
    assert main(["predict", "run", "scenes/a.tif", "--out", "a.tif"]) == 0
    assert Path("a.tif").exists()


@pytest.mark.parametrize(("model", "out"), [("seg", "masks"), ("cls", "scores.csv")])
def test_bad_images_stop_or_are_skipped(folder: Path, model: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", model, "bad", "scenes/a.tif", "--out", out]) == 2
    told = line(capsys)
    assert "bad/x.tif" in told
    assert told.endswith("; `--on-bad-image skip` goes on without such images\n")
    assert not Path("scores.csv").exists()
    assert main(["predict", model, "bad", "--out", out]) == 2
    assert "--on-bad-image" not in line(capsys)  # there is no other
    assert main(["predict", model, "bad", "scenes/a.tif", "--out", out, "--on-bad-image", "skip"]) == 1
    assert "skipped: bad/x.tif: " in capsys.readouterr().err
    assert Path("masks/a.tif").exists() or len(Path("scores.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["seg", "scenes/a.tif"], "--out"),
        (["seg", "scenes/a.tif", "--out", "x.csv"], "expected the name of a .tif file"),
        (["seg", "scenes", "--out", "x.tif"], "expected a folder for the 3 images"),
        (["seg", "scenes", "--out", "scenes/a.tif"], "expected a folder for the 3 images"),
        (["seg", "scenes/*.png", "--out", "x"], "expected a pattern that fits some images"),
        (["seg", "scenes/a.tif", "--out", "folder.tif"], "expected the name of a file, got a folder"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--overlap", "-32"], "from 0 to 32, got -32; the nearest is 0"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--overlap", "64"], "from 0 to 32, got 64; the nearest is 32"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--dihedral", "2"], "invalid choice"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--probabilities", "float64"], "float64"),
        (["cls", "scenes/a.tif", "--out", "x.csv", "--overlap", "32"], "these are for masks"),
        (["cls", "scenes/a.tif", "--out", "x.csv", "--probabilities", "uint8"], "these are for masks"),
        (["seg", "four.tif", "--out", "x.tif"], "the model takes 3 bands, the image has 4"),
        (["cls", "scenes", "--out", "x.tif"], "expected the name of a .csv file"),
        (["cls", "scenes", "--out", "scenes"], "expected the name of a .csv file"),
        (["cls", "scenes", "--out", "x.csv", "--png"], "no mask to draw"),
        (["seg", "scenes/a.tif", "--out", "scenes/a.tif"], "is one of the images"),
        (["seg", "scenes", "--out", "scenes"], "is one of the images"),
        (["seg", "scenes/a.tif", "bad/../scenes/a.tif", "--out", "x"], "are one image, or have one name"),
        (["seg", "none.tif", "--out", "x.tif"], "none.tif: expected an image"),
        (["seg", "none.csv", "--out", "x"], "none.csv: No such file"),
        (["seg", "--out", "x"], "at least one image"),
        (["scenes", "scenes/a.tif", "--out", "x.tif"], "expected the folder of a model"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--chunk-regions", "0"], "expected at least 1, got 0"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--budget-gib", "1e9"], "--budget-gib: expected at most the "),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--budget-gib", "-1"], "expected a number of GiB from 0"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--device", "tpu?"], "tpu?"),
        (["seg", "scenes/a.tif", "--out", "x.tif", "--pgn"], "--png"),
        (["seg", "scenes/a.tif", "--out", "seg/config.json/x.tif"], "cannot make the folder"),
        (["seg", "scenes/notes.txt", "--out", "x.tif"], "expected an image"),
    ],
)
def test_mistakes_are_told_in_one_line(
    folder: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *args]) == 2
    assert message in line(capsys)


def test_expand_leaves_out_what_is_no_image(folder: Path) -> None:
    (folder / "scenes/.hidden.tif").write_bytes(b"II*\0")
    (folder / "scenes/z.zarr").mkdir()
    (folder / "scenes/z.zarr/.zattrs").write_text("{}")
    names = [path.name for path in expand([Path("scenes"), Path("bad/x.tif")])]
    assert names == ["a.tif", "b.tif", "c.tif", "z.zarr", "x.tif"]


def test_expand_refuses_what_holds_no_image(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "names.csv").write_text("name\na.tif\n")
    (folder / "nothing.csv").write_text("image\n")
    for path, message in (("empty", "none that is an image"), ("names.csv", "column `image`"), ("nothing.csv", "none")):
        with pytest.raises(DataError, match=message):
            list(expand([Path(path)]))
    with pytest.raises(ImageError):
        list(expand([Path("no such.tif")]))
