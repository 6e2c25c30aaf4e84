"""The training loop: plain PyTorch, read top to bottom.

`train` prepares, `Run.fit` loops, `Run.step` is one update of the weights. What is trained, and what makes a stopped
run continue to the same numbers, is in `trainee.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from rich.console import Console
from torch import nn

from gigaxt.allocator import give_back_freed_memory
from gigaxt.errors import CheckpointError, DataError, GigaxtError, ImageError, TrainingError
from gigaxt.image.file_cache import file_cache, files_cached
from gigaxt.nn.xt import GigaXT, ModelConfig
from gigaxt.streaming.rows import Streaming, free_device_memory
from gigaxt.tasks import Evaluation, Task
from gigaxt.token_cache import TokenCache
from gigaxt.training.ahead import Ahead, Opened
from gigaxt.training.config import RunConfig
from gigaxt.training.data import Sample, Samples, Skipped, balanced_weights, derive_seed, with_names, without_failed
from gigaxt.training.device import autocast, chunk_advice, pick_device, precision_advice, smaller_streaming
from gigaxt.training.evaluate import Stopping, tallied
from gigaxt.training.initial import what_learns
from gigaxt.training.log import RunLog, decimals, duration
from gigaxt.training.optim import set_lr
from gigaxt.training.report import answers, write_report
from gigaxt.training.run_folder import RunFolder, prepare_run
from gigaxt.training.signals import Signals
from gigaxt.training.state import Best, RunResult
from gigaxt.training.steps import Steps
from gigaxt.training.trainee import Trainee
from gigaxt.training.windows import windows_of

T = TypeVar("T")
FEW_STEPS = 10
"""With fewer steps an epoch of whole scenes, windows are proposed."""
OnStep = Callable[[int, int], None]


def train(
    config: RunConfig, out: str | Path, *, console: Console | None = None, on_step: OnStep | None = None
) -> RunResult:
    """Train a model, or continue the run in `out`.

    Args:
        config: what to train, on what, how.
        out: the run folder; made where it does not exist.
        console: where lines and the progress bar go; None: standard error.
        on_step: called after each step with the steps done and the steps of the whole run.

    Returns:
        How it ended. `model/` in the run folder is the best model (the last, without a `val` split).

    Raises:
        ConfigError: the folder holds another run, or settings do not fit together.
        DataError: the manifest or a target does not fit the images or the model.
        ImageError: an image cannot be read and `on_bad_image` is `stop`.
        TrainingError: the loss or a gradient is not finite; no weight was changed.
        CheckpointError: something could not be written; the previous checkpoint is intact.
    """
    with files_cached(config.data.cache, config.data.cache_gib):
        return _train(config, Path(out), console, on_step)


def _train(config: RunConfig, out: Path, console: Console | None, on_step: OnStep | None) -> RunResult:
    folder, config, task = prepare_run(config, out)
    device = pick_device(config.train.device)
    # The run's own random stream: the caller's goes on afterwards as if nothing had happened.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), Signals() as signals:
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        run = Run(config, folder, task, device, signals)
        run.restore()
        run.fit(console, on_step)
    give_back_freed_memory()
    with answers(folder, task, device) as answer:
        # Who is asked to stop may be killed soon: then without new answers.
        write_report(folder, config, task, run.state, answer if signals.caught is None else None)
    state, best = run.state, run.state.best.evaluation if run.state.best else None
    return RunResult(out=folder.path, step=state.step, total_steps=run.steps.total, signal=signals.caught, best=best)


class Run(Trainee):
    """A model in training, with everything that a step needs; `signals` say when to stop, for the rest see `Trainee`.

    Raises:
        DataError: the split `train` is empty. Others: see `Trainee`.
    """

    steps_type: type[Steps] = Steps
    steps: Steps

    def __init__(
        self, config: RunConfig, folder: RunFolder, task: Task, device: torch.device, signals: Signals
    ) -> None:
        settings, manifest = config.train, task.manifest
        self.train_samples, self.val_samples = (
            Samples(
                manifest.cases(name),
                task,
                verify_sha256=config.data.verify_sha256,
                rgb=config.model.input.rgb,
                windows=windows_of(config) if name == "train" else None,
            )
            for name in ("train", "val")
        )
        if not len(self.train_samples):
            raise DataError(f"{manifest.path}: expected images in the split `train`, got none")
        weights = balanced_weights(task) if settings.sampling == "balanced" else None
        self.steps = self.steps_type(self.train_samples, settings, weights)
        super().__init__(config, folder, task, device)
        self.signals = signals
        self.ahead = Ahead(self.steps, cast(GigaXT, self.model))
        self._told_skipped = 0

    # The loop

    def fit(self, console: Console | None, on_step: OnStep | None = None) -> None:
        """Step, evaluate and save until all epochs are done or a signal asks to stop; all of it is logged."""
        state = self.state
        self._told_skipped = len(state.skipped)
        log = RunLog(
            self.folder.path,
            self.task.metric_names,
            step=state.step,
            evaluated=state.evaluated,
            total_steps=self.steps.total,
            steps_per_epoch=self.steps.per_epoch,
            compiled=self.settings.compile,
            console=console,
        )
        with log:
            self.log = log
            for line in [self._headline(), *self._advice()]:
                log.line(line)
            self._loop(on_step)
            if (cache := file_cache()) is not None:
                log.line(f"read: {cache.summary}")
            log.line(self._farewell())

    def _loop(self, on_step: OnStep | None) -> None:
        """The steps. A checkpoint follows every epoch, every `checkpoint_minutes`, and the last step, failed or not."""
        state = self.state
        saved, saved_at = (state.step, state.evaluated), time.monotonic()
        try:
            self.evaluate_if_due()  # a run may have been stopped between a step and its evaluation
            while state.step < self.steps.total and self.signals.caught is None:
                self.step()
                if on_step is not None:
                    on_step(state.step, self.steps.total)
                self.evaluate_if_due()
                minutes = (time.monotonic() - saved_at) / 60
                if minutes >= self.settings.checkpoint_minutes or state.step % self.steps.per_epoch == 0:
                    self.save()
                    saved, saved_at = (state.step, state.evaluated), time.monotonic()
            if state.step >= self.steps.total and not len(self.val_samples):
                self.finish_without_val()
        except CheckpointError:
            raise  # nothing can be written, the previous checkpoint stays
        except (GigaxtError, OSError):  # OSError: the log cannot be written, for example
            if saved != (state.step, state.evaluated):  # the steps before the failed one are good
                self.save()
            raise
        finally:
            self.ahead.drop()
        if saved != (state.step, state.evaluated):
            self.save()

    def step(self) -> None:
        """One update of the weights; none where a number is not finite."""
        state, settings = self.state, self.settings
        started = time.monotonic()
        lr = set_lr(self.optimizer, settings, state.step, self.steps.per_epoch)
        loss, samples = self.retried(self.gradients)
        self._keep_smaller_chunks()
        self._tell_news()
        norm = math.nan
        if samples:
            norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip_grad or math.inf))  # sync
            if not math.isfinite(norm):
                self.optimizer.zero_grad()
                raise self._not_finite(f"the norm of the gradient is {norm}", samples)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model, step=state.step)
        epoch = state.step // self.steps.per_epoch
        state.step += 1
        seconds = time.monotonic() - started
        state.seconds += seconds
        images = sum(len(sample.images) for sample in samples)
        self.log.train(state.step, epoch + 1, loss, lr, norm, images, seconds)

    def gradients(self) -> tuple[float, list[Sample]]:
        """Leave the gradients of this step in the parameters.

        A pure function of the weights, the seed and the step: whatever fails in between is simply done again.

        Returns:
            The mean loss over the samples of this step, and these; NaN and none where all were skipped.

        Raises:
            TrainingError: the loss is not finite, or no training image is left. Others: see `train`.
        """
        opened = self.ahead.step(self.state.step, self.skipped)
        while opened.samples:
            self.optimizer.zero_grad()
            try:
                return self._accumulate(opened), opened.samples
            except ImageError as error:
                self.ahead.drop()
                opened = Opened(without_failed(opened.samples, error, self.skipped), None, self.skipped)
        if all(any(str(row.image) in self.state.skipped for row in case) for case in self.train_samples.cases):
            raise TrainingError(f"step {self.state.step + 1}: no image is left, all were skipped; try `gigaxt check`")
        return math.nan, []

    def _accumulate(self, opened: Opened) -> float:
        total = 0.0
        self.model.train()
        for i, (group, given) in enumerate(self.ahead.groups(self.state.step, opened, self.skipped)):
            seed = derive_seed(self.settings.seed, "model", self.state.step, i)
            with autocast(self.device, self.settings.amp):
                try:
                    loss = self.model(given, [s.target for s in group], seed=seed)
                except DataError as error:
                    raise with_names(error, group) from error
            value = float(loss.detach())  # sync: a loss that is not finite must not reach the weights
            if not math.isfinite(value):
                raise self._not_finite(f"the loss is {value}", group)
            share = len(group) / len(opened.samples)
            (loss * share).backward()
            total += value * share
        return total

    def retried(self, attempt: Callable[[], T]) -> T:
        """`attempt()`, done again with smaller chunks as often as CUDA runs out of memory."""
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # Outside of `except`: the exception's frames hold the tensors that have to go.
            self.optimizer.zero_grad()
            self._shrink(reason)
            free_device_memory()

    def _shrink(self, reason: str) -> None:
        found = smaller_streaming(cast(Streaming, self.model.streaming))
        if found is None:
            raise TrainingError(
                f"step {self.state.step + 1}: out of memory with one region a chunk and nothing kept ({reason}); "
                "use a smaller region encoder or context, `train.amp bf16`, or a larger device"
            )
        streaming, what = found
        self.set_streaming(streaming)
        self.log.line(f"step {self.state.step + 1}: out of memory, going on with {what} ({reason})")

    def _keep_smaller_chunks(self) -> None:
        """If a stream halved its chunks because memory ran out, make that the setting from now on, and log it."""
        streaming = cast(Streaming, self.model.streaming)
        most = streaming.most_regions
        if most is not None and most < streaming.chunk_regions:
            self.set_streaming(replace(streaming, chunk_regions=most))
            self.log.line(f"step {self.state.step + 1}: out of memory, going on with {most} regions a chunk")

    # Evaluation

    def evaluate_if_due(self) -> None:
        """Evaluate at the end of every `eval_every`-th epoch and of the last, once; keep the model if it is best."""
        state = self.state
        epoch, rest = divmod(state.step, self.steps.per_epoch)
        due = rest == 0 and state.step > state.evaluated and len(self.val_samples)
        if not due or (epoch % self.settings.eval_every and epoch != self.settings.epochs):
            return
        try:
            with autocast(self.device, self.settings.amp):
                evaluation = self.retried(partial(self._evaluate, self.val_samples))
        except Stopping:
            return  # done again by the run that continues
        self._tell_news()
        state.evaluated, state.last = state.step, evaluation
        self.log.evaluation(state.step, epoch, evaluation.loss, evaluation.metrics, evaluation.notes)
        name = self.task.best
        old = state.best.evaluation.metrics[name] if state.best else math.nan
        # A score that is never defined cannot choose: then the newest model is kept, as without a val split.
        if math.isnan(old) or self.task.better(evaluation.metrics[name], old):
            state.best = Best(step=state.step, evaluation=evaluation)
            self.task.settle(cast(ModelConfig, self.evaluated_model.config).head, evaluation)
            self.save_model()

    def finish_without_val(self) -> None:
        """Keep the last model; what its head leaves open, such as thresholds, is chosen on the training images."""
        if self.task.leaves_open:
            try:
                with autocast(self.device, self.settings.amp):
                    evaluation = self.retried(partial(self._evaluate, self.train_samples))
            except Stopping:
                return  # done again by the run that continues
            self._tell_news()
            self.task.settle(cast(ModelConfig, self.evaluated_model.config).head, evaluation)
            self.log.line("no val split: thresholds are those that are best on the training images, and so optimistic")
        self.save_model()

    def _evaluate(self, samples: Samples) -> Evaluation:
        def before_image(done: int) -> None:
            if self.signals.caught is not None:
                raise Stopping
            self.log.evaluating(done, len(samples))

        give_back_freed_memory()
        tally = tallied(
            self.evaluated_model,
            samples,
            self.task,
            batch=self.settings.batch,
            skipped=self.skipped,
            on_image=before_image,
        )
        give_back_freed_memory()
        return tally.compute()

    # Small things

    @property
    def skipped(self) -> Skipped:
        """Where images that cannot be read are noted; None where they end the run."""
        return self.state.skipped if self.settings.on_bad_image == "skip" else None

    def _tell_news(self) -> None:
        for reason in list(self.state.skipped.values())[self._told_skipped :]:
            self.log.line(f"skipped: {reason}")
        self._told_skipped = len(self.state.skipped)
        for note in () if self.model.token_cache is None else cast(TokenCache, self.model.token_cache).new_notes():
            self.log.line(note)

    def _not_finite(self, what: str, samples: list[Sample]) -> TrainingError:
        names = ", ".join(image.name for sample in samples for image in sample.images)
        return TrainingError(
            f"step {self.state.step + 1}: {what}, and no weight was changed; images: {names}; "
            "look for values that are not finite in them, or lower train.lr"
        )

    def _headline(self) -> str:
        done = f"continuing after step {self.state.step}: " if self.state.step else ""
        if not done and self.settings.init is not None:
            fresh = f" but for {', '.join(self.fresh)}" if self.fresh else ""
            done = f"starting from the weights of {self.settings.init}{fresh}: "
        return (
            f"{done}{self.folder.path}: {self.train_samples.size} to train on, {self.val_samples.size} to evaluate on, "
            f"{what_learns(self.model, self.config)[0]}, "
            f"{self.steps.total} steps ({self.steps.per_epoch} an epoch) on {self.device}"
        )

    def _advice(self) -> list[str]:
        """What the user should know before the first step: settings that waste time or learn little."""
        few_steps = None
        if self.steps.per_epoch < FEW_STEPS and self.task.images_per_call == 1 and self.settings.window is None:
            few_steps = (
                f"{self.train_samples.size} make {self.steps.per_epoch} steps an epoch: for more of them train on "
                "windows (train.window, such as 1024, and train.windows_per_scene)"
            )
        advice = (
            few_steps,
            what_learns(self.model, self.config)[1],
            precision_advice(self.device, self.settings.amp),
            chunk_advice(self.device, self.settings.streaming),
        )
        return [line for line in advice if line]

    def _farewell(self) -> str:
        state = self.state
        if self.signals.caught is not None:
            where = f"stopped by {self.signals.caught.name} after step {state.step} of {self.steps.total}"
            return f"{where}; all is saved, the same command continues"
        best, name = state.best, self.task.best
        score = f"; best {name} {decimals(best.evaluation.metrics[name])} (step {best.step})" if best else ""
        return f"{self.steps.total} steps done in {duration(state.seconds)}{score}; the model is {self.folder.model}"
