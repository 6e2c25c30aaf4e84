"""What a segmentation model answers for a scene, and on request its probabilities, as tiled pyramidal TIFF."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from torch import Tensor

from gigaxt.amounts import GIB
from gigaxt.errors import ConfigError, ImageError
from gigaxt.image import Image, open_image
from gigaxt.image.base import Mask, Pixels
from gigaxt.image.writer import TiffWriter
from gigaxt.inference.parts import PARTS, Parts, Provenance, record_path, write_record
from gigaxt.inference.scene_pass import ScenePass
from gigaxt.inference.stitching import Stitcher
from gigaxt.nn.heads import SegmentConfig
from gigaxt.pixel_answers import answer_raster, as_probabilities, names_of
from gigaxt.streaming.rows import at_least_float32

if TYPE_CHECKING:
    from gigaxt.nn.xt import GigaXT

Progress = Callable[[int, int], None]
"""Called with (regions and windows done, all)."""
Probabilities = Literal["uint8", "float16", "float32"]

STEPS = 254
"""What a probability of one is in uint8; 255 is nodata."""
STRIP_TILE = 256
"""Px on a side of the tiles of strips."""
COLUMNS = 4096
"""Px of a strip that are copied into the result at once."""
COMPRESSED_MASK, COMPRESSED_NUMBERS = 0.1, 0.9
COMPRESSED_PROBABILITIES = {"uint8": 0.5, "float16": 0.9, "float32": 0.9}
"""Bytes after compression as a share of those before, with which the disk is checked: a guess on the careful side."""


@dataclass(frozen=True)
class Raster:
    """One of the rasters that a scene becomes."""

    path: Path
    strips: str
    """What its strips are called among the parts."""
    options: dict[str, Any]
    """Of the TiffWriter."""
    encode: Callable[[Tensor, Mask], Pixels]
    """Probabilities or numbers (outputs, h, w) and validity (h, w) to pixels (h, w, bands)."""
    compressed: float
    """Guess of its bytes after compression as a share of those before."""

    @property
    def pixel_bytes(self) -> int:
        """Of a pixel, all bands, not compressed."""
        bands: int = self.options.get("channels", 1)
        return bands * int(np.dtype(self.options["dtype"]).itemsize)

    def strip(self, row: int) -> str:
        """The name of a strip."""
        return f"{self.strips}-{row:06d}.tif"


def segment(
    model: GigaXT,
    image: Image,
    output: Path,
    *,
    provenance: Provenance | None,
    overlap: int | None = None,
    dihedral: int = 1,
    probabilities: Probabilities | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the answers for a scene, and on request the probabilities. See `gigaxt.predict`.

    Strips as high as a row of windows are kept in a folder beside the output until all are there; then they are put
    together.

    Returns:
        The files written.
    """
    scene = ScenePass(model, image, overlap=overlap, dihedral=dihedral)
    head = cast(SegmentConfig, model.config.head)
    rasters = _rasters(head, output, probabilities)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, scene.work)

    with Parts(output, image.name, provenance) as parts, _telling_what_is_left(output, parts):
        _check_disk(scene, rasters, parts)
        missing = [row for row in range(len(scene.windows.ys)) if not _kept(parts, rasters, scene, row)]
        if missing:
            scene.find_context(parts, tick)
            _write_strips(scene, rasters, parts, missing, tick)
        for raster in rasters:
            _put_together(scene, raster, parts)
        if provenance is not None:
            write_record(output, [raster.path for raster in rasters], provenance)
    return [raster.path for raster in rasters]


def probabilities_path(output: Path) -> Path:
    """Where the probabilities go whose classes are written to `output`."""
    return output.with_name(f"{output.stem}_probabilities{output.suffix}")


def outputs_of(output: Path, probabilities: Probabilities | None) -> list[Path]:
    """All files that the prediction of one scene leaves."""
    rasters = [output, probabilities_path(output)] if probabilities else [output]
    return [*rasters, record_path(output)]


def is_output_error(error: Exception, output: Path) -> bool:
    """Whether an error is about what is written, not about what is read."""
    written = [str(path) for path in (output, probabilities_path(output), record_path(output))]
    folder = f"{output}{PARTS}"
    return isinstance(error, ImageError) and (
        error.path in written or error.path.removesuffix(".part") in written or error.path.startswith(folder)
    )


@contextmanager
def _telling_what_is_left(output: Path, parts: Parts) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        if parts.provenance is None or not parts.names() or not is_output_error(error, output):
            raise
        left = f"{error.cause}; what is complete waits in {parts.folder}: repeat the command to go on from there"
        raise ImageError(error.path, left, error.place) from error


def _rasters(head: SegmentConfig, output: Path, probabilities: Probabilities | None) -> list[Raster]:
    answer = answer_raster(head)
    compressed = COMPRESSED_NUMBERS if head.target == "regression" else COMPRESSED_MASK
    rasters = [Raster(output, "answers", answer.options, answer.encode, compressed)]
    if probabilities is None:
        return rasters
    if probabilities not in COMPRESSED_PROBABILITIES:
        raise ConfigError(f"probabilities: expected {', '.join(COMPRESSED_PROBABILITIES)}, got {probabilities!r}")
    if head.target == "regression":
        raise ConfigError("probabilities: the model answers numbers, which have none; leave the setting out")
    whole = probabilities == "uint8"
    nothing = 255 if whole else np.nan

    def encode(found: Tensor, valid: Mask) -> Pixels:
        values = found.permute(1, 2, 0).clamp(0, 1)  # (classes, h, w) -> (h, w, classes)
        pixels: Pixels = ((values * STEPS).round() if whole else values).numpy().astype(probabilities)
        pixels[~valid] = nothing
        return pixels

    compressed = COMPRESSED_PROBABILITIES[probabilities]
    options = {
        "channels": head.classes,
        "dtype": probabilities,
        "nodata": nothing,
        "band_names": names_of(head),
        "scale": 1 / STEPS if whole else None,
    }
    return [*rasters, Raster(probabilities_path(output), "probabilities", options, encode, compressed)]


def _kept(parts: Parts, rasters: Sequence[Raster], scene: ScenePass, row: int) -> bool:
    """Whether all strips of a row are among the parts."""
    size = _strip_height(scene, row), scene.image.width
    try:
        strips = [open_image(parts.path(raster.strip(row)), cached=False) for raster in rasters]
    except ImageError:
        return False
    return all((strip.height, strip.width) == size for strip in strips)


def _strip_height(scene: ScenePass, row: int) -> int:
    edges = [*scene.windows.ys.tolist(), scene.image.height]
    return int(edges[row + 1] - edges[row])


def _write_strips(
    scene: ScenePass, rasters: Sequence[Raster], parts: Parts, missing: Sequence[int], tick: Callable[[int], None]
) -> None:
    """The second pass: strips of the rows that are missing."""
    model, windows = scene.model, scene.windows
    head = cast(SegmentConfig, model.config.head)
    rows = sorted({reached for row in missing for reached in windows.rows_reaching(row)})
    there = windows.needed.sum(axis=1)
    tick(int(there.sum() - there[rows].sum()) * len(scene.turns))
    dtype = at_least_float32(next(model.parameters()).dtype)

    def to_map(answers: tuple[Tensor, ...]) -> Tensor:
        return as_probabilities(head, answers[0].to(dtype))

    stitcher = Stitcher(windows, head.classes, dtype=dtype)
    blocks = stitcher.blocks(rows, scene.answers(parts, rows, to_map, tick))
    for row, of_row in groupby(blocks, key=lambda block: block.row):
        if row not in missing:  # computed for what it adds to the next ones
            continue
        with ExitStack() as stack:
            writers = [stack.enter_context(_strip_writer(parts, raster, scene, row)) for raster in rasters]
            for block in of_row:
                for raster, writer in zip(rasters, writers, strict=True):
                    h, w = block.valid.shape
                    if block.maps is None:
                        writer.leave_out(block.x, 0, w, h)
                    else:
                        writer.write(block.x, 0, raster.encode(block.maps, block.valid))


def _strip_writer(parts: Parts, raster: Raster, scene: ScenePass, row: int) -> TiffWriter:
    height = _strip_height(scene, row)
    path, width = parts.path(raster.strip(row)), scene.image.width
    # Without overviews, names and colours, which the result gets.
    options = {name: value for name, value in raster.options.items() if name not in ("colormap", "band_names", "scale")}
    return TiffWriter(path, height, width, tile=STRIP_TILE, compression="zstd", levels=False, **options)


def _put_together(scene: ScenePass, raster: Raster, parts: Parts) -> None:
    """Copy all strips into the result, from top to bottom."""
    image = scene.image
    with TiffWriter(raster.path, image.height, image.width, like=image, **raster.options) as writer:
        for row, y in enumerate(scene.windows.ys.tolist()):
            strip = open_image(parts.path(raster.strip(row)), cached=False)
            for x in range(0, strip.width, COLUMNS):
                writer.write(x, y, strip.read(x, 0, min(COLUMNS, strip.width - x), strip.height))


def _check_disk(scene: ScenePass, rasters: Sequence[Raster], parts: Parts) -> None:
    """Refuse before the work what would fill the disk, as far as can be guessed.

    Raises:
        ImageError: too little is free.
    """
    pixels = scene.image.height * scene.image.width
    size = sum(pixels * raster.pixel_bytes * raster.compressed for raster in rasters)
    needed = int(scene.context_bytes + size * (1 + 4 / 3))  # the strips, and the result with its overviews
    there = sum(parts.path(name).stat().st_size for name in parts.names())
    free = shutil.disk_usage(parts.folder).free
    if needed - there > free:
        raise ImageError(
            parts.output,
            f"about {needed / GIB:.2g} GiB are needed in {parts.output.parent} while it is made, and"
            f" {free / GIB:.2g} GiB are free: free some space, write elsewhere"
            + ("" if len(rasters) == 1 else ", or leave out the probabilities"),
        )
