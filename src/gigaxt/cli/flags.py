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


def parse(cls: type[T], args: Sequence[str], *, verb: str, description: str = "", default: T | None = None) -> T:
    """Fill a dataclass from flags: `--field value`, `--nested.field value`.

    Args:
        cls: the dataclass; docstrings under its fields are the help.
        args: of the command line, without the verb. `--help` prints the help and exits with status 0.
        verb: for messages and help.
        description: first lines of the help.
        default: values where no flag is given; None: the dataclass's own.

    Raises:
        ConfigError: an unknown flag or a value that does not fit.
    """
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    errors = io.StringIO()
    given: Any = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(errors):
            value: T = tyro.cli(
                cls, args=args, prog=f"gigaxt {verb}", description=description, default=given, config=config
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_first_sentence(errors.getvalue())}; `gigaxt {verb} --help` lists the flags") from None
    return value


def _first_sentence(box: str) -> str:
    """What tyro says in its frame, up to the first rule and without the title; the nearest flag where it names one.

    The frame is drawn in ASCII where the terminal's encoding has no lines.
    """
    lines = [re.sub(r"^[|│\s]+|[|│\s]+$", "", line) for line in box.splitlines()[1:]]
    rule = next((i for i, line in enumerate(lines) if re.fullmatch(r"[-+─╰╯]{5,}", line)), len(lines))
    text = " ".join(line for line in lines[:rule] if line).rstrip(".")
    near = next((line.split()[0] for line in lines[rule:] if line.startswith("--") and line[2:3].isalpha()), "")
    return f"{text}; did you mean `{near}`?" if near and text.startswith("Unrecognized") else text
