from __future__ import annotations

import errno
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.cli import main
from gigaxt.training.config import read_yaml, run_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images, a truncated one, and CSVs; the working directory."""
    random = np.random.default_rng(0)
    for i in range(4):
        pixels = random.integers(0, 256, (80, 100, 3)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, tile=(32, 32), photometric="rgb")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "0.tif").read_bytes()[:3000])
    head, rows = "image,label,split\n", ["0.tif,a,train\n", "1.tif,b,train\n", "2.tif,a,val\n", "3.tif,b,val\n"]
    (tmp_path / "data.csv").write_text(head + "".join(rows))
    (tmp_path / "bad.csv").write_text(head + "".join(rows) + "gone.tif,a,train\ncut.tif,b,train\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_and_next_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "data.csv"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data.csv: 4 rows, classification\n")
    assert out.endswith("next: gigaxt check data.csv --write run.yaml\n")


def test_next_command_reads_the_csv_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags that said what the columns mean are in it; without them the CSV could not be read."""
    Path("labels.csv").write_text("image,er,her 2\n0.tif,1,0\n1.tif,,1\n2.tif,0,1\n3.tif,1,\n")
    assert main(["check", "labels.csv", "--target", "multi", "--label-columns", "er", "her 2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "next: gigaxt check labels.csv --target multi --label-columns er 'her 2' --write run.yaml"
    assert main(shlex.split(last)[2:]) == 0
    assert run_config(read_yaml(Path("run.yaml"))).model.head.kind == "classify"


def test_written_config_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "data.csv", "--write", "sub/run a.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["wrote sub/run a.yaml", "next: gigaxt train --config 'sub/run a.yaml' --out 'runs/run a'"]
    config = run_config(read_yaml(Path("sub/run a.yaml")))
    assert config.data.csv == str(folder / "data.csv")
    assert config.model.head.class_names == ["a", "b"]


def test_an_older_config_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    assert main(["check", "data.csv", "--write", "run.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: run.yaml exists; choose another name, or use --force to overwrite it\n"
    assert captured.out == ""  # told before the images are looked through
    assert Path("run.yaml").read_text() == "mine"
    assert main(["check", "data.csv", "--write", "run.yaml", "--force"]) == 0
    assert Path("run.yaml").read_text() != "mine"


def test_files_that_are_missing_or_unreadable(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "bad.csv", "--write", "run.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: bad.csv: 2 files to put right, listed above\n"
    assert "line 6: gone.tif: does not exist" in captured.out
    assert "line 7: cut.tif: " in captured.out
    assert "put the files right, then gigaxt train --config run.yaml" in captured.out
    assert Path("run.yaml").exists()


def test_foreground_and_overlays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "data.csv", "--foreground", "tissue", "--overlays", "pictures"]) == 0
    out = capsys.readouterr().out
    assert "foreground keeps" in out
    assert "pictures: 4 in pictures" in out
    assert len(list(Path("pictures").glob("*.png"))) == 4


def test_a_picture_that_cannot_be_written_is_no_fault_of_its_image(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(picture: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gigaxt.draw.save_png", full)
    assert main(["check", "data.csv", "--overlays", "pictures"]) == 2
    captured = capsys.readouterr()
    assert ": cannot write the picture: No space left on device; free some space or choose" in captured.err
    assert "unreadable" not in captured.out
    assert not list(Path("pictures").iterdir())


def test_a_picture_of_an_image_with_a_very_long_name(folder: Path) -> None:
    name = "ä" * 125 + ".tif"  # 254 bytes, of 255 that there may be
    Path("0.tif").rename(name)
    Path("long.csv").write_text(f"image,label\n{name},a\n", encoding="utf-8")
    assert main(["check", "long.csv", "--overlays", "pictures"]) == 0
    assert len(list(Path("pictures").glob("line00002_*.png"))) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "CSV"),
        (["none.csv"], "none.csv"),
        (["0.tif"], "0.tif"),
        (["data.csv", "--foreground", "tisue"], "tisue"),
        (["data.csv", "--task", "segment"], "segment"),
        (["data.csv", "--writ", "run.yaml"], "--write"),
        (["data.csv", "--write", ".", "--force"], "--write: expected the name of a YAML file, got the folder ."),
        (["data.csv", "--write", "0.tif/run.yaml"], "--write: cannot make the folder 0.tif: File exists"),
        (["data.csv", "--overlays", "0.tif"], "--overlays: cannot make the folder 0.tif: File exists"),
    ],
)
def test_mistakes_are_told_in_one_line(
    folder: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *args]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
