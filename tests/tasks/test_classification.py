from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.errors import ConfigError, DataError
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import ClassifyConfig
from gigaxt.tasks import Classification, Evaluation, make_task, read_manifest

IMAGE = ArrayImage(np.zeros((2, 2), np.uint8))


def task_of(tmp_path: Path, labels: list[str], **head: Any) -> Classification:
    csv = tmp_path / "data.csv"
    csv.write_text("\n".join(["image,label,split", *(f"{i}.tif,{label},train" for i, label in enumerate(labels))]))
    config = ClassifyConfig(**head)
    task = make_task(config, read_manifest(config, csv))
    assert isinstance(task, Classification)
    return task


def evaluated(task: Classification, logits: Any, *, batch: int = 3) -> Evaluation:
    rows = task.manifest.rows
    targets = [task.target(row, IMAGE) for row in rows]
    tally = task.tally()
    logits = torch.as_tensor(logits, dtype=torch.float32)
    for i in range(0, len(rows), batch):
        part = slice(i, i + batch)
        tally.update(rows[part], targets[part], {"logits": logits[part], "loss": torch.tensor(float(i))})
    return tally.compute()


def naive_auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """How often a positive is ranked above a negative."""
    pairs = scores[truth][:, None] - scores[~truth][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_one_label_against_naive_metrics(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 40)  # class 3 occurs nowhere
    task = task_of(tmp_path, [str(label) for label in labels], classes=4)
    logits = random.normal(size=(40, 4))
    result = evaluated(task, logits)

    answers, p = logits.argmax(1), torch.tensor(logits).softmax(1).numpy()
    recall = [(answers[labels == k] == k).mean() for k in range(3)]
    f1 = [2 * ((answers == k) & (labels == k)).sum() / ((answers == k).sum() + (labels == k).sum()) for k in range(4)]
    auroc = [naive_auroc(p[:, k], labels == k) for k in range(3)]
    assert result.metrics == pytest.approx(
        {
            "accuracy": (answers == labels).mean(),
            "balanced_accuracy": np.mean(recall),
            "f1_macro": np.mean(f1),
            "auroc": np.mean(auroc),
        }
    )
    assert np.isnan(result.per_class["3"]["recall"])
    assert result.images == 40
    assert result.loss == pytest.approx(sum(i * min(3, 40 - i) for i in range(0, 40, 3)) / 40)
    assert result.confusion is not None
    assert np.array(result.confusion)[1, 2] == ((labels == 1) & (answers == 2)).sum()


def test_the_worst_answers_come_first(tmp_path: Path) -> None:
    task = task_of(tmp_path, ["cat", "dog", "cat"], classes=2)
    result = evaluated(task, [[5, 0], [5, 0], [0, 1]])
    assert [(Path(case.image).name, case.caption) for case in result.worst] == [
        ("1.tif", "dog, answered cat (0.99)"),
        ("2.tif", "cat, answered dog (0.73)"),
        ("0.tif", "cat, answered cat (0.99)"),
    ]


def test_several_labels_against_naive_metrics(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, (30, 3)).astype(bool)
    names = ["red", "green", "blue"]
    labels = ["|".join(name for name, on in zip(names, row, strict=True) if on) for row in truth]
    task = task_of(tmp_path, labels, classes=3, target="multi", class_names=names)
    logits = random.normal(size=(30, 3))
    result = evaluated(task, logits)
    answers = logits > 0
    f1 = [2 * (answers & truth)[:, k].sum() / (answers[:, k].sum() + truth[:, k].sum()) for k in range(3)]
    assert result.metrics["exact_match"] == pytest.approx((answers == truth).all(1).mean())
    assert result.metrics["f1_macro"] == pytest.approx(np.mean(f1))
    assert result.metrics["auroc"] == pytest.approx(np.mean([naive_auroc(logits[:, k], truth[:, k]) for k in range(3)]))
    assert 0 < result.metrics["average_precision"] < 1
    with pytest.raises(ConfigError, match="balancing classes needs one label per image"):
        task.class_counts("train")


def test_numbers_against_naive_metrics(tmp_path: Path) -> None:
    truth = np.array([[1.0, 10], [2, 30], [4, 20]])
    task = task_of(tmp_path, [f"{a}|{b}" for a, b in truth], classes=2, target="regression")
    logits = truth + np.array([[0.5, 1], [0, 2], [-0.5, -3]])
    result = evaluated(task, logits)
    error = logits - truth
    rmse = np.sqrt((error**2).mean(0))
    r2 = 1 - (error**2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0)
    assert result.metrics == pytest.approx({"rmse": rmse.mean(), "mae": abs(error).mean(), "r2": r2.mean()})
    assert result.worst[0].caption == "4, 20, answered 3.5, 17"
    assert not task.higher_is_better
    assert np.isnan(evaluated(task_of(tmp_path, ["1"], classes=1, target="regression"), [[1.0]]).metrics["r2"])


@pytest.mark.parametrize("labels", [["a", "a"], ["a", "b"]])
def test_few_images_give_no_warning(tmp_path: Path, labels: list[str]) -> None:
    result = evaluated(task_of(tmp_path, labels, classes=2, class_names=["a", "b"]), [[1, 0], [0, 1]])
    assert np.isnan(result.metrics["auroc"]) == (labels == ["a", "a"])


def test_class_names_or_indices(tmp_path: Path) -> None:
    assert task_of(tmp_path, ["b", "a"], classes=2).class_names == ("a", "b")
    assert task_of(tmp_path, ["4", "1"], classes=5).class_names == ("0", "1", "2", "3", "4")  # indices, not all occur
    assert task_of(tmp_path, ["7", "9"], classes=2).class_names == ("7", "9")  # numbers as names
    named = task_of(tmp_path, ["b", "a"], classes=3, class_names=["c", "b", "a"])
    assert [named.target(row, IMAGE) for row in named.manifest.rows] == [1, 2]
    with pytest.raises(ConfigError, match=r"model.head.classes is 5, but .*data.csv has 2: a, b; set it to that"):
        task_of(tmp_path, ["b", "a"], classes=5)
    with pytest.raises(DataError, match="label 'd' is not a class of the model"):
        task_of(tmp_path, ["d", "a"], classes=3, class_names=["c", "b", "a"])
    with pytest.raises(ConfigError, match=r"classes is 1, but .* has 2 numbers a row"):
        task_of(tmp_path, ["1|2"], classes=1, target="regression")


def test_better() -> None:
    rising, nan = Classification.__new__(Classification), float("nan")
    rising.higher_is_better = True
    assert rising.better(0.5, 0.4)
    assert not rising.better(0.4, 0.4)
    assert not rising.better(nan, 0.4)
    assert rising.better(0.4, nan)
    assert not rising.better(nan, nan)
