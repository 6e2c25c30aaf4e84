"""Plain data to keyword-only dataclasses and back, with errors that name the key and the nearest right one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from gigaxt.errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from nested mappings, as read from YAML or JSON.

    Args:
        cls: a dataclass; nested dataclasses, `X | None`, `Literal`, lists, tuples and dicts are followed.
        data: keys are field names.
        where: dotted path of `data` in the whole config, for messages.

    Raises:
        ConfigError: an unknown or missing key, a value of another type, or what the dataclass itself refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected keys and values, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{join(where, str(key))}: unknown key{nearest(str(key), fields)}")
    values = {key: convert(hints[key], value, join(where, key)) for key, value in data.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: missing {', '.join(f'`{name}`' for name in missing)}")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: plain dicts, lists, numbers and strings, ready for JSON and YAML."""
    result: dict[str, Any] = _plain(config)
    return result


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of two configs as one: mappings are merged key by key, anything else is that of `over`."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause for messages: "; did you mean `x`?" or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def join(where: str, key: str) -> str:
    """Dotted path of `key` below `where`."""
    return f"{where}.{key}" if where else key


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a ConfigError that names `where`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        value = "off" if value is False else value  # as YAML 1.1 reads the word
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(repr, args))}{_hint(value, args)}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin in (list, tuple):
        return _convert_sequence(origin, args, value, where)
    if origin is dict or origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected keys and values, got {value!r}")
        return {key: convert(args[1], item, join(where, str(key))) for key, item in value.items()} if args else value
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    by_kind = {
        str(getattr(arg, "kind", None)): arg for arg in args if isinstance(arg, type) and dataclasses.is_dataclass(arg)
    }
    if len(by_kind) == len(args) and isinstance(value, Mapping):  # dataclasses told apart by the default of `kind`
        if str(value.get("kind")) not in by_kind:
            raise ConfigError(
                f"{join(where, 'kind')}: got {value.get('kind')!r}{nearest(str(value.get('kind')), by_kind)}"
            )
        return from_dict(by_kind[value["kind"]], value, where)
    errors = []
    # Exact types first, so that `int | float` keeps 3 an int and `bool | str` keeps "x" a str.
    choices = sorted((arg for arg in args if arg is not type(None)), key=lambda arg: type(value) is not arg)
    for arg in choices:
        try:
            return convert(arg, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_sequence(origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    return origin(convert(args[0], item, f"{where}[{i}]") if args else item for i, item in enumerate(value))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    if isinstance(value, bool) and hint is not bool:
        raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _hint(value: object, args: tuple[Any, ...]) -> str:
    close = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
