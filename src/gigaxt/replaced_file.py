"""Files that are complete under their name, or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` in one step when the block ends.

    Where the block fails, what it wrote is removed and `path` is as it was.

    Raises:
        OSError: from the block, or because the file cannot be renamed. Callers say in their own words what failed.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
