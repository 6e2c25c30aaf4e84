"""The regions of a stream: read ahead, run in parts, put together again."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gigaxt.amounts import GIB
from gigaxt.errors import ConfigError
from gigaxt.streaming.keyed import dropout_key
from gigaxt.streaming.prefetch import READERS, count_rows, form, join_rows, read_ahead, take_rows

T = TypeVar("T")
Reduce = Literal["cat", "sum"]


@dataclass(kw_only=True)
class Streaming:
    """How much of the forward pass is kept for the backward pass, and how many regions are encoded at once."""

    budget_gib: float | None = 0.0
    """Device memory for activations that are kept instead of recomputed; None keeps everything (ordinary autograd)."""
    host_gib: float = 0.0
    """Host memory for the same: whole activations of a classifier, feature maps of a dense model. On the CPU it adds to
    the device's."""
    chunk_regions: int = 4
    """Regions encoded together in one batch."""
    readers: int = READERS
    """Threads that read and decode chunks ahead, and how many chunks they are ahead at most. More of them help where
    the storage answers slowly, or where there are idle cores; each holds one more chunk in memory."""
    cuda_graphs: bool = False
    """On CUDA: record a chunk's kernels once and launch them all together (see `cuda_graphs.py`), in training, where
    activations are not kept."""
    most_regions: int | None = field(default=None, init=False, repr=False, compare=False)
    """No setting: how many regions at once the device could do after it had run out of memory. Noted by the streams,
    so that the next one does not try more again; None: it has not run out."""

    def __post_init__(self) -> None:
        if self.budget_gib is not None and not 0 <= self.budget_gib < math.inf:
            raise ConfigError(
                f"streaming.budget_gib: expected a number of GiB from 0, or None to keep all, got {self.budget_gib}"
            )
        if not 0 <= self.host_gib < math.inf:
            raise ConfigError(f"streaming.host_gib: expected a number of GiB from 0, got {self.host_gib}")
        if self.chunk_regions < 1:
            raise ConfigError(f"streaming.chunk_regions: expected at least 1, got {self.chunk_regions}")
        if self.readers < 1:
            raise ConfigError(f"streaming.readers: expected at least 1 thread, got {self.readers}")


@dataclass
class Rows:
    """Some regions of a stream: loaded and ready to be run."""

    chunk: Any
    """What `load` was given; named in errors."""
    loaded: Any
    """Tensors with one row a region, on the device."""
    ids: Tensor
    """What dropout is keyed by, (rows,) int64."""
    start: int
    """Place of the first row in the whole stream."""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.ids)

    @property
    def stop(self) -> int:
        """One past the last row's place in the stream."""
        return self.start + self.count

    def part(self, start: int, stop: int) -> Rows:
        """Rows start..stop of these."""
        return Rows(self.chunk, take_rows(self.loaded, start, stop), self.ids[start:stop], self.start + start)

    def of(self, tensors: Sequence[Tensor], per_row: int = 1) -> list[Tensor]:
        """These rows of whole-stream tensors that hold `per_row` rows a region."""
        return [t[self.start * per_row : self.stop * per_row] for t in tensors]


def merged(rows: Sequence[Rows]) -> list[Rows]:
    """Consecutive rows in as few `Rows` as possible: neighbours whose loaded tensors have one form become one."""
    groups: list[list[Rows]] = []
    for one in rows:
        if groups and form(groups[-1][-1].loaded) == form(one.loaded):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [group[0] if len(group) == 1 else _joined_rows(group) for group in groups]


def _joined_rows(group: Sequence[Rows]) -> Rows:
    loaded = join_rows([one.loaded for one in group])
    ids = torch.cat([one.ids for one in group])
    return Rows(f"{group[0].chunk} to {group[-1].chunk}", loaded, ids, group[0].start)


class Reader:
    """Loads chunks ahead and runs work on their rows, in smaller parts once the device has run out of memory.

    Args:
        load: from a chunk to its rows.
        device: where they go.
        seed: of keyed dropout; None where the modules are in evaluation mode, and nothing is drawn.
        streaming: how far ahead to read; `most_regions` is noted in it when the device runs out of memory.
    """

    def __init__(
        self, load: Callable[[Any], Any], device: torch.device, seed: int | None, streaming: Streaming | None = None
    ) -> None:
        self.load, self.device, self.seed, self.streaming = load, device, seed, streaming or Streaming()
        self.most_rows = self.streaming.most_regions or 2**62

    def rows(self, chunks: Sequence[Any], starts: Sequence[int] | None = None, known: Any = None) -> Iterator[Rows]:
        """The chunks' rows in order.

        Args:
            chunks: to be loaded.
            starts: place of each chunk's first row in the stream; None: one chunk follows the other from 0.
            known: the first chunk's tensors on the device, if they are there already; None: it is loaded as well.
        """
        start = 0
        loading = read_ahead(self.load, chunks, self.device, self.streaming.readers, known)
        for i, (chunk, loaded) in enumerate(loading):
            start = start if starts is None else starts[i]
            count = count_rows(loaded)
            ids = getattr(chunk, "region_ids", None)
            ids = torch.arange(start, start + count) if ids is None else torch.as_tensor(ids)
            if len(ids) != count:
                raise ConfigError(f"{chunk}: expected one of its region_ids a row, got {len(ids)} for {count} rows")
            yield Rows(chunk, loaded, ids, start)
            start += count

    def keyed(self, rows: Rows) -> AbstractContextManager[None]:
        """Key the dropout of what runs on these rows inside the block: a part, or what it checkpointed of itself."""
        return nullcontext() if self.seed is None else dropout_key(self.seed, rows.ids, self.device)

    def run(self, rows: Rows, work: Callable[[Rows], T]) -> list[tuple[Rows, T]]:
        """Call `work` on all of `rows`, halving the number at once when the device is out of memory.

        Returns:
            The parts with `work`'s results, in order.

        Raises:
            Exception: whatever `work` raises, with a note that names the chunk.
        """
        start, count = 0, rows.count
        results: list[tuple[Rows, T]] = []
        while start < count:
            stop = min(start + self.most_rows, count)
            part = rows if stop - start == count else rows.part(start, stop)
            try:
                with self.keyed(part):
                    results.append((part, work(part)))
            except torch.OutOfMemoryError:
                if stop - start == 1:
                    raise
                self.most_rows = self.streaming.most_regions = (stop - start) // 2
            except Exception as error:
                error.add_note(f"in {rows.chunk}")
                raise
            else:
                start = stop
                continue
            # Not inside `except`: there the exception keeps the failed attempt's tensors alive.
            free_device_memory()
        return results


def free_device_memory() -> None:
    """After a failed attempt: collect unreachable objects, and give back what PyTorch's allocator caches."""
    gc.collect()
    torch.cuda.empty_cache()


class Budget:
    """What is left of a memory budget: whoever keeps activations takes their size out of it.

    Args:
        gib: the budget.
    """

    def __init__(self, gib: float) -> None:
        self.left = int(gib * GIB)

    def take(self, size: int) -> bool:
        """Pay `size` bytes if they are there."""
        if size > self.left:
            return False
        self.left -= size
        return True


def join(parts: Sequence[Tensor], reduce: Reduce) -> Tensor:
    """Parts joined along their first dimension, or added up in float32 or better."""
    if reduce == "cat":
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    first, *rest = (t.to(at_least_float32(t.dtype)) for t in parts)
    return sum(rest, first)


class Joined:
    """Outputs of all rows in one preallocated tensor ("cat") or added up ("sum")."""

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.tensors: list[Tensor] = []
        self.per_row: list[int] = []
        """Rows of each output for one region; "cat" only."""

    def add(self, rows: Rows, outputs: Sequence[Tensor], chunks: int) -> None:
        """Put `outputs` of `rows` at their place; `chunks` (the number of all) sizes the first allocation.

        Raises:
            ConfigError: outputs that cannot be joined, as they do not have k rows for each region.
        """
        if self.reduce == "sum":
            # The first is copied: where a CUDA graph made it, the next replay would overwrite it.
            widened = [t.detach().to(at_least_float32(t.dtype), copy=not self.tensors) for t in outputs]
            for whole, t in zip(self.tensors, widened, strict=False):
                _check_alike(t.shape, whole.shape)
            self.tensors = [a + b for a, b in zip(self.tensors, widened, strict=True)] if self.tensors else widened
            return
        count = rows.count
        if not self.tensors:
            for t in outputs:
                if t.ndim == 0 or t.shape[0] % count:
                    raise ConfigError(
                        f"stream: an output of shape {tuple(t.shape)} for {count} regions cannot be joined: expected a "
                        "first dimension that is a multiple of the regions, or use reduce='sum'"
                    )
            self.per_row = [t.shape[0] // count for t in outputs]
            self.tensors = [t.new_empty((0, *t.shape[1:])) for t in outputs]
        for i, (t, k) in enumerate(zip(outputs, self.per_row, strict=True)):
            whole = self.tensors[i]
            if rows.stop * k > len(whole):
                grown = whole.new_empty((max(rows.stop, count * chunks) * k, *whole.shape[1:]))
                grown[: rows.start * k] = whole[: rows.start * k]
                self.tensors[i] = whole = grown
            place = whole[rows.start * k : rows.stop * k]
            _check_alike((t.shape, t.dtype), (place.shape, place.dtype))
            place.copy_(t.detach())

    def results(self, rows: int) -> tuple[Tensor, ...]:
        """The whole, handed over; `rows` is the number of all regions.

        Kept here as well, a result would reach itself through its own graph, and never be freed.
        """
        tensors, self.tensors = self.tensors, []
        if self.reduce == "sum":
            return tuple(tensors)
        # Cut to size in place: a view could not be changed in place by whoever gets it.
        return tuple(t.resize_(rows * k, *t.shape[1:]) for t, k in zip(tensors, self.per_row, strict=True))


def _check_alike(found: object, expected: object) -> None:
    """Refuse an output that would be repeated or rounded to fit in."""
    if found != expected:
        raise ConfigError(f"stream: a chunk's output is {found}, but as the first chunk's it had to be {expected}")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where it is a smaller float, complex or not; integers become int64."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point or dtype.is_complex else torch.int64


def differentiable(tensor: Tensor) -> bool:
    """Whether numbers of its type can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()
