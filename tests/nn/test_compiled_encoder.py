"""torch.compile of the region encoder: the same numbers, and not compiled anew for every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from gigaxt import GigaXT, ModelConfig, Streaming, build_model

BACKBONES: list[dict[str, Any]] = [
    {
        "name": "convnextv2_atto",
        "region": 32,
        "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "drop_path_rate": 0.5},
    },
    {
        "name": "swinv2_tiny_window16_256",
        "region": 64,
        "options": {
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 2],
            "window_size": 4,
            "proj_drop_rate": 0.3,
            "drop_path_rate": 0.5,
        },
    },
]


def make(encoder: dict[str, Any]) -> GigaXT:
    config = {
        "region_encoder": encoder,
        "context": {"dim": 16, "depth": 1, "summary": 2},
        "head": {"kind": "classify", "classes": 3},
    }
    torch.manual_seed(0)
    return build_model(ModelConfig.from_dict(config)).double().train()


@pytest.mark.parametrize(
    ("encoder", "budget"), list(zip(BACKBONES, [0.0, None], strict=True)), ids=["convnext", "swin"]
)
def test_compiled_region_encoder(encoder: dict[str, Any], budget: float | None) -> None:
    side = encoder["region"]
    images, labels = torch.randn(2, 3, 2 * side, 3 * side, dtype=torch.float64), [0, 2]
    plain, compiled = make(encoder), make(encoder)
    compilations = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        compilations.append(graph)
        return lookup_backend("eager")(
            graph, inputs, **options
        )  # traced, but left uncompiled: seconds instead of a minute

    torch.compiler.reset()
    compiled.encode.encoder.compile(backend=backend)
    for step in range(3):
        if step == 1:
            first = len(compilations)
        for model in (plain, compiled):
            model.streaming = Streaming(budget_gib=budget, chunk_regions=6)
            model.zero_grad()
            model.loss(images, labels, seed=step).backward()
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=lambda told, name=name: f"{name}: {told}"
            )
    assert first > 0
    assert len(compilations) == first, "every step has another seed, and was compiled for it"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.compiler.reset()
