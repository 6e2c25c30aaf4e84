"""The CSV that says what a model learns from: one image a line, with its label or its mask.

Columns: `image`, then `label` (classification) or `mask` (segmentation); optional `split` (train, val, test), `group`
(a patient, a site: never in two splits) and `sha256` of the image file. Other columns are kept as text. Comma
separated, UTF-8; paths are relative to the CSV.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gigaxt.config import nearest
from gigaxt.datasets.split import SPLITS, check_fractions, check_splits, divide
from gigaxt.errors import DataError

Task = Literal["classification", "segmentation"]
Target = Literal["single", "multi", "regression"]

TARGET_COLUMNS: dict[str, Task] = {"label": "classification", "mask": "segmentation"}
"""The column that holds what is to be learnt, and the task that it stands for."""
OPTIONAL_COLUMNS = ("split", "group", "sha256")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a manifest: an image and what is known of it."""

    image: Path
    line: int
    """Line of the CSV, from 1; the header is line 1."""
    label: str | None = None
    """As written, stripped; None in a segmentation manifest."""
    mask: Path | None = None
    split: str = ""
    """train, val or test."""
    group: str | None = None
    sha256: str | None = None
    """Of the image file, 64 hexadecimal digits in lower case."""
    extra: dict[str, str] = field(default_factory=dict)
    """Columns that gigaxt does not know."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A read CSV: rows in file order, every row in a split."""

    path: Path
    task: Task
    target: Target
    rows: list[Row]
    classes: tuple[str, ...]
    """Class names in the order of the model's outputs; empty for regression and segmentation."""

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        task: Task | None = None,
        target: Target = "single",
        classes: Sequence[str] | None = None,
        split_seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.2, 0.0),
    ) -> Manifest:
        """Read and check a CSV; image files are not touched (see `check_files`).

        Args:
            path: the CSV.
            task: which column counts where the CSV has both `label` and `mask`; None: the only one.
            target: `single`: a label is one class; `multi`: several, separated by `|`, or none; `regression`: numbers,
                separated by `|`.
            classes: the model's classes, in order; None: those that occur, sorted (numbers as numbers).
            split_seed: where there is no `split` column, groups are divided by this seed, whatever the order of rows.
            fractions: of train, val and test in such a division; they add up to 1.

        Raises:
            DataError: with the line number; the CSV or one of its cells does not fit.
        """
        path = Path(path)
        if target not in get_args(Target):
            raise DataError(f"`target` is {target!r}; expected one of {', '.join(get_args(Target))}")
        check_fractions(fractions)
        header, lines = _read_cells(path)
        task = _task_of(path, header, task)
        rows = [_row(path, header, task, line, cells) for line, cells in lines]
        if not rows:
            raise DataError(f"{path}: expected a line for each image below the header, got none")
        labels = {row.line: _labels(path, row, target) for row in rows} if task == "classification" else {}
        if "split" not in header:
            strata = {line: "|".join(names) if target != "regression" else "" for line, names in labels.items()}
            units = [(_unit(path, row), strata.get(row.line, "")) for row in rows]
            splits = divide(units, split_seed, fractions)
            rows = [replace(row, split=split) for row, split in zip(rows, splits, strict=True)]
        check_splits(path, [(row.line, row.split, row.group, _name(path, row.image)) for row in rows])
        names = _classes(path, labels, target, classes)
        return cls(path=path, task=task, target=target, rows=rows, classes=names)

    def split(self, name: str) -> list[Row]:
        """The rows of a split, in file order; empty where it has none.

        Raises:
            DataError: no such split can be.
        """
        if name not in SPLIT_NAMES:
            raise DataError(f"{self.path}: no split {name!r}{nearest(name, SPLITS)}")
        return [row for row in self.rows if row.split == SPLIT_NAMES[name]]

    @property
    def outputs(self) -> int:
        """How many outputs a model of `label` needs: classes, or numbers a row for regression; 0 for masks."""
        if self.target == "regression" and self.task == "classification":
            return len(self.numbers(self.rows[0]))
        return len(self.classes)

    def class_index(self, name: str) -> int:
        """The position of a class in `classes`.

        Raises:
            DataError: no such class.
        """
        try:
            return self.classes.index(name)
        except ValueError:
            raise DataError(f"{self.path}: no class {name!r}{nearest(name, self.classes)}") from None

    def class_indices(self, row: Row) -> list[int]:
        """The classes of a row; one for target `single`."""
        return [self.class_index(name) for name in _labels(self.path, row, self.target)]

    def numbers(self, row: Row) -> list[float]:
        """The numbers of a row of a regression manifest."""
        return [float(number) for number in _labels(self.path, row, "regression")]

    def target_of(self, row: Row) -> int | NDArray[np.float32] | Path:
        """What the model is compared with.

        Returns:
            `single`: the class index. `multi`: (classes,) float32 of 0 and 1. `regression`: (numbers,) float32.
            Segmentation: the path of the mask.
        """
        if row.mask is not None:
            return row.mask
        if self.target == "regression":
            return np.asarray(self.numbers(row), dtype=np.float32)
        if self.target == "single":
            return self.class_indices(row)[0]
        answer = np.zeros(len(self.classes), dtype=np.float32)
        answer[self.class_indices(row)] = 1
        return answer

    def class_counts(self, split: str | None = None) -> dict[str, int]:
        """Rows of each class, in the order of `classes`, in a split or in all."""
        if not self.classes:
            return {}
        rows = self.rows if split is None else self.split(split)
        counts = Counter(index for row in rows for index in self.class_indices(row))
        return {name: counts[index] for index, name in enumerate(self.classes)}

    def missing_files(self) -> list[tuple[Row, Path]]:
        """Images and masks that are not there, with their rows."""
        return [(row, path) for row in self.rows for path in (row.image, row.mask) if path and not path.exists()]

    def check_files(self) -> None:
        """Raise where images or masks are not there.

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


def _read_cells(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names and, for each line that is not blank, its number and its cells by column."""
    records = _records(path)
    _, header = next(records, (1, []))
    header = [name.strip().lower() for name in header]
    if not any(header):
        raise DataError(f"{path}: the file is empty; expected a header such as `image,label`")
    if len(header) == 1 and (found := re.search(r"[;\t|]", header[0])):
        raise DataError(f"{path}: columns are separated by {found.group()!r}; expected commas")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{path}: column `{twice[0]}` occurs twice in the header")
    lines = []
    for line, cells in records:
        if len(cells) != len(header):
            raise DataError(
                f"{path} line {line}: expected {len(header)} cells as in the header, got {len(cells)}; "
                f'put quotes ("...") around cells that hold a comma'
            )
        lines.append((line, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}))
    return header, lines


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The CSV's records with the line each begins on; blank ones are left out."""
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield line, cells
                line = reader.line_num + 1
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a CSV file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} at line {line} or after: not UTF-8 text; save the CSV as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} line {line}: not readable as CSV: {error}") from error


def _task_of(path: Path, header: list[str], task: Task | None) -> Task:
    if "image" not in header:
        raise DataError(f"{path}: column `image` is missing{nearest('image', header)}")
    found = [column for column in TARGET_COLUMNS if column in header]
    if task is not None:
        column = next(name for name, meaning in TARGET_COLUMNS.items() if meaning == task)
        if column not in found:
            raise DataError(f"{path}: column `{column}` is missing{nearest(column, header)}")
        return task
    if not found:
        others = [name for name in header if name not in ("image", *OPTIONAL_COLUMNS)]
        hint = nearest("label", others) if others else ""
        raise DataError(f"{path}: expected a column `label` or `mask`, got neither{hint}")
    if len(found) > 1:
        raise DataError(f"{path}: has both `label` and `mask`; say which counts with `task`, or remove one")
    return TARGET_COLUMNS[found[0]]


def _row(path: Path, header: list[str], task: Task, line: int, cells: dict[str, str]) -> Row:
    here = f"{path} line {line}"
    if not cells["image"]:
        raise DataError(f"{here}: `image` is empty; expected a path")
    if task == "segmentation" and not cells["mask"]:
        raise DataError(f"{here}: `mask` is empty; expected a path")
    split = cells.get("split", "")
    if "split" in header and split.lower() not in SPLIT_NAMES:
        hint = nearest(split.lower(), SPLITS) if split else f"; expected one of {', '.join(SPLITS)}"
        raise DataError(f"{here}: split is {split!r}{hint}")
    digest = cells.get("sha256", "").lower()
    if digest and not re.fullmatch("[0-9a-f]{64}", digest):
        raise DataError(f"{here}: sha256 is {digest!r}; expected 64 hexadecimal digits")
    known = {"image", *TARGET_COLUMNS, *OPTIONAL_COLUMNS}
    return Row(
        image=path.parent / cells["image"],
        line=line,
        label=cells["label"] if task == "classification" else None,
        mask=path.parent / cells["mask"] if task == "segmentation" else None,
        split=SPLIT_NAMES[split.lower()] if split else "",
        group=cells.get("group") or None,
        sha256=digest or None,
        extra={name: cell for name, cell in cells.items() if name not in known},
    )


def _labels(path: Path, row: Row, target: Target) -> list[str]:
    """The labels of a row: class names (numbers in their plain form), or numbers as text for regression."""
    here = f"{path} line {row.line}"
    text = row.label or ""
    parts = [text] if target == "single" else [part.strip() for part in text.split("|")] if text else []
    if target == "regression":
        for part in parts or [""]:
            if not _is_number(part):
                raise DataError(f"{here}: `label` is {text!r}; expected a finite number (or several, separated by `|`)")
        return parts
    if (target == "single" and not text) or "" in parts:
        raise DataError(f"{here}: `label` is {text!r}; expected a class name or number")
    return [str(int(part)) if _is_integer(part) else part for part in dict.fromkeys(parts)]


def _classes(path: Path, labels: dict[int, list[str]], target: Target, given: Sequence[str] | None) -> tuple[str, ...]:
    """Class names in order; checks that labels are among those given, and that regression rows are of one length."""
    if target == "regression":
        lengths = {len(numbers): line for line, numbers in reversed(labels.items())}
        if len(lengths) > 1:
            (first, line), (other, other_line) = sorted(lengths.items(), key=lambda item: item[1])[:2]
            raise DataError(f"{path} line {other_line}: {other} numbers in `label`, but {first} in line {line}")
        return ()
    found = {name: line for line, names in reversed(labels.items()) for name in names}
    if given is not None:
        for name, line in sorted(found.items(), key=lambda item: item[1]):
            if name not in given:
                raise DataError(f"{path} line {line}: label {name!r} is not a class of the model{nearest(name, given)}")
        return tuple(given) if labels else ()
    if all(_is_integer(name) for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _name(path: Path, image: Path) -> str:
    """An image's path without `.` and `..`, relative to the CSV where it can be: the same wherever the folder lies."""
    from os.path import normpath, relpath  # pathlib keeps `..`, and resolve() would touch the disk

    return Path(normpath(relpath(image, path.parent))).as_posix()


def _unit(path: Path, row: Row) -> str:
    """What must not be divided."""
    return f"group {row.group}" if row.group else f"image {_name(path, row.image)}"


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]{1,18}", text) is not None


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
