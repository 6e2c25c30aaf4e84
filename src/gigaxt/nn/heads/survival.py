"""Time until an event in bins of time: each output is the logit of a hazard.

The hazard of a bin is the chance that the event comes in it, given that it has not come before (Gensheimer and
Narasimhan: A scalable discrete-time survival model for neural networks, 2019). Bin k holds the times from edge k - 1 up
to, but without, edge k; the first begins at 0, the last has no end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from gigaxt.errors import DataError


def quantile_edges(event_times: ArrayLike, bins: int) -> list[float]:
    """Edges between `bins` bins that hold equally many events each.

    Args:
        event_times: when the event came, of those to whom it did.
        bins: at least 2.

    Returns:
        bins - 1 rising times.

    Raises:
        DataError: no events, or so many at the same time that a bin would stay empty.
    """
    times = np.asarray(event_times, dtype=np.float64)
    if not times.size:
        raise DataError("no event was seen (`event` is 0 in every row): there is nothing to learn a hazard from")
    edges = np.unique(np.quantile(times, np.arange(1, bins) / bins))
    if len(edges) < bins - 1 or edges[0] <= times.min():
        raise DataError(
            f"{bins} bins of time would not hold an event each: {times.size} events at {len(np.unique(times))} "
            "different times; lower model.head.classes, or set model.head.time_bins"
        )
    return [float(edge) for edge in edges]


def survival_losses(logits: Tensor, time: Tensor, event: Tensor, edges: Sequence[float]) -> Tensor:
    """The negative log-likelihood of each case.

    Who had the event in bin k survived those before and not this one. Who left without it is known to have survived
    the bins that end at or before that time, and nothing is said of the bin in which he left.

    Args:
        logits: (B, bins), of the hazards.
        time: (B,), >= 0, of the event or of the last time it had not come.
        event: (B,), 1 or 0.
        edges: bins - 1 rising times.

    Returns:
        (B,), in the dtype of `logits`.
    """
    bounds = torch.tensor(edges, dtype=torch.float64, device=logits.device)
    # right: a time that is an edge belongs to the bin that begins there.
    own = torch.bucketize(time.to(torch.float64).contiguous(), bounds, right=True)[:, None]  # (B, 1)
    survived = torch.arange(logits.shape[1], device=logits.device) < own  # (B, bins)
    before = torch.where(survived, F.logsigmoid(-logits), 0).sum(dim=1)
    at = F.logsigmoid(logits).gather(1, own)[:, 0]
    return -(before + event.to(logits.dtype) * at)


def event_probabilities(logits: Tensor) -> Tensor:
    """Chance that the event comes in each bin: (B, bins) logits -> (B, bins), of sum 1 at most."""
    reached = F.logsigmoid(-logits).cumsum(dim=1).roll(1, dims=1)  # log of having survived the bins before
    reached[:, 0] = 0
    return (reached + F.logsigmoid(logits)).exp()


def risk(logits: Tensor) -> Tensor:
    """One number a case, higher where the event is expected earlier: (B, bins) logits -> (B,).

    The chance of the event having come by the end of a bin, added up over the bins.
    """
    return event_probabilities(logits).cumsum(dim=1).sum(dim=1)


def bin_names(edges: Sequence[float]) -> list[str]:
    """What the bins are called: "< 12", "12 to 30", ">= 30"; nothing where there are no edges yet."""
    if not edges:
        return []
    shown = [f"{edge:.6g}" for edge in edges]
    inner = [f"{low} to {high}" for low, high in pairwise(shown)]
    return [f"< {shown[0]}", *inner, f">= {shown[-1]}"]
