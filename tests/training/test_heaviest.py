from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from tiny_run import TinyModel, tiny_config

from gigaxt.errors import DataError
from gigaxt.scenes.inputs import InputConfig
from gigaxt.training import RunConfig, run_config
from gigaxt.training.data import Samples
from gigaxt.training.heaviest import (
    count_regions,
    given_samples,
    heaviest_evaluation,
    heaviest_step,
    mean_regions,
    training_sizes,
)
from gigaxt.training.loop import Run
from gigaxt.training.run_folder import prepare_run
from gigaxt.training.signals import Signals


def run_of(config: RunConfig, out: Path) -> Run:
    folder, config, task = prepare_run(config, out)
    return Run(config, folder, task, torch.device("cpu"), Signals())


def test_regions_are_counted_by_size(csv: Path) -> None:
    config = tiny_config(csv)
    _, config, task = prepare_run(config, csv.parent / "run")
    samples = Samples(task.manifest.cases("train"), task)
    assert {count_regions(samples.plain(i), config.model) for i in range(len(samples))} == {1}
    wide = replace(config.model, input=replace(config.model.input, resize_px=200))
    assert max(count_regions(samples.plain(i), wide) for i in range(len(samples))) == 4 * 4


def test_a_forward_pass_sees_several_windows_of_a_scene_and_an_evaluation_whole_ones(
    models: list[TinyModel], tmp_path: Path
) -> None:
    sizes = {"a": 256, "small": 128, "large": 384, "new": 512}
    for name, side in sizes.items():
        for kind, shape in (("", (side, side, 3)), ("_mask", (side, side))):
            tifffile.imwrite(tmp_path / f"{name}{kind}.tif", np.zeros(shape, np.uint8))
    (tmp_path / "data.csv").write_text(
        "image,mask,split\na.tif,a_mask.tif,train\nsmall.tif,small_mask.tif,val\nlarge.tif,large_mask.tif,val\n"
    )
    model = {"region_encoder": {"name": "convnextv2_atto", "region": 64}, "head": {"kind": "segment", "classes": 2}}
    settings = {"batch": 3, "window": 64, "windows_per_scene": 4, "device": "cpu"}
    data = {"data": {"csv": str(tmp_path / "data.csv")}, "model": model, "train": settings}
    run = run_of(run_config(data), tmp_path / "run")
    found = training_sizes(run)
    assert found == {0: 16}
    step = heaviest_step(run, found, [])
    assert [(sample.images[0].width, sample.images[0].height) for sample in step] == [(64, 64)] * 3
    assert len({sample.images[0].name for sample in step}) > 1
    (evaluated,) = heaviest_evaluation(run, [])
    assert evaluated.images[0].name == str(tmp_path / "large.tif")
    given = given_samples(run, [str(tmp_path / "small.tif"), str(tmp_path / "new.tif")], 0)
    assert [sample.images[0].width for sample in heaviest_step(run, found, given)] == [64] * 3
    (evaluated,) = heaviest_evaluation(run, given)
    assert evaluated.images[0].width == 512


@pytest.mark.parametrize(
    ("settings", "resize_px", "mean"), [({}, None, 4), ({"crop_area": 0.5}, None, 3), ({"crop_area": 0.5}, 9, 4)]
)
def test_random_windows_have_fewer_regions(
    settings: dict[str, Any], resize_px: int | None, mean: float, csv: Path, models: list[TinyModel]
) -> None:
    config = tiny_config(csv, augment=settings)
    run = run_of(
        replace(config, model=replace(config.model, input=InputConfig(resize_px=resize_px))), csv.parent / "run"
    )
    assert mean_regions(run, {0: 2, 5: 6}) == mean


def test_images_that_training_skips_are_skipped(csv: Path, models: list[TinyModel]) -> None:
    (csv.parent / "1.tif").write_bytes(b"II*\0garbage")
    run = run_of(tiny_config(csv, on_bad_image="skip", batch=8), csv.parent / "run")
    sizes = training_sizes(run)
    assert sorted(sizes) == [0, 2, 3, 4, 5, 6]
    assert len(heaviest_step(run, sizes, [])) == 6
    for i in range(7):
        (csv.parent / f"{i}.tif").write_bytes(b"")
    with pytest.raises(DataError, match="none of the training images can be opened; the first: "):
        training_sizes(run_of(tiny_config(csv, on_bad_image="skip"), csv.parent / "run"))
