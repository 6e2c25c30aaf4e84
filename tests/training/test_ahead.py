"""What is opened ahead is what would be opened in its turn, and what fails there fails in its turn."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tifffile
import torch
from tiny_run import segmentation_config

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.errors import ImageError
from gigaxt.nn.heads import SegmentConfig
from gigaxt.nn.xt import GigaXT, build_model
from gigaxt.scenes.batch import SceneBatch
from gigaxt.tasks.segmentation import Segmentation
from gigaxt.training import RunConfig, train
from gigaxt.training.ahead import Ahead
from gigaxt.training.checkpoint import checkpoints, load_checkpoint
from gigaxt.training.data import Sample, Samples, Skipped
from gigaxt.training.evaluate import tallied


class Opener:
    """Three steps of three samples, and their model; notes what is opened, and whether by the main thread."""

    def __init__(self, batch: int = 2) -> None:
        self.size, self.total = batch, 3
        self.by: list[tuple[Any, bool]] = []
        self.fails: set[int] = set()

    def note(self, what: Any) -> None:
        self.by.append((what, threading.current_thread() is threading.main_thread()))

    def open(self, step: int, skipped: Skipped) -> list[Sample]:
        self.note(step)
        if step in self.fails:
            if skipped is None:
                raise ImageError("bad.tif", f"in step {step}")
            skipped["bad.tif"] = "bad"
        row = Row(line=1, image=Path("a.tif"), label="a", split="train")
        return [Sample((row,), (f"{step}.{i}",), 0) for i in range(3)]  # type: ignore[arg-type]  # names stand for images

    def prepare(self, images: Any, targets: Any) -> Any:
        self.note(images)
        return images

    def ahead(self) -> Ahead[Any]:
        return Ahead(self, self)  # type: ignore[arg-type]  # prepares as a model does


def run_step(ahead: Ahead[Any], step: int, skipped: Skipped = None) -> list[Any]:
    return [given for _, given in ahead.groups(step, ahead.step(step, skipped), skipped)]


def test_all_but_the_first_group_are_opened_ahead() -> None:
    opener = Opener()
    ahead = opener.ahead()
    given = [run_step(ahead, step) for step in range(3)]
    ahead.drop()
    assert given == [[[f"{step}.0", f"{step}.1"], [f"{step}.2"]] for step in range(3)]
    main, thread = True, False
    assert opener.by == [
        (0, main),
        (["0.2"], thread),
        (1, thread),
        (["1.0", "1.1"], thread),
        (["1.2"], thread),
        (2, thread),
        (["2.0", "2.1"], thread),
        (["2.2"], thread),
    ]  # and no step 3


def test_what_fails_ahead_fails_in_its_turn() -> None:
    opener = Opener()
    opener.fails.add(1)
    ahead = opener.ahead()
    run_step(ahead, 0)
    with pytest.raises(ImageError, match="in step 1"):
        ahead.step(1, None)
    assert opener.by[-1] == (1, True)
    opener.fails.clear()
    assert run_step(ahead, 1) == [["1.0", "1.1"], ["1.2"]]  # it may be tried again


def test_the_thread_skips_nothing_by_itself() -> None:
    opener, skipped = Opener(), dict[str, str]()
    opener.fails.add(1)
    ahead = opener.ahead()
    run_step(ahead, 0, skipped)
    ahead.drop()
    assert not skipped
    run_step(ahead, 0, skipped)
    ahead.step(1, skipped)
    assert skipped == {"bad.tif": "bad"}
    assert opener.by[-1] == (1, True)


def test_what_was_opened_before_an_image_was_skipped_is_opened_again() -> None:
    opener, skipped = Opener(), dict[str, str]()
    ahead = opener.ahead()
    run_step(ahead, 0, skipped)
    skipped["0.0"] = "damaged"
    assert ahead.step(1, skipped).batch is None
    assert opener.by[-1] == (1, True)


def test_a_step_that_is_done_again_is_opened_again() -> None:
    """As after running out of memory."""
    opener = Opener(batch=3)
    ahead = opener.ahead()
    first = run_step(ahead, 0)
    assert run_step(ahead, 0) == first
    assert run_step(ahead, 1) == [["1.0", "1.1", "1.2"]]
    ahead.drop()
    assert opener.by[-1] == (["2.0", "2.1", "2.2"], False)


# Runs of real models.


def config_of(folder: Path, **settings: Any) -> RunConfig:
    rng = np.random.default_rng(0)
    lines = ["image,mask,split"]
    for i in range(5):
        pixels = rng.integers(0, 255, (130, 200, 3)).astype(np.uint8)
        tifffile.imwrite(folder / f"{i}.tif", pixels, photometric="rgb", compression="zlib")
        tifffile.imwrite(folder / f"m{i}.tif", rng.integers(0, 2, (130, 200)).astype(np.uint8))
        lines.append(f"{i}.tif,m{i}.tif,train")
    (folder / "data.csv").write_text("\n".join(lines))
    return segmentation_config(
        folder / "data.csv", **{"epochs": 2, "augment": {"dihedral": True, "colour": 0.2}, **settings}
    )


def damage(path: Path) -> None:
    """It can still be opened."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)


def weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(checkpoints(out / "checkpoints")[-1])[1]["model"]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch": 2, "accumulate": 2},
        {"window": 96, "windows_per_scene": 2, "window_context": True},
        {"on_bad_image": "skip"},
    ],
)
def test_a_run_has_the_same_weights_with_and_without(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, **settings)
    if "on_bad_image" in settings:
        damage(tmp_path / "3.tif")
    prepared: list[SceneBatch] = []
    given: list[Any] = []
    taken = Ahead._taken

    def spy(ahead: Ahead[Any], *key: Any) -> Any:
        found = taken(ahead, *key)
        given.append(found is not None)
        prepared.extend([] if found is None or found.batch is None else [found.batch])
        return found

    monkeypatch.setattr(Ahead, "_taken", spy)
    train(config, tmp_path / "ahead")
    first, *rest = given
    assert not first
    assert any(rest)
    if "on_bad_image" not in settings:
        assert all(rest)
        assert all(type(batch) is SceneBatch for batch in prepared)
    monkeypatch.setattr(Ahead, "_begin", lambda *_: None)
    train(config, tmp_path / "in turn")
    for name, a in weights(tmp_path / "ahead").items():
        assert torch.equal(a, weights(tmp_path / "in turn")[name]), name
    log = (tmp_path / "ahead/log.txt").read_text()
    assert log.count("skipped: ") == ("on_bad_image" in settings)


def test_an_evaluation_opens_ahead_and_scores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    damage(tmp_path / "3.tif")
    torch.manual_seed(0)
    model = build_model(config.model)
    manifest = Manifest.read(tmp_path / "data.csv")
    task = Segmentation(manifest, cast(SegmentConfig, config.model.head))
    given: list[type] = []
    evaluate = GigaXT.evaluate

    def spy(model: GigaXT, images: Any, targets: Any) -> Any:
        given.append(type(images))
        return evaluate(model, images, targets)

    monkeypatch.setattr(GigaXT, "evaluate", spy)

    def scores() -> tuple[Any, dict[str, str]]:
        skipped: dict[str, str] = {}
        return tallied(model, Samples(manifest.cases("train"), task), task, skipped=skipped).compute(), skipped

    found = scores()
    assert list(found[1]) == [str(tmp_path / "3.tif")]
    # The fourth cannot be prepared, so it is given as it is; it is skipped after what comes next was opened.
    assert given == [list, SceneBatch, SceneBatch, list, list]
    monkeypatch.setattr(Ahead, "_begin", lambda *_: None)
    assert scores() == found
    assert given[5:] == [list] * 5


def test_no_thread_is_left(tmp_path: Path) -> None:
    train(config_of(tmp_path, epochs=1), tmp_path / "run")
    for thread in threading.enumerate():
        if thread.name.startswith("gigaxt-"):
            thread.join(10)
            assert not thread.is_alive(), thread.name
