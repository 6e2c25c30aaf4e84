"""What `gigaxt check` finds in masks: values of classes, pixels of labels, or the size of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gigaxt.datasets.labels import Target
from gigaxt.datasets.row import Row
from gigaxt.datasets.statistics import MANY_VALUES, BandStatistics, class_values, label_pixels, number_statistics
from gigaxt.errors import DataError, GigaxtError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.nn.heads.segment_config import SegmentConfig
from gigaxt.targets.masks import field_values
from gigaxt.targets.vectors import is_vector

UNLABELLED = 255
"""The mask value that means "not labelled"."""


@dataclass(kw_only=True)
class MaskFacts:
    """Of one mask, or of all together."""

    pixels: Counter[int] = field(default_factory=Counter)
    """Pixels of each value of classes; of each label (from 0) that is 1."""
    known: int = 0
    """Pixels that were counted."""
    sampled: bool = False
    """Whether a part only was read."""
    numbers: BandStatistics | None = None
    """Of a raster of numbers."""

    @classmethod
    def of_all(cls, each: Iterable[MaskFacts]) -> MaskFacts:
        """All together."""
        whole = cls()
        for facts in each:
            whole.pixels.update(facts.pixels)
            whole.known += facts.known
            whole.sampled |= facts.sampled
            if facts.numbers is not None:
                whole.numbers = whole.numbers or BandStatistics(len(facts.numbers.count))
                if len(whole.numbers.count) == len(facts.numbers.count):
                    whole.numbers.merge(facts.numbers)
        whole.pixels = Counter(dict(sorted(whole.pixels.items())))
        return whole


def look_at_mask(mask: Image, head: SegmentConfig, max_pixels: int) -> MaskFacts:
    """What a mask holds, on the grid of its image.

    Raises:
        DataError: it has other bands or another type than the target. ImageError: it cannot be read.
    """
    bands = 1 if head.target == "single" else head.classes
    if mask.channels != bands:
        what = "one band of class numbers" if head.target == "single" else f"{bands} bands, as the first one has"
        raise DataError(f"{mask.name}: mask has {mask.channels} bands; expected {what}")
    if head.target == "regression":
        numbers = number_statistics(mask, max_pixels)
        sampled = mask.height * mask.width > max_pixels
        return MaskFacts(known=int(numbers.count.max()), numbers=numbers, sampled=sampled)
    if mask.dtype.kind not in "bui":
        raise DataError(f"{mask.name}: mask is {mask.dtype.name}; expected class numbers in an integer type")
    if head.target == "multi":
        pixels, known, sampled = label_pixels(mask, max_pixels, head.ignore)
    else:
        pixels, sampled = class_values(mask, max_pixels)
        known = sum(pixels.values())
    return MaskFacts(pixels=pixels, known=known, sampled=sampled)


def mask_head(rows: Sequence[Row], target: Target | None, class_field: str | None) -> SegmentConfig:
    """The head that the masks of a manifest suggest: its target, classes, and their names where polygons have them.

    Args:
        rows: whose masks exist; those that cannot be read are passed over.
        target: as asked for; None: by the first raster: floats are numbers, several bands are labels.
        class_field: of polygons.

    Raises:
        DataError: a target that masks do not have.
    """
    if target == "survival":
        raise DataError("masks have no target survival; leave it out")
    first = _first_raster(rows)
    if target is None:
        numbers, several = (False, False) if first is None else (first.dtype.kind == "f", first.channels > 1)
        target = "regression" if numbers else "multi" if several else "single"
    values = _values_of(rows, class_field)
    named = sorted({value for value in values if isinstance(value, str)})
    whole = [int(value) for value in values if not isinstance(value, str)]
    if target == "single":
        names = ["background", *named] if named else None
        return SegmentConfig(
            classes=max(2, len(names or ()), *(n + 1 for n in whole)),
            class_names=_padded(names, whole),
            class_field=class_field,
        )
    classes = max(1, len(named)) if first is None else first.channels
    names = named if len(named) == classes else None
    return SegmentConfig(classes=classes, class_names=names, class_field=class_field, target=target)


def _padded(names: list[str] | None, whole: list[int]) -> list[str] | None:
    """Names up to the highest number that a polygon has."""
    if names is None:
        return None
    return names + [f"class {k}" for k in range(len(names), max(whole, default=0) + 1)]


def _first_raster(rows: Sequence[Row]) -> Image | None:
    for row in rows:
        if row.target_path is not None and not is_vector(row.target_path):
            try:
                return open_image(row.target_path)
            except (GigaxtError, OSError):
                continue
    return None


def _values_of(rows: Sequence[Row], class_field: str | None) -> list[Any]:
    """The different values of the class field in all vector files."""
    found: set[Any] = set()
    for row in rows if class_field is not None else ():
        if row.target_path is not None and is_vector(row.target_path):
            try:
                found |= set(field_values(row.target_path, class_field, open_image(row.image)))
            except (GigaxtError, OSError):
                continue  # told of with the file itself
    return list(found)


def has_vectors(rows: Iterable[Row]) -> bool:
    """Whether any mask is a vector file."""
    return any(row.target_path is not None and is_vector(row.target_path) for row in rows)


def shares(facts: MaskFacts) -> dict[int, float]:
    """Share of each value or label among the pixels that were counted."""
    return {value: pixels / max(1, facts.known) for value, pixels in facts.pixels.items()}


def numbers_line(statistics: BandStatistics) -> list[str]:
    """Mean and standard deviation of each band of numbers."""
    rows = zip(np.asarray(statistics.mean).tolist(), np.asarray(statistics.std).tolist(), strict=True)
    return [f"  band {band}  mean {mean:.4g}  std {std:.4g}" for band, (mean, std) in enumerate(rows, start=1)]


def mask_advice(head: SegmentConfig, facts: MaskFacts, rows: Sequence[Row]) -> list[str]:
    """What to change of masks before training, one sentence each."""
    found: list[str] = []
    if head.target == "regression" or not facts.pixels:
        return found
    if head.class_field is None and has_vectors(rows):
        found.append("polygons are taken as one class: --class-field names the property that tells their classes")
    if head.target == "multi":
        return found + _label_advice(facts)
    values = [value for value in facts.pixels if value != UNLABELLED]
    if len(facts.pixels) > MANY_VALUES or min(values, default=0) < 0:
        return ["mask values are no class numbers: expected 0, 1, 2, ... and 255 for what is not labelled"]
    if len(values) < 2:
        found.append(_too_few(values, UNLABELLED in facts.pixels))
    absent = sorted(set(range(max(values, default=0) + 1)) - set(values))
    if absent:
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        found.append(f"mask values {shown} do not occur: number classes 0, 1, 2, ... without gaps")
    share = shares(facts)
    rare = [str(value) for value in values if share[value] < 0.001]
    if rare and not absent:
        found.append(f"mask values {', '.join(rare[:5])} are under 0.1% of the pixels: set head.class_weights")
    return found


def _too_few(values: Sequence[int], unlabelled: bool) -> str:
    """Of masks with one class or none, such as those that are drawn with 0 and 255."""
    what = f"only class {values[0]} occurs" if values else "no class occurs"
    if unlabelled:
        return f"{what} in the masks, and 255 means not labelled: where 255 is a class, write it as 1"
    return f"{what} in the masks, and nothing can be learnt from that: add images of another"


def _label_advice(facts: MaskFacts) -> list[str]:
    never = [str(label) for label, pixels in facts.pixels.items() if not pixels]
    if never and len(never) == len(facts.pixels):
        return [
            f"no label is 1 anywhere: the {len(never)} bands of a mask are taken as labels, each 0, 1 or 255 (not "
            "known); a picture in colours is no mask: write one band of class numbers 0, 1, 2, ..."
        ]
    return [f"labels {', '.join(never[:5])} (from 0) are nowhere 1: leave them out"] if never else []
