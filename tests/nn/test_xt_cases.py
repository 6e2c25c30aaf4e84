"""Several images as one case: contexts of their own, one bag for the head, streamed like any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt.errors import DataError
from gigaxt.image import Image, open_image
from gigaxt.image.memory import ArrayImage
from gigaxt.nn.xt import GigaXT, ModelConfig, build_model
from gigaxt.streaming.single import Streaming


def make(pooling: str = "attention", head: dict[str, Any] | None = None, **given: Any) -> GigaXT:
    torch.manual_seed(0)
    config = {
        "region_encoder": {
            "name": "convnextv2_atto",
            "region": 64,
            "options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "drop_path_rate": 0.4},
        },
        "context": {"kind": "mamba2", "dim": 16, "depth": 2, "summary": 4},
        "head": {"kind": "classify", "classes": 4, "pooling": pooling, **(head or {})},
        "input": given,
    }
    model = build_model(ModelConfig.from_dict(config)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def images() -> list[Image]:
    """Three sizes; the first has a hole of nodata that leaves out a region and cuts others; the last two are alike."""
    random = np.random.default_rng(0)
    first = random.integers(1, 255, (150, 230, 3), dtype=np.uint8)
    first[40:, 60:200] = 0
    sizes = [(100, 64), (70, 130), (70, 130)]
    return [ArrayImage(first, nodata=0), *(open_image(random.integers(1, 255, (*s, 3), dtype=np.uint8)) for s in sizes)]


def grads(model: GigaXT, given: Any, targets: Any, streaming: Streaming) -> list[Tensor]:
    model.streaming = streaming
    model.zero_grad()
    loss = model.loss(given, targets, seed=3)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("overview", [[], [2]])
def test_streamed_cases_equal_ordinary_autograd(overview: list[int]) -> None:
    model = make(overview=overview).train()
    a, b, c, d = images()
    given, targets = [[a, c], b, [d]], [1, 3, 0]
    expected = grads(model, given, targets, Streaming(budget_gib=None, chunk_regions=1000))
    assert all(bool(g.any()) for g in expected)
    for streaming in (Streaming(chunk_regions=1), Streaming(chunk_regions=3), Streaming(budget_gib=1.0)):
        for found, wanted in zip(grads(model, given, targets, streaming), expected, strict=True):
            assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_a_case_is_one_bag_of_the_contexts_of_its_images(pooling: str) -> None:
    model = make(pooling).eval()
    a, b, _, _ = images()
    bags: list[tuple[Tensor, Tensor]] = []
    model.head.register_forward_hook(lambda _, inputs, __: bags.append(inputs))
    model([a]), model([b])
    context, valid = (torch.cat(parts, 1) for parts in zip(*bags, strict=True))
    assert not bool(valid.all())
    torch.testing.assert_close(model([[a, b]]), model.head(context, valid))
    torch.testing.assert_close(model([[b, a]]), model([[a, b]]))  # a bag has no order
    # Every image counts: with either of them another one the answer is another one.
    assert (model([[a, b]]) - model([[a, a]])).abs().max() > 1e-6
    assert (model([[a, b]]) - model([[b, b]])).abs().max() > 1e-6


def test_cases_do_not_see_each_other() -> None:
    model = make().eval()
    a, b, c, d = images()
    together = model([[a, c], b, [c, d], [d, c], [a, d]])  # the third and fourth are computed as one batch
    alone = torch.cat([model([case]) for case in ([a, c], b, [c, d], [d, c], [a, d])])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(model([[a]]), model([a]))
    torch.testing.assert_close(model([(a, c)]), together[:1])


def test_an_image_does_not_change_the_context_of_another() -> None:
    """The attention of the pooling may shift, the tokens do not: with mean pooling the answer is a weighted mean."""
    model = make("mean").eval()
    _, b, c, d = images()
    n = [4 * 2, 3 * 5]  # tokens of 32 px that hold a pixel: of 100 x 64 px, of 70 x 130 px
    logits = [model([image]) for image in (b, c)]
    torch.testing.assert_close(model([[b, c]]), (n[0] * logits[0] + n[1] * logits[1]) / sum(n))
    torch.testing.assert_close(model([[c, d]]), (logits[1] + model([d])) / 2)


@pytest.mark.parametrize(
    ("head", "target"),
    [
        ({"target": "multi", "label_columns": list("wxyz")}, [0.0, 1.0, float("nan"), 1.0]),
        ({"target": "regression"}, [1.0, 2.0, 3.0, 4.0]),
        ({"target": "survival", "time_bins": [1.0, 2.0, 3.0]}, [2.5, 1.0]),
    ],
)
def test_all_targets_train_on_cases(head: dict[str, Any], target: list[float]) -> None:
    model = make(head=head).train()
    a, b, _, _ = images()
    targets = torch.tensor([target, target], dtype=torch.float64)
    expected = grads(model, [[a, b], b], targets, Streaming(budget_gib=None, chunk_regions=1000))
    assert all(torch.isfinite(g).all() for g in expected)
    for found, wanted in zip(grads(model, [[a, b], b], targets, Streaming(chunk_regions=2)), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert model.evaluate([[a, b], b], targets)["logits"].shape == (2, 4)


def test_wrong_cases() -> None:
    model = make()
    a, b, _, _ = images()
    with pytest.raises(DataError, match=r"case 1 \(from 0\): expected at least one image, got none"):
        model([[a, b], []])
    with pytest.raises(DataError, match=r"expected shape \(1,\)"):
        model.loss([[a, b]], [0, 1])
    for given in (["a.tif"], [np.zeros((9, 9, 3), np.uint8)], [[a, "a.tif"]]):
        with pytest.raises(DataError, match=r"expected Images or lists of them.*gigaxt.open_image"):
            model(given)
    with pytest.raises(DataError, match=r"expected a list of Images, got a.tif; use gigaxt.predict"):
        model("a.tif")
    with pytest.raises(DataError, match=r"expected numbers as targets.*\['ash'\]"):
        model.loss([a], ["ash"])
    config = model.config
    masks = build_model(ModelConfig.from_dict({**vars(config), "head": {"kind": "segment", "classes": 2, "dim": 8}}))
    with pytest.raises(DataError, match="several images as one case are for classification"):
        masks([[a, b]])
