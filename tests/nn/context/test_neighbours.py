from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gigaxt.nn.context.neighbours import MOST_KEYS, find_pieces
from gigaxt.nn.context.ordering import Places, find_places

CPU = torch.device("cpu")


def places_of(coords: Tensor, validity: Tensor | None = None) -> Places:
    return find_places(coords, validity, "snake", CPU)


def scattered(batch: int, tokens: int, side: float) -> Tensor:
    return torch.rand(batch, tokens, 2, generator=torch.Generator().manual_seed(0)) * side


def listed(places: Places, radius: int, segment: int) -> tuple[Tensor, Tensor]:
    """How often each pair of flat places is listed, (n, n), and how often each place is owned, (n,)."""
    pairs, owned = torch.zeros(places.valid.numel(), places.valid.numel(), dtype=torch.int64), torch.zeros(0).long()
    for piece in find_pieces(places, radius, segment):
        queries = piece.tokens[piece.queries()]
        assert torch.equal(queries.flatten()[piece.filled()], piece.own)
        owned = torch.cat((owned, piece.own))
        filled = torch.zeros(queries.numel(), dtype=torch.bool).index_fill(0, piece.filled(), True).view_as(queries)
        for query, mine, keys, meant, row in zip(queries, filled, *piece.keys(), piece.rows, strict=True):
            assert (keys[~meant] == 0).all()
            key = piece.tokens[keys[meant]]
            assert (key // places.valid.shape[1] == row).all()
            assert torch.isin(query[~mine], query[mine][-1:]).all()
            pairs[query[mine].unsqueeze(1), key] += 1
    return pairs, owned.bincount(minlength=places.valid.numel())


@pytest.mark.parametrize("radius", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("segment", [1, 130, 10**6])
def test_all_near_tokens_are_listed_once(radius: int, segment: int) -> None:
    validity = torch.rand(3, 180, generator=torch.Generator().manual_seed(1)) > torch.tensor([[0.0], [0.4], [0.99]])
    places = places_of(scattered(3, 180, 16.0), validity)
    pairs, owned = listed(places, radius, segment)
    assert torch.equal(owned, places.valid.flatten().long())
    assert pairs.max() == 1
    near = (places.coords.unsqueeze(2) - places.coords.unsqueeze(1)).abs().amax(-1) <= radius
    near &= places.valid.unsqueeze(1) & places.valid.unsqueeze(2)
    assert (pairs.bool() | ~torch.block_diag(*near).bool()).all()


def test_pieces_are_no_larger_than_a_segment_allows() -> None:
    crowd = torch.cat((torch.full((1, 3000, 2), 50.0), scattered(1, 6000, 100.0)), dim=1)
    for coords in (scattered(1, 9000, 100.0), crowd, scattered(1, 9000, 1.0)):
        for piece in find_pieces(places_of(coords), 8, 1024):
            assert len(piece.own) <= 1024
            keys, _ = piece.keys()
            assert keys.numel() <= MOST_KEYS * 1024 or len(keys) == 1


def test_a_full_lattice_lists_three_by_three_squares() -> None:
    lattice = torch.cartesian_prod(torch.arange(64), torch.arange(64)).float()[None]
    (piece,) = find_pieces(places_of(lattice), 8, 4096)
    keys, meant = piece.keys()
    assert piece.queries().shape == (64, 64)
    assert keys.shape == (64, 9 * 64)
    assert meant.sum(1).min() == 4 * 64  # in the corners


@pytest.mark.parametrize(("radius", "most"), [(8, 8), (2, 8)])
def test_tables_are_small(radius: int, most: int) -> None:
    """Bytes a token: a few per cent of a token of 192 numbers in bfloat16."""
    lattice = torch.cartesian_prod(torch.arange(128), torch.arange(128)).float()[None]
    pieces = find_pieces(places_of(lattice), radius, 4096)
    tables = [t for piece in pieces for t in vars(piece).values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in tables) < most * 128**2


def test_gaps_cost_nothing() -> None:
    squares = torch.cartesian_prod(torch.arange(8), torch.arange(8)).float()
    corners = torch.randint(0, 2**20, (40, 1, 2), generator=torch.Generator().manual_seed(0)) * 16.0
    (piece,) = find_pieces(places_of((squares + corners).reshape(1, -1, 2)), 8, 4096)
    assert piece.keys()[0].shape == (40, 64)


def test_tables_are_kept_for_the_next_layers() -> None:
    places = places_of(scattered(1, 100, 9.0))
    assert find_pieces(places, 3, 64) is find_pieces(places, 3, 64)
    assert len(find_pieces(places, 3, 1024)) < len(find_pieces(places, 3, 64))
    assert find_pieces(places_of(scattered(1, 100, 9.0)), 3, 64) is not find_pieces(places, 3, 64)
