"""Modules over any number of chunks as one differentiable operation: exact gradients in bounded memory.

- `single.py`: one module over chunks, each region on its own: `stream`.
- `nested.py`: encode all, join their tokens, decode all: `stream_nested`.
- `recurrence.py`: a recurrence over segments of tokens: `scan`.

What they share: `rows.py` (settings; chunks as rows of the whole stream), `turns.py` (chunks that come more than once),
`prefetch.py` (read ahead in threads), `replay.py` (a module run again, and what would make that wrong), `known.py`
(what earlier steps found out about a module), `keyed.py` (dropout that depends on the region), `cuda_graphs.py` (a
chunk's kernels launched at once), `host_copies.py` (tensors that wait on the host), `untraced.py`.
"""

from __future__ import annotations

from gigaxt.streaming.nested import stream_nested
from gigaxt.streaming.recurrence import scan
from gigaxt.streaming.rows import Streaming
from gigaxt.streaming.single import stream

__all__ = ["Streaming", "scan", "stream", "stream_nested"]
