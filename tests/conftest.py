from __future__ import annotations

import gc
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


def pytest_collection_finish() -> None:
    """What imports have made lives as long as the process: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of real files beside the checkout; not part of the project."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixtures at {FIXTURES}: these tests read real files that are not committed")
    return FIXTURES
