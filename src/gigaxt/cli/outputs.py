"""Where verbs write: never over what they were given, and into folders that take files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gigaxt.csv_cells import read_cells
from gigaxt.errors import ConfigError

Identity = tuple[int, int]
"""Device and number of a file, the same whatever path leads to it."""


def input_files(given: Sequence[Path], images: Iterable[Path]) -> dict[Identity, str]:
    """The files that must not be written over, and what each is: an image, a CSV, or what a CSV names (labels, masks).

    Args:
        given: what the command line names; its CSVs can be read.
        images: the images that it means.
    """
    files: dict[Path, str] = {}
    for path in given:
        if path.suffix.lower() == ".csv":
            cells = {cell for _, line in read_cells(path)[1] for cell in line.values()}
            files |= dict.fromkeys(
                (path.parent / cell for cell in cells if cell), f"one of the files that {path} names"
            )
            files[path] = "the CSV of the images"
    files |= dict.fromkeys(images, "one of the images")
    found = ((_identity(path), what) for path, what in files.items())
    return {identity: what for identity, what in found if identity is not None}


def check_not_input(target: Path, inputs: dict[Identity, str], *, flag: str = "--out") -> None:
    """Raise ConfigError if a file that is to be written is one of the inputs."""
    identity = _identity(target)
    if identity in inputs:
        raise ConfigError(
            f"{flag}: {target} is {inputs[identity]}; choose another {'name' if flag == '--out' else '--out'}"
        )


def make_folder(path: Path, *, flag: str = "--out") -> None:
    """Make the folder of an output where it is missing; raise ConfigError if nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{flag}: cannot make the folder {path}: {error.strerror or error}; choose another one"
        ) from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{flag}: nothing may be written to the folder {path}; choose another one")


def _identity(path: Path) -> Identity | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # no such file, or a text that cannot be a path
        return None
    return stat.st_dev, stat.st_ino
