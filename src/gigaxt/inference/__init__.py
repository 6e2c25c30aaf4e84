"""Scene in, streamed result out: scores to CSV, masks and probabilities to tiled TIFF, objects to JSON and CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gigaxt.errors import ConfigError, DataError
from gigaxt.image import Image, open_image
from gigaxt.inference.found import write_found
from gigaxt.inference.masks import Probabilities, segment
from gigaxt.inference.parts import is_done, provenance_of
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

    The segmentation of a file can be interrupted, even by SIGKILL or a full disk: called again, it goes on from there.
    What is complete waits in `OUTPUT.parts` beside the output, and is used only if model, settings and file are the
    same. `OUTPUT.json` says what a complete output was made from; while all of that is unchanged, nothing is computed.

    Args:
        model: used in evaluation mode, on the device it is on; left in the mode it was in.
        source: file or Image; for a classifier also a list of them.
        output: what is written depends on the kind of the model's head.
            classify: CSV with the columns `image`, `prediction` and one a class (probabilities, or the numbers of a
            regression; of survival the risk as prediction, and the chance of the event in each bin of time). With
            `cases` a column `case` stands first, and `image` holds those of the case, separated by `|`.
            segment: a tiled pyramidal TIFF of class numbers, with the scene's CRS and transform or pixel size and the
            classes' colours. Pixels without data, and regions that the model's `foreground` leaves out, hold 255 as
            nodata (65535 from 256 classes on). Labels are bands of 0 and 1 (nodata 255), numbers bands of float32
            (nodata NaN).
            detect, mask_rcnn: by the suffix, GeoJSON or CSV of the objects that score the head's `threshold` or more
            (see `gigaxt.found.objects`), or COCO results (.json) of all.
            points: see `gigaxt.inference.points.write_points`; of any number of scenes.
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
        progress: called with (regions or images done, all).
        digest: `gigaxt.inference.parts.model_digest(model)` where it is known, which saves time with many scenes.

    Returns:
        The path written. Until the result is complete it has another name.

    Raises:
        ImageError: unreadable input, or output that cannot be written. DataError: an image that does not fit the model.
        ConfigError: settings out of range.
    """
    output = Path(output)
    sources = [source] if isinstance(source, str | Path | Image) else list(source)
    _check_settings(model, sources, cases, for_masks=overlap is not None or dihedral != 1 or bool(probabilities))
    kind = model.config.head.kind
    training = model.training
    model.eval()
    try:
        if kind == "points":
            write_points(output, model, sources, skipped=skipped, progress=progress)
        elif not model.dense:
            write_scores(output, model, sources, cases, skipped, progress)
        elif kind != "segment":
            write_found(output, model, open_image(sources[0], rgb=model.config.input.rgb), progress)
        else:
            settings = {"overlap": overlap, "dihedral": dihedral, "probabilities": probabilities}
            # Of an Image in memory, or a view of a file, nothing tells whether its pixels are those of last time.
            file = None if isinstance(sources[0], Image) else Path(sources[0])
            provenance = None if file is None else provenance_of(model, file, settings, digest=digest)
            if not is_done(output, provenance):
                image = open_image(sources[0], rgb=model.config.input.rgb)
                segment(
                    model,
                    image,
                    output,
                    provenance=provenance,
                    overlap=overlap,
                    dihedral=dihedral,
                    probabilities=probabilities,
                    progress=progress,
                )
        return output
    finally:
        model.train(training)


def _check_settings(
    model: GigaXT, sources: Sequence[str | Path | Image], cases: Sequence[str] | None, *, for_masks: bool
) -> None:
    """Refuse what does not go with the kind of the model's head; `for_masks`: a setting of masks was given."""
    kind = model.config.head.kind
    if not sources:
        raise DataError("predict: expected at least one image, got none")
    if cases is not None and model.dense:
        raise ConfigError("predict: `cases` are for models that classify")
    if cases is not None and len(cases) != len(sources):
        raise ConfigError(f"predict: expected a case for each of {len(sources)} images, got {len(cases)}")
    if kind in ("detect", "mask_rcnn", "segment") and len(sources) > 1:
        raise ConfigError(f"predict: such a model writes one file a scene, got {len(sources)}: loop over them")
    if kind != "segment" and for_masks:
        raise ConfigError("predict: `overlap`, `dihedral` and `probabilities` are for models that segment")
