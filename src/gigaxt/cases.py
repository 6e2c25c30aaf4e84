"""A case: one sample of a classification, made of one image or of several (the slides of a patient)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from torch import Tensor

from gigaxt.errors import DataError
from gigaxt.image.base import Image

Cases = Sequence[Image | Sequence[Image]] | Tensor
"""What a model is given: for each case an Image or several, or a normalised float tensor (B, C, H, W)."""


def check_list(images: Any) -> None:
    """Refuse one image, or its path, in place of a list of them.

    Raises:
        DataError: says what to do.
    """
    if isinstance(images, (Image, str, PathLike)):
        what = "one Image: model([image])" if isinstance(images, Image) else f"{images!s}; use gigaxt.predict"
        raise DataError(f"expected a list of Images, got {what}")


def by_case(images: Sequence[Image | Sequence[Image]]) -> tuple[list[Image], list[list[int]]]:
    """All images one after the other, and which of them each case has.

    Raises:
        DataError: something else than Images, such as paths, or a case without images.
    """
    flat: list[Image] = []
    cases: list[list[int]] = []
    for item in images:
        members: list[Any] = list(item) if isinstance(item, (list, tuple)) else [item]
        other = next((member for member in members if not isinstance(member, Image)), None)
        if other is not None:
            what = repr(other) if isinstance(other, (str, PathLike)) else type(other).__name__
            raise DataError(f"expected Images or lists of them (cases), got {what}; open it with gigaxt.open_image")
        if not members:
            raise DataError(f"case {len(cases)} (from 0): expected at least one image, got none")
        cases.append(list(range(len(flat), len(flat) + len(members))))
        flat += members
    return flat, cases
