from __future__ import annotations

import math

import torch

from gigaxt.nn.context.positions import FourierPositions, rotary_angles, rotate


def test_fourier_features_tell_places_apart_near_and_far() -> None:
    positions = FourierPositions(64).double()
    coords = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [4000.0, 0.0], [4000.5, 0.0]]], dtype=torch.float64)
    features = positions(coords)[0]
    distances = torch.cdist(features, features) + torch.eye(5)
    assert distances.min() > 0.1
    assert 0.05 < features.std() < 0.5


def test_fourier_angles_are_not_rounded_with_the_weights() -> None:
    positions = FourierPositions(64)
    exact = positions(torch.tensor([[[4001.0, 77.0]]]))
    positions.to(torch.bfloat16)
    assert (positions(torch.tensor([[[4001.0, 77.0]]])) - exact).abs().max() < 0.02


def test_rotation_equals_complex_multiplication() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    coords = torch.randn(2, 5, 2, dtype=torch.float64) * 10
    y = rotate(x, *rotary_angles(coords, 8))
    for pair in range(4):
        axis, step = divmod(pair, 2)
        angle = coords[:, None, :, axis] * 1000 ** (-step / 2)
        expected = torch.complex(x[..., pair], x[..., pair + 4]) * torch.exp(1j * angle)
        torch.testing.assert_close(torch.complex(y[..., pair], y[..., pair + 4]), expected, rtol=1e-12, atol=1e-12)


def test_products_of_rotated_vectors_depend_on_the_difference_of_places() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    here, there = torch.tensor([[[3.0, 5.0]]], dtype=torch.float64), torch.tensor([[[9.5, 1.0]]], dtype=torch.float64)
    shift = torch.tensor([100.0, 2000.0], dtype=torch.float64)

    def product(a: torch.Tensor, b: torch.Tensor) -> float:
        return (rotate(q, *rotary_angles(a, 16)) * rotate(k, *rotary_angles(b, 16))).sum().item()

    assert math.isclose(product(here, there), product(here + shift, there + shift), rel_tol=1e-9)
    assert not math.isclose(product(here, there), product(here, there + shift), rel_tol=1e-3)
