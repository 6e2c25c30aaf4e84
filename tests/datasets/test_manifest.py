from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gigaxt.datasets.manifest import Manifest, absence
from gigaxt.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path: Path):
    def writer(text: str | bytes) -> Path:
        path = tmp_path / "data.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return writer


def test_reads_labels_splits_groups_and_other_columns(write) -> None:
    path = write('image,label,split,group,site\na.tif,dog,train,p1,"Basel, CH"\n\nsub/b.tif, cat ,valid,p2,\n')
    manifest = Manifest.read(path)
    assert manifest.task == "classification"
    assert manifest.classes == ("cat", "dog")
    first, second = manifest.rows
    assert first.image == path.parent / "a.tif"
    assert (first.line, first.label, first.split, first.group) == (2, "dog", "train", "p1")
    assert first.extra == {"site": "Basel, CH"}
    assert (second.line, second.label, second.split) == (4, "cat", "val")
    assert manifest.split("validation") == manifest.split("val") == [second]
    assert manifest.split("test") == []
    assert manifest.class_counts() == {"cat": 1, "dog": 1}
    assert manifest.class_counts("val") == {"cat": 1, "dog": 0}
    assert manifest.target_of(first) == 1
    assert manifest.outputs == 2


def test_reads_masks(write) -> None:
    path = write("image,mask,split\na.tif,a_mask.tif,train\nb.tif,b_mask.tif,test\n")
    manifest = Manifest.read(path)
    assert manifest.task == "segmentation"
    assert manifest.classes == ()
    assert manifest.class_counts() == {}
    assert manifest.rows[0].label is None
    assert manifest.target_of(manifest.rows[0]) == path.parent / "a_mask.tif"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_encodings_and_line_ends(write, start: bytes, end: bytes) -> None:
    text = start + end.join([b"Image,LABEL", "Zürich.tif,fluß".encode(), b'"a ""b"".tif",x'])
    manifest = Manifest.read(write(text))
    assert [row.image.name for row in manifest.rows] == ["Zürich.tif", 'a "b".tif']
    assert manifest.classes == ("fluß", "x")


def test_integer_classes_are_sorted_as_numbers(write) -> None:
    manifest = Manifest.read(
        write("image,label\n" + "".join(f"{i}.tif,{v}\n" for i, v in enumerate(["10", "9", "02", "2"])))
    )
    assert manifest.classes == ("2", "9", "10")
    assert [manifest.target_of(row) for row in manifest.rows] == [2, 1, 0, 0]


def test_several_labels(write) -> None:
    path = write("image,label,split\na,x|y,train\nb,,train\nc, z | x ,val\n")
    manifest = Manifest.read(path, target="multi")
    assert manifest.classes == ("x", "y", "z")
    targets = np.stack([manifest.target_of(row) for row in manifest.rows])
    assert targets.dtype == np.float32
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert manifest.class_counts() == {"x": 2, "y": 1, "z": 1}


def test_regression(write) -> None:
    manifest = Manifest.read(write("image,label\na,1.5|-2\nb,1e3|0\n"), target="regression")
    assert manifest.outputs == 2
    assert manifest.classes == ()
    assert manifest.target_of(manifest.rows[1]).tolist() == [1000, 0]


def test_classes_of_a_model(write) -> None:
    path = write("image,label,split\na,x,train\nb,z,train\n")
    manifest = Manifest.read(path, classes=["z", "y", "x"])
    assert [manifest.target_of(row) for row in manifest.rows] == [2, 0]
    with pytest.raises(DataError, match=r"line 3: label 'z' is not a class of the model"):
        Manifest.read(path, classes=["x", "y"])
    with pytest.raises(DataError, match="no class 'xx'; "):
        manifest.class_index("xx")


def test_label_ids_order_the_classes(write) -> None:
    path = write("image,label,label_id\na.tif,ant,10\nb.tif,bee,9\nc.tif,cat,-1\nd.tif,ant,10\n")
    manifest = Manifest.read(path)
    assert manifest.classes == ("cat", "bee", "ant")
    assert manifest.target_of(manifest.rows[0]) == 2
    assert Manifest.read(path, classes=["ant", "bee", "cat"]).classes == ("ant", "bee", "cat")
    several = Manifest.read(write("image,label,label_id\na.tif,b|a,7\nb.tif,a,8\n"), target="multi")
    assert several.classes == ("a", "b")  # it is not clear which of them an id is of


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.tif,ant,x", "line 2: `label_id` is 'x'; expected a whole number"),
        ("a.tif,ant,", "line 2: `label_id` is ''; expected a whole number"),
        ("a.tif,ant,1\nb.tif,ant,2", "lines 2 and 3: class 'ant' has two `label_id`s, 1 and 2"),
        ("a.tif,ant,1\nb.tif,bee,1", "lines 2 and 3: `label_id` 1 is of 'ant' and of 'bee'"),
    ],
)
def test_label_ids_that_do_not_fit(write, lines: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Manifest.read(write(f"image,label,label_id\n{lines}\n"))


def labelled(tmp_path: Path, rows: list[str], name: str = "data.csv") -> Path:
    path = tmp_path / name
    path.write_text("image,label,group\n" + "\n".join(rows) + "\n")
    return path


def test_division_is_stratified_and_independent_of_order(tmp_path: Path) -> None:
    rows = [f"{label}{i}.tif,{label}," for label, count in (("a", 50), ("b", 30), ("c", 20)) for i in range(count)]
    divisions = []
    for order in (rows, rows[::-1], rows[50:] + rows[:50]):
        manifest = Manifest.read(labelled(tmp_path, order), fractions=(0.7, 0.2, 0.1))
        divisions.append({row.image.name: row.split for row in manifest.rows})
    assert divisions[0] == divisions[1] == divisions[2]
    manifest = Manifest.read(labelled(tmp_path, rows), fractions=(0.7, 0.2, 0.1))
    assert Counter(row.split for row in manifest.rows) == {"train": 70, "val": 20, "test": 10}
    for split, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        for label, total in (("a", 50), ("b", 30), ("c", 20)):
            assert abs(manifest.class_counts(split)[label] - share * total) <= 1
    other = Manifest.read(labelled(tmp_path, rows), split_seed=1, fractions=(0.7, 0.2, 0.1))
    assert {row.image.name: row.split for row in other.rows} != divisions[0]


def test_division_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    rows = [f"{i}.tif,a," for i in range(40)]
    splits = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        splits.append([row.split for row in Manifest.read(labelled(tmp_path / folder, rows)).rows])
    assert splits[0] == splits[1]


def test_division_keeps_groups_together(tmp_path: Path) -> None:
    rows = [f"{i}.tif,{'ab'[i % 2]},g{i * i % 13}" for i in range(120)]
    manifest = Manifest.read(labelled(tmp_path, rows))
    splits: dict[str | None, set[str]] = {}
    for row in manifest.rows:
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {name for found in splits.values() for name in found} == {"train", "val"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_division_leaves_no_split_empty(tmp_path: Path, count: int) -> None:
    manifest = Manifest.read(labelled(tmp_path, [f"{i}.tif,label{i}," for i in range(count)]))
    assert manifest.split("train")
    assert manifest.split("val")


def test_the_same_image_twice_stays_in_one_split(tmp_path: Path) -> None:
    rows = [f"{'./' if i % 2 else ''}{i // 2}.tif,a," for i in range(40)]
    manifest = Manifest.read(labelled(tmp_path, rows))
    for first, second in zip(manifest.rows[::2], manifest.rows[1::2], strict=True):
        assert first.split == second.split


@pytest.mark.parametrize(
    "text",
    [
        "image,label,,\na.tif,x,,\nb.tif,y,, \n",
        "image,label\na.tif,x,,\nb.tif,y\n",
        ",image,label\n0,a.tif,x\n1,b.tif,y\n",
    ],
    ids=["columns without a name", "empty cells beyond the last", "an index as pandas writes it"],
)
def test_what_spreadsheets_add_is_left_out(write, text: str) -> None:
    manifest = Manifest.read(write(text))
    assert [(row.image.name, row.label) for row in manifest.rows] == [("a.tif", "x"), ("b.tif", "y")]
    assert manifest.columns == ("image", "label")


def test_a_path_that_is_too_long_is_a_missing_file(write) -> None:
    manifest = Manifest.read(write(f"image,label\n{'x' * 300}.tif,a\n"))
    [(row, path)] = manifest.missing_files()
    assert (row.line, absence(path)) == (2, "File name too long")
    with pytest.raises(DataError, match="1 of its files do not exist"):
        manifest.check_files()


ERRORS = {
    "empty file": ("", "the file is empty; expected a header"),
    "header only": ("image,label\n\n", "expected a line for each image below the header, got none"),
    "no image column": ("imgae,label\na,b\n", "column `image` is missing; did you mean `imgae`"),
    "no label column": (
        "image,lable\na,b\n",
        "expected a column `label` or `mask` or `boxes` or `points`, got none; did you mean `lable`",
    ),
    "labels in columns of their own": ("image,er,her2\na,0,1\n", "known: er, her2; --label-columns names those with"),
    "only images": ("image,split\na,train\n", "expected a column `label` or `mask` or `boxes` or `points`, got none"),
    "label and mask": ("image,label,mask\na,b,c\n", "has `label` and `mask`"),
    "column twice": ("image,label,label\na,b,c\n", "column `label` occurs twice"),
    "semicolons": ("image;label\na;b\n", "separated by ';'; expected commas"),
    "empty image": ("image,label\n ,b\n", "line 2: `image` is empty"),
    "empty label": ("image,label\na,b\nb,\n", "line 3: `label` is ''; expected a class name or number"),
    "empty mask": ("image,mask\na,b\nb,\n", "line 3: `mask` is empty"),
    "unknown split": ("image,label,split\na,b,trian\n", "line 2: split is 'trian'; did you mean `train`"),
    "empty split": ("image,label,split\na,b,\n", "line 2: split is ''; expected one of train, val, test"),
    "too many cells": ("image,label\na,b\nb,c,d\n", "line 3: expected 2 cells as in the header, got 3"),
    "too many cells, not the last": ("image,label\nb,c,,d\n", "line 2: expected 2 cells as in the header, got 4"),
    "too few cells": ("image,label\na\n", "line 2: expected 2 cells as in the header, got 1"),
    "after a quoted line break": ('image,label\n"a\nb",x\nc\n', "line 4: expected 2 cells"),
    "open quote": ('image,label\na,"b\n', "line 2: not readable as CSV"),
    "not UTF-8": (b"image,label\na,Z\xfcrich\n", "not UTF-8 text"),
    "sha256": ("image,label,sha256\na,b,123\n", "line 2: sha256 is '123'; expected 64 hexadecimal digits"),
    "group in two splits": (
        "image,label,split,group\na,x,train,p1\nb,x,train,p2\nc,x,val,p1\n",
        "lines 2 and 4: group 'p1' is in two splits, train and val",
    ),
    "image in two splits": (
        "image,label,split\na.tif,x,train\n./b/../a.tif,x,val\n",
        "lines 2 and 3: image a.tif is in two splits, train and val",
    ),
    "image in two groups": (
        "image,label,group\na.tif,x,p\na.tif,x,q\n",
        "lines 2 and 3: image a.tif is in two groups, p and q",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_with_the_place(write, name: str) -> None:
    text, message = ERRORS[name]
    path = write(text)
    with pytest.raises(DataError) as caught:
        Manifest.read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        ("regression", "image,label\na,1\nb,high\n", "line 3: `label` is 'high'; expected a finite number"),
        ("regression", "image,label\na,nan\n", "line 2: `label` is 'nan'"),
        ("regression", "image,label\na,1|2\nb,\n", "line 3: `label` is ''"),
        ("regression", "image,label\na,1|2\nb,3\n", "line 3: 1 numbers in `label`, but 2 in line 2"),
        ("multi", "image,label\na,x||y\n", "line 2: `label` is 'x||y'"),
        ("classes", "image,label\na,x\n", "`target` is 'classes'; expected one of single, multi, regression"),
    ],
)
def test_errors_of_targets(write, target: str, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        Manifest.read(write(text), target=target)
    assert message in str(caught.value)


def test_errors_outside_the_text(tmp_path: Path, write) -> None:
    with pytest.raises(DataError, match="No such file"):
        Manifest.read(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="Is a directory"):
        Manifest.read(tmp_path)
    path = write("image,label\na,x\nb,y\n")
    with pytest.raises(ConfigError, match="sum to 1"):
        Manifest.read(path, fractions=(0.5, 0.2, 0.1))
    with pytest.raises(DataError, match="column `mask` is missing"):
        Manifest.read(path, task="segmentation")
    with pytest.raises(DataError, match="no split 'trein'; did you mean `train`"):
        Manifest.read(path).split("trein")


def test_missing_files_and_digests(write, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"pixels")
    digest = hashlib.sha256(b"pixels").hexdigest()
    lines = [f"a.tif,x,{digest.upper()}", f"b.tif,x,{'0' * 64}", "c.tif,y,"]
    manifest = Manifest.read(write("image,label,sha256\n" + "\n".join(lines)))
    assert [path.name for _, path in manifest.missing_files()] == ["b.tif", "c.tif"]
    with pytest.raises(DataError, match=r"2 of its files do not exist, the first: line 3: .*b\.tif; line 4"):
        manifest.check_files()
    manifest.verify(manifest.rows[0])
    with pytest.raises(DataError, match=r"line 3: .*b\.tif: No such file"):
        manifest.verify(manifest.rows[1])
    manifest.verify(manifest.rows[2])
    (tmp_path / "a.tif").write_bytes(b"other pixels")
    with pytest.raises(DataError, match="damaged or another one"):
        manifest.verify(manifest.rows[0])
