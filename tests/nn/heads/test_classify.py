from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads import ClassifyConfig, ClassifyHead, build_head
from gigaxt.nn.heads.pooling import SEGMENT
from gigaxt.testing.live_memory import LiveMemory


def head(classes: int = 3, dim: int = 12, **options: object) -> ClassifyHead:
    torch.manual_seed(0)
    return ClassifyHead(ClassifyConfig(classes=classes, **options), dim)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("dim", [7, 12, 64])
def test_masked_tokens_do_not_count(pooling: str, dim: int) -> None:
    module = head(dim=dim, pooling=pooling).double()
    context = torch.randn(2, 50, dim, dtype=torch.float64)
    validity = torch.rand(2, 50) < 0.6
    logits = module(context, validity)
    other = torch.where(validity[..., None], context, 1e6 * torch.randn_like(context))
    assert torch.equal(module(other, validity), logits)
    for b in range(2):
        torch.testing.assert_close(module(context[b : b + 1, validity[b]]), logits[b : b + 1])
    torch.testing.assert_close(module(context, torch.ones(2, 50, dtype=torch.bool)), module(context))
    weights = module.attention(context, validity)
    assert weights.shape == (2, 50)
    assert not weights[~validity].any()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))


def test_pooling_is_the_plain_formula() -> None:
    module = head(dim=12).double()
    context = torch.randn(2, 5, 12, dtype=torch.float64)
    tokens = module.norm(context)
    assert module.queries is not None
    weights = (tokens @ module.queries.weight.T).softmax(1)  # (B, N, heads)
    expected = []
    for k in range(module.heads):
        share = slice(k * 12 // module.heads, (k + 1) * 12 // module.heads)
        expected.append((weights[:, :, k : k + 1] * tokens[:, :, share]).sum(1))
    torch.testing.assert_close(module(context), module.classifier(torch.cat(expected, 1)))
    torch.testing.assert_close(module.attention(context), weights.mean(2))


def test_mean_pooling_is_the_mean() -> None:
    module = head(pooling="mean")
    context = torch.randn(2, 5, 12)
    torch.testing.assert_close(module(context), module.classifier(module.norm(context).mean(1)))
    torch.testing.assert_close(module.attention(context), torch.full((2, 5), 0.2))


def test_no_valid_token_gives_finite_logits_and_gradients() -> None:
    module = head()
    context = torch.randn(1, 4, 12, requires_grad=True)
    logits = module(context, torch.zeros(1, 4, dtype=torch.bool))
    torch.testing.assert_close(logits[0], module.classifier.bias)
    logits.sum().backward()
    assert context.grad is not None
    assert torch.isfinite(context.grad).all()


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_many_tokens_are_pooled_in_segments(pooling: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = head(pooling=pooling).double()
    context = torch.randn(3, 50, 12, dtype=torch.float64, requires_grad=True)
    validity = torch.rand(3, 50) < 0.6 if masked else None
    if validity is not None:
        validity[1] = False  # a case without any valid token
        validity[2, :20] = False  # and one whose first segments are empty

    def logits_and_gradients() -> list[torch.Tensor]:
        logits = module(context, validity)
        return [logits, *torch.autograd.grad(logits.square().sum(), [context, *module.parameters()])]

    plain = logits_and_gradients()
    monkeypatch.setattr("gigaxt.nn.heads.pooling.SEGMENT", 21)
    for found, expected in zip(logits_and_gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_pooling_in_segments_keeps_nothing_of_the_tokens() -> None:
    module = head(dim=64)
    context = torch.randn(1, 4 * SEGMENT, 64, requires_grad=True)
    with LiveMemory([context]) as memory:
        logits = module(context, torch.ones(1, 4 * SEGMENT, dtype=torch.bool))
        kept = memory.now
        logits.sum().backward()
    assert kept < 0.1 * context.nbytes
    assert memory.peak < 2.1 * context.nbytes  # the gradient, and a segment at work


def test_one_token_and_half_precision() -> None:
    assert head()(torch.randn(3, 1, 12)).shape == (3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        module = head()
        logits = module(torch.randn(2, 9, 12), torch.rand(2, 9) < 0.7)
        assert module.loss(logits, torch.tensor([0, 2])).dtype == torch.float32


def test_all_parameters_learn() -> None:
    module = head()
    module.loss(module(torch.randn(2, 9, 12)), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_single_label_loss() -> None:
    logits, targets = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(head().loss(logits, targets), F.cross_entropy(logits, targets))
    smooth = head(label_smoothing=0.2)
    torch.testing.assert_close(smooth.loss(logits, targets), F.cross_entropy(logits, targets, label_smoothing=0.2))
    weighted = head(class_weights=[1.0, 2.0, 0.5])
    single = [F.cross_entropy(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]
    expected = (single[0] + 0.5 * single[1] + 2 * single[2] + 2 * single[3]) / 4
    torch.testing.assert_close(weighted.loss(logits, targets), expected)
    torch.testing.assert_close(weighted.loss(logits[1:2], targets[1:2]), 0.5 * single[1])  # acts in a batch of one


def test_multi_label_and_regression_loss() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(head(target="multi").loss(logits, labels), bce(logits, labels))
    torch.testing.assert_close(head(target="multi").loss(logits, labels.long()), bce(logits, labels))
    smooth = head(target="multi", label_smoothing=0.2)
    torch.testing.assert_close(smooth.loss(logits, labels), bce(logits, labels * 0.8 + 0.1))
    numbers = 10 * torch.randn(4, 3)
    torch.testing.assert_close(head(target="regression").loss(logits, numbers), F.mse_loss(logits, numbers))
    weighted = head(target="regression", class_weights=[1.0, 0.0, 0.0])
    torch.testing.assert_close(weighted.loss(logits, numbers), F.mse_loss(logits[:, 0], numbers[:, 0]) / 3)


def test_unknown_labels_change_nothing() -> None:
    """The loss is that of the labels that are known, and the others have no gradient."""
    nan = float("nan")
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0.0, 1, nan], [nan, nan, nan], [1, nan, nan]])
    known = ~labels.isnan()
    module = head(target="multi", label_smoothing=0.1)
    loss = module.loss(logits, labels)
    smooth = labels[known].double() * 0.9 + 0.05
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[known], smooth))
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, known)
    weighted = head(target="multi", class_weights=[1.0, 2.0, 3.0]).double().loss(logits, labels)
    each = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num().double(), reduction="none")
    torch.testing.assert_close(weighted, (each * torch.tensor([1.0, 2, 3]))[known].sum() / 3)
    nothing = module.loss(logits, torch.full((3, 3), nan))
    nothing.backward()
    assert nothing == 0


def test_unknown_numbers_change_nothing() -> None:
    module = head(classes=2, target="regression", label_columns=["a", "b"])
    numbers = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    answers = torch.randn(2, 2)
    expected = F.mse_loss(answers[[0, 1, 1], [0, 0, 1]], torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(module.loss(answers, numbers), expected)
    with pytest.raises(DataError, match="NaN or infinity"):
        module.loss(answers, torch.tensor([[1.0, float("inf")], [2.0, 3.0]]))


def test_numbers_are_learnt_in_units_of_their_spread() -> None:
    options = {"classes": 2, "target": "regression", "target_mean": [5000.0, 0.01], "target_std": [100.0, 0.002]}
    module, plain = head(**options).double(), head(classes=2, target="regression").double()
    assert module.state_dict().keys() == plain.state_dict().keys()
    context = torch.randn(4, 6, 12, dtype=torch.float64)
    mean, std = torch.tensor([5000.0, 0.01]).double(), torch.tensor([100.0, 0.002]).double()
    answers = module(context)
    torch.testing.assert_close(answers, plain(context) * std + mean)
    targets = mean + std * torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(module.loss(answers, targets), F.mse_loss(plain(context), (targets - mean) / std))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float()(context.float()).dtype == torch.float32  # half precision cannot tell 5000 from 5010


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        ("single", torch.tensor([1, 7]), r"class 7 is out of range 0\.\.2"),
        ("single", torch.tensor([1, -1]), r"class -1 is out of range"),
        ("single", torch.tensor([[1], [2]]), r"expected shape \(2,\)"),
        ("multi", torch.tensor([[0, 1, 2.0], [0, 0, 0]]), "between 0 and 1, got 2"),
        ("multi", torch.tensor([0, 1]), r"expected shape \(2, 3\)"),
        ("regression", torch.tensor([[0, 1, float("nan")], [0, 0, 0]]), "NaN"),
    ],
)
def test_wrong_targets(target: str, values: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        head(target=target).loss(torch.randn(2, 3), values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "one class"),
        ({"classes": 0, "target": "multi"}, "at least 1"),
        ({"classes": 3, "class_weights": [1.0]}, "expected 3 values"),
        ({"classes": 2, "class_weights": [1.0, -1.0]}, ">= 0"),
        ({"classes": 2, "class_weights": [0.0, 0.0]}, "all are 0"),
        ({"classes": 2, "class_names": ["a"]}, "expected 2 values"),
        ({"classes": 2, "label_smoothing": 1.0}, "0 <= x < 1"),
        ({"classes": 2, "label_smoothing": 0.1, "target": "regression"}, "no meaning"),
        ({"classes": 2, "label_columns": ["a", "b"]}, "no meaning for target: single"),
        ({"classes": 2, "label_columns": ["a"], "target": "multi"}, "expected 2 values"),
        ({"classes": 2, "label_columns": ["a", "a"], "target": "multi"}, "expected different columns"),
        ({"classes": 1, "target": "regression", "target_mean": [1.0]}, "together"),
        ({"classes": 1, "target": "regression", "target_mean": [1.0], "target_std": [0.0]}, "above 0"),
        ({"classes": 1, "target": "regression", "target_mean": [float("nan")], "target_std": [1.0]}, "finite"),
        ({"classes": 2, "target": "multi", "target_mean": [1.0, 1.0], "target_std": [1.0, 1.0]}, "no meaning"),
    ],
)
def test_wrong_config(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifyConfig(**options)


def test_class_weights_are_config_not_weights() -> None:
    assert not any("class_weights" in key for key in head(class_weights=[1.0, 2.0, 3.0]).state_dict())
    assert isinstance(build_head(ClassifyConfig(classes=2), 8), ClassifyHead)
