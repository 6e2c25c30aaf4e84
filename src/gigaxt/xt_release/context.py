"""The release's context encoder: a class token behind the tokens of the scene, and what it has seen of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, ContextEncoder, ContextState, NoContext, register_context
from gigaxt.nn.context.ordering import find_places
from gigaxt.xt_release.layers import AttentionLayer, MambaLayer

KIND = "xt_release"
POOLED_KIND = "xt_release_pooled"


@dataclass(kw_only=True)
class ReleaseOptions:
    """`context.options` of `kind: xt_release`."""

    attention: Literal["hyper", "naive", "mamba"] = "hyper"
    """hyper: causal, heads of 128 channels; naive: one head a channel, not causal (Q5); mamba: directions take turns"""
    window: int = 0
    """tokens that a class token sees at once; 0: all. The answers of all windows are averaged (Q14)"""

    def __post_init__(self) -> None:
        if self.window < 0 or self.window == 1:
            raise ConfigError(f"context.options.window: expected 0 (all tokens) or at least 2, got {self.window}")
        if self.window and self.attention == "mamba":
            raise ConfigError("context.options.window: the release's Mamba has no windows (Q14); set 0")


class ReleasedContext(ContextEncoder):
    """What the published models with `cls_head: xl` do between region encoder and classifier.

    Tokens of the whole scene in raster order, sine-cosine positions added, the class token last; `depth` layers; the
    class token is the answer, so other than the kinds of `gigaxt.nn.context` this one returns (batch, 1, dim). With
    `attention: hyper` a token is told of those before it only (Q2). The release computes that exactly for up to 8,190
    tokens and beyond that by random sampling, with other logits in every process (Q11); here it is exact throughout.

    Not in the release: scenes that are not square, and masked tokens, which are simply left out.

    Cost per token and layer: `12 * dim**2` multiplications and `dim * tokens` in the attention (Mamba: about
    `7 * dim**2`); the last attention layer computes the class token only. Batches of more than `config.keep_tokens`
    tokens keep one token store a layer and compute the rest again in the backward pass; `segment` and `budget_gib` are
    not read.
    """

    options_class = ReleaseOptions

    def __init__(self, config: ContextConfig) -> None:
        super().__init__(config)
        options = from_dict(ReleaseOptions, config.options, "context.options")
        self.window = options.window
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        nn.init.normal_(self.cls_token, std=1e-6)
        self.layers = nn.ModuleList(
            MambaLayer(config.dim, reverse=i % 2 == 0)
            if options.attention == "mamba"
            else AttentionLayer(config.dim, round(config.dim * config.mlp_ratio), causal=options.attention == "hyper")
            for i in range(config.depth)
        )

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`. What the release fixes must be said as it is."""
        super().check_config(config)
        attention = config.options.get("attention", "hyper")
        fixed = {
            "summary": 0,
            "order": "raster",
            "alternate": False,
            "heads": None,
            "bidirectional": attention != "hyper",
        }
        for name, value in fixed.items():
            if getattr(config, name) != value:
                raise ConfigError(f"context.{name}: {KIND} has {value!r}, got {getattr(config, name)!r}")
        heads = config.dim // 128
        if attention == "hyper" and (heads == 0 or config.dim % heads):
            raise ConfigError(
                f"context.dim: the release makes dim // 128 heads, at least 1 and a divisor of dim; got {config.dim}"
            )
        if config.dim % 4:
            raise ConfigError(f"context.dim: sine-cosine positions need a multiple of 4, got {config.dim}")

    def encode(
        self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: ContextState | None
    ) -> tuple[Tensor, ContextState | None]:
        """See `ContextEncoder.forward`; returns (batch, 1, dim) and no state."""
        places = find_places(coords, validity, "raster", tokens.device)
        x = places.sort(tokens) + sine_positions(places.coords, self.config.dim).to(tokens.dtype)
        if not places.ragged:
            return self._answer(x), None
        counts = places.valid.sum(dim=1).tolist()
        answers: dict[int, Tensor] = {}
        for count in set(counts):
            rows = [row for row, n in enumerate(counts) if n == count]
            answers.update(zip(rows, self._answer(x[rows, :count]), strict=True))
        return torch.stack([answers[row] for row in range(len(counts))]), None

    def _answer(self, x: Tensor) -> Tensor:
        """The class token, or the mean of all windows', after the layers: (batch, n, dim) -> (batch, 1, dim)."""
        x = self._with_class_token(x)
        n, window = x.shape[1], self.window
        if not 0 < window < n:
            return self._run_layers(x)
        # Windows overlap by half, are cut from the sequence with its class token, and get one of their own besides.
        stride = window // 2
        whole = x.unfold(1, window, stride).transpose(2, 3)  # (batch, windows, window, dim)
        found = self._run_layers(self._with_class_token(whole.flatten(0, 1))).view(*whole.shape[:2], -1)
        cut = [
            self._run_layers(self._with_class_token(x[:, start:]))
            for start in range(whole.shape[1] * stride, n - 1, stride)
        ]
        return torch.cat([found, *cut], dim=1).mean(dim=1, keepdim=True)

    def _with_class_token(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.cls_token.expand(len(x), -1, -1).to(x.dtype)], dim=1)

    def _run_layers(self, x: Tensor) -> Tensor:
        """(batch, n, dim) -> the last token after all layers, (batch, 1, dim)."""
        recompute = torch.is_grad_enabled() and x.shape[0] * x.shape[1] > self.config.keep_tokens
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            if recompute:
                x = checkpoint(layer, x, last, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, last)
        return x


class NoReleasedContext(NoContext):
    """The published models with `cls_head: naive`: tokens go on as they are, to be averaged by the head."""


def sine_positions(coords: Tensor, dim: int) -> Tensor:
    """Sine-cosine positions as in MAE, the column's half first.

    Computed by NumPy in float32, as the release does: at large indices other ways differ by 1e-5 (Q8).

    Args:
        coords: (batch, n, 2) as (row, col) on the token lattice.
        dim: channels, a multiple of 4.

    Returns:
        (batch, n, dim) float32: sin(col w), cos(col w), sin(row w), cos(row w).
    """
    halves = []
    for along in (coords[..., 1], coords[..., 0]):
        values, place = along.unique(return_inverse=True)
        table = torch.from_numpy(_waves(values.to("cpu", torch.float32).numpy(), dim // 4)).to(coords.device)
        halves.append(table[place])
    return torch.cat(halves, dim=-1)


def _waves(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """(n,) -> (n, 2 * count): sines, then cosines, of frequencies from 1 towards 1 / 10000."""
    frequencies = 1.0 / 10000 ** (np.arange(count, dtype=np.float32) / np.float32(count))
    angles = values[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


register_context(KIND, ReleasedContext)
register_context(POOLED_KIND, NoReleasedContext)
