from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context, xl
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import Places, find_places
from gigaxt.nn.context.xl import Reach, TransformerXLMixer, shift

DIM, HEADS = 8, 2


def build_mixer(seed: int = 0, bidirectional: bool = True, dim: int = DIM, **options: object) -> TransformerXLMixer:
    """In float64, with biases that are not zero."""
    torch.manual_seed(seed)
    config = ContextConfig(kind="xl", dim=dim, heads=HEADS, bidirectional=bidirectional, options=options)
    mixer = TransformerXLMixer(config, gain=1.0).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return mixer


def draw(batch: int, tokens: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.randn(batch, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def line(batch: int, tokens: int, start: int = 0) -> Tensor:
    """Coordinates of one row of the lattice."""
    cols = torch.arange(start, start + tokens, dtype=torch.float64)
    return torch.stack((torch.zeros_like(cols), cols), dim=-1).expand(batch, -1, -1)


def in_line(x: Tensor, validity: Tensor | None = None) -> Places:
    return find_places(line(*x.shape[:2]), validity, "raster", x.device)


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def one_by_one(mixer: TransformerXLMixer, x: Tensor) -> Tensor:
    """The paper's attention of one row (tokens, dim), one token, head and key at a time."""
    attention, found = mixer.attention, []
    norm, width = attention.norm, x.shape[-1] // HEADS
    for i, token in enumerate(x):
        first = i - i % mixer.segment
        start, stop = first - mixer.memory * mixer.segment, first + (1 + mixer.memory) * mixer.segment
        keys = range(max(start, 0), i + 1 if mixer.causal else min(stop, len(x)))
        inside = [first <= j < first + mixer.segment or attention.memory_grad for j in keys]
        seen = torch.stack([x[j] if own else x[j].detach() for j, own in zip(keys, inside, strict=True)])
        k, v = attention.key_value(norm(seen)).chunk(2, dim=-1)
        waves = 10_000 ** -(torch.arange(0, len(token), 2, dtype=x.dtype) / len(token))
        angles = torch.tensor([i - j for j in keys], dtype=x.dtype)[:, None] * waves
        r = attention.position(torch.cat((angles.sin(), angles.cos()), dim=-1))
        heads = []
        for h, part in enumerate(torch.arange(len(token)).split(width)):
            q = attention.query(norm(token))[part]
            scores = k[:, part] @ (q + attention.content_bias[h]) + r[:, part] @ (q + attention.position_bias[h])
            heads.append((scores / math.sqrt(width)).softmax(0) @ v[:, part])
        found.append(token + attention.out(torch.cat(heads)))
    return torch.stack(found)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("memory_grad", [False, True])
@pytest.mark.parametrize(
    ("tokens", "segment", "memory"), [(22, 4, 1), (22, 4, 2), (23, 3, 0), (9, 1, 3), (5, 8, 1), (1, 4, 1), (9, 4, 5)]
)
def test_equals_attention_one_by_one(
    tokens: int, segment: int, memory: int, memory_grad: bool, bidirectional: bool
) -> None:
    mixer = build_mixer(bidirectional=bidirectional, segment=segment, memory=memory, memory_grad=memory_grad)
    x = draw(2, tokens).requires_grad_()
    leaves, weights = [x, *mixer.parameters()], draw(2, tokens, seed=1)
    expected = torch.stack([one_by_one(mixer, row) for row in x])
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
    for keep_tokens in (0, 1000):
        y, global_tokens, state = mixer(x, None, in_line(x), Run(2, tokens, 12, keep_tokens), None)
        assert global_tokens is None
        assert (state is None) == bidirectional
        close(y, expected)
        close(torch.autograd.grad((y * weights).sum(), leaves), expected_grads)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("memory_grad", [False, True])
@pytest.mark.parametrize("memory", [1, 2])
def test_equals_the_attention_of_xlnet(memory: int, memory_grad: bool, bidirectional: bool) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    segment, before = 6, 6 * memory
    mixer = build_mixer(bidirectional=bidirectional, segment=segment, memory=memory, memory_grad=memory_grad)
    ours = mixer.attention
    config = transformers.XLNetConfig(d_model=DIM, n_head=HEADS, d_inner=DIM, n_layer=1, dropout=0.0)
    theirs = modeling.XLNetRelativeAttention(config).double()
    theirs.layer_norm = nn.Identity()  # the result is then what was found, plus the input
    k, v = ours.key_value.weight.chunk(2)
    pairs = [(theirs.q, ours.query.weight), (theirs.k, k), (theirs.v, v), (theirs.r, ours.position.weight)]
    with torch.no_grad():
        for their, mine in pairs:
            their.copy_(mine.T.reshape(their.shape))
        theirs.o.copy_(ours.out.weight.reshape(theirs.o.shape))
        theirs.r_w_bias.copy_(ours.content_bias)
        theirs.r_r_bias.copy_(ours.position_bias)

    # What is compared is one segment, the memories around it and some more tokens.
    x = draw(2, 3 * before + segment).requires_grad_()
    asked = slice(2 * before, 2 * before + segment)
    y, _, _ = mixer(x, None, in_line(x), Run(*x.shape[:2], segment, 0), None)

    hidden = ours.norm(
        x if memory_grad else torch.cat((x[:, : asked.start].detach(), x[:, asked], x[:, asked.stop :].detach()), 1)
    )
    hidden = hidden.transpose(0, 1)
    earlier, here = hidden[before : asked.start], hidden[asked.start : asked.stop + (before if bidirectional else 0)]
    queries, keys = len(here), len(earlier) + len(here)
    model = SimpleNamespace(
        d_model=DIM, attn_type="bi" if bidirectional else "uni", bi_data=False, clamp_len=-1,
        positional_embedding=modeling.XLNetModel.positional_embedding,
    )  # fmt: skip
    distances = modeling.XLNetModel.relative_positional_encoding(model, queries, keys, bsz=2)
    later = torch.ones(queries, keys, dtype=torch.float64).triu(len(earlier) + 1)[:, :, None, None]
    (expected, _) = theirs(here, None, None if bidirectional else later, None, distances, None, mems=earlier)
    expected = x[:, asked] + (expected - here)[:segment].transpose(0, 1)

    torch.testing.assert_close(y[:, asked], expected, rtol=1e-5, atol=1e-6)  # their sinusoids are float32
    weights = draw(2, segment, seed=1)
    inputs = [x, ours.query.weight, ours.key_value.weight, ours.position.weight, ours.out.weight]
    found = torch.autograd.grad((y[:, asked] * weights).sum(), [*inputs, ours.content_bias, ours.position_bias])
    sought = [x, theirs.q, theirs.k, theirs.v, theirs.r, theirs.o, theirs.r_w_bias, theirs.r_r_bias]
    of_x, *of_weights = torch.autograd.grad((expected * weights).sum(), sought)
    q, k, v, r = (g.reshape(DIM, DIM).T for g in of_weights[:4])
    expected_grads = [of_x, q, torch.cat((k, v)), r, of_weights[4].reshape(DIM, DIM), *of_weights[5:]]
    torch.testing.assert_close(list(found), expected_grads, rtol=1e-5, atol=1e-5)


def build_causal(memory_grad: bool = False, **kwargs: object) -> ContextEncoder:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "kind": "xl", "dim": DIM, "depth": 2, "summary": 0, "bidirectional": False, "order": "raster", "segment": 12,
        "options": {"segment": 6, "memory": 2, "memory_grad": memory_grad}, **kwargs,
    }  # fmt: skip
    encoder = build_context(ContextConfig(**settings)).double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return encoder


@pytest.mark.parametrize("memory_grad", [False, True])
@pytest.mark.parametrize("keep_tokens", [0, 1000])
@pytest.mark.parametrize("ragged", [False, True])
def test_continued_by_state_equals_one_pass(memory_grad: bool, keep_tokens: int, ragged: bool) -> None:
    encoder = build_causal(memory_grad, keep_tokens=keep_tokens)
    lengths = [1, 1, 3, 6, 2, 13, 1, 24, 4]  # within a segment, over its border, to its border, several at once
    tokens, total = draw(2, sum(lengths)).requires_grad_(), sum(lengths)
    coords, weights = line(2, total), draw(2, total, seed=1)
    validity = torch.ones(2, total, dtype=torch.bool)
    if ragged:
        validity[1, [2, 6, 7, *range(14, 25), 28, *range(40, 48)]] = False
    leaves = [tokens, *encoder.parameters()]
    whole, whole_state = encoder(tokens, coords, validity)
    expected = torch.autograd.grad((whole * weights).sum(), leaves)

    state, parts = None, []
    pieces = (t.split(lengths, dim=1) for t in (tokens, coords, validity))
    for piece in zip(*pieces, strict=True):
        part, state = encoder(*piece, state)
        parts.append(part)
    assert state is not None
    y = torch.cat(parts, dim=1)
    close(y, whole)
    close(state, whole_state)
    close(torch.autograd.grad((y * weights).sum(), leaves), expected)


def test_state_holds_no_more_than_the_next_tokens_need() -> None:
    encoder = build_causal()
    for tokens, held in ((1, 1), (5, 5), (17, 17), (18, 12), (19, 13), (23, 17), (24, 12), (40, 16)):
        _, state = encoder(draw(1, tokens), line(1, tokens))
        assert state is not None
        assert [(x.shape[1], count.tolist()) for x, count in state[:-1]] == [(held, [held])] * 2


def test_state_of_another_batch_is_refused() -> None:
    encoder = build_causal()
    _, state = encoder(draw(2, 4), line(2, 4))
    with pytest.raises(ConfigError, match=r"the state is not one of this encoder .* for 1 batch rows"):
        encoder(draw(1, 4), line(1, 4), None, state)


@pytest.mark.parametrize("memory_grad", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_reach_is_depth_times_memory(bidirectional: bool, memory_grad: bool) -> None:
    encoder = build_causal(memory_grad, bidirectional=bidirectional, options={"segment": 3, "memory_grad": memory_grad})
    tokens = draw(1, 27).requires_grad_()
    y, _ = encoder(tokens, line(1, 27))
    (grad,) = torch.autograd.grad(y[0, 13].square().sum(), tokens)
    reached = [bool(s.any()) for s in grad[0].abs().amax(-1).split(3)]
    heard = []
    for segment in range(9):
        changed = tokens.detach().clone()
        changed[0, 3 * segment] += 1
        heard.append(not torch.equal(encoder(changed, line(1, 27))[0][0, 13], y[0, 13]))
    assert heard == [2 <= s <= (6 if bidirectional else 4) for s in range(9)]
    assert reached == (heard if memory_grad else [s == 4 for s in range(9)])
    if not bidirectional:
        assert grad[0, 14:].eq(0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_nothing_is_computed_for_memory_that_is_not_there(bidirectional: bool) -> None:
    mixer, seen = build_mixer(bidirectional=bidirectional, segment=8, memory=2), []
    mixer.attention.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    for tokens in (1, 5, 8, 9, 16, 17, 100):
        x = draw(1, tokens)
        mixer(x, None, in_line(x), Run(1, tokens, 4096, 0), None)
    before = [(1, 0), (5, 0), (8, 0), (8, 1), (8, 1), (8, 2), (8, 2)]
    assert seen == [(segment, memory, memory if bidirectional else 0) for segment, memory in before]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_scores_in_parts_change_nothing(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build_mixer(bidirectional=bidirectional, segment=4), draw(2, 30).requires_grad_()
    results = []
    for scores in (2**22, 3 * 2 * 4 * 12, 1):
        monkeypatch.setattr(xl, "SCORES_AT_ONCE", scores)
        y, _, _ = mixer(x, None, in_line(x), Run(2, 30, 0, 1000), None)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])))
    close(results[1], results[0])
    close(results[2], results[0])


@pytest.mark.parametrize(("segment", "distances", "width"), [(4, 13, 12), (4, 16, 12), (1, 4, 3), (5, 10, 5)])
def test_shift_is_a_view_by_key(segment: int, distances: int, width: int) -> None:
    scores = torch.arange(2.0 * segment * distances).reshape(2, segment, distances)
    shifted = shift(scores, width)
    assert shifted.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()
    for i in range(segment):
        for key in range(width):
            place = segment - 1 - i + key
            if place < distances:
                assert torch.equal(shifted[:, i, key], scores[:, i, place])


def test_windows_put_segments_between_their_memories() -> None:
    own = torch.arange(10).reshape(1, 5, 2, 1)
    windows = Reach(2, 1, 2).windows(own, -own)
    assert windows.squeeze().tolist() == [[0, -1, 2, 3, -4, -5, -6, -7], [-2, -3, 4, 5, -6, -7, -8, -9]]


def test_large_scores_stay_finite_and_masked_tokens_silent() -> None:
    mixer = build_mixer(segment=4)
    with torch.no_grad():
        mixer.attention.query.weight.mul_(1e4)
    x, validity = draw(2, 30), torch.ones(2, 30, dtype=torch.bool)
    validity[1, 5:] = False  # whole segments of which nothing is valid, nor in their memories
    places = in_line(x, validity)
    x = places.sort(x).requires_grad_()
    y, _, _ = mixer(x, None, places, Run(2, 30, 8, 0), None)
    assert y.isfinite().all()
    y[places.valid].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[~places.valid].eq(0).all()


def test_odd_dim_and_one_head() -> None:
    encoder = build_context(ContextConfig(kind="xl", dim=5, depth=1, summary=2, options={"segment": 4})).double()
    y, _ = encoder(draw(1, 11, dim=5), line(1, 11))
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = build_context(ContextConfig(kind="xl", dim=32, depth=1, summary=4, options={"segment": 16}))
    tokens, coords = torch.randn(1, 300, 32), line(1, 300).float()
    exact, _ = encoder(tokens, coords)
    with torch.autocast("cpu", dtype):
        y, _ = encoder(tokens.to(dtype), coords)
    assert (y - exact).norm() / exact.norm() < 0.02


def test_config_refuses() -> None:
    for settings, message in (
        ({"options": {"segment": 0}}, "context.options.segment: expected at least 1, got 0"),
        ({"options": {"memory": -1}}, "context.options.memory: expected at least 0, got -1"),
        ({"options": {"mem_grad": True}}, "did you mean `memory_grad`"),
        ({"heads": 5}, "context.heads: expected a divisor of dim = 192, got 5"),
    ):
        with pytest.raises(ConfigError) as caught:
            ContextConfig(kind="xl", **settings)
        assert message in str(caught.value)
