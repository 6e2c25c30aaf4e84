"""`gigaxt check`: look through a CSV and its files before training; `--write` makes a config."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gigaxt.amounts import amount
from gigaxt.cli.flags import parse
from gigaxt.cli.outputs import make_folder
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.datasets.check import CheckReport


@dataclass(kw_only=True)
class CheckArguments:
    """Look through a CSV of images before training.

    gigaxt check data.csv --write run.yaml

    The CSV has a column image, and label, mask, boxes, points, time and event, or label columns of any names;
    images that share `case` are one sample. Exit status 2 where files are missing, unreadable or do not fit.
    """

    csv: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CSV")]
    """The manifest; paths in it count from its folder."""
    write: Path | None = None
    """Write a config that fits the data to this YAML file."""
    force: bool = False
    """Overwrite the YAML file if it exists."""
    foreground: str | None = None
    """What of the images is worth encoding: tissue, or the path of a raster or of GeoJSON polygons."""
    overlays: Path | None = None
    """Write pictures of the first 32 images to this folder: masks in colours, foreground framed."""
    task: Literal["classification", "detection", "points", "segmentation"] | None = None
    """Which column counts where the CSV has several of label, mask, boxes, points."""
    target: Literal["single", "multi", "regression", "survival"] | None = None
    """What labels are: one class, several (a|b), numbers, or time until an event; None: what the columns suggest."""
    label_columns: tuple[str, ...] = ()
    """Columns with a label each, 0, 1 or nothing (not known), in place of `label`; with target regression: numbers."""
    class_field: str | None = None
    """Of masks that are vector files: the property with each polygon's class; QuPath: classification.name."""
    workers: int = 2
    """Files looked at at once."""


def main(args: Sequence[str]) -> int:
    """Print the report; exit status 0, or 2 where files are missing, unreadable or do not fit."""
    arguments = parse(CheckArguments, args, verb="check", switches=True)

    from gigaxt.cli.progress import Steps
    from gigaxt.datasets.check import check_manifest

    if arguments.write is not None and arguments.write.exists() and not arguments.force:  # before hours of reading
        raise ConfigError(f"{arguments.write} exists; choose another name, or use --force to overwrite it")
    if arguments.write is not None and arguments.write.is_dir():
        raise ConfigError(f"--write: expected the name of a YAML file, got the folder {arguments.write}")
    if arguments.write is not None:
        make_folder(arguments.write.parent, flag="--write")
    if arguments.overlays is not None:
        make_folder(arguments.overlays, flag="--overlays")
    with Steps(arguments.csv.name, "images") as steps:
        report = check_manifest(
            arguments.csv,
            task=arguments.task,
            target=arguments.target,
            label_columns=arguments.label_columns or None,
            class_field=arguments.class_field,
            foreground=arguments.foreground,
            overlay_folder=arguments.overlays,
            workers=arguments.workers,
            progress=steps,
        )
    print("\n".join(report.lines()))
    if not report.ok:
        wrong = len(report.missing) + len(report.unreadable) + len(report.mismatched)
        print(f"error: {arguments.csv}: {amount(wrong, 'file')} to put right, listed above", file=sys.stderr)
    write_run(arguments, report)
    return 0 if report.ok else 2


def write_run(arguments: CheckArguments, report: CheckReport) -> None:
    """Write the config where asked, and say what comes next.

    Raises:
        DataError: the file exists, or no image could be read.
    """
    if arguments.write is None:
        if report.ok:
            print(f"next: gigaxt check {_quoted(arguments.csv)}{_reading(arguments)} --write run.yaml")
        return
    from gigaxt.datasets.check import write_config

    path = write_config(report, arguments.csv, arguments.write, force=arguments.force)
    print(f"wrote {path}")
    first = "" if report.ok else "put the files right, then "
    print(f"next: {first}gigaxt train --config {_quoted(path)} --out {_quoted(Path('runs') / path.stem)}")


def _reading(arguments: CheckArguments) -> str:
    """The flags that say how the CSV is read, for the same to be asked again."""
    given = [
        ("task", arguments.task),
        ("target", arguments.target),
        ("class-field", arguments.class_field),
        ("foreground", arguments.foreground),
    ]
    flags = [f" --{name} {shlex.quote(value)}" for name, value in given if value is not None]
    columns = "".join(f" {shlex.quote(column)}" for column in arguments.label_columns)
    return "".join(flags) + (f" --label-columns{columns}" if columns else "")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
