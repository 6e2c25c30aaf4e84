from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import gigaxt
from gigaxt import DataError, GigaXT, ImageError, open_image
from gigaxt.image import part_file
from gigaxt.inference import masks
from gigaxt.inference.parts import Parts, file_state, is_done, model_digest
from tiny_models import segmenter

SETTINGS: dict[str, Any] = {"overlap": 32, "dihedral": 4, "probabilities": "uint8"}
OUTPUTS = ["mask.tif", "mask.tif.json", "mask_probabilities.tif"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 150, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", pixels, tile=(64, 64), photometric="rgb")
    return tmp_path / "scene.tif"


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("mask.tif", "mask_probabilities.tif")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_after(work: int) -> Callable[[int, int], None]:
    def progress(done: int, count: int) -> None:
        if done >= work:
            raise KeyboardInterrupt

    return progress


def encoded(model: GigaXT) -> list[int]:
    """Grows by the number of regions of each call of the region encoder."""
    counts: list[int] = []
    model.encode.register_forward_pre_hook(lambda module, args: counts.append(len(args[0]["pixels"])))
    return counts


def test_a_stopped_prediction_goes_on_and_ends_the_same(path: Path, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    model = segmenter()
    counts = encoded(model)
    gigaxt.predict(model, path, unbroken / "mask.tif", **SETTINGS)
    work = sum(counts)
    assert work == 4 * (12 + 6 * 4)  # four turns of 4 x 3 regions, and 6 x 4 windows
    assert names(unbroken) == OUTPUTS
    for stop in (20, 50, 90, 130):  # in the first pass, at its end, in the second one
        counts.clear()
        with pytest.raises(KeyboardInterrupt):
            gigaxt.predict(model, path, broken / "mask.tif", progress=stop_after(stop), **SETTINGS)
        assert names(broken) == ["mask.tif.parts"]
    counts.clear()
    gigaxt.predict(model, path, broken / "mask.tif", **SETTINGS)
    assert sum(counts) < 0.4 * work
    assert names(broken) == OUTPUTS
    assert results(broken) == results(unbroken)


def test_progress_counts_what_was_done_before(path: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        gigaxt.predict(segmenter(), path, tmp_path / "mask.tif", progress=stop_after(60), **SETTINGS)
    gigaxt.predict(
        segmenter(), path, tmp_path / "mask.tif", progress=lambda done, count: told.append((done, count)), **SETTINGS
    )
    assert (48, 4 * 36) in told[:5]  # the four contexts were there
    assert told[-1] == (4 * 36, 4 * 36)


@pytest.mark.parametrize("context", ["mamba2", "none"])
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(path: Path, tmp_path: Path, context: str) -> None:
    segmenter(context=context).save(tmp_path / "model")
    out = tmp_path / "killed"
    out.mkdir()
    code = f"""
import os, signal, gigaxt
def progress(done, count):
    if done >= 80:
        os.kill(os.getpid(), signal.SIGKILL)
gigaxt.predict(gigaxt.load({str(tmp_path / "model")!r}), {str(path)!r}, {str(out / "mask.tif")!r}, progress=progress,
               **{SETTINGS!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert names(out) == ["mask.tif.parts"]
    model = gigaxt.load(tmp_path / "model")
    counts = encoded(model)
    gigaxt.predict(model, path, out / "mask.tif", **SETTINGS)
    # At least the first pass was kept; without context, which has none, two rows of 4 windows.
    assert 0 < sum(counts) <= (4 * (24 - 2 * 4) if context == "none" else 4 * 36 - 48)
    gigaxt.predict(model, path, tmp_path / "mask.tif", **SETTINGS)
    assert results(out) == results(tmp_path)


def changed_model(path: Path) -> GigaXT:
    model = segmenter()
    with torch.no_grad():
        model.head.classifier.shared.bias[0] += 0.5
    return model


def changed_file(path: Path) -> GigaXT:
    pixels = tifffile.imread(path)
    tifffile.imwrite(path, pixels[::-1], tile=(64, 64), photometric="rgb")
    return segmenter()


@pytest.mark.parametrize("change", [changed_model, changed_file])
@pytest.mark.parametrize("complete", [False, True])
def test_nothing_stale_is_used(path: Path, tmp_path: Path, change: Callable[[Path], GigaXT], complete: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if complete:
        gigaxt.predict(segmenter(), path, out / "mask.tif", **SETTINGS)
    else:
        with pytest.raises(KeyboardInterrupt):
            gigaxt.predict(segmenter(), path, out / "mask.tif", progress=stop_after(100), **SETTINGS)
    model = change(path)
    gigaxt.predict(model, path, tmp_path / "mask.tif", **SETTINGS)
    gigaxt.predict(model, path, out / "mask.tif", **SETTINGS)
    assert results(out) == results(tmp_path)


@pytest.mark.parametrize("other", [{"overlap": 0}, {"dihedral": 1}, {"probabilities": None}])
def test_other_settings_begin_anew(path: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        gigaxt.predict(segmenter(), path, tmp_path / "mask.tif", progress=stop_after(100), **SETTINGS)
    told: list[int] = []
    settings = {**SETTINGS, **other}
    gigaxt.predict(segmenter(), path, tmp_path / "mask.tif", progress=lambda done, count: told.append(done), **settings)
    assert told[0] <= 4


def test_autocast_is_another_result(path: Path, tmp_path: Path) -> None:
    gigaxt.predict(segmenter(), path, tmp_path / "mask.tif")
    before = (tmp_path / "mask.tif.json").read_text()
    with torch.autocast("cpu", torch.bfloat16):
        gigaxt.predict(segmenter(), path, tmp_path / "mask.tif")
    assert json.loads(before)["plan"]["autocast"] == "as stored"
    assert json.loads((tmp_path / "mask.tif.json").read_text())["plan"]["autocast"] == "torch.bfloat16"


def test_what_is_complete_is_not_made_again(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "mask.tif"
    model = segmenter()
    gigaxt.predict(model, path, out, **SETTINGS)
    before = [file_state(tmp_path / name) for name in OUTPUTS]
    counts = encoded(model)
    gigaxt.predict(model, path, out, **SETTINGS)
    assert (counts, [file_state(tmp_path / name) for name in OUTPUTS]) == ([], before)
    (tmp_path / "mask_probabilities.tif").unlink()
    gigaxt.predict(model, path, out, **SETTINGS)
    assert counts
    counts.clear()
    out.write_bytes(b"something else")
    gigaxt.predict(model, path, out, **SETTINGS)
    assert counts
    assert open_image(out).height == 200


@pytest.mark.parametrize("text", ["", "[]", '{"plan": 1}', "{", '{"plan": null, "files": {}}'])
def test_a_damaged_record_counts_as_none(path: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "mask.tif.json").write_text(text)
    assert not is_done(tmp_path / "mask.tif", {"a": 1})
    assert not is_done(tmp_path / "mask.tif", None)
    gigaxt.predict(segmenter(), path, tmp_path / "mask.tif")
    assert (tmp_path / "mask.tif").exists()


def test_damaged_parts_are_made_again(path: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", segmenter()
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        gigaxt.predict(model, path, out / "mask.tif", progress=stop_after(128), **SETTINGS)
    parts = out / "mask.tif.parts"
    strips = sorted(parts.glob("answers-*.tif"))
    assert len(strips) >= 3
    strips[1].write_bytes(strips[1].read_bytes()[:100])
    (parts / "context-3.safetensors").write_bytes(b"")
    (parts / "answers-000005.tif.part").write_bytes(b"half")
    gigaxt.predict(model, path, out / "mask.tif", **SETTINGS)
    gigaxt.predict(model, path, tmp_path / "mask.tif", **SETTINGS)
    assert results(out) == results(tmp_path)
    assert names(out) == OUTPUTS


def test_an_image_in_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nothing tells whether it is the same next time."""
    image = open_image(np.random.default_rng(0).integers(0, 256, (150, 200, 3)).astype(np.uint8))
    with pytest.raises(KeyboardInterrupt):
        gigaxt.predict(segmenter(), image, tmp_path / "mask.tif", progress=stop_after(20))
    assert names(tmp_path) == []
    gigaxt.predict(segmenter(), image, tmp_path / "mask.tif")
    assert names(tmp_path) == ["mask.tif"]


def test_bad_input_leaves_nothing_behind(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fail(error: Exception) -> None:
        with Parts(out / "mask.tif", str(path), {"a": 1}) as parts:
            parts.save("tokens", {"tokens": torch.ones(3)})
            raise error

    with pytest.raises(DataError, match="does not fit"):
        fail(DataError("the image does not fit"))
    with pytest.raises(ImageError, match="damaged"):
        fail(ImageError(path, "damaged"))
    assert names(out) == []
    with pytest.raises(RuntimeError, match="anything else"):
        fail(RuntimeError("anything else"))
    assert names(out) == ["mask.tif.parts"]


def test_a_full_disk_is_told_and_what_is_complete_kept(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model, written = tmp_path / "out", segmenter(), 0
    out.mkdir()
    write = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(part_file.os, "pwrite", full)
    with pytest.raises(
        ImageError, match=r"disk full .*; what is complete waits in .*mask\.tif\.parts: repeat the comm"
    ):
        gigaxt.predict(model, path, out / "mask.tif", **SETTINGS)
    assert names(out) == ["mask.tif.parts"]
    assert not list((out / "mask.tif.parts").glob("*.part"))
    monkeypatch.undo()
    counts = encoded(model)
    gigaxt.predict(model, path, out / "mask.tif", **SETTINGS)
    assert sum(counts) < 4 * 24
    gigaxt.predict(model, path, tmp_path / "mask.tif", **SETTINGS)
    assert results(out) == results(tmp_path)


def test_a_disk_that_is_too_small_is_told_before_the_work(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = masks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(masks.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    model = segmenter()
    counts = encoded(model)
    with pytest.raises(ImageError, match=r"GiB are needed in .*, and .* GiB are free: .*leave out the probabilities"):
        gigaxt.predict(model, path, tmp_path / "mask.tif", **SETTINGS)
    assert counts == []
    assert names(tmp_path) == ["scene.tif"]


def test_two_processes_do_not_make_one_output(tmp_path: Path) -> None:
    output = tmp_path / "mask.tif"
    with Parts(output, "scene.tif", {"a": 1}):
        with pytest.raises(ImageError, match="another process is making it"), Parts(output, "scene.tif", {"a": 1}):
            pass
        assert (tmp_path / "mask.tif.parts").exists()
    with Parts(output, "scene.tif", {"a": 1}):
        pass
    assert names(tmp_path) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "mask.tif.parts"
    other.mkdir()
    (other / "precious.tif").write_text("mine")
    with pytest.raises(ImageError, match="rename it"), Parts(tmp_path / "mask.tif", "scene.tif", None):
        pass
    assert (other / "precious.tif").read_text() == "mine"


def test_folders_are_told_apart_by_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "scene.zarr"
    (folder / "0").mkdir(parents=True)
    (folder / "0/0.0").write_bytes(b"chunk")
    before = file_state(folder)
    assert file_state(folder) == before
    os.utime(folder / "0/0.0", ns=(1, 1))
    assert file_state(folder) != before
    assert file_state(tmp_path / "none") is None


def test_digest_tells_models_apart() -> None:
    model = segmenter()
    assert model_digest(model) == model_digest(segmenter())
    digests = {
        model_digest(m) for m in (model, changed_model(Path()), segmenter(halo=0, overview=[2]), segmenter().double())
    }
    assert len(digests) == 4
