"""A frozen region encoder's features, kept on disk: computed once an image, read from then on, by several runs at once.

One safetensors file an image. Its name is a digest of all that the features depend on: the encoder's weights and
settings, the input's settings, the image (path, size and time of change of its file) and how it is turned. It is
written under another name and renamed, and holds a digest of its own content: a damaged file is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gigaxt.amounts import GIB
from gigaxt.augment import Dihedral
from gigaxt.config import to_dict
from gigaxt.errors import CheckpointError
from gigaxt.image.base import Image
from gigaxt.image.files import file_identity
from gigaxt.scenes.batch import SceneBatch

if TYPE_CHECKING:
    from gigaxt.nn.stages import RegionTokens

FORMAT = 1
"""Part of every name; another one where the features of the same encoder come out differently."""
DIGEST_BYTES = 20
NAME = "[0-9a-f]" * (2 * DIGEST_BYTES)
"""Pattern of the names of its own files: whatever else lies in the folder is left alone."""
STALE_S = 3600.0
"""Age at which a file that was never finished is removed."""


class TokenCache:
    """Files of features in one folder, up to a size.

    Args:
        folder: made where it does not exist.
        most_gib: size of the folder. Where it is full, files that this cache has not used make room, the longest unused
            first; then nothing more is added.

    Raises:
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, most_gib: float) -> None:
        self.folder, self.most_bytes = Path(folder), int(most_gib * GIB)
        self._notes: dict[str, bool] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(f"{NAME}.*.part"):  # of a process that was killed
                if time.time() - part.stat().st_mtime > STALE_S:
                    part.unlink(missing_ok=True)
            self._bytes = sum(size for _, size, _ in self._files())
        except OSError as error:
            raise CheckpointError(f"train.token_cache: {folder}: {error.strerror or error}; name a folder") from error
        self._used: set[Path] = set()
        self._closed = False
        self._weights: tuple[Any, str] = (None, "")

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: a copy of a model shares the folder and what is known of it."""
        return self

    def path(self, encode: RegionTokens, batch: SceneBatch, scene: int, rows: list[int]) -> Path | None:
        """Where the features of these regions of a scene are or will be; None: the scene is no file as it is."""
        source = _identity(batch.scenes[scene].source)
        if source is None:
            return None
        first = next(encode.parameters())
        kind = first.device.type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
        settings = getattr(encode.encoder, "config", None)
        parts: dict[str, Any] = {
            "format": [FORMAT, torch.__version__, timm.__version__],
            "weights": self._weights_digest(encode),
            # Where weights came from is no matter, only what they are.
            "encoder": [type(encode.encoder).__qualname__, {**to_dict(settings), "pretrained": ""} if settings else ""],
            "input": to_dict(batch.config),
            "places": [list(batch.places[row][2]) for row in rows],
            "region": [batch.region, batch.t],
            "dtype": [str(first.dtype), autocast, kind],
            "source": source,
        }
        name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=DIGEST_BYTES).hexdigest()
        return self.folder / f"{name}.safetensors"

    def get(self, path: Path, regions: int) -> tuple[Tensor, Tensor] | None:
        """Features (regions, t * t, encoder.dim) and token validity (regions, t * t); None: not here, or damaged."""
        try:
            found = load(path.read_bytes())  # not mapped: a mapped file that is cut off ends the process
            features, valid, digest = found["features"], found["valid"], found["digest"]
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if not torch.equal(digest, _digest(features, valid)) or features.shape[:2] != valid.shape:
            return None
        if len(features) != regions:
            return None
        self._used.add(path)
        with suppress(OSError):
            os.utime(path)  # when it was last used
        return features, valid

    def put(self, path: Path, features: Tensor, valid: Tensor) -> None:
        """Keep a scene's features, where there is room."""
        if self._closed:
            return
        features, valid = features.cpu().contiguous(), valid.contiguous()
        data = save({"features": features, "valid": valid, "digest": _digest(features, valid)})
        part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")  # another run may be writing the same file
        try:
            if not self._make_room(len(data)):
                self._notes.setdefault(
                    f"token cache: {self.folder} is full at {self.most_bytes / GIB:g} GiB; the tokens of further "
                    "images are computed anew each time (train.token_cache_gib)",
                    False,
                )
                return
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            self._closed = True
            why = error.strerror or error
            self._notes.setdefault(f"token cache: {self.folder} cannot be written ({why}); going on without", False)
            return
        self._used.add(path)
        self._bytes += len(data)

    def new_notes(self) -> list[str]:
        """What the user should know, such as that the cache is full or cannot be written; each note is given once."""
        new = [note for note, told in self._notes.items() if not told]
        self._notes = dict.fromkeys(self._notes, True)
        return new

    def _make_room(self, size: int) -> bool:
        """Whether `size` bytes more fit, once files that were not used here are gone."""
        if self._bytes + size <= self.most_bytes:
            return True
        files = sorted(self._files())  # other runs write, too
        self._bytes = sum(size for _, size, _ in files)
        for _, freed, path in files:
            if self._bytes + size <= self.most_bytes or size > self.most_bytes:
                break
            if path not in self._used:
                path.unlink(missing_ok=True)
                self._bytes -= freed
        return self._bytes + size <= self.most_bytes

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each."""
        found = []
        for path in self.folder.glob(f"{NAME}.safetensors"):
            with suppress(FileNotFoundError):  # another run has just removed it
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _weights_digest(self, encode: RegionTokens) -> str:
        """Of the encoder's weights and buffers; computed again where one of them was changed."""
        state = sorted(encode.encoder.state_dict(keep_vars=True).items())
        version = [(name, tensor.data_ptr(), tensor._version) for name, tensor in state]
        if self._weights[0] != version:
            digest = hashlib.blake2b(digest_size=20)
            for name, tensor in state:
                digest.update(name.encode())
                digest.update(bytes(_digest(tensor).tolist()))
            self._weights = version, digest.hexdigest()
        return self._weights[1]


def _identity(image: object) -> list[Any] | None:
    """What identifies an image's pixels; None if they are changed at random or are in no file."""
    if isinstance(image, Dihedral):
        below = _identity(image.base)
        return None if below is None else ["turned", image.k, *below]
    if not isinstance(image, Image) or not type(image).__module__.startswith("gigaxt.image."):
        return None  # colours changed at random, or a reader of the user's own
    path = Path(image.name)
    file: Any = file_identity(str(path.resolve()))
    if file is None and image.name and path.is_dir():  # OME-Zarr: a folder of chunks
        file = [str(path.resolve()), *(file_identity(str(p)) for p in sorted(path.rglob("*")) if p.is_file())]
    if file is None:
        return None
    description = [image.height, image.width, str(image.dtype), image.nodata, image.mpp, image.transform]
    return [file, type(image).__qualname__, list(image.band_names), repr(description)]


def _digest(*tensors: Tensor) -> Tensor:
    """Of shapes, types and content: (20,) uint8."""
    found = hashlib.blake2b(digest_size=20)
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(found.digest()), dtype=torch.uint8)
