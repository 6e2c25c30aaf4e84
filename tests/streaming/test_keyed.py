from __future__ import annotations

import threading

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from gigaxt.errors import ConfigError, TrainingError
from gigaxt.streaming.keyed import KeyedDropout, KeyedDropPath, dropout_key, key_dropout, keyed_by, region_keys

TINY = {
    "swinv2": ("swinv2_tiny_window16_256", 64, {
        "embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 8, "img_size": 64,
        "drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}),
    "hiera": ("hiera_tiny_224", 64, {
        "embed_dim": 8, "stages": (1, 1, 1, 1), "img_size": 64, "drop_path_rate": 0.4}),
    "convnext": ("convnextv2_atto", 64, {
        "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "drop_path_rate": 0.4}),
    "vit": ("vit_tiny_patch16_224", 64, {
        "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 64,
        "drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.2}),
}  # fmt: skip


def trunk(name: str) -> tuple[nn.Module, int]:
    model, region, options = TINY[name]
    module = timm.create_model(model, features_only=True, **options).double().train()
    with torch.no_grad():  # a fresh Swin V2 ends its branches in zeros: no mask would show
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return key_dropout(module), region


def run(module: nn.Module, pixels: Tensor, seed: int, ids: Tensor, chunk: int) -> Tensor:
    outputs = []
    for start in range(0, len(ids), chunk):
        with dropout_key(seed, ids[start : start + chunk]):
            outputs.append(module(pixels[start : start + chunk])[-1])
    return torch.cat(outputs)


def mask(module: nn.Module, seed: int, ids: list[int], shape: tuple[int, ...]) -> Tensor:
    """True where something was kept."""
    with dropout_key(seed, torch.tensor(ids)):
        return module(torch.ones(shape)) != 0


@pytest.mark.parametrize("name", TINY)
def test_independent_of_chunks_and_recomputation(name: str) -> None:
    torch.manual_seed(0)
    module, region = trunk(name)
    pixels = torch.randn(5, 3, region, region, dtype=torch.float64)
    ids = torch.tensor([3, 4, 100, 7, 2**40])
    whole = run(module, pixels, 1, ids, 5)
    for chunk in (1, 2):
        assert (run(module, pixels, 1, ids, chunk) - whole).abs().max() <= 1e-12 * whole.abs().max()
    order = torch.tensor([4, 2, 0, 1, 3])
    assert (run(module, pixels[order], 1, ids[order], 3) - whole[order]).abs().max() <= 1e-12 * whole.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_differs_between_seeds_and_regions(name: str) -> None:
    torch.manual_seed(0)
    module, region = trunk(name)
    pixels = torch.randn(1, 3, region, region, dtype=torch.float64).expand(6, -1, -1, -1)
    first, second = (run(module, pixels, seed, torch.arange(6), 6) for seed in (1, 2))
    assert (first != second).flatten(1).any(1).sum() >= 4  # a draw may agree by chance, where only paths are dropped
    assert (first[1:] != first[:1]).flatten(1).any(1).sum() >= 3
    assert len({KeyedDropPath, KeyedDropout} & {type(child) for child in module.modules()}) >= 1


def test_evaluation_mode_changes_nothing() -> None:
    module, region = trunk("swinv2")
    module.eval()
    pixels = torch.randn(2, 3, region, region, dtype=torch.float64)
    plain = module(pixels)[-1]
    with dropout_key(0, torch.arange(2)):
        assert torch.equal(module(pixels)[-1], plain)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rates_and_scale(p: float) -> None:
    n, count = 20, 10_000
    module = KeyedDropout(p, 0)
    with dropout_key(5, torch.arange(n)):
        output = module(torch.ones(n, count))
    kept = output != 0
    assert torch.all(output[kept] == 1 / (1 - p))
    deviation = (p * (1 - p) / count) ** 0.5
    rates = kept.double().mean(1)
    assert (rates - (1 - p)).abs().max() < 4.5 * deviation  # each region
    assert abs(rates.mean() - (1 - p)) < 4 * deviation / n**0.5  # all of them


def test_masks_of_seeds_regions_layers_and_elements_are_independent() -> None:
    n, count = 64, 4096
    base = mask(KeyedDropout(0.5, 3), 7, list(range(n)), (n, count)).double() * 2 - 1
    others = {
        "seed": mask(KeyedDropout(0.5, 3), 8, list(range(n)), (n, count)),
        "layer": mask(KeyedDropout(0.5, 4), 7, list(range(n)), (n, count)),
        "region": mask(KeyedDropout(0.5, 3), 7, list(range(1, n + 1)), (n, count)),
        "element": base.roll(1, 1) > 0,
        "power of two": base.roll(1024, 1) > 0,
    }
    for what, other in others.items():
        correlation = (base * (other.double() * 2 - 1)).mean(1)
        assert correlation.abs().max() < 5 / count**0.5, what
        assert abs(correlation.mean()) < 4 / (n * count) ** 0.5, what
    # Regions among each other: no pair is alike, and columns are balanced over the regions.
    gram = (base @ base.T / count).fill_diagonal_(0)
    assert gram.abs().max() < 6 / count**0.5
    assert ((base.mean(0) * n**0.5).var() - 1).abs() < 0.15


def test_many_layers_get_different_keys() -> None:
    masks = torch.stack([mask(KeyedDropPath(0.5, layer), 0, list(range(50)), (50, 1))[:, 0] for layer in range(130)])
    assert len({tuple(row.tolist()) for row in masks}) == 130
    assert (masks.double().mean() - 0.5).abs() < 4 * 0.5 / (50 * 130) ** 0.5


def reference_bits(seed: int, region: int, layer: int, element: int) -> int:
    """The documented hash in unsigned Python integers."""

    def splitmix64(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def murmur32(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    key = splitmix64(splitmix64((region + splitmix64(seed % 2**64)) % 2**64) + layer * 0x9E3779B97F4A7C15)
    # Unsigned order of the bits, from the signed comparison that the tensors use.
    return (murmur32(murmur32(element ^ (key % 2**32)) ^ (key >> 32)) + 2**31) % 2**32


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_hash_never_changes(p: float) -> None:
    # A run that is resumed with another version must draw the same masks.
    regions = [0, 1, -5, 2**62]
    for seed, layer in ((0, 0), (123456789, 2), (-1, 100), (2**63 + 5, 63)):
        kept = mask(KeyedDropout(p, layer), seed, regions, (4, 50))
        expected = [
            [reference_bits(seed, region, layer, i) >= round(p * 2**32) for i in range(50)] for region in regions
        ]
        assert kept.tolist() == expected


def test_windows_of_a_region_are_rows_next_to_each_other() -> None:
    module = KeyedDropout(0.5, 0)
    both = mask(module, 0, [8, 9], (6, 5))
    assert torch.equal(both[3:], mask(module, 0, [9], (3, 5)))
    with pytest.raises(TrainingError, match="no multiple of the 4 regions"):
        mask(module, 0, [1, 2, 3, 4], (6, 5))


def test_channels_are_dropped_whole() -> None:
    module = key_dropout(nn.Sequential(nn.Dropout2d(0.5)))
    kept = mask(module, 0, [0, 1], (2, 64, 3, 3)).flatten(2)
    assert torch.equal(kept.all(2), kept.any(2))
    assert 0.3 < kept.double().mean() < 0.7
    free = module(torch.ones(2, 64, 3, 3)).flatten(2) != 0  # no key: torch's own
    assert torch.equal(free.all(2), free.any(2))


def test_scale_by_keep_and_rate_one() -> None:
    ids = torch.arange(100)
    with dropout_key(0, ids):
        kept = KeyedDropPath(0.5, 0, scale_by_keep=False)(torch.ones(100, 2))
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        assert not KeyedDropPath(1.0, 0)(torch.ones(100, 2)).any()
        assert not KeyedDropout(1.0, 0)(torch.ones(100, 2)).any()
        assert KeyedDropout(0.0, 0)(torch.ones(100, 2)).all()


def test_gradient_goes_where_values_went() -> None:
    x = torch.randn(4, 100, dtype=torch.float64, requires_grad=True)
    with dropout_key(0, torch.arange(4)):
        y = KeyedDropout(0.25, 0)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (y / x).detach())


def test_without_a_key_the_global_random_state_is_used() -> None:
    x = torch.ones(8, 50)
    for keyed, plain in ((KeyedDropout(0.3, 0), nn.Dropout(0.3)), (KeyedDropPath(0.3, 0), DropPath(0.3))):
        torch.manual_seed(0)
        expected = plain(x)
        torch.manual_seed(0)
        assert torch.equal(keyed(x), expected)


def test_with_a_key_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    mask(KeyedDropout(0.3, 0), 0, [0, 1], (2, 9))
    assert torch.equal(torch.get_rng_state(), before)


def test_key_holds_for_its_thread_and_nests() -> None:
    module = KeyedDropout(0.5, 0)
    seen: list[Tensor] = []

    def other() -> None:
        seen.append(mask(module, 2, [0], (1, 200)))

    with dropout_key(1, torch.tensor([0])):
        outer = module(torch.ones(1, 200)) != 0
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        inner = mask(module, 2, [0], (1, 200))
        assert torch.equal(module(torch.ones(1, 200)) != 0, outer)
    assert torch.equal(seen[0], inner)
    assert not torch.equal(inner, outer)


def test_numbering_is_stable_and_a_second_call_keeps_it() -> None:
    module = nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.Sequential(DropPath(0.2), nn.Dropout1d(0.3))})
    key_dropout(module)
    assert [module["a"].layer, module["b"][0].layer, module["b"][1].layer] == [0, 1, 2]
    module["c"] = nn.Dropout(0.4)
    key_dropout(module)
    assert [module["a"].layer, module["b"][1].layer, module["c"].layer] == [0, 2, 3]


def test_a_layer_that_stands_in_several_places_is_replaced_in_all() -> None:
    drop = nn.Dropout(0.5)
    module = key_dropout(nn.Sequential(nn.Linear(2, 2), drop, nn.Linear(2, 2), drop))
    assert isinstance(module[1], KeyedDropout)
    assert module[3] is module[1]


def test_attention_dropout_leaves_the_fused_kernel() -> None:
    module, _ = trunk("vit")
    attention = module.model.blocks[0].attn
    assert attention.fused_attn is False
    assert isinstance(attention.attn_drop, KeyedDropout)
    plain = timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=2)
    before = plain.blocks[0].attn.fused_attn
    assert key_dropout(plain).blocks[0].attn.fused_attn == before  # no rate, nothing to change


@pytest.mark.parametrize(
    "module", [nn.AlphaDropout(0.1), nn.MultiheadAttention(4, 1, dropout=0.1), nn.RReLU(), nn.GRU(2, 2, 2, dropout=0.1)]
)
def test_what_cannot_be_keyed_is_refused(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match="cannot be keyed"):
        key_dropout(nn.Sequential(module))


def test_wrong_region_ids_are_refused() -> None:
    with pytest.raises(TrainingError, match="int64"), dropout_key(0, torch.zeros(3)):
        pass


def test_masks_do_not_depend_on_where_the_key_lies() -> None:
    """Brought to the device at once, or handed on by what the pass is keyed by."""
    layer, x = KeyedDropout(0.3, 66), torch.ones(7, 100)
    with dropout_key(3, torch.arange(7)):
        expected = layer(x)
        keys = region_keys(x.device)
    with dropout_key(3, torch.arange(7), x.device):
        assert torch.equal(layer(x), expected)
    assert region_keys(x.device) is None
    with keyed_by(keys):
        assert torch.equal(layer(x), expected)
        with keyed_by(None):
            assert torch.equal(layer(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_same_masks_on_the_gpu() -> None:
    with dropout_key(3, torch.arange(7)):
        for shape in ((7, 1000), (14, 3, 5)):
            host = KeyedDropout(0.3, 66)(torch.ones(shape))
            assert torch.equal(KeyedDropout(0.3, 66)(torch.ones(shape, device="cuda")).cpu(), host)
