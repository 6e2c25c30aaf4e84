"""Tokens into scan order and back, with the masked ones left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.errors import DataError
from gigaxt.regions import Order, hilbert_key, scan_order
from gigaxt.streaming.untraced import untraced

Ints = NDArray[np.int64]
FARTHEST = 2**24
"""Largest row or column on the token lattice: float32 tells all places up to it apart. (float16: 2,048.)"""


@dataclass
class Places:
    """Where the sorted tokens come from, and what mixers know about them.

    The sorted sequence is as long as the row with the most valid tokens. Shorter rows are filled up with masked
    tokens at the end, which are zero and change nothing.
    """

    coords: Tensor
    """(batch, n, 2) as (row, col) on the token lattice; 0 where masked."""
    valid: Tensor
    """(batch, n) bool."""
    ragged: bool
    """Whether any sorted token is masked. Known on the host."""
    _source: Tensor
    """(batch * n) int64: flat place of each sorted token among the given ones."""
    _target: Tensor
    """(batch * tokens) int64: the inverse; 0 where masked."""
    given_coords: Tensor
    """(batch, tokens, 2); 0 where masked."""
    given_valid: Tensor
    """(batch, tokens) bool."""
    _host: tuple[NDArray[Any], Ints, Ints]
    """Given coordinates (batch * tokens, 2), `_source`, and the valid tokens of each batch row."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """Tables that mixers compute from the places, for the next layers."""

    def on_host(self) -> tuple[NDArray[np.float64], Ints]:
        """Coordinates (batch * n, 2) of the sorted tokens, and how many of each row are valid; asks no device."""
        coords, source, counts = self._host
        return coords[source].astype(np.float64), counts

    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coordinates of the first and of the last valid token of each row, (batch, 2) each; asks no device."""
        coords, source, counts = self._host
        starts = np.arange(len(counts)) * (len(source) // len(counts))
        first, last = coords[source[starts]], coords[source[starts + counts - 1]]
        return first.astype(np.float64), last.astype(np.float64)

    def sort(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, ...) as given -> (batch, n, ...) in scan order."""
        return _take(tokens, self._source, self.valid, self._target, self.given_valid)

    def unsort(self, tokens: Tensor) -> Tensor:
        """(batch, n, ...) in scan order -> (batch, tokens, ...) as given, zero where masked."""
        return _take(tokens, self._target, self.given_valid, self._source, self.valid)


@untraced  # NumPy on the host
def find_places(
    coords: Tensor, validity: Tensor | None, order: Order, device: torch.device, *, turned: bool = False
) -> Places:
    """Compute the scan order of each row of a batch from its coordinates. Waits for the device once.

    Args:
        coords: (batch, tokens, 2) as (row, col) on the token lattice; may be fractional. Ignored where masked.
        validity: (batch, tokens) bool, or None for all valid.
        order: of the scan.
        device: of the tokens; the coordinates may lie elsewhere.
        turned: scan with rows and columns swapped.
    """
    batch, tokens = coords.shape[:2]
    host = _numpy(coords)
    valid = np.ones((batch, tokens), bool) if validity is None else validity.cpu().numpy()
    counts = valid.sum(axis=1)
    n = int(counts.max())
    source = np.zeros((batch, n), np.int64)
    target = np.zeros((batch, tokens), np.int64)
    for b, count in enumerate(counts):
        inside = np.flatnonzero(valid[b])
        # Sorted by (row, col) first, so that places in one cell of the scan do not depend on the order given.
        inside = inside[np.lexsort((host[b, inside, 1], host[b, inside, 0]))]
        sorted_places = inside[scan_order(host[b, inside][:, :: -1 if turned else 1], order)]
        source[b, :count] = sorted_places + b * tokens
        target[b, sorted_places] = np.arange(count) + b * n
    given = torch.from_numpy(valid).to(device)
    given_coords = coords.detach().to(device, torch.promote_types(coords.dtype, torch.float32))
    given_coords = given_coords.masked_fill(~given.unsqueeze(-1), 0)
    places = Places(
        coords=given_coords,
        valid=torch.from_numpy(np.arange(n) < counts[:, None]).to(device),
        ragged=bool((counts < n).any()),
        _source=torch.from_numpy(source.reshape(-1)).to(device),  # (batch, n) -> (batch * n), as the next
        _target=torch.from_numpy(target.reshape(-1)).to(device),
        given_coords=given_coords,
        given_valid=given,
        _host=(host.reshape(-1, 2), source.reshape(-1), counts),
    )
    places.coords = places.sort(given_coords)
    return places


@untraced  # reads values
def check_places(coords: Tensor, validity: Tensor | None) -> None:
    """Check where tokens are said to lie. Waits for the device once.

    Args:
        coords: (batch, tokens, 2) as (row, col). Ignored where masked.
        validity: (batch, tokens) bool, or None for all valid.

    Raises:
        DataError: a row without valid tokens, or coordinates that are not finite, negative or beyond `FARTHEST`.
    """
    coords, farthest = coords.detach(), FARTHEST
    if coords.is_floating_point():  # what half precision cannot tell apart would be put in a wrong order
        farthest = min(farthest, int(2 / torch.finfo(coords.dtype).eps))
    else:
        coords = coords.long()  # FARTHEST is none of the numbers of a byte
    wrong = ~((coords >= 0) & (coords <= farthest)).all(dim=-1)  # NaN is wrong, too
    empty = torch.zeros_like(wrong[:, 0])
    if validity is not None:
        validity = validity.to(coords.device)
        wrong, empty = wrong & validity, ~validity.any(dim=1)
    if not bool(wrong.any() | empty.any()):
        return
    if empty.any():
        raise DataError(
            f"context: every token of batch row {int(empty.nonzero()[0])} is masked: expected at least one valid "
            "token; leave images without valid pixels out"
        )
    b, i = wrong.nonzero()[0].tolist()
    raise DataError(
        f"context: coordinates of token {i} in batch row {b} are {coords[b, i].tolist()}: expected (row, col) on the "
        f"token lattice, finite numbers from 0 to {farthest}"
        + (f": {coords.dtype} tells no larger ones apart, give float32" if farthest < FARTHEST else "")
    )


@untraced  # NumPy on the host
def follows(places: Places, last: Tensor, order: Order) -> bool:
    """Whether the first token of each row lies behind `last` (batch, 2), float64 on the host, in the scan order."""
    first, _ = places.ends()
    return all(_scan_key(a, order) <= _scan_key(b, order) for a, b in zip(last.numpy(), first, strict=True))


@untraced  # NumPy on the host
def last_places(places: Places) -> Tensor:
    """Coordinates of the last token of each row, (batch, 2), float64 on the host."""
    return torch.from_numpy(places.ends()[1])


def _scan_key(place: NDArray[np.float64], order: Order) -> tuple[float, ...]:
    """Increases along the scan of `find_places` (not turned)."""
    row, col = (int(x) for x in place)
    if order == "hilbert":
        return int(hilbert_key(np.array([row]), np.array([col]))[0]), *place
    return row, -col if order == "snake" and row % 2 else col, *place


def _numpy(coords: Tensor) -> NDArray[Any]:
    """On the host; NumPy knows no bfloat16."""
    coords = coords.detach().cpu()
    result: NDArray[Any] = (coords.float() if coords.dtype == torch.bfloat16 else coords).numpy()
    return result


class _Take(torch.autograd.Function):
    """A gather whose backward is the inverse gather: no scatter, no atomics, nothing kept but the indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, valid: Tensor, target: Tensor, valid_back: Tensor) -> Tensor:
        ctx.back = target, valid_back
        return _gather(x, source, valid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gather(grad, *ctx.back), None, None, None, None


def _take(x: Tensor, source: Tensor, valid: Tensor, target: Tensor, valid_back: Tensor) -> Tensor:
    result: Tensor = _Take.apply(x, source, valid, target, valid_back)
    return result


def _gather(x: Tensor, source: Tensor, valid: Tensor) -> Tensor:
    batch, count = valid.shape
    # (batch, tokens, ...) -> (batch * count, ...) -> (batch, count, ...)
    y: Tensor = x.flatten(0, 1).index_select(0, source).unflatten(0, (batch, count))
    return y.masked_fill_(~valid.view(batch, count, *[1] * (y.ndim - 2)), 0)
