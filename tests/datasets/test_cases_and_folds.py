"""Manifests of real studies: several images a case, label columns, survival, folds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml

from gigaxt.datasets.check import check_manifest, write_config
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.split import Fold
from gigaxt.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path: Path):
    def writer(*lines: str) -> Path:
        path = tmp_path / "data.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return writer


def names(cases: list[Any]) -> list[list[str]]:
    return [[row.image.name for row in case] for case in cases]


def test_rows_that_share_case_are_one_sample(write) -> None:
    path = write("image,case,split,label", "a,p,train,x", "b,,train,y", "c,q,val,x", "d,p,train,x", "e,,train,y")
    manifest = Manifest.read(path)
    assert names(manifest.cases()) == [["a", "d"], ["b"], ["c"], ["e"]]
    assert names(manifest.cases("train")) == [["a", "d"], ["b"], ["e"]]
    assert [row.image.name for row in manifest.rows] == list("abcde")
    assert manifest.class_counts("train") == {"x": 1, "y": 2}  # of cases, not of images
    assert manifest.rows[0].extra == {}
    assert manifest.rows[0].cells["case"] == "p"


def test_every_mask_is_its_own_sample(write) -> None:
    path = write("image,mask,case", "a,m,p", "b,n,p", "c,o,q", "d,r,q")
    manifest = Manifest.read(path)
    assert names(manifest.cases()) == [["a"], ["b"], ["c"], ["d"]]
    assert len({row.split for row in manifest.rows[:2]}) == 1  # but a case is not torn apart
    assert manifest.split("train")
    assert manifest.split("val")


def test_label_columns(write) -> None:
    path = write("image,split,ER,HER2,Ki67", "a,train,1,0,", "b,train,,1,0.0", "c,val,0,,1")
    manifest = Manifest.read(path, target="multi", label_columns=["ER", "her2", "ki67"])
    assert manifest.classes == ("ER", "her2", "ki67")
    targets = np.stack([manifest.target_of(row) for row in manifest.rows])
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets, [[1, 0, np.nan], [np.nan, 1, 0], [0, np.nan, 1]])
    assert manifest.class_counts() == {"ER": 1, "her2": 1, "ki67": 1}
    assert manifest.class_indices(manifest.rows[1]) == [1]
    assert Manifest.read(path, target=None, label_columns=["er"]).target == "multi"
    numbers = Manifest.read(path, target="regression", label_columns=["ki67", "er"])
    assert (numbers.outputs, numbers.classes) == (2, ())
    np.testing.assert_array_equal(numbers.target_of(numbers.rows[0]), [np.nan, 1])


def test_what_one_image_of_a_case_does_not_know_another_may(write) -> None:
    path = write("image,case,x,y", "a,p,1,", "b,p,,0", "c,p,1,0", "d,q,,")
    manifest = Manifest.read(path, target="multi", label_columns=["x", "y"])
    assert [row.answer.numbers for row in manifest.rows[:3]] == [(1, 0)] * 3
    assert all(map(math.isnan, manifest.rows[3].answer.numbers))


def test_survival(write) -> None:
    path = write("image,time,event", "a,12.5,1", "b,0,0", "c,100000000.25,1.0")
    manifest = Manifest.read(path, target=None)
    assert (manifest.task, manifest.target, manifest.classes) == ("classification", "survival", ())
    assert manifest.target_of(manifest.rows[0]).tolist() == [12.5, 1]
    assert manifest.target_of(manifest.rows[2]).tolist() == [100000000.25, 1]  # no two times become equal
    with pytest.raises(DataError, match="got none; `time` and `event` are of target survival"):
        Manifest.read(path)
    with_label = write("image,time,event,label", "a,1,1,x", "b,1,1,y")
    assert Manifest.read(with_label, target=None).target == "single"
    assert Manifest.read(with_label, target="survival").target == "survival"


ERRORS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "labels differ": (["image,case,label", "a,p,x", "b,q,x", "c,p,y"], {}, "lines 2 and 4: case 'p' has two labels, x"),
    "labels differ in number": (
        ["image,case,label", "a,p,x|y", "b,p,x"],
        {"target": "multi"},
        "lines 2 and 3: case 'p' has two labels, x|y and x",
    ),
    "numbers differ": (
        ["image,case,label", "a,p,1|2", "b,p,1|3"],
        {"target": "regression"},
        "lines 2 and 3: case 'p' has two values of `label`, 2 and 3",
    ),
    "columns differ": (
        ["image,case,x,y", "a,p,1,", "b,p,,0", "c,p,1,1"],
        {"target": "multi", "label_columns": ["x", "y"]},
        "lines 3 and 4: case 'p' has two values of `y`, 0 and 1",
    ),
    "times differ": (
        ["image,case,time,event", "a,p,1,1", "b,p,2,1"],
        {"target": "survival"},
        "lines 2 and 3: case 'p' has two values of `time`, 1 and 2",
    ),
    "case in two splits": (
        ["image,case,label,split", "a,p,x,train", "b,p,x,test"],
        {},
        "lines 2 and 3: case 'p' is in two splits, train and test; move its rows into one",
    ),
    "case in two splits, folds": (
        ["image,case,label,split", "a,p,x,train", "b,p,x,test", "c,q,x,train"],
        {"fold": Fold(1, 2)},
        "lines 2 and 3: case 'p' is in two splits",
    ),
    "case in two groups": (
        ["image,case,label,group", "a,p,x,g", "b,p,x,"],
        {},
        "lines 2 and 3: case 'p' is in two groups, g and none; give it one",
    ),
    "image in two cases": (
        ["image,case,label", "a,p,x", "./a,q,x"],
        {},
        "lines 2 and 3: image a is in two cases, p and q; give it one",
    ),
    "image twice in a case": (["image,case,label", "a,p,x", "a,p,x"], {}, "image a is twice in case 'p'"),
    "label column": (
        ["image,er", "a,1"],
        {"target": "multi", "label_columns": ["er", "he2"]},
        "column `he2` is missing",
    ),
    "label column of one class": (
        ["image,er", "a,1"],
        {"target": "single", "label_columns": ["er"]},
        "`label_columns` are for target multi or regression, not single",
    ),
    "label 2": (["image,x", "a,2"], {"target": "multi", "label_columns": ["x"]}, "line 2: `x` is '2'; expected 0, 1"),
    "label nan": (["image,x", "a,nan"], {"target": "multi", "label_columns": ["x"]}, "`x` is 'nan'"),
    "number": (
        ["image,x", "a,high"],
        {"target": "regression", "label_columns": ["x"]},
        "line 2: `x` is 'high'; expected a finite number, or nothing",
    ),
    "no time": (["image,event", "a,1"], {"target": "survival"}, "column `time` is missing; target survival needs time"),
    "time is text": (["image,time,event", "a,long,1"], {"target": "survival"}, "line 2: `time` is 'long'; expected"),
    "time is empty": (["image,time,event", "a,,1"], {"target": "survival"}, "line 2: `time` is ''"),
    "time is infinite": (["image,time,event", "a,inf,1"], {"target": "survival"}, "line 2: `time` is 'inf'"),
    "time is negative": (
        ["image,time,event", "a,-0.5,1"],
        {"target": "survival"},
        "`time` is '-0.5'; expected a finite",
    ),
    "event is 2": (["image,time,event", "a,1,2"], {"target": "survival"}, "`event` is '2'; expected 1 (it happened"),
    "event is empty": (["image,time,event", "a,1,"], {"target": "survival"}, "`event` is ''"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_with_both_lines_of_the_csv(write, name: str) -> None:
    lines, options, message = ERRORS[name]
    path = write(*lines)
    with pytest.raises(DataError) as caught:
        Manifest.read(path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def study(write, *, groups: int = 60, with_split: bool = False) -> Path:
    """Three labels of 50%, 30% and 20%, one to four cases a group, one to three images a case."""
    random = np.random.default_rng(0)
    lines = ["image,case,group,label" + (",split" if with_split else "")]
    for g in range(groups):
        label = "abc"[int(np.searchsorted([0.5, 0.8], g / groups, side="right"))]
        split = f",{'test' if g % 6 == 0 else 'train'}" if with_split else ""
        for c in range(int(random.integers(1, 5))):
            lines += [f"{g}-{c}-{i},{g}-{c},{g},{label}{split}" for i in range(int(random.integers(1, 4)))]
    return write(*lines)


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_share_out_labels_and_keep_groups_together(write, folds: int) -> None:
    path = study(write)
    total = Counter(case[0].label for case in Manifest.read(path).cases())
    seen: dict[str, list[int]] = defaultdict(list)
    for number in range(1, folds + 1):
        manifest = Manifest.read(path, fold=Fold(number, folds))
        val = manifest.cases("val")
        assert len(val) + len(manifest.cases("train")) == sum(total.values())
        assert not {row.group for row in manifest.split("val")} & {row.group for row in manifest.split("train")}
        for case in val:
            seen[case[0].case].append(number)
        for label, count in Counter(case[0].label for case in val).items():
            assert abs(count - total[label] / folds) <= 4, (number, label)  # a group has up to four
    assert all(len(numbers) == 1 for numbers in seen.values())
    assert len(seen) == sum(total.values())


def test_folds_depend_on_the_seed_alone_and_leave_the_test_split(write) -> None:
    path = study(write, with_split=True)
    plain = Manifest.read(path)
    first = Manifest.read(path, fold=Fold(1, 3))
    assert first.split("test") == plain.split("test")
    assert {row.image for row in first.split("val")} < {row.image for row in plain.split("train")}
    again, other = Manifest.read(path, fold=Fold(1, 3)), Manifest.read(path, fold=Fold(1, 3), split_seed=1)
    assert again.split("val") == first.split("val")
    assert other.split("val") != first.split("val")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert {row.image for row in Manifest.read(path, fold=Fold(1, 3)).split("val")} == {
        row.image for row in first.split("val")
    }


def test_folds_share_out_events_numbers_and_rare_labels(write) -> None:
    lines = [f"{i},{i},{int(i < 10)},{i},{int(i % 4 == 0)},{int(i < 20)}" for i in range(40)]
    path = write("image,time,event,label,rare,common", *lines)
    for number in range(1, 6):
        fold = Fold(number, 5)
        survival = Manifest.read(path, target="survival", fold=fold).split("val")
        assert sum(row.answer.numbers[1] for row in survival) == 2
        quarters = Counter(
            int(row.answer.numbers[0] // 10) for row in Manifest.read(path, target="regression", fold=fold).split("val")
        )
        assert all(quarters[quarter] in (1, 2, 3) for quarter in range(4))
        labels = Manifest.read(path, target="multi", label_columns=["common", "rare"], fold=fold).split("val")
        assert sum(row.answer.numbers[1] for row in labels) == 2


def test_impossible_folds(write) -> None:
    path = write("image,label,group", "a,x,g", "b,x,g", "c,y,h")
    with pytest.raises(DataError, match=r"3 folds need at least as many groups .* got 2"):
        Manifest.read(path, fold=Fold(1, 3))
    for fold in (Fold(0, 3), Fold(4, 3), Fold(1, 1)):
        with pytest.raises(ConfigError, match="expected at least 2 folds, numbered from 1"):
            Manifest.read(path, fold=fold)


def test_division_counts_cases_not_images(write) -> None:
    """One case with a hundred images is one of ten, not ten to one."""
    lines = [f"big{i},big,x" for i in range(100)] + [f"{i},c{i},x" for i in range(9)]
    manifest = Manifest.read(write("image,case,label", *lines))
    assert (len(manifest.cases("train")), len(manifest.cases("val"))) == (8, 2)


@pytest.fixture
def image(tmp_path: Path) -> None:
    for name in "abcdefgh":
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb")


def test_check_counts_cases_labels_and_events(write, image, tmp_path: Path) -> None:
    path = write("image,case,split,er,pr", "a,p,train,1,0", "b,p,train,,0", "c,q,train,0,", "d,r,val,1,1")
    report = check_manifest(path, label_columns=["er", "pr"])
    text = "\n".join(" ".join(line.split()) for line in report.lines())
    for line in ("rows 3 1", "cases 2 1", "er 1 1 1", "er 0 1 0", "er not known 0 0", "pr not known 1 0"):
        assert line in text
    head = yaml.safe_load(write_config(report, path, tmp_path / "run.yaml").read_text())["model"]["head"]
    assert head["label_columns"] == head["class_names"] == ["er", "pr"]
    assert (head["target"], head["classes"]) == ("multi", 2)

    path = write("image,split,time,event", *(f"{n},{'val' if n > 'f' else 'train'},{ord(n)},1" for n in "abcdefgh"))
    report = check_manifest(path)
    assert "events 6 2" in "\n".join(" ".join(line.split()) for line in report.lines())
    head = yaml.safe_load(write_config(report, path, tmp_path / "b.yaml").read_text())["model"]["head"]
    assert head == {"kind": "classify", "classes": 3, "target": "survival"}
