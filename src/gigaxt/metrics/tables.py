"""Columns of a CSV or of a table in memory, with errors that name the file and the line."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gigaxt.csv_cells import read_cells
from gigaxt.errors import DataError

UNKNOWN = -1
"""Of a flag: the cell is blank."""
_BLANK = frozenset(("", "nan", "na", "n/a", "#n/a", "null", "none", "<na>", "nat"))
_FLAGS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


class Table:
    """The named columns of a CSV (a path), or of anything that maps column names to columns.

    That is a dict of lists or arrays, a pandas or polars DataFrame, a pyarrow Table; none of these packages is needed.

    Args:
        source: the CSV or the table.
        name: what errors call a table in memory.

    Raises:
        DataError: `source` is neither, or the CSV cannot be read.
    """

    def __init__(self, source: object, name: str) -> None:
        if isinstance(source, (str, Path)):
            self.name, self._row_word = str(source), "line"
            header, lines = read_cells(Path(source))
            self._names: Collection[str] = header
            self._numbers: Sequence[int] = [line for line, _ in lines]
            self._columns: Any = {column: [cells[column] for _, cells in lines] for column in header}
            return
        self.name, self._row_word = name, "row"
        self._names, self._columns = _column_names(source, name), source
        columns = {column: self._columns[column] for column in self._names}
        lengths = {name: len(column) for name, column in columns.items() if isinstance(column, Sized)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{name}: expected columns of one length, got {lengths}")
        self._numbers = range(max(lengths.values(), default=0))

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, column: str) -> bool:
        return column in self._names

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._names)

    def row(self, index: int) -> str:
        """What errors call a row: the file and its line, or the table and its row from 0."""
        return f"{self.name} {self._row_word} {self._numbers[index]}"

    def words(self, column: str) -> list[str]:
        """The cells as stripped text, "" where blank."""
        return ["" if _is_blank(cell) else str(cell).strip() for cell in self._cells(column)]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """The cells as float64, NaN where blank.

        Raises:
            DataError: no such column, or a cell that is no number.
        """
        return np.array([self._number(i, column, cell) for i, cell in enumerate(self._cells(column))], np.float64)

    def flags(self, column: str) -> NDArray[np.int8]:
        """The cells as 1 (True), 0 (False) or `UNKNOWN` (blank).

        Raises:
            DataError: no such column, or a cell that is neither true nor false, such as a probability.
        """
        return np.array([self._flag(i, column, cell) for i, cell in enumerate(self._cells(column))], np.int8)

    def _cells(self, column: str) -> Sequence[Any]:
        if column not in self._names:
            names = ", ".join(map(str, self._names)) or "none"
            raise DataError(f"{self.name}: expected a column `{column}`, got {names}")
        cells = np.asarray(self._columns[column], dtype=object)
        if cells.ndim != 1:
            raise DataError(f"{self.name}: expected one cell a row in column `{column}`, got shape {cells.shape}")
        return cast(Sequence[Any], cells)

    def _number(self, index: int, column: str, cell: Any) -> float:
        if _is_blank(cell):
            return math.nan
        try:
            return float(cell)
        except (TypeError, ValueError):
            raise DataError(f"{self.row(index)}: expected a number in column `{column}`, got {cell!r}") from None

    def _flag(self, index: int, column: str, cell: Any) -> int:
        if _is_blank(cell):
            return UNKNOWN
        try:
            return _FLAGS[str(cell).strip().lower()]
        except KeyError:
            raise DataError(
                f"{self.row(index)}: expected True, False or nothing in column `{column}`, got {cell!r};"
                " compare probabilities with a threshold first"
            ) from None


def _column_names(table: Any, name: str) -> Collection[str]:
    """Of a pyarrow Table, a DataFrame or a mapping, in the order in which they must be asked."""
    for attribute in ("column_names", "columns", "keys"):
        found = getattr(table, attribute, None)
        if found is not None:
            return list(found() if callable(found) else found)
    raise DataError(f"{name}: expected the path of a CSV or a table of named columns, got {type(table).__name__}")


def _is_blank(cell: Any) -> bool:
    return str(cell).strip().lower() in _BLANK
