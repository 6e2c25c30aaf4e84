"""A ready `run.yaml` from what `gigaxt check` found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import numpy as np

from gigaxt.datasets.labels import LABEL
from gigaxt.datasets.manifest import Manifest
from gigaxt.datasets.mask_facts import UNLABELLED, has_vectors
from gigaxt.datasets.report import CheckReport
from gigaxt.datasets.statistics import BandStatistics
from gigaxt.errors import DataError
from gigaxt.nn.heads.points import PointsConfig

TIME_BINS = 4
"""Of a survival head."""

_TEMPLATE = """\
# Written by `gigaxt check {csv}`. Train with: gigaxt train --config {name}
data:
  csv: {csv_path}
  # {counts}

model:
  region_encoder:
    name: convnextv2_atto  # small and quick; any timm backbone, such as convnext_tiny or swinv2_tiny_window16_256
    region: {region}  # px on a side that the backbone sees at once; a multiple of 32
    in_channels: {bands}  # bands of the images
    pretrained: false  # true: timm's weights (downloaded once); or the path of a .safetensors file
  context:
    kind: mamba2  # none: every region on its own; full: attention of all to all, for small scenes
    dim: 192  # numbers a token
    depth: 2  # layers
  head:
{head}
  input:
{input}

train:
  epochs: 50  # passes over the training images
  batch: {batch}  # images a step
  lr: 0.001  # highest learning rate; 0.0003 for larger or pretrained backbones
  seed: 0  # another seed, another run
"""


def write_config(report: CheckReport, csv: str | Path, path: str | Path, *, force: bool = False) -> Path:
    """Write a commented YAML that trains on a checked manifest as it is.

    Args:
        report: of `check_manifest`.
        csv: the manifest; written with its full path, so that the YAML can lie anywhere.
        path: of the YAML.
        force: overwrite an existing file.

    Returns:
        The path.

    Raises:
        DataError: the file exists, or no image could be read.
    """
    path = Path(path)
    if path.exists() and not force:
        raise DataError(f"{path} exists; choose another name, or use --force to overwrite it")
    if report.statistics is None or not report.statistics.count.any():
        raise DataError(f"{csv}: no image could be read, so there is nothing to fill {path.name} with; see the report")
    manifest = report.manifest
    counts = ", ".join(f"{len(manifest.cases(name))} {name}" for name in ("train", "val", "test"))
    text = _TEMPLATE.format(
        csv=_one_line(csv),
        name=_one_line(path.name),
        csv_path=_text(str(Path(csv).resolve())),
        counts=counts,
        region=_region(report),
        bands=report.channels,
        head=_head(report),
        input=_input(report, report.statistics),
        # A few images a step at most, and a few steps an epoch at least.
        batch=max(1, min(4, len(manifest.cases("train")) // 4)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _head(report: CheckReport) -> str:
    manifest = report.manifest
    if manifest.task == "segmentation":
        return _segment_head(report)
    if report.box_classes is not None:
        known, ids = report.box_classes
        lines = [
            "kind: detect  # objects with boxes; mask_rcnn: with masks, where feature maps of whole images fit",
            f"classes: {len(known)}",
        ]
        lines.append(f"class_names: {_list(map(_text, known))}")
        if ids is not None:
            lines.append(f"category_ids: {_list(map(str, ids))}  # of the classes, in COCO JSON")
        return _indented(*lines)
    if report.point_head is not None:
        return _point_head(report.point_head)
    if manifest.target == "survival":
        return _indented(
            "kind: classify  # one answer for the whole image or case",
            f"classes: {_time_bins(manifest)}  # bins of time with about as many events each",
            "target: survival  # a hazard for each bin; see the columns time and event",
        )
    lines = ["kind: classify  # one answer for the whole image or case", f"classes: {manifest.outputs}"]
    if manifest.target != "single":
        lines.append(f"target: {manifest.target}  # single: one class an image; multi: several; regression: numbers")
    if manifest.answer_columns != LABEL:
        lines.append(f"label_columns: {_list(map(_text, manifest.answer_columns))}  # an empty cell is not known")
    if manifest.classes:
        lines.append(f"class_names: {_list(map(_text, manifest.classes))}  # in the order of the model's outputs")
    return _indented(*lines)


def _point_head(head: PointsConfig) -> str:
    lines = ["kind: points  # objects at places"]
    if head.classes > 1:
        lines += [f"classes: {head.classes}", f"class_names: {_list(map(_text, head.class_names or ()))}"]
    if head.scoring == "xview3":
        lines.append("scoring: xview3  # the challenge's score and submission")
    else:
        lines.append("tolerance_px: 10  # an object counts as found if a point is nearer")
    for name in ("flags", "numbers", "logarithmic"):
        if getattr(head, name):
            lines.append(f"{name}: {_list(map(_text, getattr(head, name)))}")
    return _indented(*lines)


def _segment_head(report: CheckReport) -> str:
    head, classes = report.head, report.mask_classes
    target = "single" if head is None else head.target
    given = list(() if head is None else head.class_names or ())
    if target == "single":
        given += [("background" if k == 0 else f"class {k}") for k in range(len(given), classes)]
    lines = ["kind: segment  # an answer for every pixel", f"classes: {classes}"]
    if target != "single":
        what = "a band of 0 and 1 for each label" if target == "multi" else "a band of numbers for each class"
        lines.append(f"target: {target}  # {what}")
    if given:
        lines.append(f"class_names: {_list(map(_text, given))}  # in the order of the numbers from 0 on")
    if head is not None and head.class_field is not None:
        lines.append(f"class_field: {_text(head.class_field)}  # the property of polygons that tells their class")
    if head is not None and has_vectors(report.manifest.rows):
        lines.append("unlabelled: background  # where no polygon is: class 0; or ignore: does not count")
    if target != "regression":
        lines.append(f"ignore: {UNLABELLED}  # the mask value of pixels that do not count")
    return _indented(*lines)


def _time_bins(manifest: Manifest) -> int:
    """At most `TIME_BINS`, and no more than there are events in training to fill."""
    events = {time for (time, event) in (case[0].answer.numbers for case in manifest.cases("train")) if event == 1}
    return max(2, min(TIME_BINS, len(events) // 2))


def _input(report: CheckReport, statistics: BandStatistics) -> str:
    of = ", of the foreground" if report.foreground else ""
    # A band without contrast has nothing to divide by.
    std = np.where(statistics.std > 0, statistics.std, 1.0)
    lines = [
        f"mean: {_list(map(_number, statistics.mean))}  # a band, in the files' units{of}",
        f"std: {_list(map(_number, std))}",
    ]
    if report.channels == 3 and report.rgb_helps:
        lines.append("rgb: true  # grey pictures, and those with alpha or a palette, are read as RGB")
    if report.bands:
        lines.append(f"band_names: {_list(map(_text, report.bands))}  # taken from each image by name, in this order")
    metres, micrometres = report.pixel_size("gsd_m"), report.pixel_size("mpp")
    if metres is not None:
        lines.append(f"gsd_m: {_number(metres)}  # metres a pixel; images of another size are resampled to it")
    elif micrometres is not None:
        lines.append(f"mpp: {_number(micrometres)}  # micrometres a pixel; images of another size are resampled to it")
    if report.foreground is not None:
        lines.append(f"foreground: {_text(report.foreground)}  # only these regions are encoded")
    return _indented(*lines)


def _region(report: CheckReport) -> int:
    """256 px, or less where images are so small that one region would be all of them."""
    side = median(min(fact.height, fact.width) for fact in report.images)
    return int(min(256, max(64, side / 2 // 32 * 32)))


def _indented(*lines: str) -> str:
    return "".join(f"    {line}\n" for line in lines).rstrip("\n")


def _list(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def _text(value: str) -> str:
    # JSON's strings are YAML's double-quoted ones; so `no`, `1.0` and `: ` stay text.
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    text = f"{float(value):.6g}"
    # YAML 1.1 takes 1e-05 for text, and 1.0e-05 for a number.
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
