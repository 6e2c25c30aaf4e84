from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as Pillow

from gigaxt import ConfigError, open_image
from gigaxt.cli import demo, main
from gigaxt.cli.demo import DemoConfig, aligned, confusion, kinds_iou, run_demo
from gigaxt.cli.demo_report import strip

TINY = DemoConfig(
    train_px=128, train_scenes=8, test_px=128, test_scenes=4, large_px=300, epochs=1, batch=4, dims=(8, 8, 8, 16)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves behind, of a size that takes seconds; its output is in `output.txt` beside it."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo") / "made here"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert run_demo(folder, TINY) == 0
    (folder.parent / "output.txt").write_text(output.getvalue())
    return folder


def test_output_is_short_and_aligned(made: Path) -> None:
    text = (made.parent / "output.txt").read_text()
    lines = text.splitlines()
    assert len(lines) < 35
    assert max(map(len, lines)) < 100 + len(str(made)) * 2
    stages = [line for line in lines if line.endswith(" s") and ".." in line]
    assert len(stages) == 6
    assert len({len(line) for line in stages}) == 1
    head = next(i for i, line in enumerate(lines) if "mean IoU of the kinds, on glyphs" in line)
    assert [line.split("  ")[1] for line in lines[head + 1 : head + 4]] == [
        "with context",
        "without context",
        "guessing",
    ]
    assert len({len(line) for line in lines[head : head + 4]}) == 1
    assert "gigaxt check your.csv --write run.yaml" in text
    assert f"gigaxt predict '{made}/with_context'" in text  # quoted, for the folder has a space
    assert lines[-1].startswith("done in ")


def test_what_is_left_behind(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [
        "data", "demo.json", "large", "pictures", "report.html", "with_context", "without_context"
    ]  # fmt: skip
    scene = open_image(made / "large/scene_4.tif")
    for name in ("target_4", "with_context_4", "without_context_4"):
        mask = open_image(made / f"large/{name}.tif")
        assert (mask.height, mask.width) == (scene.height, scene.width) == (300, 300)
    for run in ("with_context", "without_context"):
        assert (made / run / "report.html").exists()
        assert (made / run / "model/model.safetensors").exists()
    assert not list(made.rglob("*.part"))


def test_page_links_what_exists(made: Path) -> None:
    page = (made / "report.html").read_text()
    links = [part.split('"')[0] for key in ('src="', 'href="') for part in page.split(key)[1:]]
    assert len(links) == 3 + 4 + 2
    assert all((made / link).exists() for link in links)
    for path in (made / "pictures").iterdir():
        with Pillow.open(path) as picture:
            assert min(picture.size) >= 200


def test_the_second_time_nothing_is_done_again(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        made / "data/scenes.csv",
        made / "data/images/000003.tif",
        *(made / "with_context/checkpoints").rglob("*.safetensors"),
    ]
    times = [path.stat().st_mtime_ns for path in files]
    assert run_demo(made, TINY) == 0
    assert "holds this demo already" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize("existing", ["demo.json", "mine.txt", "a file"])
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, existing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if existing == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / existing).write_text("{}")
    assert main(["demo", "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "use another --out" in text
    assert out.is_file() or [path.name for path in out.iterdir()] == [existing]


def test_a_damaged_marker_is_told(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        run_demo(tmp_path, TINY)


def test_a_signal_ends_it_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train_run", lambda *args: SimpleNamespace(signal=signal.SIGTERM))
    assert run_demo(tmp_path / "out", TINY) == 128 + 15
    assert "the same command goes on" in capsys.readouterr().out


def test_scores_count_kinds_on_glyph_pixels() -> None:
    counts = np.zeros((4, 4))
    counts[0, 1] = 1000  # background taken for a glyph: edges do not count
    counts[1, 1], counts[1, 2] = 6, 2
    counts[2, 2], counts[2, 0] = 3, 1  # a glyph that is not seen does
    assert kinds_iou(counts) == pytest.approx((6 / 8 + 3 / 6) / 2)  # the third kind does not occur


def test_guessing_scores_as_the_table_says() -> None:
    kinds = TINY.kinds
    counts = np.zeros((kinds + 1, kinds + 1))
    counts[1:, 1:] = 10
    table = demo.score_table(TINY, {"with context": (kinds_iou(counts), 0.0)})
    assert table[1][1] == table[2][1] == f"{1 / (2 * kinds - 1):.2f}"


def test_confusion_has_the_true_class_as_row() -> None:
    target, answer = (open_image(np.array([row], np.uint8)) for row in ([0, 1, 1], [0, 1, 2]))
    np.testing.assert_array_equal(confusion(target, answer, 3), [[1, 0, 0], [0, 1, 1], [0, 0, 0]])


def test_small_texts() -> None:
    assert aligned([["a", "one", "2"], ["long", "1", "three"]]) == "  a       one        2\n  long      1    three"
    picture = strip({"a": np.zeros((20, 30, 3), np.uint8), "b": np.zeros((10, 50, 3), np.uint8)})
    assert picture.shape == (42, 88, 3)
