"""Imports go one way: CONTRIBUTING.md, "Where things are"."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gigaxt

ROOT = Path(gigaxt.__file__).parent
LAYERS = (
    "cli",
    "training",
    "inference testing",
    "tasks datasets found pretrained pixel_answers",
    "nn xt_release",
    "targets scenes token_cache",
    "shapes regions augment randaugment metrics draw csv_cells machine streaming",
    "image",
    "allocator amounts config errors replaced_file",
)
"""From the top: a package or module imports what stands below it, or in its own line."""
EXCEPTIONS = {
    ("targets.masks", "nn.heads.segment_config"): "a mask is drawn as its head's settings say",
    ("nn.xt", "pretrained"): "`model.save`, when it is called",
    ("xt_release.scores", "datasets.inaturalist"): "the published predictions are those of iNaturalist",
}


def imports() -> Iterator[tuple[str, str]]:
    """Pairs of modules without `gigaxt.`: who imports whom, wherever in the file, but for types only."""
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py")}
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        importer = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing_only = {
            id(found)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for found in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
                module = (node.module or "").removeprefix("gigaxt.")
                if node.module == "gigaxt" or module != node.module:
                    for alias in node.names:
                        inside = f"{module}.{alias.name}"
                        yield importer, inside if inside in names else module


def layer_of(module: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if module.split(".")[0] in layer.split()]
    assert len(found) == 1, f"{module}: give it a place in LAYERS"
    return found[0]


def test_imports_go_one_way() -> None:
    found = {(a, b) for a, b in imports() if b != "gigaxt" and layer_of(a) > layer_of(b)}
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize("module", ["nn.xt", "image.open", "cli.train"])
def test_something_is_looked_at(module: str) -> None:
    assert any(importer == module for importer, _ in imports())
