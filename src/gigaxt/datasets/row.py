"""One line of a manifest: an image and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gigaxt.config import nearest
from gigaxt.datasets.labels import LABEL, Answer, Target, default_target, parse_answer
from gigaxt.datasets.split import SPLITS
from gigaxt.errors import DataError

Task = Literal["classification", "detection", "points", "segmentation"]

TARGET_COLUMNS: dict[str, Task] = {
    "label": "classification",
    "mask": "segmentation",
    "boxes": "detection",
    "points": "points",
}
"""The column that holds what is to be learnt, and the task that it stands for."""
DENSE_COLUMNS: dict[Task, str] = {task: column for column, task in TARGET_COLUMNS.items() if task != "classification"}
"""Tasks that learn from a file, and the column with its path."""
OPTIONAL_COLUMNS = ("split", "group", "case", "sha256", "label_id", "aoi", "image_id")
KNOWN_COLUMNS = frozenset(("image", *TARGET_COLUMNS, *OPTIONAL_COLUMNS))
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a manifest: an image and what is known of it."""

    image: Path
    line: int
    """Line of the CSV, from 1; the header is line 1."""
    label: str | None = None
    """As written, stripped; None where answers stand in other columns."""
    target_path: Path | None = None
    """The file that a dense task learns from, such as a mask."""
    aoi: Path | None = None
    """The vector file inside of which the target is known; None: everywhere."""
    answer: Answer = field(default_factory=Answer)
    """What the row says; that of its case where its own is not known. Empty where there is a target_path."""
    split: str = ""
    """train, val or test."""
    group: str | None = None
    case: str | None = None
    sha256: str | None = None
    """Of the image file, 64 hexadecimal digits in lower case."""
    cells: dict[str, str] = field(default_factory=dict)
    """The whole line by column, as written, stripped."""

    @property
    def files(self) -> list[Path]:
        """All that it names."""
        return [path for path in (self.image, self.target_path, self.aoi) if path is not None]

    @property
    def extra(self) -> dict[str, str]:
        """Columns that gigaxt does not know."""
        return {name: cell for name, cell in self.cells.items() if name not in KNOWN_COLUMNS}


Case = tuple[Row, ...]
"""The rows that have one answer together: those of one `case`, or one row alone."""


def task_of(path: Path, header: Sequence[str], task: Task | None, columns: tuple[str, ...]) -> Task:
    """What a CSV of these columns is for; `task` decides where there are several.

    Raises:
        DataError: a column is missing, or it is not clear which counts.
    """
    if "image" not in header:
        raise DataError(f"{path}: column `image` is missing{nearest('image', header)}")
    if columns != LABEL:
        return "classification"
    found = [column for column in TARGET_COLUMNS if column in header]
    if task is not None:
        column = next(name for name, meaning in TARGET_COLUMNS.items() if meaning == task)
        if column not in found:
            raise DataError(f"{path}: column `{column}` is missing{nearest(column, header)}")
        return task
    if not found:
        others = [name for name in header if name not in ("image", *OPTIONAL_COLUMNS)]
        hint = f"{nearest('label', others)}; --label-columns names those with a label each" if others else ""
        if default_target(header, ()) == "survival":
            hint = "; `time` and `event` are of target survival"
        raise DataError(f"{path}: expected a column {_or(TARGET_COLUMNS)}, got none{hint}")
    if len(found) > 1:
        raise DataError(f"{path}: has {_and(found)}; say which counts with `task`, or remove one")
    return TARGET_COLUMNS[found[0]]


def _or(names: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _and(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def parse_row(
    path: Path,
    header: Sequence[str],
    task: Task,
    target: Target,
    columns: tuple[str, ...],
    line: int,
    cells: dict[str, str],
) -> Row:
    """A line of the CSV, checked; its image is not touched.

    Raises:
        DataError: with the line number; a cell does not fit.
    """
    here = f"{path} line {line}"
    if not cells["image"]:
        raise DataError(f"{here}: `image` is empty; expected a path")
    labelled = task == "classification"
    if not labelled and not cells[DENSE_COLUMNS[task]]:
        raise DataError(f"{here}: `{DENSE_COLUMNS[task]}` is empty; expected a path")
    split = cells.get("split", "")
    if "split" in header and split.lower() not in SPLIT_NAMES:
        hint = nearest(split.lower(), SPLITS) if split else f"; expected one of {', '.join(SPLITS)}"
        raise DataError(f"{here}: split is {split!r}{hint}")
    digest = cells.get("sha256", "").lower()
    if digest and not re.fullmatch("[0-9a-f]{64}", digest):
        raise DataError(f"{here}: sha256 is {digest!r}; expected 64 hexadecimal digits")
    return Row(
        image=path.parent / cells["image"],
        line=line,
        label=cells["label"] if labelled and columns == LABEL else None,
        target_path=None if labelled else path.parent / cells[DENSE_COLUMNS[task]],
        aoi=path.parent / cells["aoi"] if not labelled and cells.get("aoi") else None,
        answer=parse_answer(here, target, columns, cells) if labelled else Answer(),
        split=SPLIT_NAMES[split.lower()] if split else "",
        group=cells.get("group") or None,
        case=cells.get("case") or None,
        sha256=digest or None,
        cells=cells,
    )
