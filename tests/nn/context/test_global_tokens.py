from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.context import global_tokens as module
from gigaxt.nn.context.global_tokens import GlobalRead, NearAttention
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.longformer import LongformerMixer, LongformerOptions
from gigaxt.nn.context.ordering import find_places
from gigaxt.testing.live_memory import LiveMemory

CPU = torch.device("cpu")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_places_count_only_relative_to_each_other() -> None:
    """Also beside global tokens, which have none."""
    torch.manual_seed(0)
    mixer = LongformerMixer(16, 2, LongformerOptions(window=6), gain=1.0).double()
    x, given, coords = draw(1, 30, 16), draw(1, 4, 16), draw(1, 30, 2).abs() * 9

    def mixed(coords: Tensor) -> Tensor:
        places = find_places(coords, None, "raster", CPU)
        y, _, _ = mixer(places.sort(x), given, places, Run(1, 30, 30, 30), None)
        return places.unsort(y)

    shifted = mixed(coords + torch.tensor([1000.0, 37.0]))
    torch.testing.assert_close(shifted, mixed(coords), rtol=1e-9, atol=1e-11)
    assert (mixed(coords * torch.tensor([1.0, 1.1])) - shifted).abs().max() > 1e-3


def test_all_of_a_scene_is_read_whatever_the_scores() -> None:
    """Scores of hundreds, one segment larger than the one before; no overflow."""
    torch.manual_seed(0)
    read = GlobalRead(8, 2).double()
    x, given = draw(1, 40, 8), draw(1, 2, 8)
    with torch.no_grad():
        read.query.weight.mul_(300)
        found = read(given, x, torch.ones(1, 40, dtype=torch.bool), Run(1, 40, 6, 0))
        whole = read(given, x, torch.ones(1, 40, dtype=torch.bool), Run(1, 40, 6, 100))
    assert found.isfinite().all()
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("count", [0, 3])
def test_blocks_beyond_the_largest_launch_are_split(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = NearAttention(8, 2, gain=1.0).double()
    width = 4 + (8 if count else 0)
    query, key, value = draw(7, 5, 2, width), draw(7, 6 + count, 2, width), draw(7, 6 + count, 2, width)
    near = draw(7, 5, 6) > -1
    near[..., 0] = True
    whole = attention.attend(query, key, value, near)
    monkeypatch.setattr(module, "MOST_BLOCKS", 3)
    torch.testing.assert_close(attention.attend(query, key, value, near), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), [("longformer", {"window": 16}), ("window", {"radius": 4})])
def test_memory_grows_by_token_stores_only(kind: str, options: dict[str, int]) -> None:
    """Two layers, forward and backward: slope between two lengths, outputs and gradients included."""
    peaks, dim = [], 64
    for cols in (48, 96):
        config = ContextConfig(kind=kind, dim=dim, depth=2, summary=4, keep_tokens=0, segment=256, options=options)
        encoder, x = build_context(config), torch.randn(1, 16 * cols, dim, requires_grad=True)
        coords = torch.cartesian_prod(torch.arange(16), torch.arange(cols)).float()[None]
        with LiveMemory([x, *encoder.parameters()]) as memory:
            y, _ = encoder(x, coords)
            y.sum().backward()
        peaks.append(memory.peak)
    assert 4 < (peaks[1] - peaks[0]) / (16 * 48 * dim * 4) < 7.5
