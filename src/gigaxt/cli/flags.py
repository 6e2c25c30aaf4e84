"""Command-line flags from dataclasses, by tyro, with errors of one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from gigaxt.errors import ConfigError

T = TypeVar("T")


def parse(
    cls: type[T],
    args: Sequence[str],
    *,
    verb: str,
    description: str = "",
    default: T | None = None,
    switches: bool = False,
) -> T:
    """Fill a dataclass from flags: `--field value`, `--nested.field value`.

    Args:
        cls: the dataclass; docstrings under its fields are the help.
        args: of the command line, without the verb. `--help` prints the help and exits with status 0.
        verb: for messages and help.
        description: first lines of the help.
        default: values where no flag is given; None: the dataclass's own.
        switches: booleans are `--flag` alone, and false without; else they take True or False.

    Raises:
        ConfigError: an unknown flag or a value that does not fit.
    """
    booleans = tyro.conf.FlagCreatePairsOff if switches else tyro.conf.FlagConversionOff
    config = (tyro.conf.AvoidSubcommands, booleans)
    errors = io.StringIO()
    given: Any = tyro.MISSING_NONPROP if default is None else default
    if description and {"-h", "--help"} & set(args):
        print(f"{description}\n")  # by ourselves: tyro would fill the lines up
    try:
        with contextlib.redirect_stderr(errors):
            value: T = tyro.cli(cls, args=args, prog=f"gigaxt {verb}", default=given, config=config)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_first_sentence(errors.getvalue())}; `gigaxt {verb} --help` lists the flags") from None
    return value


MISSING = re.compile(r"(--\S+ )?[A-Z]+")
"""A flag with the kind of its value, or an argument, as tyro names those that are missing."""


def _first_sentence(box: str) -> str:
    """What tyro says between the title and the first rule below it; the nearest flag where it names one.

    The frame is of box-drawing characters, or of hyphens and spaces where the terminal's encoding has none.
    """
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()[1:]]
    parts: list[list[str]] = [[]]
    for line in filter(None, lines):
        if set(line) <= set("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    text, *hints = [part for part in parts if part] or [["the flags do not fit"]]
    if missing := [line for line in text if MISSING.fullmatch(line)]:  # between them stands the whole of their help
        return f"expected {' and '.join(missing)}, got none"
    sentence = " ".join(text).partition(" Got errors:")[0].rstrip(".")
    near = next((line.split()[0] for part in hints for line in part if line.startswith("--")), "")
    return f"{sentence}; did you mean `{near}`?" if near and sentence.startswith("Unrecognized") else sentence
