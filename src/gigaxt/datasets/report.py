"""What `gigaxt check` found, as data, as plain lines and as advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.amounts import amount
from gigaxt.datasets.boxes import BoxClasses
from gigaxt.datasets.instances import FITS, NO_MASK
from gigaxt.datasets.labels import LABEL, class_name_advice
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.mask_facts import UNLABELLED, MaskFacts, mask_advice, numbers_line, shares
from gigaxt.datasets.row import Case, Row
from gigaxt.datasets.split import SPLITS
from gigaxt.datasets.statistics import BandStatistics
from gigaxt.image.open import PICTURE_SUFFIXES
from gigaxt.nn.heads.points import PointsConfig
from gigaxt.nn.heads.segment_config import SegmentConfig

LISTED = 20
"""Problems and classes that are listed one by one; the rest are counted."""


class Problem(NamedTuple):
    """Something wrong with a file."""

    line: int
    """Of the CSV."""
    path: Path
    cause: str


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What an image says of itself."""

    line: int
    path: Path
    height: int
    width: int
    channels: int
    dtype: str
    levels: int
    mpp: tuple[float, float] | None
    """Micrometres per pixel as (x, y)."""
    gsd_m: tuple[float, float] | None
    """Metres per pixel as (x, y)."""
    band_names: tuple[str, ...]
    has_palette: bool
    """Its pixels are indices of colours."""
    is_stack: bool
    """Its file has more pages of its size than are read."""
    kept: float | None
    """Share of regions that the foreground keeps; None without one."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found in a manifest and in the files that it names."""

    manifest: Manifest
    images: list[ImageFacts]
    """Of images that could be opened and read, in the order of the CSV."""
    missing: list[Problem]
    unreadable: list[Problem]
    mismatched: list[Problem]
    """Masks of another size than their image, or that are no masks; boxes that do not fit."""
    empty: list[Problem]
    """Images without a valid pixel in what was read, or without foreground."""
    statistics: BandStatistics | None
    """Of `bands`, or of the images with the most common number of bands; None where no image could be read."""
    head: SegmentConfig | None
    """What the masks suggest; None where there are none."""
    mask: MaskFacts
    """What they hold."""
    objects: dict[str, int]
    """Boxes or points of each class, and those that are not learnt, see `gigaxt.datasets.box_facts`, `.point_facts`."""
    object_masks: Counter[str]
    """Objects with boxes by what is to be said of their masks, see `gigaxt.datasets.instances.count_masks`."""
    box_classes: BoxClasses | None
    """Of boxes; None: of another task, or where files are missing."""
    point_head: PointsConfig | None
    """What the points suggest; None: of another task, or where files are missing."""
    foreground: str | None
    overlays: list[Path]

    @property
    def ok(self) -> bool:
        """Whether training could start: nothing missing, unreadable or mismatched."""
        return not (self.missing or self.unreadable or self.mismatched)

    @property
    def bands(self) -> tuple[str, ...]:
        """What a model of these images takes by name; empty where they do not name their bands."""
        return shared_bands(self.images)

    @property
    def mask_classes(self) -> int:
        """How many classes a segmentation head needs: the highest value but `UNLABELLED`, and one; at least 2."""
        suggested = 2 if self.head is None else self.head.classes
        if self.head is not None and self.head.target != "single":
            return suggested
        return max([suggested, *(value + 1 for value in self.mask.pixels if value != UNLABELLED)])

    @property
    def channels(self) -> int:
        """How many `bands`, or the most common number of bands; 0 without images."""
        return 0 if self.statistics is None else len(self.statistics.count)

    @property
    def rgb_helps(self) -> bool:
        """Whether all images that are not RGB are pictures that can be read so (see `InputConfig.rgb`)."""
        others = [fact.path for fact in self.images if fact.channels != 3]
        return 0 < len(others) < len(self.images) and all(path.suffix.lower() in PICTURE_SUFFIXES for path in others)

    def pixel_size(self, unit: str) -> float | None:
        """The median pixel size where every image has one and pixels are square within 2%.

        Args:
            unit: `mpp` (micrometres) or `gsd_m` (metres).
        """
        pairs = [getattr(fact, unit) for fact in self.images]
        if not pairs or any(pair is None or abs(pair[0] / pair[1] - 1) > 0.02 for pair in pairs):
            return None
        return float(f"{median((x + y) / 2 for x, y in pairs):.4g}")

    def lines(self) -> list[str]:
        """The report as plain text, one line each."""
        manifest = self.manifest
        kind = manifest.task if manifest.target == "single" else f"{manifest.task}, {manifest.target}"
        lines = [f"{manifest.path}: {amount(len(manifest.rows), 'row')}, {kind}"]
        lines += _count_lines(manifest)
        lines += self._image_lines()
        lines += self._mask_lines()
        lines += self._object_lines()
        for title, problems in self._problems():
            lines.append(f"{title}: {len(problems) or 'none'}")
            lines += [f"  line {p.line}: {p.path}: {p.cause}" for p in problems[:LISTED]] + _more(len(problems))
        if self.overlays:
            lines.append(f"pictures: {len(self.overlays)} in {self.overlays[0].parent}")
        advice = self.proposals()
        if advice:
            lines.append("what to do:")
            lines += [f"  - {text}" for text in advice]
        return lines

    def proposals(self) -> list[str]:
        """What to change before training, one sentence each."""
        files, images = self._file_proposals(), self._image_proposals()
        masks = [] if self.head is None else mask_advice(self.head, self.mask, self.manifest.rows)
        return [*files, *_row_proposals(self.manifest), *_class_proposals(self.manifest), *images, *masks]

    def _problems(self) -> list[tuple[str, list[Problem]]]:
        problems = [
            ("missing", self.missing),
            ("unreadable", self.unreadable),
            ("without valid pixels or foreground", self.empty),
        ]
        if not (self.mask.known or self.mismatched):
            return problems
        what = {"detection": "boxes", "points": "points"}.get(self.manifest.task, "masks")
        return [*problems, (f"{what} that do not fit", self.mismatched)]

    def _object_lines(self) -> list[str]:
        if self.box_classes is None and self.point_head is None:
            return []
        what = "boxes" if self.point_head is None else "points"
        found = [f"  {count:>7}  {name}" for name, count in self.objects.items()]
        masks = [f"  {count:>7}  {state}" for state, count in sorted(self.object_masks.items()) if self._have_masks]
        lines = [f"{what}: {sum(self.objects.values()):,}", *found[:LISTED], *_more(len(found))]
        return [*lines, "masks of objects:", *masks] if masks else lines

    @property
    def _have_masks(self) -> bool:
        return any(state != NO_MASK for state in self.object_masks)

    def _mask_lines(self) -> list[str]:
        facts, head = self.mask, self.head
        note = " (sampled: rarer values may exist)" if facts.sampled else ""
        if facts.numbers is not None:
            return [f"numbers of the rasters{note}:", *numbers_line(facts.numbers)]
        if not facts.pixels or head is None:
            return []
        names = dict(enumerate(head.class_names or ()))
        if head.target == "single":
            names[head.ignore] = "(not labelled)"
        found = [
            f"  {value:>5}  {share:8.3%}  {names.get(value, '')}".rstrip() for value, share in shares(facts).items()
        ]
        what = "labels" if head.target == "multi" else "mask values"
        return [f"{what}{note}:", *found[:LISTED], *_more(len(found))]

    def _image_lines(self) -> list[str]:
        facts = self.images
        if not facts:
            return ["images: none could be read"]
        lines = ["images:"]
        for name, values in (("height", [fact.height for fact in facts]), ("width", [fact.width for fact in facts])):
            lines.append(f"  {name:<6} {min(values)} / {median(values):.0f} / {max(values)} px (min / median / max)")
        lines.append(f"  bands  {_tally(fact.channels for fact in facts)}")
        lines.append(f"  dtype  {_tally(fact.dtype for fact in facts)}")
        for name, unit, pairs in (
            ("mpp", "µm", [fact.mpp for fact in facts]),
            ("gsd", "m", [fact.gsd_m for fact in facts]),
        ):
            known = [(x + y) / 2 for x, y in (pair for pair in pairs if pair is not None)]
            if known:
                size = f"{min(known):.4g} / {median(known):.4g} / {max(known):.4g} {unit} a pixel"
                without = f", {len(pairs) - len(known)} without" if len(known) < len(pairs) else ""
                lines.append(f"  {name:<6} {size}{without}")
        if self.statistics is not None and self.statistics.count.any():
            of = f"of {' '.join(self.bands)}" if self.bands else "a band"
            lines.append(f"  mean   {_numbers(self.statistics.mean)} ({of}, in the files' units)")
            lines.append(f"  std    {_numbers(self.statistics.std)}")
        kept = [fact.kept for fact in facts if fact.kept is not None]
        if kept:
            lines.append(f"  foreground keeps {min(kept):.0%} / {median(kept):.0%} / {max(kept):.0%} of the regions")
        return lines

    def _file_proposals(self) -> list[str]:
        found = []
        if self.missing:
            found.append(
                f"correct the paths of missing files ({len(self.missing)}); they count from {self.manifest.path.parent}"
            )
        if self.unreadable:
            found.append(
                f"replace or remove unreadable files ({len(self.unreadable)}), or train with on_bad_image: skip"
            )
        if self.mismatched and self.manifest.task == "detection":
            found.append("correct the boxes that do not fit: their image, its size, their place or their class")
        elif self.mismatched and self.manifest.task == "points":
            found.append("correct the points that do not fit; docs/points.md says how they may be given")
        elif self.mismatched:
            found.append("correct the masks that do not fit; docs/segmentation.md says what may be one")
        wrong = sum(count for state, count in self.object_masks.items() if state != FITS) if self._have_masks else 0
        if wrong:
            found.append(
                f"{wrong:,} objects have no mask, or one that does not fit: correct these for head.kind mask_rcnn, "
                "which stops at those that are missing, broken or of another size; detect needs boxes only"
            )
        if self.empty:
            found.append(
                f"remove the images without valid pixels or foreground ({len(self.empty)}), or change the foreground"
            )
        return found

    def _image_proposals(self) -> list[str]:
        found = []
        bands = Counter(fact.channels for fact in self.images)
        if len({fact.band_names for fact in self.images}) > 1 and self.bands:
            found.append(
                "images hold different bands, or in another order: take those that all of them have by name, "
                f"model.input.band_names: [{', '.join(self.bands)}] (--write sets it)"
            )
        elif len(bands) > 1:
            rgb = "; model.input.rgb reads the others as RGB too" if self.rgb_helps else ""
            bands_found = _tally(fact.channels for fact in self.images)
            found.append(f"images have {bands_found} bands: a model takes one number{rgb}")
        if indexed := sum(fact.has_palette for fact in self.images):
            found.append(
                f"indices of a palette would be learnt as brightness ({amount(indexed, 'image')}): model.input.rgb: "
                "true reads their colours; in_channels is 3 then, and mean and std have three numbers, or are left out"
            )
        if stacks := sum(fact.is_stack for fact in self.images):
            found.append(f"only the first page of stacks is read ({amount(stacks, 'image')}): see gigaxt info")
        if len({fact.dtype for fact in self.images}) > 1:
            found.append("images have different number types: check that they are in the same units")
        if len({fact.band_names for fact in self.images}) > 1 and len(bands) == 1 and not self.bands:
            found.append("images name their bands differently: check that they are in the same order")
        for unit in ("mpp", "gsd_m"):
            sizes = [sum(pair) / 2 for pair in (getattr(fact, unit) for fact in self.images) if pair is not None]
            if sizes and len(sizes) < len(self.images):
                found.append(
                    f"{len(self.images) - len(sizes)} of {len(self.images)} images do not say their pixel size ({unit})"
                )
            elif sizes and max(sizes) > 1.1 * min(sizes):
                found.append(f"pixel sizes differ: set model.input.{unit} to resample to one (--write sets the median)")
        if self.statistics is not None and self.statistics.count.all():
            flat = [str(band) for band, std in enumerate(self.statistics.std.tolist()) if std == 0]
            if flat:
                found.append(f"band {', '.join(flat)} (from 0) has one value everywhere: leave it out")
        return found


def shared_bands(images: Sequence[ImageFacts]) -> tuple[str, ...]:
    """The bands that all images have, by name, in the most common order; empty where some do not name theirs."""
    names = [fact.band_names for fact in images]
    if not names or any(len(set(own)) < len(own) or own == tuple(map(str, range(1, len(own) + 1))) for own in names):
        return ()
    usual = Counter(names).most_common(1)[0][0]
    return tuple(name for name in usual if all(name in own for own in names))


def _count_lines(manifest: Manifest) -> list[str]:
    """Rows and cases of each split, and how many of them have each class, label or event."""
    splits = [name for name in SPLITS if manifest.split(name)]
    cases = {name: manifest.cases(name) for name in splits}
    table: list[tuple[str, list[object]]] = [("split", list(splits))]
    table.append(("rows", [len(manifest.split(name)) for name in splits]))
    if len(manifest.cases()) < len(manifest.rows):
        table.append(("cases", [len(found) for found in cases.values()]))
    if manifest.target == "survival":
        table.append(("events", [_count(found, 1, 1) for found in cases.values()]))
    if manifest.target == "multi" and manifest.answer_columns != LABEL:
        for i, column in enumerate(manifest.answer_columns[:LISTED]):
            for what, value in (("1", 1.0), ("0", 0.0), ("not known", None)):
                table.append((f"{column[:13]} {what}", [_count(found, i, value) for found in cases.values()]))
    else:
        counts = [manifest.class_counts(name) for name in splits]
        table += [(name, [count[name] for count in counts]) for name in manifest.classes[:LISTED]]
    lines = ["  ".join([f"{name[:24]:<24}", *(f"{cell:>7}" for cell in cells)]) for name, cells in table]
    return lines + _more(len(manifest.classes))


def _count(cases: Iterable[Case], column: int, value: float | None) -> int:
    """Cases whose answer has this number in a column; None: of which it is not known."""
    numbers = [case[0].answer.numbers[column] for case in cases]
    return sum(number != number if value is None else number == value for number in numbers)


def _row_proposals(manifest: Manifest) -> list[str]:
    """Of images that stand in several rows, which is a mistake more often than not."""
    rows: dict[Path, list[Row]] = {}
    for row in manifest.rows:
        rows.setdefault(row.image, []).append(row)
    several = [same for same in rows.values() if len(same) > 1]
    answers = [len({(row.answer, row.target_path) for row in same}) for same in several]
    differ = [same for same, count in zip(several, answers, strict=True) if count > 1]
    alike = [same for same, count in zip(several, answers, strict=True) if count == 1]
    found = []
    for those, what, to_do in (
        (differ, "several rows that contradict each other", "keep the row that is right"),
        (alike, "several rows, so that it counts as often", "leave out all but one"),
    ):
        if those:
            first = those[0]
            lines = ", ".join(str(row.line) for row in first)
            found.append(f"{_images(len(those))} in {what}, such as {first[0].image} (lines {lines}): {to_do}")
    return found


def _class_proposals(manifest: Manifest) -> list[str]:
    found = []
    train, val = manifest.split("train"), manifest.split("val")
    if not train:
        found.append("no row is in split train: there is nothing to train on")
    elif not val:
        found.append("no row is in split val: training keeps the last model, and cannot say how good it is")
    counts = manifest.class_counts("train")
    absent = [name for name, count in counts.items() if count == 0]
    if absent:
        found.append(f"class {', '.join(absent[:5])} does not occur in train: it cannot be learnt")
    present = [count for count in counts.values() if count]
    if present and max(present) > 10 * min(present):
        found.append("classes differ more than tenfold in number: set head.class_weights")
    if manifest.target == "single" and any(_is_decimal(name) for name in manifest.classes):
        found.append("labels such as 1.5 are taken as names of classes: --target regression learns them as numbers")
    if manifest.answer_columns == LABEL:
        found += class_name_advice(manifest.classes)
    if len(manifest.classes) == 1 and manifest.target == "single":
        found.append("there is one class: add examples of another")
    return found


def _is_decimal(name: str) -> bool:
    """Whether a class is called like a number that is not whole."""
    try:
        return float(name) % 1 > 0  # not so of nan and inf, which may be names
    except ValueError:
        return False


def _tally(values: Iterable[object]) -> str:
    """Like "3 (40 images), 1 (2 images)"; the value alone where there is one."""
    counts = Counter(map(str, values)).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{value} ({amount(count, 'image')})" for value, count in counts)


def _images(count: int) -> str:
    return f"{count} {'image is' if count == 1 else 'images are'}"


def _numbers(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.4g}" for value in values.tolist())


def _more(count: int) -> list[str]:
    return [f"  ... and {count - LISTED} more"] if count > LISTED else []
