"""Scene in, streamed result out: scores to CSV, masks and probabilities to tiled TIFF, objects to JSON and CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gigaxt.errors import ConfigError, DataError
from gigaxt.image import Image, open_image
from gigaxt.inference.found import write_found
from gigaxt.inference.masks import Probabilities, segment
from gigaxt.inference.parts import is_done, make_plan
from gigaxt.inference.points import write_points
from gigaxt.inference.scores import class_names, scores, write_scores
from gigaxt.nn.xt import GigaXT

__all__ = ["class_names", "predict", "scores"]

Progress = Callable[[int, int], None]
"""Called with (regions or images done, all)."""


def predict(
    model: GigaXT,
    source: str | Path | Image | Sequence[str | Path | Image],
    output: str | Path,
    *,
    cases: Sequence[str] | None = None,
    overlap: int | None = None,
    dihedral: int = 1,
    probabilities: Probabilities | None = None,
    skipped: dict[str, str] | None = None,
    progress: Progress | None = None,
    digest: str | None = None,
) -> Path:
    """Answer for one scene, or class scores for several.

    A segmentation of a file that was interrupted, even by SIGKILL or a full disk, goes on where it stood when it is
    asked for again: what is complete waits in `OUTPUT.parts` beside the output, and is used only with the same model,
    settings and unchanged file. `OUTPUT.json` says what a complete output was made from; while that is unchanged, too,
    nothing is computed again.

    Args:
        model: used in evaluation mode, on the device it is on; left in the mode it was in.
        source: file or Image; for a classifier also a list of them.
        output: a classifier writes CSV (columns `image`, `prediction`, one a class: probabilities, or numbers of a
            regression; of survival the risk as prediction, and the chance of the event in each bin of time). With
            `cases` a column `case` stands first, and `image` holds those of the case, separated by `|`. A segmentation
            model writes a tiled pyramidal TIFF of class numbers, with the scene's CRS and
            transform or pixel size and the classes' colours; pixels without data, and regions that the model's
            `foreground` leaves out, hold 255 as nodata (65535 from 256 classes on). Labels are bands of 0 and 1 (nodata
            255), numbers bands of float32 (nodata NaN). A detection model writes the objects that score `threshold` of
            its head or more as GeoJSON or CSV (see `gigaxt.found.objects`), or all as COCO results (.json), by the
            suffix.
            A model that finds points writes what `gigaxt.inference.points.write_points` says, of any number of scenes.
        cases: of a classifier: which case each of the sources belongs to; one answer for all images of a case. Empty:
            the image is its own.
        overlap: of a segmentation: px by which the windows that are decoded overlap, against seams. Their probabilities
            are averaged with weights that fall to nothing at a window's border. A multiple of what a token covers;
            None: a quarter of a window, nothing where the model has a halo; 0: each pixel is decoded once.
        dihedral: of a segmentation: average the probabilities of 4 (quarter turns) or 8 (mirrored, too) turned scenes.
        probabilities: of a segmentation: also write NAME_probabilities.tif, a band for each class or label: as uint8 (0
            to 254 for 0 to 1, which the file's scale says, nodata 255), float16 or float32 (nodata NaN).
        skipped: images of a list that cannot be read or do not fit the model are left out of the CSV, with their case,
            and added here (name -> reason); None: the first one ends it.
        progress: told how far it is.
        digest: `gigaxt.inference.parts.model_digest(model)` where it is known, which saves time with many scenes.

    Returns:
        The path written. Until the result is complete it has another name.

    Raises:
        ImageError: unreadable input, or output that cannot be written. DataError: an image that does not fit the model.
        ConfigError: settings out of range.
    """
    output = Path(output)
    sources = [source] if isinstance(source, str | Path | Image) else list(source)
    if not sources:
        raise DataError("predict: expected at least one image, got none")
    if cases is not None and (model.dense or len(cases) != len(sources)):
        raise ConfigError(
            "predict: `cases` are for models that classify"
            if model.dense
            else f"predict: expected a case for each of {len(sources)} images, got {len(cases)}"
        )
    kind = model.config.head.kind
    if kind in ("detect", "mask_rcnn", "segment") and len(sources) > 1:
        raise ConfigError(f"predict: such a model writes one file a scene, got {len(sources)}: loop over them")
    if kind != "segment" and (overlap is not None or dihedral != 1 or probabilities):
        raise ConfigError("predict: `overlap`, `dihedral` and `probabilities` are for models that segment")
    training = model.training
    model.eval()
    try:
        if kind == "points":
            write_points(output, model, sources, skipped=skipped, progress=progress)
            return output
        if not model.dense:
            return write_scores(output, model, sources, cases, skipped, progress)
        if kind in ("detect", "mask_rcnn"):
            return write_found(output, model, open_image(sources[0], rgb=model.config.input.rgb), progress)
        settings = {"overlap": overlap, "dihedral": dihedral, "probabilities": probabilities}
        # Of an Image in memory, or a view of a file, nothing tells whether its pixels are those of last time.
        plan = None if isinstance(sources[0], Image) else make_plan(model, Path(sources[0]), settings, digest=digest)
        if not is_done(output, plan):
            image = open_image(sources[0], rgb=model.config.input.rgb)
            segment(
                model,
                image,
                output,
                plan=plan,
                overlap=overlap,
                dihedral=dihedral,
                probabilities=probabilities,
                progress=progress,
            )
        return output
    finally:
        model.train(training)
