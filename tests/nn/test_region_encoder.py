from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.config import from_dict, to_dict
from gigaxt.errors import CheckpointError, ConfigError, DataError
from gigaxt.nn import backbone
from gigaxt.nn.backbone import InadmissibleError, find_layout
from gigaxt.nn.batchnorm import FrozenBatchNorm, freeze_batchnorm
from gigaxt.nn.region_encoder import RegionEncoder, RegionEncoderConfig, resample_mean

SWIN = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 8}
HIERA = {"embed_dim": 8, "stages": [1, 1, 1, 1]}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
VIT = {"embed_dim": 48, "depth": 5, "num_heads": 2}

# name, options, region, tokens a side, strides
TINY = [
    ("swinv2_tiny_window16_256", SWIN, 64, 2, [4, 8, 16, 32]),
    ("swinv2_tiny_window16_256", SWIN, 256, 8, [4, 8, 16, 32]),
    ("hiera_tiny_224", HIERA, 224, 7, [4, 8, 16, 32]),
    ("hiera_tiny_224", HIERA, 96, 3, [4, 8, 16, 32]),
    ("convnextv2_atto", CONVNEXT, 96, 3, [4, 8, 16, 32]),
    ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}, 64, 2, [2, 4, 8, 16, 32]),
    ("vit_tiny_patch16_224", VIT, 64, 2, [4, 8, 16, 32]),
    ("vit_small_patch14_dinov2", VIT, 224, 7, [4, 8, 16, 32]),
    ("vit_base_patch32_224", VIT, 64, 2, [4, 8, 16, 32]),
]


def build(name: str, options: dict[str, Any] | None = None, region: int = 64, **others: Any) -> RegionEncoder:
    maps = others.pop("maps", True)
    config = RegionEncoderConfig(name=name, region=region, options=options or {}, **others)
    return RegionEncoder(config, maps=maps)


@pytest.mark.parametrize(("name", "options", "region", "side", "strides"), TINY)
@pytest.mark.parametrize("bands", [1, 13])
def test_shapes(name: str, options: dict[str, Any], region: int, side: int, strides: list[int], bands: int) -> None:
    encoder = build(name, options, region, in_channels=bands).double().eval()
    tokens, maps = encoder(torch.randn(2, bands, region, region, dtype=torch.float64))
    assert tokens.shape == (2, side, side, encoder.dim)
    assert encoder.tokens_per_side == side
    assert encoder.map_strides == strides
    for x, channels, stride in zip(maps, encoder.map_channels, strides, strict=True):
        assert x.shape == (2, channels, region // stride, region // stride)
        assert x.dtype == torch.float64


@pytest.mark.parametrize(("name", "options", "region", "side", "strides"), TINY)
def test_every_parameter_learns(name: str, options: dict[str, Any], region: int, side: int, strides: list[int]) -> None:
    torch.manual_seed(0)
    encoder = build(name, options, region).eval()  # stochastic depth may drop a whole branch
    with torch.no_grad():
        for parameter in encoder.parameters():  # a fresh Swin V2 or ResNet ends its branches in zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens, maps = encoder(torch.randn(1, 3, region, region))
    (tokens.square().sum() + sum(x.square().sum() for x in maps)).backward()
    assert [key for key, value in encoder.named_parameters() if value.grad is None or not value.grad.any()] == []
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnextv2_atto"])
def test_without_maps_there_are_no_idle_parameters(name: str) -> None:
    options = VIT if name.startswith("vit") else CONVNEXT
    encoder = build(name, options, maps=False)
    tokens, maps = encoder(torch.randn(1, 3, 64, 64))
    assert (maps, encoder.map_channels, encoder.map_strides) == ([], [], [])
    tokens.square().sum().backward()
    assert [key for key, value in encoder.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize(
    ("name", "options", "region"),
    [
        ("swinv2_tiny_window16_256", {**SWIN, "window_size": 2, "depths": [1, 1, 1, 1]}, 256),
        ("hiera_tiny_224", HIERA, 224),
        ("convnextv2_atto", CONVNEXT, 160),
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}, 160),
        ("vit_tiny_patch16_224", VIT, 160),
        ("vit_small_patch14_dinov2", VIT, 224),
    ],
)
def test_tokens_and_maps_lie_where_their_pixels_are(name: str, options: dict[str, Any], region: int) -> None:
    torch.manual_seed(0)
    encoder = build(name, options, region).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pixels = torch.randn(1, 3, region, region, dtype=torch.float64)
    row, col = 1, encoder.tokens_per_side - 1  # off the diagonal: a transposed map would show
    changed = pixels.clone()
    changed[:, :, 32 * row + 8 : 32 * row + 24, 32 * col + 8 : 32 * col + 24] += 3.0
    with torch.no_grad():
        (tokens, maps), (other_tokens, other_maps) = encoder(pixels), encoder(changed)
    assert peak((other_tokens - tokens).permute(0, 3, 1, 2)) == (row, col)
    for a, b, stride in zip(maps, other_maps, encoder.map_strides, strict=True):
        found = [(place + 0.5) * stride for place in peak(b - a)]
        assert found == pytest.approx(
            [32 * row + 16, 32 * col + 16], abs=max(8, *encoder.layout.strides[:1]) + stride / 2
        )


def peak(change: Tensor) -> tuple[int, int]:
    return divmod(int(change.abs().sum((0, 1)).argmax()), change.shape[-1])


def test_regions_do_not_mix() -> None:
    encoder = build("swinv2_tiny_window16_256", SWIN).double().eval()
    pixels = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    tokens, maps = encoder(pixels)
    alone, alone_maps = encoder(pixels[1:2])
    torch.testing.assert_close(tokens[1:2], alone)
    torch.testing.assert_close([x[1:2] for x in maps], alone_maps)


def test_last_map_is_the_tokens() -> None:
    encoder = build("swinv2_tiny_window16_256", SWIN, 128)
    tokens, maps = encoder(torch.randn(2, 3, 128, 128))
    assert torch.equal(tokens, maps[-1].permute(0, 2, 3, 1))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_tokens_are_pooled(tokens: int) -> None:
    encoder = build("convnextv2_atto", CONVNEXT, 128, tokens=tokens)
    pooled, maps = encoder(torch.randn(2, 3, 128, 128))
    assert pooled.shape == (2, tokens, tokens, 32)
    torch.testing.assert_close(pooled.mean((1, 2)), maps[-1].mean((2, 3)))
    if tokens != 3:
        torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(maps[-1], tokens).permute(0, 2, 3, 1))


def test_more_tokens_than_cells_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most 2 .*got 3"):
        build("convnextv2_atto", CONVNEXT, 64, tokens=3)
    assert build("vit_tiny_patch16_224", VIT, 64, tokens=4).tokens_per_side == 4  # a ViT has one per 16 px


def test_resample_mean_keeps_means_and_places() -> None:
    ramp = torch.arange(16.0, dtype=torch.float64).expand(1, 1, 16, 16)
    resampled = resample_mean(ramp, 14)
    torch.testing.assert_close(resampled[0, 0, 0], (torch.arange(14.0, dtype=torch.float64) + 0.5) * 16 / 14 - 0.5,
                               atol=0.15, rtol=0)  # fmt: skip
    torch.testing.assert_close(resampled.mean(), ramp.mean())
    torch.testing.assert_close(resample_mean(ramp.mT, 14), resampled.mT)


# ------------------------------------------------------------------------------------------------ layouts and sizes


def test_layout_is_found_where_channels_equal_sides() -> None:
    assert find_layout([(1, 16, 16, 16), (1, 8, 8, 32)], [16, 32], [16, 8]) is True
    assert find_layout([(1, 16, 16, 16), (1, 32, 8, 8)], [16, 32], [16, 8]) is False
    assert find_layout([(1, 16, 16, 8), (1, 8, 8, 8)], [8, 8], [16, 8]) is True
    assert find_layout([(1, 16, 16, 16)], [16], [16]) is None
    with pytest.raises(InadmissibleError, match="16 x 15 x 15"):
        find_layout([(1, 15, 15, 17)], [16], [15])
    with pytest.raises(InadmissibleError):  # contradiction
        find_layout([(1, 8, 8, 32), (1, 64, 4, 4)], [32, 64], [8, 4])


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        ({}, (16, 32, 64, 128)),  # 16 channels at 16 x 16: the other maps decide
        ({"out_indices": [0]}, (16,)),  # nothing else to decide by
    ],
)
def test_ambiguous_layout_of_a_real_network(options: dict[str, Any], dims: tuple[int, ...]) -> None:
    swin = build("swinv2_tiny_window16_256", {**SWIN, "embed_dim": 16, **options}, 64)
    assert swin.map_channels == list(dims)
    assert swin.layout.channels_last
    convnext = build("convnextv2_atto", {**CONVNEXT, "dims": [16, 32, 64, 128], **options}, 64)
    assert not convnext.layout.channels_last


@pytest.mark.parametrize(
    ("name", "options", "region", "message"),
    [
        ("vit_small_patch14_dinov2", VIT, 256, r"leaves 4 px of 256 out; nearest sizes that fit: 224 and 448"),
        (
            "swinv2_tiny_window16_256",
            {**SWIN, "window_size": 16},
            192,
            r"windows of 16 x 16 .*window_size: 12.*nearest sizes that fit: 128 and 256",
        ),
        ("hiera_tiny_224", {}, 100, r"multiple of 32 px, got 100; nearest: 96 or 128"),
        ("convnextv2_atto", {}, 16, r"multiple of 32"),
        ("efficientformer_l1", {"embed_dims": [8, 8, 8, 16]}, 256, r"nearest sizes that fit: 224$"),
    ],
)
def test_region_sizes_that_do_not_fit(name: str, options: dict[str, Any], region: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build(name, options, region)
    assert "\n" not in str(raised.value)


def test_a_network_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size, band, option or definition is another network."""
    first = build("convnextv2_atto", CONVNEXT, 352)
    monkeypatch.setattr(backbone, "_dry_run", None)  # not called
    assert build("convnextv2_atto", CONVNEXT, 352).layout == first.layout
    for options, region, bands in ((CONVNEXT, 384, 3), (CONVNEXT, 352, 11), ({**CONVNEXT, "drop_rate": 0.1}, 352, 3)):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            build("convnextv2_atto", options, region, in_channels=bands)
    monkeypatch.setattr(timm, "model_entrypoint", lambda name: build)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        build("convnextv2_atto", CONVNEXT, 352)


def test_timm_accepts_what_is_refused_here() -> None:
    # If this fails, timm has learnt to refuse and the check may go.
    model = timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=256, embed_dim=12, num_heads=1, depth=1)
    assert model.patch_embed.num_patches == 18 * 18
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 1000)


@pytest.mark.slow
def test_the_named_backbones_build() -> None:
    cases = [
        ("swinv2_large_window12to16_192to256", 256, 8),
        ("swinv2_base_window12to24_192to384", 384, 12),
        *((f"hiera_{size}_224", 224, 7) for size in ("tiny", "large")),
        ("convnext_tiny", 256, 8),
        ("resnet50", 256, 8),
        ("vit_base_patch16_224", 256, 8),
    ]
    for name, region, side in cases:
        with torch.device("meta"):
            encoder = build(name, {}, region).eval()
            tokens, maps = encoder(torch.empty(1, 3, region, region))
        assert tokens.shape == (1, side, side, encoder.dim), name
        assert [x.shape[-1] for x in maps] == [region // stride for stride in encoder.map_strides], name


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swinv2_tiny", {}, "did you mean `swinv2_tiny_window8_256`, `swinv2_tiny_window16_256`"),
        ("convnxt_tiny", {}, "`convnext_tiny`"),
        ("qqqqqq", {}, "list_models"),
        ("convnext_tiny.nope", {}, r"knows no weights .*convnext_tiny.fb_in1k"),
        ("convnextv2_atto", {"dephts": [1]}, r"options: convnextv2_atto refuses .*dephts"),
        ("convnextv2_atto", {"in_chans": 4}, "set region_encoder.in_channels"),
        ("convnextv2_atto", {"depths": [1, 1]}, "cannot be built"),
        ("swinv2_tiny_window16_256", {**SWIN, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 5]}, "cannot run with"),
    ],
)
def test_wrong_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build(name, options)
    assert "\n" not in str(raised.value)


def test_wrong_pixels() -> None:
    with pytest.raises(DataError, match=r"\(n, 3, 64, 64\), got \(1, 4, 64, 64\)"):
        build("convnextv2_atto", CONVNEXT)(torch.zeros(1, 4, 64, 64))


def test_config_is_plain_data() -> None:
    config = RegionEncoderConfig(name="convnextv2_atto", options=CONVNEXT, pretrained="a.safetensors", tokens=2)
    assert from_dict(RegionEncoderConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="in_channels"):
        RegionEncoderConfig(name="resnet18", in_channels=0)
    with pytest.raises(ConfigError, match="tokens"):
        RegionEncoderConfig(name="resnet18", tokens=0)


# ------------------------------------------------------------------------------------------------ weights


def whole(name: str, options: dict[str, Any], region: int, **others: Any) -> nn.Module:
    torch.manual_seed(1)
    size = {} if name.startswith(("convnext", "resnet")) else {"img_size": region}
    return timm.create_model(name, **options, **size, **others)


@pytest.mark.parametrize(
    ("name", "options", "region"),
    [
        ("swinv2_tiny_window16_256", SWIN, 64),
        ("hiera_tiny_224", HIERA, 64),
        ("convnextv2_atto", CONVNEXT, 64),
        ("vit_tiny_patch16_224", VIT, 64),
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}, 64),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights(name: str, options: dict[str, Any], region: int, suffix: str, tmp_path: Path) -> None:
    source = whole(name, options, region)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    encoder = build(name, options, region, pretrained=str(path)).eval()
    pixels = torch.randn(1, 3, region, region)
    expected = source.eval().forward_intermediates(pixels, intermediates_only=True)[-1]
    tokens, _ = encoder.eval()(pixels)
    torch.testing.assert_close(tokens, resample_mean(expected, encoder.tokens_per_side).permute(0, 2, 3, 1))
    classifier = "fc.weight" if name == "resnet18" else "head.weight" if name.startswith("vit") else "head.fc.weight"
    assert classifier in encoder.unused_weights


@pytest.mark.parametrize("bands", [1, 5])
def test_local_weights_for_another_number_of_bands(bands: int, tmp_path: Path) -> None:
    source = whole("convnextv2_atto", CONVNEXT, 64)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    encoder = build("convnextv2_atto", CONVNEXT, pretrained=str(path), in_channels=bands).eval()
    # The response to a grey image is kept, as timm does it.
    grey = torch.randn(1, 1, 64, 64)
    if bands == 1:
        expected = source.eval().forward_intermediates(grey.expand(-1, 3, -1, -1), intermediates_only=True)[-1]
        tokens, _ = encoder(grey)
        torch.testing.assert_close(tokens.permute(0, 3, 1, 2), expected, atol=1e-4, rtol=1e-4)
    stem = encoder.state_dict()["trunk.stem_0.weight"]
    assert stem.shape[1] == bands
    assert stem.abs().sum() > 0


def test_local_weights_of_as_many_bands_are_taken_as_they_are(tmp_path: Path) -> None:
    source = whole("convnextv2_atto", CONVNEXT, 64, in_chans=13)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    encoder = build("convnextv2_atto", CONVNEXT, pretrained=str(path), in_channels=13)
    assert torch.equal(encoder.state_dict()["trunk.stem_0.weight"], source.state_dict()["stem.0.weight"])


def test_local_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = whole("convnextv2_atto", CONVNEXT, 64).state_dict()
    with pytest.raises(ConfigError, match="no file"):
        build("convnextv2_atto", CONVNEXT, pretrained=str(path))
    lacking = {key: value for key, value in state.items() if not key.startswith("stages.3")}
    safetensors.torch.save_file(lacking, path)
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the \d+ weights.*stages\.3\."):
        build("convnextv2_atto", CONVNEXT, pretrained=str(path))
    wrong = {**state, "stages.0.blocks.0.mlp.fc1.weight": torch.zeros(3, 3)}
    safetensors.torch.save_file(wrong, path)
    with pytest.raises(CheckpointError, match=r"does not fit convnextv2_atto at region 64: size mismatch"):
        build("convnextv2_atto", CONVNEXT, pretrained=str(path))
    safetensors.torch.save_file({**state, "extra.thing": torch.zeros(1)}, path)
    assert "extra.thing" in build("convnextv2_atto", CONVNEXT, pretrained=str(path)).unused_weights
    path.write_bytes(b"\x10\0\0\0\0\0\0\0rubbish")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        build("convnextv2_atto", CONVNEXT, pretrained=str(path))


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": print}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        build("convnextv2_atto", CONVNEXT, pretrained=str(path))
    torch.save({"epoch": 3, "other": [1, 2]}, path)
    with pytest.raises(CheckpointError, match="expected names and tensors"):
        build("convnextv2_atto", CONVNEXT, pretrained=str(path))


def test_weights_that_timm_cannot_get(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nand a second line")
        module: nn.Module = real(name, **options)
        return module

    monkeypatch.setattr(backbone.timm, "create_model", offline)
    with pytest.raises(
        ConfigError, match=r"pretrained: timm's weights for `convnextv2_atto` cannot be had .*local"
    ) as e:
        build("convnextv2_atto", CONVNEXT, pretrained=True)
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------ BatchNorm


def test_frozen_batchnorm_keeps_statistics_keys_and_training() -> None:
    torch.manual_seed(0)
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}
    plain = build("resnet18", options)
    plain(torch.randn(4, 3, 64, 64))  # gives the statistics some content
    frozen = freeze_batchnorm(copy.deepcopy(plain)).train()
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen(pixels)[0], plain.eval()(pixels)[0])
    before = copy.deepcopy(frozen.state_dict())
    frozen(pixels)[0].sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert frozen.trunk.bn1.weight.grad is not None


def test_frozen_batchnorm_of_every_kind() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm3d(3, affine=False)), nn.BatchNorm2d(2))
    assert [type(child) for child in freeze_batchnorm(net).modules()].count(FrozenBatchNorm) == 3
    norm = nn.BatchNorm2d(3)
    twice = freeze_batchnorm(nn.Sequential(norm, nn.ReLU(), norm))
    assert isinstance(twice[0], FrozenBatchNorm)
    assert twice[2] is twice[0]
    fused = build("mobilenetv3_small_050", freeze_batchnorm=True)  # BatchNormAct2d
    plain = build("mobilenetv3_small_050").eval()
    plain.load_state_dict(fused.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fused.eval()(pixels)[0], plain(pixels)[0])


def test_black_regions_do_not_blow_up_the_gradient() -> None:
    """A chain of LayerNorms over exact zeros multiplies the gradient by 1,000 each; see `_unlike_zero`."""
    torch.manual_seed(0)
    encoder = build("convnextv2_atto", CONVNEXT, 64)
    encoder(torch.zeros(1, 3, 64, 64))[0].sum().backward()
    norms = [p.grad.norm() for p in encoder.parameters() if p.grad is not None]
    assert max(norms) < 1e5
