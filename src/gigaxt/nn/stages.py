"""The parts of a model that stream: loaded regions to tokens and maps, maps and context to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from gigaxt.errors import ConfigError
from gigaxt.nn.heads.dense import DenseHead, MapsHead
from gigaxt.nn.ready import check_answers, check_encoded, check_sums
from gigaxt.nn.region_encoder import RegionEncoder

if TYPE_CHECKING:
    from gigaxt.nn.xt import ModelConfig


class RegionTokens(nn.Module):
    """Loaded regions to tokens of the context's width, cut to the core, and whole feature maps for dense heads.

    Args:
        config: of the model.
        maps: give feature maps, for a dense head.
        encoder: a ready region encoder in place of the config's (see `gigaxt.build_model`).

    Attributes:
        tokens_per_core: t, tokens along a side of a region's core.
        tokens_with_halo: tokens along a side of a region.
        halo_tokens: k, tokens along the halo.
        halo_px: the same in px.

    Raises:
        ConfigError: the halo is no whole number of tokens.
    """

    def __init__(self, config: ModelConfig, *, maps: bool, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.maps, self.region = maps, config.region_encoder.region
        self.encoder = cast(
            RegionEncoder, RegionEncoder(config.region_encoder, maps=maps) if encoder is None else encoder
        )
        self.norm: nn.Module = nn.LayerNorm(self.encoder.dim)
        self.project: nn.Module = nn.Linear(self.encoder.dim, config.context.dim)
        levels = len(config.input.overview)
        self.level = nn.Embedding(1 + levels, config.context.dim) if levels else None
        region, halo, side = config.region_encoder.region, config.input.halo, self.encoder.tokens_per_side
        if side * halo % region:
            raise ConfigError(
                f"input.halo: {halo} px are {side * halo / region:g} tokens of {region // side} px, not whole ones"
            )
        self._fixed: list[nn.Module] = []
        self.halo_tokens, self.halo_px = side * halo // region, halo
        self.tokens_per_core, self.tokens_with_halo = side - 2 * self.halo_tokens, side

    def forward(self, loaded: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `SceneBatch.load` for `loaded`.

        Returns:
            tokens (n, t * t, dim) of the cores, row by row; feature maps (n, c_i, h_i, w_i) of the regions with their
            halos, fine to coarse.
        """
        features, maps = self.features(loaded)
        return self.embed(features, loaded["level"]), maps

    @property
    def frozen(self) -> bool:
        """Whether nothing of the encoder learns."""
        return bool(self._fixed) and not any(p.requires_grad for p in self.encoder.parameters())

    def fix(self, modules: list[nn.Module]) -> None:
        """Let parts of the encoder behave as in evaluation from now on; see `gigaxt.nn.freezing`."""
        self._fixed = modules
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of every module, but for the fixed parts."""
        super().train(mode)
        for module in self._fixed:
            module.training = False
        return self

    def features(self, loaded: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the encoder makes of regions: (n, t * t, encoder.dim) of their cores, and feature maps."""
        pixels = self._network_input(loaded)
        found = self.encoder(pixels)
        check_encoded(found, self.encoder, len(pixels), self.region, self.maps)
        k = self.halo_tokens
        tokens = found[0][:, k:-k, k:-k] if k else found[0]
        return tokens.flatten(1, 2), tuple(found[1]) if self.maps else ()  # (n, t, t, dim) -> (n, t * t, dim)

    def embed(self, features: Tensor, level: Tensor) -> Tensor:
        """Features (n, t * t, encoder.dim) of regions of levels (n,) to tokens (n, t * t, dim)."""
        tokens: Tensor = self.project(self.norm(features))
        return tokens if self.level is None else tokens + self.level(level.to(tokens.device))[:, None]

    def _network_input(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """(n, h, w, C) as stored -> (n, C, h, w) normalised, zeros where not valid. A view: channels stay last."""
        x, dtype = loaded["pixels"], next(self.parameters()).dtype
        if "scale" in loaded:
            width = x.shape[2]
            # Row by row and in place: on a CPU several times as fast as bands by bands into new memory.
            x = x.to(dtype, copy=True).flatten(2)  # (n, h, w, C) -> (n, h, w * C)
            scale, shift = (loaded[key].to(dtype).repeat(1, width)[:, None] for key in ("scale", "shift"))
            out = None if x.requires_grad else x
            x = torch.addcmul(shift, x, scale, out=out).unflatten(2, (width, -1))
        x = x.to(dtype)
        if "valid" in loaded:
            x = x.masked_fill(~loaded["valid"], 0)
        return x.permute(0, 3, 1, 2)  # (n, h, w, C) -> (n, C, h, w)


class _Frozen(nn.Module):
    """A part of the encoder whose parameters are those of the backbone alone, of which none learns.

    Norm and projection of the tokens, which do learn, stay outside of the stream: see `RegionTokens.embed`.
    """

    def __init__(self, encode: RegionTokens) -> None:
        super().__init__()
        self.encoder, self._features = encode.encoder, encode.features


class FrozenMaps(_Frozen):
    """Loaded regions to a frozen encoder's features and maps."""

    def forward(self, loaded: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `RegionTokens.features`."""
        return self._features(loaded)


class Features(_Frozen):
    """The same, without the maps."""

    def forward(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """(n, t * t, encoder.dim)."""
        return self._features(loaded)[0]


class TokensOnly(nn.Module):
    """Loaded regions to tokens, without their maps."""

    def __init__(self, encode: RegionTokens) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """(n, t * t, dim); see `RegionTokens`."""
        tokens: Tensor = self.encode(loaded)[0]
        return tokens


class Answers(nn.Module):
    """Regions' maps and context to a dense head's answers for their cores.

    The head decodes regions with their halos, and what it says of these is cut off: what it pads, upsamples and
    interpolates at a core's border is its neighbours' maps and context, not zeros.

    Args:
        head: a dense one.
        encode: where maps and tokens come from.

    Raises:
        ConfigError: a halo that is no whole number of a map's cells.
    """

    def __init__(self, head: MapsHead, encode: RegionTokens) -> None:
        super().__init__()
        self.head, self.side, self.shapes = head, encode.tokens_with_halo, head.shapes(encode.region)
        self.cuts = [encode.halo_px * side // encode.region for _, side, _ in self.shapes]
        for cut, (_, side, _) in zip(self.cuts, self.shapes, strict=True):
            if cut * encode.region != encode.halo_px * side:
                raise ConfigError(
                    f"input.halo: {encode.halo_px} px are no whole number of the head's cells of "
                    f"{encode.region // side} px"
                )

    def forward(self, maps: Sequence[Tensor], context: Tensor, targets: object = None) -> tuple[Tensor, ...]:
        """Maps (n, channels, side, side), one or several; `targets` are not used."""
        answers = self._answers(maps, context)
        return (answers,) if isinstance(answers, Tensor) else answers

    def _answers(self, maps: Sequence[Tensor], context: Tensor) -> Tensor | tuple[Tensor, ...]:
        # (n, side * side, dim) -> (n, side, side, dim)
        found = self.head(maps, context.unflatten(1, (self.side, self.side)))
        check_answers(found, len(context), self.shapes)
        if not any(self.cuts):
            return cast("Tensor | tuple[Tensor, ...]", found)
        if isinstance(found, Tensor):
            return _core(found, self.cuts[0])
        return tuple(_core(answer, cut) for answer, cut in zip(found, self.cuts, strict=True))


class LossSums(Answers):
    """The same, to the sums that the loss over all scenes is made of."""

    def forward(self, maps: Sequence[Tensor], context: Tensor, targets: Any = None) -> tuple[Tensor, ...]:
        """See `DenseHead.loss_sums`, and `SceneBatch.load_targets` for `targets`."""
        sums = cast(DenseHead, self.head).loss_sums(self._answers(maps, context), targets)
        check_sums(sums)
        return sums


def _core(answer: Tensor, cut: int) -> Tensor:
    """(n, channels, side, side) without `cut` cells at each border."""
    return answer[:, :, cut : answer.shape[2] - cut, cut : answer.shape[3] - cut]
