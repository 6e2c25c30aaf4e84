"""The composition, read top to bottom: regions -> region encoder -> tokens -> context encoder -> head.

Gupta, Li, Zhu, Malik, Darrell, Mangalam: xT: Nested Tokenization for Larger Context in Large Images (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError, DataError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.nested import stream_nested
from gigaxt.nn.context import ContextConfig, build_context
from gigaxt.nn.heads import ClassifyHead, HeadConfig, SegmentHead, build_head
from gigaxt.nn.keyed import key_dropout
from gigaxt.nn.region_encoder import RegionEncoder, RegionEncoderConfig
from gigaxt.replay import draw_seed
from gigaxt.rows import Reader
from gigaxt.scenes import InputConfig, SceneBatch
from gigaxt.streaming import Streaming, stream


@dataclass(kw_only=True)
class ModelConfig:
    """A model: the `model:` section of a run's YAML, and what is saved with the weights."""

    region_encoder: RegionEncoderConfig
    """The backbone that sees the regions."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """The encoder that joins their tokens."""
    head: HeadConfig
    """What is answered."""
    input: InputConfig = field(default_factory=InputConfig)
    """Bands, pixel size, normalisation, and how scenes are cut."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """From nested plain data; unknown keys are refused with the nearest name.

        Raises:
            ConfigError: unknown or missing keys, values of another type or out of range.
        """
        return from_dict(cls, data)


def build_model(config: ModelConfig) -> GigaXT:
    """The model that `config` describes, freshly initialised (or with pretrained backbone weights, if it says so)."""
    return GigaXT(config)


class RegionTokens(nn.Module):
    """Loaded regions to tokens of the context's width, and feature maps for dense heads; both cut to the core."""

    def __init__(self, config: ModelConfig, *, maps: bool) -> None:
        super().__init__()
        self.encoder = RegionEncoder(config.region_encoder, maps=maps)
        self.norm = nn.LayerNorm(self.encoder.dim)
        self.project = nn.Linear(self.encoder.dim, config.context.dim)
        levels = len(config.input.overview)
        self.level = nn.Embedding(1 + levels, config.context.dim) if levels else None
        region, halo, side = config.region_encoder.region, config.input.halo, self.encoder.tokens_per_side
        if side * halo % region:
            raise ConfigError(
                f"input.halo: {halo} px are {side * halo / region:g} tokens of {region // side} px, not whole ones"
            )
        self.halo_tokens, self.halo_px = side * halo // region, halo
        self.tokens_per_core = side - 2 * self.halo_tokens

    def forward(self, loaded: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `SceneBatch.load` for `loaded`.

        Returns:
            tokens (n, t * t, dim), row by row; feature maps (n, c_i, h_i, w_i), fine to coarse.
        """
        tokens, maps = self.encoder(self._network_input(loaded))
        k = self.halo_tokens
        if k:
            tokens = tokens[:, k:-k, k:-k]
            cuts = [self.halo_px // stride for stride in self.encoder.map_strides]
            maps = [m[:, :, cut:-cut, cut:-cut] for m, cut in zip(maps, cuts, strict=True)]
        tokens = self.project(self.norm(tokens.flatten(1, 2)))  # (n, t, t, dim) -> (n, t * t, dim)
        if self.level is not None:
            tokens = tokens + self.level(loaded["level"])[:, None]
        return tokens, tuple(maps)

    def _network_input(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """(n, h, w, C) as stored -> (n, C, h, w) normalised, zeros where not valid. A view: channels stay last."""
        dtype = self.norm.weight.dtype
        scale, shift = (loaded[key].to(dtype)[:, None, None] for key in ("scale", "shift"))
        x = torch.where(loaded["valid"], loaded["pixels"].to(dtype) * scale + shift, 0)
        return x.permute(0, 3, 1, 2)


class _TokensOnly(nn.Module):
    def __init__(self, encode: RegionTokens) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, loaded: Mapping[str, Tensor]) -> Tensor:
        return self.encode(loaded)[0]  # type: ignore[no-any-return]  # nn.Module calls are untyped


class _Logits(nn.Module):
    """Regions' maps and context to class logits of their cores."""

    def __init__(self, head: SegmentHead, tokens_per_core: int) -> None:
        super().__init__()
        self.head, self.t = head, tokens_per_core

    def forward(self, maps: Sequence[Tensor], context: Tensor, targets: object = None) -> tuple[Tensor]:
        return (self.head(maps, context.unflatten(1, (self.t, self.t))),)  # (n, t * t, dim) -> (n, t, t, dim)


class _LossSums(_Logits):
    """The same, to the sums that the loss over all scenes is made of."""

    def forward(self, maps: Sequence[Tensor], context: Tensor, targets: Any = None) -> tuple[Tensor, ...]:  # type: ignore[override]  # sums instead of logits
        (logits,) = super().forward(maps, context)
        return self.head.loss_sums(logits, targets["target"], targets["valid"])


class RegionAnswer(NamedTuple):
    """One region of a predicted scene; see `GigaXT.predict_regions`."""

    x: int
    y: int
    logits: Tensor
    valid: NDArray[np.bool_]


class GigaXT(nn.Module):
    """A vision model for images of any size, trained end to end with exact gradients.

    `model(images)` answers, `model(images, targets)` is the scalar loss. Regions stream from disk; `streaming` says
    what is kept of them for the backward pass.

    Attributes:
        config: what it was built from.
        streaming: chunk size and budgets; not part of the model, may be changed at any time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.streaming = Streaming()
        self.dense = config.head.kind == "segment"
        self.encode = RegionTokens(config, maps=self.dense)
        self.context = build_context(config.context)
        encoder = self.encode.encoder
        self.head = build_head(config.head, config.context.dim, encoder.map_channels, encoder.map_strides)
        key_dropout(self)

    def forward(
        self, images: Sequence[Image] | Tensor, targets: Any = None, *, seed: int | None = None
    ) -> Tensor | list[Tensor]:
        """Answers, or with targets their loss.

        Args:
            images: Images of any sizes, or a normalised float tensor (B, C, H, W).
            targets: classification: B class numbers (or (B, classes) labels or numbers); segmentation: B masks
                (Images, or integer arrays or tensors (H, W)) on the grids of the images.
            seed: of dropout and stochastic depth; None draws one from PyTorch's default generator.

        Returns:
            Without targets, classification: (B, classes) logits. Segmentation: logits (B, classes, H, W) for a tensor,
            a list of (classes, H, W) for Images (whole scenes in memory: use `gigaxt.predict` for large ones);
            regions without data have zeros.
            With targets: a scalar, the mean loss.

        Raises:
            DataError: images or targets that do not fit the model. ImageError: a file that cannot be read.
        """
        if isinstance(images, Image):
            raise DataError("expected a list of Images, got one Image: model([image])")
        seed = draw_seed() if seed is None else seed
        if targets is None:
            return self._masks(images, seed) if self.dense else self._classify(images, seed)
        if not self.dense:
            logits = self._classify(images, seed)
            return self._classify_head.loss(logits, self._labels(targets, logits))
        loss, weight, _ = self._segment_sums(images, targets, seed, linear=True)
        return (loss / weight.clamp(min=torch.finfo(weight.dtype).tiny)).to(_loss_dtype(self.encode))

    def loss(self, images: Sequence[Image] | Tensor, targets: Any, *, seed: int | None = None) -> Tensor:
        """The mean loss, as `model(images, targets)`."""
        loss: Tensor = self(images, targets, seed=seed)
        return loss

    @torch.no_grad()
    def evaluate(self, images: Sequence[Image] | Tensor, targets: Any) -> dict[str, Tensor]:
        """Loss and what metrics are made of.

        Returns:
            Classification: logits (B, classes), loss. Segmentation: loss_sum, weight_sum, and confusion (classes,
            classes) with the true class as row; float64 sums over all pixels that count.
        """
        if self.dense:
            sums = self._segment_sums(images, targets, seed=0, linear=False)
            return dict(zip(("loss_sum", "weight_sum", "confusion"), sums, strict=True))
        logits = self._classify(images, seed=0)
        return {"logits": logits, "loss": self._classify_head.loss(logits, self._labels(targets, logits))}

    @torch.no_grad()
    def predict_regions(self, batch: SceneBatch) -> Iterator[RegionAnswer]:
        """Logits of one scene, region by region, row by row; memory does not grow with the scene but for its tokens.

        Args:
            batch: of one scene, from `model.batch([image])`; its `scenes[0].image` is the image as the model sees it,
                in its bands and at its pixel size.

        Yields:
            x and y of the region's core in px of that image, logits (classes, h, w) cut at the image's border, and
            valid (h, w), False where the image has no data. Regions without data are left out.
        """
        encode = _TokensOnly(self.encode)
        tokens = stream(encode, batch.load, self._all_chunks(batch), seed=0)
        context = self._join(batch, tokens[: batch.full_size], tokens[batch.full_size :])
        decode = _Logits(self._segment_head, self.encode.tokens_per_core)
        reader = Reader(batch.load, tokens.device, 0)
        halo = self.config.input.halo
        for rows in reader.rows(batch.chunks(self.streaming.chunk_regions)):
            for part, (logits,) in reader.run(
                rows, lambda part: decode(self.encode(part.loaded)[1], part.of([context])[0])
            ):
                for i, answer in enumerate(logits):
                    scene, _, place = batch.places[part.start + i]
                    x, y, w, h = batch.scenes[scene].grid.core_xywh(place)
                    valid = part.loaded["valid"][i].any(dim=2)[halo : halo + h, halo : halo + w]
                    yield RegionAnswer(x, y, answer[:, :h, :w], valid.cpu().numpy())

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`; see `gigaxt.load`."""
        from gigaxt.pretrained import save  # pretrained builds models: a cycle at import

        save(self, folder)

    @property
    def _classify_head(self) -> ClassifyHead:
        assert isinstance(self.head, ClassifyHead)
        return self.head

    @property
    def _segment_head(self) -> SegmentHead:
        assert isinstance(self.head, SegmentHead)
        return self.head

    def batch(self, images: Sequence[Image] | Tensor, targets: Sequence[Image] | None = None) -> SceneBatch:
        """Scenes as this model sees them, cut into its regions. See `SceneBatch`."""
        encoder = self.config.region_encoder
        return SceneBatch(
            images,
            self.config.input,
            region=encoder.region,
            channels=encoder.in_channels,
            tokens_per_core=self.encode.tokens_per_core,
            targets=targets,
        )

    def _all_chunks(self, batch: SceneBatch) -> list[Any]:
        n = self.streaming.chunk_regions
        return [*batch.chunks(n), *batch.overview_chunks(n)]

    def _classify(self, images: Sequence[Image] | Tensor, seed: int) -> Tensor:
        batch = self.batch(images)
        encode = _TokensOnly(self.encode)
        tokens = stream(encode, batch.load, self._all_chunks(batch), seed=seed, streaming=self.streaming)
        answers: dict[int, Tensor] = {}
        for group in _alike(batch):
            rows, coords, valid = self._tokens_of(batch, group, tokens.device)
            joined, _ = self.context(_gather(tokens, rows), coords, valid)
            answers.update(zip(group, self._classify_head(joined, valid), strict=True))
        return torch.stack([answers[scene] for scene in range(len(batch.scenes))])

    def _segment_sums(
        self, images: Sequence[Image] | Tensor, targets: Any, seed: int, *, linear: bool
    ) -> tuple[Tensor, ...]:
        batch = self.batch(images, [_as_mask(target) for target in targets])
        decode = _LossSums(self._segment_head, self.encode.tokens_per_core)
        return self._decode(batch, decode, batch.load_targets, "sum", linear, seed)

    def _masks(self, images: Sequence[Image] | Tensor, seed: int) -> Tensor | list[Tensor]:
        batch = self.batch(images)
        decode = _Logits(self._segment_head, self.encode.tokens_per_core)
        (logits,) = self._decode(batch, decode, None, "cat", False, seed)
        stitched = []
        for s, scene in enumerate(batch.scenes):
            grid, core = scene.grid, scene.grid.core
            whole = logits.new_zeros(grid.rows, grid.cols, *logits.shape[1:])
            rows = [row for row, place in enumerate(batch.places[: batch.full_size]) if place[0] == s]
            places = torch.tensor([batch.places[row][2][:2] for row in rows])
            whole = whole.index_put((places[:, 0], places[:, 1]), logits[rows])
            # (rows, cols, classes, core, core) -> (classes, rows * core, cols * core)
            image = whole.permute(2, 0, 3, 1, 4).reshape(-1, grid.rows * core, grid.cols * core)
            stitched.append(image[:, : scene.image.height, : scene.image.width])
        return torch.stack(stitched) if isinstance(images, Tensor) else stitched

    def _decode(
        self, batch: SceneBatch, decode: nn.Module, load_targets: Any, reduce: Any, linear: bool, seed: int
    ) -> tuple[Tensor, ...]:
        chunk = self.streaming.chunk_regions
        coarse = batch.overview_chunks(chunk)
        overview: Tensor | None = None
        if coarse:
            encode = _TokensOnly(self.encode)
            overview = stream(encode, batch.load, coarse, seed=seed, streaming=self.streaming)
        return stream_nested(
            self.encode,
            lambda tokens: self._join(batch, tokens, tokens[:0] if overview is None else overview),
            decode,
            batch.load,
            batch.chunks(chunk),
            load_targets=load_targets,
            reduce=reduce,
            linear=linear,
            seed=seed,
            streaming=self.streaming,
        )

    def _join(self, batch: SceneBatch, tokens: Tensor, overview: Tensor) -> Tensor:
        """Tokens of the regions of full size (regions, t * t, dim), and of the overviews', to the former's context."""
        everything = torch.cat([tokens, overview]) if len(overview) else tokens
        parts: list[Tensor] = []
        order: list[Tensor] = []
        for group in _alike(batch):
            rows, coords, valid = self._tokens_of(batch, group, tokens.device)
            joined, _ = self.context(_gather(everything, rows), coords, valid)
            joined = joined.unflatten(1, (rows.shape[1], -1)).flatten(0, 1)  # (b, N, dim) -> (b * regions, t * t, dim)
            full = rows.flatten() < len(tokens)
            parts.append(joined[full] if len(overview) else joined)
            order.append(rows.flatten()[full])
        if len(parts) == 1 and _in_order(order[0]):
            return parts[0]
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _tokens_of(self, batch: SceneBatch, group: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of scenes with equal grids: rows (b, regions), coords (b, N, 2) and validity (b, N) of their tokens."""
        rows = torch.stack([batch.rows_of(scene) for scene in group])
        coords = torch.from_numpy(batch.scenes[group[0]].grid.token_coords(self.encode.tokens_per_core)).flatten(0, 1)
        valid = batch.token_validity[rows].flatten(1)
        return rows.to(device), coords.expand(len(group), -1, -1).to(device), valid.to(device)

    def _labels(self, targets: Any, logits: Tensor) -> Tensor:
        if isinstance(targets, Sequence):
            targets = np.asarray([np.asarray(target) for target in targets])
        return torch.as_tensor(targets, device=logits.device)


def _alike(batch: SceneBatch) -> Iterator[list[int]]:
    """Scenes with the same regions at the same places, whose contexts are computed as one batch."""
    groups: dict[Any, list[int]] = {}
    for s, scene in enumerate(batch.scenes):
        grid = scene.grid
        groups.setdefault((grid.rows, grid.cols, grid.places), []).append(s)
    yield from groups.values()


def _gather(tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens (regions, t * t, dim) of scenes whose regions are `rows` (b, regions): (b, N, dim), a view if possible."""
    ordered = rows.numel() == len(tokens) and _in_order(rows.flatten())
    return (tokens.unflatten(0, rows.shape) if ordered else tokens[rows]).flatten(1, 2)


def _in_order(rows: Tensor) -> bool:
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))


def _as_mask(target: Any) -> Image:
    if isinstance(target, Image):
        return target
    array = target.detach().cpu().numpy() if isinstance(target, Tensor) else np.asarray(target)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"expected a mask (H, W) of integer classes, got {array.dtype} {array.shape}")
    return open_image(array)


def _loss_dtype(module: nn.Module) -> torch.dtype:
    return torch.promote_types(next(module.parameters()).dtype, torch.float32)
