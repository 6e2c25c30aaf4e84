"""`--cache DIR` and `data.cache`: images are read through it, outputs are not, and it ends with the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from gigaxt.cli import main
from gigaxt.cli.train import split_arguments
from gigaxt.image.cache import SEGMENTS
from gigaxt.image.file_cache import BLOCKS, file_cache
from gigaxt.training.config import FREE_TO_CHANGE, read_yaml

MODEL = {
    "region_encoder": {
        "name": "convnextv2_atto",
        "region": 64,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    },
    "context": {"kind": "none", "dim": 16},
    "head": {"kind": "segment", "classes": 2, "dim": 8},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random, lines = np.random.default_rng(0), ["image,mask,split"]
    for i in range(3):
        tifffile.imwrite(tmp_path / f"{i}.tif", random.integers(0, 255, (70, 100, 3)).astype(np.uint8), tile=(32, 32))
        tifffile.imwrite(tmp_path / f"m{i}.tif", random.integers(0, 2, (70, 100)).astype(np.uint8), tile=(32, 32))
        lines.append(f"{i}.tif,m{i}.tif,{'val' if i == 2 else 'train'}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    run = {"data": {"csv": "data.csv", "cache": "kept"}, "model": MODEL, "train": {"epochs": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    forget()
    return tmp_path


def forget() -> None:
    BLOCKS.clear()
    SEGMENTS.clear()


def kept(folder: Path) -> int:
    """How many files are in it."""
    return len([path for path in folder.iterdir() if path.is_dir()])


def test_train_eval_and_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "run.yaml", "--out", "run"]) == 0
    assert kept(folder / "kept") == 6  # images and masks, and nothing that the run wrote
    assert "% from " + str(folder / "kept") in (folder / "run/log.txt").read_text()
    assert read_yaml(folder / "run/config.yaml")["data"]["cache"] == str(folder / "kept")
    assert file_cache() is None
    capsys.readouterr()
    forget()
    assert main(["predict", "run", "0.tif", "--out", "mask.tif", "--png", "--cache", "kept"]) == 0
    assert f"read: 0 MiB from the source, 100% from {folder / 'kept'}" in capsys.readouterr().err
    assert kept(folder / "kept") == 6
    forget()
    assert main(["eval", "run", "data.csv", "--cache", "other", "--cache-gib", "0.1"]) == 0
    assert kept(folder / "other") == 2
    assert f"0% from {folder / 'other'}" in capsys.readouterr().err
    assert file_cache() is None


def test_the_answer_is_the_same(folder: Path) -> None:
    assert main(["train", "--config", "run.yaml", "--out", "run"]) == 0
    for name, flags in (("plain", []), ("first", ["--cache", "new"]), ("again", ["--cache", "new"])):
        forget()
        assert main(["predict", "run", "0.tif", "--out", f"{name}.tif", *flags]) == 0
    plain, first, again = (tifffile.imread(f"{name}.tif") for name in ("plain", "first", "again"))
    np.testing.assert_array_equal(plain, first)
    np.testing.assert_array_equal(plain, again)


def test_flags_of_train_and_what_may_change() -> None:
    assert split_arguments(["a.csv", "--cache", "x", "--cache-gib=3"]) == (
        ["--data.cache", "x", "--data.cache-gib=3"],
        "a.csv",
        None,
        None,
    )
    assert {"data.cache", "data.cache_gib"} <= set(FREE_TO_CHANGE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--config", "run.yaml", "--cache", "data.csv"], "error: cache: "),
        (["train", "--config", "run.yaml", "--cache-gib", "-1"], "error: data.cache_gib: expected a positive number"),
        (["plan", "run.yaml", "--cache", "data.csv"], "error: cache: "),
    ],
)
def test_mistakes_are_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith(told)
    assert text.count("\n") == 1
    assert not (folder / "runs").exists()
