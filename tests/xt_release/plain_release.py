"""The published forward pass behind the region encoder, written down step by step from `facts/xt_release.md`.

Slow, obvious, and without a line of gigaxt; equal to the recorded logits (`test_recorded.py`), and so an oracle for
the variants that were not recorded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu, softplus

State = dict[str, Tensor]


def logits(state: State, model: dict[str, Any], features: Tensor) -> Tensor:
    """Published weights, the config's section `model`, the stitched last map (n, c, h, h) -> (n, classes)."""
    if model["cls_head"] == "naive":
        x = linear(state, "decoder.layers.0", features.mean((2, 3)))
        return linear(state, "decoder.layers.3", norm(state, "decoder.layers.2", gelu(x)))
    tokens = linear(state, "decoder.input_proj", features.flatten(2).transpose(1, 2))
    return linear(state, "decoder.cls.1", norm(state, "decoder.cls.0", class_token(state, model["context"], tokens)))


def class_token(state: State, context: dict[str, Any], tokens: Tensor) -> Tensor:
    """Projected tokens of a square map (n, h * h, dim) -> (n, dim)."""
    x = append_cls(state, tokens + positions(math.isqrt(tokens.shape[1]), tokens.shape[-1]).to(tokens))
    window = context.get("in_context_patches", -1)
    if window <= 0 or window >= x.shape[1]:
        return layers(state, context, x)[:, -1]
    starts = range(0, x.shape[1] - 1, window // 2)
    pieces = [layers(state, context, append_cls(state, x[:, start : start + window])) for start in starts]
    return torch.stack([piece[:, -1] for piece in pieces]).mean(0)


def append_cls(state: State, x: Tensor) -> Tensor:
    return torch.cat([x, state["decoder.cls_token"].expand(len(x), -1, -1)], dim=1)


def positions(side: int, dim: int) -> Tensor:
    """(side * side, dim), by NumPy in float32."""
    frequency = 1 / 10000 ** (np.arange(dim // 4, dtype=np.float32) / np.float32(dim / 4))
    waves = []
    for row in range(side):
        for col in range(side):
            x, y = np.float32(col) * frequency, np.float32(row) * frequency
            waves.append(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)]))
    return torch.from_numpy(np.stack(waves))


def layers(state: State, context: dict[str, Any], x: Tensor) -> Tensor:
    for i in range(context["n_layer"]):
        own = {key.removeprefix(f"decoder.layers.{i}."): t for key, t in state.items() if f"decoder.layers.{i}." in key}
        if context["attention_method"] == "mamba":
            x = x.flip(1) if i % 2 == 0 else x
            x = norm(own, "norm", x)
            x = x + mamba(own, x)
            x = x.flip(1) if i % 2 == 0 else x
        else:
            x = x + attention(own, rms(own, "input_layernorm", x), context["attention_method"])
            y = rms(own, "post_attention_layernorm", x)
            x = (
                x
                + (gelu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T))
                @ own["mlp.down_proj.weight"].T
            )
    return x


def attention(own: State, x: Tensor, method: str) -> Tensor:
    n, dim = x.shape[1:]
    heads = dim // 128 if method == "hyper" else dim
    q, k, v = linear(own, "attn.qkv", x).view(len(x), n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if method == "hyper":
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    return linear(own, "attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


def mamba(own: State, x: Tensor) -> Tensor:
    states, rank = own["mixer.A_log"].shape[1], own["mixer.dt_proj.weight"].shape[1]
    u, gate = (x @ own["mixer.in_proj.weight"].T).chunk(2, dim=-1)
    weight = own["mixer.conv1d.weight"][:, 0]  # (inner, 4)
    padded = torch.nn.functional.pad(u, (0, 0, weight.shape[1] - 1, 0))
    u = silu(sum(padded[:, i : i + u.shape[1]] * weight[:, i] for i in range(4)) + own["mixer.conv1d.bias"])
    step, b, c = (u @ own["mixer.x_proj.weight"].T).split([rank, states, states], dim=-1)
    step = softplus(linear(own, "mixer.dt_proj", step))
    h, found = 0.0, []
    for t in range(u.shape[1]):
        decay = torch.exp(-own["mixer.A_log"].exp() * step[:, t, :, None])
        h = decay * h + (step[:, t] * u[:, t])[:, :, None] * b[:, t, None]
        found.append((h * c[:, t, None]).sum(-1))
    return ((torch.stack(found, dim=1) + own["mixer.D"] * u) * silu(gate)) @ own["mixer.out_proj.weight"].T


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def rms(state: State, name: str, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * state[f"{name}.weight"]
