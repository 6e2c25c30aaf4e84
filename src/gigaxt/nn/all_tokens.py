"""The tokens of all regions of a batch: with the exact gradient, with that of a share of the regions, or without any.

The ordinary way streams the region encoder (`gigaxt.stream`). A frozen encoder needs no second pass, and its features
may come from a cache. `grad_share` lets the gradient through a random share of the regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gigaxt.nn.layout import in_order
from gigaxt.nn.stages import Features, RegionTokens, TokensOnly
from gigaxt.scenes.batch import SceneBatch
from gigaxt.streaming.rows import Streaming
from gigaxt.streaming.single import stream
from gigaxt.token_cache import TokenCache


def all_tokens(
    encode: RegionTokens,
    batch: SceneBatch,
    rows: Sequence[int],
    *,
    seed: int,
    streaming: Streaming,
    grad_share: float = 1.0,
    cache: TokenCache | None = None,
) -> Tensor:
    """Tokens of regions, (len(rows), t * t, dim).

    Args:
        encode: what regions go through.
        batch: whose regions.
        rows: which of them, in rising order; whole scenes where there is a cache.
        seed: of keyed dropout, and of the draw of `grad_share`.
        streaming: chunk size and budgets.
        grad_share: of the regions, those that the encoder's gradient comes from.
        cache: of a frozen encoder's features.
    """
    if encode.frozen:
        return encode.embed(frozen_features(encode, batch, rows, streaming, cache), batch.levels_of(rows))
    if grad_share < 1 and torch.is_grad_enabled():
        return _with_shared_gradient(encode, batch, rows, seed, streaming, grad_share)
    chunks = batch.picked(rows, streaming.chunk_regions)
    found: Tensor = stream(TokensOnly(encode), batch.load, chunks, seed=seed, streaming=streaming)
    return found


def frozen_features(
    encode: RegionTokens, batch: SceneBatch, rows: Sequence[int], streaming: Streaming, cache: TokenCache | None
) -> Tensor:
    """What a frozen encoder makes of regions, (len(rows), t * t, encoder.dim), each computed once."""
    if cache is None:
        return _features(encode, batch, rows, streaming)
    place = {row: i for i, row in enumerate(rows)}
    parts, order = [], []
    for s in range(len(batch.scenes)):
        own = [row for row in batch.rows_of(s).tolist() if row in place]
        if not own:
            continue
        path = cache.path(encode, batch, s, own)
        known = None if path is None else cache.get(path, len(own))
        if known is None:
            features = _features(encode, batch, own, streaming)
            if path is not None:
                cache.put(path, features, batch.token_validity[own])
        else:
            features, batch.token_validity[own] = known
        parts.append(features.to(next(encode.parameters()).device))
        order += [place[row] for row in own]
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    places = torch.tensor(order)
    return found if in_order(places) else found[places.argsort()]


def _features(encode: RegionTokens, batch: SceneBatch, rows: Sequence[int], streaming: Streaming) -> Tensor:
    with torch.no_grad():
        chunks = batch.picked(rows, streaming.chunk_regions)
        found: Tensor = stream(Features(encode), batch.load, chunks, seed=0, streaming=streaming)
    return found


def _with_shared_gradient(
    encode: RegionTokens, batch: SceneBatch, rows: Sequence[int], seed: int, streaming: Streaming, share: float
) -> Tensor:
    """All tokens; the gradient flows through some regions, n / k times as strong: its mean over draws is the exact one.

    The draw depends on the seed and the number of regions alone, so neither on the chunk size nor on what is kept.
    """
    n = len(rows)
    k = max(1, round(share * n))
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed % 2**63))
    learning, rest = drawn[:k].sort().values, drawn[k:].sort().values
    tokens_only, parts = TokensOnly(encode), []
    for places in (rest, learning):
        chunks = batch.picked([rows[i] for i in places.tolist()], streaming.chunk_regions)
        if chunks:
            with torch.set_grad_enabled(places is learning):
                parts.append(stream(tokens_only, batch.load, chunks, seed=seed, streaming=streaming))
    if parts[-1].requires_grad:  # not where only context and head learn
        parts[-1].register_hook(lambda gradient: gradient * (n / k))
    return torch.cat(parts)[torch.cat([rest, learning]).argsort()]
