from __future__ import annotations

import pytest
import torch

from gigaxt.nn.context.ordering import find_places

CPU = torch.device("cpu")


@pytest.mark.parametrize("order", ["raster", "snake", "hilbert"])
def test_sorts_and_comes_back_with_gaps(order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(3, 40, 2, generator=generator) * 6  # several in one cell
    validity = torch.rand(3, 40, generator=generator) > torch.tensor([[0.1], [0.9], [0.5]])
    tokens = torch.arange(120.0).reshape(3, 40, 1)
    places = find_places(coords, validity, order, CPU)
    assert places.valid.sum(1).tolist() == validity.sum(1).tolist()
    assert places.valid.shape[1] == validity.sum(1).max()
    assert (places.valid[:, :-1] >= places.valid[:, 1:]).all()  # masked ones last
    assert places.ragged
    x = places.sort(tokens)
    assert x[~places.valid].eq(0).all()
    assert torch.equal(places.unsort(x), torch.where(validity[..., None], tokens, 0))
    given = coords.flatten(0, 1)[places.sort(tokens).flatten().long()].unflatten(0, x.shape[:2])
    assert torch.equal(places.coords, torch.where(places.valid[..., None], given, 0))
    if order == "raster":
        rows = places.coords[0, places.valid[0], 0].floor()
        assert (rows[:-1] <= rows[1:]).all()


def test_order_given_does_not_matter() -> None:
    coords = torch.tensor([[[0.0, 0.0], [0.5, 0.5], [0.5, 0.25], [1.0, 0.0]]])  # three in one cell
    shuffled = torch.tensor([2, 3, 1, 0])
    a = find_places(coords, None, "hilbert", CPU)
    b = find_places(coords[:, shuffled], None, "hilbert", CPU)
    assert torch.equal(a.coords, b.coords)
    assert not a.ragged


def test_gradient_is_the_inverse_gather() -> None:
    coords = torch.rand(2, 9, 2) * 4
    validity = torch.tensor([[True] * 9, [True, False, True] * 3])
    places = find_places(coords, validity, "hilbert", CPU)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(places.sort, (x,))
    assert torch.autograd.gradcheck(places.unsort, (y,))


def test_turned_scans_along_columns() -> None:
    rows, cols = 2, 3  # numbered lattice: 0 1 2 / 3 4 5
    coords = torch.tensor([[[row, col] for row in range(rows) for col in range(cols)]])
    numbers = torch.arange(rows * cols)[None]
    for order, expected in (("raster", [0, 3, 1, 4, 2, 5]), ("snake", [0, 3, 4, 1, 2, 5])):
        places = find_places(coords, None, order, CPU, turned=True)
        assert places.sort(numbers).flatten().tolist() == expected
        assert torch.equal(places.unsort(places.sort(numbers)), numbers)
        assert torch.equal(places.coords, coords[:, expected])
