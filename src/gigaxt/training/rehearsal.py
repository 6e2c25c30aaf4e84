"""A run's heaviest steps, rehearsed in a process of their own: what `gigaxt plan` measures.

Run as `python -m gigaxt.training.rehearsal FOLDER PARENT`, the number of the process that waits for it: reads
`FOLDER/job.json`, writes `FOLDER/found.json`. It trains the model of the config on the samples of most regions, by the
loop of a real run in a run folder of its own, evaluates, and saves: so time, memory and space are those of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console

from gigaxt.allocator import give_back_freed_memory, keep_freed_memory
from gigaxt.amounts import GIB
from gigaxt.config import from_dict, to_dict
from gigaxt.errors import GigaxtError
from gigaxt.image.file_cache import files_cached
from gigaxt.image.open import open_image
from gigaxt.machine import host_memory_gib, peak_resident_gib
from gigaxt.nn.xt import GigaXT
from gigaxt.scenes.batch import SceneBatch
from gigaxt.streaming.replay import counted_saves
from gigaxt.streaming.rows import Reader, Streaming
from gigaxt.training.checkpoint import KEEP
from gigaxt.training.config import DataConfig, RunConfig, run_config
from gigaxt.training.data import Sample, Skipped, derive_seed
from gigaxt.training.device import autocast, has_bfloat16, in_bfloat16, pick_device
from gigaxt.training.heaviest import given_samples, heaviest_evaluation, heaviest_step, mean_regions, training_sizes
from gigaxt.training.log import RunLog
from gigaxt.training.loop import Run
from gigaxt.training.reading_speed import Reading, time_reading
from gigaxt.training.report import write_report
from gigaxt.training.run_folder import prepare_run
from gigaxt.training.signals import Signals
from gigaxt.training.steps import Steps

WATCH_S = 1.0
"""Time between looks at the process that made the job."""
STEPS = 2
"""Steps that are always made; the first is slower than the rest."""
MOST_STEPS, ENOUGH_S = 8, 10.0
"""Short steps are repeated, up to so many or so long, because one alone tells little."""
PROBED = 0.5
"""Share of the free memory that a chunk may take when chunks are timed."""
BETTER = 0.97
"""A chunk of twice the regions must take less than this share of the time a region."""


@dataclass(kw_only=True)
class Job:
    """What to rehearse."""

    config: dict[str, Any]
    """Plain data of a RunConfig."""
    images: list[str]
    """Images in place of the manifest's; empty: the manifest's."""
    probe: bool = True
    """Also time chunks of other sizes, and the disk."""


@dataclass(kw_only=True)
class Found:
    """What a rehearsal measured. Memory in GiB, times in s."""

    images: list[str]
    """Of the heaviest step."""
    size_px: tuple[int, int]
    """Height and width of its first image, as the model sees it."""
    regions: int
    """Of all its images."""
    mean_regions: float
    """Of a training sample, by its size."""
    samples: int
    """In an epoch."""
    steps: int
    """In an epoch."""
    step_s: float
    """Of the heaviest step."""
    evaluate_s: float
    """Of the evaluation of `evaluated`."""
    host_gib: float
    """Most that the process held, everything included."""
    device_gib: float
    """Most that PyTorch reserved on a CUDA device, which needs some 0.5 GiB more for itself; 0 on the CPU."""
    graph_gib: float
    """What one region's activations take if they are kept."""
    maps_gib: float
    """What one region's feature maps take; 0 where no decoder needs them."""
    passes: float
    """Forward passes over the region encoder in a step; with `train.token_cache` in a step whose tokens are there."""
    streaming: dict[str, Any]
    """As the run ended with: smaller chunks where memory ran out."""
    disk_gib: float
    """Checkpoints and model that a run leaves, and one checkpoint that is being written."""
    device: str
    """Where it ran."""
    chunk_s: dict[str, float]
    """Time a region of one pass forward and backward, by regions a chunk."""
    cold_read_s: float
    """Of one region, by all reading threads, from the disk as far as the system can be made to go there."""
    read_s: float
    """The same from the system's cache, or that of `data.cache`."""
    bf16_s: float = 0.0
    """Of `chunk_s` the fastest with bfloat16 autocast, where the run has none and the device could; 0: not timed."""
    hosted_gib: float = 0.0
    """What one region's activations take if a device keeps them on the host."""
    first_step_s: float = 0.0
    """With `train.token_cache`: of the heaviest step where its tokens are not there yet; 0: without."""
    token_cache_gib: float = 0.0
    """Of all training samples as they are."""
    decode_s: float = 0.0
    """CPU time of `read_s`: what of it is no waiting."""
    cold_bytes: float = 0.0
    """Bytes that were read of files for one region; 0: the system does not tell."""
    storage: str = ""
    """How the first image lies in its file, such as "tiles of 512 x 512 px, jpeg"; empty where that is not known."""
    still_cached: list[str] = field(default_factory=list)
    """Images that could not be read cold: the system kept what it held of them."""
    evaluated: list[str] = field(default_factory=list)
    """Images of the heaviest evaluation, which is of whole scenes."""


class Heaviest(Steps):
    """Steps that all see the same samples."""

    heaviest: Sequence[Sample] = ()

    def open(self, step: int, skipped: Skipped) -> list[Sample]:
        """See `Steps.open`."""
        return list(self.heaviest)


class Rehearsal(Run):
    """A run whose every step sees the heaviest samples."""

    steps_type = Heaviest
    steps: Heaviest

    @property
    def heaviest(self) -> Sequence[Sample]:
        """These samples."""
        return self.steps.heaviest


def rehearse(job: Job, folder: Path) -> Found:
    """Do it, in `folder`; raises as `train`."""
    data = from_dict(DataConfig, job.config["data"], "data")
    with files_cached(data.cache, data.cache_gib):
        return _rehearse(job, folder)


def _rehearse(job: Job, folder: Path) -> Found:
    config = run_config(job.config)
    if config.train.token_cache is not None:  # one that is empty, and is not kept
        config.train.token_cache = str(folder / "tokens")
    folder_of_run, config, task = prepare_run(config, folder / "run")
    device = pick_device(config.train.device)
    with Signals() as signals:
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        run = Rehearsal(config, folder_of_run, task, device, signals)
        sizes = training_sizes(run)
        given = given_samples(run, job.images, next(iter(sizes)))
        run.steps.heaviest, evaluated = heaviest_step(run, sizes, given), heaviest_evaluation(run, given)
        batch = _model(run).batch([sample.given for sample in run.heaviest])
        regions = len(batch.places)
        files = [Path(name) for name in job.images] or [row.image for sample in run.heaviest for row in sample.case]
        reading = time_reading(batch, config.train.streaming, files) if job.probe else Reading()
        graph, hosted, maps = _kept_bytes(run, batch)
        step_s, first_s, passes = _steps(run, regions)
        cached = sum(path.stat().st_size for path in (folder / "tokens").glob("*"))
        give_back_freed_memory()  # here and there, as the loop does
        evaluate_s = _evaluate(run, evaluated)
        run.save()
        run.save_model()
        give_back_freed_memory()
        write_report(folder_of_run, config, task, run.state, None)  # its drawing counts, too
        host_gib = peak_resident_gib()  # before chunks are tried that the run will not have
        reserved = torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0
        chunk_s = _time_chunks(run, batch, graph) if job.probe else {}
        return Found(
            images=[image.name for sample in run.heaviest for image in sample.images],
            size_px=(batch.scenes[0].grid.height, batch.scenes[0].grid.width),
            regions=regions,
            # Windows of scenes are alike.
            mean_regions=mean_regions(run, sizes) if run.train_samples.windows is None else regions / len(run.heaviest),
            first_step_s=first_s if cached else 0.0,
            token_cache_gib=cached / regions * sum(sizes.values()) / GIB,
            samples=run.steps.samples_per_epoch,
            steps=run.steps.per_epoch,
            step_s=step_s,
            evaluate_s=evaluate_s,
            host_gib=host_gib,
            device_gib=reserved,
            graph_gib=graph / GIB,
            hosted_gib=hosted / GIB,
            maps_gib=maps / GIB,
            passes=passes,
            streaming=to_dict(_model(run).streaming),
            disk_gib=_disk_gib(run),
            device=str(device),
            chunk_s=chunk_s,
            bf16_s=_time_in_bfloat16(run, batch, chunk_s),
            cold_read_s=reading.cold_s,
            read_s=reading.again_s,
            decode_s=reading.decode_s,
            cold_bytes=reading.cold_bytes,
            storage=str(getattr(open_image(files[0]), "storage", "")),
            still_cached=list(reading.still_cached),
            evaluated=[image.name for sample in evaluated for image in sample.images],
        )


def job_of(config: RunConfig, images: Sequence[Path], streaming: Streaming, *, probe: bool) -> Job:
    """The job for a config with other streaming settings."""
    config = replace(config, train=replace(config.train, streaming=streaming))
    return Job(config=to_dict(config), images=[str(path) for path in images], probe=probe)


def _steps(run: Rehearsal, regions: int) -> tuple[float, float, float]:
    """Time of one step, of the first one, and forward passes over the region encoder in the last."""
    rows = 0
    # No graph calls what counts: then it goes with the first step. All steps do as many, but with a cache of tokens.
    first_only = _model(run).streaming.cuda_graphs and run.settings.token_cache is None

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal rows
        rows += len(output[0])

    log = RunLog(
        run.folder.path,
        run.task.metric_names,
        step=0,
        evaluated=0,
        total_steps=run.steps.total,
        steps_per_epoch=run.steps.per_epoch,
        console=Console(quiet=True),
    )
    with log:
        run.log = log
        hook = _model(run).encode.encoder.register_forward_hook(count)
        started = time.monotonic()
        while run.state.step < STEPS or (
            run.state.step < MOST_STEPS and time.monotonic() - started < ENOUGH_S * run.state.step / MOST_STEPS
        ):
            if not first_only or run.state.step == 0:
                rows = 0
            run.step()
            _wait(run.device)
            if first_only:
                hook.remove()
        hook.remove()
        run.ahead.drop()  # what follows is timed, too
        return log.seconds_per_step(), log.times[0], rows / regions


def _evaluate(run: Rehearsal, samples: Sequence[Sample]) -> float:
    """Time of answering these samples together, as the run does."""
    model, seconds = run.evaluated_model, 0.0
    model.eval()
    for _ in range(2 if run.settings.compile else 1):  # what is compiled for evaluation is compiled once a run
        started = time.monotonic()
        with torch.no_grad(), autocast(run.device, run.settings.amp):
            run.task.answer(model, [sample.given for sample in samples], [sample.target for sample in samples])
        _wait(run.device)
        seconds = time.monotonic() - started
    model.train()
    return seconds


def _kept_bytes(run: Run, batch: SceneBatch) -> tuple[int, int, int]:
    """What one region's graph holds, where it is and on the host of a device, and its feature maps."""
    model = _model(run)
    model.train()
    chunk = batch.chunks(1)[0]
    reader = Reader(batch.load, run.device, 0)
    (rows,) = reader.rows([chunk])
    with autocast(run.device, run.settings.amp), counted_saves(list(model.parameters())) as saves:
        ((_, (_, maps)),) = reader.run(rows, lambda part: model.encode(part.loaded))
    return saves.bytes, saves.hosted, sum(t.nbytes for t in maps)


def _time_chunks(run: Run, batch: SceneBatch, graph: int) -> dict[str, float]:
    """Time a region of one pass forward and backward, for chunks that grow until that is of no use any more.

    On a CPU not beyond what memory has room for: a device says when it has none left, a host ends the process.
    """
    found: dict[str, float] = {}
    size, best, most = 1, float("inf"), batch.full_size
    if run.device.type == "cpu" and graph:
        most = min(most, int(PROBED * host_memory_gib()[1] * GIB) // graph)
    while size <= most:
        seconds = _time_chunk(run, batch, size, run.settings.amp)
        if seconds is None:
            return found
        found[str(size)] = seconds
        if seconds > BETTER * best and size > 4:
            return found
        best, size = min(best, seconds), 2 * size
    return found


def _time_in_bfloat16(run: Run, batch: SceneBatch, chunk_s: dict[str, float]) -> float:
    """The fastest of the chunks with bfloat16 autocast, a region; 0 where the run has it, or the device has not."""
    if not chunk_s or in_bfloat16(run.device, run.settings.amp) or not has_bfloat16(run.device):
        return 0.0
    return _time_chunk(run, batch, int(min(chunk_s, key=lambda size: chunk_s[size])), "bf16") or 0.0


def _time_chunk(run: Run, batch: SceneBatch, size: int, amp: Literal["auto", "off", "bf16"]) -> float | None:
    """Time a region of one pass forward and backward over a chunk; None: memory does not suffice for it."""
    model, reader = _model(run), Reader(batch.load, run.device, 0)
    (rows,) = reader.rows(batch.chunks(size)[:1])

    def work(part: Any) -> None:
        with autocast(run.device, amp):
            tokens = model.encode(part.loaded)[0]
        if tokens.requires_grad:
            tokens.sum().backward()

    times = []
    for _ in range(3):
        started = time.monotonic()
        try:
            reader.run(rows, work)
        except torch.OutOfMemoryError:
            return None
        _wait(run.device)
        times.append((time.monotonic() - started) / size)
    return min(times) if reader.most_rows >= size else None


def _disk_gib(run: Run) -> float:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    return ((KEEP + 1) * size(run.folder.checkpoints) + 2 * size(run.folder.model)) / GIB


def _model(run: Run) -> GigaXT:
    return cast(GigaXT, run.model)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def out_of_memory(error: Exception) -> bool:
    """Whether it says so; PyTorch has a class for it on devices, and a RuntimeError of this text on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def end_with(parent: int, folder: Path) -> None:
    """Wait until another process has this one, whose plan was killed: nobody watches its memory any more. Then end."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(folder: Path) -> None:
    """Rehearse the job in `folder`; errors are told in `found.json`, too."""
    keep_freed_memory()  # as the command line does
    job = from_dict(Job, json.loads((folder / "job.json").read_text(encoding="utf-8")))
    try:
        found: dict[str, Any] = asdict(rehearse(job, folder))
    except GigaxtError as error:
        found = {"error": [str(part) for part in error.args], "kind": type(error).__name__}
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        found = {"error": []}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    job_folder, its_parent = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=end_with, args=(its_parent, job_folder), daemon=True).start()
    main(job_folder)
