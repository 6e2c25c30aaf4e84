"""A module mapped over chunks as ONE differentiable operation, in memory that does not grow with their number.

Forward: each chunk is loaded, run without a graph, and only its result is kept. Backward: each chunk is loaded and run
again with a graph, `torch.autograd.grad` takes its slice of the incoming gradient, and the sums over chunks are
returned once, as gradients of the inputs. DDP, accumulation, clipping, AMP and hooks see one ordinary operation.
Chunks whose activations fit a budget keep their graph and are not run again. `nested.py` builds on this what dense
heads need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigaxt.errors import ConfigError
from gigaxt.streaming.cuda_graphs import Recordings
from gigaxt.streaming.host_copies import offloaded
from gigaxt.streaming.keyed import keyed_by, region_keys
from gigaxt.streaming.known import Known, Look, Unchanged, known_of
from gigaxt.streaming.prefetch import form
from gigaxt.streaming.replay import (
    Aliases,
    Autocast,
    Saves,
    Sums,
    as_leaves,
    draw_seed,
    first_look,
    grad,
    gradient_of,
    one_pass,
    refuse_learning,
    refuse_unstreamable,
)
from gigaxt.streaming.rows import Budget, Joined, Reader, Reduce, Rows, Streaming, differentiable, join, merged

__all__ = ["Streaming", "stream"]

C = TypeVar("C")

WITHOUT_GRAPH = {"cuda": 4}
"""Type of device -> how many chunks are run as one batch where no autograd graph is made. Without a graph they need a
fraction of the memory, and on a GPU launching the kernels takes as long for four chunks as for one."""


def stream(
    module: nn.Module,
    load: Callable[[C], Any],
    chunks: Sequence[C],
    *,
    sliced: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    reduce: Reduce = "cat",
    seed: int | None = None,
    streaming: Streaming | None = None,
) -> Any:
    """Map `module` over `chunks`; gradients equal those of the whole batch at once, up to rounding.

    Args:
        module: called as `module(loaded, *slices, *shared)`; returns a tensor or a tuple of tensors. Rows (regions)
            must not influence each other.
        load: pure function from a chunk to the module's first argument: a tensor, or tensors nested in tuples, lists or
            dicts, all with one row a region. Called up to twice a chunk, in threads, ahead of its turn.
        chunks: any objects that `load` understands. One with an attribute `region_ids` keys its rows' dropout by them.
        sliced: tensors with one row a region; each chunk gets its own rows.
        shared: tensors that every chunk gets whole.
        reduce: "cat": outputs are joined along their first dimension, which must be a multiple of the chunk's rows.
            "sum": outputs are added up, in float32 or better.
        seed: of keyed dropout; None draws one from PyTorch's default generator.
        streaming: budgets; default: nothing kept. Its `chunk_regions` is not read here.

    Returns:
        What the module returns, joined or added. First derivatives only.

    Raises:
        ConfigError: BatchNorm in training mode, buffers, weights or pixels that are changed in place, global random
            state, FSDP, pixels that require grad, or a tensor that requires grad and is no input: each would make the
            gradient wrong.
    """
    chunks = list(chunks)
    if not chunks:
        raise ConfigError("stream: expected at least one chunk, got none")
    if reduce not in ("cat", "sum"):
        raise ConfigError(f"stream: reduce is 'cat' or 'sum', got {reduce!r}")
    job = _Job(module, load, chunks, reduce, draw_seed() if seed is None else seed, streaming or Streaming())
    inputs = _Inputs(tuple(module.parameters()), tuple(sliced), tuple(shared))
    if job.grad_enabled and job.streaming.budget_gib is None:
        outputs = job.run_ordinarily(inputs)
    elif job.grad_enabled and any(t.requires_grad for group in inputs for t in group):
        refuse_unstreamable(module)
        job.inputs_shape = inputs.shape
        job.known = known_of(module, job.autocast)
        if job.streaming.cuda_graphs and not shared:
            job.recordings = job.known.graphs
        outputs = _Stream.apply(job, *(t for group in inputs for t in group))
    else:
        with torch.no_grad():
            outputs = job.forward(inputs, training=False)
    return outputs[0] if job.single else tuple(outputs)


class _Inputs(NamedTuple):
    """The tensors that get gradients."""

    parameters: tuple[Tensor, ...]
    sliced: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.parameters), len(self.sliced), len(self.shared)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], shape: tuple[int, int, int]) -> _Inputs:
        p, n, _ = shape
        return cls(tuple(tensors[:p]), tuple(tensors[p : p + n]), tuple(tensors[p + n :]))


class _Run(NamedTuple):
    """One run of the module on some rows."""

    outputs: tuple[Tensor, ...]
    leaves: list[Tensor]
    """Stand-ins for the rows of the sliced and for the shared tensors."""
    saves: Saves | None = None
    """What the graph saved; counted at the first look only."""


class _Stream(torch.autograd.Function):
    """The job's two passes as one operation on parameters, sliced and shared tensors."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.job = job
        # Saved although the job holds aliases of them: so autograd notices a change in place between the passes.
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        outputs = job.forward(_Inputs.of(tensors, job.inputs_shape), training=True)
        job.unchanged = Unchanged(job.module)
        ctx.mark_non_differentiable(*(t for t in outputs if not differentiable(t)))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.job.backward(_Inputs.of(ctx.saved_tensors, ctx.job.inputs_shape), grads)


class _Job:
    """One streamed call: what both passes need, and what the first leaves for the second."""

    inputs_shape = (0, 0, 0)
    known: Known | None = None
    """Of the module; None: it is not asked for."""
    unchanged: Unchanged | None = None
    """Of the module, between the passes."""
    recordings: Recordings | None = None
    """CUDA graphs of the chunks that are not kept; None: these are run without."""

    def __init__(
        self,
        module: nn.Module,
        load: Callable[[Any], Any],
        chunks: Sequence[Any],
        reduce: Reduce,
        seed: int,
        streaming: Streaming,
    ) -> None:
        self.module, self.chunks, self.streaming = module, chunks, streaming
        first = next(module.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        self.reader = Reader(load, device, seed, streaming)
        self.grad_enabled, self.autocast = torch.is_grad_enabled(), Autocast.now(device)
        self.aliases = Aliases(module)
        self.joined = Joined(reduce)
        self.kept: dict[int, list[tuple[Rows, _Run]]] = {}
        """Graphs that wait for the backward pass, by chunk. A chunk is kept whole or not at all."""
        self.starts: list[int] = []
        self.first: Any = None
        """The first chunk's tensors on the device: the backward pass begins with them, while the next are read."""
        self.single = True

    def run_ordinarily(self, inputs: _Inputs) -> tuple[Tensor, ...]:
        """Ordinary autograd on the module's own parameters: it keeps everything, nothing is run again or refused."""

        def work(rows: Rows) -> tuple[Tensor, ...]:
            return self._as_tuple(self.module(rows.loaded, *rows.of(inputs.sliced), *inputs.shared))

        results = [result for rows in self.reader.rows(self.chunks) for result in self.reader.run(rows, work)]
        _check_rows(inputs.sliced, results[-1][0].stop)
        columns = zip(*(outputs for _, outputs in results), strict=True)
        return tuple(join(column, self.joined.reduce) for column in columns)

    @one_pass
    def forward(self, inputs: _Inputs, *, training: bool) -> tuple[Tensor, ...]:
        """Run all chunks; when training, keep the graphs that fit the budget."""
        on_cpu = self.reader.device.type == "cpu"
        device = Budget((self.streaming.budget_gib or 0) + (self.streaming.host_gib if on_cpu else 0))
        host = Budget(0 if on_cpu else self.streaming.host_gib)
        # Bytes that a region's graph saves, on the device and on the host. Counted on the first rows only, so that each
        # run keeps the same chunks.
        per_row: tuple[int, int] | None = None
        at_once = 1 if self.recordings is not None else WITHOUT_GRAPH.get(self.reader.device.type, 1)
        waiting: list[Rows] = []
        total = 0
        for i, rows in enumerate(self.reader.rows(self.chunks)):
            self.starts.append(rows.start)
            if i == 0 and self.grad_enabled:
                refuse_learning(rows)
            if training and i == 0:
                self.first = rows.loaded
                look_form = form([rows.loaded, *inputs.sliced, *inputs.shared])
                if self.known is not None and self.known.look is not None and self.known.look.form == look_form:
                    per_row, self.single = self.known.look.per_row, self.known.look.single
            look = training and per_row is None
            on_device = training and per_row is not None and device.take(per_row[0] * rows.count)
            on_host = training and per_row is not None and not on_device and host.take(per_row[1] * rows.count)
            total = rows.stop
            if not (look or on_device or on_host):
                waiting.append(rows)
                if len(waiting) == at_once:
                    self._run_waiting(waiting, inputs)
                continue
            self._run_waiting(waiting, inputs)
            keep = on_device or on_host
            work = partial(self._run_rows, inputs=inputs, graph=True, look=look, on_host=on_host, whole=rows.count)
            results = self.reader.run(rows, work)
            if look:
                per_row = _saved_per_row(*results[0])
                keep = len(results) == 1 and device.take(per_row[0] * rows.count)
                if self.known is not None:
                    self.known.look = Look(look_form, per_row, self.single)
            self._join(results, len(self.chunks))
            if keep:
                self.kept[i] = [(replace(part, loaded=None), result) for part, result in results]
            del results  # else its graph would stand beside the next chunk's; no other name may hold it either
        self._run_waiting(waiting, inputs)
        if self.recordings is not None:
            self.recordings.end_pass("outputs", len(self.chunks))
        _check_rows(inputs.sliced, total)
        return self.joined.results(total)

    def _run_waiting(self, waiting: list[Rows], inputs: _Inputs) -> None:
        """Run chunks of which nothing but the outputs is kept, and let them go."""

        def work(rows: Rows) -> _Run:
            return _Run(self._recorded("outputs", self._outputs, rows, inputs), [])

        for rows in merged(waiting):
            results = self.reader.run(rows, work)
            self._join(results, -(-len(self.chunks) // len(waiting)))
        waiting.clear()

    def _join(self, results: Sequence[tuple[Rows, _Run]], chunks: int) -> None:
        for part, result in results:
            self.joined.add(part, result.outputs, chunks)

    @one_pass
    def backward(self, inputs: _Inputs, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs for `grads` of the outputs."""
        if self.unchanged is not None:
            self.unchanged.check()
        sums = Sums([*inputs.parameters, *inputs.shared])
        slices = [torch.zeros_like(t) if t.requires_grad else None for t in inputs.sliced]
        missing = [i for i in range(len(self.chunks)) if i not in self.kept]
        known, self.first = self.first if missing[:1] == [0] else None, None
        reread = self.reader.rows([self.chunks[i] for i in missing], [self.starts[i] for i in missing], known)

        def gradients(rows: Rows, run: _Run | None = None) -> list[Tensor | None]:
            share = gradient_of(rows, grads, self.joined.per_row)
            if run is None:
                return list(self._recorded("gradients", self._gradients, rows, inputs, share))
            return grad(run.outputs, [*self.aliases, *run.leaves], share)

        p, n = len(inputs.parameters), len(inputs.sliced)
        for i in range(len(self.chunks)):  # in order, so that the sums do not depend on the budget
            if i in self.kept:
                found = []
                for rows, run in self.kept.pop(i):
                    with self.reader.keyed(rows):
                        found.append((rows, gradients(rows, run)))
                    del run
            else:
                found = self.reader.run(next(reread), gradients)
            while found:  # nothing of it may stand beside the next chunk's
                rows, gradient = found.pop(0)
                for whole, part in zip(slices, gradient[p : p + n], strict=True):
                    if whole is not None and part is not None:
                        rows.of([whole])[0].copy_(part)
                sums.add([*gradient[:p], *gradient[p + n :]])
                del rows, gradient
        if self.recordings is not None:
            self.recordings.end_pass("gradients", len(self.chunks))
        totals = sums.results()
        return [*totals[:p], *slices, *totals[p:]]

    def _recorded(
        self, name: str, work: Callable[..., Any], rows: Rows, inputs: _Inputs, share: Sequence[Tensor | None] = ()
    ) -> Any:
        """`work(rows, inputs, share)`, by a CUDA graph where there is one."""
        # Once memory was short, chunks are run in parts: a replay would overwrite the results of the part before.
        if self.recordings is None or self.streaming.most_regions is not None:
            return work(rows, inputs, share)

        def on(tensors: Any) -> Any:
            loaded, keys, sliced, share = tensors
            with keyed_by(keys):  # rows of their own, whose tensors begin with them
                return work(replace(rows, loaded=loaded, start=0), inputs._replace(sliced=tuple(sliced)), share)

        tensors = rows.loaded, region_keys(self.reader.device), rows.of(inputs.sliced), list(share)
        return self.recordings.run(name, on, tensors)

    def _outputs(self, rows: Rows, inputs: _Inputs, _: Any) -> tuple[Tensor, ...]:
        return self._run_rows(rows, inputs=inputs, graph=False).outputs

    def _gradients(self, rows: Rows, inputs: _Inputs, share: Sequence[Tensor | None]) -> list[Tensor | None]:
        run = self._run_rows(rows, inputs=inputs, graph=True)
        return grad(run.outputs, [*self.aliases, *run.leaves], share)

    def _run_rows(
        self, rows: Rows, *, inputs: _Inputs, graph: bool, look: bool = False, on_host: bool = False, whole: int = 0
    ) -> _Run:
        leaves = as_leaves([*rows.of(inputs.sliced), *inputs.shared])
        to_host = offloaded([*self.aliases, *leaves]) if on_host else nullcontext()
        with torch.set_grad_enabled(graph), to_host:
            if look:
                outputs, saves = first_look(self._call, self.aliases, rows, leaves)
                if rows.count < whole:  # memory is short: this part's graph must not stand beside the next one's
                    outputs = tuple(t.detach() for t in outputs)
                return _Run(outputs, leaves, saves)
            return _Run(self._call(self.aliases, rows, leaves), leaves)

    def _call(self, run: Callable[..., Any], rows: Rows, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with self.autocast.restored():
            return self._as_tuple(run(rows.loaded, *leaves))

    def _as_tuple(self, outputs: Any) -> tuple[Tensor, ...]:
        self.single = isinstance(outputs, Tensor)
        found = (outputs,) if self.single else outputs
        if not isinstance(found, tuple | list) or not all(isinstance(t, Tensor) for t in found):
            raise ConfigError(
                f"stream: the module returned {type(outputs).__name__}, expected a tensor or a tuple of them"
            )
        return tuple(found)


def _saved_per_row(rows: Rows, run: _Run) -> tuple[int, int]:
    """What a first look counted, a region: bytes on the device, and on the host."""
    assert run.saves is not None
    return -(-run.saves.bytes // rows.count), -(-run.saves.hosted // rows.count)


def _check_rows(sliced: Sequence[Tensor], rows: int) -> None:
    for t in sliced:
        if t.shape[0] != rows:
            raise ConfigError(f"stream: a sliced tensor has {t.shape[0]} rows, the chunks together have {rows}")
