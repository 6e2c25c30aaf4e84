from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TinyModel, make_scenes

from gigaxt.training import initial, loop


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return make_scenes(folder)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[TinyModel]:
    """The models that runs build, which are tiny ones; the report is not drawn, which takes longest."""
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    built: list[TinyModel] = []

    def build(config: object) -> TinyModel:
        built.append(TinyModel(config))
        return built[-1]

    monkeypatch.setattr(initial, "build_model", build)
    return built
