"""Functions that `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """A decorator: `torch.compiler.disable`, which has no types of its own."""
    return cast(F, torch.compiler.disable(function))
