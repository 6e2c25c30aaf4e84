"""`gigaxt import-coco`: a CSV of the images and boxes of a COCO JSON, or of Cityscapes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError


@dataclass(kw_only=True)
class ImportCocoArguments:
    """Make a CSV of the images and boxes of a COCO JSON for check, train, eval and predict.

    gigaxt import-coco annotations/instances_train2017.json train2017 train.csv --split train

    The CSV names the JSON, which stays what is learnt and scored. Columns: image, boxes (the JSON), image_id, split.
    """

    json: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="JSON")]
    """With images, categories and annotations; or gtFine/train of Cityscapes, of which OUT.json is made first."""
    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """The folder that its file names count from."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The CSV to make."""
    split: Literal["train", "val", "test"] | None = None
    """Of all of these images; None: `train.split_seed` divides them."""
    append: bool = False
    """Add the lines to a CSV that exists, such as those of val to those of train."""
    force: bool = False
    """Overwrite the CSV if it exists."""


def main(args: Sequence[str]) -> int:
    """Write the CSV; exit status 0."""
    arguments = parse(ImportCocoArguments, args, verb="import-coco", switches=True)

    from gigaxt.datasets.coco import import_coco

    out = arguments.out
    if out.exists() and not (arguments.force or arguments.append):
        raise ConfigError(f"{out} exists; choose another name, --append to add to it, or --force to overwrite it")
    json = arguments.json
    if json.is_dir():
        from gigaxt.datasets.cityscapes import cityscapes_to_coco

        name = f"{out.stem}_{json.name}.json" if arguments.append else f"{out.stem}.json"
        json = cityscapes_to_coco(json, out.with_name(name))
    found = import_coco(json, arguments.images, out, split=arguments.split, append=arguments.append)
    notes = [f"{found['crowds']:,} crowds, where nothing is learnt"] if found["crowds"] else []
    notes += [f"{found['empty']:,} boxes without an area, which are left out"] if found["empty"] else []
    print(
        f"{out}: {found['images']:,} images, {found['without']:,} of them without annotations, {found['boxes']:,} "
        f"boxes of {found['categories']:,} categories{', '.join(['', *notes])}"
    )
    print(f"next: gigaxt check {shlex.quote(str(out))} --write run.yaml")
    return 0
