"""Features of a frozen encoder on disk: equal to fresh ones, and never those of something else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from gigaxt import CheckpointError, GigaXT, Image, open_image
from gigaxt.augment import colour_augmented, dihedral
from gigaxt.nn.all_tokens import frozen_features
from gigaxt.nn.freezing import freeze
from gigaxt.testing.live_memory import LiveMemory
from gigaxt.token_cache import TokenCache
from tiny_models import classifier, tiny_model


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (150, 210, 3), dtype=np.uint8)
    pixels[:70, :70] = 0
    tifffile.imwrite(tmp_path / "scene.tif", pixels, photometric="rgb")
    return tmp_path / "scene.tif"


def frozen(folder: Path, **given: Any) -> GigaXT:
    model = tiny_model({"kind": "classify", "classes": 3}, **given).double()
    freeze(model.encode, "frozen")
    model.token_cache = TokenCache(folder, 1.0)
    return model


def runs(model: GigaXT) -> list[int]:
    """Regions that go through the backbone."""
    found: list[int] = []
    model.encode.encoder.trunk.register_forward_hook(lambda module, inputs, outputs: found.append(len(inputs[0])))
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("scenes", [1, 2])
def test_features_are_copied_no_more_often_than_they_must(tmp_path: Path, scene: Path, scenes: int) -> None:
    """Of a large scene they are gigabytes."""
    model = frozen(tmp_path / "cache")
    batch = model.batch([open_image(scene)] * scenes)
    rows = range(len(batch.places))
    for _ in range(2):  # computed, then read
        with LiveMemory(model.parameters()) as memory:
            found = frozen_features(model.encode, batch, rows, model.streaming, model.token_cache)
            del found
    size = len(rows) * batch.t**2 * model.encode.encoder.dim * 8
    # Those of one scene at most beside what is returned: as they are read, or to be joined.
    assert memory.peak < (1 if scenes == 1 else 2) * size + 4096


@pytest.mark.parametrize("given", [{}, {"overview": [2]}, {"halo": 0, "resize_px": 130}])
def test_read_is_as_computed(tmp_path: Path, scene: Path, given: dict[str, Any]) -> None:
    """Bitwise, gradients too, in another process's model; nothing is encoded the second time."""
    folder = tmp_path / "cache"
    image = open_image(scene)
    first = frozen(folder, **given)
    answers, gradients = [], []
    for model in (first, first, frozen(folder, **given)):
        counted = runs(model)
        model.zero_grad()
        answers.append(model([image]))
        model([image], [1], seed=0).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert bool(counted) == (len(answers) == 1)
    plain = frozen(folder, **given)
    plain.token_cache = None
    assert all(torch.equal(answer, plain([image])) for answer in answers)
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
    assert len(files(folder)) == 1


def test_several_scenes_in_any_grouping(tmp_path: Path, scene: Path) -> None:
    """Overviews stand at the end of a batch: each scene's regions are put back at their places."""
    model = frozen(tmp_path / "cache", overview=[2])
    images = [open_image(scene), dihedral(open_image(scene), 5), open_image(np.full((90, 60, 3), 9, np.uint8))]
    model.token_cache, cache = None, model.token_cache
    expected = model(images)
    model.token_cache = cache
    for order in ([0], [1, 0], [2, 1, 0], [0, 1, 2]):
        torch.testing.assert_close(model([images[i] for i in order]), expected[order], rtol=1e-12, atol=0)
    assert len(files(tmp_path / "cache")) == 2  # the array is in no file


def test_what_features_depend_on_is_in_the_key(tmp_path: Path, scene: Path) -> None:
    folder = tmp_path / "cache"
    image = open_image(scene)
    model = frozen(folder)
    model([image])
    kept: set[Path] = set(files(folder))
    changed: list[tuple[GigaXT, Image]] = [(frozen(folder, mean=[9.0] * 3, std=[2.0] * 3), image)]
    weights = frozen(folder)
    with torch.no_grad():
        next(weights.encode.encoder.parameters())[0] += 1
    changed += [(weights, image), (frozen(folder).float(), image)]
    changed += [(frozen(folder), dihedral(image, k)) for k in range(1, 8)]
    changed += [(frozen(folder), image.select([2, 1, 0]))]
    for other, seen in changed:
        counted = runs(other)
        other([seen])
        assert counted
        assert len(files(folder)) == len(kept) + 1
        kept = set(files(folder))
    before, pixels = model([image]), tifffile.imread(scene)
    tifffile.imwrite(scene, pixels[::-1], photometric="rgb")
    os.utime(scene, ns=(0, 0))
    other = frozen(folder)
    assert not torch.equal(other([open_image(scene)]), before)


def test_drawn_pixels_are_not_kept(tmp_path: Path, scene: Path) -> None:
    model = frozen(tmp_path / "cache")
    model([colour_augmented(open_image(scene), [1.1] * 3, [0.1] * 3)])
    model(torch.rand(1, 3, 64, 64).double())
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_files_are_made_again(tmp_path: Path, scene: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    model = frozen(folder)
    expected = model([open_image(scene)])
    (path,) = files(folder)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes({"cut": content[:-30], "flipped": bytes(content), "empty": b"", "text": b"no tokens"}[damage])
    counted = runs(model)
    assert torch.equal(model([open_image(scene)]), expected)
    assert counted
    counted.clear()
    model([open_image(scene)])
    assert not counted


def test_it_stays_within_its_size(tmp_path: Path, scene: Path) -> None:
    """What this run has not used makes room; what it uses stays, and it is told once that there is no more room."""
    folder, turned = tmp_path / "cache", dihedral(open_image(scene), 1)
    model = frozen(folder)
    model([open_image(scene)])
    (old,) = files(folder)
    room = 1.5 * old.stat().st_size / 2**30
    model.token_cache = TokenCache(folder, room)
    model([turned])
    (new,) = files(folder)
    assert new != old
    for _ in range(2):
        model([open_image(scene)])
    assert files(folder) == [new]
    notes = model.token_cache.new_notes()
    assert [note for note in notes if "is full at" in note] == notes != []
    assert model.token_cache.new_notes() == []


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    model = frozen(tmp_path / "cache")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert model([open_image(scene)]).shape == (1, 3)
    assert files(tmp_path / "cache") == []
    assert model.token_cache is not None
    (note,) = model.token_cache.new_notes()
    assert "cannot be written (No space left on device); going on without" in note


def test_what_is_not_its_own_is_left_alone(tmp_path: Path, scene: Path) -> None:
    """A model's weights in the same folder do not count, and make no room."""
    folder = tmp_path / "cache"
    folder.mkdir()
    strangers = [folder / "model.safetensors", folder / "download.part"]
    for stranger in strangers:
        stranger.write_bytes(bytes(2**20))
        os.utime(stranger, (0, 0))
    model = frozen(folder)
    assert model.token_cache is not None
    model.token_cache.most_bytes = 2**20  # which the strangers would fill
    model([open_image(scene)])
    assert len(files(folder)) == 3
    model.token_cache.most_bytes, model.token_cache._used = 1, set()
    model.token_cache.put(folder / f"{'0' * 40}.safetensors", torch.zeros(1, 1, 1), torch.ones(1, 1))
    assert all(stranger.exists() for stranger in strangers)


def test_changed_weights_are_noticed(tmp_path: Path, scene: Path) -> None:
    model = frozen(tmp_path / "cache")
    model([open_image(scene)])
    with torch.no_grad():
        next(model.encode.encoder.parameters())[0] += 1
    counted = runs(model)
    model([open_image(scene)])
    assert counted


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"train.token_cache: .*file"):
        TokenCache(tmp_path / "file", 1.0)


def test_a_learning_encoder_never_asks(tmp_path: Path, scene: Path) -> None:
    model = classifier()
    model.token_cache = TokenCache(tmp_path / "cache", 1.0)
    model([open_image(scene)])
    assert files(tmp_path / "cache") == []
