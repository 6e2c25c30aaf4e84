"""The images that a command line means, and what their outputs are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gigaxt.csv_cells import read_cells
from gigaxt.datasets.manifest import absence
from gigaxt.errors import ConfigError, DataError, ImageError

TIFF_SUFFIXES = (".tif", ".tiff")


def expand(paths: Sequence[Path]) -> Iterator[Path]:
    """The images that are meant: files as they are, patterns and folders by name, CSVs in the order of lines.

    Raises:
        ImageError: a path does not exist, or nothing fits a pattern. DataError: a folder or a CSV without images, or no
            path at all.
    """
    if not paths:
        raise DataError("expected at least one image: gigaxt predict runs/a scene.tif --out mask.tif")
    for path in paths:
        try:
            yield from _meant_by(path)
        except OSError as error:
            raise ImageError(path, f"cannot be read: {error.strerror or error}") from error


def _meant_by(path: Path) -> Iterator[Path]:
    absent = absence(path)
    if path.suffix.lower() == ".csv":
        yield from dict.fromkeys(image for image, _ in _lines_of_csv(path))
    elif not absent and path.is_dir() and not _is_image_folder(path):
        yield from _images_of_folder(path)
    elif absent and any(character in str(path) for character in "*?["):
        yield from _matches(path)
    elif absent:
        why = "" if absent == "does not exist" else f" ({absent})"
        raise ImageError(path, f"expected an image, a folder or a CSV, but there is nothing{why}")
    else:
        yield path


def cases_of(paths: Sequence[Path], images: Sequence[Path]) -> list[str] | None:
    """The case of each image, as the CSVs among `paths` name it, empty where they do not; None where they name none.

    Raises:
        DataError: an image is in two cases.
    """
    cases: dict[Path, str] = {}
    for path in paths:
        for image, case in _lines_of_csv(path) if path.suffix.lower() == ".csv" else ():
            if cases.setdefault(image, case) != case:
                raise DataError(f"{path}: image {image} is in two cases, {cases[image]} and {case}; give it one")
    return [cases.get(image, "") for image in images] if any(cases.values()) else None


def scene_outputs(out: Path, images: Sequence[Path], *, as_file: bool, suffix: str = ".tif") -> list[Path]:
    """Where the answers for scenes go: `out` itself for one image, else a file for each in the folder `out`.

    A file is called as its image. Where several images have one name it is preceded by the folders in which they
    differ, and followed by the suffix where these do not.

    Args:
        out: file or folder.
        images: one or several.
        as_file: `out` may be a file.
        suffix: of the files in a folder.

    Raises:
        ConfigError: `out` does not fit, or an image is given twice.
    """
    ending = out.suffix.lower()
    if as_file and ending in TIFF_SUFFIXES:
        if out.is_dir():
            raise ConfigError(f"--out {out}: expected the name of a file, got a folder")
        return [out]
    if ending in (*TIFF_SUFFIXES, ".csv", ".png") or out.is_file():
        wanted = "the name of a .tif file, or a folder" if as_file else f"a folder for the {len(images)} images"
        raise ConfigError(f"--out {out}: the model gives masks: expected {wanted}")
    return [out / f"{name}{suffix}" for name in _distinct_names(images)]


def _distinct_names(images: Sequence[Path]) -> list[str]:
    alike: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        alike[_stem(image)].append(image.resolve())
    names = [_longer_name(image.resolve(), alike[_stem(image)]) for image in images]
    first: dict[str, Path] = {}
    for name, image in zip(names, images, strict=True):
        if name in first:
            raise ConfigError(f"{first[name]} and {image} are one image, or have one name: leave one out")
        first[name] = image
    return names


def _stem(image: Path) -> str:
    return image.name.removesuffix(image.suffix)


def _longer_name(image: Path, alike: Sequence[Path]) -> str:
    """The stem of one of several images, preceded by as many folders as tell them apart."""
    parents = {path.parent.parts for path in alike}
    count = next(n for n in range(len(image.parts) + 1) if len({p[len(p) - n :] for p in parents}) == len(parents))
    name = "_".join([*image.parent.parts[len(image.parent.parts) - count :], _stem(image)])
    siblings = [path for path in alike if path.parent == image.parent]
    return f"{name}_{image.suffix[1:]}" if len(siblings) > 1 else name


def _matches(pattern: Path) -> Iterator[Path]:
    start = Path(pattern.anchor)
    found = sorted(start.glob(str(pattern.relative_to(start))))
    if not found:
        raise ImageError(pattern, "expected a pattern that fits some images, but nothing does")
    for path in found:
        if path.is_file() or _is_image_folder(path):
            yield path


def _lines_of_csv(path: Path) -> list[tuple[Path, str]]:
    """Image and case, which may be empty, of each line."""
    columns, lines = read_cells(path)
    if "image" not in columns:
        raise DataError(f"{path}: expected a column `image`, got {', '.join(columns)}")
    found = [(path.parent / cells["image"], cells.get("case", "")) for _, cells in lines if cells["image"]]
    if not found:
        raise DataError(f"{path}: expected a line for each image below the header, got none")
    return found


def _images_of_folder(path: Path) -> Iterator[Path]:
    from gigaxt.image.headers import HEAD, kind_of

    found = False
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or not (_is_image_folder(file) or file.is_file()):
            continue
        if file.is_file():
            with suppress(OSError), file.open("rb") as opened:  # of a file that may not be read the prediction tells
                if kind_of(opened.read(HEAD)) is None:
                    continue
        found = True
        yield file
    if not found:
        raise DataError(f"{path}: expected a folder with images, got none that is an image")


def _is_image_folder(path: Path) -> bool:
    from gigaxt.image.xview3 import is_scene

    markers = (".zattrs", ".zgroup", "zarr.json")
    return path.is_dir() and (is_scene(path) or any((path / marker).is_file() for marker in markers))
