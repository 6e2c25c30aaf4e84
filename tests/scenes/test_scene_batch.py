"""What a batch of scenes gives the region encoder: windows, what normalises them, and which tokens are real."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gigaxt import open_image
from gigaxt.nn.stages import RegionTokens
from gigaxt.nn.xt import ModelConfig
from gigaxt.scenes.batch import SceneBatch
from gigaxt.scenes.inputs import InputConfig
from gigaxt.streaming.prefetch import read_ahead

HEIGHT, WIDTH = 80, 140


def numbered() -> Tensor:
    """(2, 3, 80, 140): the number of each value; 3 x 5 regions of 32 px, the last row and column padded."""
    return torch.arange(2 * 3 * HEIGHT * WIDTH, dtype=torch.float64).view(2, 3, HEIGHT, WIDTH) + 1


def batch(images: Tensor | list[object], halo: int = 0) -> SceneBatch:
    return SceneBatch(
        images,
        InputConfig(halo=halo),
        region=32 + 2 * halo,
        channels=3,
        tokens_per_core=2,
    )


@pytest.mark.parametrize("halo", [0, 32])
def test_windows_of_a_tensor(halo: int) -> None:
    """Against padding and cutting all of it at once; a tensor is the network's input, so nothing else comes along."""
    images = numbered()
    padded = torch.nn.functional.pad(images, (halo, 160 - WIDTH + halo, halo, 96 - HEIGHT + halo))
    size = 32 + 2 * halo
    # (B, C, rows, cols, h, w) -> (B * rows * cols, h, w, C)
    expected = padded.unfold(2, size, 32).unfold(3, size, 32).permute(0, 2, 3, 4, 5, 1).flatten(0, 2)
    scenes = batch(images, halo)
    for chunk in scenes.chunks(7):
        loaded = scenes.load(chunk)
        assert loaded.keys() == {"pixels", "level"}
        assert torch.equal(loaded["pixels"], expected[chunk.start : chunk.stop])
    # Tokens of 16 px: 5 x 9 of 6 x 10 touch the image of 80 x 140 px.
    valid = scenes.token_validity.view(2, 3, 5, 2, 2).permute(0, 1, 3, 2, 4).reshape(2, 6, 10)
    real = torch.zeros(6, 10, dtype=torch.bool)
    real[:5, :9] = True
    assert torch.equal(valid, real.expand(2, 6, 10))


def test_images_say_what_is_not_valid_only_where_something_is_not() -> None:
    pixels = numbered()[0].permute(1, 2, 0).to(torch.float32).numpy().copy()
    pixels[40:60, 50:60] = -1
    scenes = batch([open_image(pixels, nodata=-1)])
    by_region = [scenes.load(chunk) for chunk in scenes.chunks(1)]
    lacking = {i for i, loaded in enumerate(by_region) if "valid" in loaded}
    assert lacking == {6, *range(10, 15), 4, 9}  # nodata lies in region (1, 1); the last row and column are padded
    assert not by_region[6]["valid"][0, 8:28, 18:28].any()
    assert by_region[6]["valid"][..., 0].sum() == 32 * 32 - 20 * 10
    together = scenes.load(scenes.chunks(15)[0])
    for i in range(15):
        alone = by_region[i].get("valid", torch.ones(1, 32, 32, 1, dtype=torch.bool))
        assert torch.equal(together["valid"][i : i + 1], alone.expand(-1, -1, -1, together["valid"].shape[-1]))


def test_the_same_input_from_a_tensor_and_from_pixels() -> None:
    """Normalised by hand and given as a tensor, or normalised by the model."""
    config = ModelConfig.from_dict(
        {
            "region_encoder": {
                "name": "convnextv2_atto",
                "region": 32,
                "options": {"depths": [1, 1, 1, 1], "dims": [8] * 4},
            },
            "context": {"dim": 16, "kind": "none"},
            "head": {"kind": "classify", "classes": 2},
        }
    )
    encode = RegionTokens(config, maps=False).double()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ready = torch.from_numpy(pixels).double().permute(2, 0, 1)[None] / 255
    found = []
    for images in (ready, [open_image(pixels)]):
        scenes = batch(images)
        found.append(torch.cat([encode._network_input(scenes.load(chunk)) for chunk in scenes.chunks(4)]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-15)
    assert found[0].shape == (15, 3, 32, 32)


def test_only_the_hosts_tensors_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch cannot pin what is on a device already, such as a batch that was given on the GPU."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    monkeypatch.setattr("gigaxt.streaming.prefetch.to_device", lambda loaded, device: loaded)
    on_host, on_device = torch.zeros(1), torch.zeros(1, device="meta")
    found = list(read_ahead(lambda chunk: {"a": on_host, "b": on_device, "c": 3}, [0, 1], torch.device("cuda")))
    assert len(found) == 2
    assert len(pinned) == 2
    assert all(t is on_host for t in pinned)
