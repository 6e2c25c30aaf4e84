from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gigaxt
from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, ContextEncoder, HyperOptions, build_context, hyper
from gigaxt.nn.context.hyper import DRAW_STEPS, HyperMixer, hash_order, hyper_attention, sample_places, score_bias
from gigaxt.nn.context.layers import Run
from gigaxt.nn.context.ordering import find_places
from gigaxt.nn.context.positions import rotary_angles, rotate

SMALL = {"block": 16, "samples": 10, "hashes": 4, "exact_below": 20}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal(n: int) -> Tensor:
    """Coordinates (1, n, 2) of tokens on a strip."""
    return torch.stack((torch.arange(n), torch.arange(n) % 7), -1)[None]


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def gray_codes(bits: int) -> list[tuple[bool, ...]]:
    """The reflected code, by its definition."""
    if bits == 0:
        return [()]
    shorter = gray_codes(bits - 1)
    return [(False, *code) for code in shorter] + [(True, *code) for code in reversed(shorter)]


def places_in_order(x: Tensor, directions: Tensor) -> list[int]:
    """Where each token (n, head_dim) of a head stands in the sorted order."""
    buckets = gray_codes(directions.shape[1])
    keys = [(buckets.index(tuple((token @ directions > 0).tolist())), i) for i, token in enumerate(x)]
    return [sorted(keys).index(key) for key in keys]


def dense_weights(q: Tensor, k: Tensor, directions: Tensor, draws: Tensor, block: int) -> Tensor:
    """For how many keys each key counts in each query's softmax: (n, n), 0 where it is not seen."""
    n, count = len(q), min(len(draws), len(q))
    q_places, k_places = places_in_order(q, directions), places_in_order(k, directions)
    sampled = [math.floor((j + Fraction(int(draws[j]), DRAW_STEPS)) * n / count) for j in range(count)]
    weights = torch.zeros(n, n, dtype=q.dtype)
    for i, place in enumerate(q_places):
        start = max(0, min(place // block * block, n - block))
        for j, other in enumerate(k_places):
            in_block = start <= other < start + block
            weights[i, j] = 1 if in_block else sampled.count(other) * n / count
    return weights


def dense(mixer: HyperMixer, x: Tensor, coords: Tensor) -> Tensor:
    """The mixer on one row of a batch, written out with all n x n weights."""
    heads, options, n = mixer.attention.heads, mixer.options, len(x)
    cos, sin = (t[0] for t in rotary_angles(coords[None], x.shape[-1] // heads))
    q, k, v = (t.chunk(heads, dim=-1) for t in mixer.attention.qkv(mixer.attention.norm(x)).chunk(3, dim=-1))
    found = []
    for head in range(heads):
        q_head, k_head = rotate(q[head][None], cos, sin)[0], rotate(k[head][None], cos, sin)[0]
        weights = torch.ones(n, n, dtype=x.dtype)
        if n > options.exact_below:
            weights = dense_weights(q_head, k_head, mixer.directions[head], mixer.draws[head], options.block)
        scores = weights * (q_head @ k_head.T / math.sqrt(q_head.shape[-1])).exp()
        found.append(scores @ v[head] / scores.sum(-1, keepdim=True))
    return x + mixer.attention.out(torch.cat(found, dim=-1))


def build_mixer(**options: int) -> HyperMixer:
    torch.manual_seed(0)
    mixer = HyperMixer(16, 2, HyperOptions(**{**SMALL, **options}), gain=1.0).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(draw(*p.shape), alpha=0.1)
    return mixer


def build(seed: int = 0, **settings: object) -> ContextEncoder:
    torch.manual_seed(seed)
    return build_context(
        ContextConfig(kind="hyper", **{"dim": 16, "summary": 4, "options": SMALL, **settings})
    ).double()


@pytest.mark.parametrize("keep_tokens", [0, 1000])
def test_equals_weights_written_out(keep_tokens: int) -> None:
    mixer = build_mixer()
    counts = (77, 45, 16, 1, 64)  # not whole blocks, below the threshold, alone, whole blocks
    coords = torch.rand(len(counts), 77, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 20
    valid = torch.arange(77) < torch.tensor(counts)[:, None]
    places = find_places(coords, valid, "hilbert", coords.device)
    x, weights = draw(len(counts), 77, 16).requires_grad_(), draw(len(counts), 77, 16, seed=2)

    y, _, state = mixer(places.sort(x), None, places, Run(len(counts), 77, segment=20, keep_tokens=keep_tokens), None)
    assert state is None
    y = places.unsort(y)
    (y * weights).sum().backward()
    grads = [x.grad, *(p.grad for p in mixer.parameters())]
    x.grad = None
    mixer.zero_grad()

    sorted_x = places.sort(x)
    expected = torch.stack(
        [
            torch.cat((dense(mixer, sorted_x[b, :n], places.coords[b, :n]), draw(77 - n, 16)))
            for b, n in enumerate(counts)
        ]
    )
    expected = places.unsort(expected)
    (expected * weights).sum().backward()
    close(y, expected)
    close(grads, [x.grad, *(p.grad for p in mixer.parameters())])


def test_exact_up_to_the_threshold() -> None:
    full = build_context(ContextConfig(kind="full", dim=16)).double()
    tokens, coords = draw(1, 50, 16), diagonal(50)
    results = []
    for exact_below in (49, 50):
        hyper = build(options={**SMALL, "exact_below": exact_below}, summary=64)
        hyper.load_state_dict(full.state_dict(), strict=False)
        for encoder in (full, hyper):
            x = tokens.clone().requires_grad_()
            y, _ = encoder(x, coords)
            encoder.zero_grad()
            (y * draw(1, 50, 16, seed=1)).sum().backward()
            results.append((y, x.grad, [p.grad.clone() for p in encoder.parameters()]))
    assert (results[1][0] - results[0][0]).norm() > 1e-3
    close(results[3], results[2])


@pytest.mark.parametrize(("block", "samples"), [(8, 50), (8, 64), (1, 50), (49, 50), (50, 1), (64, 1)])
def test_exact_when_every_key_is_seen(block: int, samples: int) -> None:
    # With all keys sampled, those of a query's own block are found twice and must count once.
    q, k, v = (draw(2, 3, 50, 4, seed=seed) for seed in range(3))
    draws = torch.randint(DRAW_STEPS, (3, samples), generator=torch.Generator().manual_seed(0))
    y = hyper_attention(q, k, v, draw(3, 4, 5), draws, block)
    close(y, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_error_falls_with_samples() -> None:
    q, k, v = (draw(1, 4, 512, 8, seed=seed) for seed in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for samples in (16, 64, 256):
        draws = torch.randint(DRAW_STEPS, (4, samples), generator=torch.Generator().manual_seed(0))
        errors.append((hyper_attention(q, k, v, draw(4, 8, 6), draws, 16) - exact).norm() / exact.norm())
    # By theory like 1 / sqrt(samples), and faster as the sample becomes the whole.
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_samples_are_drawn_evenly() -> None:
    # 10,000 draws spread over the steps stand for all draws: each key's mean number is samples / n.
    steps = torch.arange(10_000) * DRAW_STEPS // 10_000
    for n, samples in ((10, 4), (257, 100), (7, 7), (5, 9)):
        count = min(samples, n)
        places = sample_places(steps[:, None].expand(-1, samples), n)
        assert places.shape == (10_000, count)
        drawn = torch.bincount(places.flatten(), minlength=n) / 10_000
        torch.testing.assert_close(drawn, torch.full((n,), count / n), atol=3e-4, rtol=0)


@pytest.mark.parametrize("step", [0, DRAW_STEPS - 1])
def test_samples_stay_inside(step: int) -> None:
    for n in (1, 2, 77, 4097, 999_983, 2**24):
        for samples in (1, 3, 256):
            places = sample_places(torch.full((1, samples), step), n)
            assert places.min() >= 0
            assert places.max() < n
            assert len(places.unique()) == min(samples, n)


def test_neighbouring_buckets_differ_in_one_side() -> None:
    signs = torch.tensor(gray_codes(5)).double() * 2 - 1
    mixed = signs[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    order = hash_order(mixed[None, None], torch.eye(5, dtype=torch.float64)[None])
    torch.testing.assert_close(mixed[order[0, 0]], signs)


def test_equal_hashes_stay_in_scan_order() -> None:
    order = hash_order(torch.ones(1, 1, 3000, 4), draw(1, 4, 7))
    assert torch.equal(order[0, 0], torch.arange(3000))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [4097, 16384, 1_000_003])
def test_low_precision_keeps_the_samples_weight(dtype: torch.dtype, n: int) -> None:
    sampled = torch.tensor([[0, 9, 30]])
    bias = score_bias(torch.tensor([0, 8]), 8, sampled, n, dtype)
    assert bias.dtype == dtype
    assert bias.shape == (1, 2, 1, 11)
    weights = (bias.double()[0, :, 0, 8:] - bias.double()[0, :, 0, :1]).exp()
    torch.testing.assert_close(
        weights, torch.tensor([[0, 1, 1], [1, 0, 1]]) * n / 3.0, rtol=1e-4, atol=0, check_dtype=False
    )


def test_bfloat16_is_near_float32() -> None:
    q, k, v = (draw(1, 2, 300, 8, seed=seed).bfloat16() for seed in range(3))
    directions, draws = draw(2, 8, 5), torch.randint(DRAW_STEPS, (2, 64), generator=torch.Generator().manual_seed(0))
    y = hyper_attention(q, k, v, directions, draws, 32)
    expected = hyper_attention(q.float(), k.float(), v.float(), directions, draws, 32)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("keep_tokens", [0, 1000])
@pytest.mark.parametrize("samples", [10, 77])
def test_works_under_autocast(keep_tokens: int, samples: int) -> None:
    encoder = build(keep_tokens=keep_tokens, options={**SMALL, "samples": samples}).float()
    tokens = draw(1, 77, 16).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = encoder(tokens, diagonal(77))
    y.square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    # Rounded tokens may lie in other buckets, and so see other keys, if not all.
    assert (y - encoder(tokens, diagonal(77))[0]).norm() / y.norm() < (0.02 if samples == 77 else 0.3)


def test_saved_model_gives_the_same_answer(tmp_path: Path) -> None:
    a, b = build(seed=0), build(seed=1)
    names = {f"layers.{i}.mixer.{name}" for i in range(2) for name in ("directions", "draws")}
    assert names < a.state_dict().keys()
    assert not torch.equal(a.state_dict()["layers.0.mixer.draws"], a.state_dict()["layers.1.mixer.draws"])
    b.load_state_dict(a.state_dict())
    assert torch.equal(b(draw(1, 77, 16), diagonal(77))[0], a(draw(1, 77, 16), diagonal(77))[0])

    encoder = {"name": "convnextv2_atto", "region": 64, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}}
    context = {"kind": "hyper", "dim": 16, "depth": 1, "options": SMALL}
    config = {"region_encoder": encoder, "context": context, "head": {"kind": "classify", "classes": 3}}
    model = gigaxt.build_model(gigaxt.ModelConfig.from_dict(config)).eval()
    image = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    before = model(image)
    model.save(tmp_path)
    torch.manual_seed(5)
    assert torch.equal(gigaxt.load(tmp_path)(image), before)


def test_draws_nothing_when_called() -> None:
    encoder = build(keep_tokens=0)
    buffers = {name: b.clone() for name, b in encoder.named_buffers()}
    state = torch.get_rng_state()
    y, _ = encoder(draw(1, 77, 16).requires_grad_(), diagonal(77))
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in encoder.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block: expected at least 1, got 0"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"hashes": 33}, "hashes: expected at most 32, got 33"),
        ({"exact_below": -1}, "exact_below: expected at least 0, got -1"),
        ({"blocks": 3}, "block"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContextConfig(kind="hyper", options=options)


def test_looks_both_ways_only() -> None:
    with pytest.raises(ConfigError, match="bidirectional"):
        ContextConfig(kind="hyper", bidirectional=False)
    with pytest.raises(ConfigError, match="4 x heads"):
        ContextConfig(kind="hyper", dim=36, heads=2)


def test_blocks_in_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 45, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    directions = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    draws = torch.randint(DRAW_STEPS, (3, 6), generator=generator)
    results = []
    for most in (2**22, 2 * 6 * (8 + 6) * 4, 1):  # all blocks, two, one
        monkeypatch.setattr(hyper, "AT_ONCE", most)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        found = hyper_attention(*leaves, directions, draws, 8)
        found.square().sum().backward()
        results.append([found, *(t.grad for t in leaves)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)
