"""The CSV that says what a model learns from: one image a line, with its label, mask, boxes or points.

Columns: `image`, then what is learnt: `label`, label columns of any names, or `time` and `event` (classification),
`mask` (segmentation), `boxes` (detection: a COCO JSON of any number of images, or a GeoJSON of this one), or `points`
(a CSV or GeoJSON of this or of many images). Optional:
`case` (images that share it are one sample with one answer, such as the slides of a patient), `group` (a patient, a
site), `split` (train, val, test), `label_id` (whole numbers, the order of the classes), `aoi` (a vector file; outside
of its polygons a mask is not known), `image_id` (which image of a COCO JSON; without it, the one of that file name) and
`sha256` of the image file. No image, case or group is ever in two splits. Other columns are kept as text. Comma
separated, UTF-8; paths are relative to the CSV.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import nearest
from gigaxt.csv_cells import read_cells
from gigaxt.datasets.labels import (
    LABEL,
    Target,
    answer_columns,
    class_order,
    default_target,
    merged_answer,
    strata,
)
from gigaxt.datasets.row import DENSE_COLUMNS, SPLIT_NAMES, Case, Row, Task, parse_row, task_of
from gigaxt.datasets.split import (
    SPLITS,
    Fold,
    Placed,
    check_fold,
    check_fractions,
    check_splits,
    divide,
    divide_into_folds,
)
from gigaxt.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A read CSV: rows in file order, every row in a split."""

    path: Path
    task: Task
    target: Target
    rows: list[Row]
    classes: tuple[str, ...]
    """Class names in the order of the model's outputs; empty for regression, survival and segmentation."""
    columns: tuple[str, ...]
    """Of the CSV, in lower case."""
    answer_columns: tuple[str, ...] = LABEL
    """Those that hold what is learnt, in the order of the model's outputs where there are several."""

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        task: Task | None = None,
        target: Target | None = "single",
        label_columns: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        split_seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.2, 0.0),
        fold: Fold | None = None,
    ) -> Manifest:
        """Read and check a CSV; image files are not touched (see `check_files`).

        Args:
            path: the CSV.
            task: which column counts where the CSV has several, such as `label` and `mask`; None: the only one.
            target: `single`: a label is one class; `multi`: several, separated by `|`, or none; `regression`: numbers,
                separated by `|`; `survival`: `time` until the `event` (1) or until it had not come yet (0). None: what
                the columns suggest.
            label_columns: columns of 0 and 1 (`multi`) or of numbers (`regression`), one a label, in the order of the
                model's outputs, in place of the column `label`; an empty cell is not known.
            classes: the model's classes, in order; None: those that occur, by `label_id` or sorted (numbers as such).
            split_seed: where there is no `split` column, groups are divided by this seed, whatever the order of rows.
            fractions: of train, val and test in such a division; they add up to 1.
            fold: divide by folds instead: this one is val, the others are train; a row whose `split` is test stays it.

        Raises:
            DataError: with the line number; the CSV or one of its cells does not fit.
        """
        path = Path(path)
        if target is not None and target not in get_args(Target):
            raise DataError(f"`target` is {target!r}; expected one of {', '.join(get_args(Target))}")
        check_fractions(fractions)
        if fold is not None:
            check_fold(fold)
        header, lines = read_cells(path)
        target = target or default_target(header, label_columns or ())
        columns = LABEL if task in DENSE_COLUMNS else answer_columns(path, header, target, label_columns or ())
        task = task_of(path, header, task, columns)
        rows = [parse_row(path, header, task, target, columns, line, cells) for line, cells in lines]
        if not rows:
            raise DataError(f"{path}: expected a line for each image below the header, got none")
        check_splits(path, (_placed(path, row) for row in rows))
        cases = _cases(rows, task)
        if task == "classification":
            cases = [_with_one_answer(path, columns, case) for case in cases]
        if "split" not in header or fold is not None:
            cases = _divided(path, cases, target, columns, split_seed, fractions, fold)
        rows = sorted((row for case in cases for row in case), key=lambda row: row.line)
        return cls(
            path=path,
            task=task,
            target=target,
            rows=rows,
            classes=_classes(path, rows, target, classes, label_columns) if task == "classification" else (),
            columns=tuple(header),
            answer_columns=columns,
        )

    def split(self, name: str) -> list[Row]:
        """The rows of a split, in file order; empty where it has none.

        Raises:
            DataError: no such split can be.
        """
        if name not in SPLIT_NAMES:
            raise DataError(f"{self.path}: no split {name!r}{nearest(name, SPLITS)}")
        return [row for row in self.rows if row.split == SPLIT_NAMES[name]]

    def cases(self, split: str | None = None) -> list[Case]:
        """The samples of a split, or of all: rows that share `case` together, in the order of their first line.

        In the manifest of a dense task every row is its own, since every image has its own target.
        """
        return _cases(self.rows if split is None else self.split(split), self.task)

    @property
    def outputs(self) -> int:
        """How many outputs a model of this target needs: classes, or numbers; 0 for masks and survival."""
        if self.target == "regression" and self.task == "classification":
            return len(self.rows[0].answer.numbers)
        return len(self.classes)

    def class_index(self, name: str) -> int:
        """The position of a class in `classes`.

        Raises:
            DataError: no such class.
        """
        try:
            return self._indices[name]
        except KeyError:
            raise DataError(f"{self.path}: no class {name!r}{nearest(name, self.classes)}") from None

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    def class_indices(self, row: Row) -> list[int]:
        """The classes that a row has; one for target `single`."""
        if self.answer_columns == LABEL:
            return [self.class_index(name) for name in row.answer.classes]
        return [index for index, number in enumerate(row.answer.numbers) if number == 1]

    def target_of(self, row: Row) -> int | NDArray[np.floating] | Path:
        """What the model is compared with.

        Returns:
            `single`: the class index. `multi`: (classes,) float32 of 0 and 1, NaN where a label column is empty.
            `regression`: (numbers,) float32, likewise. `survival`: (time, event), float64. Dense tasks: the path
            of the target.
        """
        if row.target_path is not None:
            return row.target_path
        if row.answer.numbers:
            dtype = np.float64 if self.target == "survival" else np.float32  # times must not be made equal
            return np.asarray(row.answer.numbers, dtype=dtype)
        if self.target == "single":
            return self.class_indices(row)[0]
        answer = np.zeros(len(self.classes), dtype=np.float32)
        answer[self.class_indices(row)] = 1
        return answer

    def class_counts(self, split: str | None = None) -> dict[str, int]:
        """Cases of each class, in the order of `classes`, in a split or in all."""
        if not self.classes:
            return {}
        counts = Counter(index for case in self.cases(split) for index in self.class_indices(case[0]))
        return {name: counts[index] for index, name in enumerate(self.classes)}

    def missing_files(self) -> list[tuple[Row, Path]]:
        """Images and target files that are not there, with their rows."""
        return [(row, path) for row in self.rows for path in row.files if absence(path)]

    def check_files(self) -> None:
        """Raise where images or target files are not there.

        Raises:
            DataError: how many are missing, and the first of them.
        """
        missing = self.missing_files()
        if missing:
            first = "; ".join(f"line {row.line}: {path}" for row, path in missing[:3])
            raise DataError(
                f"{self.path}: {len(missing)} of its files do not exist, the first: {first} "
                f"(paths are relative to {self.path.parent})"
            )

    def verify(self, row: Row) -> None:
        """Compare an image file with the row's `sha256`; rows without one pass.

        Raises:
            DataError: the file is another one, or cannot be read.
        """
        if row.sha256 is None:
            return
        try:
            with row.image.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path} line {row.line}: {row.image}: {error.strerror or error}") from error
        if digest != row.sha256:
            raise DataError(
                f"{self.path} line {row.line}: {row.image} has sha256 {digest[:12]}..., expected "
                f"{row.sha256[:12]}...: the file is damaged or another one"
            )


def absence(path: Path) -> str:
    """Why there is no file, such as a name that is too long or a folder that may not be read; empty where there is."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name with a zero byte
        return "does not exist"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _cases(rows: Iterable[Row], task: Task) -> list[Case]:
    if task in DENSE_COLUMNS:
        return [(row,) for row in rows]
    found: dict[str | int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.line if row.case is None else row.case, []).append(row)
    return [tuple(case) for case in found.values()]


def _with_one_answer(path: Path, columns: tuple[str, ...], case: Case) -> Case:
    if len(case) == 1:
        return case
    answer = merged_answer(path, str(case[0].case), columns, [(row.line, row.answer) for row in case])
    return tuple(replace(row, answer=answer) for row in case)


def _divided(
    path: Path,
    cases: list[Case],
    target: Target,
    columns: tuple[str, ...],
    seed: int,
    fractions: tuple[float, float, float],
    fold: Fold | None,
) -> list[Case]:
    """The cases with the splits that seed and fold give them; each counts once, however many images it has."""
    answers = [case[0].answer for case in cases]
    words = strata(target, columns, answers) if cases[0][0].target_path is None else [""] * len(cases)
    units = [(_placed(path, case[0]).unit, word) for case, word in zip(cases, words, strict=True)]
    if fold is None:
        splits = divide(units, seed, dict(zip(SPLITS, fractions, strict=True)))
    else:
        splits = divide_into_folds(path, units, [case[0].split for case in cases], seed, fold)
    return [tuple(replace(row, split=split) for row in case) for case, split in zip(cases, splits, strict=True)]


def _classes(
    path: Path,
    rows: Sequence[Row],
    target: Target,
    given: Sequence[str] | None,
    label_columns: Sequence[str] | None,
) -> tuple[str, ...]:
    """Class names in order; regression rows must be of one length."""
    if label_columns and target == "multi":
        return tuple(given or label_columns)
    if target in ("regression", "survival"):
        first = rows[0]
        for row in rows:
            if len(row.answer.numbers) != len(first.answer.numbers):
                raise DataError(
                    f"{path} line {row.line}: {len(row.answer.numbers)} numbers in `label`, "
                    f"but {len(first.answer.numbers)} in line {first.line}"
                )
        return ()
    ordered = target == "single"  # one label a row, so that its id is clear
    found = [(r.line, name, r.cells.get("label_id") if ordered else None) for r in rows for name in r.answer.classes]
    return class_order(path, found, given)


def _placed(path: Path, row: Row) -> Placed:
    return Placed(row.line, row.split, row.group, row.case, _name(path, row.image))


def _name(path: Path, image: Path) -> str:
    """An image's path without `.` and `..`, relative to the CSV where it can be: the same wherever the folder lies."""
    from os.path import normpath, relpath  # pathlib keeps `..`, and resolve() would touch the disk

    return Path(normpath(relpath(image, path.parent))).as_posix()
