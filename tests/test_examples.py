from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gigaxt import build_model
from gigaxt.training.config import read_yaml, run_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_a_valid_run(path: Path) -> None:
    """Every key is known, and the model builds (without its pretrained weights, which need the network)."""
    config = run_config(read_yaml(path)).model
    with torch.device("meta"):
        model = build_model(replace(config, region_encoder=replace(config.region_encoder, pretrained=False)))
    assert sum(p.numel() for p in model.parameters()) > 1e6
