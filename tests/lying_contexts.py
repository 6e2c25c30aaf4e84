"""Two honest context encoders, and for each promise of the contract one or more that break it, and none before it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigaxt.errors import DataError
from gigaxt.nn.context import ContextConfig, ContextEncoder, ContextState

Found = tuple[Tensor, ContextState | None]


class Mean(ContextEncoder):
    """Honest: every token is told of the mean over all. Parts of it are what the liars below replace."""

    def __init__(self, config: ContextConfig) -> None:
        super().__init__(config)
        self.mix = nn.Linear(config.dim, config.dim)

    def encode(self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: ContextState | None) -> Found:
        valid = torch.ones_like(tokens[..., 0], dtype=torch.bool) if validity is None else validity
        on_lattice = (coords.isfinite() & (coords >= 0)).all(-1)
        if not valid.any(1).all() or not (on_lattice | ~valid).all():
            raise DataError("a row without valid tokens, or a token off the lattice")
        x, places = tokens.masked_fill(~valid[..., None], 0), coords.masked_fill(~valid[..., None], 0)
        return self.told(x, places, valid[..., None], state)

    def told(self, x: Tensor, coords: Tensor, valid: Tensor, state: ContextState | None) -> Found:
        """`x` and `coords` are zero where not `valid` (batch, tokens, 1)."""
        return (x + torch.tanh(self.mix(self.mean(x, coords, valid)))) * valid, None

    def mean(self, x: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) / valid.sum(1, keepdim=True)


class RunningMean(Mean):
    """Honest and causal: every token is told of the mean over those up to it, row by row."""

    horizon = 0

    @property
    def causal(self) -> bool:
        return not self.config.bidirectional

    def told(self, x: Tensor, coords: Tensor, valid: Tensor, state: ContextState | None) -> Found:
        if not self.causal:
            return super().told(x, coords, valid, state)
        ((total, count),) = ((torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1, :1])),) if state is None else state
        matrix = up_to(coords, valid, self.horizon).to(x.dtype)
        total, count = total + matrix @ x, count + matrix @ valid.to(x.dtype)
        y = (x + torch.tanh(self.mix(total / count.clamp(min=1)))) * valid
        return y, self.handed_on(total, count)

    def handed_on(self, total: Tensor, count: Tensor) -> ContextState | None:
        last = count.argmax(1, keepdim=True)
        return ((total.take_along_dim(last, 1), count.take_along_dim(last, 1)),)


def up_to(coords: Tensor, valid: Tensor, horizon: int = 0) -> Tensor:
    """(batch, tokens, tokens): whether the second token is valid and at most `horizon` columns after the first."""
    place = 10_000 * coords[..., 0] + coords[..., 1]
    return (place[:, None] <= place[:, :, None] + horizon) & valid.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ what goes in and out


class Shortened(Mean):
    def told(self, *arguments: Any) -> Found:
        return super().told(*arguments)[0][:, 1:], None


class Halved(Mean):
    def told(self, *arguments: Any) -> Found:
        return super().told(*arguments)[0].float(), None


class TokensOnly(Mean):
    def forward(self, *arguments: Any) -> Tensor:
        return super().forward(*arguments)[0]


class InPlace(Mean):
    def encode(self, tokens: Tensor, *rest: Any) -> Found:
        tokens.data += 1
        return super().encode(tokens, *rest)


class Dropping(Mean):
    def mean(self, *arguments: Tensor) -> Tensor:
        return nn.functional.dropout(super().mean(*arguments), 0.5)


class Counting(Mean):
    calls = 0

    def mean(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        return super().mean(*arguments) * (1 + 0.01 * self.calls)


class Single(Mean):
    def mean(self, x: Tensor, *rest: Tensor) -> Tensor:
        return super().mean(x.float(), *rest).to(x.dtype)


class Numbered(Mean):
    def told(self, x: Tensor, coords: Tensor, valid: Tensor, state: Any) -> Found:
        y, _ = super().told(x, coords, valid, state)
        return y + torch.arange(x.shape[1])[:, None] * valid, None


class OnGrid(Mean):
    """Puts tokens into the cells of a map, where two of them may meet."""

    def told(self, x: Tensor, coords: Tensor, valid: Tensor, state: Any) -> Found:
        row, col = coords.long().unbind(-1)
        cells = x.new_zeros(len(x), int(row.max()) + 1, int(col.max()) + 1, x.shape[2])
        batch = torch.arange(len(x))[:, None].expand_as(row)
        cells = cells.index_put((batch, row, col), x)
        return super().told(cells[batch, row, col] * valid, coords, valid, state)


class Spread(Mean):
    """Divides by the number of the other tokens."""

    def mean(self, x: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) / (valid.sum(1, keepdim=True) - 1)


class Segmented(Mean):
    """Short of memory, it forgets what earlier segments held."""

    def mean(self, x: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        config = self.config
        tail = x.shape[1] if x.shape[1] <= config.keep_tokens else config.segment // len(x)
        return super().mean(x[:, -tail:], coords, valid)


# ------------------------------------------------------------------------------------------------ batches and masks


class LeavesMasked(Mean):
    def told(self, *arguments: Any) -> Found:
        return super().told(*arguments)[0] + 0.1, None


class HearsMasked(Mean):
    """Lets `leak` of the masked tokens through to all others."""

    leak = staticmethod(lambda tokens: 0.01 * tokens.mean(1, keepdim=True))

    def encode(self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: Any) -> Found:
        y, _ = super().encode(tokens, coords, validity, state)
        return y if validity is None else y + self.leak(tokens) * validity[..., None], None


class SpreadsNaN(HearsMasked):
    leak = staticmethod(lambda tokens: 0 * tokens.detach().sum(1, keepdim=True))


class CountsMasked(Mean):
    def mean(self, x: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class BatchMean(Mean):
    def mean(self, *arguments: Tensor) -> Tensor:
        return super().mean(*arguments).mean(0, keepdim=True)


# ------------------------------------------------------------------------------------------------ gradients


class Idle(Mean):
    def __init__(self, config: ContextConfig) -> None:
        super().__init__(config)
        self.idle = nn.Parameter(torch.zeros(3))


class Reentrant(Mean):
    """The old form of checkpoint: parameters get nothing where the tokens want nothing."""

    def told(self, x: Tensor, coords: Tensor, valid: Tensor, state: Any) -> Found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = super().told
            return checkpoint(lambda x: told(x, coords, valid, state)[0], x, use_reentrant=True), None


class Twice(Mean):
    """Runs a backward pass of its own inside the one that is running."""

    def told(self, *arguments: Any) -> Found:
        y, _ = super().told(*arguments)
        if self.mix.weight.requires_grad and torch.is_grad_enabled():
            y.register_hook(self.once_more)
        return y, None

    @torch.enable_grad()
    def once_more(self, grad: Tensor) -> None:
        (0 * self.mix.weight.sum()).backward()


class FrozenBlocks(Mean):
    def mean(self, *arguments: Tensor) -> Tensor:
        found = super().mean(*arguments)
        return found if self.mix.weight.requires_grad else found.detach()


class Skips(Mean):
    def mean(self, *arguments: Tensor) -> Tensor:
        return super().mean(*arguments) * torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------------ who hears of whom


class Neighbours(Mean):
    """Hears of tokens within 4."""

    def mean(self, x: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        near = (torch.cdist(coords, coords) < 4).to(x.dtype) * valid.transpose(1, 2)
        return near @ x / near.sum(-1, keepdim=True).clamp(min=1)


class OneWay(Mean):
    """Hears of earlier tokens only, and does not say so."""

    def mean(self, x: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        seen = up_to(coords, valid).to(x.dtype)
        return seen @ x / seen.sum(-1, keepdim=True).clamp(min=1)


class Deaf(Mean):
    """The gradient does not come back from far."""

    def mean(self, x: Tensor, *rest: Tensor) -> Tensor:
        found = super().mean(x, *rest)
        return found if x.shape[1] < 500 else found.detach()


class Peeks(RunningMean):
    horizon = 1


class Forgets(RunningMean):
    def handed_on(self, total: Tensor, count: Tensor) -> ContextState:
        return ((0 * total[:, -1:], 0 * count[:, -1:]),)


class Detaches(RunningMean):
    def handed_on(self, *arguments: Tensor) -> ContextState:
        ((total, count),) = super().handed_on(*arguments)
        return ((total.detach(), count),)


class ReturnsNoState(RunningMean):
    def handed_on(self, *arguments: Tensor) -> None:
        return None


class TakesStates(Mean):
    def forward(self, tokens: Tensor, coords: Tensor, validity: Any = None, state: Any = None) -> Found:
        return super().forward(tokens, coords, validity)


# ------------------------------------------------------------------------------------------------ use


class Overflows(Mean):
    def mean(self, *arguments: Tensor) -> Tensor:
        return ((1e25 * super().mean(*arguments)).square() + 1).sqrt() / 1e25


class Coarse(Mean):
    def mean(self, *arguments: Tensor) -> Tensor:
        y = super().mean(*arguments)
        return y if y.dtype == torch.float64 else (20 * y).round() / 20


class Bfloat16Out(Mean):
    def told(self, *arguments: Any) -> Found:
        y, _ = super().told(*arguments)
        return (y.bfloat16() if torch.is_autocast_enabled("cpu") else y), None


class Unsaved(Mean):
    def __init__(self, config: ContextConfig) -> None:
        super().__init__(config)
        self.register_buffer("directions", torch.randn(config.dim), persistent=False)

    def mean(self, *arguments: Tensor) -> Tensor:
        return super().mean(*arguments) * self.directions


class Uncopied(Mean):
    def __deepcopy__(self, memo: Any) -> Mean:
        return Mean(self.config).double()


class Answers(Mean):
    def forward(self, tokens: Tensor, coords: Tensor, validity: Any = None, state: Any = None) -> Found:
        if validity is None or validity.any(1).all():
            return super().forward(tokens, coords, validity, state)
        return torch.zeros_like(tokens), None


class Wanders(Mean):
    def forward(self, tokens: Tensor, coords: Tensor, validity: Any = None, state: Any = None) -> Found:
        return super().forward(tokens, coords.nan_to_num(0, 0, 0).abs(), validity, state)


class TwiceTheGradient(Mean):
    def told(self, *arguments: Any) -> Found:
        y, _ = super().told(*arguments)
        return (2 * y - y.detach()), None
