"""Modules of others in place of sections of the config: they stream, train, save and load, or are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gigaxt
from gigaxt import CheckpointError, ConfigError, GigaXT, ModelConfig, build_model, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.context import ContextConfig, Full
from gigaxt.nn.heads.dense import Answers, DenseHead
from gigaxt.streaming.keyed import KeyedDropout
from gigaxt.streaming.single import Streaming
from gigaxt.targets.base import MaskTarget, as_mask

DIM, CLASSES = 16, 3
BUDGETS = [Streaming(chunk_regions=1), Streaming(host_gib=1.0), Streaming(budget_gib=1.0, chunk_regions=3)]


class Encoder(nn.Module):
    """Two convolutions; tokens of 16 px."""

    dim, map_channels, map_strides = 10, (6, 10), (4, 16)

    def __init__(self, region: int = 64) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 10, 4, stride=4)
        self.dropout = nn.Dropout(0.2)
        self.tokens_per_side = region // 16

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        fine = torch.tanh(self.fine(pixels))
        coarse = self.coarse(self.dropout(fine))
        return coarse.permute(0, 2, 3, 1), [fine, coarse]


class Context(nn.Module):
    """The mean over all valid tokens, added; knows nothing of gigaxt."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.dim, self.mix = dim, nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, coords: Tensor, validity: Tensor) -> tuple[Tensor, None]:
        assert coords.shape == (*tokens.shape[:2], 2)
        valid = validity[..., None]
        mean = (tokens * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        return (tokens + torch.tanh(self.mix(mean))) * valid, None


class ClassifyHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, CLASSES)

    def forward(self, context: Tensor, validity: Tensor) -> Tensor:
        return self.linear((context * validity[..., None]).mean(1))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)


class SegmentHead(DenseHead):
    def __init__(self) -> None:
        super().__init__()
        self.of_map, self.of_context = nn.Conv2d(6, CLASSES, 1), nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, maps: tuple[Tensor, ...], context: Tensor) -> Tensor:
        coarse = self.of_context(context.permute(0, 3, 1, 2))
        fine = self.of_map(maps[0])
        return F.interpolate(fine * F.interpolate(coarse, size=fine.shape[2:]), scale_factor=4)

    def shapes(self, region_px: int) -> list[tuple[int, int, int]]:
        return [(CLASSES, region_px, region_px)]

    def as_target(self, target: Any) -> MaskTarget:
        return as_mask(target)

    def loss_sums(self, answers: Answers, targets: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        assert isinstance(answers, Tensor)
        valid = targets["valid"]
        losses = F.cross_entropy(answers, targets["target"].clamp(max=CLASSES - 1), reduction="none") * valid
        return losses.sum(dtype=torch.float64), valid.sum(dtype=torch.float64)

    def loss(self, sums: Sequence[Tensor]) -> Tensor:
        return sums[0] / sums[1]

    def scores(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"loss": sums[0] / sums[1], "weight_sum": sums[1], "confusion": torch.zeros(CLASSES, CLASSES)}


SECTIONS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "region_encoder": lambda config: Encoder(config.region_encoder.region),
    "context": lambda config: Context(),
    "head": lambda config: ClassifyHead() if config.head.kind == "classify" else SegmentHead(),
}
ONE_AND_ALL = [("region_encoder",), ("context",), ("head",), tuple(SECTIONS)]


def config(head: str = "classify", region: int = 64, **given: Any) -> ModelConfig:
    options = {"depths": [1, 1, 1, 1], "dims": [6, 8, 8, 16]}
    sections = {
        "region_encoder": {"name": "convnextv2_atto", "region": region, "options": options},
        "context": {"dim": DIM, "depth": 1, "summary": 2},
        "head": {"kind": head, "classes": CLASSES},
    }
    return ModelConfig.from_dict({**sections, "input": given})


def modules(config: ModelConfig, *sections: str) -> dict[str, Any]:
    return {section: SECTIONS[section](config) for section in sections or SECTIONS}


def make(sections: tuple[str, ...], head: str = "classify", **given: Any) -> GigaXT:
    torch.manual_seed(0)
    settings = config(head, **given)
    return build_model(settings, **modules(settings, *sections)).double()


def scenes(head: str) -> tuple[list[Any], list[Any]]:
    """Two images of different sizes, one of them with regions that are left out, and their targets."""
    random = np.random.default_rng(0)
    first = random.integers(1, 255, (150, 200, 3), dtype=np.uint8)
    first[:, 60:140] = 0
    images = [ArrayImage(first, nodata=0), open_image(random.integers(1, 255, (100, 64, 3), dtype=np.uint8))]
    if head == "classify":
        return images, [0, 2]
    return images, [random.integers(0, CLASSES, (image.height, image.width), dtype=np.uint8) for image in images]


def loss_and_grads(model: GigaXT, head: str, streaming: Streaming) -> list[Tensor]:
    model.streaming = streaming
    model.zero_grad()
    loss = model.loss(*scenes(head), seed=3)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("head", ["classify", "segment"])
@pytest.mark.parametrize("sections", ONE_AND_ALL, ids="+".join)
def test_streamed_equals_ordinary_autograd(sections: tuple[str, ...], head: str) -> None:
    model = make(sections, head, region=128, halo=32, overview=[4]).train()
    expected = loss_and_grads(model, head, Streaming(budget_gib=None))
    assert all(grad.any() for grad in expected)
    for streaming in BUDGETS:
        for a, b in zip(loss_and_grads(model, head, streaming), expected, strict=True):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@pytest.mark.parametrize("head", ["classify", "segment"])
def test_trains(head: str) -> None:
    model = make(tuple(SECTIONS), head).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = model.loss(*scenes(head), seed=step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("head", ["classify", "segment"])
def test_saves_and_loads(head: str, tmp_path: Path) -> None:
    model = make(tuple(SECTIONS), head).eval()
    model.save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    torch.manual_seed(1)
    fresh = modules(model.config)
    assert described["ready"] == {section: f"{__name__}.{type(module).__name__}" for section, module in fresh.items()}
    loaded = gigaxt.load(tmp_path, **fresh)
    assert loaded.context is fresh["context"]
    assert not loaded.training
    assert loaded.ready == model.ready
    tensor = torch.rand(1, 3, 70, 130, dtype=torch.float64)
    assert torch.equal(loaded(tensor), model(tensor))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@pytest.mark.parametrize("sections", ONE_AND_ALL, ids="+".join)
def test_a_missing_module_is_named(sections: tuple[str, ...], tmp_path: Path) -> None:
    make(sections).save(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        gigaxt.load(tmp_path)
    arguments = ", ".join(f"{section}=your_module" for section in sections)
    assert f"gigaxt.load(folder, {arguments})" in str(caught.value)
    for section, module in modules(config(), *sections).items():
        assert f"the {section.replace('_', ' ')} ({__name__}.{type(module).__name__})" in str(caught.value)


def test_modules_that_are_not_those_of_the_folder(tmp_path: Path) -> None:
    make(("context",)).save(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: context.dim: the ready Context has dim 8, the config 16"):
        gigaxt.load(tmp_path, context=Context(8))
    with pytest.raises(CheckpointError, match=r"weights do not fit .*config.json: missing context.entry"):
        gigaxt.load(tmp_path, context=Full(ContextConfig(kind="full", dim=DIM)))


class Tied(ClassifyHead):
    """One tensor under two names, and weights of a dtype of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.counts = self.linear, nn.Parameter(torch.tensor([1e-9], dtype=torch.float64))


def test_shared_weights_and_several_dtypes_are_kept(tmp_path: Path) -> None:
    model = build_model(config(), head=Tied())
    model.save(tmp_path)
    loaded = gigaxt.load(tmp_path, head=Tied())
    assert loaded.head.same is loaded.head.linear
    assert {name: (p.dtype, p.sum()) for name, p in loaded.named_parameters()} == {
        name: (p.dtype, p.sum()) for name, p in model.named_parameters()
    }


def test_own_context_encoders_may_be_given() -> None:
    context = Full(ContextConfig(kind="full", dim=DIM, depth=1))
    assert build_model(config(), context=context).context is context
    with pytest.raises(ConfigError, match=r"context.dim: the ready Full has dim 32, the config 16: make them equal"):
        build_model(config(), context=Full(ContextConfig(kind="full", dim=32)))


def test_empty_modules_are_modules() -> None:
    class Nothing(nn.Sequential):
        def forward(self, tokens: Tensor, *places: Tensor) -> tuple[Tensor, None]:
            return tokens, None

    model = build_model(config(), context=Nothing())
    assert isinstance(model.context, Nothing)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, CLASSES)


def test_dropout_of_ready_modules_is_keyed() -> None:
    model = make(("region_encoder",)).train()
    assert isinstance(model.encode.encoder.dropout, KeyedDropout)
    tensor = torch.rand(1, 3, 100, 100, dtype=torch.float64)
    assert torch.equal(model(tensor, seed=1), model(tensor, seed=1))
    assert not torch.equal(model(tensor, seed=1), model(tensor, seed=2))


def test_a_moving_average_copies_ready_modules() -> None:
    model = make(tuple(SECTIONS)).eval()
    average = copy.deepcopy(model)
    assert average.context is not model.context
    tensor = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(average(tensor), model(tensor))


def test_predicts(tmp_path: Path) -> None:
    model = make(tuple(SECTIONS), "segment").float()
    image = scenes("segment")[0][1]
    mask = open_image(gigaxt.predict(model, image, tmp_path / "mask.tif"))
    assert (mask.height, mask.width) == (image.height, image.width)
    expected = model.eval()([image])[0].argmax(0)
    assert np.array_equal(mask.read(0, 0, mask.width, mask.height)[..., 0], expected)


# ------------------------------------------------------------------------------------------------ what is refused


def without(attribute: str) -> nn.Module:
    class Partial(Encoder):
        def __getattribute__(self, name: str) -> Any:
            if name == attribute:
                raise AttributeError(name)
            return super().__getattribute__(name)

    return Partial(128)


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("head", "ready", "message"),
    [
        ("classify", {"context": Context}, r"context: expected a ready nn.Module, got <class .*Context'>"),
        ("classify", {"region_encoder": without("dim")}, r"needs the attributes `dim`, `tokens_per_side`; .* `dim`$"),
        (
            "segment",
            {"region_encoder": without("map_strides")},
            r"kind `segment` needs .*; Partial lacks `map_strides`",
        ),
        ("classify", {"region_encoder": changed(Encoder(), dim=1.5)}, r"`dim` to be a whole number .*, got 1.5"),
        ("segment", {"region_encoder": changed(Encoder(), map_strides=(4,))}, r"of one length, .*\[6, 10\] and \[4\]"),
        ("segment", {"region_encoder": changed(Encoder(), map_strides=(4, 48))}, "a stride of 48 px does not divide"),
        ("classify", {"head": nn.Identity()}, r"for kind `classify` needs a method `loss`, Identity has none"),
        ("segment", {"head": ClassifyHead()}, r"for kind `segment` needs a method `loss_sums`, ClassifyHead has none"),
    ],
)
def test_refused_when_built(head: str, ready: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config(head), **ready)


def test_a_classifier_needs_no_maps() -> None:
    model = build_model(config(region=128, halo=32), region_encoder=without("map_strides"))
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, CLASSES)


class Returns(nn.Module):
    """Returns something else than what `module` does."""

    def __init__(self, module: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self.change = module, change
        for name in (
            "dim",
            "tokens_per_side",
            "map_channels",
            "map_strides",
            "loss",
            "scores",
            "as_target",
            "shapes",
            "linear",
        ):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))

    def forward(self, *arguments: Any) -> Any:
        return self.change(self.module(*arguments))

    def loss_sums(self, *arguments: Any) -> Any:
        return tuple(t.float() for t in self.module.loss_sums(*arguments))


@pytest.mark.parametrize(
    ("section", "head", "change", "message"),
    [
        ("region_encoder", "classify", lambda y: y[0], r"expected \(tokens, feature maps\), got \(\d, 4, 4, 10\)"),
        ("region_encoder", "classify", lambda y: (y[0].flatten(1, 2), []), r"tokens \(\d, 4, 4, 10\), got \(\d, 16,"),
        ("region_encoder", "segment", lambda y: (y[0], y[1][:1]), "expected 2 feature maps, got 1"),
        ("region_encoder", "segment", lambda y: (y[0], y[1][::-1]), r"a feature map \(\d, 6, 16, 16\), got \(\d, 10,"),
        ("context", "classify", lambda y: y[0], r"context: expected \(tokens, state\), got \(1, "),
        ("context", "classify", lambda y: (y[0][0], None), r"context: expected tokens \(1, \d+, 16\), got \(\d+, 16\)"),
        (
            "context",
            "segment",
            lambda y: (y[0][:, 1:], None),
            r"context: expected tokens \(1, 144, 16\), got \(1, 143,",
        ),
        ("head", "classify", lambda y: y[:, 1:], r"head: expected logits \(1, 3\), got \(1, 2\)"),
        ("head", "segment", lambda y: y[..., 1:], r"head: expected a map \(\d, 3, 64, 64\), got \(\d, 3, 64, 63\)"),
        ("head", "segment", lambda y: y, r"in float64, got \(\) float32, \(\) float32"),
    ],
)
def test_refused_when_called(section: str, head: str, change: Callable[[Any], Any], message: str) -> None:
    ready = modules(config(head))
    ready[section] = Returns(ready[section], change)
    model = build_model(config(head), **ready)
    images, targets = scenes(head)
    with pytest.raises(ConfigError, match=message):
        model.loss(images[:1], targets[:1])
