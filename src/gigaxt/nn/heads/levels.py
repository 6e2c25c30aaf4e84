"""What dense heads are made of: feature maps that the context steers, and classifiers that the context makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError

FILM_GAIN = 0.3
"""Standard deviation of scale and shift at the start: enough to pass gradients, too little to drown the features."""
RANK = 16
"""Features of a place that its context makes a classifier for."""


class Level(nn.Module):
    """One feature map joins the decoder, scaled and shifted by the context at its place (FiLM).

    Args:
        channels: of the feature map.
        context_dim: channels of the context.
        dim: channels of the decoder.
    """

    def __init__(self, channels: int, context_dim: int, dim: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(channels, dim, 1)
        self.norm = PixelNorm(dim)
        self.film = nn.Conv2d(context_dim, 2 * dim, 1)
        nn.init.normal_(self.film.weight, std=FILM_GAIN * context_dim**-0.5)  # its input has a variance of one
        nn.init.zeros_(self.film.get_parameter("bias"))
        self.fuse = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), PixelNorm(dim), nn.GELU())

    def forward(self, features: Tensor, context: Tensor, coarser: Tensor | None) -> Tensor:
        """Features (n, channels, h, w), context (n, context_dim, rows, cols), the coarser level's result or None."""
        size = features.shape[2:]
        # The 1 x 1 convolution first: it commutes with the interpolation and is far cheaper on the token lattice.
        scale, shift = resize(self.film(context), size).chunk(2, dim=1)  # (n, dim, h, w) each
        x = F.gelu(self.norm(self.lateral(features)) * (1.0 + scale) + shift)
        if coarser is not None:
            x = x + resize(coarser, size)
        y: Tensor = self.fuse(x)
        return y


def chosen_strides(wanted: Sequence[int] | None, map_strides: Sequence[int], kind: str) -> list[int]:
    """The strides of the feature maps that answer: those that `head.strides` names, or all.

    Raises:
        ConfigError: there are no maps, or not those.
    """
    if not map_strides:
        raise ConfigError(f"head: {kind} needs the feature maps of the region encoder; build it with `maps=True`")
    strides = list(map_strides if wanted is None else wanted)
    if not strides or strides != [stride for stride in map_strides if stride in strides]:
        raise ConfigError(f"head.strides: expected some of {list(map_strides)}, fine to coarse, got {strides}")
    return strides


def joined_levels(
    levels: Iterable[nn.Module], maps: Sequence[Tensor], context: Tensor, answering: Sequence[bool]
) -> list[Tensor]:
    """Maps joined from coarse to fine by a `Level` each; those that answer, fine to coarse.

    Args:
        levels: fine to coarse, as the others.
        maps: (n, c_i, h_i, w_i) each.
        context: (n, context_dim, rows, cols), of the same area.
        answering: which are given back.
    """
    x: Tensor | None = None
    joined: list[Tensor] = []
    for level, features, answers in reversed(list(zip(levels, maps, answering, strict=True))):
        x = level(features, context, x)
        if answers:
            joined.append(x)
    return joined[::-1]


class ContextClassifier(nn.Module):
    """Logits of places from their features and their context.

    The sum of three: a classifier of the features, the same everywhere; a vote of the context through one linear layer,
    for what does not depend on the place (with it `beacon` is learnt in a fraction of the steps); and a classifier
    whose weights the context makes for its place (dynamic filters, De Brabandere et al. 2016), applied to `RANK`
    features of the place, for what lies in the relation of the two. Neither factor of that product starts at zero, so
    the relation has a gradient from the first step on; through FiLM alone `legend` stays on its plateau for some seeds.

    Args:
        dim: channels of the features.
        context_dim: channels of the context.
        classes: logits.
    """

    def __init__(self, dim: int, context_dim: int, classes: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(dim, classes, 1)
        self.vote = nn.Conv2d(context_dim, classes, 1, bias=False)
        nn.init.normal_(self.vote.weight, std=FILM_GAIN * context_dim**-0.5)
        self.features = nn.Conv2d(dim, RANK, 1)
        nn.init.normal_(self.features.weight, std=dim**-0.5)
        self.make_classifier = nn.Conv2d(context_dim, classes * RANK, 1, bias=False)
        nn.init.normal_(self.make_classifier.weight, std=context_dim**-0.5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Features (n, dim, h, w) and context (n, context_dim, rows, cols) to logits (n, classes, h, w)."""
        logits: Tensor = self.shared(x) + self.relate(x, context) + resize(self.vote(context), x.shape[2:])
        return logits

    def relate(self, x: Tensor, context: Tensor) -> Tensor:
        """The part of the logits that lies in the relation of the two."""
        # (n, classes * RANK, rows, cols) -> (n, classes, RANK, h, w)
        weights = resize(self.make_classifier(context), x.shape[2:]).unflatten(1, (-1, RANK))
        logits: Tensor = (weights * self.features(x).unsqueeze(1)).sum(2) * RANK**-0.5
        return logits


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n, c, h, w), at each place alone."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.LayerNorm` of (n, h, w, c)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, cell centres kept in place."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=list(size), mode="bilinear")
