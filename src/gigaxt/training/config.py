"""What a run is made from: `RunConfig`, its YAML file, and the settings that follow from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gigaxt.config import from_dict, nearest
from gigaxt.errors import ConfigError
from gigaxt.nn.xt import ModelConfig
from gigaxt.rows import Streaming


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and how they are divided."""

    csv: str
    """The manifest: `image,label[,split][,group]` or `image,mask[,...]`, paths relative to the CSV. In a YAML file the
    CSV's own path is relative to that file."""
    split_seed: int = 0
    """Divides the groups into train, val and test where the CSV has no `split` column."""
    verify_sha256: bool = False
    """Compare each file with the CSV's `sha256` column when it is first opened."""


@dataclass(kw_only=True)
class AugmentConfig:
    """Drawn once per scene and epoch, from the run's seed."""

    dihedral: bool = False
    """Flips and quarter turns, on coordinates: for images without an up, such as maps and slides."""
    colour: float = 0.0
    """Strength of random gain and offset per band, 0 to 1."""


@dataclass(kw_only=True)
class TrainConfig:
    """How weights are learnt. One step is one update of the weights."""

    epochs: int = 50
    """Passes over the training images."""
    batch: int = 4
    """Images in one forward pass."""
    accumulate: int = 1
    """Forward passes in one step: a step sees batch x accumulate images."""
    optimizer: str = "adamw"
    """Any of timm's optimisers."""
    lr: float = 3e-4
    """Learning rate at the end of the warm-up."""
    encoder_lr: float | None = None
    """The region encoder's own learning rate; None: the same."""
    weight_decay: float = 0.05
    """Not applied to biases, norms and other 1-d parameters."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_epochs: float = 1.0
    """Length of the linear warm-up."""
    lr_floor: float = 0.01
    """Where the cosine ends, as a share of the learning rate."""
    clip_grad: float | None = 1.0
    """Largest norm of the whole gradient; None: not clipped."""
    ema: float | None = None
    """Decay of the moving average of the weights, e.g. 0.999; the average is then what is evaluated and kept."""
    class_weights: Literal["balanced"] | None = None
    """`balanced`: the loss weighs each class by the inverse of how often it occurs in the training data."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """`balanced`: every class is drawn equally often (with repetition) in an epoch."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the training images."""
    seed: int = 0
    """Of everything random: first weights, order, augmentation, stochastic depth."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """bfloat16 autocast; auto: on CUDA devices that have it."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: CUDA where there is one."""
    streaming: Streaming = field(default_factory=lambda: Streaming(budget_gib=2.0, chunk_regions=8))
    """Memory against time; the result does not depend on it. `chunk_regions` is halved when CUDA is out of memory."""
    eval_every: int = 1
    """Epochs between evaluations on the `val` split; the last epoch is always evaluated."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints; one more after each epoch. 0: after every step."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read does: end the run, or be left out and listed in the report."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "encoder_lr", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"train.{name}: expected a positive number, got {value}")
        for name in ("weight_decay", "warmup_epochs", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name}: expected zero or a positive number, got {getattr(self, name)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train.ema: expected a decay between 0 and 1 such as 0.999, got {self.ema}")
        if not 0 <= self.lr_floor <= 1:
            raise ConfigError(f"train.lr_floor: expected a share from 0 to 1, got {self.lr_floor}")
        known = known_optimizers()
        if self.optimizer not in known:
            raise ConfigError(f"train.optimizer: timm has no `{self.optimizer}`{nearest(self.optimizer, known)}")


@dataclass(kw_only=True)
class RunConfig:
    """Everything that a run depends on; `config.yaml` of a run folder is one of these."""

    data: DataConfig
    """Which images."""
    model: ModelConfig
    """What is trained."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How."""


FREE_TO_CHANGE = (
    "data.csv",
    "data.verify_sha256",
    "train.device",
    "train.streaming",
    "train.checkpoint_minutes",
    "train.on_bad_image",
)
"""What may differ when a run is continued: none of these changes what is computed (beyond rounding)."""


def known_optimizers() -> list[str]:
    """Timm's names, without those that need second derivatives (streaming has first ones only)."""
    from timm.optim import list_optimizers  # type: ignore[attr-defined]  # timm does not mark what it exports

    return [str(name) for name in list_optimizers() if name != "adahessian"]


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain data of a run's YAML file, with `data.csv` made absolute.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no keys.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}: expected YAML, but{where}: {problem}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected the keys data, model and train, got {type(data).__name__}")
    section = data.get("data")
    if isinstance(section, dict) and isinstance(section.get("csv"), str):
        section["csv"] = str((path.parent / section["csv"]).resolve())
    return data


def run_config(data: Mapping[str, Any]) -> RunConfig:
    """`RunConfig` from plain data.

    Raises:
        ConfigError: unknown keys (with the nearest right one), wrong types, values out of range.
    """
    data = dict(data)
    if isinstance(data.get("model"), Mapping):
        data["model"] = ModelConfig.from_dict(data["model"])
    return from_dict(RunConfig, data)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Dotted keys, with both values, in which two plain configs differ, but for `FREE_TO_CHANGE`."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        path = f"{where}.{key}" if where else key
        if path in FREE_TO_CHANGE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, path)
        elif a != b:
            found.append(f"{path} was {a!r}, now {b!r}")
    return found
