from __future__ import annotations

import csv
import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gigaxt.datasets.glyphs import KINDS, Glyphs, boxes_xywh, relief, stamps, texture
from gigaxt.datasets.legend import LegendConfig, boxes, draw_scene, make_dataset, render, write_scene
from gigaxt.errors import ConfigError

RULES = ("beacon", "legend")
SMALL = LegendConfig(size_px=(256, 320), density=120)


def whole(config: LegendConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
    height, width = config.size_px
    return render(config, draw_scene(config, index), 0, 0, width, height)


@pytest.mark.parametrize("rule", RULES)
def test_bytes_depend_on_seed_and_index_alone(tmp_path: Path, rule: str) -> None:
    config = replace(SMALL, rule=rule)
    folders = [make_dataset(config, tmp_path / name, scenes=2, val=1) for name in "ab"]
    alone = write_scene(config, 2, tmp_path / "alone")
    names = sorted(path.relative_to(folders[0]).as_posix() for path in folders[0].rglob("*") if path.is_file())
    rasters = [f"{kind}/00000{i}.tif" for kind in ("images", "masks") for i in range(3)]
    assert set(names) == {*rasters, "boxes.csv", "boxes.json", "legend.json", "masks.csv", "scenes.csv"}
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert alone.image.read_bytes() == (folders[0] / "images/000002.tif").read_bytes()
    assert (whole(config, 0)[0] != whole(config, 1)[0]).any()
    assert (whole(config, 0)[0] != whole(replace(config, seed=1), 0)[0]).any()


@pytest.mark.parametrize("rule", RULES)
def test_any_window_equals_the_whole(rule: str) -> None:
    config = replace(SMALL, rule=rule, size_px=(301, 417), channels=5)
    scene = draw_scene(config, 3)
    pixels, mask = whole(config, 3)
    assert pixels.shape == (301, 417, 5)
    for side in (33, 128):
        for y in range(0, 301, side):
            for x in range(0, 417, side):
                w, h = min(side, 417 - x), min(side, 301 - y)
                part, values = render(config, scene, x, y, w, h)
                np.testing.assert_array_equal(part, pixels[y : y + h, x : x + w])
                np.testing.assert_array_equal(values, mask[y : y + h, x : x + w])


@pytest.mark.parametrize("rule", RULES)
def test_files_hold_what_is_drawn(tmp_path: Path, rule: str) -> None:
    config = replace(SMALL, rule=rule, size_px=(300, 280))
    files = write_scene(config, 1, tmp_path)
    pixels, mask = whole(config, 1)
    with tifffile.TiffFile(files.image) as image:
        assert image.pages[0].is_tiled
        np.testing.assert_array_equal(image.pages[0].asarray(), pixels)
    np.testing.assert_array_equal(tifffile.imread(files.mask, key=0), mask)


def test_labels_masks_and_boxes_of_beacon() -> None:
    config = replace(SMALL, rule="beacon", kinds=5)
    for index in range(10):
        scene = draw_scene(config, index)
        _, mask = whole(config, index)
        assert scene.label == KINDS[scene.key] == config.label_classes[scene.key]
        assert config.mask_classes[1 + scene.key] == scene.label
        assert set(np.unique(mask)) == {0, 1 + scene.key}
        xywh, areas, classes = boxes(config, scene)
        assert len(xywh) == len(scene.glyphs.rows) == round(120 * 256 * 320 / 1e6)
        assert set(classes) == {1 + scene.key}
        assert areas.sum() == (mask > 0).sum()
        assert_boxes_are_tight(mask, xywh, areas)


def test_labels_masks_and_boxes_of_legend() -> None:
    config = replace(SMALL, rule="legend", kinds=4)
    for index in range(12):
        scene = draw_scene(config, index)
        _, mask = whole(config, index)
        counts = [int((scene.glyphs.kinds == kind).sum()) for kind in range(4)]
        unit = max(1, round(120 * 256 * 320 / 1e6 / 6))
        assert sorted(counts) == [0, unit, 2 * unit, 3 * unit]
        assert scene.label == str(sum(count < counts[scene.key] for count in counts))
        assert set(np.unique(mask)) <= {0, 1}
        xywh, areas, classes = boxes(config, scene)
        assert len(xywh) == counts[scene.key]
        assert set(classes) <= {1}
        assert areas.sum() == mask.sum()
        assert_boxes_are_tight(mask, xywh, areas)


def assert_boxes_are_tight(mask: np.ndarray, xywh: np.ndarray, areas: np.ndarray) -> None:
    for (x, y, w, h), area in zip(xywh, areas, strict=True):
        part = mask[y : y + h, x : x + w] > 0
        assert part.sum() == area
        assert part[0].any()
        assert part[-1].any()
        assert part[:, 0].any()
        assert part[:, -1].any()
        around = mask[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] > 0
        assert around.sum() == area, "glyphs touch, or the box is too small"


@pytest.mark.parametrize("rule", RULES)
def test_manifests_and_coco_file(tmp_path: Path, rule: str) -> None:
    config = replace(SMALL, rule=rule, kinds=3)
    folder = make_dataset(config, tmp_path, scenes=3, val=2, test=1)
    labels = list(csv.DictReader((folder / "scenes.csv").read_text().splitlines()))
    masks = list(csv.DictReader((folder / "masks.csv").read_text().splitlines()))
    assert [row["split"] for row in labels] == ["train"] * 3 + ["val"] * 2 + ["test"]
    assert [row["label"] for row in labels] == [draw_scene(config, i).label for i in range(6)]
    coco = json.loads((folder / "boxes.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [row["image"] for row in labels]
    assert [entry["name"] for entry in coco["categories"]] == list(config.mask_classes[1:])
    for i, row in enumerate(masks):
        mask = tifffile.imread(folder / row["mask"], key=0)
        mine = [entry for entry in coco["annotations"] if entry["image_id"] == i]
        assert sum(entry["area"] for entry in mine) == (mask > 0).sum()
        assert {entry["category_id"] for entry in mine} == set(np.unique(mask)) - {0}
    assert [entry["id"] for entry in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    settings = json.loads((folder / "legend.json").read_text())
    assert settings["config"]["rule"] == rule
    assert settings["label_classes"] == list(config.label_classes)


@pytest.mark.parametrize("rule", RULES)
def test_every_block_of_scenes_is_balanced(rule: str) -> None:
    config = replace(SMALL, rule=rule)
    scenes = [draw_scene(config, index) for index in range(240)]
    for start in range(0, 240, 4):
        assert {scene.label for scene in scenes[start : start + 4]} == set(config.label_classes)
        assert {scene.key for scene in scenes[start : start + 4]} == {0, 1, 2, 3}
    if rule == "legend":
        pairs = Counter((scene.key, scene.label) for scene in scenes)
        assert len(pairs) == 16
        assert min(pairs.values()) > 5  # 15 are expected of each


@pytest.mark.parametrize("rule", RULES)
def test_glyphs_alone_do_not_tell_the_corner(rule: str) -> None:
    config = replace(SMALL, rule=rule, density=150)
    shares = np.zeros((4, 4))
    for index in range(400):
        scene = draw_scene(config, index)
        shares[scene.key] += np.bincount(scene.glyphs.kinds, minlength=4)
    shares /= shares.sum(axis=1, keepdims=True)
    assert np.abs(shares - 0.25).max() < 0.05


def test_glyphs_are_far_from_the_mark_and_inside() -> None:
    config = replace(SMALL, distance=0.5, density=200)
    corners = set()
    for index in range(40):
        scene = draw_scene(config, index)
        mark, glyphs = scene.mark, scene.glyphs
        away = np.hypot(glyphs.rows - mark.rows, glyphs.cols - mark.cols)
        assert away.min() >= 0.5 * np.hypot(256, 320)
        for values, size in ((glyphs.rows, 256), (glyphs.cols, 320)):
            assert values.min() >= 12
            assert values.max() <= size - 12
        corners.add((bool(mark.rows[0] < 128), bool(mark.cols[0] < 160)))
        assert min(mark.rows[0], 256 - mark.rows[0]) < 64 - 20
        assert min(mark.cols[0], 320 - mark.cols[0]) < 64 - 20
        _, mask = whole(config, index)
        top, left = int(mark.rows[0]) - 20, int(mark.cols[0]) - 20
        assert not mask[top : top + 40, left : left + 40].any(), "the mark is background"
    assert len(corners) == 4


@pytest.mark.parametrize("size_px", [16, 40])
def test_kinds_can_be_told_from_pixels(size_px: int) -> None:
    """The best match among turned templates of all kinds, at the known place, is the right kind: marks and glyphs."""
    config = LegendConfig(kinds=8, size_px=(256, 256), mark_px=size_px, distance=0.4)
    right = 0
    for index in range(32):
        scene = draw_scene(config, index)
        pixels = np.pad(whole(config, index)[0].mean(axis=2), 16, mode="edge")  # the mark's casing may be cut off
        scores = []
        for kind in range(8):
            angles = np.deg2rad(np.arange(-20, 21, 5.0))
            one = np.ones(len(angles))
            glyphs = Glyphs(scene.mark.rows * one, scene.mark.cols * one, np.full(len(one), kind), angles, one[:, None])
            coverage, tops, lefts = stamps(glyphs, size_px)
            templates = relief(coverage)
            side = templates.shape[1]
            top, left = tops[0] + 16, lefts[0] + 16
            window = pixels[top : top + side, left : left + side].ravel()
            scores.append(max(np.corrcoef(template.ravel(), window)[0, 1] for template in templates))
        right += int(np.argmax(scores) == scene.key)
    assert right >= 31


def test_a_thumbnail_loses_the_glyphs() -> None:
    """Other kinds at the same places: another image at full size, at 1/32 the same but for a tenth of its texture."""
    config = replace(SMALL, size_px=(1024, 1024))
    scene = draw_scene(config, 0)
    other = replace(scene, glyphs=scene.glyphs._replace(kinds=(scene.glyphs.kinds + 1) % 4))
    large = [render(config, s, 0, 0, 1024, 1024)[0].mean(axis=2) for s in (scene, other)]
    small = [pixels.reshape(32, 32, 32, 32).mean(axis=(1, 3)) for pixels in large]
    assert np.abs(large[0] - large[1]).max() > 80
    assert np.abs(small[0] - small[1]).std() < 0.1 * small[0].std()


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_shapes_stay_in_their_circle_and_have_an_area(kind: int) -> None:
    angles = np.linspace(0, 6, 25)
    place = np.full(25, 50.3)
    glyphs = Glyphs(place, place + 0.4, np.full(25, kind), angles, np.ones((25, 3), dtype=np.float32))
    coverage, tops, lefts = stamps(glyphs, 16)
    assert np.abs(relief(coverage).sum(axis=(1, 2))).max() < 1e-4
    np.testing.assert_allclose(np.ptp(relief(coverage), axis=(1, 2)), 1, atol=0.05)
    alpha = coverage[:, 0]
    rows, cols = np.indices(alpha.shape[1:]) + 0.5
    away = np.hypot(rows + tops[0] - 50.3, cols + lefts[0] - 50.7)
    assert not alpha[:, away > 8.75].any()
    assert not coverage[:, :, 0].any()
    assert not coverage[:, :, :, -1].any()
    assert alpha.sum(axis=(1, 2)).min() > 0.2 * np.pi * 64
    _, areas = boxes_xywh(glyphs, 16)
    assert areas.max() < 1.25 * areas.min()  # turning changes no shape


def test_texture_has_the_asked_amplitude() -> None:
    smooth = texture(5, 0, 0, 600, 600, 3, smooth=0.2, noise=0)
    assert 0.1 < np.abs(smooth).max() <= 0.2
    noise = texture(5, 0, 0, 64, 64, 6, smooth=0, noise=0.1)
    assert noise.shape == (64, 64, 6)
    assert abs(noise.std() - 0.1 / np.sqrt(3)) < 0.003
    channels = np.corrcoef(noise.reshape(-1, 6).T)
    assert np.abs(channels - np.eye(6)).max() < 0.06
    assert abs(np.corrcoef(noise[1:, :, 0].ravel(), noise[:-1, :, 0].ravel())[0, 1]) < 0.06


def test_far_window_of_a_large_scene() -> None:
    config = LegendConfig(size_px=(60_000, 70_000), density=2.0)
    scene = draw_scene(config, 0)
    assert len(scene.glyphs.rows) == 8400
    row, col = int(scene.glyphs.rows[-1]), int(scene.glyphs.cols[-1])
    pixels, mask = render(config, scene, col - 20, row - 20, 40, 40)
    assert mask[20, 20] == 1 + scene.key or scene.glyphs.kinds[-1] == KINDS.index("ring")
    assert pixels.std() > 10


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    peaks = []
    for height in (512, 2048):
        config = replace(SMALL, size_px=(height, 512))
        write_scene(config, 0, tmp_path)
        tracemalloc.start()
        write_scene(config, 1, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "beakon"}, "`rule` is 'beakon'"),
        ({"kinds": 9}, "`kinds` is 9; expected 2 to 8"),
        ({"kinds": 1}, "`kinds` is 1"),
        ({"glyph_px": 4}, "`glyph_px` is 4"),
        ({"mark_px": 12}, "`mark_px` 12"),
        ({"size_px": (40, 512)}, "a mark of 40 px needs 48 px"),
        ({"distance": 1.0}, "`distance` is 1.0"),
        ({"density": 0.0}, "`density` is 0.0"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LegendConfig(**change)
    assert message in str(caught.value)


def test_too_many_glyphs() -> None:
    with pytest.raises(ConfigError, match=r"do not fit into 256 x 320 px .* there is room for \d+; lower `density`"):
        draw_scene(replace(SMALL, density=5000), 0)
    crowded = replace(SMALL, density=900)  # more than the wide lattice holds
    _, mask = whole(crowded, 0)
    xywh, areas, _ = boxes(crowded, draw_scene(crowded, 0))
    assert areas.sum() == (mask > 0).sum()
    assert len(xywh) == round(900 * 256 * 320 / 1e6)
