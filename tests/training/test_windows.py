"""Windows of scenes: where they are drawn, what they are, and what a model learns of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from tiny_run import segmentation_config

from gigaxt import ConfigError, DataError, Streaming, open_image
from gigaxt.augment import dihedral
from gigaxt.image.memory import ArrayImage
from gigaxt.image.views import Cropped
from gigaxt.scenes.inputs import InputConfig
from gigaxt.streaming.keyed import dropout_key
from gigaxt.targets.base import MaskTarget, WindowTarget
from gigaxt.targets.points import PointTarget
from gigaxt.training.ahead import Opened
from gigaxt.training.config import RunConfig
from gigaxt.training.loop import Run, train
from gigaxt.training.windows import Windows
from tiny_models import segmenter


def numbered(height: int, width: int) -> ArrayImage:
    return ArrayImage((np.arange(height * width) % 251).astype(np.uint8).reshape(height, width))


def scene(height: int = 150, width: int = 230, labelled: tuple[int, int, int, int] | None = None) -> Any:
    """An image of three bands, and its mask, which is known in a rectangle (x, y, w, h) only."""
    rng = np.random.default_rng(0)
    image = ArrayImage(rng.integers(1, 255, (height, width, 3)).astype(np.uint8), nodata=0)
    mask = rng.integers(0, 4, (height, width)).astype(np.uint8)
    if labelled is not None:
        x, y, w, h = labelled
        known = np.zeros(mask.shape, bool)
        known[y : y + h, x : x + w] = True
        mask[~known] = 255
    return image, MaskTarget(ArrayImage(mask))


def windows(side: int, *, context: bool = False, **given: Any) -> Windows:
    return Windows(side, InputConfig(**given), 64, ignore=255, context=context)


def test_windows_follow_from_the_seed_and_go_everywhere() -> None:
    image, target = scene()
    drawn = [windows(64).draw(0, image, target, seed) for seed in range(300)]
    assert drawn == [windows(64).draw(0, image, target, seed) for seed in range(300)]
    assert len(set(drawn)) > 200
    covered = np.zeros((150, 230), int)
    for x, y, w, h in drawn:
        assert (w, h) == (64, 64)
        covered[y : y + h, x : x + w] += 1
    assert covered.min() > 0
    assert covered[40:-40, 40:-40].max() < 5 * covered[40:-40, 40:-40].min()
    assert windows(64).draw(0, *scene(40, 300), 0)[2:] == (64, 40)
    assert windows(500).draw(0, image, target, 3) == (0, 0, 230, 150)


def test_what_was_found_of_a_scene_does_not_change_what_is_drawn() -> None:
    image, target = scene(labelled=(100, 50, 9, 9))
    kept = windows(48)
    for seed in range(20):
        assert kept.draw(0, image, target, seed) == windows(48).draw(0, image, target, seed)


def test_every_window_holds_labels_and_data() -> None:
    image, target = scene(labelled=(200, 3, 6, 5))
    for seed in range(40):
        x, y, w, h = windows(32).draw(0, image, target, seed)
        assert (target.draw(x, y, w, h)["target"] != 255).any()
    empty = ArrayImage(image.read(0, 0, 230, 150) * 0, nodata=0)
    with pytest.raises(DataError, match="none of its windows of 32 px holds a labelled pixel with data"):
        windows(32).draw(0, empty, target, 0)
    with pytest.raises(DataError, match="none of its windows"):
        windows(32).draw(1, image, scene(labelled=(0, 0, 0, 0))[1], 0)


def test_a_window_is_cut_at_the_models_pixel_size() -> None:
    image, target = scene(160, 240)
    image.mpp = (0.5, 0.5)
    taken, own = windows(32, mpp=1.0).take(0, image, target, 5)
    assert (taken.width, taken.height, taken.mpp) == (32, 32, (1.0, 1.0))
    assert isinstance(own, MaskTarget)
    own.check(taken)
    whole, within = windows(32, mpp=1.0, context=True).take(0, image, target, 5)
    assert (whole.width, whole.height) == (120, 80)
    assert isinstance(within, WindowTarget)
    x, y, w, h = within.window
    np.testing.assert_array_equal(whole.read(x, y, w, h), taken.read(0, 0, w, h))
    drawn, alone = within.draw(x, y, w, h), own.draw(0, 0, w, h)
    np.testing.assert_array_equal(drawn["target"], alone["target"])


@pytest.mark.parametrize("k", range(8))
def test_a_window_turns_with_its_image(k: int) -> None:
    mask, window = numbered(12, 17), (3, 2, 5, 7)
    target = WindowTarget(MaskTarget(mask), window, (17, 12)).turned(k)
    turned = dihedral(mask, k)
    drawn = target.draw(0, 0, turned.width, turned.height)
    inside = np.sort(drawn["target"][drawn["valid"]])
    np.testing.assert_array_equal(inside, np.sort(mask.read(*window).ravel()))
    cropped = target.cropped(1, 1, turned.width - 2, turned.height - 2)
    again = cropped.draw(-1, -1, turned.width, turned.height)
    np.testing.assert_array_equal(again["valid"][1:-1, 1:-1], drawn["valid"][1:-1, 1:-1])


def test_a_window_is_resampled_with_its_image() -> None:
    target = WindowTarget(MaskTarget(numbered(40, 60)), (20, 10, 16, 8), (60, 40))
    half, same = target.resampled(2.0, 2.0), target.resized(30, 20)
    assert half.window == same.window == (10, 5, 8, 4)
    assert half.size == same.size == (30, 20)


# The model.


@pytest.mark.parametrize("streaming", [Streaming(), Streaming(host_gib=1.0), Streaming(budget_gib=1.0)])
@pytest.mark.parametrize("overview", [[], [4]])
def test_with_context_the_loss_is_that_of_the_window_and_far_regions_get_no_gradient(
    streaming: Streaming, overview: list[int]
) -> None:
    """Against the whole scene in memory, with the tokens beside the window cut off from the graph by hand."""
    model = segmenter(overview=overview).double()
    model.train()
    image, target = scene()
    window = (70, 10, 60, 50)  # reaches regions (0, 1) and (0, 2) of 3 x 4
    given = WindowTarget(target, window, (230, 150))
    model.streaming = streaming
    model([image], [given], seed=1).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = copy.deepcopy(model)
    plain.zero_grad()
    batch = plain.batch([image], [target])
    chunks = [*batch.chunks(1), *batch.overview_chunks(1)]
    tokens, maps = [], []
    for chunk in chunks:
        with dropout_key(1, chunk.region_ids):
            t, m = plain.encode(batch.load(chunk))
        (_, _, place) = chunk.places[0]
        near = place.level > 0 or (place.row, place.col) in ((0, 1), (0, 2))
        tokens.append(t if near else t.detach())
        maps.append(m)
    context = plain.join(batch, torch.cat(tokens[:12]), torch.cat(tokens[12:]) if overview else tokens[0][:0])
    sums = []
    for i in (1, 2):
        drawn = given.draw(64 * i, 0, 64, 64)
        targets = {name: torch.from_numpy(value)[None] for name, value in drawn.items()}
        answers = plain.head(maps[i], context[i : i + 1].unflatten(1, (2, 2)))
        sums.append(plain.head.loss_sums(answers, targets))
    plain.head.loss([a + b for a, b in zip(*sums, strict=True)]).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        assert (a - found[name]).abs().max() <= 1e-10 * a.abs().max() + 1e-16, name


def test_only_the_window_is_scored_and_the_rest_is_its_context() -> None:
    model = segmenter().double()
    image, target = scene()
    window = (70, 10, 60, 50)
    found = model.evaluate([image], [WindowTarget(target, window, (230, 150))])
    assert found["weight_sum"] == 60 * 50
    changed = image.read(0, 0, 230, 150)
    changed[100:, 200:] = 255 - changed[100:, 200:] // 2
    other = model.evaluate([ArrayImage(changed, nodata=0)], [WindowTarget(target, window, (230, 150))])
    assert abs(other["loss"] - found["loss"]) > 1e-9
    alone = model.evaluate([Cropped(image, *window)], [target.cropped(*window)])
    assert abs(alone["loss"] - found["loss"]) > 1e-9


def test_passes_over_the_region_encoder_with_context() -> None:
    """1F of the regions beside the window, and those of a scene for the window's: 3F + 1B with nothing kept."""
    model = segmenter()
    image, target = scene()
    seen: list[int] = []
    model.encode.encoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    model([image], [WindowTarget(target, (70, 10, 60, 50), (230, 150))], seed=0).backward()
    assert sum(seen) == 10 + 3 * 2


# A run.


def run_of(folder: Path, **settings: Any) -> RunConfig:
    rng = np.random.default_rng(0)
    lines = ["image,mask,split"]
    for i in range(3):
        tifffile.imwrite(folder / f"{i}.tif", rng.integers(0, 255, (200, 150, 3)).astype(np.uint8), photometric="rgb")
        tifffile.imwrite(folder / f"m{i}.tif", rng.integers(0, 2, (200, 150)).astype(np.uint8))
        lines.append(f"{i}.tif,m{i}.tif,{'val' if i == 2 else 'train'}")
    (folder / "data.csv").write_text("\n".join(lines))
    return segmentation_config(folder / "data.csv", **settings)


@pytest.mark.parametrize("context", [False, True])
def test_a_run_on_windows(tmp_path: Path, context: bool) -> None:
    config = run_of(tmp_path, window=80, windows_per_scene=3, window_context=context, augment={"dihedral": True})
    result = train(config, tmp_path / "run")
    assert result.total_steps == result.step == 6
    assert result.best is not None
    assert sum(map(sum, result.best.confusion or [])) == 200 * 150  # evaluated on the whole scene
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "6 steps (6 an epoch)" in log
    assert "train.window" not in log


def test_each_scene_gives_its_windows_in_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, window=80, windows_per_scene=3, batch=2)
    names: list[str] = []
    accumulate = Run._accumulate

    def spy(run: Run, opened: Opened) -> float:
        names.extend(sample.images[0].name for sample in opened.samples)
        return accumulate(run, opened)

    monkeypatch.setattr(Run, "_accumulate", spy)
    train(config, tmp_path / "run")
    assert len(names) == len(set(names)) == 6
    assert sorted(Path(name.split(",")[0]).name for name in names) == ["0.tif"] * 3 + ["1.tif"] * 3
    assert all("80 x 80 px at" in name for name in names)


def test_few_scenes_are_told_of_windows(tmp_path: Path) -> None:
    train(run_of(tmp_path), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 images make 2 steps an epoch: for more of them train on windows (train.window" in log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows_per_scene": 3}, "are for a `window`"),
        ({"window_context": True}, "are for a `window`"),
        ({"window": 16}, "at least 32 px"),
        ({"window": 64, "windows_per_scene": 0}, "windows_per_scene: expected at least 1"),
        ({"window": 64, "augment": {"crop_area": 0.5}}, "exclude each other"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(tmp_path, **settings)


def test_foreground_is_found_in_the_whole_image(tmp_path: Path) -> None:
    """A window has the regions that lie on the polygons of the whole scene; windows beside them are not drawn."""
    from gigaxt.scenes.kept import kept_regions

    polygons = tmp_path / "tissue.geojson"
    polygons.write_text(
        '{"type": "Polygon", "coordinates": [[[130, 66], [190, 66], [190, 126], [130, 126], [130, 66]]]}'
    )
    image, target = scene(256, 320)
    for context in (False, True):
        drawing = windows(96, context=context, foreground=str(polygons))
        for seed in range(30):
            x, y, w, h = drawing.draw(0, image, target, seed)
            assert 128 - w < x < 192  # reaches the region that the polygon is in
            assert 64 - h < y < 128
    keep = kept_regions(Cropped(image, 100, 40, 200, 150), InputConfig(foreground=str(polygons)), 64)
    assert np.argwhere(keep).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    keep = kept_regions(Cropped(image, 128, 64, 150, 150), InputConfig(foreground=str(polygons)), 64)
    assert np.argwhere(keep).tolist() == [[0, 0]]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_share_of_windows_around_objects(share: float) -> None:
    """One object in a large scene: a window holds it by chance in 1 of 100, else when it is drawn around it."""
    image = open_image(np.ones((1000, 1000), np.uint8))
    target = PointTarget([[500.5, 300.5], [10, 10]], ignored=[False, True], size_px=(1000, 1000))
    windows = Windows(100, InputConfig(), 64, objects=share)
    held, places = 0, []
    for seed in range(200):
        x, y, w, h = windows.draw(0, image, target, seed)
        assert 0 <= x <= 900
        if x <= 300 < x + w and y <= 500 < y + h:
            held += 1
            places.append((300 - x, 500 - y))
    assert abs(held / 200 - share) < 0.12
    if share == 1:
        assert np.min(places) >= 12
        assert np.max(places) < 88
        assert np.std(places, axis=0).min() > 15


def test_objects_by_weight_and_without_data_around() -> None:
    pixels = np.ones((400, 400), np.uint8)
    pixels[:200] = 0
    image = ArrayImage(pixels[..., None], nodata=0)
    target = PointTarget([[300, 50], [300, 350], [50, 50]], weights=[0, 1, 0], size_px=(400, 400))
    windows = Windows(64, InputConfig(), 64, objects=1.0)
    assert all(windows.draw(0, image, target, seed)[0] > 250 for seed in range(20))
    only_in_nodata = PointTarget([[50, 50]], size_px=(400, 400))
    for seed in range(20):
        _, y, _, h = windows.draw(1, image, only_in_nodata, seed)
        assert y + h > 200
