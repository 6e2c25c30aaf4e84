"""`gigaxt convert`: a tiled TIFF pyramid of any image, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gigaxt.cli.flags import parse
from gigaxt.errors import ImageError


@dataclass(kw_only=True)
class ConvertArguments:
    """Make a tiled TIFF pyramid of an image, in bounded memory.

    gigaxt convert scene.png scene.tif
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """Any image that can be read, and PNG or JPEG of any size."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The TIFF to make; an older one is replaced once the new one is complete."""
    tile: int = 512
    """Side of a tile, px; a multiple of 16."""
    compression: Literal["deflate", "zstd", "jpeg", "none"] = "deflate"
    """deflate: nothing is lost, opens everywhere; zstd: the same, smaller and faster, newer programs only; jpeg: small,
    changes pixels (quality 90, uint8 with 1 or 3 bands)."""
    nodata: float | None = None
    """Value of pixels that hold nothing; None: as the source says."""
    max_memory_gib: float = 1.0
    """Refuse rather than use more memory."""


def main(args: Sequence[str]) -> int:
    """Convert one image; exit status 0."""
    arguments = parse(ConvertArguments, args, verb="convert")

    from gigaxt.cli.info import describe_size, file_size, unread_pages
    from gigaxt.cli.progress import Steps, clock_text
    from gigaxt.image import open_image
    from gigaxt.image.convert import convert_image

    with Steps(arguments.target.name, "rows") as steps:
        convert_image(
            arguments.source,
            arguments.target,
            tile=arguments.tile,
            compression=None if arguments.compression == "none" else arguments.compression,
            nodata=arguments.nodata,
            max_memory_gib=arguments.max_memory_gib,
            progress=steps,
        )
        seconds = clock_text(steps.seconds)
    image = open_image(arguments.target)
    levels = f"{len(image.levels)} levels" if len(image.levels) > 1 else "1 level"
    print(f"{arguments.target}: {describe_size(image)}, {levels}, {file_size(arguments.target)}, in {seconds}")
    with suppress(ImageError):  # PNG and JPEG that are too large to be read by window
        if left_out := unread_pages(open_image(arguments.source)):
            print(f"{arguments.source}: pages: {left_out}")
    return 0
