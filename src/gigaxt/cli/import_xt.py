"""`gigaxt import-xt`: a model folder of a published xT checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from gigaxt.cli import fail
from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.nn.xt import GigaXT

ALIKE = 0.01
"""Share of the images that other versions of JPEG, resizing and arithmetic may decide differently."""


@dataclass(kw_only=True)
class ImportArguments:
    """Make a model folder of a published xT checkpoint.

    gigaxt import-xt swin-t-mamba-512-256-top1.ckpt swin_v2_tiny_1e-4_mamba_512_256.yaml models/swin-t
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A .ckpt of bair-climate-initiative/xT, or safetensors with the same names. Code in it is never run."""
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Its published YAML; the files that it inherits from are looked for beside it and above."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The model folder to make."""
    backbone_overrides: str = "{}"
    """Arguments of the timm model that differ from the published backbone's, as JSON: '{"embed_dim": 16}'."""
    categories: Path | None = None
    """categories.json of iNaturalist 2018: the classes get its names."""
    labels: str = "xt"
    """With --categories and --verify. xt: the published order of Reptilia; or a JSON file that maps category ids to
    labels, such as the release's meta/category_label_reptilia_map.json."""
    verify: Path | None = None
    """Folder of iNaturalist 2018: score the model on its validation images, and compare with the published table."""
    device: str = "auto"
    """With --verify: cpu, cuda, cuda:1; auto: CUDA where there is one."""


def main(args: Sequence[str]) -> int:
    """Import one checkpoint; exit status 0, or 1 where --verify finds another score than the published one."""
    arguments = parse(ImportArguments, args, verb="import-xt")
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose another folder for the model")
    overrides = read_overrides(arguments.backbone_overrides)

    from gigaxt.cli.info import model_facts
    from gigaxt.xt_release.importer import from_xt_release
    from gigaxt.xt_release.scores import class_names

    model = from_xt_release(arguments.checkpoint, arguments.config, backbone_overrides=overrides)
    if arguments.verify is not None and model.config.input.resize_px is None:
        raise ConfigError(f"--verify: {arguments.config} does not say `data.crop_size`, the size of the images")
    if arguments.categories is not None:
        head = model.config.head
        names = class_names(arguments.categories, head.classes, arguments.labels)
        model.config = replace(model.config, head=replace(head, class_names=names))
    model.save(out)
    print(out)
    facts = model_facts(model)
    width = max(map(len, facts))
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items()))
    print(f"next: gigaxt train data.csv --train.init {shlex.quote(str(out))}, or gigaxt predict, eval with it")
    return 0 if arguments.verify is None else verify(model, arguments)


def verify(model: GigaXT, arguments: ImportArguments) -> int:
    """Score the model on the images of the published table; 0 where it answers alike, or was not published."""
    from gigaxt.cli.progress import Steps
    from gigaxt.training.device import pick_device
    from gigaxt.xt_release.scores import TOP1, measure, table_row, validation_images

    side = model.config.input.resize_px
    assert arguments.verify is not None
    assert side is not None
    images = validation_images(arguments.verify, arguments.labels)
    with Steps(arguments.verify.name, "images") as steps:
        score = measure(model.to(pick_device(arguments.device)), images, progress=steps)
    low, high = score.interval()
    row = table_row(model.config, side)
    published = "not published" if row is None else f"published {TOP1[row]:.2f} % ({row})"
    print(
        f"{score.images} images squashed to {side} x {side} px: top-1 {100 * score.top1 / score.images:.2f} % "
        f"(95 %: {low:.2f} to {high:.2f}), top-5 {100 * score.top5 / score.images:.2f} %; {published}"
    )
    if row is None:
        return 0
    apart = abs(score.top1 - TOP1[row] / 100 * score.images)
    if apart <= ALIKE * score.images:
        return 0
    return fail(f"error: {apart:.0f} images apart from the published score; are these all images, and its weights?", 1)


def read_overrides(text: str) -> Mapping[str, Any]:
    """The mapping that a flag gives as JSON.

    Raises:
        ConfigError: it is none.
    """
    try:
        overrides = yaml.safe_load(text)
    except yaml.YAMLError:
        overrides = None
    if not isinstance(overrides, dict):
        raise ConfigError(f"--backbone-overrides: expected JSON such as '{{\"embed_dim\": 16}}', got {text!r}")
    return overrides
