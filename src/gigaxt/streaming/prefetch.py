"""Chunks read ahead in threads while the device computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from gigaxt.errors import ConfigError

C = TypeVar("C")
_unlike = count()
_reader = threading.local()
"""`pins`: whether this thread's chunks go to CUDA."""

READERS = 2
"""Reading threads where nobody says otherwise, and chunks that they are ahead. The codecs release the GIL."""


def read_ahead(
    load: Callable[[C], Any],
    chunks: Sequence[C],
    device: torch.device,
    readers: int = READERS,
    known: Any = None,
) -> Iterator[tuple[C, Any]]:
    """Load chunks in threads, in order, while the caller works on those before; at most `readers` + 1 are in memory.

    Args:
        load: pure function from a chunk to tensors (any nesting of tuples, lists, dicts); called in threads.
        chunks: what to load. The device has to wait for the first one: if that has a method `parts(most)`, which cuts
            it into at most so many chunks, all threads load it together.
        device: where the tensors go. To CUDA they are copied without waiting, from pinned memory; PyTorch's caching
            host allocator reuses a pinned block only after the copy's event.
        readers: threads, and chunks ahead of the one at work.
        known: the first chunk's tensors on the device, if they are there already; None: it is loaded like the others.

    Yields:
        (chunk, load(chunk) on `device`).

    Raises:
        Exception: whatever `load` raises, at its chunk's turn, with a note that names the chunk.
    """
    if not chunks:
        return
    first = _parts(chunks[0], readers) if known is None else []
    if len(chunks) == 1 and len(first) < 2:
        yield chunks[0], to_device(_load(load, chunks[0], pin=False), device) if known is None else known
        return
    pin = device.type == "cuda"
    executor = ThreadPoolExecutor(readers, thread_name_prefix="gigaxt-read")
    try:
        queue: deque[list[Future[Any]]] = deque()
        for i, chunk in enumerate(chunks):
            for later in range(i + len(queue), min(i + 1 + readers, len(chunks))):
                parts = [chunks[later]] if later else first
                queue.append([executor.submit(_load, load, part, pin=pin) for part in parts])
            loaded = [to_device(part.result(), device) for part in queue.popleft()] or [known]
            if any(form(part) != form(loaded[0]) for part in loaded[1:]):  # such as masks, of some parts only
                loaded = [to_device(_load(load, chunk, pin=False), device)]
            yield chunk, join_rows(loaded)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def load_together(load: Callable[[C], Any], chunks: Sequence[C], device: torch.device) -> list[Any]:
    """What several chunks hold, each loaded by a thread of its own; on the host, ready to be copied to `device`."""
    with ThreadPoolExecutor(len(chunks), thread_name_prefix="gigaxt-read") as executor:
        return list(executor.map(lambda chunk: _load(load, chunk, pin=device.type == "cuda"), chunks))


def host_buffer(shape: Sequence[int], dtype: np.dtype[Any]) -> Tensor:
    """An uninitialised tensor for what `load` returns; in pinned memory where a reading thread would copy it there."""
    return torch.empty(shape, dtype=_torch_dtype(dtype), pin_memory=getattr(_reader, "pins", False))


def to_device(loaded: Any, device: torch.device) -> Any:
    """All tensors of `loaded` on `device`."""
    return tree_map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, loaded)


def count_rows(loaded: Any) -> int:
    """Regions in a loaded chunk: the leading dimension that all its tensors share.

    Raises:
        ConfigError: no tensor, no row, or tensors of different leading dimensions.
    """
    rows = {t.shape[0] if t.ndim else -1 for t in tree_flatten(loaded)[0] if isinstance(t, Tensor)}
    if len(rows) != 1 or rows <= {-1, 0}:
        raise ConfigError(
            f"load(chunk) returned tensors of leading dimensions {sorted(rows)}: "
            "expected at least one tensor and one row, all with one row a region"
        )
    return rows.pop()


def form(loaded: Any) -> Any:
    """What loaded chunks must have in common to be joined: all but the number of their rows; compared with `==`."""
    leaves, tree = tree_flatten(loaded)
    return tree, [(t.shape[1:], t.dtype) if isinstance(t, Tensor) else _compared(t) for t in leaves]


def _compared(value: Any) -> Any:
    """The value; of what cannot be compared, such as a NumPy array, something that is like nothing else."""
    return value if isinstance(value, Hashable) else ("unlike", next(_unlike))


def join_rows(loaded: Sequence[Any]) -> Any:
    """Loaded chunks of one form as one, joined along their rows."""
    if len(loaded) == 1:
        return loaded[0]
    return tree_map(lambda *t: torch.cat(t) if isinstance(t[0], Tensor) else t[0], *loaded)


def take_rows(loaded: Any, start: int, stop: int) -> Any:
    """Rows start..stop of every tensor in `loaded`."""
    return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, loaded)


def _parts(chunk: C, most: int) -> Sequence[C]:
    """The chunk in at most `most` parts, where it knows how to cut itself; else the chunk alone."""
    cut: Callable[[int], Sequence[C]] | None = getattr(chunk, "parts", None)
    return [chunk] if cut is None else cut(most)


def _load(load: Callable[[C], Any], chunk: C, *, pin: bool) -> Any:
    _reader.pins = pin
    try:
        loaded = load(chunk)
    except Exception as error:
        error.add_note(f"in {chunk}")
        raise
    return tree_map(_pinned, loaded) if pin else loaded


def _pinned(value: Any) -> Any:
    """A tensor on the host is moved to pinned memory; tensors on a device and other values stay as they are."""
    return value.pin_memory() if isinstance(value, Tensor) and value.is_cpu else value


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
