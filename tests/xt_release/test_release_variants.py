"""Variants that were not recorded, against the step-by-step oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_release
import pytest
import torch
from small_release import SWIN, released, section
from torch import Tensor

import gigaxt
from gigaxt.nn.context import ContextEncoder, build_context
from gigaxt.streaming.single import Streaming
from gigaxt.xt_release.config import model_config
from gigaxt.xt_release.context import sine_positions
from gigaxt.xt_release.published import PublishedConfig

NO_BIAS = "naive, narrow"
VARIANTS: dict[str, dict[str, Any]] = {
    "one layer": {"n_layer": 1},
    "three layers": {"n_layer": 3},
    "two heads": {"hidden_size": 256},
    "one head of 192": {"hidden_size": 192},
    "naive": {"attention_method": "naive"},
    NO_BIAS: {"attention_method": "naive", "hidden_size": 64},
    "mamba, odd": {"attention_method": "mamba", "n_layer": 3},
    "mamba, one": {"attention_method": "mamba", "n_layer": 1},
    "mamba, narrow": {"attention_method": "mamba", "n_layer": 2, "hidden_size": 20},
    **{f"windows of {p}": {"in_context_patches": p} for p in (2, 3, 4, 5, 9, 16, 17, 40)},
    "windows, naive": {"attention_method": "naive", "in_context_patches": 6},
    "windows, one layer": {"in_context_patches": 7, "n_layer": 1},
}


def stitched_features(model: gigaxt.GigaXT, images: Tensor) -> Tensor:
    """The region encoder's last map of every region, at its place: (n, c, rows, cols)."""
    side = model.config.region_encoder.region
    rows = []
    for y in range(0, images.shape[2], side):
        tokens = [
            model.encode.encoder(images[:, :, y : y + side, x : x + side])[0] for x in range(0, images.shape[3], side)
        ]
        rows.append(torch.cat(tokens, dim=2))
    return torch.cat(rows, dim=1).permute(0, 3, 1, 2)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context_of(**settings: Any) -> tuple[ContextEncoder, dict[str, Tensor]]:
    """A context encoder with weights away from their first values, and these under their published names."""
    config = model_config(PublishedConfig(section(**settings)), SWIN).context
    with torch.random.fork_rng():
        torch.manual_seed(0)
        context = build_context(config).double()
        for parameter in context.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return context, {f"decoder.{name}": parameter.detach() for name, parameter in context.named_parameters()}


def lattice(rows: int, cols: int) -> Tensor:
    """(1, rows * cols, 2)."""
    return torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(cols)))[None]


@pytest.mark.parametrize("name", VARIANTS)
def test_class_token(name: str) -> None:
    context, state = context_of(**VARIANTS[name])
    assert ("decoder.layers.0.attn.qkv.bias" in state) == (name != NO_BIAS and "mamba" not in name)
    for side in (1, 4):
        tokens = noise(2, side**2, context.config.dim)
        with torch.no_grad():
            found, _ = context(tokens, lattice(side, side).expand(2, -1, -1))
        expected = plain_release.class_token(state, section(**VARIANTS[name])["context"], tokens)
        torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("context", [{}, {"in_context_patches": 6}, {"attention_method": "mamba", "n_layer": 3}])
def test_logits(context: dict[str, Any], tmp_path: Path) -> None:
    model, state = released(tmp_path, section(**context))
    for side in (32, 96):
        images = noise(2, 3, side, side).float()
        with torch.no_grad():
            expected = plain_release.logits(state, section(**context), stitched_features(model, images))
            torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)


def test_4097_tokens() -> None:
    context, state = context_of(n_layer=2)
    tokens = noise(1, 4096, 128).float()
    state = {name: tensor.float() for name, tensor in state.items()}
    with torch.no_grad():
        found, _ = context.float()(tokens, lattice(64, 64))
    expected = plain_release.class_token(state, section(n_layer=2)["context"], tokens)
    # Of unit scale, as the head's norm makes it.
    torch.testing.assert_close(found[:, 0] / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["hyper", "naive", "mamba"])
def test_recomputed_gradients_equal_kept_ones(attention: str) -> None:
    context, _ = context_of(attention_method=attention)
    tokens, found = noise(2, 16, 128).requires_grad_(), []
    for keep in (0, 100):
        context.config.keep_tokens = keep
        answer, _ = context(tokens, lattice(4, 4).expand(2, -1, -1))
        found.append(torch.autograd.grad((answer**3).sum(), [tokens, *context.parameters()]))
    for recomputed, kept in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context", [{}, {"n_layer": 2}, {"attention_method": "mamba"}, {"in_context_patches": 3}])
def test_masked_tokens_are_left_out(context: dict[str, Any], tmp_path: Path) -> None:
    """Scenes of two sizes in one batch answer as they do alone, and tokens beyond the border do not count."""
    model, _ = released(tmp_path, section(**context))
    pixels = (noise(3, 70, 90) * 50 + 120).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    scenes = [gigaxt.open_image(pixels), gigaxt.open_image(pixels[:64]), gigaxt.open_image(pixels[:, :80])]
    with torch.no_grad():
        together = model(scenes)
        for scene, answer in zip(scenes, together, strict=True):
            torch.testing.assert_close(model([scene])[0], answer, rtol=0, atol=1e-5)
    dim = model.encode.encoder.dim if not context else 128
    tokens, coords = noise(2, 6, dim).float(), lattice(2, 3).expand(2, -1, -1)
    validity = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        joined, _ = model.context(tokens, coords, validity)
        whole = model.head(joined, validity)
        kept = validity[0]
        alone = model.head(model.context(tokens[:1, kept], coords[:1, kept])[0])
        torch.testing.assert_close(whole[:1], alone, rtol=0, atol=1e-5)
        tokens[0, 4] = float("nan")
        again = model.head(model.context(tokens, coords, validity)[0], validity)
        torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_order_of_the_tokens_does_not_matter() -> None:
    context, _ = context_of(n_layer=2)
    tokens, coords = noise(1, 12, 128), lattice(3, 4)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = context(tokens, coords)[0]
        torch.testing.assert_close(context(tokens[:, shuffled], coords[:, shuffled])[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("context", [{}, {"attention_method": "mamba"}, {"in_context_patches": 4}])
def test_bfloat16_autocast_trains(context: dict[str, Any], tmp_path: Path) -> None:
    model, _ = released(tmp_path, section(**context))
    model.streaming = Streaming(budget_gib=0.0, chunk_regions=2)
    images, label = noise(1, 3, 64, 64).float(), torch.tensor([1])
    exact = float(model(images, label).detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(images, label, seed=0)
    loss.backward()
    assert abs(float(loss.detach()) - exact) < 0.3
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_positions_far_out_are_those_of_float32() -> None:
    coords = torch.tensor([[[0.0, 511.0], [300.0, 2.0]]])
    angles = torch.tensor([511.0, 0.0, 2.0, 300.0])[:, None] / torch.tensor(10000.0) ** (torch.arange(32) / 32)
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)  # (4, 64): column, row of either place
    found = sine_positions(coords, 128)
    torch.testing.assert_close(found.view(4, 64), expected, rtol=0, atol=1e-4)
    assert found.dtype == torch.float32
