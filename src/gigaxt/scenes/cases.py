"""What a model is given: cases of one image or of several (the slides of a patient), or a tensor."""

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


class TensorImage:
    """One image of a batch in memory, (C, H, W): the network's input as it is, normalised by whoever made it."""

    all_valid = True

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name = tensor, name
        self.channels, self.height, self.width = tensor.shape


def sources_of(images: Cases) -> tuple[Sequence[Image | TensorImage], list[list[int]]]:
    """All images one after the other, at least one, and for each case which of them are its own.

    Raises:
        DataError: no images; something else than Images, such as paths; a case without images; or a tensor that is not
            (B, C, H, W) of floating point.
    """
    sources: Sequence[Image | TensorImage]
    if not isinstance(images, Tensor):
        sources, cases = _by_case(images)
    elif images.ndim == 4 and images.is_floating_point():
        sources = [TensorImage(image, f"image {i} of the tensor") for i, image in enumerate(images)]
        cases = [[i] for i in range(len(images))]
    else:
        raise DataError(
            f"expected Images or a normalised float tensor (B, C, H, W), got {images.dtype} "
            f"{tuple(images.shape)}; wrap pixels that are not normalised with gigaxt.open_image"
        )
    if not sources:
        raise DataError("expected at least one image, got none")
    return sources, cases


def _by_case(images: Sequence[Image | Sequence[Image]]) -> tuple[list[Image], list[list[int]]]:
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
