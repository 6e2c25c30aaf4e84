"""Swin V2's attention without its scores: timm's numbers and timm's gradients, those of the bias included."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention import SDPBackend, sdpa_kernel

from gigaxt import GigaXT, ModelConfig, Streaming, build_model
from gigaxt.nn import swin_attention
from gigaxt.nn.swin_attention import FusedWindowAttention, fuse_window_attention
from gigaxt.streaming.replay import counted_saves


@pytest.fixture(params=["heads", "windows", "kernel"])
def everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of CPUs, two of three heads or four windows at once, and that of CUDA, by plain arithmetic on the CPU."""
    monkeypatch.setattr(swin_attention, "SCORES_AT_ONCE", {"windows": 13}.get(request.param, 2) * 24**2)
    monkeypatch.setattr(swin_attention, "_kernel_takes_bias", lambda x: request.param == "kernel")


def make_block(shift: tuple[int, int], dtype: torch.dtype, **options: Any) -> SwinTransformerV2Block:
    """Windows of 4 x 6 cells on a grid of 8 x 18, with other weights than the initial ones."""
    torch.manual_seed(0)
    block = SwinTransformerV2Block(24, (8, 18), num_heads=3, window_size=(4, 6), shift_size=shift, **options).to(dtype)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if not name.endswith("logit_scale"):
                p += 0.1 * torch.randn_like(p)
        block.attn.logit_scale += torch.tensor([-1.0, 0.5, 0.0], dtype=dtype).view(3, 1, 1)
    return block


def make_cells(images: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(images * 6 windows, 24 cells, 24 channels)."""
    return torch.randn(images * 6, 24, 24, dtype=dtype)


def gradients(block: SwinTransformerV2Block, x: Tensor) -> dict[str, Tensor]:
    """The attention's output, and gradients of its input and parameters for random ones of the output."""
    x = x.clone().requires_grad_()
    y = block.attn(x, block.attn_mask)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    found = {name: p.grad for name, p in block.attn.named_parameters()}
    assert all(g is not None for g in found.values())
    return {"output": y.detach(), "input": x.grad, **found}


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Norm of the differences over that of the values, for each tensor."""
    for name, value in other.items():
        error = (one[name] - value).norm() / value.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("shift", [(0, 0), (2, 3)], ids=["plain", "shifted"])
def test_timms_numbers_and_gradients(shift: tuple[int, int]) -> None:
    block = make_block(shift, torch.float64)
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    assert isinstance(fused.attn, FusedWindowAttention)
    assert (block.attn_mask is not None) == (shift != (0, 0))
    x = make_cells(3)
    in_float32 = [gradients(copy.deepcopy(module).float(), x.float()) for module in (fused, block)]
    exact = gradients(block, x)
    assert_near(gradients(fused, x), exact, 1e-10)
    for name, value in exact.items():
        error, timms_error = ((found[name] - value).norm() / value.norm() for found in in_float32)
        assert error <= max(1e-6, 1.5 * timms_error), f"{name}: {error:.1e}, timm's {timms_error:.1e}"


@pytest.mark.usefixtures("everywhere")
def test_scale_is_clamped() -> None:
    block = make_block((2, 3), torch.float64)
    with torch.no_grad():
        block.attn.logit_scale[1] = math.log(100) + 1
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    x = make_cells(2)
    found = gradients(fused, x)
    assert_near(found, gradients(block, x), 1e-10)
    assert found["logit_scale"][1].item() == 0.0


@pytest.mark.usefixtures("everywhere")
def test_without_qkv_bias() -> None:
    block = make_block((2, 3), torch.float64, qkv_bias=False)
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    x = make_cells(2)
    assert_near(gradients(fused, x), gradients(block, x), 1e-10)


@pytest.mark.usefixtures("everywhere")
def test_names_copies_and_pickles_stay() -> None:
    block = make_block((2, 3), torch.float64)
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    assert list(fused.state_dict()) == list(block.state_dict())
    x = make_cells(2)
    with torch.no_grad():
        for p in fused.parameters():
            p *= 0.5
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other.attn) is FusedWindowAttention
        assert torch.equal(other.attn(x), fused.attn(x))  # of its own weights, not of those that it was copied from


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("shift", [(0, 0), (2, 3)], ids=["plain", "shifted"])
def test_under_autocast(shift: tuple[int, int]) -> None:
    block = make_block(shift, torch.float32)
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    x = make_cells(2, torch.float32)
    exact = gradients(block, x)
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.attn(x, block.attn_mask).dtype == torch.bfloat16
        ours, timms = gradients(fused, x), gradients(block, x)
    for name, value in exact.items():
        error, timms_error = ((found[name] - value).norm() / value.norm() for found in (ours, timms))
        assert error <= 2 * timms_error, f"{name}: {error:.1e}, timm's {timms_error:.1e}"


@pytest.mark.usefixtures("everywhere")
def test_queries_and_keys_near_zero_in_float16() -> None:
    """What they are multiplied by is more than float16 holds: nothing of a window without data is NaN."""
    block = make_block((2, 3), torch.float32, qkv_bias=False)
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    x = make_cells(2, torch.float32)
    x[0], x[1] = 0.0, 1e-3 * x[1]
    exact = block.attn(x, block.attn_mask)
    with torch.autocast("cpu", torch.float16):
        found = fused.attn(x, block.attn_mask)
    assert (found - exact).norm() <= 1e-2 * exact.norm()


ENCODER: dict[str, Any] = {
    "name": "swinv2_tiny_window16_256",
    "region": 64,
    "options": {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 1, 2], "window_size": 8},
}


def make_model(**options: Any) -> GigaXT:
    torch.manual_seed(0)
    config = {
        "region_encoder": {**ENCODER, "options": {**ENCODER["options"], **options}},
        "context": {"dim": 16, "depth": 1, "summary": 2},
        "head": {"kind": "classify", "classes": 3},
    }
    return build_model(ModelConfig.from_dict(config)).double().train()


def of_model(model: GigaXT, budget_gib: float | None, images: Tensor, *, chunk_regions: int = 4) -> dict[str, Tensor]:
    model.streaming = Streaming(budget_gib=budget_gib, chunk_regions=chunk_regions)
    model.zero_grad()
    model.loss(images, [0, 2], seed=1).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_model(), torch.randn(2, 3, 128, 192, dtype=torch.float64)
    plain = of_model(model, None, images)
    calls = []
    original = FusedWindowAttention.position_bias
    monkeypatch.setattr(FusedWindowAttention, "position_bias", lambda self: (calls.append(self), original(self))[1])
    streamed = of_model(model, 0.0, images)
    assert len(calls) == 5 * 3 * 2, "once for each of 5 attentions, 3 chunks and 2 passes"
    assert plain.keys() == streamed.keys()
    assert "encode.encoder.trunk.layers_0.blocks.0.attn.cpb_mlp.2.weight" in plain
    assert_near(streamed, plain, 1e-10)


@pytest.mark.usefixtures("everywhere")
def test_dropout_of_attention_stays_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedWindowAttention, "position_bias", None)  # not called
    images = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    model = make_model(attn_drop_rate=0.3)
    assert_near(of_model(model, 0.0, images), of_model(model, None, images), 1e-10)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at tensors between graphs
def test_compiled() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs, **options)

    # Few regions, for what is compiled holds the operations of every window.
    model, images = make_model(), torch.randn(2, 3, 64, 128, dtype=torch.float64)
    plain = of_model(model, 0.0, images, chunk_regions=2)
    torch.compiler.reset()
    model.encode.encoder.trunk.layers_0.compile(backend=backend, fullgraph=True)  # a plain and a shifted block
    assert_near(of_model(model, 0.0, images, chunk_regions=2), plain, 1e-10)
    assert graphs
    torch.compiler.reset()


def test_no_scores_are_kept() -> None:
    """Of windows so large that scores are most of what timm's attention keeps."""
    kept = []
    for fused in (False, True):
        attention = WindowAttention(8, (16, 16), 2)
        if fused:
            fuse_window_attention(attention)
        with counted_saves(list(attention.parameters())) as saves:
            attention(torch.randn(32, 256, 8))
        kept.append(saves.bytes)
    scores = 32 * 2 * 256**2 * 4  # bytes, of 32 windows and 2 heads
    assert kept[0] > 2 * scores
    assert kept[1] < scores


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("shift", [(0, 0), (2, 3)], ids=["plain", "shifted"])
def test_on_a_gpu(shift: tuple[int, int]) -> None:
    block = make_block(shift, torch.float32).cuda()
    fused = copy.deepcopy(block)
    fuse_window_attention(fused)
    x = make_cells(3, torch.float32).cuda()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # fails where that kernel does not take it
        assert_near(gradients(fused, x), gradients(block, x), 1e-5)
        with torch.autocast("cuda", torch.bfloat16):
            assert fused.attn(x, block.attn_mask).dtype == torch.bfloat16
            gradients(fused, x)


def test_other_attentions_are_left_alone() -> None:
    class Own(WindowAttention):
        pass

    own = Own(8, (2, 2), 2)
    fuse_window_attention(own)
    assert type(own) is Own
