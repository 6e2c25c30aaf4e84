"""What a run is made from: `RunConfig`, its YAML file, and the settings that follow from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from yaml.error import MarkedYAMLError

from gigaxt.config import from_dict, merged, nearest, to_dict
from gigaxt.datasets.split import Fold, check_fold
from gigaxt.errors import ConfigError
from gigaxt.nn.xt import ModelConfig
from gigaxt.streaming.rows import Streaming


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and how they are divided."""

    csv: str
    """The manifest: `image,label[,split][,group][,case]`, `image,mask[,...]` or `image,boxes[,...]`, paths relative to
    the CSV. In a YAML file the CSV's own path is relative to that file."""
    split_seed: int = 0
    """Divides the groups into train, val and test where the CSV has no `split` column, and into folds."""
    folds: int | None = None
    """Divide train and val anew into so many folds, of which `fold` is val; `gigaxt train --folds 5` runs them all."""
    fold: int | None = None
    """The fold that is val, from 1."""
    verify_sha256: bool = False
    """Compare each file with the CSV's `sha256` column when it is first opened."""
    cache: str | None = None
    """Folder on a fast disk for local copies of what is read of the images; see `gigaxt.cache_files`. In a YAML file
    relative to that file."""
    cache_gib: float = 50.0
    """Size of that folder, of which the least recently used copies make room."""

    def __post_init__(self) -> None:
        if not 0 < self.cache_gib < float("inf"):
            raise ConfigError(f"data.cache_gib: expected a positive number, got {self.cache_gib}")
        if (self.folds is None) != (self.fold is None):
            raise ConfigError("data: expected `folds` and `fold` together, got one of them")
        if self.part is not None:
            check_fold(self.part)

    @property
    def part(self) -> Fold | None:
        """The fold that is val; None where the CSV or `split_seed` says what is."""
        return None if self.folds is None or self.fold is None else Fold(self.fold, self.folds)


@dataclass(kw_only=True)
class AugmentConfig:
    """Drawn once per scene and epoch, from the run's seed."""

    dihedral: bool = False
    """Flips and quarter turns, on coordinates: for images without an up, such as maps and slides."""
    mirror: bool = False
    """Left and right changed, half of the time: for photographs."""
    crop_area: float | None = None
    """A random window of at least this share of the image, such as 0.08, with an aspect ratio of 3:4 to 4:3, in place
    of the image. Cut before `model.input.resize_px`, so that both are what timm calls a random resized crop."""
    randaugment: float | None = None
    """RandAugment of this magnitude, 0 to 10: 9 is timm's `rand-m9-mstd0.5-inc1`. For classes of RGB pictures of 8
    bits; each is held in memory, at the size of `model.input.resize_px`."""
    colour: float = 0.0
    """Strength of random gain and offset per band, 0 to 1."""

    def __post_init__(self) -> None:
        if self.crop_area is not None and not 0 < self.crop_area <= 1:
            raise ConfigError(f"train.augment.crop_area: expected a share above 0 and up to 1, got {self.crop_area}")
        if self.randaugment is not None and not 0 <= self.randaugment <= 10:
            raise ConfigError(f"train.augment.randaugment: expected a magnitude from 0 to 10, got {self.randaugment}")
        if not 0 <= self.colour <= 1:
            raise ConfigError(f"train.augment.colour: expected a strength from 0 to 1, got {self.colour}")

    @property
    def changes(self) -> bool:
        """Whether anything is changed at all."""
        return self != AugmentConfig()


@dataclass(kw_only=True)
class TrainConfig:
    """How weights are learnt. One step is one update of the weights."""

    init: str | None = None
    """Folder of a model to start from: one of `gigaxt import-xt`, or `model/` of another run. Sections that `model` in
    the YAML leaves out are those of this model. In a YAML file the path is relative to that file."""
    encoder: Literal["full", "last_n", "frozen"] = "full"
    """How much of the region encoder learns: all, its last `last_n` stages, or nothing. What is fixed behaves as in
    evaluation; norm and projection of its tokens, context and head always learn."""
    last_n: int = 1
    """Stages that learn with `encoder: last_n`; blocks, of a plain ViT."""
    token_cache: str | None = None
    """Folder that keeps a frozen encoder's features of each image: they are computed once, and any number of runs may
    share them. For classification, without changes of the pixels. In a YAML file relative to that file."""
    token_cache_gib: float = 50.0
    """Beyond this size nothing is added to it."""
    grad_share: float = 1.0
    """Classification: share of a step's regions that the region encoder learns from, drawn anew each step. All regions
    are seen, and the gradient's mean over many draws is the exact one; a backward pass costs so much less. 1: exact."""
    epochs: int = 50
    """Passes over the training images."""
    batch: int = 4
    """Images in one forward pass; cases, where several images are one."""
    accumulate: int = 1
    """Forward passes in one step: a step sees batch x accumulate images."""
    window: int | None = None
    """Px (of the model's pixel size) of windows that dense models train on in place of whole scenes; each is drawn
    anew, from where there are data and labels. Evaluation is of whole scenes."""
    window_objects: float = 0.0
    """Share of windows that are drawn around an object, each as likely, where there are any; the others lie anywhere.
    Of xView3-SAR half of these objects are near the shore."""
    windows_per_scene: int = 1
    """Windows of each scene in an epoch."""
    window_context: bool = False
    """Encode the whole scene with each window, as its context. Only the window's regions are decoded and scored;
    through the regions beside it, which are encoded without a graph, no gradient flows to the region encoder."""
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
    compile: bool = False
    """Compile the region encoder (`torch.compile`): minutes before the first step, then each is faster. Needs a C++
    compiler on the CPU, Triton on CUDA. Tried first: what is compiled wrong is refused, as Swin V2 on a CPU."""
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
        if not 0 <= self.window_objects <= 1:
            raise ConfigError(f"train.window_objects: expected a share from 0 to 1, got {self.window_objects}")
        if self.window is None and (self.windows_per_scene != 1 or self.window_context or self.window_objects):
            raise ConfigError(
                "train: window_objects, windows_per_scene, window_context are for a `window`; set it, or remove them"
            )
        if self.window is not None and self.window < 32:
            raise ConfigError(f"train.window: expected at least 32 px, got {self.window}")
        if self.window is not None and self.augment.crop_area is not None:
            raise ConfigError("train.window and train.augment.crop_area exclude each other; remove one")
        for name in ("epochs", "batch", "accumulate", "eval_every", "windows_per_scene"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: expected at least 1, got {getattr(self, name)}")
        if self.last_n < 1:
            raise ConfigError(f"train.last_n: expected at least 1, got {self.last_n}")
        if not 0 < self.grad_share <= 1:
            raise ConfigError(f"train.grad_share: expected a share above 0 and up to 1, got {self.grad_share}")
        if self.grad_share < 1 and self.encoder == "frozen":
            raise ConfigError("train.grad_share: a frozen encoder has no gradient to share; remove it")
        if self.token_cache is not None:
            self._check_cache()
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

    def _check_cache(self) -> None:
        if self.encoder != "frozen":
            raise ConfigError("train.token_cache: only a frozen encoder's features stay the same; set train.encoder")
        if not 0 < self.token_cache_gib < float("inf"):
            raise ConfigError(f"train.token_cache_gib: expected a positive number, got {self.token_cache_gib}")
        changed = replace(self.augment, dihedral=False, mirror=False)
        if changed.changes:
            raise ConfigError(
                "train.token_cache: pixels that are changed anew each epoch cannot be kept; of train.augment only "
                "dihedral and mirror go with it"
            )


@dataclass(kw_only=True)
class RunConfig:
    """Everything that a run depends on; `config.yaml` of a run folder is one of these."""

    data: DataConfig
    """Which images."""
    model: ModelConfig
    """What is trained."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How."""

    def __post_init__(self) -> None:
        augment, dense = self.train.augment, self.model.head.kind != "classify"
        if dense and augment.randaugment is not None:
            raise ConfigError(
                "train.augment.randaugment: knows nothing of masks and boxes; for dense heads use colour, dihedral"
            )
        if self.train.window is not None and self.model.head.kind == "classify":
            raise ConfigError("train.window: a window of an image may lack what its label means; for dense models only")
        if self.train.window is not None and self.model.head.kind == "mask_rcnn":
            raise ConfigError("train.window: mask_rcnn sees whole images; use train.augment.crop_area, or kind detect")
        if self.train.window is not None and self.model.input.resize_px is not None:
            raise ConfigError("train.window and model.input.resize_px exclude each other; remove one")
        if dense and self.train.token_cache is not None:
            raise ConfigError(
                f"train.token_cache: a head of kind {self.model.head.kind} needs the feature maps too, which are too "
                "large to keep; remove it"
            )
        if dense and self.train.grad_share < 1:
            raise ConfigError(
                f"train.grad_share: is for classification; a head of kind {self.model.head.kind} learns from every "
                "region, remove it"
            )
        if self.model.input.foreground is not None and augment.crop_area is not None:
            raise ConfigError("train.augment.crop_area and model.input.foreground exclude each other; remove one")


FREE_TO_CHANGE = (
    "data.csv",
    "data.verify_sha256",
    "data.cache",
    "data.cache_gib",
    "train.init",
    "train.token_cache",
    "train.token_cache_gib",
    "train.compile",
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
    """The plain data of a run's YAML file, with `data.csv`, `data.cache`, `train.init`, `train.token_cache` absolute.

    A file may name another one that it is based on, `base: other.yaml`, relative to itself. What both set is taken from
    the file that names the base, key by key.

    Raises:
        ConfigError: a file is missing, is no YAML, holds no keys, or is based on itself.
    """
    data: dict[str, Any] = {}
    for _, part in reversed(_files(path)):
        data = merged(data, part)
    return data


def named_files(path: Path) -> str:
    """A run's YAML file and those that it is based on, for messages; raises as `read_yaml`."""
    return ", based on ".join(str(file) for file, _ in _files(path))


def _files(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A YAML file, its base, the base of that and so on, each with what it says itself."""
    found: list[tuple[Path, dict[str, Any]]] = []
    next_one: Path | None = path
    while next_one is not None:
        above = f"{found[-1][0]}: base: " if found else ""
        if any(next_one.resolve() == file.resolve() for file, _ in found):
            raise ConfigError(f"{above}{next_one} is based on itself; remove one `base`")
        data = _read_one(next_one, above)
        base = data.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{next_one}: base: expected the path of a YAML file, got {base!r}")
        found.append((next_one, data))
        next_one = None if base is None else next_one.parent / base
    return found


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that stands twice, where PyYAML would silently take the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in lines:
                problem = f"`{key.value}` stands there again, first in line {lines[key.value]}; keep one"
                raise MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def _read_one(path: Path, above: str) -> dict[str, Any]:
    """The keys of one file, with its paths made absolute; `above` begins messages."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(f"{above}{path}: cannot read the config: {cause}") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{above}{path}: expected YAML, but{where}: {problem}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{above}{path}: expected the keys data, model and train, got {type(data).__name__}")
    for name, key in (("data", "csv"), ("data", "cache"), ("train", "init"), ("train", "token_cache")):
        section = data.get(name)
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = str((path.parent / section[key]).resolve())
    return data


def run_config(data: Mapping[str, Any]) -> RunConfig:
    """`RunConfig` from plain data.

    Raises:
        ConfigError: unknown keys (with the nearest right one), wrong types, values out of range.
        CheckpointError: there is no model at `train.init`, and sections of `model` are left to it.
    """
    data = _with_initial_model(data)
    if isinstance(data.get("model"), Mapping):
        data["model"] = ModelConfig.from_dict(data["model"])
    return from_dict(RunConfig, data)


def _with_initial_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the sections of its model that only the model at `train.init` has."""
    data, sections = dict(data), [section.name for section in fields(ModelConfig)]
    train, model = data.get("train") or {}, data.get("model") or {}
    init = train.get("init") if isinstance(train, Mapping) else None
    if isinstance(init, str) and isinstance(model, Mapping) and not set(sections) <= model.keys():
        from gigaxt.pretrained import read_config

        initial = to_dict(read_config(Path(init)))
        # Thresholds that its training chose are chosen anew by this one.
        initial["head"] |= {name: None for name in ("threshold", "flag_threshold") if name in initial["head"]}
        data["model"] = {**initial, **model}
    return data


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
