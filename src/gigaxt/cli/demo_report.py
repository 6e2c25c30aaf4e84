"""The pictures and the page that `gigaxt demo` leaves behind."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.row import Row
from gigaxt.draw import Colour, Picture, class_palette, mask_thumbnail, overlay_mask, save_png, thumbnail, with_legend
from gigaxt.errors import CheckpointError
from gigaxt.image import Image, open_image
from gigaxt.inference import class_names
from gigaxt.nn.xt import GigaXT
from gigaxt.pretrained import load
from gigaxt.replaced_file import replaced_file
from gigaxt.training.report import STYLE, table

SMALL_SCENES = 3
"""Test scenes that are drawn."""
PANEL_PX = 256
"""Least side of a small scene's panel; smaller ones are enlarged."""
LARGE_CAPTION = "A large scene"
LARGE_PX = 1024
"""Longer side of the large scene's pictures."""
OPACITY = 0.85


def draw_pictures(
    out: Path, runs: Mapping[str, str], large: Mapping[str, Path], progress: Callable[[int, int], None]
) -> dict[str, Path]:
    """Write PNGs of test scenes and of the large one: input, target, and both models' answers.

    Args:
        out: the demo's folder.
        runs: what the models are called -> their run folders' names.
        large: a large scene's files: `scene`, then masks by what they are called.
        progress: told how far it is.

    Returns:
        Captions -> pictures.
    """
    models = {name: load(out / folder / "model") for name, folder in runs.items()}
    names = class_names(next(iter(models.values())))
    colours = class_palette(len(names))
    rows = Manifest.read(out / "data/scenes.csv").split("val")[:SMALL_SCENES]
    count = len(rows) + len(large)
    pictures: dict[str, Path] = {}
    for number, row in enumerate(rows, start=1):
        panels = dict(_small_panels(row, models, colours))
        picture = with_legend(strip(panels), names[1:], colours[1:])
        pictures[f"Test scene {number}: {', '.join(panels)}"] = save_png(picture, out / f"pictures/scene_{number}.png")
        progress(number, count)
    image = thumbnail(open_image(large["scene"]), LARGE_PX)
    for done, (name, path) in enumerate(large.items(), start=len(rows) + 1):
        drawn = image
        if name != "scene":
            drawn = overlay_mask(image, mask_thumbnail(open_image(path), LARGE_PX), colours, opacity=OPACITY)
        target = out / f"pictures/large_{path.stem}.png"
        pictures[f"{LARGE_CAPTION}: {name}"] = save_png(with_legend(drawn, names[1:], colours[1:]), target)
        progress(done, count)
    return pictures


def strip(panels: Mapping[str, Picture]) -> Picture:
    """Pictures of one height side by side, each with its name above."""
    font, gap, head = ImageFont.load_default(size=14), 8, 22
    height = max(len(picture) for picture in panels.values())
    width = sum(picture.shape[1] + gap for picture in panels.values()) - gap
    canvas = Pillow.new("RGB", (width, height + head), (255, 255, 255))
    draw, x = ImageDraw.Draw(canvas), 0
    for name, picture in panels.items():
        draw.text((x, 2), name, fill=(0, 0, 0), font=font)
        canvas.paste(Pillow.fromarray(picture), (x, head))
        x += picture.shape[1] + gap
    return np.asarray(canvas)


def write_page(
    out: Path, scores: Sequence[Sequence[str]], pictures: Mapping[str, Path], runs: Mapping[str, str], next_lines: str
) -> Path:
    """Write `report.html`: scores, pictures, and links to the runs' own reports.

    Args:
        out: the demo's folder.
        scores: header and rows.
        pictures: captions -> files below `out`.
        runs: what the models are called -> their run folders' names.
        next_lines: commands that come next.

    Raises:
        CheckpointError: the page cannot be written.
    """
    links = "".join(
        f'<li><a href="{folder}/report.html">{_text(name)}</a>: curves, scores by class, worst scenes, settings</li>'
        for name, folder in runs.items()
    )
    small = "".join(_figure(out, caption, path) for caption, path in pictures.items() if LARGE_CAPTION not in caption)
    large = "".join(_figure(out, caption, path) for caption, path in pictures.items() if LARGE_CAPTION in caption)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>gigaxt demo</title><style>{STYLE}
figure {{ max-width: 100%; margin: 1em 0 }} .large {{ display: grid; grid-template-columns: 1fr 1fr; gap: 0 1em }}
</style></head><body>
<h1>gigaxt demo: what context is worth</h1>
<p>In a corner of each scene a large mark says what all the small glyphs far from it are. A model that sees one region
of 64 px at a time cannot know: it guesses. A model whose regions tell each other what they hold can.</p>
<h2>Result</h2>
{table(scores[0], scores[1:])}
<p>Counted on the pixels of glyphs: which kind, not where its edge is. The runs' own reports count every pixel.</p>
<h2>Pictures</h2>
{small}<div class="large">
{large}</div>
<h2>The two runs</h2>
<ul>{links}</ul>
<h2>Next</h2>
<pre>{_text(next_lines)}</pre>
</body></html>
"""
    path = out / "report.html"
    try:
        with replaced_file(path) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror or error}") from error
    return path


def _small_panels(row: Row, models: Mapping[str, GigaXT], colours: Sequence[Colour]) -> Iterator[tuple[str, Picture]]:
    assert row.target_path is not None
    image, target = open_image(row.image), open_image(row.target_path)
    picture = thumbnail(image, max(image.height, image.width))
    yield "input", _enlarged(picture)
    yield "target", _enlarged(overlay_mask(picture, mask_thumbnail(target, len(picture)), colours, opacity=OPACITY))
    for name, model in models.items():
        yield name, _enlarged(overlay_mask(picture, _answer(model, image), colours, opacity=OPACITY))


def _figure(out: Path, caption: str, path: Path) -> str:
    source, text = _text(path.relative_to(out).as_posix()), _text(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'


def _answer(model: GigaXT, image: Image) -> NDArray[np.int64]:
    """The classes (h, w) of a scene that fits into memory."""
    with torch.no_grad():
        (logits,) = model([image])
    answer: NDArray[np.int64] = logits.argmax(dim=0).numpy()
    return answer


def _enlarged(picture: Picture) -> Picture:
    factor = -(-PANEL_PX // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _text(text: str) -> str:
    return html.escape(text)
