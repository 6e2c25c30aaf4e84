from __future__ import annotations

import pytest
import torch
from dense_near import dense_mixer, outputs_and_gradients, run_for
from torch import Tensor

from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.context.longformer import LongformerMixer, LongformerOptions
from gigaxt.nn.context.ordering import Places, find_places

DIM, HEADS = 8, 2
CPU = torch.device("cpu")


def build_mixer(window: int, count: int = 3) -> LongformerMixer:
    """In float64, its norms and biases not at their initial values."""
    torch.manual_seed(0)
    mixer = LongformerMixer(DIM, HEADS, LongformerOptions(window=window, global_tokens=count), gain=1.0).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def scattered(batch: int, tokens: int, ragged: bool = False) -> Places:
    generator = torch.Generator().manual_seed(1)
    coords = torch.rand(batch, tokens, 2, dtype=torch.float64, generator=generator) * 30
    validity = torch.rand(batch, tokens, generator=generator) > torch.tensor([[0.0], [0.5], [0.9]])[:batch]
    return find_places(coords, validity if ragged else None, "hilbert", CPU)


def in_window(places: Places, window: int) -> Tensor:
    order = torch.arange(places.valid.shape[1])
    near = (order[:, None] - order).abs() <= window
    return near.expand(len(places.valid), -1, -1)


@pytest.mark.parametrize("segment", [None, 30, 8])
@pytest.mark.parametrize(
    ("batch", "tokens", "window", "ragged", "count"),
    [
        (1, 1, 4, False, 3),  # a token alone
        (1, 1, 4, False, 0),
        (2, 5, 9, False, 1),  # fewer than the window
        (1, 10, 4, False, 3),  # a block and a bit
        (1, 61, 4, False, 9),  # many blocks, more global tokens than spare channels
        (3, 50, 4, True, 3),  # rows of different length
        (3, 50, 7, True, 0),
        (2, 33, 1, True, 2),
    ],
)
def test_equals_dense_attention(
    segment: int | None, batch: int, tokens: int, window: int, ragged: bool, count: int
) -> None:
    mixer, places = build_mixer(window, count), scattered(batch, tokens, ragged)
    x = draw(batch, places.valid.shape[1], DIM)
    global_tokens = draw(batch, count, DIM, seed=2) if count else None
    leaves = [t for t in (x, global_tokens, *mixer.parameters()) if t is not None]

    y, found, state = mixer(x, global_tokens, places, run_for(x, segment), None)
    assert state is None
    expected = dense_mixer(mixer.attention, mixer.read, x, global_tokens, places, in_window(places, window))
    torch.testing.assert_close(
        outputs_and_gradients((y, found), places, leaves),
        outputs_and_gradients(expected, places, leaves),
        rtol=1e-9,
        atol=1e-11,
    )


def test_equals_the_attention_of_transformers() -> None:
    """With global tokens ahead of the others and padding behind them. Theirs does not compute in float64."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    window, count, tokens = 8, 3, 45  # theirs wants a multiple of 16, in all
    config = transformers.LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[2 * window], attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    theirs = modeling.LongformerSelfAttention(config, layer_id=0)
    ours = LongformerMixer(DIM, HEADS, LongformerOptions(window=window, global_tokens=count), gain=1.0)
    attention, read = ours.attention, ours.read
    assert read is not None
    linears = [attention.query, attention.key_value, read.query, read.key, read.value]
    their_linears = [
        theirs.query,
        theirs.key,
        theirs.value,
        theirs.query_global,
        theirs.key_global,
        theirs.value_global,
    ]
    with torch.no_grad():
        attention.out.weight.copy_(torch.eye(DIM))  # theirs ends ahead of the last projection
        weights = torch.cat([layer.weight for layer in linears]).split(DIM)  # keys and values are one layer in ours
        for weight, other in zip(weights, their_linears, strict=True):
            other.weight.copy_(weight)
            other.bias.zero_()
    x, given = draw(2, tokens, DIM).float(), draw(2, count, DIM, seed=1).float()
    valid = torch.arange(tokens) < torch.tensor([[tokens], [29]])
    # At one place all, so that nothing is turned and the order stays.
    places = find_places(torch.zeros(2, tokens, 2), valid, "raster", CPU)

    def their_attention(global_tokens: Tensor) -> Tensor:
        kind = torch.cat((torch.ones(2, count), torch.where(valid, 0.0, -1.0)), dim=1)
        normed = torch.cat((attention.norm(global_tokens), attention.norm(x)), dim=1)
        (found,) = theirs(normed, kind, kind < 0, kind > 0, is_global_attn=True)
        return found

    changed = given + their_attention(given)[:, :count]  # ours read first
    expected = (x + their_attention(changed)[:, count:], changed)
    outputs, grads = outputs_and_gradients(expected, places, [x, given, *(layer.weight for layer in their_linears)])
    for segment in (None, 32):
        results = ours(x, given, places, run_for(x, segment), None)[:2]
        found, ours_grads = outputs_and_gradients(results, places, [x, given, *(layer.weight for layer in linears)])
        torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours_grads[:2], grads[:2], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat(ours_grads[2:]), torch.cat(grads[2:]), rtol=1e-4, atol=1e-5)


def test_window_is_all_that_a_token_hears_of_without_global_tokens() -> None:
    config = ContextConfig(
        kind="longformer", dim=8, depth=2, summary=0, order="raster", options={"window": 5, "global_tokens": 0}
    )
    torch.manual_seed(0)
    encoder, tokens = build_context(config).double(), draw(1, 40, 8)
    y, _ = encoder(tokens, torch.stack((torch.zeros(40), torch.arange(40)), dim=-1)[None])
    (grad,) = torch.autograd.grad(y[:, 20].square().sum(), tokens)
    heard = grad[0].abs().amax(-1) > 0
    assert heard.nonzero().flatten().tolist() == list(range(10, 31))


def test_segments_overlap_by_no_more_than_the_window() -> None:
    """Rows that fit one segment are computed without a halo; long ones in segments of whole windows."""
    seen: list[int] = []
    mixer = build_mixer(window=6)
    mixer.attention.norm.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    for batch, tokens, expected in (
        (1, 20, [20]),
        (2, 10, [10]),
        (1, 50, [12 + 18] * 2 + [12 + 14]),
        (9, 13, [18] * 2 + [13]),
    ):
        places = scattered(1, tokens)
        x, given = torch.zeros(batch, tokens, DIM).double(), torch.zeros(batch, 3, DIM).double()
        places.coords, places.valid = places.coords.expand(batch, -1, -1), places.valid.expand(batch, -1)
        seen.clear()
        with torch.no_grad():
            mixer(x, given, places, run_for(x, 20), None)
        assert seen[1::2] == expected  # in between: the global tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "context.options.window: expected at least 1, got 0"),
        ({"global_tokens": -1}, "context.options.global_tokens: expected at least 0, got -1"),
        ({"windows": 3}, "did you mean `window`"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ContextConfig(kind="longformer", options=options)
    assert message in str(caught.value)
