"""Division of a manifest into train, val and test or into folds, and the check that nothing is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gigaxt.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")


class Placed(NamedTuple):
    """What must not be divided, of one row."""

    line: int
    """Of the CSV."""
    split: str
    group: str | None
    case: str | None
    image: str
    """Its name, the same wherever the folder lies."""

    @property
    def unit(self) -> str:
        """The widest of them, which a division keeps together."""
        kind = next(kind for kind in ("group", "case", "image") if getattr(self, kind))
        return f"{kind} {getattr(self, kind)}"


class Fold(NamedTuple):
    """One of several equal parts of the data: evaluated on by the run that trains on the others."""

    number: int
    """From 1."""
    total: int
    """How many there are."""


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse fractions that are not three shares of one whole.

    Raises:
        ConfigError: not three, one below 0, no training part, or another sum than 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"`fractions` is {tuple(fractions)}; expected three shares of train, val, test that sum to 1")


def check_fold(fold: Fold) -> None:
    """Refuse a fold that does not exist.

    Raises:
        ConfigError: fewer than two folds, or a number beyond them.
    """
    if fold.total < 2 or not 1 <= fold.number <= fold.total:
        raise ConfigError(f"fold {fold.number} of {fold.total}: expected at least 2 folds, numbered from 1")


def divide(rows: Sequence[tuple[str, str]], seed: int, shares: Mapping[str, float]) -> list[str]:
    """Part of each row, such that a unit stays together and every label is shared out like the whole.

    Args:
        rows: unit (see `Placed.unit`) and label of each row; another order of rows gives the same division.
        seed: another seed, another division.
        shares: name of each part and its share of all.

    Returns:
        A name of `shares` for each row. A part with a share above 0 gets at least one unit where there are enough.
    """
    units: dict[str, Counter[str]] = defaultdict(Counter)
    for unit, label in rows:
        units[unit][label] += 1
    strata = {unit: min(counts, key=lambda label: (-counts[label], label)) for unit, counts in units.items()}
    # Label after label, large units first (the small ones even out what those leave); the hash is the shuffle.
    order = sorted(units, key=lambda u: (_hash(seed, strata[u]), strata[u], -units[u].total(), _hash(seed, u), u))
    shares = {part: share for part, share in shares.items() if share > 0}
    behind = dict.fromkeys(shares, 0.0)  # rows that each part is short of its share of the rows so far
    chosen: dict[str, str] = {}
    for unit in order:
        size = units[unit].total()
        for part, share in shares.items():
            behind[part] += share * size
        chosen[unit] = max(shares, key=lambda part: round(behind[part], 6))  # rounded, so that ties are ties
        behind[chosen[unit]] -= size
    _fill_empty(chosen, order, list(shares))
    return [chosen[unit] for unit, _ in rows]


def divide_into_folds(
    path: Path, rows: Sequence[tuple[str, str]], splits: Sequence[str], seed: int, fold: Fold
) -> list[str]:
    """Split of each row where one fold is `val` and the others are `train`; rows of `test` stay out of all folds.

    Args:
        path: the CSV, for messages.
        rows: unit and label of each row.
        splits: of each row as the CSV says; empty where it does not.
        seed: another seed, other folds.
        fold: which one is `val`.

    Raises:
        DataError: fewer units than folds.
    """
    inside = [i for i, split in enumerate(splits) if split != "test"]
    units = len({rows[i][0] for i in inside})
    if units < fold.total:
        raise DataError(
            f"{path}: {fold.total} folds need at least as many groups (without a group: cases or images), got {units}"
        )
    names = [str(number) for number in range(1, fold.total + 1)]
    parts = divide([rows[i] for i in inside], seed, dict.fromkeys(names, 1 / fold.total))
    result = list(splits)
    for i, part in zip(inside, parts, strict=True):
        result[i] = "val" if part == str(fold.number) else "train"
    return result


def check_splits(path: Path, rows: Iterable[Placed]) -> None:
    """Refuse a group, a case or an image in two splits, an image or a case in two groups, and an image in two cases.

    Args:
        path: the CSV, for messages.
        rows: of it.

    Raises:
        DataError: names what is torn apart, and both lines.
    """
    seen: dict[tuple[str, str], Placed] = {}
    for row in rows:
        for kind, wider in (("image", ("group", "case", "split")), ("case", ("group", "split")), ("group", ("split",))):
            name = getattr(row, kind)
            if name is None:
                continue
            other = seen.setdefault((kind, name), row)
            for above in wider:
                _check_same(path, kind, name, above, other, row)
            if kind == "image" and row.case is not None and other is not row:
                raise DataError(
                    f"{path} lines {other.line} and {row.line}: image {name} is twice in case {row.case!r}; "
                    "leave one of the lines out"
                )


def _check_same(path: Path, kind: str, name: str, above: str, first: Placed, second: Placed) -> None:
    old, new = getattr(first, above), getattr(second, above)
    if old == new:
        return
    shown = name if kind == "image" else repr(name)
    what_to_do = (
        "give it one" if above != "split" else "leave it in one" if kind == "image" else "move its rows into one"
    )
    raise DataError(
        f"{path} lines {first.line} and {second.line}: {kind} {shown} is in two {above}s, {old or 'none'} and "
        f"{new or 'none'}; {what_to_do}"
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
