"""gigaxt: vision models trained and run end to end on images far larger than GPU memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigaxt import metrics as metrics
    from gigaxt import testing as testing
    from gigaxt.errors import CheckpointError, ConfigError, DataError, GigaxtError, ImageError, TrainingError
    from gigaxt.image import Image, cache_files, open_bands, open_image
    from gigaxt.inference import predict
    from gigaxt.nn.batchnorm import freeze_batchnorm
    from gigaxt.nn.context import register_context
    from gigaxt.nn.xt import GigaXT, ModelConfig, build_model
    from gigaxt.pretrained import load
    from gigaxt.regions import RegionGrid
    from gigaxt.streaming.keyed import key_dropout
    from gigaxt.streaming.nested import stream_nested
    from gigaxt.streaming.recurrence import scan
    from gigaxt.streaming.single import Streaming, stream
    from gigaxt.xt_release.importer import from_xt_release

# Where each public name lives. Imported at first use: `gigaxt --help` must not wait for torch.
_HOMES = {
    "gigaxt.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "GigaxtError",
        "ImageError",
        "TrainingError",
    ),
    "gigaxt.image": ("Image", "cache_files", "open_bands", "open_image"),
    "gigaxt.inference": ("predict",),
    "gigaxt.streaming.nested": ("stream_nested",),
    "gigaxt.nn.batchnorm": ("freeze_batchnorm",),
    "gigaxt.nn.context": ("register_context",),
    "gigaxt.streaming.keyed": ("key_dropout",),
    "gigaxt.nn.xt": ("GigaXT", "ModelConfig", "build_model"),
    "gigaxt.pretrained": ("load",),
    "gigaxt.streaming.recurrence": ("scan",),
    "gigaxt.regions": ("RegionGrid",),
    "gigaxt.streaming.single": ("Streaming", "stream"),
    "gigaxt.xt_release.importer": ("from_xt_release",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GigaXT",
    "GigaxtError",
    "Image",
    "ImageError",
    "ModelConfig",
    "RegionGrid",
    "Streaming",
    "TrainingError",
    "build_model",
    "cache_files",
    "freeze_batchnorm",
    "from_xt_release",
    "key_dropout",
    "load",
    "open_bands",
    "open_image",
    "predict",
    "register_context",
    "scan",
    "stream",
    "stream_nested",
]


def __getattr__(name: str) -> Any:
    if name in ("metrics", "testing"):
        return import_module(f"gigaxt.{name}")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'gigaxt' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
