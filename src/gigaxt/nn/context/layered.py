"""Context encoders made of layers: the frame around every mixer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.context.base import ContextConfig, ContextEncoder, ContextState
from gigaxt.nn.context.layers import Finish, Norm, Run, largest_divisor
from gigaxt.nn.context.ordering import Places, find_places, follows, last_places
from gigaxt.nn.context.positions import FourierPositions
from gigaxt.nn.context.summary import Summary
from gigaxt.streaming.host_copies import HostCopies
from gigaxt.streaming.recurrence import State
from gigaxt.streaming.rows import Budget


class Mixer(nn.Module, ABC):
    """What mixes the tokens of a layer along the scan order: the part in which the kinds differ."""

    @abstractmethod
    def forward(
        self, x: Tensor, global_tokens: Tensor | None, places: Places, run: Run, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """Mix sorted tokens, and keep no more than `x` for the backward pass (`run` does that, or a checkpoint).

        Args:
            x: (batch, n, dim) in scan order, masked tokens last.
            global_tokens: (batch, g, dim) as the last layer left them, of kinds that have them; else None.
            places: coordinates and validity of the sorted tokens.
            run: runs a module over segments; see `gigaxt.streaming.recurrence.scan`.
            state: of a causal mixer, after the tokens ahead of these.

        Returns:
            `x` and the global tokens, each plus what the mixer found, normalised inside; and the state after the last
            token, None where not causal.
        """

    def fits(self, state: State, x: Tensor) -> bool:
        """Whether `state` is like those that this mixer returns for tokens like `x` (batch, n, dim)."""
        return True


class LayeredContext(ContextEncoder):
    """Normalise, sort along the scan order, run `depth` layers, sort back.

    Each layer adds three things to the tokens, each computed from them after RMS norm: the mixer's result, what they
    read in the summary's latents, and an MLP's. Tokens are normalised on entry (feature maps of backbones differ in
    scale by 100x) and at the end, so tokens of unit scale come out nearly as they went in at the start.

    Memory: a batch of more than `config.keep_tokens` tokens is computed segment by segment, again in the backward
    pass. A layer then keeps its input and its mixer's result, two token stores. Forward and backward together peak at
    `2 * depth + 3.2` token stores above the tokens (their gradient and the output included; measured with Mamba-2,
    dim 192), plus the activations of one segment (172 MiB at the defaults), however long the sequence.
    """

    fourier_positions: ClassVar[bool] = True
    """Add Fourier features of the coordinates on entry; off where the mixer has positions of its own."""
    recurrent: ClassVar[bool] = True
    """Whether `bidirectional=False` makes the mixer causal, with a state."""

    def __init__(self, config: ContextConfig) -> None:
        super().__init__(config)
        heads = largest_divisor(config.dim, max(1, config.dim // 32)) if config.summary else 0
        gain = 0.3 * config.depth**-0.5  # so that all branches together change the tokens by about a half
        self.entry = Entry(config.dim, self.fourier_positions)
        self.latents = nn.Parameter(torch.randn(config.summary, config.dim)) if config.summary else None
        count = self.count_global_tokens(config)
        self.global_tokens = nn.Parameter(torch.randn(count, config.dim)) if count else None
        self.layers = nn.ModuleList(
            Layer(
                self.build_mixer(config, gain),
                Summary(config.dim, heads, gain) if config.summary else None,
                Finish(config.dim, heads, config.mlp_ratio, gain, final_norm=i == config.depth - 1),
            )
            for i in range(config.depth)
        )

    @classmethod
    def check_config(cls, config: ContextConfig) -> None:
        """See `ContextEncoder.check_config`."""
        super().check_config(config)
        if not config.bidirectional and not cls.recurrent:
            raise ConfigError(
                f"context.bidirectional: `{config.kind}` looks both ways; for False use `mamba2`, `mamba` or `xl`"
            )

    @classmethod
    def count_global_tokens(cls, config: ContextConfig) -> int:
        """Learned tokens without a place that the mixers keep beside the scene's, such as Longformer's."""
        return 0

    @abstractmethod
    def build_mixer(self, config: ContextConfig, gain: float) -> Mixer:
        """One layer's mixer; `gain` is for its last projection at the start."""

    @property
    def causal(self) -> bool:
        """See `ContextEncoder.causal`."""
        config = self.config
        return self.recurrent and not (config.bidirectional or config.summary or config.alternate)

    def encode(
        self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: ContextState | None
    ) -> tuple[Tensor, ContextState | None]:
        """See `ContextEncoder.forward`."""
        config, batch = self.config, tokens.shape[0]
        places = find_places(coords, validity, config.order, tokens.device)
        across = find_places(coords, validity, config.order, tokens.device, turned=True) if config.alternate else places
        run = Run(
            batch,
            tokens.shape[1],
            config.segment,
            config.keep_tokens,
            Budget(config.budget_gib),
            HostCopies(config.host_gib),
        )
        # Ahead of the sorting: so the pass keeps the tokens themselves and not a sorted copy.
        entered, _ = run(self.entry, (tokens, places.given_coords, places.given_valid))
        assert entered is not None
        x = places.sort(entered)
        del entered
        latents, global_tokens = (
            None if learned is None else learned.expand(batch, -1, -1) for learned in (self.latents, self.global_tokens)
        )
        if state is not None:
            self._check_state(state, x, places)
        states: list[State | None] = [None] * len(self.layers) if state is None else list(state[:-1])
        for i, layer in enumerate(self.layers):
            if i and config.alternate:
                places, across, x = across, places, across.sort(places.unsort(x))
            x, latents, global_tokens, states[i] = layer(x, latents, global_tokens, places, run, states[i])
        y = places.unsort(x)
        return y, (*(s for s in states if s is not None), (last_places(places),)) if self.causal else None

    def _check_state(self, state: ContextState, x: Tensor, places: Places) -> None:
        """Refuse a state that does not fit, or that comes from another part of the scene than the one ahead."""
        mixers = [cast(Mixer, layer.mixer) for layer in self.layers]
        if not (
            isinstance(state, tuple)
            and len(state) == len(mixers) + 1
            and all(isinstance(s, tuple) and all(isinstance(t, Tensor) for t in s) for s in state)
            and [t.shape for t in state[-1]] == [(len(x), 2)]
            and all(mixer.fits(s, x) for mixer, s in zip(mixers, state[:-1], strict=True))
        ):
            raise ConfigError(
                f"context: the state is not one of this encoder ({self.config.kind!r}, {len(mixers)} layers of dim "
                f"{self.config.dim}) for {len(x)} batch rows in {x.dtype}: pass what its last call returned"
            )
        order = self.config.order
        if not follows(places, state[-1][0], order):
            raise ConfigError(
                f"context: a state is continued by tokens that lie ahead of its end at {state[-1][0].tolist()} in the "
                f"scan order {order!r}: give the parts of a scene in that order (strips of whole rows from the top on "
                "with context.order='raster')"
            )


class Entry(nn.Module):
    """Normalise tokens and add their positions. Masked tokens may hold anything, NaN included."""

    def __init__(self, dim: int, fourier_positions: bool) -> None:
        super().__init__()
        self.norm = Norm(dim)
        self.positions = FourierPositions(dim) if fourier_positions else None

    def forward(self, tokens: Tensor, coords: Tensor, valid: Tensor) -> tuple[Tensor]:
        """(batch, tokens, dim), (batch, tokens, 2), (batch, tokens) -> (batch, tokens, dim)."""
        x = self.norm(tokens.masked_fill(~valid.unsqueeze(-1), 0))
        return (x if self.positions is None else x + self.positions(coords).to(x.dtype),)


class Layer(nn.Module):
    """Mixer, summary path, MLP."""

    def __init__(self, mixer: Mixer, summary: Summary | None, finish: Finish) -> None:
        super().__init__()
        self.mixer, self.summary, self.finish = mixer, summary, finish

    def forward(
        self,
        x: Tensor,
        latents: Tensor | None,
        global_tokens: Tensor | None,
        places: Places,
        run: Run,
        state: State | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, State | None]:
        """Sorted tokens (batch, n, dim), latents and global tokens (batch, ..., dim), and the mixer's state."""
        x, global_tokens, state = self.mixer(x, global_tokens, places, run, state)
        memory: State = ()
        if self.summary is not None and latents is not None:
            latents, memory = self.summary(x, places.valid, latents, run)
        y, _ = run(self.finish, (x,), shared=memory)
        assert y is not None
        if global_tokens is not None:
            (global_tokens,) = self.finish(global_tokens, *memory)
        return y, latents, global_tokens, state
