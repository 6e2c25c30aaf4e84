"""A dense head's answers for a scene, region by region, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gigaxt.nn.heads.dense import MapsHead
from gigaxt.nn.kept_maps import KeptMaps
from gigaxt.nn.layout import cut
from gigaxt.nn.stages import Answers
from gigaxt.scenes.batch import SceneBatch
from gigaxt.scenes.region_pixels import valid_cells
from gigaxt.streaming.rows import Joined, Reader, Rows

if TYPE_CHECKING:
    from gigaxt.nn.xt import GigaXT


class RegionAnswer(NamedTuple):
    """One region of a predicted scene: its core, h x w px, cut at the image's border; see `GigaXT.predict_regions`."""

    x: int
    """Left edge of the core, px of the image as the model sees it."""
    y: int
    """Top edge of the core, px of that image."""
    answers: tuple[Tensor, ...]
    """The head's maps of the core: at a stride s (channels, ceil(h / s), ceil(w / s)); see its `forward`."""
    valid: NDArray[np.bool_]
    """(h, w), False where the image has no data."""

    @property
    def logits(self) -> Tensor:
        """Of a segmentation: (classes, h, w)."""
        return self.answers[0]


@torch.no_grad()
def region_answers(model: GigaXT, batch: SceneBatch) -> Iterator[RegionAnswer]:
    """See `GigaXT.predict_regions`."""
    decode = Answers(cast(MapsHead, model.head), model.encode)
    device = next(model.parameters()).device
    reader = Reader(batch.load, device, 0, model.streaming)
    kept = KeptMaps(model.streaming, device)
    context = None if model.regions_apart else _context(model, batch, reader, kept)

    def work(part: Rows) -> tuple[Tensor, ...]:
        if context is None:
            tokens, maps = model.encode(part.loaded)
            own_context = own_tokens(tokens, part.loaded, batch.t)
        else:
            maps = kept.pop((part.start, part.count)) or model.encode(part.loaded)[1]
            (own_context,) = part.of([context])
        answers: tuple[Tensor, ...] = decode(maps, own_context)
        return answers

    for rows in reader.rows(batch.chunks(model.streaming.chunk_regions)):
        for part, maps in reader.run(rows, work):
            yield from _of_part(batch, part, maps)


def _context(model: GigaXT, batch: SceneBatch, reader: Reader, kept: KeptMaps) -> Tensor:
    """The context of all regions of full size, whose feature maps go to `kept`."""
    n = model.streaming.chunk_regions
    chunks = [*batch.chunks(n), *batch.chunks_beside(n), *batch.overview_chunks(n)]
    found = Joined("cat")

    def encode(part: Rows) -> Tensor:
        tokens: Tensor
        tokens, maps = model.encode(part.loaded)
        if part.stop <= batch.full_size:
            kept.add((part.start, part.count), maps)
        return tokens

    for rows in reader.rows(chunks):
        for part, tokens in reader.run(rows, encode):
            found.add(part, [tokens], len(chunks))
    (tokens,) = found.results(len(batch.places))
    return model.join(batch, tokens[: batch.full_size], tokens[batch.full_size :])


def own_tokens(tokens: Tensor, loaded: Mapping[str, Tensor], t: int) -> Tensor:
    """Tokens (n, t * t, dim) of regions without halo as `NoContext` leaves them: zeros where there is no data."""
    if "valid" not in loaded:
        return tokens
    return tokens.masked_fill(~valid_cells(loaded["valid"], t)[..., None], 0)


def _of_part(batch: SceneBatch, part: Rows, maps: tuple[Tensor, ...]) -> Iterator[RegionAnswer]:
    """Maps of some regions one by one, without what lies beyond the image."""
    halo = batch.config.halo
    for i, answers in enumerate(zip(*maps, strict=True)):
        scene, _, place = batch.places[part.start + i]
        grid = batch.scenes[scene].grid
        x, y, w, h = grid.core_xywh(place)
        valid = np.ones((h, w), dtype=np.bool_)
        if "valid" in part.loaded:
            valid = part.loaded["valid"][i, halo : halo + h, halo : halo + w].any(dim=2).cpu().numpy()
        inside = tuple(cut(answer, h, w, grid.core // answer.shape[-1]) for answer in answers)
        yield RegionAnswer(x, y, inside, valid)
