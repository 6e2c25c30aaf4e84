from __future__ import annotations

from pathlib import Path

import pytest

from gigaxt import ConfigError, DataError, ImageError
from gigaxt.cli.image_lists import expand, scene_outputs


def test_one_image_may_become_a_file(tmp_path: Path) -> None:
    images = [tmp_path / "a.svs"]
    assert scene_outputs(tmp_path / "x.TIF", images, as_file=True) == [tmp_path / "x.TIF"]
    assert scene_outputs(tmp_path / "x", images, as_file=True) == [tmp_path / "x/a.tif"]
    assert scene_outputs(tmp_path, images, as_file=False) == [tmp_path / "a.tif"]


def test_images_of_one_name_are_told_apart() -> None:
    given = ["s1/a/VV.tif", "s1/b/VV.tif", "s2/a/VV.tif", "s1/b/VH.tif", "x/c.svs", "x/c.png", "y/c.png", "b.c.tif"]
    found = scene_outputs(Path("out"), [Path(name) for name in given], as_file=False)
    wanted = ["s1_a_VV", "s1_b_VV", "s2_a_VV", "VH", "x_c_svs", "x_c_png", "y_c", "b.c"]
    assert [path.as_posix() for path in found] == [f"out/{name}.tif" for name in wanted]
    objects = scene_outputs(Path("out"), [Path("a.tif")], as_file=False, suffix=".csv")
    assert objects == [Path("out/a.csv")]


def test_names_that_still_collide_are_refused() -> None:
    for pair in (["x/a.tif", "x/../x/a.tif"], ["x/a.tif", "y/a.tif", "z/x_a.tif"]):
        with pytest.raises(ConfigError, match="are one image, or have one name"):
            scene_outputs(Path("out"), [Path(name) for name in pair], as_file=False)


def test_outputs_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "old.tif").mkdir()
    (tmp_path / "file").write_text("")
    one, two = [Path("a.tif")], [Path("a.tif"), Path("b.tif")]
    for out, images, as_file, message in (
        ("old.tif", one, True, "expected the name of a file, got a folder"),
        ("file", one, True, "expected the name of a .tif file, or a folder"),
        ("x.csv", one, True, "expected the name of a .tif file, or a folder"),
        ("x.tif", two, False, "expected a folder for the 2 images"),
        ("file", two, False, "expected a folder for the 2 images"),
    ):
        with pytest.raises(ConfigError, match=message):
            scene_outputs(tmp_path / out, images, as_file=as_file)


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s1/a.tif", "s1/b.tif", "s2/a.tif", "s2/[x].tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"II*\0")
    monkeypatch.chdir(tmp_path / "s1")
    assert [str(path) for path in expand([Path("*.tif")])] == ["a.tif", "b.tif"]
    assert [str(path) for path in expand([Path("../s*/a.tif")])] == ["../s1/a.tif", "../s2/a.tif"]
    assert list(expand([tmp_path / "s2/?.tif"])) == [tmp_path / "s2/a.tif"]
    assert list(expand([tmp_path / "**/b.tif"])) == [tmp_path / "s1/b.tif"]
    assert list(expand([tmp_path / "s2/[x].tif"])) == [tmp_path / "s2/[x].tif"]  # a file of that name wins
    with pytest.raises(ImageError, match="nothing does"):
        list(expand([Path("*.png")]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"image;label\na.tif;b\n", "columns are separated by ';'; expected commas"),
        ("image\nbäume.tif\n".encode("latin-1"), "not UTF-8 text; save the CSV as UTF-8"),
        (b"image,label\na,b.tif,oak\n", "line 2: expected 2 cells as in the header, got 3"),
        (b"path\na.tif\n", "expected a column `image`, got path"),
    ],
)
def test_csvs_are_read_as_manifests_are(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "d.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        list(expand([tmp_path / "d.csv"]))


def test_a_path_that_is_too_long_is_no_image() -> None:
    with pytest.raises(ImageError, match="expected an image, a folder or a CSV, but there is nothing"):
        list(expand([Path("x" * 300 + ".tif")]))


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a folder may be an image, of which opening it says what is wrong, or it is skipped; root reads all."""
    for name in ("a.tif", "b.tif", "c.txt"):
        (tmp_path / name).write_bytes(b"II*\0" if name == "b.tif" else b"text")

    def denied(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a: denied(path) if path.name == "a.tif" else opened(path, *a))
    assert list(expand([tmp_path])) == [tmp_path / "a.tif", tmp_path / "b.tif"]
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
        list(expand([tmp_path]))
    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(ImageError, match="Permission denied"):
        list(expand([tmp_path / "b.tif"]))
