"""Configs of the release: YAML files that inherit from others and refer to their own values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gigaxt.config import convert, merged
from gigaxt.errors import ConfigError

T = TypeVar("T")

BASES: dict[str, dict[str, Any]] = {
    "base.yaml": {
        "data": {"crop_size": 512},
        "model": {
            "backbone_class": "swinv2_tiny_window16_256_timm",
            "backbone": {"input_size": 512},
            "cls_head": "naive",
        },
    },
    "paths.yaml": {},
    "cluster_paths_inat.yaml": {},
}
"""What the release's own base configs, which do not lie beside its weights, say of the model."""

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
"""An innermost `${...}`."""
_MISSING = object()


class PublishedConfig:
    """A config of the release, read lazily: only what is asked for has to be resolvable.

    Args:
        data: nested plain data with the release's sections `model` and `data`, or the `model` section alone.
        name: for messages.
    """

    def __init__(self, data: Mapping[str, Any], name: str = "config") -> None:
        alone = "model" not in data and "backbone_class" in data
        self.data = _with_later_names({"model": data} if alone else data)
        self.name = name
        self._resolving: list[str] = []
        if not isinstance(self.data.get("model"), Mapping):
            keys = ", ".join(map(str, self.data)) or "nothing"
            raise ConfigError(f"{name}: expected a config of the xT release with a section `model`, got {keys}")

    @classmethod
    def read(cls, path: str | Path) -> PublishedConfig:
        """A YAML (or JSON) file and the files that it inherits from.

        `base_configs` are merged in their order, the file itself last. Their paths are those of the release, such as
        `config/base.yaml`: looked for beside the file and in each folder above it. The release's own need not be there.

        Raises:
            ConfigError: a file is missing or no YAML, or inherits from itself.
        """
        path = Path(path)
        return cls(_read_merged(path, ()), str(path))

    def get(self, key: str, hint: type[T], default: T | None = None) -> T:
        """The value of a dotted key as a `hint`.

        Args:
            key: such as "model.backbone.input_size".
            hint: int, float, str, or list[float].
            default: where the key is absent or null; None: it must be there.

        Raises:
            ConfigError: the key is missing, of another type, or refers to something that is not there.
        """
        value = self._find(key)
        if value is _MISSING or value is None:
            if default is None:
                raise ConfigError(f"{self.name}: missing `{key}`")
            return default
        result: T = convert(hint, value, f"{self.name}: {key}")
        return result

    def _find(self, key: str) -> Any:
        node: Any = self.data
        for part in key.split("."):
            node = self._resolved(node)
            if not isinstance(node, Mapping) or part not in node:
                return _MISSING
            node = node[part]
        return self._resolved(node)

    def _resolved(self, value: Any) -> Any:
        """A value with its references replaced; a string that is one reference becomes what it refers to."""
        while isinstance(value, str):
            whole = _REFERENCE.fullmatch(value.strip())
            if whole:
                value = self._refer(whole[1].strip())
            elif _REFERENCE.search(value):
                value = _REFERENCE.sub(lambda match: str(self._refer(match[1].strip())), value)
            else:
                break
        return value

    def _refer(self, reference: str) -> Any:
        resolver, colon, arguments = reference.partition(":")
        if colon:
            if resolver != "oc.env":
                raise ConfigError(f"{self.name}: cannot resolve ${{{reference}}}: expected a key or oc.env:NAME")
            return self._environment(arguments)
        if reference in self._resolving:
            raise ConfigError(f"{self.name}: ${{{reference}}} refers to itself")
        self._resolving.append(reference)
        try:
            value = self._find(reference)
        finally:
            self._resolving.pop()
        if value is _MISSING:
            raise ConfigError(f"{self.name}: ${{{reference}}} refers to a key that is not there")
        return value

    def _environment(self, arguments: str) -> Any:
        name, comma, default = (part.strip() for part in arguments.partition(","))
        if name in os.environ:
            return os.environ[name]
        if not comma:
            raise ConfigError(f"{self.name}: ${{oc.env:{name}}}: set the environment variable {name}")
        return yaml.safe_load(default)


def _read_merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: inherits from itself through base_configs")
    own = _with_later_names(_read_yaml(path))
    bases = own.get("base_configs") or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base_configs: expected a list of paths, got {bases!r}")
    found: dict[str, Any] = {}
    for base in bases:
        found = merged(found, _read_base(base, path, (*above, path.resolve())))
    return merged(found, own)


def _read_base(base: str, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    folders = path.resolve().parents
    found = next((folder / base for folder in folders if (folder / base).is_file()), None)
    if found is not None:
        return _read_merged(found, above)
    if Path(base).name in BASES:
        return BASES[Path(base).name]
    raise ConfigError(
        f"{path}: inherits from `{base}`, which is neither in {folders[0]} nor in a folder above it; "
        "put the release's config folder there"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a config of the xT release, got {type(data).__name__}")
    return data


def _with_later_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the names of the last release where it has those of the time of training."""
    data = dict(data)
    if isinstance(data.get("model"), Mapping):
        data["model"] = model = _renamed(data["model"], "xl_context", "context")
        if isinstance(model.get("backbone"), Mapping):
            model["backbone"] = _renamed(model["backbone"], "img_size", "input_size")
    return data


def _renamed(data: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    result = {key: value for key, value in data.items() if key != old}
    if old in data:
        result.setdefault(new, data[old])
    return result
