"""Settings written into a run's YAML file, without touching the rest of it."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from gigaxt.errors import ConfigError
from gigaxt.streaming.rows import Streaming


def check_writable(path: Path) -> None:
    """Refuse a file that `write_streaming` could not write.

    Raises:
        ConfigError: its folder is closed to this user, or on a read-only disk.
    """
    if not os.access(path.resolve().parent, os.W_OK):
        raise ConfigError(f"{path}: expected a file in a folder that can be written, for --fit; copy it to another one")


def write_streaming(path: Path, streaming: Streaming) -> None:
    """Set `train.streaming` in a YAML file and leave everything else as it is, comments included.

    Raises:
        ConfigError: the file cannot be written.
    """
    old = path.read_text(encoding="utf-8")
    wanted = yaml.safe_load(old)
    settings = {
        "budget_gib": streaming.budget_gib,
        "host_gib": streaming.host_gib,
        "chunk_regions": streaming.chunk_regions,
        **({} if streaming.readers == Streaming().readers else {"readers": streaming.readers}),
        **({"cuda_graphs": True} if streaming.cuda_graphs else {}),
    }
    wanted["train"] = {**(wanted.get("train") or {}), "streaming": settings}
    new = _edited(old, yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=1000).strip())
    try:
        same = yaml.safe_load(new) == wanted
    except yaml.YAMLError:
        same = False
    if not same:  # a layout that is not understood, such as train: {...} on one line
        new = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    file = path.resolve()  # what a link leads to
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(new, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def _edited(text: str, settings: str) -> str:
    """`text` with the block `streaming:` of its section `train:` replaced or added."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.split("#")[0].rstrip() == "train:"), None)
    if start is None:
        return text.rstrip("\n") + f"\ntrain:\n  streaming: {settings}\n"
    stop = next((i for i in range(start + 1, len(lines)) if lines[i][:1] not in ("", " ", "#")), len(lines))
    inside = [line for line in lines[start + 1 : stop] if line.strip() and not line.lstrip().startswith("#")]
    indent = len(inside[0]) - len(inside[0].lstrip()) if inside else 2
    kept, dropping = [], False
    for line in lines[start + 1 : stop]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= indent:
            dropping = depth == indent and line.lstrip().startswith("streaming:")
        if not dropping:
            kept.append(line)
    added = f"{' ' * indent}streaming: {settings}"
    return "\n".join([*lines[: start + 1], added, *kept, *lines[stop:]]) + "\n"
