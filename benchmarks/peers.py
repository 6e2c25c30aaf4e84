"""What `bench_peers.py` compares: a training step and the segmentation of a scene, each by gigaxt and by its peers.

Every contender is a function from the path of a TIFF to the step that is timed. It runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gigaxt
from gigaxt.nn.stages import Answers

Step = Callable[[], Any]
REGION, CHUNK, CLASSES, OVERLAP = 256, 4, 4, 64
OPTIONS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
"""A small ConvNeXt. Of the first version, since the second normalises over whole maps, which no tile knows."""
LIGHTSTREAM_TILE = 2048
"""px, of which its backward pass uses the middle 1,280; of 1,024 px, 256."""


def build(head: dict[str, Any]) -> gigaxt.GigaXT:
    """A gigaxt model without context: what the peers have no counterpart of is left out."""
    torch.manual_seed(0)
    config = {
        "region_encoder": {"name": "convnext_atto", "region": REGION, "options": OPTIONS},
        "context": {"kind": "none", "dim": 64},
        "head": head,
    }
    return gigaxt.build_model(gigaxt.ModelConfig.from_dict(config))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("convnext_atto", num_classes=CLASSES, **OPTIONS).train()
    network(torch.zeros(1, 3, REGION, REGION)).sum().backward()  # loads what the first use of a library loads
    network.zero_grad()
    return network


def whole(path: Path) -> Tensor:
    """The image in memory, (1, 3, H, W), 0 to 1."""
    image = gigaxt.open_image(path)
    pixels = torch.from_numpy(image.read(0, 0, image.width, image.height))
    return pixels.permute(2, 0, 1)[None].float() / 255


# A training step: from the file, or from regions in memory, to the gradient of every weight.


def train_floor(path: Path) -> Step:
    """The bare network on regions that lie in memory, a chunk at a time; nothing is read, nothing kept."""
    network = backbone()
    x = whole(path)
    # (1, C, rows * region, cols * region) -> (rows * cols, C, region, region)
    regions = x.unflatten(2, (-1, REGION)).unflatten(4, (-1, REGION)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    chunks = regions.contiguous().split(CHUNK)

    def step() -> None:
        for chunk in chunks:
            F.cross_entropy(network(chunk), torch.ones(len(chunk), dtype=torch.long)).backward()

    return step


def train_whole(path: Path) -> Step:
    """The network on the whole image."""
    network = backbone()
    return lambda: F.cross_entropy(network(whole(path)), torch.tensor([1])).backward()


def train_checkpointed(path: Path) -> Step:
    """The same with timm's gradient checkpointing."""
    network = backbone()
    network.set_grad_checkpointing(True)
    return lambda: F.cross_entropy(network(whole(path)), torch.tensor([1])).backward()


def train_lightstream(path: Path) -> Step:
    """The network's convolutions streamed by lightstream; normalisation frozen, as its trainer does."""
    from lightstream.core.constructor import StreamingConstructor
    from lightstream.core.utils import freeze_normalization_layers
    from lightstream.models.convnext.convnext import _set_layer_gamma

    network = backbone()
    constructor = StreamingConstructor(
        nn.Sequential(network.stem, network.stages),
        LIGHTSTREAM_TILE,
        verbose=False,
        normalize_on_gpu=False,
        before_streaming_init_callbacks=[_set_layer_gamma],
    )
    constructor.statistics_on_cpu = False  # True would move the network to a GPU afterwards, False at once
    with contextlib.redirect_stdout(io.StringIO()):
        streaming = constructor.prepare_streaming_model()
    freeze_normalization_layers(streaming)

    def step() -> None:
        x = whole(path)
        maps = streaming(x).requires_grad_()
        F.cross_entropy(network.head(maps), torch.tensor([1])).backward()
        streaming.backward(x, maps.grad)

    return step


def train_gigaxt(path: Path) -> Step:
    """gigaxt, read lazily, nothing kept."""
    model = build({"kind": "classify", "classes": CLASSES}).train()
    model.streaming = gigaxt.Streaming(budget_gib=0.0, chunk_regions=CHUNK)
    model.loss(torch.zeros(1, 3, REGION, REGION), [1]).backward()  # loads what the first use of a library loads
    model.zero_grad()
    return lambda: model.loss([gigaxt.open_image(path)], [1]).backward()


# Segmentation: from the file to a file of classes, windows of 256 px that overlap by a quarter.


class Windows(nn.Module):
    """The network of a gigaxt model without context, as any window-by-window tool calls it."""

    def __init__(self, model: gigaxt.GigaXT) -> None:
        super().__init__()
        self.model, self.decode = model, Answers(model.head, model.encode)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 256, 256), 0 to 1 -> logits (n, classes, 256, 256)."""
        level = torch.zeros(len(x), dtype=torch.long)
        tokens, maps = self.model.encode({"pixels": x.permute(0, 2, 3, 1), "level": level})
        n = self.model.encode.tokens_per_core
        coords = torch.cartesian_prod(torch.arange(n), torch.arange(n)).float().expand(len(x), -1, -1)
        context, _ = self.model.context(tokens, coords, torch.ones(tokens.shape[:2], dtype=torch.bool))
        return self.decode(maps, context)[0]


def segmenter() -> gigaxt.GigaXT:
    return build({"kind": "segment", "classes": CLASSES, "dim": 16}).eval()


def checked_windows() -> Windows:
    """The network, which must answer as the model does."""
    model = segmenter()
    windows, x = Windows(model), torch.rand(2, 3, REGION, REGION)
    with torch.no_grad():
        torch.testing.assert_close(windows(x), model(x))
    return windows


def write_classes(path: Path, classes: np.ndarray) -> None:
    """A tiled, compressed TIFF."""
    import tifffile

    tifffile.imwrite(path, classes, tile=(256, 256), compression="zlib")


def predict_gigaxt(path: Path) -> Step:
    """gigaxt.predict: blended, streamed in and out."""
    model, out = segmenter(), path.with_suffix(".mask.tif")
    model.streaming = gigaxt.Streaming(chunk_regions=CHUNK)
    gigaxt.predict(model, gigaxt.open_image(np.zeros((REGION, REGION, 3), np.uint8)), out)  # loads libraries
    return lambda: gigaxt.predict(model, path, out, overlap=OVERLAP)


def predict_monai(path: Path) -> Step:
    """MONAI's sliding_window_inference, blended, on the image in memory."""
    from monai.inferers import sliding_window_inference

    windows = checked_windows()

    @torch.no_grad()
    def step() -> None:
        logits = sliding_window_inference(whole(path), REGION, CHUNK, windows, OVERLAP / REGION, mode="gaussian")
        assert isinstance(logits, Tensor)
        write_classes(path.with_suffix(".mask.tif"), logits[0].max(0).indices.to(torch.uint8).numpy())

    return step


def predict_sahi(path: Path) -> Step:
    """SAHI's slice_image, the network on each slice, classes pasted (by us: SAHI joins objects, not maps)."""
    from sahi.slicing import slice_image

    windows = checked_windows()

    @torch.no_grad()
    def step() -> None:
        share = OVERLAP / REGION
        sliced = slice_image(
            str(path),
            slice_height=REGION,
            slice_width=REGION,
            overlap_height_ratio=share,
            overlap_width_ratio=share,
        )
        classes = np.zeros((sliced.original_image_height, sliced.original_image_width), np.uint8)
        every = sliced.sliced_image_list
        for start in range(0, len(every), CHUNK):
            some = every[start : start + CHUNK]
            x = torch.from_numpy(np.stack([one.image for one in some])).permute(0, 3, 1, 2).float() / 255
            for one, found in zip(some, windows(x).max(1).indices.numpy(), strict=True):
                left, top = one.starting_pixel
                classes[top : top + REGION, left : left + REGION] = found
        write_classes(path.with_suffix(".mask.tif"), classes)

    return step


CONTENDERS: dict[str, dict[str, Callable[[Path], Step]]] = {
    "train": {
        "floor": train_floor,
        "whole": train_whole,
        "checkpointed": train_checkpointed,
        "lightstream": train_lightstream,
        "gigaxt": train_gigaxt,
    },
    "predict": {"monai": predict_monai, "sahi": predict_sahi, "gigaxt": predict_gigaxt},
}
NEEDS = {"lightstream": ("lightstream", "lightning"), "monai": ("monai",), "sahi": ("sahi",)}
"""What must be installed; none of it is a dependency of gigaxt."""
