"""`gigaxt import-xview3`: a CSV of the scenes of xView3-SAR."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gigaxt.amounts import amount
from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError


@dataclass(kw_only=True)
class ImportXview3Arguments:
    """Make a CSV of the scenes of xView3-SAR for train, eval and predict.

    gigaxt import-xview3 /data/xview3 xview3.csv
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """As downloaded: validation/SCENE/VV_dB.tif ..., validation.csv, shoreline/validation/..., public likewise."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The CSV to make: image (the scene's folder), points (the labels), scene_id, shoreline, group, split."""
    learn: tuple[Literal["train", "validation"], ...] = ("validation",)
    """Parts to train and validate on; the labels of `train` are incomplete."""
    locations: Path | None = None
    """A CSV with columns scene_id and location, which are never divided; None: scenes that overlap stay together."""
    force: bool = False
    """Overwrite the CSV if it exists."""


def main(args: Sequence[str]) -> int:
    """Write the CSV; exit status 0."""
    arguments = parse(ImportXview3Arguments, args, verb="import-xview3", switches=True)

    from gigaxt.datasets.xview3 import write_manifest

    out = arguments.out
    if out.exists() and not arguments.force:
        raise ConfigError(f"{out} exists; choose another name, or use --force to overwrite it")
    counts = write_manifest(arguments.folder, out, learn=arguments.learn, locations=arguments.locations)
    scenes, places = amount(counts["train"], "scene"), amount(counts["groups"], "place")
    objects, shorelines = amount(counts["objects"], "object"), amount(counts["shorelines"], "shoreline")
    print(
        f"{out}: {scenes} to train on, {counts['val']} to validate, {counts['test']} to test, in {places}, with "
        f"{objects} and {shorelines}"
    )
    if counts["empty"]:
        print(f"scenes without a label, which count as scenes without an object: {counts['empty']}")
    if counts["elsewhere"]:
        print(f"labels of scenes that are not there, which are left out: {counts['elsewhere']:,}")
    if not counts["val"]:
        print("all scenes to train on are of one place: there is none to validate on")
    print(f"next: gigaxt train {shlex.quote(str(out))} --config examples/xview3/better.yaml --out runs/better")
    return 0
