"""`gigaxt check`: look at every file of a manifest before hours of training are spent on it.

Bounded in time and memory: each image is opened and a few windows of it are read, not the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gigaxt.datasets.box_facts import count_boxes, draw_boxes
from gigaxt.datasets.boxes import BoxClasses, box_classes
from gigaxt.datasets.instances import count_masks
from gigaxt.datasets.labels import Target
from gigaxt.datasets.manifest import Manifest, absence
from gigaxt.datasets.mask_facts import MaskFacts, look_at_mask, mask_head
from gigaxt.datasets.point_facts import count_points, draw_points, suggested_head
from gigaxt.datasets.report import CheckReport, ImageFacts, Problem, shared_bands
from gigaxt.datasets.row import Row, Task
from gigaxt.datasets.run_config import write_config
from gigaxt.datasets.statistics import WINDOW, BandStatistics, spread_windows
from gigaxt.errors import ConfigError, DataError, GigaxtError
from gigaxt.image.base import Image
from gigaxt.nn.heads.points import PointsConfig
from gigaxt.nn.heads.segment_config import SegmentConfig
from gigaxt.pixel_answers import with_mask
from gigaxt.targets.masks import open_mask

if TYPE_CHECKING:
    from gigaxt.draw import Picture
    from gigaxt.scenes.foreground import Foreground

__all__ = ["CheckReport", "check_manifest", "write_config"]

WINDOWS_IN_ALL = 4096
"""Windows for band statistics, shared by all images; each gets 2 to 16."""
MASK_PIXELS_IN_ALL = 1 << 31
"""Mask pixels that are counted, shared by all masks; each gets 4 to 64 megapixels."""


def check_manifest(
    csv: str | Path,
    *,
    task: Task | None = None,
    target: Target | None = None,
    label_columns: Sequence[str] | None = None,
    class_field: str | None = None,
    foreground: str | None = None,
    overlay_folder: str | Path | None = None,
    max_overlays: int = 32,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read a manifest, open all that it names, and say what is there and what is wrong.

    Args:
        csv: the manifest.
        task: which column counts where the CSV has several of `label`, `mask` and `boxes`.
        target: what labels are; see `Manifest.read`. None: what the columns suggest.
        label_columns: columns of labels in place of `label`; see `Manifest.read`.
        class_field: of masks that are vector files: the property with each polygon's class.
        foreground: `tissue`, or the path of a raster or of polygons: what of the images is worth encoding. Band
            statistics are then taken there alone.
        overlay_folder: gets a PNG of the first images: their mask or boxes in class colours, their foreground framed.
        max_overlays: how many pictures to draw at most.
        workers: threads.
        progress: called with (images done, images in all).

    Raises:
        DataError: the CSV itself does not fit. What is wrong with the files it names is in the report.
    """
    manifest = Manifest.read(csv, task=task, target=target, label_columns=label_columns)
    missing = [Problem(row.line, path, absence(path)) for row, path in manifest.missing_files()]
    gone = {problem.line for problem in missing}
    rows = list(
        {(row.image, row.target_path): row for row in reversed(manifest.rows) if row.line not in gone}.values()
    )[::-1]
    head = mask_head(rows, target, class_field) if manifest.task == "segmentation" else None
    if head is not None:
        manifest = replace(manifest, target=head.target)
    classes = box_classes(manifest) if manifest.task == "detection" and not missing else None
    points = suggested_head(rows) if manifest.task == "points" and not missing else None
    looker = _Looker(
        manifest=manifest,
        head=head,
        classes=classes,
        points=points,
        windows=int(np.clip(WINDOWS_IN_ALL // max(len(rows), 1), 2, 16)),
        mask_pixels=int(np.clip(MASK_PIXELS_IN_ALL // max(len(rows), 1), 1 << 22, 1 << 26)),
        foreground=_foreground(foreground),
        overlay_folder=None if overlay_folder is None else Path(overlay_folder),
        drawn_lines={row.line for row in rows[:max_overlays]},
    )
    findings: dict[int, _Finding] = {}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        jobs = {pool.submit(looker.look, row): row.line for row in rows}
        for done, job in enumerate(as_completed(jobs), start=1):
            findings[jobs[job]] = job.result()
            if progress is not None:
                progress(done, len(rows))
    return _report(manifest, head, classes, points, missing, [findings[line] for line in sorted(findings)], foreground)


@dataclass
class _Finding:
    """What one row's files turned out to be."""

    facts: ImageFacts | None = None
    statistics: BandStatistics | None = None
    mask: MaskFacts = field(default_factory=MaskFacts)
    objects: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    """Of objects with boxes."""
    unreadable: list[Problem] = field(default_factory=list)
    mismatched: list[Problem] = field(default_factory=list)
    empty: list[Problem] = field(default_factory=list)
    overlay: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Looker:
    """Looks at one row's files; safe in several threads."""

    manifest: Manifest
    head: SegmentConfig | None
    """What the masks are for."""
    classes: BoxClasses | None
    """Of boxes; None: of another task."""
    points: PointsConfig | None
    """What the points are for."""
    windows: int
    mask_pixels: int
    foreground: Foreground | None
    overlay_folder: Path | None
    drawn_lines: set[int]

    def look(self, row: Row) -> _Finding:
        finding = _Finding()
        image = self._open(row, row.image, finding)
        mask = None if image is None else self._mask(row, image, finding)
        try:
            self.manifest.verify(row)
        except GigaxtError as error:
            cause = str(error).removeprefix(f"{self.manifest.path} line {row.line}: {row.image}")
            finding.unreadable.append(Problem(row.line, row.image, cause.lstrip(": ")))
        if image is not None:
            self._look_at_image(row, image, mask, finding)
        if image is not None and row.target_path is not None:
            try:
                if self.classes is not None:
                    finding.objects = count_boxes(row, image, self.classes)
                    finding.masks = count_masks(row, image)
                if self.points is not None:
                    finding.objects = count_points(self.manifest, row, image, self.points)
            except GigaxtError as error:
                cause = str(error).removeprefix(str(row.target_path)).lstrip(": ")
                finding.mismatched.append(Problem(row.line, row.target_path, cause))
        return finding

    def _open(self, row: Row, path: Path, finding: _Finding) -> Image | None:
        from gigaxt.image import open_image

        try:
            image: Image = open_image(path)
            return image
        except (GigaxtError, OSError) as error:
            finding.unreadable.append(Problem(row.line, path, _cause(error)))
            return None

    def _mask(self, row: Row, image: Image, finding: _Finding) -> Image | None:
        """The row's mask on the grid of its image, looked at; None where it has none or it does not fit."""
        if row.target_path is None or self.head is None:
            return None
        try:
            mask = open_mask(row.target_path, image, self.head, aoi=row.aoi)
            finding.mask = look_at_mask(mask, self.head, self.mask_pixels)
        except DataError as error:
            cause = str(error).removeprefix(f"{row.target_path}: ")
            finding.mismatched.append(Problem(row.line, row.target_path, cause))
        except (GigaxtError, OSError) as error:
            finding.unreadable.append(Problem(row.line, row.target_path, _cause(error)))
        else:
            return mask
        return None

    def _look_at_image(self, row: Row, image: Image, mask: Image | None, finding: _Finding) -> None:
        statistics = BandStatistics(image.channels)
        try:
            keep = None if self.foreground is None else self.foreground.keep(image, WINDOW)
            for x, y, w, h in spread_windows(image.height, image.width, self.windows, keep):
                statistics.add(*image.read_valid(x, y, w, h), nodata=image.nodata)
            picture = self._picture(row, image, mask, keep, finding)
        except DataError as error:  # no foreground, or one that does not fit
            finding.empty.append(Problem(row.line, row.image, str(error).removeprefix(f"{image.name}: ")))
            return
        except (GigaxtError, OSError) as error:
            finding.unreadable.append(Problem(row.line, row.image, _cause(error)))
            return
        finding.facts = _facts(row, image, keep)
        finding.statistics = statistics
        if not statistics.count.any():
            finding.empty.append(Problem(row.line, row.image, "no valid pixel in what was read"))
        if picture is not None and self.overlay_folder is not None:
            finding.overlay = _saved(picture, self.overlay_folder, row)

    def _picture(
        self, row: Row, image: Image, mask: Image | None, keep: NDArray[np.bool_] | None, finding: _Finding
    ) -> Picture | None:
        from gigaxt import draw

        if self.overlay_folder is None or row.line not in self.drawn_lines:
            return None
        picture = draw.thumbnail(image)
        if keep is not None:
            picture = draw.outline_regions(picture, keep, WINDOW * picture.shape[1] / image.width)
        if mask is not None and self.head is not None:
            picture = with_mask(picture, mask, _shown(self.head, finding.mask))
        with suppress(GigaxtError):  # told where the objects are counted
            if self.classes is not None:
                picture = draw_boxes(picture, row, image, self.classes)
            if self.points is not None:
                picture = draw_points(picture, self.manifest, row, image, self.points)
        return picture


def _saved(picture: Picture, folder: Path, row: Row) -> Path:
    """Where a row's picture was written to: a disk that is full is no fault of the image."""
    from gigaxt import draw

    stem = row.image.stem.encode()[:200].decode(errors="ignore")  # names of files may have 255 bytes
    path = folder / f"line{row.line:05d}_{stem}.png"
    try:
        return draw.save_png(picture, path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(
            f"{path}: cannot write the picture: {error.strerror or error}; free some space or choose another folder"
        ) from error


def _shown(head: SegmentConfig, facts: MaskFacts) -> SegmentConfig:
    """The head as a mask is drawn by: with all classes that it holds, or the spread of its numbers."""
    if head.target == "single":
        from gigaxt.draw import NOT_A_CLASS

        highest = max((value for value in facts.pixels if value < NOT_A_CLASS), default=0)
        return replace(head, classes=max(head.classes, highest + 1), ignore=-1)
    numbers = facts.numbers
    if head.target == "multi" or numbers is None or not numbers.count.all():
        return head
    std = np.where(numbers.std > 0, numbers.std, 1.0)
    return replace(head, target_mean=numbers.mean.tolist(), target_std=std.tolist())


def _foreground(spec: str | None) -> Foreground | None:
    if spec is None:
        return None
    from gigaxt.scenes.foreground import Foreground

    return Foreground.from_spec(spec)


def _facts(row: Row, image: Image, keep: NDArray[np.bool_] | None) -> ImageFacts:
    return ImageFacts(
        line=row.line,
        path=row.image,
        height=image.height,
        width=image.width,
        channels=image.channels,
        dtype=image.dtype.name,
        levels=len(image.levels),
        mpp=image.mpp,
        gsd_m=image.gsd_m,
        band_names=image.band_names,
        has_palette=getattr(image, "has_palette", False),
        is_stack=image.pages[1] > image.pages[0],
        kept=None if keep is None else float(keep.mean()),
    )


def _cause(error: Exception) -> str:
    """The message without the path, which the report prints itself."""
    place = getattr(error, "place", "")
    cause = getattr(error, "cause", None) or getattr(error, "strerror", None) or str(error)
    return f"{cause} ({place})" if place else str(cause)


def _report(
    manifest: Manifest,
    head: SegmentConfig | None,
    classes: BoxClasses | None,
    points: PointsConfig | None,
    missing: list[Problem],
    findings: list[_Finding],
    foreground: str | None,
) -> CheckReport:
    facts = [finding.facts for finding in findings if finding.facts is not None]
    shared = shared_bands(facts)
    bands = Counter(fact.channels for fact in facts).most_common(1)
    statistics = BandStatistics(len(shared) or bands[0][0]) if bands else None
    for finding in findings:
        part = finding.statistics
        if shared and part is not None and finding.facts is not None:
            part = part.select([finding.facts.band_names.index(name) for name in shared])
        if statistics is not None and part is not None and len(part.count) == len(statistics.count):
            statistics.merge(part)
    return CheckReport(
        manifest=manifest,
        images=facts,
        missing=missing,
        unreadable=[problem for finding in findings for problem in finding.unreadable],
        mismatched=[problem for finding in findings for problem in finding.mismatched],
        empty=[problem for finding in findings for problem in finding.empty],
        statistics=statistics,
        head=head,
        mask=MaskFacts.of_all([finding.mask for finding in findings]),
        objects=dict(sorted(sum((finding.objects for finding in findings), Counter[str]()).items())),
        object_masks=sum((finding.masks for finding in findings), Counter()),
        box_classes=classes,
        point_head=points,
        foreground=foreground,
        overlays=[finding.overlay for finding in findings if finding.overlay is not None],
    )
