"""Division of a manifest into train, val and test, and the check that nothing is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gigaxt.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse fractions that are not three shares of one whole.

    Raises:
        ConfigError: not three, one below 0, no training part, or another sum than 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"`fractions` is {tuple(fractions)}; expected three shares of train, val, test that sum to 1")


def divide(rows: Sequence[tuple[str, str]], seed: int, fractions: Sequence[float]) -> list[str]:
    """Split of each row, such that a unit stays together and every label is shared out like the whole.

    Args:
        rows: unit (group, or the image's name) and label of each row; another order of rows gives the same division.
        seed: another seed, another division.
        fractions: shares of train, val and test.

    Returns:
        A name of `SPLITS` for each row. A split with a share above 0 gets at least one unit where there are enough.
    """
    units: dict[str, Counter[str]] = defaultdict(Counter)
    for unit, label in rows:
        units[unit][label] += 1
    strata = {unit: min(counts, key=lambda label: (-counts[label], label)) for unit, counts in units.items()}
    # Label after label, large units first (the small ones even out what those leave); the hash is the shuffle.
    order = sorted(units, key=lambda u: (_hash(seed, strata[u]), strata[u], -units[u].total(), _hash(seed, u), u))
    shares = {split: share for split, share in zip(SPLITS, fractions, strict=True) if share > 0}
    behind = dict.fromkeys(shares, 0.0)  # rows that each split is short of its share of the rows so far
    chosen: dict[str, str] = {}
    for unit in order:
        size = units[unit].total()
        for split, share in shares.items():
            behind[split] += share * size
        chosen[unit] = max(shares, key=lambda split: round(behind[split], 6))  # rounded, so that ties are ties
        behind[chosen[unit]] -= size
    _fill_empty(chosen, order, list(shares))
    return [chosen[unit] for unit, _ in rows]


def check_splits(path: Path, rows: Iterable[tuple[int, str, str | None, str]]) -> None:
    """Refuse a group or an image in two splits, and an image in two groups.

    Args:
        path: the CSV, for messages.
        rows: line, split, group and image name of each.

    Raises:
        DataError: names the group or the image, and both lines.
    """
    groups: dict[str, tuple[int, str]] = {}
    images: dict[str, tuple[int, str, str | None]] = {}
    for line, split, group, image in rows:
        if image in images:
            other, other_split, other_group = images[image]
            if group != other_group:
                raise DataError(
                    f"{path} lines {other} and {line}: image {image} is in two groups, {other_group or 'none'} and "
                    f"{group or 'none'}; give it one"
                )
            if split != other_split:
                raise DataError(
                    f"{path} lines {other} and {line}: image {image} is in two splits, {other_split} and {split}; "
                    f"leave it in one"
                )
        images.setdefault(image, (line, split, group))
        if group is None:
            continue
        other, other_split = groups.setdefault(group, (line, split))
        if split != other_split:
            raise DataError(
                f"{path} lines {other} and {line}: group {group!r} is in two splits, {other_split} and {split}; "
                f"move its rows into one"
            )


def _fill_empty(chosen: dict[str, str], order: list[str], open_splits: list[str]) -> None:
    """Move the smallest unit of the largest split into each split that would be empty."""
    for split in open_splits:
        if split in chosen.values():
            continue
        largest = max(open_splits, key=lambda name: sum(1 for value in chosen.values() if value == name))
        candidates = [unit for unit in order if chosen[unit] == largest]
        if len(candidates) > 1:
            chosen[candidates[-1]] = split


def _hash(seed: int, unit: str) -> bytes:
    return hashlib.sha256(f"{seed}:{unit}".encode()).digest()
