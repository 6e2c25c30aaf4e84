"""`gigaxt import-inat`: a CSV of the images of iNaturalist 2018."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError


@dataclass(kw_only=True)
class ImportInatArguments:
    """Make a CSV of iNaturalist 2018 for check, train, eval and predict.

    gigaxt import-inat /data/inat2018 reptilia.csv --supercategory Reptilia
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """As downloaded: train2018.json, val2018.json, categories.json and train_val2018/."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The CSV to make: image, label (the species' name), label_id, split (train, val), supercategory."""
    supercategory: tuple[str, ...] = ()
    """Reptilia, Aves, ...: one or several; none: all."""
    labels: str = "ids"
    """Order of the classes. ids: by category id; xt: that of the published xT models (Reptilia); or a JSON file that
    maps category ids to labels."""
    force: bool = False
    """Overwrite the CSV if it exists."""


def main(args: Sequence[str]) -> int:
    """Write the CSV; exit status 0."""
    arguments = parse(ImportInatArguments, args, verb="import-inat", switches=True)

    from gigaxt.datasets.inaturalist import write_manifest

    out = arguments.out
    if out.exists() and not arguments.force:
        raise ConfigError(f"{out} exists; choose another name, or use --force to overwrite it")
    counts = write_manifest(arguments.folder, out, supercategories=arguments.supercategory, order=arguments.labels)
    print(
        f"{out}: {counts['train']:,} images to train on, {counts['val']:,} to validate, {counts['classes']:,} classes"
    )
    print(f"next: gigaxt check {shlex.quote(str(out))}, or a recipe of examples/inaturalist")
    return 0
