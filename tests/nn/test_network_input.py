"""What a region encoder's network is given of loaded pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny_models import segmenter


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_each_band_of_each_region_is_scaled_and_what_was_loaded_stays(dtype: torch.dtype, turned: bool) -> None:
    model, random = segmenter(bands=2).double(), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64, 2), generator=random).to(dtype)
    pixels = pixels.transpose(1, 2).flip(1) if turned else pixels
    loaded = {
        "pixels": pixels,
        "scale": torch.rand(3, 2, dtype=torch.float64, generator=random),
        "shift": torch.rand(3, 2, dtype=torch.float64, generator=random),
        "valid": torch.rand(3, 64, 64, 1, generator=random) > 0.1,
        "level": torch.zeros(3, dtype=torch.int64),
    }
    before = {name: tensor.clone() for name, tensor in loaded.items()}
    seen: list[Tensor] = []
    model.encode.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model.encode(loaded)
    scale, shift = (loaded[name][:, :, None, None] for name in ("scale", "shift"))
    expected = (pixels.permute(0, 3, 1, 2) * scale + shift) * loaded["valid"].permute(0, 3, 1, 2)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.items())
