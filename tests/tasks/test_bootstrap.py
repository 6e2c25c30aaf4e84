from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt.tasks import bootstrap
from gigaxt.tasks.bootstrap import DRAWS, about_groups, estimate, weightings


def mean_of(x: Tensor):
    return lambda weights: {"mean": x @ weights / weights.sum(dim=0)}


def test_the_first_weighting_is_the_data_and_each_draw_takes_whole_groups() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    found = torch.cat(list(weightings(groups)), dim=1)
    assert found.shape == (6, 1 + DRAWS)
    assert (found[:, 0] == 1).all()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[4])
    assert (found[0] + found[1] + found[3])[1:].eq(3).all()  # three groups, as there are
    assert found[3, 1:].mean() == pytest.approx(1, abs=0.1)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [str(i) for i in range(40)]
    whole = torch.cat(list(weightings(groups)), dim=1)
    monkeypatch.setattr(bootstrap, "NUMBERS_AT_ONCE", 100)
    blocks = list(weightings(groups))
    assert len(blocks) > 100
    assert torch.equal(torch.cat(blocks, dim=1), whole)


def test_interval_is_that_of_a_plain_bootstrap() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=80)
    values, intervals = estimate(mean_of(torch.from_numpy(x)), [str(i) for i in range(80)])
    assert values["mean"] == pytest.approx(x.mean())
    plain = np.quantile([random.choice(x, 80).mean() for _ in range(4000)], [0.025, 0.975])
    assert intervals["mean"] == pytest.approx(plain, abs=0.03)
    assert estimate(mean_of(torch.from_numpy(x)), [str(i) for i in range(80)])[1] == intervals  # seeded


def test_groups_make_intervals_wider() -> None:
    """Eight cases that agree with each other are one observation."""
    x = torch.from_numpy(np.random.default_rng(1).normal(size=20)).repeat_interleave(8)
    (_, alone), (_, grouped) = (
        estimate(mean_of(x), groups) for groups in ([str(i) for i in range(160)], [str(i // 8) for i in range(160)])
    )
    width = {name: found["mean"][1] - found["mean"][0] for name, found in (("alone", alone), ("grouped", grouped))}
    assert width["grouped"] == pytest.approx(width["alone"] * 8**0.5, rel=0.2)


def test_draws_in_which_a_score_is_not_defined_do_not_count() -> None:
    def scores(weights: Tensor) -> dict[str, Tensor]:
        return {"first": torch.where(weights[0] > 0, 1.0, torch.nan), "never": torch.full_like(weights[0], torch.nan)}

    values, intervals = estimate(scores, ["a", "b", "c"])
    assert intervals == {"first": (1.0, 1.0)}
    assert np.isnan(values["never"])


def test_one_group_has_no_interval() -> None:
    values, intervals = estimate(mean_of(torch.tensor([1.0, 3.0], dtype=torch.float64)), ["a", "a"])
    assert values == {"mean": 2}
    assert intervals == {}
    assert about_groups(1) == ["no intervals: all is of one group"]
    assert "too narrow" in about_groups(4)[0]
    assert about_groups(50) == []
