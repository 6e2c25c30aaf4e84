"""What is complete of an output, beside it on disk, so that a prediction that was interrupted goes on from there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gigaxt.config import to_dict
from gigaxt.errors import DataError, ImageError
from gigaxt.nn.xt import GigaXT
from gigaxt.replaced_file import replaced_file

Provenance = dict[str, Any]
"""All that an output depends on, as plain data: with the same provenance two outputs are the same."""
PLAN = "plan.json"
"""File of the provenance in the folder of parts; in `OUTPUT.json` it is the key `plan`."""
PARTS = ".parts"
"""What the folder's name ends with."""


class Parts:
    """A folder `OUTPUT.parts` while OUTPUT is being made; a context manager.

    It holds tensors and strips of rasters, each under its name only once it is complete. It stays if the work is
    interrupted, and is used again for an output of the same provenance; parts of any other are removed. If the input is
    at fault, or nothing is complete yet, it is removed.

    Args:
        output: what is being made.
        source: the image's name; errors of it are the input's fault.
        provenance: of the output; None: it is not known, and nothing is used again.

    Raises:
        ImageError: the folder cannot be made, or another process works in it.
    """

    def __init__(self, output: Path, source: str, provenance: Provenance | None) -> None:
        self.output, self.source, self.provenance = output, source, provenance
        self.folder = output.parent / f"{output.name}{PARTS}"

    def __enter__(self) -> Self:
        if not self.output.parent.is_dir():
            raise ImageError(self.output, f"expected an existing folder, got {self.output.parent}: make it first")
        if self.output.is_dir():
            raise ImageError(self.output, "expected the name of a file, got a folder")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(self.folder, f"cannot be made ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ImageError(self.output, "another process is making it: wait for it, or stop it") from error
        except OSError:
            pass  # a file system without locks
        with self._telling(), self._unlocked_on_error():
            if not (self.folder / PLAN).exists() and self.names():
                raise ImageError(self.folder, "expected no such folder, or one of an interrupted prediction: rename it")
            if self.provenance is None or read_json(self.folder / PLAN) != self.provenance:
                self._empty()
                write_json(self.folder / PLAN, self.provenance)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or self.provenance is None or not self.names() or self._at_fault(error):
            self._empty()
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        os.close(self._lock)

    def _at_fault(self, error: BaseException | None) -> bool:
        """Whether the input is, so that going on would not help."""
        return isinstance(error, DataError) or (isinstance(error, ImageError) and error.path == self.source)

    def names(self) -> list[str]:
        """What is complete."""
        return sorted(path.name for path in self._files() if path.name != PLAN and path.suffix != ".part")

    def path(self, name: str) -> Path:
        """Where a file of this name is, or is to be written; its writer must give it that name once it is complete."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether tensors of this name were saved and can be read."""
        try:
            with safe_open(self._tensors(name), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name.

        Raises:
            ImageError: they cannot be written.
        """
        with self._telling(), replaced_file(self._tensors(name)) as part:
            try:
                save_file(tensors, part)
            except SafetensorError as error:  # wraps what the system says
                raise OSError(None, str(error)) from error

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors kept under a name."""
        return load_file(self._tensors(name))

    def slice(self, name: str, tensor: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor kept under a name; only these are read."""
        with safe_open(self._tensors(name), "pt") as file:
            rows: Tensor = file.get_slice(tensor)[start:stop]
        return rows

    def drop(self, names: Iterable[str]) -> None:
        """Remove tensors that are needed no longer."""
        for name in names:
            self._tensors(name).unlink(missing_ok=True)

    def _tensors(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _files(self) -> list[Path]:
        """What is ours in the folder."""
        return [path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".tif", ".part", ".json")]

    def _empty(self) -> None:
        with contextlib.suppress(OSError):
            for path in self._files():
                path.unlink()

    @contextlib.contextmanager
    def _unlocked_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            os.close(self._lock)
            raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ImageError(self.folder, f"cannot be written ({error.strerror or error})") from error


def record_path(output: Path) -> Path:
    """Where it stands what an output was made from."""
    return output.with_name(f"{output.name}.json")


def write_record(output: Path, files: Iterable[Path], provenance: Provenance) -> None:
    """Say beside a complete output what it was made from.

    Raises:
        ImageError: it cannot be written.
    """
    made = {path.name: _stamp(path) for path in files}
    try:
        write_json(record_path(output), {"plan": provenance, "files": made})
    except OSError as error:
        raise ImageError(record_path(output), f"cannot be written ({error.strerror})") from error


def is_done(output: Path, provenance: Provenance | None) -> bool:
    """Whether an output of this provenance is there, unchanged since it was made."""
    record = read_json(record_path(output))
    if provenance is None or not isinstance(record, dict) or record.get("plan") != provenance:
        return False
    try:
        return all(_stamp(output.with_name(name)) == stamp for name, stamp in record["files"].items())
    except (OSError, KeyError, AttributeError):
        return False


def provenance_of(
    model: GigaXT, source: Path, settings: dict[str, Any], *, digest: str | None = None
) -> Provenance | None:
    """What a prediction of a file depends on; None if the file's state cannot be read.

    Args:
        model: with all its weights.
        source: the image.
        settings: that change the result.
        digest: `model_digest(model)`, where it is known already.
    """
    device = next(model.parameters()).device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "as stored"
    foreground = model.config.input.foreground
    image = file_state(source)
    if image is None:
        return None
    return {
        "gigaxt": version("gigaxt"),
        "model": digest or model_digest(model),
        "image": image,
        "foreground": file_state(Path(foreground)) if foreground else None,
        "device": device,
        "autocast": str(precision),
        **settings,
    }


def file_state(path: Path) -> dict[str, Any] | None:
    """A file's or folder's path, size and time; of a folder over all files below it. None: there is nothing."""
    try:
        if path.is_dir():
            digest = hashlib.blake2b(digest_size=16)
            for file in sorted(path.rglob("*")):
                stat = file.stat()
                digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            return {"path": str(path.resolve()), "files": digest.hexdigest()}
        size, mtime_ns = _stamp(path)
    except OSError:
        return None
    return {"path": str(path.resolve()), "size": size, "mtime_ns": mtime_ns}


def model_digest(model: GigaXT) -> str:
    """What distinguishes a model's answers from those of any other: a hash of its settings and weights."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([to_dict(model.config), model.ready], sort_keys=True, default=str).encode())
    module: nn.Module = model
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, which appears under its name when it is complete."""
    with replaced_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stamp(path: Path) -> list[int]:
    """Size and time of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
