from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile

import gigaxt
from gigaxt import ConfigError, DataError, ImageError
from gigaxt.cli import main
from gigaxt.cli.predict import cases_of
from gigaxt.inference import scores
from tiny_models import classifier, segmenter


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    for i, height in enumerate((70, 64, 100)):
        pixels = np.random.default_rng(i).integers(0, 256, (height, 80, 3)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, photometric="rgb")
    monkeypatch.chdir(tmp_path)
    return [Path(f"{i}.tif") for i in range(3)]


def lines(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_answer_a_case(images: list[Path]) -> None:
    model = classifier()
    gigaxt.predict(model, images, "out.csv", cases=["p", "", "p"])
    rows = lines("out.csv")
    assert [(row["case"], row["image"]) for row in rows] == [("p", "0.tif|2.tif"), ("", "1.tif")]
    expected = scores(model, [gigaxt.open_image(images[0]), gigaxt.open_image(images[2])])
    assert [float(rows[0][name]) for name in ("ash", "oak", "yew")] == pytest.approx(expected.tolist(), rel=1e-5)
    gigaxt.predict(model, images, "plain.csv")
    assert list(lines("plain.csv")[0]) == ["image", "prediction", "ash", "oak", "yew"]


def test_a_bad_image_takes_its_case_with_it(images: list[Path]) -> None:
    images[2].write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2\.tif"):
        gigaxt.predict(classifier(), images, "out.csv", cases=["p", "q", "p"])
    skipped: dict[str, str] = {}
    gigaxt.predict(classifier(), images, "out.csv", cases=["p", "q", "p"], skipped=skipped)
    assert [row["case"] for row in lines("out.csv")] == ["q"]
    assert list(skipped) == ["0.tif|2.tif"]


def test_wrong_cases(images: list[Path]) -> None:
    with pytest.raises(ConfigError, match="expected a case for each of 3 images, got 1"):
        gigaxt.predict(classifier(), images, "out.csv", cases=["p"])
    with pytest.raises(ConfigError, match="`cases` are for models that classify"):
        gigaxt.predict(segmenter(), images[:1], "out.tif", cases=["p"])


def test_cases_of_csvs(images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.csv").write_text("Image,Case\n0.tif,p\n1.tif,\n2.tif,p\n")
    Path("plain.csv").write_text("image\n0.tif\n")
    assert cases_of([Path("list.csv"), Path("x.tif")], [*images, Path("x.tif")]) == ["p", "", "p", ""]
    assert cases_of([Path("plain.csv")], images[:1]) is None
    Path("twice.csv").write_text("image,case\n0.tif,p\n0.tif,q\n")
    with pytest.raises(DataError, match=r"image 0\.tif is in two cases, p and q"):
        cases_of([Path("twice.csv")], images[:1])
    classifier().save(Path("model"))
    assert main(["predict", "model", "list.csv", "--out", "out.csv"]) == 0
    assert "out.csv: scores of 2 cases" in capsys.readouterr().out
