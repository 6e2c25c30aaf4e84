"""A CSV as its header and its lines of cells, with errors that name the line."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gigaxt.errors import DataError


def read_cells(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a comma-separated UTF-8 file with a header.

    Columns without a name are left out, and so are empty cells beyond the last one: spreadsheets write both.

    Returns:
        Column names in lower case; for each line that is not blank its number (the header is line 1) and its cells by
        column, stripped.

    Raises:
        DataError: the file cannot be read, is no such CSV, or a line has another number of cells than the header.
    """
    records = _records(path)
    _, header = next(records, (1, []))
    header = [name.strip().lower() for name in header]
    if not any(header):
        raise DataError(f"{path}: the file is empty; expected a header such as `image,label`")
    named = [name for name in header if name]
    if len(header) == 1 and (found := re.search(r"[;\t|]", header[0])):
        raise DataError(f"{path}: columns are separated by {found.group()!r}; expected commas")
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise DataError(f"{path}: column `{twice[0]}` occurs twice in the header")
    lines = []
    for line, cells in records:
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(header):
            raise DataError(
                f"{path} line {line}: expected {len(header)} cells as in the header, got {len(cells)}; "
                f'put quotes ("...") around cells that hold a comma'
            )
        lines.append((line, {name: cell.strip() for name, cell in zip(header, cells, strict=True) if name}))
    return named, lines


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
