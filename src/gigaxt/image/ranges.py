"""Which parts of a file are read together: few reads, because on many stores asking costs more than what is sent."""

from __future__ import annotations

from collections.abc import Sequence

GAP = 128 << 10
"""Bytes between two wanted parts that are read for nothing rather than asking twice. A store that answers after 5 ms
and sends 100 MB/s sends 500 KB while one waits for an answer, NVMe and a good network file system some 250 KB; from the
system's memory 128 KiB cost some 20 us, a small part of decoding the tiles on both sides."""
MOST_RUN = 4 << 20
"""Bytes of one read, unless a single part is larger: 40 ms at 100 MB/s, against which the time to answer is little."""


def runs(parts: Sequence[tuple[int, int]], gap: int = GAP, most: int = MOST_RUN) -> list[list[int]]:
    """Which of `parts` are read in one go: indices by their offsets, in lists that cover all parts.

    Args:
        parts: (offset, count) each, bytes of a file; they may overlap.
        gap: parts that lie at most so many bytes apart may go together.
        most: bytes from the first to the last of those that go together.
    """
    found: list[list[int]] = []
    start = end = -1
    for index in sorted(range(len(parts)), key=parts.__getitem__):
        offset, count = parts[index]
        if found and offset - end <= gap and max(end, offset + count) - start <= most:
            found[-1].append(index)
            end = max(end, offset + count)
        else:
            found.append([index])
            start, end = offset, offset + count
    return found


def span(parts: Sequence[tuple[int, int]], run: Sequence[int]) -> tuple[int, int]:
    """(offset, count) of all parts of a run together."""
    start = parts[run[0]][0]
    return start, max(offset + count for offset, count in (parts[index] for index in run)) - start
