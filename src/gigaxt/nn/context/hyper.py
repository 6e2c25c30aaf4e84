"""HyperAttention: softmax attention at linear cost, approximated by sorted blocks and a sample (Han et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.context.attention import AttentionContext, HeadByHead, attention_heads
from gigaxt.nn.context.base import ContextConfig, check_least
from gigaxt.nn.context.layered import Mixer
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import Places
from gigaxt.nn.context.positions import rotary_angles, rotate
from gigaxt.streaming.recurrence import State
from gigaxt.streaming.rows import at_least_float32

DRAW_STEPS = 2**24
"""Resolution of the draws. They are kept as integers, which `model.to(torch.bfloat16)` does not round."""

AT_ONCE = 2**22
"""Most numbers of keys that are copied for blocks at once: on a CPU, memory above 32 MiB is mapped anew each time."""


@dataclass(kw_only=True)
class HyperOptions:
    """`context.options` of `kind: hyper`."""

    block: int = 256
    """Tokens in a block of the sorted order; a query looks at all keys of its block."""
    samples: int = 256
    """Keys of the whole scene that all queries of a head look at besides."""
    hashes: int = 7
    """Random directions of the hash; `2**hashes` buckets."""
    exact_below: int = 4096
    """Scenes of up to this many tokens get exact attention, as in the authors' code: it has no error, and a layer costs
    at most 2.4 times as much (at 4,096 tokens, `dim=192`, CPU)."""

    def __post_init__(self) -> None:
        check_least("context.options", self, block=1, samples=1, hashes=1, exact_below=0)
        if self.hashes > 32:
            raise ConfigError(f"context.options.hashes: expected at most 32, got {self.hashes}")


class HyperAttention(AttentionContext):
    """Softmax attention in which a query sees the keys most like it and a sample of all (Han et al. 2023, 2310.05869).

    In each head, queries and keys are sorted by an angular hash. A query looks at the block of keys at its own place
    in that order, and at `samples` keys drawn from the whole scene, each of which stands for `n / samples` keys, in
    one softmax. Scenes of up to `exact_below` tokens get exact attention. Positions are 2-D rotary.

    As in the paper: the hash, its order, the blocks, the even sample, and that a sampled key of the query's own block
    is not counted again (the authors' and xT's code forget it), so that the softmax's sums over all keys are estimated
    without bias. Ours: the sample is spread over the sorted order, one key from each of as many equal pieces, which
    has the smaller variance and becomes exact once all keys are sampled; the last block reaches back rather than be
    padded; the gradient goes through the whole softmax. Directions and draws are made at construction and saved with
    the model. So a model gives the same answer always, and each row of a batch the one that it gets alone. But buckets
    have edges: rounding (bfloat16, another device) can move a token to the next one, and then changes its result by as
    much as the approximation errs.

    Error of the output against exact attention (relative Frobenius norm, 8,192 / 16,384 tokens; the mean of all values
    in place of attention errs by 0.99 on clustered and 0.80 on random keys; `benchmarks/bench_hyper_error.py`):

    | keys                                       | samples 256 | samples 1024 |
    |--------------------------------------------|-------------|--------------|
    | 64 clusters, values alike within a cluster | 0.37 / 0.44 | 0.19 / 0.22  |
    | 64 clusters, values unrelated              | 3.8 / 6.3   | 1.9 / 3.2    |
    | random                                     | 5.3 / 7.4   | 2.5 / 3.8    |

    Cost per token: `4 * dim**2` multiplications in projections and `2 * dim * (block + samples + hashes)` in the
    attention, whatever the number of tokens. Memory: forward and backward together peak at
    `2 * depth + 4.2 + 13 / heads` token stores above the tokens in float32 (measured; one head at a time is at work),
    and at about four more in bfloat16, as a head normalises all tokens in float32.
    Reach without the summary path: the whole scene, but beyond `exact_below` tokens not from each token to each: in a
    layer's head a token reaches the queries of its block, wherever they lie, and all queries if it is sampled.
    Choose it to compare with published results, or where tokens fall into groups that look for their like. Where
    attention is spread over many unlike tokens the sample's noise exceeds what it estimates: choose `mamba2`.
    """

    options_class = HyperOptions

    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """See `LayeredContext.build_mixer`."""
        options = from_dict(HyperOptions, config.options, "context.options")
        return HyperMixer(config.dim, attention_heads(config), options, gain)


class HyperMixer(Mixer):
    """Adds what HyperAttention found to the tokens.

    Args:
        dim: width of the tokens.
        heads: of the attention; each has directions and draws of its own.
        options: of the kind.
        gain: of the last projection at the start.
    """

    directions: Tensor
    """(heads, head_dim, hashes) of the hash."""
    draws: Tensor
    """(heads, samples) int64 in [0, DRAW_STEPS): which keys are sampled; see `sample_places`."""

    def __init__(self, dim: int, heads: int, options: HyperOptions, gain: float) -> None:
        super().__init__()
        self.options = options
        self.attention = HeadByHead(dim, heads, gain)
        self.register_buffer("directions", torch.randn(heads, dim // heads, options.hashes))
        self.register_buffer("draws", torch.randint(DRAW_STEPS, (heads, options.samples)))

    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """See `Mixer`."""
        counts: list[int] = places.valid.sum(dim=1).tolist() if places.ragged else []

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
            turn = rotary_angles(places.coords, q.shape[-1])  # made here, so that nothing is kept of it
            q, k = rotate(q, *turn), rotate(k, *turn)
            if not counts:
                return self._attend(heads, q, k, v)
            # Row by row, each at its own length: masked tokens are not there, and a row gets what it gets alone.
            found = [self._attend(heads, *(t[b : b + 1, :, :n] for t in (q, k, v))) for b, n in enumerate(counts)]
            return torch.cat([F.pad(t, (0, 0, 0, q.shape[2] - t.shape[2])) for t in found])

        return self.attention(x, attend, run), global_tokens, None

    def _attend(self, heads: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, h, n, head_dim) of valid tokens only -> likewise."""
        if q.shape[2] <= self.options.exact_below:
            return F.scaled_dot_product_attention(q, k, v)
        return hyper_attention(q, k, v, self.directions[heads], self.draws[heads], self.options.block)


def hyper_attention(q: Tensor, k: Tensor, v: Tensor, directions: Tensor, draws: Tensor, block: int) -> Tensor:
    """Approximate softmax attention over blocks of similar tokens and a sample of the rest.

    Args:
        q: queries (batch, heads, n, head_dim).
        k: keys, likewise.
        v: values, likewise.
        directions: (heads, head_dim, hashes).
        draws: (heads, samples) int64 in [0, DRAW_STEPS).
        block: tokens in a block.

    Returns:
        (batch, heads, n, head_dim).
    """
    batch, _, n, _ = q.shape
    block = min(block, n)
    # The last block reaches back to be as long as the others: no query has fewer keys, and nothing is padded.
    starts = (torch.arange(-(-n // block), device=q.device) * block).clamp(max=n - block)
    members = starts.unsqueeze(-1) + torch.arange(block, device=q.device)  # (blocks, block)
    sampled = sample_places(draws, n)  # (heads, samples)
    bias = score_bias(starts, block, sampled, n, q.dtype)  # (heads, blocks, 1, block + samples)
    query_order, key_order = hash_order(q, directions), hash_order(k, directions)  # (batch, heads, n)
    key_samples = key_order.gather(2, sampled.expand(batch, -1, -1))  # (batch, heads, samples)

    queries, keys, values = (
        # (batch, heads, blocks, block, head_dim) -> (batch * heads, blocks, block, head_dim); kernels know four axes
        _take(x, order[..., members]).flatten(0, 1)
        for x, order in ((q, query_order), (k, key_order), (v, key_order))
    )
    # (batch * heads, 1, samples, head_dim)
    sampled_keys, sampled_values = (_take(x, key_samples).flatten(0, 1).unsqueeze(1) for x in (k, v))
    count = max(1, AT_ONCE // (len(keys) * bias.shape[-1] * q.shape[-1]))
    groups = zip(*(t.split(count, dim=1) for t in (queries, keys, values, bias.repeat(batch, 1, 1, 1))), strict=True)
    found = torch.cat(
        [
            F.scaled_dot_product_attention(
                some, _with(own, sampled_keys), _with(of_own, sampled_values), attn_mask=added
            )
            for some, own, of_own, added in groups
        ],
        dim=1,
    )
    # (batch * heads, blocks, block, head_dim) -> (batch, heads, blocks * block, head_dim)
    found = found.unflatten(0, (batch, -1)).flatten(2, 3)
    # Tokens of the last block lie at its end, behind those that it reached back for.
    place = torch.arange(n, device=q.device)
    row = place + (place >= (len(starts) - 1) * block) * (len(starts) * block - n)
    return _take(found, torch.empty_like(query_order).scatter_(2, query_order, row.expand_as(query_order)))


def _with(own: Tensor, sampled: Tensor) -> Tensor:
    """The sampled keys behind those of each block: (batch * heads, blocks, block + samples, head_dim)."""
    return torch.cat((own, sampled.expand(-1, own.shape[1], -1, -1)), dim=2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of `x` (batch, heads, n, head_dim) at `index` (batch, heads, ...) -> (batch, heads, ..., head_dim)."""
    batch, heads, n, _ = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    # index_select on (batch * heads * n, head_dim): eight times as fast as gather on a CPU.
    found: Tensor = x.flatten(0, 2).index_select(0, (index.flatten(2) + first).flatten())
    return found.view(*index.shape, x.shape[-1])


@torch.no_grad()
def hash_order(x: Tensor, directions: Tensor) -> Tensor:
    """Tokens (batch, heads, n, head_dim) sorted by angular hash, equal ones as they come: (batch, heads, n) int64.

    The hash says on which side of each direction's plane a token lies. It is read as a Gray code, so that buckets
    next to each other in the order differ in one side only.
    """
    dtype = at_least_float32(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        sides = x.to(dtype) @ directions.to(dtype) > 0  # (batch, heads, n, hashes)
    bucket = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    bit = torch.zeros_like(bucket, dtype=torch.bool)
    for side in sides.unbind(-1):  # Gray code to number: each bit is the parity of the sides so far
        bit = bit ^ side
        bucket = 2 * bucket + bit
    return bucket.argsort(dim=-1, stable=True)


def sample_places(draws: Tensor, n: int) -> Tensor:
    """Places in the keys' sorted order of those that are sampled: (heads, min(samples, n)) int64 in [0, n).

    The order is cut into equal pieces, one a sample, and each piece gives one key. So every key is drawn `samples / n`
    times on average, similar keys in proportion to their number, and each key once if there are no more than samples.
    """
    count = min(draws.shape[1], n)
    within = draws[:, :count].double() / DRAW_STEPS  # float64 is exact enough never to round up to the next piece
    return ((torch.arange(count, device=draws.device) + within) * (n / count)).long()


def score_bias(starts: Tensor, block: int, sampled: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of each block's keys and of the samples: (heads, blocks, 1, block + samples).

    A sample stands for `n / samples` keys; one that lies in the query's own block, where it is seen already, for none.
    """
    log_weight = math.log(n / sampled.shape[1])
    # In bfloat16 the weight would be off by up to 3%: what rounding takes from the samples' side goes to the block's.
    rounded = torch.tensor(log_weight, dtype=dtype).item()
    places = sampled.unsqueeze(1)  # (heads, 1, samples)
    own = (places >= starts.unsqueeze(-1)) & (places < starts.unsqueeze(-1) + block)  # (heads, blocks, samples)
    of_samples = torch.full(own.shape, rounded, dtype=dtype, device=own.device).masked_fill_(own, -math.inf)
    return F.pad(of_samples, (block, 0), value=rounded - log_weight).unsqueeze(2)
