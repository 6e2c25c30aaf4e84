from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gigaxt import ModelConfig, build_model, open_image
from gigaxt.cli import VERBS
from gigaxt.image.base import Image
from gigaxt.training.config import RunConfig, read_yaml, run_config
from gigaxt.xt_release.context import KIND, POOLED_KIND
from gigaxt.xt_release.scores import TOP1, Score, table_row

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.rglob("*.yaml"))
RECIPES = sorted((FOLDER / "inaturalist").glob("*.yaml"))
ROWS = sorted((FOLDER / "inaturalist").glob("swin_*.yaml"))

SMALL_SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 2], "window_size": 4}


def read(path: Path) -> RunConfig:
    return run_config(read_yaml(path))


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path not in RECIPES or path.stem == "swin_t_256"], ids=lambda path: path.stem
)
def test_example_is_a_valid_run(path: Path) -> None:
    """Every key is known, and the model builds (without its pretrained weights, which need the network)."""
    config = read(path).model
    with torch.device("meta"):
        model = build_model(replace(config, region_encoder=replace(config.region_encoder, pretrained=False)))
    assert sum(p.numel() for p in model.parameters()) > 1e6


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same model with regions of 32 px and a few channels."""
    name = (
        "swinv2_tiny_window16_256" if config.region_encoder.name.startswith("convnext") else config.region_encoder.name
    )
    tokens = None if config.region_encoder.tokens is None else 1
    encoder = replace(config.region_encoder, name=name, region=32, pretrained=False, options=SMALL_SWIN, tokens=tokens)
    dim = {KIND: 128, POOLED_KIND: 64}.get(config.context.kind, 32)
    size = None if config.input.resize_px is None else config.input.resize_px // 8
    return replace(
        config,
        region_encoder=encoder,
        context=replace(config.context, dim=dim),
        input=replace(config.input, resize_px=size, foreground=None),
    )


def made_image(config: ModelConfig) -> Image:
    """Pixels that fit a recipe's input, at half the pixel size that it works at."""
    random, bands = np.random.default_rng(0), config.region_encoder.in_channels
    image = open_image(random.integers(0, 100, (150, 200, bands)).astype(np.uint8))
    image.band_names = tuple(config.input.band_names or image.band_names)
    image.mpp = None if config.input.mpp is None else (config.input.mpp / 2, config.input.mpp / 2)
    if config.input.gsd_m is not None:
        half = config.input.gsd_m / 2
        image.crs, image.transform = "EPSG:32632", (half, 0.0, 5e5, 0.0, -half, 5e6)
    return image


CLASSIFIERS = {
    "slides": ([2], [0]),
    "slides_labels": ([2], [[1.0, np.nan]]),
    "slides_survival": ([2], [[3.5, 1.0]]),
    "scene_classification": ([1, 1], [0, 3]),
}
"""Recipe -> images of each case, targets."""


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification_recipe_learns_from_cases(name: str) -> None:
    config = shrunk(read(FOLDER / f"{name}.yaml").model)
    if config.head.kind == "classify" and config.head.target == "survival":
        config = replace(config, head=replace(config.head, time_bins=[1.0, 3.0, 9.0]))
    counts, targets = CLASSIFIERS[name]
    model = build_model(config)
    loss = model([[made_image(config) for _ in range(count)] for count in counts], targets)
    loss.backward()
    assert 0.1 < loss.item() < 5
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path not in RECIPES and path.stem != "base"], ids=lambda path: path.stem
)
def test_commands_of_a_recipe(path: Path) -> None:
    """Its text says data, commands and hours; the commands have known verbs and name files that are there."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert all(re.search(rf"^# {part}: ", text, re.MULTILINE) for part in ("Data", "Command", "Hours"))
    commands = re.findall(r"gigaxt ([a-z-]+) ([^`\n]*)", text)
    assert "train" in dict(commands)
    assert {verb for verb, _ in commands} <= set(VERBS)
    named = re.findall(r"--config (\S+)", text)
    assert path.relative_to(FOLDER.parent).as_posix() in named
    assert all((FOLDER.parent / name).is_file() for name in named)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_answers_and_learns(path: Path) -> None:
    model = build_model(shrunk(read(path).model))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 45, 60, 3)).astype(np.uint8)
    loss = model([open_image(image) for image in pixels], [3, 283])
    loss.backward()
    assert 4 < loss.item() < 8  # log 284 = 5.6
    assert all(p.grad is not None for p in model.parameters())


def row_of(path: Path) -> str:
    """The row that a file is named after: swin_t_hyper_512_256 -> Swin-T Hyper 512/256."""
    names = {re.sub(r"[-/ ]", "_", row).lower(): row for row in TOP1}
    return names[path.stem]


def test_every_row_of_the_published_table_has_a_recipe() -> None:
    assert sorted(map(row_of, ROWS)) == sorted(TOP1)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_row_says_what_it_is(path: Path) -> None:
    """Its model is that of the row, and its text has the row's score and a command that names the file."""
    row, config, text = row_of(path), read(path), path.read_text()
    assert config.model.input.resize_px is not None
    if "XL" in row:
        assert config.model.context.kind == "xl"
        assert "OURS" in text.splitlines()[0]
    else:
        assert table_row(config.model, config.model.input.resize_px) == row
    low, high = Score(852, round(TOP1[row] * 8.52), 0).interval()
    assert f"published {TOP1[row]:.2f} % top-1 of 852 images (95%: {low:.1f} to {high:.1f})" in text
    assert f"--config examples/inaturalist/{path.name} --out runs/{path.stem}\n" in text
    assert re.search(r"^# Hours:    estimated \d+, ", text, re.MULTILINE)


def test_published_recipe() -> None:
    config = read(FOLDER / "inaturalist/swin_t_hyper_512_256.yaml")
    train, head, given = config.train, config.model.head, config.model.input
    assert (train.optimizer, train.lr, train.weight_decay, train.epochs) == ("adamw", 1e-4, 1e-4, 100)
    assert (train.schedule, train.warmup_epochs, train.lr_floor, train.clip_grad) == ("cosine", 0, 0.01, 5)
    augment = train.augment
    assert (augment.crop_area, augment.mirror, augment.randaugment) == (0.08, True, 9)
    assert (head.classes, head.label_smoothing) == (284, 0.3)
    assert (given.resize_px, given.resize_side, given.rgb, config.model.region_encoder.region) == (
        512,
        "both",
        True,
        256,
    )


def test_the_better_baseline_differs_in_the_context_alone() -> None:
    context, baseline = (read(FOLDER / f"inaturalist/better_{name}.yaml") for name in ("context", "baseline"))
    assert baseline.model.context.kind == "none"
    assert context.model.context.bidirectional
    same = replace(baseline, model=replace(baseline.model, context=context.model.context))
    assert same == context
    assert context.model.input.resize_side == "shortest"
    assert context.train.augment.crop_area is None
