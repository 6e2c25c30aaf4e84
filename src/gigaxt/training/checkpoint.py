"""Checkpoints of a run: safetensors + JSON, complete or not there at all.

    checkpoints/step-00000120/state.safetensors    every tensor: weights, moving average, optimiser, random states
    checkpoints/step-00000120/state.json           everything else, with {"$tensor": name} where a tensor belongs

A checkpoint is written under another name, flushed to the disk, and renamed; the two newest are kept.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gigaxt.amounts import GIB
from gigaxt.errors import CheckpointError, one_line
from gigaxt.machine import free_disk_gib

KEEP = 2
"""Checkpoints kept: the newest, and the one before in case the newest is damaged."""
FORMAT = 1


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (nested dicts, lists, tensors, numbers, strings) as the checkpoint of `step`, and drop old ones.

    Raises:
        CheckpointError: it could not be written (full disk, for one). Earlier checkpoints are then as they were.
    """
    target = folder / f"step-{step:08d}"
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps({"format": FORMAT, "step": step, "state": pack(state, tensors, "")}, allow_nan=False)
    with replaced_folder(target) as part:
        save_file(tensors, part / "state.safetensors")
        (part / "state.json").write_text(text, encoding="utf-8")
    for stale in [*checkpoints(folder)[:-KEEP], *folder.glob("step-*.part")]:  # .part: of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    return target


def check_space(folder: Path, weights: Iterable[torch.Tensor], copies: int) -> None:
    """Refuse a disk that has no room for a single checkpoint, before hours of training.

    Args:
        folder: of the checkpoints.
        weights: of the model.
        copies: of the weights that a checkpoint holds at least.

    Raises:
        CheckpointError: there is no room.
    """
    need = copies * sum(t.nbytes for t in weights) / GIB
    free = free_disk_gib(folder)
    if need > free:
        raise CheckpointError(
            f"{folder}: a checkpoint takes at least {need:.2f} GiB, {free:.2f} are free; free some space, or use "
            "another --out"
        )


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """Step and state of a checkpoint that `save_checkpoint` wrote; tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is of another version of gigaxt.
    """
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, got {document['format']}")
        # Cloned: load_file maps the file into memory, and a mapped file that is cut off later ends the process.
        tensors = {name: tensor.clone() for name, tensor in load_file(path / "state.safetensors").items()}
        return int(document["step"]), unpack(document["state"], tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {one_line(error)}") from error


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir())


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` in one rename once it is complete and on the disk.

    Raises:
        CheckpointError: something could not be written; `target` is then as it was.
    """
    part = target.with_name(target.name + ".part")
    old = target.with_name(target.name + ".old")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in [*part.iterdir(), part]:
            flush_to_disk(path)
        if target.exists():  # a folder cannot be renamed onto a full one
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        part.rename(target)
        flush_to_disk(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        recover_folder(target)
        raise CheckpointError(
            f"{target}: cannot write: {one_line(error)}; free some space, then the same command continues the run"
        ) from error


def recover_folder(target: Path) -> None:
    """Give `target` its old content back where a process was killed between the two renames of `replaced_folder`."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        old.rename(target)


def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """`value` as JSON; tensors go to `tensors` under their dotted path, dicts with other keys than strings as pairs."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # clone: safetensors refuses shared storage
        return {"$tensor": name}
    if isinstance(value, dict):
        items = {key: pack(item, tensors, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
        if all(isinstance(key, str) for key in items):
            return items
        return {"$pairs": [[key, item] for key, item in items.items()]}
    if isinstance(value, list | tuple):
        items_list = [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return {"$tuple": items_list} if isinstance(value, tuple) else items_list
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}  # JSON has no NaN
    return value


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$float" in value:
            return float(value["$float"])
        if "$tuple" in value:
            return tuple(unpack(item, tensors) for item in value["$tuple"])
        if "$pairs" in value:
            return {key: unpack(item, tensors) for key, item in value["$pairs"]}
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def random_states() -> dict[str, Any]:
    """The states of the global random streams of Python, NumPy and torch.

    gigaxt's own numbers come from seeds; these are for what a third-party region encoder may draw.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`; CUDA's only where there are as many devices as before."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
