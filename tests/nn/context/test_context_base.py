from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gigaxt.config import from_dict, to_dict
from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.context import ContextConfig, ContextEncoder, ContextState, base, build_context, register_context

TOKENS, COORDS = torch.ones(2, 6, 8), torch.zeros(2, 6, 2)


def small(kind: str = "mamba2", **kwargs: object) -> ContextEncoder:
    return build_context(ContextConfig(kind=kind, dim=8, depth=1, summary=2, **kwargs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mamba3"}, "context.kind: unknown 'mamba3'; did you mean `mamba`"),
        ({"kind": "zzz"}, "known: none, full, hyper, longformer, mamba, mamba2, window, xl"),
        ({"depth": 0}, "context.depth: expected at least 1, got 0"),
        ({"dim": 0}, "context.dim: expected at least 1"),
        ({"summary": -1}, "context.summary: expected at least 0"),
        ({"order": "hilber"}, "did you mean `hilbert`"),
        ({"mlp_ratio": 0}, "context.mlp_ratio: expected more than 0"),
        ({"mlp_ratio": float("inf")}, "context.mlp_ratio: expected more than 0"),
        ({"budget_gib": float("nan")}, "context.budget_gib: expected at least 0, got nan"),
        ({"host_gib": float("inf")}, "context.host_gib: expected at least 0, got inf"),
        ({"mlp_ratio": 0.001}, "a hidden width of at least 1 at dim 192, got 0.001"),
        ({"heads": 0}, "context.heads: expected at least 1"),
        ({"heads": 5}, "context.heads: expected a divisor of dim x expand = 384, got 5"),
        ({"kind": "full", "heads": 5}, "divisible by 4 x heads"),
        ({"kind": "full", "dim": 30}, "context.dim: `full` needs a multiple of 4 (2-D rotary positions), got 30"),
        ({"kind": "full", "bidirectional": False}, "`full` looks both ways"),
        ({"options": {"expend": 1}}, "context.options.expend: unknown key; did you mean `expand`"),
        ({"options": {"conv": 1}}, "context.options.conv: expected at least 2, got 1"),
        ({"kind": "full", "options": {"expand": 1}}, "context.options.expand: unknown key"),
    ],
)
def test_config_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ContextConfig(**settings)
    assert message in str(caught.value)


def test_config_goes_through_plain_data() -> None:
    config = ContextConfig(kind="mamba2", heads=3, options={"state": 16})
    assert from_dict(ContextConfig, to_dict(config)) == config


@pytest.mark.parametrize("kind", ["none", "full", "mamba2"])
def test_input_is_checked(kind: str) -> None:
    encoder = small(kind)
    for tokens, coords, validity, error, message in (
        (
            TOKENS[..., :5],
            COORDS,
            None,
            ConfigError,
            "expected floating-point tokens (batch, tokens, 8), got (2, 6, 5)",
        ),
        (TOKENS.long(), COORDS, None, ConfigError, "floating-point"),
        (TOKENS[0], COORDS, None, ConfigError, "(6, 8)"),
        (TOKENS[:, :0], COORDS[:, :0], None, DataError, "at least one token, got (2, 0, 8)"),
        (TOKENS, COORDS[:, :5], None, ConfigError, "expected coords (2, 6, 2)"),
        (TOKENS, COORDS, torch.ones(2, 6), ConfigError, "expected validity (2, 6) of bool"),
    ):
        with pytest.raises(error) as caught:
            encoder(tokens, coords, validity)
        assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["full", "mamba2"])
def test_places_are_checked(kind: str) -> None:
    encoder = small(kind)
    validity = torch.tensor([[True] * 6, [False] * 6])
    with pytest.raises(DataError, match="every token of batch row 1 is masked"):
        encoder(TOKENS, COORDS, validity)
    coords = COORDS.clone()
    coords[1, 2, 0] = torch.nan
    with pytest.raises(DataError, match="coordinates of token 2 in batch row 1 are"):
        encoder(TOKENS, coords)
    for outside in (-1.0, 2.0**25, torch.inf):
        coords[1, 2, 0] = outside
        with pytest.raises(DataError, match="on the token lattice, finite numbers from 0 to 16777216"):
            encoder(TOKENS, coords)
    validity = torch.ones(2, 6, dtype=torch.bool)
    validity[1, 2] = False
    assert encoder(TOKENS, coords, validity)[0].isfinite().all()  # a masked token may be anywhere


@pytest.mark.parametrize("kind", ["longformer", "window", "hyper", "full"])
@pytest.mark.parametrize("dim", [4, 20, 100, 212])
def test_heads_are_found_for_any_multiple_of_4(kind: str, dim: int) -> None:
    encoder = build_context(ContextConfig(kind=kind, dim=dim, depth=1, summary=2))
    assert encoder(torch.randn(1, 6, dim), COORDS[:1])[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float64])
def test_coordinates_of_any_number_type(dtype: torch.dtype) -> None:
    encoder, coords = small("window", options={"radius": 1}), torch.cartesian_prod(torch.arange(2), torch.arange(3))
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected, _ = encoder(tokens, coords.float().expand(2, -1, -1))
    torch.testing.assert_close(encoder(tokens, coords.to(dtype).expand(2, -1, -1))[0], expected)
    if dtype in (torch.bfloat16, torch.float16):  # in which the places 2049 and 2050 are one
        with pytest.raises(DataError, match="tells no larger ones apart, give float32"):
            encoder(tokens, (coords + 2050).to(dtype).expand(2, -1, -1))


CAUSAL = {"bidirectional": False, "summary": 0, "order": "raster", "dim": 8}


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "xl"])
def test_states_that_do_not_fit_are_refused(kind: str) -> None:
    others = {"mamba": "xl", "mamba2": "mamba", "xl": "mamba2"}

    def state_of(batch: int = 2, dtype: torch.dtype = torch.float64, **changed: object) -> ContextState:
        config = ContextConfig(**{"kind": kind, "depth": 1, **CAUSAL, **changed})
        tokens = torch.ones(batch, 6, config.dim, dtype=dtype)
        state = build_context(config).to(dtype)(tokens, COORDS[:batch])[1]
        assert state is not None
        return state

    encoder = build_context(ContextConfig(kind=kind, depth=1, **CAUSAL)).double()
    tokens = TOKENS.double()
    encoder(tokens, COORDS, None, state_of())
    wrong = (
        state_of(depth=2),
        state_of(dim=12),
        state_of(batch=1),
        state_of(dtype=torch.float32),
        state_of(kind=others[kind]),
        state_of()[:-1],
        (),
        "state",
    )
    for state in wrong:
        with pytest.raises(
            ConfigError, match=f"not one of this encoder .'{kind}', 1 layers of dim 8. for 2 batch rows"
        ):
            encoder(tokens, COORDS, None, state)


@pytest.mark.parametrize(
    ("order", "first", "then", "fine"),
    [
        ("raster", [(0, 0), (1, 2)], [(2, 0), (2, 1)], True),
        ("raster", [(0, 0), (1, 2)], [(1, 3), (1, 4)], True),
        ("raster", [(0, 0), (1, 2)], [(1, 2), (1, 3)], True),  # two tokens may share a place
        ("raster", [(0, 0), (1, 2)], [(1, 1), (2, 0)], False),
        ("raster", [(0, 0), (1, 2.5)], [(1, 2.25), (2, 0)], False),
        ("snake", [(0, 0), (1, 2)], [(1, 1), (1, 0)], True),
        ("snake", [(0, 0), (1, 2)], [(1, 3), (2, 0)], False),
        ("hilbert", [(0, 0), (2, 1)], [(1, 2), (3, 3)], True),
        ("hilbert", [(0, 0), (1, 2)], [(2, 1), (3, 3)], False),
        ("hilbert", [(0, 0), (1, 1)], [(4, 4), (5, 4)], True),
    ],
)
def test_parts_out_of_order_are_refused(order: str, first: list[object], then: list[object], fine: bool) -> None:
    """Else a scene would be continued, and come out otherwise than in one pass."""
    config = ContextConfig(kind="mamba2", depth=1, **{**CAUSAL, "order": order})
    encoder = build_context(config).double()
    tokens = torch.randn(1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coords = torch.tensor([*first, *then], dtype=torch.float64)[None]
    whole, _ = encoder(tokens, coords)
    _, state = encoder(tokens[:, :2], coords[:, :2])
    if not fine:
        with pytest.raises(ConfigError, match=f"lie ahead of its end .* in the scan order '{order}'"):
            encoder(tokens[:, 2:], coords[:, 2:], None, state)
        return
    torch.testing.assert_close(encoder(tokens[:, 2:], coords[:, 2:], None, state)[0], whole[:, 2:])


def test_state_is_refused_where_nothing_is_causal() -> None:
    state = ((torch.zeros(1),),)
    for encoder in (small("full"), small("none"), small("mamba2"), small("mamba2", bidirectional=False)):
        assert not encoder.causal
        with pytest.raises(ConfigError, match="bidirectional=False, summary=0 and alternate=False"):
            encoder(TOKENS, COORDS, None, state)


def test_none_returns_the_tokens() -> None:
    validity = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]]).bool()
    tokens = torch.where(validity[..., None], TOKENS, torch.nan)
    y, state = small("none")(tokens, COORDS, validity)
    assert state is None
    assert torch.equal(y, validity[..., None] * TOKENS)
    assert small("none")(TOKENS, COORDS)[0] is TOKENS


def test_other_kinds_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "KINDS", dict(base.KINDS))

    class Twice(ContextEncoder):
        def encode(
            self, tokens: Tensor, coords: Tensor, validity: Tensor | None, state: ContextState | None
        ) -> tuple[Tensor, ContextState | None]:
            return 2 * tokens, None

    register_context("twice", Twice)
    register_context("twice", Twice)  # a module that is imported again
    assert torch.equal(small("twice")(TOKENS, COORDS)[0], 2 * TOKENS)
    with pytest.raises(ConfigError, match="'full' is already Full"):
        register_context("full", Twice)


def test_alternate_scans_the_other_way_in_every_other_layer() -> None:
    torch.manual_seed(0)
    encoder = build_context(
        ContextConfig(dim=8, depth=3, summary=0, order="raster", alternate=True, options={"state": 4})
    )
    assert not encoder.causal
    tokens, coords = torch.randn(1, 12, 8), torch.cartesian_prod(torch.arange(3), torch.arange(4))[None]
    seen: list[Tensor] = []
    for layer in encoder.layers:
        layer.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[2].coords[0]))
    encoder(tokens, coords)
    across = coords[0].view(3, 4, 2).transpose(0, 1).flatten(0, 1).float()
    assert [torch.equal(a, b) for a, b in zip(seen, (coords[0].float(), across, coords[0].float()), strict=True)] == [
        True
    ] * 3
    # Transposed scenes: what the second layer of one sees first, the first layer of the other does.
    assert not encoder(tokens, coords)[0].allclose(encoder(tokens, coords.flip(-1))[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["full", "mamba2"])
def test_overflow_of_float16_is_an_error(kind: str) -> None:
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    for half in (False, True):
        encoder = small(kind)
        module, x = (encoder.half(), tokens.half()) if half else (encoder, tokens)
        autocast = torch.autocast("cpu", torch.float16, enabled=not half, cache_enabled=False)
        with autocast:
            assert module(x, COORDS)[0].isfinite().all()
        torch.nn.init.constant_(encoder.layers[0].finish.mlp[0].weight, 6e4)
        with autocast, pytest.raises(DataError, match="inf or NaN came out of float16"):
            module(x, COORDS)
        assert encoder.float()(tokens, COORDS)[0].isfinite().all()
