from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gigaxt


def test_every_public_name_is_there() -> None:
    for name in gigaxt.__all__:
        assert getattr(gigaxt, name) is not None
    assert set(gigaxt._HOME_OF) == set(gigaxt.__all__)


def test_no_module_hides_behind_a_public_name() -> None:
    """A submodule called like a function would replace it as soon as somebody imports it."""
    modules = {path.stem for path in Path(gigaxt.__file__).parent.iterdir()}
    assert not modules & set(gigaxt.__all__)


def test_importing_is_light() -> None:
    code = "import sys, gigaxt; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_can_be_imported_first() -> None:
    """No circle of imports that only holds where another package came before."""
    code = """if True:
        import importlib, sys
        for package in ("metrics", "datasets", "testing", "streaming", "scenes"):
            for name in [name for name in sys.modules if name.partition(".")[0] == "gigaxt"]:
                del sys.modules[name]
            importlib.import_module(f"gigaxt.{package}")
        """
    subprocess.run([sys.executable, "-c", code], check=True)
