from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from gigaxt.datasets.manifest import Manifest
from gigaxt.errors import DataError
from gigaxt.image.open import open_image
from gigaxt.nn.heads import SegmentConfig
from gigaxt.tasks import Segmentation, fitted_numbers, read_manifest
from gigaxt.tasks.pixel_scoring import OneClassPixels


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    tifffile.imwrite(tmp_path / "image.tif", np.zeros((20, 30, 3), np.uint8), photometric="rgb")
    mask = np.zeros((20, 30), np.uint8)
    mask[:5], mask[5:7], mask[7] = 1, 255, 9  # 9: no class of the model
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    tifffile.imwrite(tmp_path / "small.tif", mask[:, :29])
    tifffile.imwrite(tmp_path / "float.tif", mask.astype(np.float32))
    lines = ["image.tif,mask.tif,train", "image.tif,small.tif,train", "image.tif,float.tif,train"]
    (tmp_path / "data.csv").write_text("\n".join(["image,mask,split", *lines]))
    return Manifest.read(tmp_path / "data.csv")


def test_targets(manifest: Manifest) -> None:
    task = Segmentation(manifest, SegmentConfig(classes=3))
    rows, image = manifest.rows, open_image(manifest.rows[0].image)
    mask = task.target(rows[0], image).mask
    assert (mask.height, mask.width, mask.channels) == (20, 30, 1)
    with pytest.raises(DataError, match=r"small\.tif.*29 x 20 px.*image\.tif has 30 x 20"):
        task.target(rows[1], image)
    with pytest.raises(DataError, match=r"float\.tif: expected a mask of whole numbers"):
        task.target(rows[2], image)


def test_pixels_are_counted_strip_by_strip(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigaxt.tasks.segmentation.STRIP_ROWS", 3)
    manifest.rows[:] = manifest.rows[:1]
    assert Segmentation(manifest, SegmentConfig(classes=3)).class_counts("train") == [12 * 30, 5 * 30, 0]


def answer(true: np.ndarray, given: np.ndarray, classes: int) -> dict[str, torch.Tensor]:
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (true, given), 1)
    return {"confusion": torch.from_numpy(confusion), "loss": torch.tensor(2.0), "weight_sum": torch.tensor(3.0)}


def test_metrics_against_a_naive_count(manifest: Manifest) -> None:
    random = np.random.default_rng(0)
    true, given = random.integers(0, 3, (2, 500)), random.integers(0, 3, (2, 500))
    tally = Segmentation(manifest, SegmentConfig(classes=4)).tally()  # the fourth class neither occurs nor is answered
    for i in range(2):
        tally.update([manifest.rows[i]], [None], answer(true[i], given[i], 4))
    result = tally.compute()

    t, g = true.ravel(), given.ravel()
    iou = [((t == k) & (g == k)).sum() / ((t == k) | (g == k)).sum() for k in range(3)]
    f1 = [2 * ((t == k) & (g == k)).sum() / ((t == k).sum() + (g == k).sum()) for k in range(3)]
    assert result.metrics == pytest.approx(
        {"mean_iou": np.mean(iou), "pixel_accuracy": (t == g).mean(), "f1_macro": np.mean(f1)}
    )
    assert [result.per_class[str(k)]["iou"] for k in range(3)] == pytest.approx(iou)
    assert np.isnan(result.per_class["3"]["iou"])
    assert (result.images, result.loss) == (2, 2.0)
    assert result.confusion is not None
    assert np.sum(result.confusion) == 1000


def test_the_worst_image_comes_first(manifest: Manifest) -> None:
    task = Segmentation(manifest, SegmentConfig(classes=2))
    tally = task.tally()
    good, bad = np.array([0, 1, 1, 0]), np.array([1, 0, 0, 0])
    tally.update([manifest.rows[0]], [None], answer(good, good, 2))
    tally.update([manifest.rows[1]], [None], answer(good, bad, 2))
    worst = tally.compute().worst
    assert [Path(case.mask or "").name for case in worst] == ["small.tif", "mask.tif"]
    assert worst[1].caption == "mean IoU 1.000, pixel accuracy 1.000"


def test_masks_of_one_class_are_told_of(manifest: Manifest) -> None:
    """Masks drawn with 0 and 255 have one class, and any model is perfect."""
    task = Segmentation(manifest, SegmentConfig(classes=2, class_names=["sea", "land"]))
    for classes, expected in (([0, 0, 0], True), ([0, 1, 0], False)):
        tally, true = task.tally(), np.array(classes)
        tally.update([manifest.rows[0]], [None], answer(true, true, 2))
        assert ("all pixels that count are of class sea: the scores say little" in tally.compute().notes) == expected


def test_intervals_and_parts_are_of_images(tmp_path: Path) -> None:
    """Each draw adds up the counts of the images drawn; a part has those of its images alone."""
    random = np.random.default_rng(0)
    (tmp_path / "data.csv").write_text("\n".join(["image,mask,split,group", *(f"{i},m,val,g{i}" for i in range(12))]))
    manifest = Manifest.read(tmp_path / "data.csv")
    tally = Segmentation(manifest, SegmentConfig(classes=2)).tally()
    images = [(random.integers(0, 2, 50), random.integers(0, 2, 50)) for _ in range(12)]
    for row, (true, given) in zip(manifest.rows, images, strict=True):
        tally.update([row], [None], answer(true, given, 2))
    result = tally.compute()
    share = np.array([(true == given).mean() for true, given in images])
    plain = np.quantile([random.choice(share, 12).mean() for _ in range(4000)], [0.025, 0.975])
    assert result.intervals["pixel_accuracy"] == pytest.approx(plain, abs=0.01)
    assert result.intervals.keys() == result.metrics.keys()
    first, rest = (tally.select(lambda row, late=late: (row.line > 5) == late) for late in (False, True))
    assert first.compute().metrics["pixel_accuracy"] == pytest.approx(share[:4].mean())
    assert len(rest.rows) == 8
    assert first.merged(rest).compute() == result


def test_nothing_to_evaluate_is_an_error(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="no image to evaluate"):
        Segmentation(manifest, SegmentConfig(classes=2)).tally().compute()


def test_iou_of_a_class_without_pixels_is_not_a_number() -> None:
    iou = OneClassPixels().per_class(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))["iou"]
    assert iou[0] == 1
    assert torch.isnan(iou[1])


def test_a_manifest_of_labels_does_not_fit_a_mask_head(tmp_path: Path) -> None:
    from gigaxt.nn.heads import SegmentConfig

    (tmp_path / "data.csv").write_text("image,label\na.tif,1\n")
    with pytest.raises(DataError, match="column `mask` is missing"):
        read_manifest(SegmentConfig(classes=2), tmp_path / "data.csv")


def tally_of(manifest: Manifest, head: SegmentConfig, each: list[torch.Tensor]) -> Segmentation:
    task = Segmentation(manifest, head)
    tally = task.tally()
    for row, sums in zip(manifest.rows, each, strict=False):
        tally.update(
            [row], [None], {task.scoring.key: sums, "loss": torch.tensor(1.0), "weight_sum": torch.tensor(2.0)}
        )
    return tally


def test_labels_against_a_naive_count(manifest: Manifest) -> None:
    random = np.random.default_rng(0)
    true, yes = random.integers(0, 2, (2, 3, 2, 100)).astype(bool)  # (images, labels, pixels) each
    true[:, 1], yes[:, 1] = False, False  # a label that neither occurs nor is answered
    cells = [yes & true, yes & ~true, ~yes & true, ~yes & ~true]
    sums = torch.tensor(np.stack([cell.sum(-1) for cell in cells], axis=1)).double()  # (images, 4, labels)
    result = tally_of(manifest, SegmentConfig(classes=2, target="multi"), list(sums)).compute()
    t, y = true[:, 0].ravel(), yes[:, 0].ravel()
    iou, f1 = (t & y).sum() / (t | y).sum(), 2 * (t & y).sum() / (t.sum() + y.sum())
    assert result.metrics == pytest.approx({"mean_iou": iou, "pixel_accuracy": (true == yes).mean(), "f1_macro": f1})
    assert result.per_class["0"]["iou"] == pytest.approx(iou)
    assert np.isnan(result.per_class["1"]["iou"])
    assert result.confusion is None
    assert result.loss == 1.0


def test_numbers_against_numpy(manifest: Manifest) -> None:
    random = np.random.default_rng(0)
    true, given = random.normal(20, 5, (2, 3, 2, 100))
    error = given - true
    parts = [np.ones_like(true), error**2, abs(error), true, true**2]
    sums = torch.tensor(np.stack([part.sum(-1) for part in parts], axis=1))
    task_head = SegmentConfig(classes=2, target="regression", class_names=["height", "volume"])
    result = tally_of(manifest, task_head, list(sums)).compute()
    t, e = (np.moveaxis(x, 1, 0).reshape(2, -1) for x in (true, error))
    rmse, r2 = np.sqrt((e**2).mean(1)), 1 - (e**2).sum(1) / ((t - t.mean(1, keepdims=True)) ** 2).sum(1)
    assert result.metrics == pytest.approx({"rmse": rmse.mean(), "mae": abs(e).mean(), "r2": r2.mean()})
    assert result.per_class["volume"] == pytest.approx(
        {"rmse": rmse[1], "mae": abs(e[1]).mean(), "r2": r2[1], "pixels": 300}
    )
    worst = result.worst[0]
    expected = np.sqrt((error**2).mean(-1)).mean(-1)
    assert worst.badness == pytest.approx(expected.max())
    assert worst.image == str(manifest.rows[int(expected.argmax())].image)
    assert worst.caption.startswith("RMSE ")
    assert not Segmentation(manifest, task_head).higher_is_better


def test_units_of_numbers_are_found_in_the_training_rasters(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    heights = random.normal(20, 5, (2, 300, 400)).astype(np.float32)
    heights[:, :50] = -9999
    for i, raster in enumerate(heights):
        extra = [(42113, "s", 0, "-9999", True)]
        tifffile.imwrite(tmp_path / f"{i}.tif", raster, extratags=extra)
    (tmp_path / "data.csv").write_text("image,mask,split\na.tif,0.tif,train\nb.tif,1.tif,val\n")
    head = SegmentConfig(classes=1, target="regression")
    found = fitted_numbers(head, read_manifest(head, tmp_path / "data.csv"))
    assert found.target_mean == pytest.approx([heights[0, 50:].mean()], rel=1e-6)
    assert found.target_std == pytest.approx([heights[0, 50:].std()], rel=1e-6)
    assert fitted_numbers(found, read_manifest(head, tmp_path / "data.csv")) == found
    with pytest.raises(DataError, match=r"0\.tif: expected 2 bands of numbers"):
        fitted_numbers(SegmentConfig(classes=2, target="regression"), read_manifest(head, tmp_path / "data.csv"))
    tifffile.imwrite(tmp_path / "0.tif", np.full((9, 9), -9999, np.float32), extratags=extra)
    with pytest.raises(DataError, match="no number is known in band 1"):
        fitted_numbers(head, read_manifest(head, tmp_path / "data.csv"))
