from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from gigaxt.cli import VERBS, main
from gigaxt.cli.train import split_arguments

MODEL = {
    "region_encoder": {
        "name": "convnextv2_atto",
        "region": 64,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.2},
    },
    "context": {"kind": "mamba2", "dim": 16, "depth": 1, "summary": 2},
}
HEADS = {"label": {"kind": "classify", "classes": 2}, "mask": {"kind": "segment", "classes": 3, "dim": 8}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scenes of several sizes with labels and masks, two CSVs and a YAML for each; also the working directory."""
    random = np.random.default_rng(0)
    tables = {"label": ["image,label,split"], "mask": ["image,mask,split"]}
    for i in range(6):
        kind, (height, width) = i % 2, [(70, 100), (64, 64)][i % 3 == 0]
        pixels = random.integers(0, 60, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        pixels[10:40, 20:60, kind] += 180
        mask[10:40, 20:60] = 1 + kind
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, tile=(32, 32), photometric="rgb")
        tifffile.imwrite(tmp_path / f"m{i}.tif", mask, tile=(32, 32))
        tables["label"].append(f"{i}.tif,{'red' if kind == 0 else 'green'},{'val' if i > 3 else 'train'}")
        tables["mask"].append(f"{i}.tif,m{i}.tif,{'val' if i > 3 else 'train'}")
    for name, lines in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        run = {
            "data": {"csv": f"{name}.csv"},
            "model": {**MODEL, "head": HEADS[name]},
            "train": {"epochs": 2, "batch": 2, "lr": 0.002, "augment": {"dihedral": True, "colour": 0.1}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["label", "mask"])
def test_train_and_eval_from_end_to_end(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", f"{kind}.yaml", "--train.epochs", "1", "--out", "run"]) == 0
    assert "report: run/report.html" in capsys.readouterr().out
    page = (folder / "run/report.html").read_text()
    assert page.count('src="data:image/png') == {"label": 2, "mask": 6}[kind]  # two images; image, target and answer

    for model in ("run", "run/model"):
        assert main(["eval", model, f"{kind}.csv", "--split", "val", "--json", "scores.json"]) == 0
        table = capsys.readouterr().out
        assert {"label": "balanced_accuracy", "mask": "mean_iou"}[kind] in table
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["images"] == 2
        rows = (folder / "run/metrics.csv").read_text().splitlines()
        val = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        assert scores["loss"] == pytest.approx(float(val["loss"]), rel=1e-5)
        name = next(iter(scores["metrics"]))
        assert scores["metrics"][name] == pytest.approx(float(val[name]))


def test_real_files_train_and_score(folder: Path, fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GeoTIFF with nodata and a JPEG."""
    names = ["geotiff/RGB.byte.tif", "geotiff/389225main_sw_1965_1024.jpg"]
    lines = [f"{fixtures / name},{label},train" for name, label in zip(names, "ab", strict=True)]
    (folder / "real.csv").write_text("\n".join(["image,label,split", *lines]))
    run = yaml.safe_load((folder / "label.yaml").read_text())
    run["data"]["csv"], run["model"]["region_encoder"]["region"] = "real.csv", 128
    (folder / "real.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", "--config", "real.yaml", "--train.epochs", "1", "--out", "run"]) == 0
    assert main(["eval", "run", "real.csv", "--split", "train"]) == 0
    assert "2 images" in capsys.readouterr().out


def test_a_stopped_real_run_continues_to_the_same_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gigaxt.training.log import TIME_COLUMNS, read_metrics
    from gigaxt.training.loop import Run

    command = ["train", "--config", "mask.yaml", "--train.ema", "0.9", "--out"]
    assert main([*command, "whole"]) == 0
    original = Run.step

    def stopping(self: Run) -> None:
        original(self)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "step", stopping)
    assert main([*command, "stopped"]) == 128 + signal.SIGTERM
    monkeypatch.setattr(Run, "step", original)
    assert main([*command, "stopped"]) == 0
    whole, stopped = (
        [{key: row[key] for key in row.keys() - TIME_COLUMNS} for row in read_metrics(folder / name / "metrics.csv")]
        for name in ("whole", "stopped")
    )
    assert stopped == whole
    files = [(folder / name / "model/model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_a_csv_alone_trains(folder: Path) -> None:
    flags = ["--train.epochs", "1", "--model.region-encoder.region", "64", "--model.context.dim", "16"]
    assert main(["train", "label.csv", *flags]) == 0
    config = yaml.safe_load((folder / "runs/label/config.yaml").read_text())
    assert config["model"]["head"]["class_names"] == ["green", "red"]
    assert config["data"]["csv"] == str(folder / "label.csv")
    assert main(["train", "label.csv", *flags]) == 0  # continues, with nothing left to do


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["fly"], "there is no verb `fly`", 2),
        (["trian"], "there is no verb `trian`; did you mean `train`?", 2),
        (["train"], "expected a CSV or a config", 2),
        (["train", "--config"], "--config: expected a path after it", 2),
        (["train", "--config", "none.yaml"], "none.yaml: cannot read the config: No such file", 2),
        (["train", "none.csv"], "none.csv: No such file", 2),
        (["train", "--config", "label.yaml", "--train.lrr", "1"], "--train.lrr, 1; did you mean `--train.lr`?", 2),
        (["train", "--config", "label.yaml", "--train.lr", "fast"], "--train.lr: could not convert string to float", 2),
        (["train", "--config", "label.yaml", "--train.lr", "-1"], "train.lr: expected a positive number, got -1.0", 2),
        (["train", "--config", "label.yaml", "--train.device", "gpu9"], "train.device: expected auto, cpu, cuda", 2),
        (["train", "--config", "unknown.yaml"], "train.epoch: unknown key; did you mean `epochs`?", 2),
        (["train", "--config", "bands.yaml", "--out", "x"], "bands", 2),
        (["train", "--config", "label.yaml", "--out", "."], ".: expected a new folder or one of a run", 2),
        (["train", "--config", "label.yaml", "--out", "label.csv"], "label.csv: expected a new folder", 2),
        (["eval", "nothing", "label.csv"], "nothing: expected the folder of a model", 2),
        (["eval"], "expected MODEL and CSV, got none; `gigaxt eval --help` lists the flags", 2),
        (["predict", "model", "a.tif"], "expected --out PATH, got none; `gigaxt predict --help` lists the flags", 2),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, status: int
) -> None:
    run = yaml.safe_load((folder / "label.yaml").read_text())
    run["train"]["epoch"] = 3
    (folder / "unknown.yaml").write_text(yaml.safe_dump(run))
    del run["train"]["epoch"]
    run["model"]["region_encoder"]["in_channels"] = 4
    (folder / "bands.yaml").write_text(yaml.safe_dump(run))
    assert main(arguments) == status
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in captured.err
    if arguments[-1] != "x":  # this one had begun
        assert len(captured.err.strip().splitlines()) == 1


def test_an_image_that_does_not_fit_the_model_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "label.yaml", "--train.batch", "1", "--out"]
    assert main(["train", *flags, "a", "--model.region-encoder.in-channels", "4"]) == 2
    assert ".tif: the model takes 4 bands, the image has 3" in capsys.readouterr().err
    assert main(["train", *flags, "b", "--model.input.gsd-m", "10"]) == 2
    assert ".tif: the model works at 10.0 m a pixel, the image does not say its pixel size" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_flags_that_tyro_refuses_are_one_line(folder: Path, encoding: str) -> None:
    code = """if True:
        from dataclasses import dataclass
        from gigaxt.cli.flags import parse
        @dataclass(kw_only=True)
        class Flags:
            rate: float = 1.0
        for args in (["--rat", "1"], ["--rate", "x"], ["--rate"], ["y"]):
            try:
                parse(Flags, args, verb="train", default=Flags())
            except Exception as error:
                print(error)
        """
    (folder / "flags.py").write_text(code)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    result = subprocess.run([sys.executable, "flags.py"], capture_output=True, text=True, check=True, env=environment)
    tail = "; `gigaxt train --help` lists the flags"
    assert result.stdout.splitlines() == [
        f"Unrecognized options: --rat, 1; did you mean `--rate`?{tail}",
        f"Error parsing --rate: could not convert string to float: 'x'{tail}",
        f"Missing value for argument '--rate'. Expected 1 values{tail}",
        f"Unrecognized options: y{tail}",
    ]


def test_bad_images_may_be_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One whose header is read and whose pixels cannot be: the error comes from within the model's stream."""
    pixels = np.zeros((70, 100, 3), np.uint8)
    for name in ("1.tif", "m5.tif"):  # an image to train on, a mask to evaluate on
        tifffile.imwrite(name, pixels if name == "1.tif" else pixels[..., 0], tile=(32, 32), compression="zlib")
        data = bytearray(Path(name).read_bytes())
        with tifffile.TiffFile(name) as file:
            for offset, count in zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True):
                data[offset : offset + count] = b"\xff" * count
        Path(name).write_bytes(bytes(data))
    assert main(["train", "--config", "mask.yaml", "--out", "stop"]) == 2
    assert "1.tif" in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", "--config", "mask.yaml", "--out", "skip", "--train.on-bad-image", "skip"]) == 0
    page = (folder / "skip/report.html").read_text()
    left_out = page[page.index("Images left out") : page.index("<h2>Next")]
    assert "1.tif" in left_out
    assert "m5.tif" in left_out


def test_debug_shows_the_traceback(folder: Path) -> None:
    from gigaxt.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["train", "--config", "none.yaml", "--debug"])


def test_unexpected_errors_and_ctrl_c_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigaxt.cli import train

    for error, status, text in (
        (ZeroDivisionError("by\nzero"), 1, "error: ZeroDivisionError: by zero; run again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):

        def fail(args: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr(train, "main", fail)
        assert main(["train"]) == status
        captured = capsys.readouterr().err
        assert captured.startswith(text)
        assert captured.count("\n") == 1


def test_help_is_instant_and_fits_a_screen() -> None:
    code = "import sys; from gigaxt.cli import main; main(['--help']); assert not {'torch', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) <= 24
    assert all(f"\n  {verb}" in result.stdout for verb in VERBS)


def test_help_of_train_begins_with_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "gigaxt train --config run.yaml --out runs/a" in "\n".join(text.splitlines()[:3])
    assert "--train.encoder-lr" in text
    assert "The region encoder's own learning rate" in text


def test_arguments_are_told_apart() -> None:
    rest, csv, config, out = split_arguments(
        ["--model.input.mean", "1", "2", "data.csv", "--config=run.yaml", "--data.csv", "other.csv", "--out", "x"]
    )
    assert rest == ["--model.input.mean", "1", "2", "--data.csv", "other.csv"]
    assert (csv, config, out) == ("data.csv", "run.yaml", "x")
