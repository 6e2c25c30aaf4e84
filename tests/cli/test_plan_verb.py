from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from gigaxt.cli import main
from gigaxt.cli.plan import short_time
from gigaxt.streaming.rows import Streaming
from gigaxt.training import config_edit, plan
from gigaxt.training.device import has_bfloat16
from gigaxt.training.rehearsal import Found, job_of, rehearse

ROOM = plan.Room(device="cpu", host_total=64.0, host_free=40.0, device_total=64.0, device_free=40.0)
FOUND = Found(
    images=["scene.tif", "other.tif"],
    size_px=(25000, 29000),
    regions=11172,
    mean_regions=5586.0,
    samples=10,
    steps=5,
    step_s=400.0,
    evaluate_s=100.0,
    host_gib=4.75,
    device_gib=0.0,
    graph_gib=0.001,
    maps_gib=0.0,
    passes=2.0,
    streaming={"budget_gib": 0.0, "host_gib": 0.0, "chunk_regions": 4},
    disk_gib=0.5,
    device="cpu",
    chunk_s={"4": 0.03, "8": 0.02},
    cold_read_s=0.005,
    read_s=0.001,
    evaluated=["largest.tif"],
)
YAML = """# mine
data: {csv: data.csv}
model:
  region_encoder: {name: convnextv2_atto}
  head: {kind: classify, classes: 2}
train:
  streaming: {budget_gib: 0.0, chunk_regions: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path / "run.yaml"


def rehearsed(monkeypatch: pytest.MonkeyPatch, found: Found | None) -> list[Streaming]:
    """Rehearsals give `found`; returns the settings that are rehearsed."""
    seen: list[Streaming] = []

    def apart(config: Any, images: Any, streaming: Streaming, room: Any, *, probe: bool) -> Any:
        seen.append(streaming)
        return (found, 0.0) if found else (None, 36.1)

    monkeypatch.setattr(plan, "rehearse_apart", apart)
    monkeypatch.setattr(plan, "look_at_machine", lambda _: ROOM)
    return seen


def test_the_table(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsed(monkeypatch, FOUND)
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    for text in (
        "scene.tif and 1 more, 29,000 x 25,000 px, 11,172 regions in all",
        "4.75 GiB, 40.0 free of 64.0",
        "6:40 min, 35.8 ms a region",
        "33:20 min, 5 steps, 5,586 regions a sample",
        "1:40 min for largest.tif",
        "2.00 forward + 1 backward",
        "4 regions a chunk, budget 0 GiB; 11.17 GiB would keep all",
        "reading            5 ms a region cold, 1 ms again; behind the computation, 17% of that step",
        "choice             8 regions a chunk, budget 11.41 GiB: at most 15.93 GiB",
        "\nfits\n",
    ):
        assert text in out
    assert config.read_text() == YAML


def test_fit_rehearses_and_writes_the_choice(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rehearsed(monkeypatch, FOUND)
    assert main(["plan", str(config), "--fit"]) == 0
    assert seen == [Streaming(budget_gib=0.0, chunk_regions=4), Streaming(budget_gib=11.41, chunk_regions=8)]
    assert "  streaming: {budget_gib: 11.41, host_gib: 0.0, chunk_regions: 8}" in config.read_text()
    assert config.read_text().startswith("# mine")


def test_what_to_change_where_it_does_not_fit(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsed(monkeypatch, None)
    assert main(["plan", str(config), "--fit"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: stopped at 36.1 GiB, with 40.0 of 64.0 GiB free" in out
    assert "train.streaming.chunk_regions: 2" in out
    assert config.read_text() == YAML


def test_a_disk_that_is_too_small_and_slow_reading_are_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsed(monkeypatch, replace(FOUND, disk_gib=1e9, cold_read_s=1.0))
    assert main(["plan", str(config)]) == 1
    out = capsys.readouterr().out
    assert "the disk of the run folder is too small" in out
    assert "reading is the limit" in out


SLOW = {"cold_read_s": 0.05, "cold_bytes": 5e5}
CACHED = YAML.replace("data: {csv: data.csv}", "data: {csv: data.csv, cache: kept}")


@pytest.mark.parametrize(
    ("yaml", "changes", "told", "not_told"),
    [
        (YAML, SLOW, ["50 ms a region cold (10 MB/s)", "the limit: 142%", "--cache DIR", "readers: 8"], ["convert"]),
        (CACHED, SLOW, ["from the second time on the images come from data.cache"], ["--cache DIR"]),
        (YAML, SLOW | {"read_s": 0.017, "decode_s": 0.016}, ["decoding is what takes long"], ["--cache DIR"]),
        (YAML, SLOW | {"read_s": 0.017, "decode_s": 0.002}, ["--cache DIR"], ["decoding"]),
        (YAML, SLOW | {"storage": "strips of 3 rows, deflate"}, ["the images lie in strips of 3 rows, deflate"], []),
        (
            YAML,
            {"still_cached": ["a.tif", "b.tif"]},
            ["\n                     not cold: the system would not forget a.tif and 1 more"],
            ["--cache DIR", "readers"],
        ),
    ],
)
def test_what_to_do_about_slow_reading(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    yaml: str,
    changes: dict[str, Any],
    told: list[str],
    not_told: list[str],
) -> None:
    config.write_text(yaml)
    rehearsed(monkeypatch, replace(FOUND, **changes))
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nfits\n")
    assert [text for text in told if text not in out] == []
    assert [text for text in not_told if text in out] == []


@pytest.mark.parametrize(("bf16_s", "told"), [(0.0, False), (0.019, False), (0.01, True)])
def test_bfloat16_is_recommended_where_it_was_faster(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bf16_s: float, told: bool
) -> None:
    rehearsed(monkeypatch, replace(FOUND, bf16_s=bf16_s))
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    line = "\n- train.amp: bf16 takes 50% of the region encoder's time here: 10 ms instead of 20 ms a region\n"
    assert (line in out) == ("bf16" in out) == told


def test_a_step_of_several_parts_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(YAML.replace("train:", "train:\n  batch: 2\n  accumulate: 4"))
    rehearsed(monkeypatch, FOUND)
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    assert "heaviest part of a step: scene.tif" in out
    assert "time of that part  6:40 min, 35.8 ms a region; a step has 4 of them (train.accumulate)" in out
    rehearsed(monkeypatch, None)
    assert main(["plan", str(config)]) == 1
    assert "train.batch: 1, train.accumulate: 8" in capsys.readouterr().out


def test_a_config_that_cannot_be_written_is_told_first(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = rehearsed(monkeypatch, FOUND)
    monkeypatch.setattr(config_edit.os, "access", lambda folder, mode: folder != config.parent)
    assert main(["plan", str(config), "--fit"]) == 2
    assert "run.yaml: expected a file in a folder that can be written, for --fit" in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize(("seconds", "text"), [(0.0358, "35.8 ms"), (0.9994, "999 ms"), (1.15, "1.15 s")])
def test_times_of_a_region(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


def test_a_link_to_a_config_stays_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed(monkeypatch, FOUND)
    (config.parent / "link.yaml").symlink_to(config)
    assert main(["plan", str(config.parent / "link.yaml"), "--fit"]) == 0
    assert (config.parent / "link.yaml").is_symlink()
    assert "chunk_regions: 8" in config.read_text()


def test_a_run_that_keeps_all_gets_a_better_chunk(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(YAML.replace("budget_gib: 0.0", "budget_gib: null"))
    rehearsed(monkeypatch, FOUND)
    assert main(["plan", str(config), "--fit"]) == 0
    assert "streaming: {budget_gib: 11.41, host_gib: 0.0, chunk_regions: 8}" in config.read_text()


def test_reading_threads_survive_a_fit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(YAML.replace("chunk_regions: 4", "chunk_regions: 4, readers: 6"))
    seen = rehearsed(monkeypatch, FOUND)
    assert main(["plan", str(config), "--fit"]) == 0
    assert [streaming.readers for streaming in seen] == [6, 6]
    assert "chunk_regions: 8, readers: 6}" in config.read_text()


@pytest.mark.parametrize(
    ("change", "args", "text"),
    [
        ("budget_gib: -1", [], "expected a number of GiB from 0"),
        ("budget_gib: 1000000", [], "expected at most the"),
        ("budget_gibs: 1", [], "did you mean `budget_gib`"),
        ("readers: 0", [], "streaming.readers: expected at least 1 thread"),
        ("budget_gib: 0.0", ["none.tif"], "none.tif: there is no such image"),
        (
            "budget_gib: 0.0",
            ["--out", __file__],
            f"expected a folder that can be written, {__file__} is a file",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    change: str, args: list[str], text: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(YAML.replace("budget_gib: 0.0", change))
    (config.parent / "data.csv").write_text("image,label\na.tif,x\nb.tif,y\n")
    assert main(["plan", str(config), *args]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_token_cache_that_cannot_be_written_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = rehearsed(monkeypatch, FOUND)
    config.write_text(YAML.replace("train:", "train:\n  encoder: frozen\n  token_cache: run.yaml/tokens"))
    assert main(["plan", str(config)]) == 2
    assert "train.token_cache: " in capsys.readouterr().err
    assert not seen


def test_passes_of_a_share_of_the_gradient(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsed(monkeypatch, replace(FOUND, passes=1.25))
    config.write_text(YAML.replace("train:", "train:\n  grad_share: 0.25"))
    assert main(["plan", str(config)]) == 0
    assert "1.25 forward + 0.25 backward" in capsys.readouterr().out


def test_no_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "no.yaml")]) == 2
    assert "expected a run's YAML file" in capsys.readouterr().err


def test_a_token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first epoch fills it, later ones read it; the rehearsal uses one of its own."""

    found: list[Found] = []

    def here(config: Any, images: Any, streaming: Streaming, room: Any, *, probe: bool) -> tuple[Found, float]:
        """In this process; `test_memory_is_predicted_within_a_tenth` has one of its own."""
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        found.append(rehearse(job_of(config, images, streaming, probe=probe), folder))
        return found[-1], 0.0

    monkeypatch.setattr(plan, "rehearse_apart", here)
    for name in "abc":
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((160, 160, 3), np.uint8), photometric="rgb")
    (tmp_path / "data.csv").write_text("image,label,split\na.tif,x,train\nb.tif,y,train\nc.tif,y,val\n")
    small = "convnextv2_atto, region: 64, options: {depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}"
    text = YAML.replace("convnextv2_atto", small).replace("train:", "train:\n  encoder: frozen\n  epochs: 2")
    (tmp_path / "run.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "run.yaml")]) == 0
    assert "1.00 forward + no backward of the region encoder" in capsys.readouterr().out
    assert (found[0].bf16_s > 0) == has_bfloat16(torch.device("cpu"))
    (tmp_path / "run.yaml").write_text(text.replace("frozen", "frozen\n  token_cache: tokens"))
    assert main(["plan", str(tmp_path / "run.yaml")]) == 0
    out = capsys.readouterr().out
    assert "1 forward of the region encoder, which is frozen, then none: tokens are in the cache" in out
    assert "an epoch once all are there; " in out
    assert not (tmp_path / "tokens").exists()


def test_times_with_a_token_cache(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsed(monkeypatch, replace(FOUND, step_s=20.0, first_step_s=400.0, token_cache_gib=60.0, passes=0.0))
    assert main(["plan", str(config)]) == 0
    out = capsys.readouterr().out
    for text in (
        "6:40 min, 35.8 ms a region",
        "33:20 min, 5 steps",
        "1:40 min an epoch once all are there; 60 GiB for the training images: more than train.token_cache_gib, 50",
        "behind the computation, 14% of that step",
    ):
        assert text in out
