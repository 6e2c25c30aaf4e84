from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads import SegmentConfig, SegmentHead
from gigaxt.nn.heads.levels import RANK

CHANNELS = {2: [4, 8, 12, 16, 24], 4: [8, 12, 16, 24], 1: [4, 8]}


def loss_sums(module: SegmentHead, logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    return module.loss_sums(logits, {"target": target, "valid": valid})


def head(first_stride: int = 4, classes: int = 3, **options: object) -> SegmentHead:
    torch.manual_seed(0)
    channels = CHANNELS[first_stride]
    strides = [first_stride * 2**i for i in range(len(channels))]
    return SegmentHead(SegmentConfig(classes=classes, dim=8, **options), 6, channels, strides)


def inputs(first_stride: int, height: int, width: int, n: int = 2, tokens: int = 3) -> tuple[list[Tensor], Tensor]:
    sizes = [first_stride * 2**i for i in range(len(CHANNELS[first_stride]))]
    maps = [
        torch.randn(n, channels, height // stride, width // stride, dtype=torch.float64)
        for channels, stride in zip(CHANNELS[first_stride], sizes, strict=True)
    ]
    return maps, torch.randn(n, tokens, tokens, 6, dtype=torch.float64)


@pytest.mark.parametrize("first_stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 160)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_logits_have_the_size_of_the_pixels(first_stride: int, size: tuple[int, int], tokens: int) -> None:
    maps, context = inputs(first_stride, *size, tokens=tokens)
    logits = head(first_stride).double()(maps, context)
    assert logits.shape == (2, 3, *size)
    assert logits.dtype == torch.float64


def test_logits_lie_class_by_class() -> None:
    maps, context = inputs(4, 64, 64)
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    assert head().double()(maps, context).is_contiguous()


def test_regions_do_not_mix() -> None:
    maps, context = inputs(4, 64, 64, n=3)
    module = head().double()
    alone = module([x[1:2] for x in maps], context[1:2])
    torch.testing.assert_close(module(maps, context)[1:2], alone)


def test_context_modulates_every_map_from_the_start() -> None:
    maps, context = inputs(4, 64, 64)
    module = head().double()
    base = module(maps, context)
    changed = module(maps, context + torch.randn_like(context))
    effect = ((changed - base).std() / base.std()).item()
    assert 0.05 < effect < 1.5
    for level in module.levels:
        film = level.film(module.context_norm(context).permute(0, 3, 1, 2))
        assert 0.1 < film.std().item() < 0.6
    # Scale and shift each act on every level alone.
    for k in range(len(module.levels)):
        for half in (slice(0, 8), slice(8, 16)):
            quiet = copy.deepcopy(module)
            with torch.no_grad():
                for j, level in enumerate(quiet.levels):
                    level.film.weight.mul_(0) if j != k else level.film.weight[half].mul_(0)
            difference = quiet(maps, context + torch.randn_like(context)) - quiet(maps, context)
            assert difference.std() > 0.005 * base.std()


def test_context_acts_at_its_place() -> None:
    maps, context = inputs(4, 64, 64, n=1, tokens=4)
    module = head().double()
    other = context.clone()
    other[:, 0, 3] += 5 * torch.randn(6)
    change = (module(maps, other) - module(maps, context)).abs().sum((0, 1))
    quarters = F.adaptive_avg_pool2d(change[None], 2)[0]
    assert divmod(int(quarters.argmax()), 2) == (0, 1)


def test_logits_lie_where_the_features_are() -> None:
    maps, context = inputs(4, 64, 128, n=1)
    module = head().double()
    other = [x.clone() for x in maps]
    other[0][:, :, 3, 20] += 5
    change = (module(other, context) - module(maps, context)).abs().sum((0, 1))
    row, col = divmod(int(change.argmax()), 128)
    assert (row, col) == (pytest.approx(13.5, abs=6), pytest.approx(81.5, abs=6))


def test_all_parameters_learn() -> None:
    maps, context = inputs(4, 64, 64)
    module = head().double()
    loss, _, _ = loss_sums(module, module(maps, context), torch.randint(3, (2, 64, 64)), torch.ones(2, 64, 64) > 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.25]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_sums_give_the_mean_cross_entropy(
    smoothing: float, weights: list[float] | None, dtype: torch.dtype
) -> None:
    module = head(label_smoothing=smoothing, class_weights=weights)
    logits = torch.randn(2, 3, 9, 7, dtype=dtype, requires_grad=True)
    target = torch.randint(3, (2, 9, 7))
    target[0, :2] = 255
    valid = torch.rand(2, 9, 7) < 0.7
    garbage = target.masked_fill(~valid, 99)  # what lies on invalid pixels does not matter
    loss_sum, weight_sum, confusion = loss_sums(module, logits, garbage, valid)
    assert (loss_sum.dtype, weight_sum.dtype, confusion.dtype) == (torch.float64,) * 3
    assert not weight_sum.requires_grad
    assert not confusion.requires_grad
    expected = F.cross_entropy(
        logits,
        target.masked_fill(~valid, 255),
        weight=None if weights is None else torch.tensor(weights, dtype=dtype),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close((loss_sum / weight_sum).to(dtype), expected)
    mine, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss_sum / weight_sum, expected))
    torch.testing.assert_close(mine, theirs)


def test_sums_over_parts_add_up() -> None:
    module = head(class_weights=[1.0, 2.0, 3.0])
    logits, target = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(3, (4, 8, 8))
    valid = torch.rand(4, 8, 8) < 0.5
    whole = loss_sums(module, logits, target, valid)
    parts = [loss_sums(module, logits[i : i + 1], target[i : i + 1], valid[i : i + 1]) for i in range(4)]
    for k in range(3):
        torch.testing.assert_close(sum(part[k] for part in parts), whole[k])


def test_confusion_counts() -> None:
    target = torch.tensor([[[0, 0, 1, 2, 2, 255]]])
    predicted = torch.tensor([[[0, 1, 1, 0, 2, 2]]])
    valid = torch.tensor([[[True, True, True, True, False, True]]])
    logits = F.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    _, weight_sum, confusion = loss_sums(head(), logits, target, valid)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert weight_sum == 4


def test_a_region_without_counted_pixels_adds_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss_sum, weight_sum, confusion = loss_sums(head(), logits, torch.full((1, 4, 4), 255), torch.ones(1, 4, 4) > 0)
    assert (loss_sum.item(), weight_sum.item(), confusion.sum().item()) == (0, 0, 0)
    loss_sum.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_another_ignore_value_and_unsigned_masks() -> None:
    logits = torch.randn(1, 3, 2, 2)
    target = torch.tensor([[[0, 1], [2, 0]]], dtype=torch.uint8)
    _, weight_sum, _ = loss_sums(head(ignore=0), logits, target, torch.ones(1, 2, 2) > 0)
    assert weight_sum == 2


@pytest.mark.parametrize("value", [3, -1, 254])
def test_classes_out_of_range(value: int) -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[0, 2, 2] = value
    logits, valid = torch.randn(1, 3, 4, 4), torch.ones(1, 4, 4) > 0
    with pytest.raises(DataError, match=rf"class {value} is out of range 0\.\.2"):
        loss_sums(head(), logits, target, valid)
    loss_sums(head(), logits, target, valid & (target != value))  # left out: nobody looks


def test_wrong_shapes() -> None:
    with pytest.raises(DataError, match="logits' size"):
        loss_sums(head(), torch.randn(1, 3, 4, 4), torch.zeros(1, 8, 8).long(), torch.ones(1, 8, 8) > 0)
    with pytest.raises(ConfigError, match="maps"):
        SegmentHead(SegmentConfig(classes=2), 8, [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "at least 2"),
        ({"classes": 2, "dim": 0}, "dim"),
        ({"classes": 2, "class_colors": [(0, 0, 0)]}, "expected 2 values"),
        ({"classes": 2, "class_colors": [(0, 0, 0), (0, 0, 256)]}, r"0\.\.255"),
    ],
)
def test_wrong_config(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SegmentConfig(**options)


def test_learns_a_relation_between_features_and_context() -> None:
    # The class is whether a pixel's sign equals the context's: no sum of the two tells, only their product.
    torch.manual_seed(0)
    module = SegmentHead(SegmentConfig(classes=2, dim=8), 6, [4, 4], [1, 2])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        pixels = torch.randint(2, (8, 1, 8, 8)).float() * 2 - 1
        sign = torch.randint(2, (8, 1, 1, 1)).float() * 2 - 1
        maps = [pixels.expand(-1, 4, -1, -1), F.avg_pool2d(pixels, 2).expand(-1, 4, -1, -1)]
        ramp = torch.linspace(-1, 1, 6)
        target = (pixels * sign > 0).long()[:, 0]
        logits = module(maps, sign * ramp)
        loss, weight, _ = loss_sums(module, logits, target, torch.ones_like(target) > 0)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
        losses.append((loss / weight).item())
    assert sum(losses[-10:]) / 10 < 0.1


def test_relation_equals_a_loop_over_pixels() -> None:
    torch.manual_seed(0)
    module = SegmentHead(SegmentConfig(classes=3, dim=5), 4, [2], [1]).double()
    x, context = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 4, 3, 4, dtype=torch.float64)
    found = module.classifier.relate(x, context)
    for n, row, col in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        features = module.classifier.features.weight[:, :, 0, 0] @ x[n, :, row, col] + module.classifier.features.bias
        weights = module.classifier.make_classifier.weight[:, :, 0, 0] @ context[n, :, row, col]
        for k in range(3):
            expected = sum(weights[k * RANK + r] * features[r] for r in range(RANK)) / RANK**0.5
            torch.testing.assert_close(found[n, k, row, col], expected)


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("context_dim", [6, 192])
def test_relation_is_neither_silent_nor_loud_at_the_start(dim: int, context_dim: int) -> None:
    torch.manual_seed(0)
    module = SegmentHead(SegmentConfig(classes=16, dim=dim), context_dim, [2], [4])
    found = module.classifier.relate(torch.randn(64, dim, 2, 2), torch.randn(64, context_dim, 2, 2))
    assert 0.5 < found.std().item() < 2


def test_relation_learns_without_film_and_vote() -> None:
    # Sign of the pixel times sign of the context, which nothing but the relation can tell here. Where both of its
    # factors start at zero neither ever gets a gradient.
    torch.manual_seed(0)
    module = SegmentHead(SegmentConfig(classes=2, dim=8), 6, [4], [1])
    for still in (module.levels[0].film, module.classifier.vote):
        still.requires_grad_(False).weight.zero_()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        pixels = torch.randint(2, (8, 1, 4, 4)).float() * 2 - 1
        sign = torch.randint(2, (8, 1, 1, 1)).float() * 2 - 1
        ramp = torch.linspace(-1, 1, 4)[:, None, None]
        target = (pixels * sign > 0).long()[:, 0]
        logits = module([pixels * ramp], sign * torch.linspace(-1, 1, 6))
        loss, weight, _ = loss_sums(module, logits, target, torch.ones_like(target) > 0)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
    assert (loss / weight).item() < 0.1
