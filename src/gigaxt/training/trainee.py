"""What is trained, and what of it stays on disk: enough to continue a stopped run to the same numbers."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]  # timm does not mark what it exports
from torch import nn

from gigaxt.config import from_dict, to_dict
from gigaxt.errors import CheckpointError, DataError
from gigaxt.nn.xt import GigaXT
from gigaxt.streaming.rows import Streaming
from gigaxt.tasks import Task
from gigaxt.training.checkpoint import (
    check_space,
    checkpoints,
    load_checkpoint,
    random_states,
    replaced_folder,
    restore_random_states,
    save_checkpoint,
)
from gigaxt.training.compiling import compile_encoder
from gigaxt.training.config import RunConfig
from gigaxt.training.initial import first_model
from gigaxt.training.optim import make_optimizer
from gigaxt.training.run_folder import RunFolder
from gigaxt.training.state import State


class Trainee:
    """A model with its optimiser and moving average, and where its run is.

    Args:
        config: of the run.
        folder: of the run.
        task: names the manifest in messages.
        device: where the model goes.

    Raises:
        CheckpointError: the disk has no room for a checkpoint. Others: see `first_model`.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, task: Task, device: torch.device) -> None:
        self.config, self.folder, self.task, self.device = config, folder, task, device
        self.settings = settings = config.train
        self.model: nn.Module
        self.model, self.fresh = first_model(config, continued=bool(checkpoints(folder.checkpoints)))
        self.model.to(device)
        if settings.compile:
            compile_encoder(self.model, device)
        self.optimizer = make_optimizer(self.model, settings)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # use_warmup: a plain average would hold the first, random weights for 1 / (1 - decay) steps.
        self.ema = ModelEmaV3(self.model, decay=settings.ema, use_warmup=True) if settings.ema is not None else None
        check_space(folder.checkpoints, self.parameters, copies=1 if self.ema is None else 2)
        self.state = State()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average where there is one."""
        return self.model if self.ema is None else cast(nn.Module, self.ema.module)

    def set_streaming(self, streaming: Streaming) -> None:
        """Chunks and budgets from now on, of the moving average, too."""
        for model in [self.model] if self.ema is None else [self.model, self.ema.module]:
            cast(Any, model).streaming = streaming  # an nn.Module's attributes are tensors and modules to mypy

    def save_model(self) -> None:
        """Write the folder `model/`."""
        with replaced_folder(self.folder.model) as part:
            cast(GigaXT, self.evaluated_model).save(part)

    def save(self) -> None:
        """Write a checkpoint of the step."""
        state = {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(),
            "asked": to_dict(self.settings.streaming),
            "streaming": to_dict(self.model.streaming),
            "state": to_dict(self.state),
            "rows": self.folder.rows_digest,
        }
        save_checkpoint(self.folder.checkpoints, self.state.step, state)

    def restore(self) -> None:
        """Continue where the run in this folder stopped.

        Raises:
            CheckpointError: there are checkpoints, and none can be read. DataError: the manifest's rows changed.
        """
        # Where the weights come from:
        # 1. the newest checkpoint in the run folder;
        # 2. the one before, if that cannot be read;
        # 3. without any: the model at `train.init`, if there is one;
        # 4. else pretrained weights of the region encoder, if the config names them, and the seed.
        found = checkpoints(self.folder.checkpoints)
        failed: CheckpointError | None = None
        for path in reversed(found):
            try:
                _, saved = load_checkpoint(path)
                break
            except CheckpointError as error:
                failed = failed or error
        else:
            if failed is not None:
                raise failed
            return
        if saved["rows"] != self.folder.rows_digest:
            raise DataError(
                f"{self.task.manifest.path}: the rows changed since the run in {self.folder.path} began; "
                "restore them, or start another run with another --out"
            )
        self.model.load_state_dict(saved["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        restore_random_states(saved["random"])
        self.state = from_dict(State, saved["state"])
        if saved["asked"] == to_dict(self.settings.streaming):  # smaller chunks, once found necessary, stay
            self.set_streaming(Streaming(**saved["streaming"]))
