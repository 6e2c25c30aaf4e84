"""`gigaxt predict`: a model's answers for images; class scores as CSV, masks as tiled TIFF."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError, DataError, ImageError

if TYPE_CHECKING:
    from gigaxt.nn.xt import GigaXT

TIFF_SUFFIXES = (".tif", ".tiff")


@dataclass(kw_only=True)
class PredictArguments:
    """Answers for images of any size, class scores or masks.

    gigaxt predict runs/a scene.tif --out mask.tif
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, or of a run (its best model)."""
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(one or more)")
    ]
    """Images, folders of images, or CSVs with a column `image`; of those with `case`, a model that classifies answers
    for each case."""
    out: Path
    """A .csv for scores, a .tif for one mask, or a folder for the masks of several images."""
    png: bool = False
    """Also draw each mask over a small picture of its image, beside the TIFF."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read or does not fit the model does; skipped ones are listed, exit status 1."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: CUDA where there is one."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 autocast; auto: on CUDA devices that have it."""
    chunk_regions: int = 8
    """Regions encoded at once: more is faster and takes more memory."""


def main(args: Sequence[str]) -> int:
    """Predict; exit status 0, or 1 where images were skipped."""
    arguments = parse(PredictArguments, args, verb="predict", switches=True)
    images = list(expand(arguments.images))

    from gigaxt.cli.eval import find_model
    from gigaxt.pretrained import load
    from gigaxt.training.device import autocast, pick_device

    folder = find_model(arguments.model).folder
    device = pick_device(arguments.device)
    model = load(folder).to(device)
    model.streaming = replace(model.streaming, chunk_regions=arguments.chunk_regions)
    skipped: dict[str, str] | None = {} if arguments.on_bad_image == "skip" else None
    with autocast(device, arguments.amp):
        if model.dense:
            predict_masks(model, images, arguments, skipped)
        else:
            predict_scores(model, images, arguments, skipped)
    for reason in (skipped or {}).values():
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if skipped else 0


def expand(paths: Sequence[Path]) -> Iterator[Path]:
    """The images that are meant: files as they are, those in folders by name, those in CSVs in the order of lines.

    Raises:
        ImageError: a path does not exist. DataError: a folder or a CSV without images, or no path at all.
    """
    if not paths:
        raise DataError("expected at least one image: gigaxt predict runs/a scene.tif --out mask.tif")
    for path in paths:
        if path.suffix.lower() == ".csv":
            yield from dict.fromkeys(image for image, _ in _lines_of_csv(path))
        elif path.is_dir() and not _is_zarr(path):
            yield from _images_of_folder(path)
        elif not path.exists():
            raise ImageError(path, "expected an image, a folder or a CSV, but there is nothing")
        else:
            yield path


def cases_of(paths: Sequence[Path], images: Sequence[Path]) -> list[str] | None:
    """The case of each image, as the CSVs among `paths` name it, empty where they do not; None where they name none.

    Raises:
        DataError: an image is in two cases.
    """
    cases: dict[Path, str] = {}
    for path in paths:
        for image, case in _lines_of_csv(path) if path.suffix.lower() == ".csv" else ():
            if cases.setdefault(image, case) != case:
                raise DataError(f"{path}: image {image} is in two cases, {cases[image]} and {case}; give it one")
    return [cases.get(image, "") for image in images] if any(cases.values()) else None


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
    _check_not_input(out, arguments.images)
    _make_folder(out.parent)
    cases = cases_of(arguments.images, images)
    answers = len({case or i for i, case in enumerate(cases or [""] * len(images))})
    what = "images" if answers == len(images) else "cases"
    with Steps(out.name, what) as steps:
        predict(model, images, out, cases=cases, skipped=skipped, progress=steps)
    print(f"{out}: scores of {answers - len(skipped or ())} {what}, {steps.summary}")


def predict_masks(
    model: GigaXT, images: Sequence[Path], arguments: PredictArguments, skipped: dict[str, str] | None
) -> None:
    """Write a TIFF for each image."""
    from gigaxt.cli.progress import Steps
    from gigaxt.inference import predict

    single = images if len(images) == 1 and list(arguments.images) == list(images) else []
    targets = mask_paths(arguments.out, images, as_file=bool(single))
    for target in targets:
        _check_not_input(target, images)
        _check_not_input(target.with_suffix(".png"), images if arguments.png else [])
    for image, target in zip(images, targets, strict=True):
        _make_folder(target.parent)
        try:
            with Steps(image.name, "regions") as steps:
                predict(model, image, target, progress=steps)
        except (ImageError, DataError) as error:
            if skipped is None or getattr(error, "path", "") == str(target):  # what cannot be written is no bad image
                raise
            skipped[str(image)] = str(error)
            continue
        print(f"{target}: {_what_mask(target)}, {steps.summary}")
        if arguments.png:
            print(f"{draw(model, image, target)}: the mask over the image")


def mask_paths(out: Path, images: Sequence[Path], *, as_file: bool) -> list[Path]:
    """Where the masks go: `out` itself for one image, else NAME.tif in the folder `out`.

    Raises:
        ConfigError: `out` does not fit, or two images have one name.
    """
    suffix = out.suffix.lower()
    if as_file and not out.is_dir() and suffix in TIFF_SUFFIXES:
        return [out]
    if suffix in (*TIFF_SUFFIXES, ".csv", ".png") and not out.is_dir():
        wanted = (
            "the name of a .tif file, or a folder" if as_file else f"a folder for the masks of {len(images)} images"
        )
        raise ConfigError(f"--out {out}: the model gives masks: expected {wanted}")
    targets: dict[Path, Path] = {}
    for image in images:
        target = out / f"{image.name.removesuffix(image.suffix)}.tif"
        if target in targets:
            raise ConfigError(f"{targets[target]} and {image} would both become {target}: predict them in two calls")
        targets[target] = image
    return list(targets)


def draw(model: GigaXT, image: Path, mask: Path) -> Path:
    """Write the mask over a small picture of its image, beside the TIFF."""
    from gigaxt.draw import save_png, thumbnail, with_legend
    from gigaxt.image import open_image
    from gigaxt.pixel_answers import colours_of, names_of, over_picture

    head: Any = model.config.head
    seen: Any = model.batch([open_image(image)]).scenes[0].image  # as the model saw it: three of its bands, its size
    picture = over_picture(thumbnail(seen), open_image(mask), head)
    if head.target != "regression":
        picture = with_legend(picture, names_of(head), colours_of(head))
    return save_png(picture, mask.with_suffix(".png"))


def _what_mask(path: Path) -> str:
    from gigaxt.cli.info import describe_size, file_size
    from gigaxt.image import open_image

    return f"{describe_size(open_image(path))}, {file_size(path)}"


def _lines_of_csv(path: Path) -> list[tuple[Path, str]]:
    """Image and case, which may be empty, of each line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            columns = [(name or "").strip().lower() for name in table.fieldnames or ()]
            if "image" not in columns:
                raise DataError(f"{path}: expected a column `image`, got {', '.join(columns) or 'an empty file'}")
            table.fieldnames = columns
            lines = [((row["image"] or "").strip(), (row.get("case") or "").strip()) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read the CSV: {getattr(error, 'strerror', None) or error}") from error
    found = [(path.parent / name, case) for name, case in lines if name]
    if not found:
        raise DataError(f"{path}: expected a line for each image below the header, got none")
    return found


def _images_of_folder(path: Path) -> Iterator[Path]:
    from gigaxt.image.headers import HEAD, kind_of

    found = False
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or not (_is_zarr(file) or file.is_file()):
            continue
        if file.is_file():
            with file.open("rb") as opened:
                if kind_of(opened.read(HEAD)) is None:
                    continue
        found = True
        yield file
    if not found:
        raise DataError(f"{path}: expected a folder with images, got none that is an image")


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / marker).is_file() for marker in (".zattrs", ".zgroup", "zarr.json"))


def _check_not_input(target: Path, images: Sequence[Path]) -> None:
    if target.exists() and any(image.exists() and image.samefile(target) for image in images):
        raise ConfigError(f"--out: {target} is one of the images; choose another name")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot make the folder {path}: {error.strerror or error}") from error
