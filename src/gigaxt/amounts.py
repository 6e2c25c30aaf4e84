"""Units, and numbers of things in messages."""

from __future__ import annotations

GIB = 2**30
"""Bytes."""


def amount(count: int, what: str) -> str:
    """`count` and its noun, such as "1 image" and "1,280 images"; `what` is one of them, and takes an s."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
