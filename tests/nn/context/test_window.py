from __future__ import annotations

import pytest
import torch
from dense_near import dense_mixer, outputs_and_gradients, run_for
from torch import Tensor

from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context
from gigaxt.nn.context.ordering import Places, find_places
from gigaxt.nn.context.window import WindowMixer, WindowOptions, _look_up

DIM, HEADS = 8, 2
CPU = torch.device("cpu")


def build_mixer(radius: int, count: int = 3) -> WindowMixer:
    """In float64, its norms and biases not at their initial values."""
    torch.manual_seed(0)
    mixer = WindowMixer(DIM, HEADS, WindowOptions(radius=radius, global_tokens=count), gain=1.0).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lattice(rows: int, cols: int) -> Tensor:
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1)
    return grid.reshape(1, -1, 2).double()


def overview(rows: int, cols: int, factor: int) -> Tensor:
    """A lattice and tokens at the centres of factor x factor of its places."""
    coarse = lattice(rows // factor, cols // factor) * factor + (factor - 1) / 2
    return torch.cat((lattice(rows, cols), coarse), dim=1)


def islands() -> Tensor:
    """Small squares far from each other, one of them a single token."""
    squares = [lattice(7, 7) + torch.tensor(corner) for corner in ((0.0, 0.0), (9.0, 3.0), (5000.0, 2.0), (3.0, 1e6))]
    return torch.cat((*squares, torch.tensor([[[123.0, 456.0]]], dtype=torch.float64)), dim=1)


def crowd() -> Tensor:
    """Most tokens in one place, the others around it."""
    return torch.cat((torch.full((1, 200, 2), 9.0, dtype=torch.float64), lattice(20, 8)), dim=1)


SCENES: dict[str, tuple[Tensor, Tensor | None]] = {
    "one token": (lattice(1, 1), None),
    "full lattice": (lattice(19, 14), None),
    "one row": (lattice(1, 150), None),
    "overview": (overview(16, 12, 4), None),
    "scattered": (uniform(1, 220, 2) * 40, None),
    "crowd": (crowd(), None),
    "islands": (islands(), None),
    "ragged": (lattice(13, 12).expand(3, -1, -1), uniform(3, 156, seed=1) > torch.tensor([[0.1], [0.5], [0.99]])),
    "different places": (torch.cat((lattice(15, 6), uniform(1, 90, 2) * 9)), None),
}


def around(places: Places, radius: int) -> Tensor:
    return (places.coords.unsqueeze(2) - places.coords.unsqueeze(1)).abs().amax(-1) <= radius


@pytest.mark.parametrize("segment", [None, 130, 5])
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("radius", "count"), [(3, 3), (1, 0), (30, 1)])
def test_equals_dense_attention(segment: int | None, scene: str, radius: int, count: int) -> None:
    coords, validity = SCENES[scene]
    mixer, places = build_mixer(radius, count), find_places(coords, validity, "raster", CPU)
    x = draw(*places.valid.shape, DIM)
    global_tokens = draw(len(x), count, DIM, seed=2) if count else None
    leaves = [t for t in (x, global_tokens, *mixer.parameters()) if t is not None]

    y, found, state = mixer(x, global_tokens, places, run_for(x, segment), None)
    assert state is None
    expected = dense_mixer(mixer.attention, mixer.read, x, global_tokens, places, around(places, radius))
    torch.testing.assert_close(
        outputs_and_gradients((y, found), places, leaves),
        outputs_and_gradients(expected, places, leaves),
        rtol=1e-9,
        atol=1e-11,
    )


def build(**kwargs: object) -> ContextEncoder:
    torch.manual_seed(0)
    return build_context(ContextConfig(kind="window", dim=8, heads=2, summary=0, **kwargs)).double()


def test_order_does_not_matter() -> None:
    tokens, coords = draw(1, 300, 8), uniform(1, 300, 2) * 30
    settings = ({"order": "hilbert"}, {"order": "raster"}, {"order": "snake", "alternate": True})
    a, b, c = (build(options={"radius": 4}, **setting)(tokens, coords)[0] for setting in settings)
    torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep_tokens", [0, 1000])
def test_square_is_all_that_a_token_hears_of_without_global_tokens(keep_tokens: int) -> None:
    options = {"radius": 3, "global_tokens": 0}
    tokens, coords = draw(1, 600, 8), lattice(20, 30)
    y, _ = build(depth=2, options=options, keep_tokens=keep_tokens, segment=70)(tokens, coords)
    (grad,) = torch.autograd.grad(y[:, 9 * 30 + 12].square().sum(), tokens)
    heard = coords[0, grad[0].abs().amax(-1) > 0]
    assert heard.amin(0).tolist() == [3, 6]
    assert heard.amax(0).tolist() == [15, 18]
    assert len(heard) == 13 * 13


def test_gradient_of_a_look_up() -> None:
    table = torch.tensor([[0, 3, 3], [5, 0, 1]])  # rows 2 and 4 nowhere
    x = draw(6, 2, 3)
    assert torch.equal(_look_up(x, table), x[table])
    assert torch.autograd.gradcheck(lambda x: _look_up(x, table), (x,))


def test_bfloat16_autocast_is_near() -> None:
    encoder, coords = build(options={"radius": 4}, keep_tokens=0, segment=100).float(), lattice(20, 15).float()
    tokens, weights = draw(1, 300, 8).detach().float().requires_grad_(), draw(1, 300, 8, seed=1).float()
    exact, _ = encoder(tokens, coords)
    (exact_grad,) = torch.autograd.grad((exact * weights).sum(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(tokens, coords)
    (grad,) = torch.autograd.grad((y * weights).sum(), tokens)
    assert (y - exact).norm() / exact.norm() < 0.02
    assert (grad - exact_grad).norm() / exact_grad.norm() < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"radius": 0}}, "context.options.radius: expected at least 1, got 0"),
        ({"options": {"global_tokens": -1}}, "context.options.global_tokens: expected at least 0, got -1"),
        ({"options": {"window": 3}}, "context.options.window: unknown key"),
        ({"bidirectional": False}, "`window` looks both ways"),
        ({"dim": 30}, "context.dim: `window` needs a multiple of 4"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ContextConfig(kind="window", **settings)
    assert message in str(caught.value)
