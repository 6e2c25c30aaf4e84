"""Every loss of pixels against plain formulas on whole logits, and streamed against ordinary autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.segmentation import generalized_dice_score, mean_iou

from gigaxt import ConfigError, DataError, GigaXT, ModelConfig, Streaming, build_model, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import SegmentConfig
from gigaxt.nn.heads.pixel_losses import pixel_loss

CLASSES = 3
WEIGHTS = [1.0, 2.0, 0.25]
MIXES: dict[str, list[dict[str, float]]] = {
    "single": [
        {"cross_entropy": 1},
        {"focal": 1},
        {"dice": 1},
        {"jaccard": 1},
        {"cross_entropy": 0.5, "focal": 2, "dice": 1, "jaccard": 0.25},
    ],
    "multi": [{"cross_entropy": 1}, {"focal": 1}, {"dice": 1}, {"jaccard": 1}, {"cross_entropy": 1, "dice": 0.5}],
    "regression": [{"l1": 1}, {"l2": 1}, {"huber": 1}, {"l1": 0.5, "l2": 1, "huber": 2}],
}
CASES = [(target, mix) for target, mixes in MIXES.items() for mix in mixes]


def config(target: str, mix: dict[str, float], **options: Any) -> SegmentConfig:
    units: dict[str, Any] = {"target_mean": [5.0, 0.0, -3.0], "target_std": [2.0, 1.0, 10.0]}
    return SegmentConfig(
        classes=CLASSES, target=target, loss=mix, dim=8, **(units if target == "regression" else {}), **options
    )


def given(target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, target with what is not known, validity with holes under which the target is nonsense."""
    torch.manual_seed(0)
    answers = torch.randn(2, CLASSES, 9, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(2, 9, 7) < 0.7
    if target == "single":
        truth = torch.randint(CLASSES, (2, 9, 7)).masked_fill(torch.rand(2, 9, 7) < 0.1, 255)
        return answers, truth.masked_fill(~valid, 99), valid
    if target == "multi":
        truth = torch.randint(2, (2, CLASSES, 9, 7)).masked_fill(torch.rand(2, CLASSES, 9, 7) < 0.1, 255)
        return answers, truth.masked_fill(~valid[:, None], 7), valid
    truth = 3 * torch.randn(2, CLASSES, 9, 7, dtype=torch.float64)
    truth[torch.rand(truth.shape) < 0.1] = torch.nan
    return answers, truth.masked_fill(~valid[:, None], torch.inf), valid


def plain(settings: SegmentConfig, answers: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The formulas, channel by channel, on lists of the pixels that count."""
    weights = settings.class_weights or [1.0] * CLASSES
    mix, total = settings.mix, torch.zeros((), dtype=torch.float64)
    chances = answers.softmax(1) if settings.target == "single" else answers.sigmoid()
    mean, norm = dict.fromkeys(mix, torch.zeros((), dtype=torch.float64)), 0.0
    distances: dict[str, list[Tensor]] = {"dice": [], "jaccard": []}
    counted_weights = []
    for k in range(CLASSES):
        if settings.target == "single":
            counts = valid & (target != 255)
            true = (target == k)[counts].double()
            p = chances[:, k][counts]
            log_p, hits = p.log(), true
        else:
            known = target[:, k] != 255 if settings.target == "multi" else ~target[:, k].isnan()
            counts = valid & known
            true, p = target[:, k][counts].double(), chances[:, k][counts]
            log_p, hits = torch.where(true == 1, p, 1 - p).log(), torch.ones_like(true)
        norm += weights[k] * float(hits.sum())
        if settings.target == "regression":
            assert settings.target_std is not None
            error = ((answers[:, k][counts] - true) / settings.target_std[k]).abs()
            delta = settings.huber_delta
            found = {
                "l1": error,
                "l2": error**2,
                "huber": torch.where(error < delta, error**2 / 2, delta * (error - delta / 2)),
            }
        else:
            right = log_p.exp()
            found = {
                "cross_entropy": -log_p * hits,
                "focal": -((1 - right) ** settings.focal_gamma) * log_p * hits,
            }
            if true.sum() > 0 or settings.absent_classes == "count":
                extra = float(settings.absent_classes == "count")
                both, areas = (p * true).sum(), p.sum() + true.sum()
                distances["dice"].append(1 - (2 * both + extra) / (areas + extra))
                distances["jaccard"].append(1 - (both + extra) / (areas - both + extra))
                counted_weights.append(weights[k])
        for name in mix:
            if name in found:
                mean[name] = mean[name] + weights[k] * found[name].sum()
    for name, weight in mix.items():
        if name in ("dice", "jaccard"):
            weighted = sum(w * d for w, d in zip(counted_weights, distances[name], strict=True))
            total = total + weight * weighted / sum(counted_weights)
        else:
            total = total + weight * mean[name] / norm
    return total


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("target", "mix"), CASES)
def test_equals_the_formulas(target: str, mix: dict[str, float], weights: list[float] | None) -> None:
    settings = config(target, mix, class_weights=weights)
    answers, truth, valid = given(target)
    if target != "single":
        truth[:, 1] = torch.nan if target == "regression" else 255  # one band of which nothing is known
    loss = pixel_loss(settings)
    found = loss.loss(loss.sums(answers, truth, valid))
    expected = plain(settings, answers, truth, valid)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    mine, theirs = (torch.autograd.grad(x, answers)[0] for x in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
    assert (mine != 0).any()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("single", {"mix": {"focal": 1}, "focal_gamma": 0.5}),
        ("single", {"mix": {"focal": 1}, "focal_gamma": 0.0}),
        ("multi", {"mix": {"focal": 1}, "focal_gamma": 3.0}),
        ("single", {"mix": {"dice": 1, "jaccard": 1}, "absent_classes": "count"}),
        ("multi", {"mix": {"dice": 1, "jaccard": 1}, "absent_classes": "count"}),
        ("regression", {"mix": {"huber": 1}, "huber_delta": 0.3}),
    ],
)
def test_settings_of_the_losses(target: str, options: dict[str, Any]) -> None:
    settings = config(target, **options)
    answers, truth, valid = given(target)
    if target != "regression":
        truth[truth == 1] = 0  # class 1, or all labels, absent
    loss = pixel_loss(settings)
    found, expected = loss.loss(loss.sums(answers, truth, valid)), plain(settings, answers, truth, valid)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropies_are_those_of_pytorch(smoothing: float) -> None:
    answers, truth, valid = given("single")
    settings = config("single", {"cross_entropy": 1}, label_smoothing=smoothing, class_weights=WEIGHTS)
    loss = pixel_loss(settings)
    expected = F.cross_entropy(
        answers,
        truth.masked_fill(~valid, 255),
        weight=torch.tensor(WEIGHTS, dtype=torch.float64),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(loss.loss(loss.sums(answers, truth, valid)), expected)
    answers, truth, valid = given("multi")
    loss = pixel_loss(config("multi", {"cross_entropy": 1}, label_smoothing=smoothing))
    known = valid[:, None] & (truth != 255)
    soft = truth[known].double() * (1 - smoothing) + smoothing / 2
    expected = F.binary_cross_entropy_with_logits(answers[known], soft)
    torch.testing.assert_close(loss.loss(loss.sums(answers, truth, valid)), expected)


def test_hard_answers_have_the_scores_of_torchmetrics() -> None:
    """With logits so large that probabilities are 0 and 1, 1 - dice and 1 - jaccard are the known scores."""
    torch.manual_seed(1)
    truth, answered = torch.randint(CLASSES, (1, 16, 16)), torch.randint(CLASSES, (1, 16, 16))
    answers = 1e3 * F.one_hot(answered, CLASSES).permute(0, 3, 1, 2).double()
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    for name, score in (
        ("jaccard", mean_iou(answered, truth, CLASSES, input_format="index")),
        ("dice", generalized_dice_score(answered, truth, CLASSES, per_class=True, input_format="index").mean()),
    ):
        loss = pixel_loss(config("single", {name: 1}))
        torch.testing.assert_close(1 - loss.loss(loss.sums(answers, truth, valid)).float(), score.mean())


@pytest.mark.parametrize("target", MIXES)
def test_sums_of_parts_add_up(target: str) -> None:
    loss = pixel_loss(config(target, MIXES[target][-1], class_weights=WEIGHTS))
    answers, truth, valid = given(target)
    whole = loss.sums(answers, truth, valid)
    parts = [loss.sums(answers[i : i + 1], truth[i : i + 1], valid[i : i + 1]) for i in range(2)]
    for k, total in enumerate(whole):
        assert total.dtype == torch.float64
        torch.testing.assert_close(parts[0][k] + parts[1][k], total)


@pytest.mark.parametrize(("target", "mix"), CASES)
def test_nothing_known_is_a_loss_of_zero(target: str, mix: dict[str, float]) -> None:
    for options in ({}, {"absent_classes": "count"}) if {"dice", "jaccard"} & set(mix) else ({},):
        loss = pixel_loss(config(target, mix, **options))
        answers, truth, valid = given(target)
        found = loss.loss(loss.sums(answers, truth, torch.zeros_like(valid)))
        assert found == 0
        if found.requires_grad:
            (gradient,) = torch.autograd.grad(found, answers, allow_unused=True)
            assert gradient is None or not gradient.any()


def test_an_absent_class_is_pushed_away_only_where_it_counts() -> None:
    answers = torch.zeros(1, CLASSES, 4, 4, dtype=torch.float64, requires_grad=True)
    truth, valid = torch.zeros(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4, dtype=torch.bool)
    losses = {}
    for absent in ("leave_out", "count"):
        loss = pixel_loss(config("multi", {"dice": 1}, absent_classes=absent))
        bands = torch.stack([truth + 1, truth, truth], dim=1)
        losses[absent] = torch.autograd.grad(loss.loss(loss.sums(answers, bands, valid)), answers)[0]
    assert not losses["leave_out"][:, 1:].any()
    assert (losses["count"][:, 1:] > 0).all()


def test_moments_and_counts() -> None:
    loss = pixel_loss(config("regression", {"l2": 1}))
    answers, truth, valid = given("regression")
    moments = loss.sums(answers, truth, valid)[2]
    for k in range(CLASSES):
        known = valid & ~truth[:, k].isnan()
        error, true = (answers[:, k] - truth[:, k])[known].detach(), truth[:, k][known]
        expected = [known.sum().double(), (error**2).sum(), error.abs().sum(), true.sum(), (true**2).sum()]
        torch.testing.assert_close(moments[:, k], torch.stack(expected))
    loss = pixel_loss(config("multi", {"cross_entropy": 1}))
    answers, truth, valid = given("multi")
    counts = loss.sums(answers, truth, valid)[2]
    for k in range(CLASSES):
        known = valid & (truth[:, k] != 255)
        yes, true = (answers[:, k] > 0)[known], (truth[:, k] == 1)[known]
        cells = [(yes & true), (yes & ~true), (~yes & true), (~yes & ~true)]
        assert counts[:, k].tolist() == [cell.sum().item() for cell in cells]


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        ("single", 3, r"class 3 is out of range 0\.\.2"),
        ("multi", 2, "expected labels 0 and 1, got 2"),
        ("regression", torch.inf, "finite numbers"),
    ],
)
def test_values_that_are_no_targets(target: str, value: float, message: str) -> None:
    loss = pixel_loss(config(target, MIXES[target][0]))
    answers, truth, valid = given(target)
    valid[0, 0, 0] = True
    truth[(0, 0, 0) if target == "single" else (0, 0, 0, 0)] = value
    with pytest.raises(DataError, match=message):
        loss.sums(answers, truth, valid)
    with pytest.raises(DataError, match=message):
        loss.check(truth, valid)
    loss.check(truth, torch.zeros_like(valid))  # where nothing counts, anything may stand
    with pytest.raises(DataError, match="size"):
        loss.sums(answers, truth[..., :-1], valid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": {"dise": 1.0}}, "did you mean `dice`"),
        ({"loss": {"l2": 1.0}}, "unknown loss `l2` of target single"),
        ({"loss": {"dice": -1.0}}, r"head\.loss\.dice: expected a weight of at least 0"),
        ({"loss": {"dice": 0.0}}, "a weight above 0"),
        ({"loss": {}}, "a weight above 0"),
        ({"focal_gamma": 3.0}, r"head\.focal_gamma: has a meaning for focal, the loss is cross_entropy"),
        ({"loss": {"dice": 1.0}, "label_smoothing": 0.1}, "label_smoothing: has a meaning for cross_entropy"),
        ({"absent_classes": "count"}, "has a meaning for dice and jaccard"),
        ({"loss": {"focal": 1.0}, "focal_gamma": -1.0}, "focal_gamma: expected at least 0"),
        ({"target_mean": [0.0] * 3, "target_std": [1.0] * 3}, "no meaning for target: single"),
        ({"target": "regression", "target_mean": [0.0] * 3}, "together"),
        ({"target": "regression", "target_mean": [0.0] * 3, "target_std": [0.0] * 3}, "above 0"),
        ({"target": "multi", "ignore": 1}, "0 and 1 have a meaning"),
        ({"classes": 300}, "255 is a class"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SegmentConfig(**{"classes": 3, **options})


# The whole model, streamed.


def model_of(head: SegmentConfig) -> GigaXT:
    torch.manual_seed(0)
    section = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8], "drop_path_rate": 0.3},
        },
        "context": {"kind": "full", "dim": 16, "depth": 1, "summary": 0},
        "head": {"kind": "segment", "classes": CLASSES},
    }
    settings = ModelConfig.from_dict(section)
    settings.head = head
    model = build_model(settings).double()
    with torch.no_grad():  # so that no gradient is zero
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model.train()


def scene(target: str) -> tuple[Any, Any]:
    """An image of ragged size with a hole, and a target with pixels that are not known."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 255, (100, 150, 3), dtype=np.uint8)
    pixels[30:70, 40:80] = 0
    if target == "regression":
        truth: Any = rng.normal(3, 2, (100, 150, CLASSES)).astype(np.float32)
        truth[rng.random(truth.shape) < 0.1] = np.nan
    else:
        shape = (100, 150) if target == "single" else (100, 150, CLASSES)
        truth = rng.integers(0, CLASSES if target == "single" else 2, shape, dtype=np.uint8)
        truth[rng.random(shape) < 0.1] = 255
    return ArrayImage(pixels, nodata=0), open_image(truth)


def grads(model: GigaXT, image: Any, truth: Any, streaming: Streaming) -> list[Tensor]:
    model.streaming = streaming
    model.zero_grad()
    loss = model([image], [truth], seed=3)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("target", "mix"), CASES)
def test_streamed_equals_ordinary_autograd(target: str, mix: dict[str, float]) -> None:
    """DESIGN: float64 to 1e-10, with nothing kept, feature maps on the host, and all kept."""
    model = model_of(config(target, mix, class_weights=WEIGHTS))
    assert model.head.linear == (not {"dice", "jaccard"} & set(mix))
    image, truth = scene(target)
    expected = grads(model, image, truth, Streaming(budget_gib=None, chunk_regions=100))
    assert len(expected) == 1 + len(list(model.parameters()))
    for streaming in (
        Streaming(chunk_regions=1),
        Streaming(chunk_regions=4),
        Streaming(host_gib=1.0),
        Streaming(budget_gib=1.0),
    ):
        for a, b in zip(grads(model, image, truth, streaming), expected, strict=True):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@pytest.mark.parametrize(("target", "mix"), CASES)
def test_streamed_loss_is_that_of_whole_logits(target: str, mix: dict[str, float]) -> None:
    """The answers of the whole scene, stitched, under the plain formulas: the same loss and gradients."""
    model = model_of(config(target, mix)).eval()
    rng = np.random.default_rng(1)
    pixels, (_, truth) = torch.from_numpy(rng.random((1, 3, 100, 150))), scene(target)
    values = torch.from_numpy(truth.read(0, 0, 150, 100).astype(np.float64 if target == "regression" else np.int64))
    known = values[None, ..., 0] if target == "single" else values[None].permute(0, 3, 1, 2)
    plain(model.config.head, model(pixels), known, torch.ones(1, 100, 150, dtype=torch.bool)).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.streaming = Streaming(chunk_regions=2)
    model(pixels, [truth]).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@pytest.mark.parametrize(
    ("streaming", "mix", "forwards"),
    [
        (Streaming(), {"cross_entropy": 1.0}, 3),
        (Streaming(), {"cross_entropy": 1.0, "focal": 1.0}, 3),
        (Streaming(), {"cross_entropy": 1.0, "dice": 1.0}, 4),
        (Streaming(), {"jaccard": 1.0}, 4),
        (Streaming(host_gib=1.0), {"cross_entropy": 1.0}, 2),
        (Streaming(host_gib=1.0), {"cross_entropy": 1.0, "dice": 1.0}, 2),
        (Streaming(budget_gib=1.0), {"cross_entropy": 1.0, "dice": 1.0}, 1),
    ],
)
def test_passes_over_the_region_encoder(streaming: Streaming, mix: dict[str, float], forwards: int) -> None:
    """As `streaming/nested.py` says: nothing kept 4F, or 3F where the loss is linear, maps 2F, all 1F; always 1B."""
    model = model_of(config("single", mix))
    image, truth = scene("single")
    passes = {"forward": 0, "backward": 0}

    def add(name: str, regions: int) -> None:
        passes[name] += regions

    def hooked(module: Any, args: Any, output: Any) -> None:
        regions = len(args[0])
        add("forward", regions)
        if output[0].requires_grad:
            output[0].register_hook(lambda _: add("backward", regions))

    model.encode.encoder.register_forward_hook(hooked)
    model.streaming = streaming
    model([image], [truth], seed=0).backward()
    assert passes == {"forward": forwards * 6, "backward": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_given_in_their_own_units(dtype: torch.dtype) -> None:
    """Far from zero and in half precision: a height of 3,000 m is not rounded to 16 m."""
    head = SegmentConfig(classes=1, target="regression", target_mean=[3000.0], target_std=[2.0])
    settings = ModelConfig.from_dict(
        {
            "region_encoder": {
                "name": "convnextv2_atto",
                "region": 64,
                "options": {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]},
            },
            "context": {"kind": "none", "dim": 16},
            "head": {"kind": "segment", "classes": 2},
        }
    )
    settings.head = head
    torch.manual_seed(0)
    model = build_model(settings)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        (answer,) = model([open_image(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))])
    assert answer.dtype == torch.float32
    assert 2950 < answer.mean().item() < 3050
    assert len(torch.unique(answer)) > 50


def test_a_region_of_numbers_that_are_nodata() -> None:
    """Nodata of one band is not known in that band alone; NaN as well; of all bands nowhere."""
    heights = np.arange(2 * 4 * 5, dtype=np.float32).reshape(4, 5, 2)
    heights[0, 0, 0], heights[1, 1], heights[2, 2, 1] = -9999, -9999, np.nan
    model = model_of(SegmentConfig(classes=2, target="regression"))
    target = model.head.as_target(ArrayImage(heights, nodata=-9999))
    target.check(ArrayImage(np.zeros((4, 5, 3), np.uint8)))
    drawn = target.draw(0, 0, 6, 4)
    assert drawn["target"].shape == (2, 4, 6)
    assert np.argwhere(np.isnan(drawn["target"][:, :, :5])).tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1], [1, 2, 2]]
    assert drawn["valid"].sum() == 19
    assert drawn["target"][1, 3, 4] == 39


@pytest.mark.parametrize(
    ("target", "array", "message"),
    [
        ("multi", np.zeros((4, 5), np.float32), "labels 0 and 1 of an integer type"),
        ("multi", np.zeros((4, 5, 2), np.uint8), "expected 3 bands, one for each of `classes`, got 2"),
        ("regression", np.zeros((4, 5, 2), np.float32), "expected 3 bands"),
        ("single", np.zeros((4, 5), np.float32), "integer classes"),
    ],
)
def test_targets_of_another_kind(target: str, array: Any, message: str) -> None:
    model = model_of(config(target, MIXES[target][0]))
    image = ArrayImage(np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(DataError, match=message):
        model.head.as_target(array).check(image)
