from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from tiny_run import tiny_config

from gigaxt.image.memory import ArrayImage
from gigaxt.nn.heads import SegmentConfig
from gigaxt.tasks import Evaluation, WorstCase, make_task, read_manifest
from gigaxt.training.report import table, write_report
from gigaxt.training.run_folder import RunFolder
from gigaxt.training.state import Best, State

CURVES = """step,epoch,split,loss,lr,grad_norm,s_per_step,images_per_s,memory_gib,accuracy
1,1,train,0.9,0.1,1.0,1,1,1,
2,1,train,0.7,0.1,1.0,1,1,1,
2,1,val,0.8,,,,,,0.5
"""


@pytest.fixture
def state(csv: Path) -> State:
    mask = csv.parent / "mask.tif"
    tifffile.imwrite(mask, np.eye(40, 32, dtype=np.uint8))
    evaluation = Evaluation(
        images=3,
        loss=0.8,
        metrics={"accuracy": 0.5, "balanced_accuracy": 0.25, "f1_macro": 0.75, "auroc": float("nan")},
        per_class={"a": {"recall": 0.5}, "b": {"recall": float("nan")}},
        confusion=[[2.0, 1.0], [0.0, 0.0]],
        worst=[
            WorstCase(image=str(csv.parent / "0.tif"), badness=0.9, caption="a <b>, answered b", mask=str(mask)),
            WorstCase(image=str(csv.parent / "gone.tif"), badness=0.8, caption=""),
        ],
    )
    return State(step=2, evaluated=2, best=Best(step=2, evaluation=evaluation), skipped={"x.tif": "x.tif: <truncated>"})


def report(csv: Path, out: Path, state: State) -> str:
    config = tiny_config(csv)
    out.mkdir(exist_ok=True)
    (out / "metrics.csv").write_text(CURVES)
    task = make_task(config.model.head, read_manifest(config.model.head, csv))
    answer = ArrayImage(np.ones((40, 32), np.uint8))
    config.model.head = SegmentConfig(classes=2)  # so that the worst case may have a mask
    return write_report(RunFolder(out), config, task, state, lambda _: answer).read_text()


def test_the_report_holds_all_and_needs_no_other_file(csv: Path, tmp_path: Path, state: State) -> None:
    page = report(csv, tmp_path / "run", state)
    for title in ("Result", "Curves", "Classes", "Confusion", "Worst images", "Images left out", "Next", "Settings"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") == 4  # loss, metrics, learning rate, confusion
    assert page.count('src="data:image/png;base64,') == 3  # image, target, answer
    assert "a &lt;b&gt;, answered b" in page
    assert "x.tif: &lt;truncated&gt;" in page
    assert "gone.tif" in page
    assert "gigaxt eval" in page
    assert "data.csv --out scores.csv" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".part"] == []


def test_a_run_without_evaluation_has_a_report(csv: Path, tmp_path: Path) -> None:
    page = report(csv, tmp_path / "run", State(step=2))
    assert "no <code>val</code> split" in page
    assert "<h2>Classes</h2>" not in page


def test_numbers_in_tables() -> None:
    text = table(["a"], [[0.12345], [float("nan")], [5], [123456.0], ["<"]])
    assert re.findall("<td>(.*?)</td>", text) == ["0.1235", "–", "5", "123456", "&lt;"]
