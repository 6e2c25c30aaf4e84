"""`gigaxt predict`: a model's answers for images; class scores as CSV, masks as tiled TIFF, objects as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gigaxt.amounts import amount
from gigaxt.cli.flags import parse
from gigaxt.cli.image_lists import cases_of, expand, scene_outputs
from gigaxt.cli.outputs import check_not_input, input_files, make_folder
from gigaxt.errors import ConfigError, DataError, ImageError

Probabilities = Literal["uint8", "float16", "float32"]

if TYPE_CHECKING:
    from gigaxt.nn.xt import GigaXT


@dataclass(kw_only=True)
class PredictArguments:
    """Answers for images of any size: class scores, masks or objects.

    gigaxt predict runs/a scene.tif --out mask.tif

    The same command goes on where a stopped one stood.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, or of a run (its best model)."""
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(one or more)")
    ]
    """Images, folders, quoted patterns, or CSVs with columns `image` and, for a classifier, `case`."""
    out: Path
    """A .csv for scores, a .tif for one mask, or a folder for the masks of several images. Of objects: a .json (COCO
    results, all images), a .csv (all images), a .geojson (one image; in its CRS, or px as QuPath reads them), or a
    folder for a .geojson each."""
    score: float | None = None
    """Objects that score less are left out. None: the model's threshold; of COCO results nearly all are kept."""
    probabilities: Probabilities | None = None
    """Also write NAME_probabilities.tif, a band a class."""
    overlap: int | None = None
    """Px that windows share, against seams; None: a quarter of a region."""
    dihedral: Literal[1, 4, 8] = 1
    """Average over quarter turns (4), and mirror images (8)."""
    png: bool = False
    """Also draw each mask, or the objects, over their image, as a small PNG."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read or does not fit the model does; skipped ones are listed, exit status 1."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: CUDA where there is one."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 autocast; auto: on CUDA devices that have it."""
    chunk_regions: int = 8
    """Regions encoded at once: more is faster and takes more memory."""
    budget_gib: float = 1.0
    """Memory for feature maps of regions that are else encoded twice: for objects, and for masks without overlap."""
    readers: int = 2
    """Threads that read ahead: more where the storage answers slowly."""
    cache: Path | None = None
    """Folder on a fast disk for local copies of what is read of the images, where these lie on slow storage."""
    cache_gib: float = 50.0
    """Size of that folder, of which the least recently used copies make room."""


def main(args: Sequence[str]) -> int:
    """Predict; exit status 0, or 1 where images were skipped."""
    arguments = parse(PredictArguments, args, verb="predict", switches=True)
    images = list(expand(arguments.images))

    from gigaxt.cli.eval import find_model
    from gigaxt.cli.progress import told_cache
    from gigaxt.pretrained import load
    from gigaxt.training.device import autocast, check_budgets, pick_device, precision_advice

    folder = find_model(arguments.model).folder
    device = pick_device(arguments.device)
    model = load(folder).to(device)
    model.streaming = replace(
        model.streaming,
        chunk_regions=arguments.chunk_regions,
        budget_gib=arguments.budget_gib,
        readers=arguments.readers,
    )
    check_budgets(model.streaming, device, flags=True)
    skipped: dict[str, str] | None = {} if arguments.on_bad_image == "skip" else None
    if slow := precision_advice(device, arguments.amp):
        print(slow, file=sys.stderr)
    with autocast(device, arguments.amp), told_cache(arguments.cache, arguments.cache_gib):
        try:
            _predict(model, images, arguments, skipped)
        except ImageError as error:
            if skipped is not None or len(images) == 1 or error.path not in map(str, images):
                raise
            cause = f"{error.cause}; `--on-bad-image skip` goes on without such images"
            raise ImageError(error.path, cause, error.place) from error
    for reason in (skipped or {}).values():
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if skipped else 0


def _predict(
    model: GigaXT, images: Sequence[Path], arguments: PredictArguments, skipped: dict[str, str] | None
) -> None:
    """What the kind of the model's head asks for."""
    if model.config.head.kind in ("detect", "mask_rcnn"):
        from gigaxt.cli.predict_objects import predict_objects

        predict_objects(model, images, arguments, skipped)
    elif model.config.head.kind == "points":
        from gigaxt.cli.predict_points import predict_points

        predict_points(model, images, arguments, skipped)
    elif arguments.score is not None:
        raise ConfigError("--score: is for models that find objects")
    elif model.dense:
        predict_masks(model, images, arguments, skipped)
    else:
        predict_scores(model, images, arguments, skipped)


def predict_scores(
    model: GigaXT, images: Sequence[Path], arguments: PredictArguments, skipped: dict[str, str] | None
) -> None:
    """Write one CSV, with a line for each image, or for each case where CSVs name them."""
    from gigaxt.cli.progress import Steps
    from gigaxt.inference import predict

    out = arguments.out
    if out.is_dir() or out.suffix.lower() != ".csv":
        raise ConfigError(f"--out {out}: the model gives class scores: expected the name of a .csv file")
    if arguments.png:
        raise ConfigError("--png: the model gives class scores, and there is no mask to draw")
    if arguments.probabilities or arguments.overlap is not None or arguments.dihedral != 1:
        raise ConfigError("--probabilities, --overlap, --dihedral: the model gives class scores, these are for masks")
    check_not_input(out, input_files(arguments.images, images))
    make_folder(out.parent)
    cases = cases_of(arguments.images, images)
    answers = len({case or i for i, case in enumerate(cases or [""] * len(images))})
    what = "image" if answers == len(images) else "case"
    with Steps(out.name, f"{what}s") as steps:
        predict(model, images, out, cases=cases, skipped=skipped, progress=steps)
    print(f"{out}: scores of {amount(answers - len(skipped or ()), what)}, {steps.summary}")


def predict_masks(
    model: GigaXT, images: Sequence[Path], arguments: PredictArguments, skipped: dict[str, str] | None
) -> None:
    """Write a TIFF for each image."""
    from gigaxt.cli.progress import Steps
    from gigaxt.inference import predict
    from gigaxt.inference.masks import is_output_error
    from gigaxt.inference.parts import model_digest

    as_file = len(images) == 1 and list(arguments.images) == list(images)
    targets = scene_outputs(arguments.out, images, as_file=as_file)
    _check_outputs(targets, images, arguments)
    digest = model_digest(model)
    counts = {"predicted": 0, "complete already": 0, "skipped": 0}
    for image, target in zip(images, targets, strict=True):
        try:
            with Steps(image.name, "regions") as steps:
                predict(
                    model,
                    image,
                    target,
                    overlap=arguments.overlap,
                    dihedral=arguments.dihedral,
                    probabilities=arguments.probabilities,
                    progress=steps,
                    digest=digest,
                )
        except (ImageError, DataError) as error:
            if skipped is None or is_output_error(error, target):
                raise
            skipped[str(image)] = str(error)
            counts["skipped"] += 1
            continue
        counts["predicted" if steps.done else "complete already"] += 1
        print(f"{target}: {_what_mask(target)}, {steps.summary if steps.done else 'complete already'}")
        if arguments.png:
            print(f"{draw(model, image, target)}: the mask over the image")
    if len(images) > 1:
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"{len(images)} scenes: {told}")


def _check_outputs(targets: Sequence[Path], images: Sequence[Path], arguments: PredictArguments) -> None:
    """Before the work starts: no output is an input, nor the output of another one, and the folders take files.

    Raises:
        ConfigError: one is.
    """
    from gigaxt.inference.masks import outputs_of

    inputs = input_files(arguments.images, images)
    seen: set[Path] = set()
    for target in targets:
        written = outputs_of(target, arguments.probabilities)
        for path in [*written, *([target.with_suffix(".png")] if arguments.png else [])]:
            check_not_input(path, inputs)
            if path in seen:
                raise ConfigError(f"--out: {path} would be written twice: predict these images in two calls")
            seen.add(path)
    for folder in dict.fromkeys(target.parent for target in targets):
        make_folder(folder)


def draw(model: GigaXT, image: Path, mask: Path) -> Path:
    """Write the mask over a small picture of its image, beside the TIFF."""
    from gigaxt.draw import save_png, thumbnail
    from gigaxt.image import open_image
    from gigaxt.pixel_answers import with_mask

    head: Any = model.config.head
    # As the model saw it: three of its bands, its size.
    seen: Any = model.batch([open_image(image, rgb=model.config.input.rgb)]).scenes[0].image
    return save_png(with_mask(thumbnail(seen), open_image(mask, cached=False), head), mask.with_suffix(".png"))


def _what_mask(path: Path) -> str:
    from gigaxt.cli.info import describe_size, file_size
    from gigaxt.image import open_image

    return f"{describe_size(open_image(path, cached=False))}, {file_size(path)}"
