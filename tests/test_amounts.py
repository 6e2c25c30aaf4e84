"""Numbers of things in messages."""

from __future__ import annotations

from gigaxt.amounts import amount


def test_one_and_many() -> None:
    assert [amount(count, "image") for count in (0, 1, 2, 1280)] == ["0 images", "1 image", "2 images", "1,280 images"]
