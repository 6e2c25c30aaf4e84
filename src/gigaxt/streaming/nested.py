"""Encode all regions, join their tokens, decode each region with its context: one exact gradient, few passes.

`encode` and `decode` are streamed, `join` between them is ordinary autograd. Two operations stand in the graph:

    chunks -> [encode stage] -> tokens -> join -> context -> [decode stage] -> sums (a loss) or joined outputs

The decode stage's backward returns the gradient of the context and remembers that of its outputs; the encode stage's
backward, which autograd runs after it, takes the token and the decoder gradients of a chunk in one go. Passes over the
encoder, F forward and B backward, by what is kept of a chunk:

    its graph (device budget)                                 1F + 1B
    its feature maps, then their gradients (host budget)      2F + 1B
    nothing, and the loss is one linear sum (`linear`)        3F + 1B
    nothing                                                   4F + 1B
    an encoder that does not learn: 2F, or 3F where the loss is not linear; 1F where its feature maps are kept
    no gradient is wanted: 2F; 1F where the feature maps are kept (either budget)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gigaxt.errors import ConfigError
from gigaxt.streaming.known import Unchanged
from gigaxt.streaming.replay import (
    Aliases,
    Autocast,
    Sums,
    draw_seed,
    first_look,
    grad,
    gradient_of,
    one_pass,
    refuse_foreign_leaves,
    refuse_unstreamable,
)
from gigaxt.streaming.rows import Budget, Joined, Reader, Reduce, Rows, Streaming, differentiable, join
from gigaxt.streaming.turns import Decoded, Encoded, Maps, load_turn, make_turns

C = TypeVar("C")
TWICE = "expected one backward pass through a nested stream, got two: run the forward pass again"


def stream_nested(
    encode: nn.Module,
    join_tokens: Callable[[Tensor], Tensor],
    decode: nn.Module,
    load: Callable[[C], Any],
    chunks: Sequence[C],
    *,
    load_targets: Callable[[C], Any] | None = None,
    reduce: Reduce = "sum",
    linear: bool = False,
    seed: int | None = None,
    streaming: Streaming | None = None,
) -> tuple[Tensor, ...]:
    """Map regions through `encode`, all tokens through `join`, regions with their context through `decode`.

    Args:
        encode: called as `encode(loaded)`, returns (tokens, feature maps): a tensor and a tuple of tensors, all with
            one row a region.
        join_tokens: from the tokens of all regions to their context, one row a region. Run once, by ordinary autograd.
        decode: called as `decode(maps, context_rows, loaded_targets)`, returns a tuple of tensors.
        load: as in `stream`; what `encode` takes.
        chunks: as in `stream`.
        load_targets: the same for what `decode` takes; None: it gets None.
        reduce: of decode's outputs, as in `stream`.
        linear: promise that only the first of the outputs, a scalar sum, is differentiated. Its gradient with respect
            to the context is then taken in the forward pass already, which saves a pass over the encoder.
        seed: of keyed dropout; None draws one from PyTorch's default generator.
        streaming: budgets; `budget_gib` for graphs (without gradients for feature maps), `host_gib` for feature maps.

    Raises:
        ConfigError: as `stream`.
    """
    chunks = list(chunks)
    if not chunks:
        raise ConfigError("stream_nested: expected at least one chunk, got none")
    if linear and reduce != "sum":
        raise ConfigError("stream_nested: `linear` means one sum; it needs reduce='sum'")
    seed = draw_seed() if seed is None else seed
    job = _Job(encode, decode, load, load_targets, chunks, reduce, linear, seed, streaming or Streaming())
    parameters = [*encode.parameters(), *decode.parameters()]
    if not torch.is_grad_enabled():
        tokens = job.encode_all(training=False)
        return job.decode_all(join_tokens(tokens), training=False)
    if job.streaming.budget_gib is None:
        return job.run_ordinarily(join_tokens)
    refuse_unstreamable(encode)
    refuse_unstreamable(decode)
    tokens, link = _Encode.apply(job, *parameters)
    return tuple(_Decode.apply(job, join_tokens(tokens), link))


class _Encode(torch.autograd.Function):
    """All tokens. Its inputs are the parameters of both modules, whose gradients it returns."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.job = job
        ctx.save_for_backward(*parameters)  # so that a change in place between the passes is noticed
        ctx.set_materialize_grads(False)
        # The link makes the decode stage depend on this one even where `join` cuts the tokens' gradient.
        return job.encode_all(training=True), torch.zeros((), device=job.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tokens_grad: Tensor | None, link_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if a parameter was changed in place
        return None, *ctx.job.encode_backward(tokens_grad)


class _Decode(torch.autograd.Function):
    """Outputs of all chunks, from the context."""

    @staticmethod
    def forward(ctx: Any, job: _Job, context: Tensor, link: Tensor) -> tuple[Tensor, ...]:
        ctx.job, ctx.link = job, link
        ctx.save_for_backward(context)
        ctx.set_materialize_grads(False)
        outputs = job.decode_all(context, training=True)
        blocked = outputs[1:] if job.linear else outputs
        ctx.mark_non_differentiable(*(t for t in blocked if job.linear or not differentiable(t)))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if the context was changed in place
        return None, ctx.job.decode_backward(grads), torch.zeros_like(ctx.link)


class _Job:
    """One nested stream: what all four passes need, and what each leaves for the next."""

    def __init__(
        self,
        encode: nn.Module,
        decode: nn.Module,
        load: Callable[[Any], Any],
        load_targets: Callable[[Any], Any] | None,
        chunks: Sequence[Any],
        reduce: Reduce,
        linear: bool,
        seed: int,
        streaming: Streaming,
    ) -> None:
        self.chunks, self.linear, self.streaming = chunks, linear, streaming
        parameters = (*encode.parameters(), *decode.parameters())
        self.device = parameters[0].device if parameters else torch.device("cpu")
        # Not a method of this object: in a cycle it would keep tokens, gradients and open files until the next
        # garbage collection.
        self.reader = Reader(partial(load_turn, load, load_targets), self.device, seed, streaming)
        self.autocast = Autocast.now(self.device)
        self.encode, self.decode = Aliases(encode), Aliases(decode)
        self.encode_learns = any(p.requires_grad for p in self.encode)
        """If not, no chunk is encoded again for its gradients, and none are taken of the feature maps."""
        self.tokens, self.outputs = Joined("cat"), Joined(reduce)
        self.counts: list[int] = []
        self.kept: dict[int, Encoded] = {}
        self.decode_sums = Sums(list(self.decode))
        """Gradients of the decoder from the chunks in `kept`; the others' come with the encoder's."""
        self.context: Tensor
        self.unchanged: Unchanged
        self.context_grad: Tensor | None = None
        self.output_grads: Sequence[Tensor | None] | None = None
        self.done = False
        """Whether `encode_backward` has run."""

    def run_ordinarily(self, join_tokens: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Ordinary autograd on the modules' own parameters, which keeps everything."""
        encoded: list[tuple[Tensor, Maps]] = []
        for rows in self._rows(lambda i: (True, False)):
            self.counts.append(rows.count)
            encoded += [found for _, found in self.reader.run(rows, lambda part: self.encode.module(part.loaded[0]))]
        context = join_tokens(join([tokens for tokens, _ in encoded], "cat"))
        maps = [join(column, "cat") for column in zip(*(maps for _, maps in encoded), strict=True)]
        del encoded  # else each map would be there twice, by chunk and joined

        def decode(part: Rows) -> tuple[Tensor, ...]:
            return tuple(self.decode.module(tuple(part.of(maps)), part.of([context])[0], part.loaded[1]))

        results = [
            outputs for rows in self._rows(lambda i: (False, True)) for _, outputs in self.reader.run(rows, decode)
        ]
        return tuple(join(column, self.outputs.reduce) for column in zip(*results, strict=True))

    @one_pass
    def encode_all(self, *, training: bool) -> Tensor:
        """The tokens of all regions; graphs or feature maps are kept where they fit."""
        device, host = Budget(self.streaming.budget_gib or 0), Budget(self.streaming.host_gib)
        graph_bytes = 0  # what a region's graph saves; from the first rows, so the same in every run
        for i, rows in enumerate(self._rows(lambda i: (True, False))):
            self.counts.append(rows.count)
            look = training and i == 0
            graph = training and self.encode_learns and not look and device.take(graph_bytes * rows.count)
            work = partial(self._encode_rows, graph=graph or look, look=look, whole=rows.count)
            results = self.reader.run(rows, work)
            part, (tokens, maps, saved) = results[0]
            if look:
                graph_bytes = -(-saved // part.count)
                graph = self.encode_learns and device.take(graph_bytes * rows.count)
            for part, found in results:
                self.tokens.add(part, [found[0]], len(self.chunks))
            whole = len(results) == 1  # else the device is out of memory: nothing is kept there
            size = sum(t.nbytes for t in maps)
            on_device = whole and not (training and self.encode_learns) and device.take(size)
            if whole and graph:
                self.kept[i] = Encoded(rows.start, tokens, maps)
            elif on_device or (whole and host.take(size)):
                self.kept[i] = Encoded(
                    rows.start, None, tuple(t.detach() if on_device else t.detach().cpu() for t in maps)
                )
            del results, tokens, maps, found  # else their graph would stand beside the next chunk's
        return self.tokens.results(sum(self.counts))[0]

    @one_pass
    def decode_all(self, context: Tensor, *, training: bool) -> tuple[Tensor, ...]:
        """The outputs; when training a linear loss its gradients too, for an incoming gradient of one."""
        if context.shape[0] != sum(self.counts):
            raise ConfigError(f"join_tokens: expected {sum(self.counts)} rows, one a region, got {context.shape[0]}")
        self.context = context.detach()
        unit = [context.new_ones((), dtype=torch.float64)] if training and self.linear else None
        for part, decoded in self._decode_stage(unit, check=training):
            self.outputs.add(part, decoded.outputs, len(self.chunks))
        self.unchanged = Unchanged(self.encode.module, self.decode.module)
        return self.outputs.results(sum(self.counts))

    @one_pass
    def decode_backward(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of the context. Those of the outputs are remembered for `encode_backward`."""
        if self.output_grads is not None:
            raise RuntimeError(TWICE)
        self.unchanged.check()
        self.output_grads = grads
        if not self.linear:
            for _ in self._decode_stage(grads):
                pass
        # Not held here as well: it would lie beside the whole backward pass of `join_tokens`.
        context_grad, self.context_grad = self.context_grad, None
        assert context_grad is not None
        scale = self._scale(grads)
        return context_grad if scale is None else context_grad.mul_(scale.to(context_grad.dtype))

    @one_pass
    def encode_backward(self, tokens_grad: Tensor | None) -> list[Tensor | None]:
        """Gradients of the parameters of both modules."""
        self.unchanged.check()
        if self.output_grads is None:  # only tokens were differentiated: `join_tokens` may give them away
            self.decode_backward(())
        grads = self.output_grads or ()
        if self.done:
            raise RuntimeError(TWICE)
        scale = self._scale(grads)
        encode_sums, decode_sums = Sums(list(self.encode)), self.decode_sums
        if scale is not None:
            decode_sums.scale(scale)
        if self.encode_learns:
            self._sum_gradients(tokens_grad, grads, scale, encode_sums)
        # The graph of the loss holds this job for as long as somebody holds the loss: into the next step, in a loop.
        self.kept, self.output_grads, self.done = {}, (), True
        del self.context, self.decode_sums
        return [*encode_sums.results(), *decode_sums.results()]

    def _scale(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """What the gradients of a linear loss, taken for an incoming one of 1, are multiplied with; None: nothing."""
        if not self.linear:
            return None
        return torch.zeros((), device=self.device) if not grads or grads[0] is None else grads[0]

    def _sum_gradients(
        self, tokens_grad: Tensor | None, grads: Sequence[Tensor | None], scale: Tensor | None, encode_sums: Sums
    ) -> None:
        """One backward pass through the encoder, chunk by chunk; `scale` is still missing in what `kept` holds."""
        p = len(encode_sums.like)
        loads = self._rows(self._missing_for_gradients)
        for i, rows in enumerate(loads):
            kept = self.kept.pop(i, None)
            if kept is not None:
                columns = zip(*kept.map_grads, strict=True)
                whole = [torch.cat(column).to(self.device) for column in columns]
                kept.map_grads = [tuple(g if scale is None else g * scale.to(g.dtype) for g in whole)]
            work = partial(self._gradients, kept=kept, tokens_grad=tokens_grad, grads=grads)
            if kept is not None and kept.tokens is not None:
                with self.reader.keyed(rows):
                    parts = [(rows, work(rows))]
            else:
                parts = self.reader.run(rows, work)
            for _, found in parts:
                encode_sums.add(found[:p])
                self.decode_sums.add(found[p:])
            del parts, found, kept, work

    def _encode_rows(self, rows: Rows, *, graph: bool, look: bool = False, whole: int = 0) -> tuple[Tensor, Maps, int]:
        saved = 0
        with torch.set_grad_enabled(graph):
            if look:
                (tokens, *maps), saves = first_look(self._call_encode, self.encode, rows, [])
                saved = saves.bytes
            else:
                tokens, *maps = self._call_encode(self.encode, rows, [])
        if rows.count < whole:  # memory is short: nothing is kept, and no graph stands beside the next part's
            return tokens.detach(), tuple(t.detach() for t in maps), saved
        return tokens, tuple(maps), saved

    def _call_encode(self, run: Callable[..., Any], rows: Rows, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with self.autocast.restored():
            tokens, maps = run(rows.loaded[0])
        return tokens, *maps

    def _decode_stage(
        self, grads: Sequence[Tensor | None] | None, *, check: bool = False
    ) -> Iterator[tuple[Rows, Decoded]]:
        """Decode all chunks; with `grads` of the outputs, take those of the context and of what is in `kept`."""
        context_grad = self.context_grad = None if grads is None else torch.zeros_like(self.context)
        for i, rows in enumerate(self._rows(lambda i: (i not in self.kept, True))):
            kept = self.kept.get(i)
            for part, decoded in self.reader.run(rows, partial(self._decode_rows, kept=kept, grads=grads, check=check)):
                check = False
                if context_grad is not None and decoded.context_grad is not None:
                    part.of([context_grad])[0].copy_(decoded.context_grad)
                if kept is not None and grads is not None:
                    kept.map_grads.append(decoded.map_grads)
                if decoded.parameter_grads:
                    self.decode_sums.add(decoded.parameter_grads)
                yield part, decoded
            if kept is not None and kept.tokens is None and grads is not None:
                kept.maps = ()  # their gradients have taken their place

    def _decode_rows(
        self, rows: Rows, *, kept: Encoded | None, grads: Sequence[Tensor | None] | None, check: bool
    ) -> Decoded:
        if kept is None:
            maps = self._encode_rows(rows, graph=False)[1]
        else:
            start = rows.start - kept.start
            maps = tuple(t.detach()[start : start + rows.count].to(self.device) for t in kept.maps)
        (context,) = rows.of([self.context])
        run = self.decode.call_checked if check else self.decode
        if grads is None:
            return Decoded(self._call_decode(run, maps, context, rows))
        flows = kept is not None and self.encode_learns
        maps = tuple(t.requires_grad_(flows and differentiable(t)) for t in maps)
        context = context.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self._call_decode(run, maps, context, rows)
        if rows.start == 0:
            refuse_foreign_leaves(outputs, [*self.decode, context, *maps])
        share = gradient_of(rows, [*grads, *[None] * (len(outputs) - len(grads))], self.outputs.per_row)
        # Else they come with the encoder's, in one pass.
        parameters = list(self.decode) if kept is not None or not self.encode_learns else []
        found = grad(outputs, [context, *maps, *parameters], share)
        if kept is None or not flows:
            return Decoded(tuple(t.detach() for t in outputs), found[0], (), found[1 + len(maps) :])
        flowed = [torch.zeros_like(t) if g is None else g for t, g in zip(maps, found[1:], strict=False)]
        map_grads = tuple(g.to(t.device) for g, t in zip(flowed, kept.maps, strict=True))
        return Decoded(tuple(t.detach() for t in outputs), found[0], map_grads, found[1 + len(maps) :])

    def _call_decode(self, run: Callable[..., Any], maps: Maps, context: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        with self.autocast.restored():
            return tuple(run(maps, context, rows.loaded[1]))

    def _gradients(
        self, rows: Rows, *, kept: Encoded | None, tokens_grad: Tensor | None, grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of both modules' parameters: one backward through the encoder."""
        share = gradient_of(rows, [tokens_grad], self.tokens.per_row)
        nothing: list[Tensor | None] = [None] * len(self.decode_sums.like)
        if kept is not None and kept.tokens is not None:
            return [*grad((kept.tokens, *kept.maps), list(self.encode), [*share, *kept.map_grads[0]]), *nothing]
        tokens, maps, _ = self._encode_rows(rows, graph=True)
        if kept is not None:
            start = rows.start - kept.start
            flowed = [g[start : start + rows.count] for g in kept.map_grads[0]]
            return [*grad((tokens, *maps), list(self.encode), [*share, *flowed]), *nothing]
        (context,) = rows.of([self.context])
        with torch.enable_grad():
            outputs = self._call_decode(self.decode, maps, context, rows)
        share += gradient_of(rows, grads or [None] * len(outputs), self.outputs.per_row)
        return grad((tokens, *outputs), [*self.encode, *self.decode], share)

    def _missing_for_gradients(self, i: int) -> tuple[bool, bool]:
        kept = self.kept.get(i)
        return kept is None or kept.tokens is None, kept is None

    def _rows(self, wanted: Callable[[int], tuple[bool, bool]]) -> Iterator[Rows]:
        """All chunks, with (pixels, targets) loaded as `wanted` says."""
        return self.reader.rows(make_turns(self.chunks, self.counts, wanted))
