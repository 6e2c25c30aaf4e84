from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of real files beside the checkout; not part of the project."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixtures at {FIXTURES}: these tests read real files that are not committed")
    return FIXTURES
