"""The composition, read top to bottom: regions -> region encoder -> tokens -> context encoder -> head.

Gupta, Li, Zhu, Malik, Darrell, Mangalam: xT: Nested Tokenization for Larger Context in Large Images (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gigaxt.config import from_dict
from gigaxt.errors import ConfigError, DataError
from gigaxt.nn.all_tokens import all_tokens
from gigaxt.nn.context import ContextConfig
from gigaxt.nn.context.base import NoContext
from gigaxt.nn.heads import ClassifyHead, HeadConfig
from gigaxt.nn.heads.classify import as_labels
from gigaxt.nn.heads.dense import DenseHead, MapsHead
from gigaxt.nn.heads.scene import SceneHead
from gigaxt.nn.layout import cases_alike, gather, in_order, stitched, token_places, with_halo
from gigaxt.nn.ready import NONE_READY, Ready, check_context_output, check_logits
from gigaxt.nn.region_answers import RegionAnswer, region_answers
from gigaxt.nn.region_encoder import RegionEncoderConfig
from gigaxt.nn.sections import build_sections
from gigaxt.nn.stages import Answers, FrozenMaps, LossSums, TokensOnly
from gigaxt.scenes.batch import Chunk, SceneBatch
from gigaxt.scenes.cases import Cases, check_list
from gigaxt.scenes.inputs import InputConfig
from gigaxt.streaming.keyed import key_dropout
from gigaxt.streaming.nested import stream_nested
from gigaxt.streaming.replay import draw_seed
from gigaxt.streaming.rows import Reduce, at_least_float32
from gigaxt.streaming.single import Streaming, stream
from gigaxt.targets.base import SceneTarget, target_for
from gigaxt.token_cache import TokenCache


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


def build_model(
    config: ModelConfig,
    *,
    region_encoder: nn.Module | None = None,
    context: nn.Module | None = None,
    head: nn.Module | None = None,
) -> GigaXT:
    """The model that `config` describes, freshly initialised (or with pretrained backbone weights, if it says so).

    A ready module takes the place of what its section would build. Of that section only what surrounds the module
    counts then: `region` and `in_channels`, `dim`, the head's `kind` and `classes`. Each must be a pure function of its
    arguments, parameters and constant buffers; its dropout is replaced in place by `key_dropout`.

    Args:
        config: the whole model.
        region_encoder: `forward(pixels (n, in_channels, region, region)) -> (tokens (n, t, t, dim), feature maps)`,
            each region on its own. Attributes: `dim`, and `tokens_per_side`, the t. Maps (n, c, h, w) are for dense
            heads, fine to coarse; then also `map_channels` and `map_strides` in px.
        context: `forward(tokens (B, N, dim), coords (B, N, 2) as (row, col), validity (B, N)) -> (tokens, state)`, such
            as a ContextEncoder. `dim`, or `config.dim`, if it has one, is `config.context.dim`.
        head: of kind classify: `forward(context (B, N, dim), validity (B, N)) -> logits (B, classes)` and
            `loss(logits, targets) -> scalar`. Of a dense kind: what `gigaxt.nn.heads.dense.DenseHead` says (of kind
            mask_rcnn `gigaxt.nn.heads.scene.SceneHead`); of kind segment logits (n, classes, region, region).

    Raises:
        ConfigError: settings that do not go together, or a ready module that lacks something.
    """
    return GigaXT(config, Ready(region_encoder, context, head))


class GigaXT(nn.Module):
    """A vision model for images of any size, trained end to end with exact gradients.

    `model(images)` answers, `model(images, targets)` is the scalar loss. Regions stream from disk; `streaming` says
    what is kept of them for the backward pass.

    Attributes:
        config: what it was built from.
        ready: sections whose modules were given ready (see `build_model`), each with the name of the module's class.
        streaming: chunk size and budgets. Not part of the model, like the next two: may be changed at any time.
        grad_share: share of a step's regions that a classifier's region encoder learns from, drawn from the seed and
            weighted: the gradient's mean over many draws is the exact one. 1: all, the exact gradient.
        token_cache: keeps the features of a classifier's frozen encoder (`gigaxt.nn.freezing.freeze`); None: nothing.
        dense: whether the head answers for places (masks, boxes, points), not for whole cases.
    """

    def __init__(self, config: ModelConfig, ready: Ready = NONE_READY) -> None:
        super().__init__()
        self.config, self.ready = config, ready.names()
        self.streaming = Streaming()
        self.grad_share = 1.0
        self.token_cache: TokenCache | None = None
        self.dense = config.head.kind != "classify"
        self.encode, self.context, self.head = build_sections(config, ready)
        key_dropout(self)

    def forward(self, images: Cases | SceneBatch, targets: Any = None, *, seed: int | None = None) -> Any:
        """Answers, or with targets their loss.

        Args:
            images: Images of any sizes, or a normalised float tensor (B, C, H, W). Classification: a list of Images in
                place of one is a case with one answer: each has a context of its own, the head pools all their tokens.
                Or what `prepare` made of them and the same targets.
            targets: classification: B class numbers (or (B, classes) labels or numbers, or (B, 2) times and events).
                Dense heads: B SceneTargets, or what the head's `as_target` takes, on the grids of the images; of a
                segmentation masks (Images, or integer arrays or tensors (H, W)). With a `WindowTarget` only its window
                counts in the loss: the rest of the scene is encoded for the context, without a gradient.
            seed: of dropout and stochastic depth; None draws one from PyTorch's default generator.

        Returns:
            With targets: a scalar, the mean loss. Without, by the kind of the head:
            classify: logits (B, classes).
            segment: logits (B, classes, H, W) for a tensor, a list of (classes, H, W) for Images; zeros in regions that
            are left out. All of it is in memory: for large scenes use `gigaxt.predict`.
            detect, points: the head's maps likewise; of several maps a tuple of tensors, or a list of tuples.
            mask_rcnn: a list of what is found in each image, see `MaskRCNNHead.scene_answer`.

        Raises:
            DataError: images or targets that do not fit the model. ImageError: a file that cannot be read.
        """
        check_list(images)
        seed = draw_seed() if seed is None else seed
        if targets is None:
            return self._dense_answers(images, seed) if self.dense else self._classify(images, seed)
        if not self.dense:
            logits = self._classify(images, seed)
            return self._classify_head.loss(logits, as_labels(targets, logits.device))
        if isinstance(self.head, SceneHead):
            losses = self._scene_losses(images, targets, seed)
            return torch.stack(list(losses.values())).sum().to(self._loss_dtype)
        sums = self._sums(images, targets, seed, linear=self._dense_head.linear)
        return self._dense_head.loss(sums).to(self._loss_dtype)

    def loss(self, images: Cases | SceneBatch, targets: Any, *, seed: int | None = None) -> Tensor:
        """The mean loss, as `model(images, targets)`."""
        loss: Tensor = self(images, targets, seed=seed)
        return loss

    @torch.no_grad()
    def evaluate(self, images: Cases | SceneBatch, targets: Any) -> dict[str, Tensor]:
        """Loss and what metrics are made of, without a gradient; arguments and errors as of `forward`.

        Returns:
            Classification: `logits` (B, classes) and `loss`. Dense: what the head's `scores` gives; of a segmentation
            `loss`, `weight_sum`, and `confusion` (classes, classes) with the true class as row, or `counts` or
            `moments`. mask_rcnn: `loss`, and by name the parts that it is the sum of.
        """
        if isinstance(self.head, SceneHead):
            losses = self._scene_losses(images, targets, seed=0)
            return {"loss": torch.stack(list(losses.values())).sum(), **losses}
        if self.dense:
            return self._dense_head.scores(self._sums(images, targets, seed=0, linear=False))
        logits = self._classify(images, seed=0)
        return {"logits": logits, "loss": self._classify_head.loss(logits, as_labels(targets, logits.device))}

    def predict_regions(self, batch: SceneBatch) -> Iterator[RegionAnswer]:
        """A dense head's answers for one scene, region by region, row by row, without a gradient.

        Memory grows with the scene's tokens alone. Each region is encoded twice, for its tokens and, once the context
        is known, for its feature maps; once only where the budgets of `streaming` hold the maps, or `regions_apart`.

        Args:
            batch: of one scene, from `model.batch([image])`; its `scenes[0].image` is the image as the model sees it,
                in its bands and at its pixel size.

        Yields:
            A `RegionAnswer` for each region that is not left out.
        """
        return region_answers(self, batch)

    @property
    def regions_apart(self) -> bool:
        """Whether a region's answer depends on its own pixels alone: without a context, and without a halo."""
        return type(self.context) is NoContext and not self.config.input.halo

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`; see `gigaxt.load`."""
        from gigaxt.pretrained import save  # pretrained builds models: a cycle at import

        save(self, folder)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _loss_dtype(self) -> torch.dtype:
        return at_least_float32(next(self.encode.parameters()).dtype)

    @property
    def _classify_head(self) -> ClassifyHead:
        return cast(ClassifyHead, self.head)  # or a ready module that offers the same

    @property
    def _dense_head(self) -> DenseHead:
        return cast(DenseHead, self.head)

    def prepare(self, images: Cases, targets: Any = None) -> SceneBatch:
        """What `forward` begins with, for it to be called with later: scenes cut into regions, the first chunk read.

        To be called in a thread while the device computes the step before; `forward` then has nothing to wait for.
        Arguments and errors are those of `forward`; a gradient is not computed.
        """
        check_list(images)
        batch = self.batch(images, None if targets is None or not self.dense else self._scene_targets(targets))
        if self.grad_share == 1 and self.token_cache is None:  # else another chunk may be the first, or none is read
            first = batch.first_chunk(self.streaming.chunk_regions, whole=not self.dense)
            batch.load_ahead(first, self.streaming.readers, self._device)
        return batch

    def batch(self, images: Cases | SceneBatch, targets: Sequence[SceneTarget] | None = None) -> SceneBatch:
        """Scenes as this model sees them, cut into its regions; a batch that is one already. See `SceneBatch`."""
        encoder = self.config.region_encoder
        if isinstance(images, SceneBatch):
            if (images.config, images.region) != (self.config.input, encoder.region):
                raise DataError("expected a batch that this model prepared, got one of a model with another input")
            if targets is not None and any(scene.target is None for scene in images.scenes):
                raise DataError("expected a batch that was prepared with its targets, got one without")
            return images
        return SceneBatch(
            images,
            self.config.input,
            region=encoder.region,
            channels=encoder.in_channels,
            tokens_per_core=self.encode.tokens_per_core,
            targets=targets,
        )

    def _tokens(self, batch: SceneBatch, rows: Sequence[int], seed: int) -> Tensor:
        share, cache = self.grad_share, self.token_cache
        return all_tokens(self.encode, batch, rows, seed=seed, streaming=self.streaming, grad_share=share, cache=cache)

    def _classify(self, images: Cases | SceneBatch, seed: int) -> Tensor:
        batch = self.batch(images)
        tokens = self._tokens(batch, range(len(batch.places)), seed)
        answers: dict[int, Tensor] = {}
        for group in cases_alike(batch):
            parts = []
            for scenes in zip(*(batch.cases[case] for case in group), strict=True):  # the first image of each case, ...
                rows, coords, valid = token_places(batch, list(scenes), tokens.device)
                parts.append((self._context_of(gather(tokens, rows), coords, valid), valid))
            # A case's images one after the other: (b, N of all, dim). Not copied where there is only one.
            context, valid = parts[0] if len(parts) == 1 else (torch.cat(part, 1) for part in zip(*parts, strict=True))
            logits = self._classify_head(context, valid)
            check_logits(logits, (len(group), self.config.head.classes))
            answers.update(zip(group, logits, strict=True))
        return torch.stack([answers[case] for case in range(len(batch.cases))])

    def _sums(self, images: Cases | SceneBatch, targets: Any, seed: int, *, linear: bool) -> tuple[Tensor, ...]:
        head = self._dense_head
        batch = self.batch(images, self._scene_targets(targets))

        def load_targets(chunk: Chunk) -> dict[str, Tensor]:
            targets = batch.load_targets(chunk)
            # A ready head need not be a `DenseHead`; on a CPU the loss itself looks.
            if self._device.type != "cpu" and hasattr(head, "check_targets"):
                head.check_targets(targets)
            return targets

        return self._decode(batch, LossSums(head, self.encode), load_targets, "sum", linear, seed)

    def _dense_answers(self, images: Cases | SceneBatch, seed: int) -> Any:
        batch = self.batch(images)
        if isinstance(self.head, SceneHead):
            self.head.check_fits(batch.scenes, self._device, training=False)
            sizes = [(scene.image.height, scene.image.width) for scene in batch.scenes]
            return [self.head.scene_answer(*found) for found in zip(self._scene_maps(batch, seed), sizes, strict=True)]
        scenes = self._scene_maps(batch, seed)
        if isinstance(images, Tensor):
            stacked = tuple(torch.stack(same) for same in zip(*scenes, strict=True))
            return stacked[0] if len(stacked) == 1 else stacked
        return [scene[0] for scene in scenes] if len(scenes[0]) == 1 else scenes

    def _scene_maps(self, batch: SceneBatch, seed: int) -> list[tuple[Tensor, ...]]:
        """What the head makes of all regions, stitched: the maps of each scene."""
        maps = self._decode(batch, Answers(cast(MapsHead, self.head), self.encode), None, "cat", False, seed)
        return [tuple(stitched(batch, s, answers) for answers in maps) for s in range(len(batch.scenes))]

    def _scene_losses(self, images: Cases | SceneBatch, targets: Any, seed: int) -> dict[str, Tensor]:
        """Parts of the loss by name, each the mean over the scenes."""
        head = cast(SceneHead, self.head)
        batch = self.batch(images, self._scene_targets(targets))
        head.check_fits(batch.scenes, self._device, training=torch.is_grad_enabled())
        found = [
            head.scene_losses(maps, (scene.image.height, scene.image.width), cast(SceneTarget, scene.target), seed + i)
            for i, (scene, maps) in enumerate(zip(batch.scenes, self._scene_maps(batch, seed), strict=True))
        ]
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def _decode(
        self,
        batch: SceneBatch,
        decode: nn.Module,
        load_targets: Callable[[Chunk], dict[str, Tensor]] | None,
        reduce: Reduce,
        linear: bool,
        seed: int,
    ) -> tuple[Tensor, ...]:
        """What `decode` makes of the regions that are answered for, with their context; see `stream_nested`."""
        if len(batch.cases) < len(batch.scenes):
            raise DataError("expected one image a mask; several images as one case are for classification")
        if self.grad_share < 1:
            raise ConfigError("grad_share: a dense head learns from every region; set it to 1")
        frozen, others = self.encode.frozen, self._tokens_beside(batch, seed)

        def join(found: Tensor) -> Tensor:
            tokens = self.encode.embed(found, batch.levels_of(range(len(found)))) if frozen else found
            return self.join(batch, tokens, torch.cat(others) if others else tokens[:0])

        return stream_nested(
            FrozenMaps(self.encode) if frozen else self.encode,
            join,
            decode,
            batch.load,
            batch.chunks(self.streaming.chunk_regions),
            load_targets=load_targets,
            reduce=reduce,
            linear=linear,
            seed=seed,
            streaming=self.streaming,
        )

    def _tokens_beside(self, batch: SceneBatch, seed: int) -> list[Tensor]:
        """Tokens of the regions that are context only: those beside the targets' windows, then the overviews'."""
        chunk, found = self.streaming.chunk_regions, list[Tensor]()
        if beside := batch.chunks_beside(chunk):
            # What the context makes of them is learnt; how they are encoded is learnt where they are in a window.
            with torch.no_grad():
                found.append(stream(TokensOnly(self.encode), batch.load, beside, seed=seed, streaming=self.streaming))
        if coarse := batch.overview_chunks(chunk):
            found.append(self._tokens(batch, range(coarse[0].start, coarse[-1].stop), seed))
        return found

    def join(self, batch: SceneBatch, tokens: Tensor, others: Tensor) -> Tensor:
        """The context of the regions that are answered for, halos included.

        Args:
            batch: whose regions.
            tokens: of those that are answered for, (regions, t * t, dim), in the order of the batch.
            others: of the rest, likewise, which is context only.

        Returns:
            (regions, side * side, dim), side = t + 2 * `halo_tokens`; zeros where the scene has no token.
        """
        everything = torch.cat([tokens, others]) if len(others) else tokens
        parts: list[Tensor] = []
        order: list[Tensor] = []
        for group in cases_alike(batch):
            rows, coords, valid = token_places(batch, group, tokens.device)
            context = self._context_of(gather(everything, rows), coords, valid)
            grid = batch.scenes[group[0]].grid
            context = with_halo(context, grid, self.encode.tokens_per_core, self.encode.halo_tokens)
            rows = rows[:, : context.shape[1]]  # without the overviews'
            answered = rows.flatten() < len(tokens)
            context = context.flatten(0, 1)  # (b, regions, side * side, dim) -> (b * regions, side * side, dim)
            parts.append(context if answered.all() else context[answered])
            order.append(rows.flatten()[answered])
        if len(parts) == 1 and in_order(order[0]):
            return parts[0]
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _context_of(self, tokens: Tensor, coords: Tensor, valid: Tensor) -> Tensor:
        """The context of tokens (b, N, dim), in their order; a classifier's may be fewer tokens, a summary."""
        found = self.context(tokens, coords, valid)
        check_context_output(found, tokens, all_of_them=self.dense)
        return cast(Tensor, found[0])

    def _scene_targets(self, targets: Sequence[Any]) -> list[SceneTarget]:
        if isinstance(self.head, SceneHead):
            return [self.head.as_target(target) for target in targets]
        return [target_for(self._dense_head, target) for target in targets]
