"""`gigaxt info`: what an image file or a model folder holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gigaxt.cli.flags import parse
from gigaxt.errors import ConfigError, GigaxtError, ImageError

if TYPE_CHECKING:
    from gigaxt.image import Image
    from gigaxt.nn.xt import GigaXT
    from gigaxt.scenes.inputs import InputConfig

TOKEN_PX = 32
"""Side of what a token covers in the usual backbones, px."""
MANY = 12
"""Bands and classes that are named one by one."""


@dataclass(kw_only=True)
class InfoArguments:
    """What images or model folders hold.

    gigaxt info scene.tif
    """

    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATHS", help_behavior_hint="(one or more)")
    ]
    """Images, or folders of models or runs."""
    region: int = 256
    """Side of the regions that are counted, px; a multiple of 32."""


def main(args: Sequence[str]) -> int:
    """Describe each path; exit status 0, or 2 where one of them cannot be read."""
    arguments = parse(InfoArguments, args, verb="info")
    if not arguments.paths:
        raise ConfigError("expected an image or a model folder: gigaxt info scene.tif")
    if arguments.region < TOKEN_PX or arguments.region % TOKEN_PX:
        raise ConfigError(f"--region: expected a multiple of {TOKEN_PX} px, got {arguments.region}")
    status = 0
    for path in arguments.paths:
        try:
            facts = describe(path, arguments.region)
        except GigaxtError as error:
            if len(arguments.paths) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            status = error.exit_status
            continue
        print(path)
        width = max(map(len, facts))
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items()))
    return status


def describe(path: Path, region: int) -> dict[str, str]:
    """Names and values of what `path` holds.

    Raises:
        ImageError: no image that can be read. CheckpointError: a model folder that is damaged.
    """
    try:
        is_model = any((path / name).is_file() for name in ("config.json", "config.yaml"))
    except OSError as error:  # a folder that may not be read
        raise ImageError(path, f"cannot be opened: {error.strerror or error}") from error
    if is_model:
        from gigaxt.cli.eval import find_model
        from gigaxt.pretrained import load

        return model_facts(load(find_model(path).folder))
    from gigaxt.image import open_image

    return {**image_facts(open_image(path), region), "file": file_size(path)}


def image_facts(image: Image, region: int) -> dict[str, str]:
    """What an image says of itself, and how it would be cut; nothing of it is read."""
    rows, cols = -(-image.height // region), -(-image.width // region)
    side = region // TOKEN_PX
    facts = {
        "size": describe_size(image),
        "bands": named(image.channels, image.band_names),
        "dtype": image.dtype.name,
        "levels": ", ".join(f"{level.width} x {level.height}" for level in image.levels),
        "pages": unread_pages(image),
        "storage": getattr(image, "storage", ""),
        "nodata": _nodata(image),
        "pixel size": _pixel_size(image),
        "crs": _shortened(image.crs or ""),
        "transform": "" if image.transform is None else ", ".join(f"{value:.10g}" for value in image.transform),
        "orientation": "" if image.orientation == 1 else f"{image.orientation} (EXIF; pixels are read as stored)",
        "regions": f"{rows} x {cols} = {rows * cols:,} of {region} px",
        "tokens": f"{rows * cols * side**2:,} of {TOKEN_PX} px",
    }
    return {name: value for name, value in facts.items() if value}


def model_facts(model: GigaXT) -> dict[str, str]:
    """What a model is made of, what it expects and what it answers."""
    config, encoder = model.config, model.encode.encoder
    of_regions, context, head, given = config.region_encoder, config.context, config.head, config.input
    side = encoder.tokens_per_side
    kind = getattr(head, "target", "")
    facts = {
        "region encoder": f"{of_regions.name}, regions of {of_regions.region} px, {side} x {side} tokens each",
        "context": context.kind
        if context.kind == "none"
        else f"{context.kind}, {context.depth} x {context.dim}, summary {context.summary}",
        "head": f"{head.kind}{f' ({kind})' if kind not in ('', 'single') else ''}",
        "classes": named(head.classes, head.class_names or ()),
        "bands": named(of_regions.in_channels, given.band_names or ()),
        "pixel size": _wanted_size(given),
        "mean": "" if given.mean is None else _numbers(given.mean),
        "std": "" if given.std is None else _numbers(given.std),
        "halo": f"{given.halo} px" if given.halo else "",
        "overview": ", ".join(f"1:{factor}" for factor in given.overview),
        "foreground": given.foreground or "",
        "parameters": " + ".join(
            f"{count / 1e6:.2f} M {name}" for name, count in _parameter_counts(model).items() if count
        ),
    }
    return {name: value for name, value in facts.items() if value}


def describe_size(image: Image) -> str:
    """Width and height, such as "10,980 x 10,980 px"."""
    return f"{image.width:,} x {image.height:,} px"


def unread_pages(image: Image) -> str:
    """How many pages the file of a stack has, and how many are read; empty where all are."""
    read, there = image.pages
    which = "the first is" if read == 1 else f"{read} are"
    return f"{there} of this size, of which {which} read" if there > read else ""


def file_size(path: Path) -> str:
    """Of a file or of all files in a folder, such as "12.3 MB"."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def named(count: int, names: Sequence[str]) -> str:
    """A number and the names that stand behind it, such as "3: red, green, blue"; without names that are numbers."""
    if not names or all(name.isdigit() for name in names):
        return str(count)
    more = ", ..." if len(names) > MANY else ""
    return f"{count}: {', '.join(names[:MANY])}{more}"


def _nodata(image: Image) -> str:
    value = "" if image.nodata is None else f"{image.nodata:g}"
    if image.nodata is None and not image.all_valid:
        return "by a mask"
    return value


def _pixel_size(image: Image) -> str:
    if image.gsd_m is not None:
        return "{:.6g} x {:.6g} m".format(*image.gsd_m)
    return "" if image.mpp is None else "{:.6g} x {:.6g} µm".format(*image.mpp)


def _wanted_size(given: InputConfig) -> str:
    if given.resize_px is not None:
        side = "on each side" if given.resize_side == "both" else f"on the {given.resize_side} side"
        return f"any; images are resized to {given.resize_px} px {side}"
    if given.gsd_m is not None:
        return f"{given.gsd_m:g} m; other images are resampled"
    return "any, as the image is" if given.mpp is None else f"{given.mpp:g} µm; other images are resampled"


def _parameter_counts(model: GigaXT) -> dict[str, int]:
    parts = {"encoder": model.encode, "context": model.context, "head": model.head}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."
