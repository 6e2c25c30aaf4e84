"""report.html of a run: one file that needs no other, with curves, scores, and the images that went worst."""

from __future__ import annotations

import base64
import html
import io
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image as Pillow

from gigaxt.config import to_dict
from gigaxt.draw import Picture, thumbnail, with_case
from gigaxt.errors import CheckpointError, GigaxtError, one_line
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.inference import predict
from gigaxt.pixel_answers import over_picture
from gigaxt.pretrained import load
from gigaxt.replaced_file import replaced_file
from gigaxt.targets.masks import open_mask
from gigaxt.tasks import Detection, Evaluation, Points, Segmentation, Task, Vessels, WorstCase
from gigaxt.tasks.base import COUNT_COLUMNS
from gigaxt.tasks.bootstrap import DRAWS
from gigaxt.tasks.metrics import CALIBRATION_BINS
from gigaxt.training.config import RunConfig
from gigaxt.training.data import derive_seed
from gigaxt.training.log import duration, environment, read_metrics
from gigaxt.training.run_folder import RunFolder
from gigaxt.training.state import State

THUMBNAIL_PX = 320
ANSWER_PIXELS = 1 << 26
"""Larger scenes are shown without the model's answer, which would take too long to make for a report."""
CURVE_POINTS = 500
CONFUSION_CLASSES = 30
"""Larger confusion matrices are left out of the report."""
CASE_SHOWN = 4
"""Images of a case that are shown."""
SKIPPED_SHOWN = 100

Answer = Callable[[str], Image | None]
"""Path of an image -> the model's mask of it; None where it is too large to be made for a report."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left } pre { background: #f6f6f6; padding: .8em; overflow: auto }
img { max-width: 100% } .cases { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; max-width: 660px }
figcaption { font-size: .85em; overflow-wrap: anywhere } .cases img { max-width: 320px }
"""


def write_report(folder: RunFolder, config: RunConfig, task: Task, state: State, answer: Answer | None = None) -> Path:
    """Write the report of a run as it stands.

    Args:
        folder: of the run.
        config: of the run, resolved.
        task: names the metrics and classes.
        state: what the run has come to.
        answer: makes the masks that are shown beside the targets; None: targets only.

    Raises:
        CheckpointError: the file could not be written.
    """
    rows = read_metrics(folder.metrics)
    evaluation = state.best.evaluation if state.best else None
    sections = [
        ("Result", _result(task, state)),
        ("Curves", _curves(rows, task.metric_names)),
        ("Classes", _classes(evaluation)),
        ("Confusion", _confusion(evaluation, task.class_names)),
        ("Worst images", _worst(evaluation, config, answer)),
        ("Best images", _cases(evaluation.best_cases if evaluation else [], config, None)),
        ("Images left out", _skipped(state.skipped)),
        ("Next", _commands(folder, config, task)),
        ("Settings", f"<pre>{_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))}</pre>"),
        ("Environment", table(["", ""], list(environment().items()))),
    ]
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections if content)
    title = _text(f"gigaxt: {folder.path.name}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1>\n{body}</body></html>\n"
    )
    try:
        with replaced_file(folder.report) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder.report}: cannot write: {one_line(error)}") from error
    return folder.report


@contextmanager
def answers(folder: RunFolder, task: Task, device: torch.device) -> Iterator[Answer | None]:
    """What makes the masks of a run's best model, while it is entered; None for tasks without masks."""
    if not isinstance(task, Segmentation) or not (folder.model / "config.json").exists():
        yield None
        return
    model = load(folder.model).to(device)
    with tempfile.TemporaryDirectory() as temporary:

        def answer(path: str) -> Image | None:
            image = open_image(path, rgb=model.config.input.rgb)
            if image.height * image.width > ANSWER_PIXELS:
                return None
            return open_image(predict(model, image, Path(temporary) / f"{derive_seed(path)}.tif"), cached=False)

        yield answer


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; floats with four digits."""
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(_number(cell))}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{lines}</table>"


def _result(task: Task, state: State) -> str:
    steps = f"<p>{state.step} steps in {duration(state.seconds)}."
    if state.best is None:
        return f"{steps} Nothing was evaluated: the manifest has no <code>val</code> split.</p>"
    best, last = state.best.evaluation, state.last or state.best.evaluation
    chosen = f" <code>model/</code> is the model after step {state.best.step}, the best by {task.best}.</p>"
    names = ["loss", *task.metric_names]
    values = [{"loss": found.loss, **found.metrics} for found in (best, last)]
    rows = [[n, values[0].get(n, math.nan), best.interval(n), values[1].get(n, math.nan)] for n in names]
    explained = [f"95%: of {DRAWS:,} draws of groups (without a group: cases or images)"] if best.intervals else []
    if "calibration_error" in task.metric_names:
        explained.append(f"calibration_error: expected calibration error over {CALIBRATION_BINS} equal bins")
    notes = "".join(f"<li>{_text(note)}</li>" for note in [*best.notes, *explained])
    return f"{steps}{chosen}{table([best.size, 'best', '95%', 'last'], rows)}<ul>{notes}</ul>"


def _classes(evaluation: Evaluation | None) -> str:
    if evaluation is None or not evaluation.per_class:
        return ""
    columns = list(next(iter(evaluation.per_class.values())))
    rows = [
        [name, *(int(x) if key in COUNT_COLUMNS and math.isfinite(x) else x for key, x in row.items())]
        for name, row in evaluation.per_class.items()
    ]
    return table(["class", *columns], rows)


def _confusion(evaluation: Evaluation | None, names: Sequence[str]) -> str:
    if evaluation is None or evaluation.confusion is None or len(names) > CONFUSION_CLASSES:
        return ""
    counts = np.asarray(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _figure(2.5 + 0.45 * len(names), 2 + 0.4 * len(names))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    if len(names) <= 12:
        for (row, col), share in np.ndenumerate(shares):
            axes.text(col, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black")
    return _svg(figure)


def _curves(rows: Sequence[Mapping[str, str]], metrics: Sequence[str]) -> str:
    train = [row for row in rows if row["split"] == "train"]
    val = [row for row in rows if row["split"] == "val"]
    panels = [("loss", train, ["loss"]), ("learning rate", train, ["lr"])]
    if val:
        panels[1:1] = [("metrics", val, list(metrics))]
    images = []
    for title, source, columns in panels:
        figure, axes = _figure(4.6, 3.2)
        for column in columns:
            steps, values = _series(source, column)
            axes.plot(
                steps, values, label=column if len(columns) > 1 else "train", marker="." if len(steps) < 2 else ""
            )
        if title == "loss" and val:
            axes.plot(*_series(val, "loss"), label="val", marker=".")
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
        images.append(_svg(figure))
    return "".join(images)


def _series(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column; of a long run the means of equal parts, as many as the curve has room for."""
    pairs = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    parts = np.array_split(np.asarray(pairs).reshape(-1, 2), max(1, min(len(pairs), CURVE_POINTS)))
    return [int(part[-1, 0]) for part in parts if len(part)], [float(part[:, 1].mean()) for part in parts if len(part)]


def _worst(evaluation: Evaluation | None, config: RunConfig, answer: Answer | None) -> str:
    if evaluation is None or not evaluation.worst:
        return ""
    note = (
        "" if evaluation.worst[0].mask is None else f"<p>{'Image, target, answer.' if answer else 'Image, target.'}</p>"
    )
    return note + _cases(evaluation.worst, config, answer)


def _cases(cases: Sequence[WorstCase], config: RunConfig, answer: Answer | None) -> str:
    figures = []
    for case in cases:
        try:
            pictures = _pictures(case, config.model.head, answer)
        except GigaxtError as error:
            figures.append(f"<figure><figcaption>{_text(str(error))}</figcaption></figure>")
            continue
        images = "".join(f'<img alt="{_text(name)}" title="{_text(name)}" src="{png(p)}">' for name, p in pictures)
        caption = f"{_text(case.image)}<br>{_text(case.caption)}"
        figures.append(f"<figure>{images}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="cases">{"".join(figures)}</div>' if figures else ""


def _pictures(case: WorstCase, head: Any, answer: Answer | None) -> list[tuple[str, Picture]]:
    image = open_image(case.image)
    picture = thumbnail(image, THUMBNAIL_PX)
    if case.boxes:
        return [("image", picture), ("boxes", with_case(picture, case.boxes, picture.shape[1] / image.width))]
    pictures = [("image", picture)]
    pictures += [(Path(path).name, thumbnail(open_image(path), THUMBNAIL_PX)) for path in case.others[: CASE_SHOWN - 1]]
    rasters = {} if case.mask is None else {"target": open_mask(case.mask, image, head)}
    if rasters and answer is not None and (given := answer(case.image)) is not None:
        rasters["answer"] = given
    return pictures + [(name, over_picture(picture, raster, head)) for name, raster in rasters.items()]


def _skipped(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    lines = [reason for _, reason in sorted(skipped.items())]
    more = f"<li>and {len(lines) - SKIPPED_SHOWN} more</li>" if len(lines) > SKIPPED_SHOWN else ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines[:SKIPPED_SHOWN])
    return f"<p>{len(lines)} images could not be read.</p><ul>{items}{more}</ul>"


def _commands(folder: RunFolder, config: RunConfig, task: Task) -> str:
    out, csv = shlex.quote(str(folder.path)), shlex.quote(config.data.csv)
    split = next((name for name in ("test", "val") if task.manifest.split(name)), "train")
    answers = f"{csv} --out scores.csv"
    if isinstance(task, Segmentation):
        answers = "scene.tif --out mask.tif"
    elif isinstance(task, Vessels):
        answers = f"{csv} --out submission.csv"
    elif isinstance(task, Detection | Points):
        answers = "scene.tif --out found.geojson"
    lines = [
        f"gigaxt train --config {out}/config.yaml --out {out}    # continue, if it was stopped",
        f"gigaxt eval {out} {csv} --split {split}",
        f"gigaxt predict {out} {answers}",
        f"tensorboard --logdir {out}",
    ]
    return f"<pre>{_text(chr(10).join(lines))}</pre>"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, which HTML does not have


def png(picture: Picture) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    Pillow.fromarray(picture).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4f}"


def _text(text: str) -> str:
    return html.escape(text)
