from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.heads import ClassifyConfig, ClassifyHead
from gigaxt.nn.heads.survival import bin_names, event_probabilities, quantile_edges, risk, survival_losses

EDGES = [2.0, 5.0]


def naive_loss(logits: Tensor, time: float, event: float) -> float:
    """Bin by bin."""
    total = 0.0
    for k, (start, end) in enumerate(zip([0, *EDGES], [*EDGES, math.inf], strict=True)):
        hazard = 1 / (1 + math.exp(-float(logits[k])))
        if end <= time:
            total += math.log(1 - hazard)
        elif start <= time and event:
            total += math.log(hazard)
    return -total


def test_loss_is_the_likelihood_of_hazards() -> None:
    torch.manual_seed(0)
    times = [0.0, 1.9, 2.0, 3.0, 4.999, 5.0, 100.0]
    for event in (0.0, 1.0):
        logits = torch.randn(len(times), 3, dtype=torch.float64)
        found = survival_losses(logits, torch.tensor(times), torch.full((len(times),), event), EDGES)
        assert found.tolist() == pytest.approx([naive_loss(z, t, event) for z, t in zip(logits, times, strict=True)])
    head = ClassifyHead(ClassifyConfig(classes=3, target="survival", time_bins=EDGES), 8).double()
    targets = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    expected = (naive_loss(logits[0], 3, 1) + naive_loss(logits[1], 1, 0)) / 2
    assert float(head.loss(logits[:2], targets)) == pytest.approx(expected)


def test_who_left_in_the_first_bin_says_nothing() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = survival_losses(logits, torch.tensor([1.0]), torch.tensor([0.0]), EDGES).sum()
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[200.0, -200.0, 200.0]], requires_grad=True)
    loss = survival_losses(logits, torch.tensor([4.0]), torch.tensor([1.0]), EDGES).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_hazards_that_are_learnt_are_those_of_the_data() -> None:
    """Without images the best hazards are the life table: events / those at risk, in each bin."""
    random = np.random.default_rng(0)
    time = torch.from_numpy(random.exponential(4.0, 400))
    event = torch.from_numpy(random.random(400) < 0.6)
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = survival_losses(logits.expand(400, 3), time, event, EDGES).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    for k, (start, end) in enumerate(zip([0, *EDGES], [*EDGES, math.inf], strict=True)):
        here = ((time >= start) & (time < end) & event).sum()
        assert float(logits.detach()[0, k].sigmoid()) == pytest.approx(
            float(here / (here + (time >= end).sum())), abs=0.01
        )


def test_probabilities_and_risk() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    hazard = logits.sigmoid()
    survival = torch.cumprod(1 - hazard, dim=1)
    probabilities = event_probabilities(logits)
    torch.testing.assert_close(probabilities.cumsum(1), 1 - survival)
    torch.testing.assert_close(risk(logits), (1 - survival).sum(1))
    earlier = risk(torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]))
    assert earlier[0] > earlier[1] > earlier[2]


def test_edges_hold_equally_many_events() -> None:
    times = np.random.default_rng(0).exponential(10, 400)
    edges = quantile_edges(times, 4)
    assert np.histogram(times, [0, *edges, np.inf])[0].tolist() == [100] * 4
    assert bin_names([2.0, 5.25]) == ["< 2", "2 to 5.25", ">= 5.25"]
    with pytest.raises(DataError, match="no event was seen"):
        quantile_edges([], 2)
    with pytest.raises(DataError, match=r"4 bins of time would not hold an event each: 6 events at 2 different times"):
        quantile_edges([1, 1, 1, 7, 7, 7], 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1, "target": "survival"}, "one bin of time"),
        ({"classes": 3, "target": "survival", "time_bins": [1.0]}, "3 bins .* have 2 times between them, got 1"),
        ({"classes": 3, "target": "survival", "time_bins": [2.0, 1.0]}, "rising times above 0"),
        ({"classes": 3, "target": "survival", "time_bins": [0.0, 1.0]}, "rising times above 0"),
        ({"classes": 3, "target": "survival", "time_bins": [1.0, math.inf]}, "rising times above 0"),
        ({"classes": 3, "target": "survival", "label_smoothing": 0.1}, "no meaning for target: survival"),
        ({"classes": 3, "target": "survival", "class_weights": [1.0] * 3}, "no meaning for target: survival"),
        ({"classes": 3, "time_bins": [1.0, 2.0]}, "no meaning for target: single"),
    ],
)
def test_wrong_config(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassifyConfig(**options)


def test_wrong_targets() -> None:
    head = ClassifyHead(ClassifyConfig(classes=3, target="survival", time_bins=EDGES), 8)
    for targets, message in (
        (torch.tensor([[-1.0, 1.0]]), "time of 0 or more"),
        (torch.tensor([[1.0, 2.0]]), "event of 0 or 1"),
        (torch.tensor([[math.nan, 1.0]]), "finite time"),
        (torch.tensor([[math.inf, 1.0]]), "finite time"),
        (torch.tensor([1.0]), r"expected shape \(1, 2\)"),
    ):
        with pytest.raises(DataError, match=message):
            head.loss(torch.zeros(1, 3), targets)
    with pytest.raises(ConfigError, match="gigaxt train` fills them in"):
        ClassifyHead(ClassifyConfig(classes=3, target="survival"), 8).loss(torch.zeros(1, 3), torch.ones(1, 2))
