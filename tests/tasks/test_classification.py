from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigaxt.errors import ConfigError, DataError
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import ClassifyConfig
from gigaxt.tasks import Classification, Evaluation, fitted, make_task, read_manifest

IMAGE = ArrayImage(np.zeros((2, 2), np.uint8))


def task_of(tmp_path: Path, labels: list[str], *, header: str = "label", **head: Any) -> Classification:
    csv = tmp_path / "data.csv"
    csv.write_text("\n".join([f"image,{header},split", *(f"{i}.tif,{cell},train" for i, cell in enumerate(labels))]))
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
    expected = {
        "accuracy": (answers == labels).mean(),
        "top3_accuracy": np.mean([label in row.argsort()[-3:] for label, row in zip(labels, logits, strict=True)]),
        "balanced_accuracy": np.mean(recall),
        "f1_macro": np.mean(f1),
        "auroc": np.mean(auroc),
    }
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert tuple(result.metrics) == task.metric_names
    assert result.intervals.keys() == result.metrics.keys()
    assert all(low < result.metrics[name] < high for name, (low, high) in result.intervals.items())
    assert result.notes == ["auroc and balanced_accuracy leave out what does not occur: 3"]
    assert np.isnan(result.per_class["3"]["recall"])
    assert result.images == 40
    assert result.loss == pytest.approx(sum(i * min(3, 40 - i) for i in range(0, 40, 3)) / 40)
    assert result.confusion is not None
    assert np.array(result.confusion)[1, 2] == ((labels == 1) & (answers == 2)).sum()


def test_scores_that_mean_nothing_are_left_out(tmp_path: Path) -> None:
    assert "quadratic_kappa" in task_of(tmp_path, ["0", "1", "2"], classes=3).metric_names  # grades
    names = task_of(tmp_path, ["a", "b", "c"], classes=3).metric_names
    assert not {"quadratic_kappa", "top3_accuracy", "top5_accuracy"} & set(names)
    assert "top5_accuracy" in task_of(tmp_path, list("abcdef"), classes=6).metric_names


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


def test_labels_that_are_not_known_do_not_count(tmp_path: Path) -> None:
    """The scores are those of the cases of which the label is known, label by label."""
    random = np.random.default_rng(2)
    truth = np.where(random.random((40, 2)) < 0.3, np.nan, random.integers(0, 2, (40, 2)))
    truth[0] = np.nan
    cells = [",".join("" if x != x else f"{x:g}" for x in row) for row in truth]
    columns = {"classes": 2, "target": "multi", "label_columns": ["er", "pr"]}
    task = task_of(tmp_path, cells, header="er,pr", **columns)
    logits = random.normal(size=(40, 2))
    result = evaluated(task, logits)
    known, answers = ~np.isnan(truth), logits > 0
    auroc = [naive_auroc(logits[known[:, k], k], truth[known[:, k], k] == 1) for k in range(2)]
    exact = ((answers == (truth == 1)) | ~known).all(1)[known.any(1)].mean()
    assert result.metrics["auroc"] == pytest.approx(np.mean(auroc))
    assert result.metrics["exact_match"] == pytest.approx(exact)
    assert result.per_class["er"]["known"] == known[:, 0].sum()
    # The loss of a batch is a mean over its labels that are known.
    weights = [known[i : i + 3].sum() for i in range(0, 40, 3)]
    assert result.loss == pytest.approx(np.average(range(0, 40, 3), weights=weights))
    changed = np.where(known, logits, -logits)
    assert evaluated(task, changed).metrics == pytest.approx(result.metrics)
    assert any("not known" in case.caption for case in result.worst)


def test_a_label_with_one_answer_only_is_said(tmp_path: Path) -> None:
    cells = ["1,0,", "1,1,", ",0,", "1,,"]
    columns = {"classes": 3, "target": "multi", "label_columns": ["a", "b", "c"]}
    result = evaluated(task_of(tmp_path, cells, header="a,b,c", **columns), np.eye(4, 3))
    assert (
        "auroc and average_precision are not defined where a label is 1 in every case that is known: a" in result.notes
    )
    assert "auroc and average_precision are not defined where a label is not known of any case: c" in result.notes
    assert result.metrics["auroc"] == result.per_class["b"]["auroc"]
    assert np.isnan(result.per_class["a"]["auroc"])
    with pytest.raises(DataError, match=r"data.csv: nothing to score: a, b, c are empty in each of the 2 rows"):
        evaluated(task_of(tmp_path, [",,", ",,"], header="a,b,c", **columns), np.eye(2, 3))


def test_times_of_events(tmp_path: Path) -> None:
    cells = ["1,1", "2,1", "3,0", "6,1", "9,0"]
    bins = {"classes": 3, "target": "survival", "time_bins": [2.0, 5.0]}
    task = task_of(tmp_path, cells, header="time,event", **bins)
    early, middle, late = [9.0, 0, 0], [-9.0, 9, 0], [-9.0, -9, 9]
    result = evaluated(task, [early, middle, middle, late, late])
    assert result.metrics["concordance"] == (6 + 2 * 0.5) / 8  # one tie of risk among eight pairs, and one more
    assert (task.best, task.higher_is_better) == ("concordance", True)
    assert list(result.per_class) == ["< 2", "2 to 5", ">= 5"]
    assert result.per_class["< 2"] == pytest.approx(
        {"at_risk": 5, "events": 1, "hazard": 0.2, "hazard_answered": 0.2}, abs=1e-3
    )
    captions = {case.caption for case in result.worst}
    assert {"event at 1, expected < 2", "no event until 3, expected 2 to 5", "event at 6, expected >= 5"} < captions
    none = evaluated(task_of(tmp_path, ["1,0", "2,0"], header="time,event", **bins), [early, late])
    assert np.isnan(none.metrics["concordance"])
    assert "concordance is not defined: of no two cases is it known who had the event first" in none.notes


def test_scores_of_cases_and_of_parts(tmp_path: Path) -> None:
    """A case is one answer; draws take whole groups; a part has the scores of its cases alone."""
    csv = tmp_path / "data.csv"
    lines = [f"{i}.tif,p{i // 2},g{i // 6},{'ab'[i // 2 % 2]},train" for i in range(24)]
    csv.write_text("\n".join(["image,case,group,label,split", *lines]))
    config = ClassifyConfig(classes=2)
    task = make_task(config, read_manifest(config, csv))
    cases = task.manifest.cases()
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 2))).float()
    tally = task.tally()
    targets = [task.target(case[0], IMAGE) for case in cases]
    tally.update([case[0] for case in cases], targets, {"logits": logits, "loss": torch.tensor(0.5)})
    result = tally.compute()
    assert (result.images, result.cases, result.size) == (24, 12, "12 cases of 24 images")
    assert result.worst[0].caption.startswith("case p")
    assert len(result.worst[0].others) == 1
    assert "intervals are of 4 groups only, and so too narrow" in result.notes
    first = tally.select(lambda row: row.group in ("g0", "g1"))
    rest = tally.select(lambda row: row.group in ("g2", "g3"))
    assert first.compute().metrics["accuracy"] == float(
        (logits[:6].argmax(1) == torch.tensor(targets[:6])).double().mean()
    )
    assert np.isnan(first.compute().loss)
    assert first.merged(rest).compute().metrics == result.metrics


def test_what_a_head_has_from_the_data(tmp_path: Path) -> None:
    def head_of(header: str, cells: list[str], split: str = "train", **options: Any) -> ClassifyConfig:
        csv = tmp_path / "data.csv"
        lines = [f"{i}.tif,{cell},{split if i else 'train'}" for i, cell in enumerate(cells)]
        csv.write_text("\n".join([f"image,{header},split", *lines]))
        config = ClassifyConfig(**options)
        return fitted(config, read_manifest(config, csv))

    numbers = head_of("label", ["1|10", "3|10"], classes=2, target="regression")
    assert (numbers.target_mean, numbers.target_std) == ([2, 10], [1, 1])  # equal targets have no unit
    partly = head_of("a,b", ["1,", ",4", "3,8"], classes=2, target="regression", label_columns=["a", "b"])
    assert (partly.target_mean, partly.target_std) == ([2, 6], [1, 2])
    given = {"target_mean": [0.0], "target_std": [5.0]}
    assert head_of("label", ["1", "3"], classes=1, target="regression", **given).target_mean == [0]
    cells = ["1,1", "2,1", "3,1", "4,1", "100,0"]
    times = head_of("time,event", cells, classes=2, target="survival")
    assert times.time_bins == [2.5]
    assert head_of("time,event", cells, "val", classes=2, target="survival", time_bins=[7.0]).time_bins == [7]
    with pytest.raises(DataError, match=r"data.csv, split train: no event was seen"):
        head_of("time,event", ["1,0", "2,1"], "val", classes=2, target="survival")
    columns = {"classes": 2, "target": "multi", "label_columns": ["a", "b"]}
    with pytest.raises(DataError, match="`b` is empty in each row of the split train, so it cannot be learnt"):
        head_of("a,b", ["1,", "0,1"], "val", **columns)
    with pytest.raises(DataError, match="no label of the split val is known: a, b are empty in each row"):
        head_of("a,b", ["1,1", ","], "val", **columns)


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
