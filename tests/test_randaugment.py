from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image as Pillow
from timm.data.auto_augment import AugmentOp, RandAugment, rand_augment_transform

from gigaxt.augment import dihedral, resample_below, resize_below
from gigaxt.errors import ConfigError, DataError
from gigaxt.image import Image, open_image
from gigaxt.image.resize import resize
from gigaxt.randaugment import FILL, OPERATIONS, Operation, RandAugmented, draw_operations

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def whole(image: Image) -> np.ndarray:
    return image.read(0, 0, image.width, image.height)


@pytest.mark.parametrize("magnitude", [0, 3.3, 9, 9.9])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_timms(name: str, magnitude: float, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.1 if sign > 0 else 0.9)  # timm's coin
    hparams = {"img_mean": FILL, "interpolation": Pillow.Resampling.BILINEAR}
    theirs = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(Pillow.fromarray(PIXELS))
    argument = OPERATIONS[name]
    operation = Operation(name, None if argument is None else argument(magnitude / 10, sign))
    np.testing.assert_array_equal(whole(RandAugmented(open_image(PIXELS), (operation,))), np.asarray(theirs))


def test_timm_draws_from_the_same_operations() -> None:
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert isinstance(theirs, RandAugment)
    assert [op.name for op in theirs.ops] == list(OPERATIONS)
    assert (theirs.num_layers, theirs.ops[0].prob, theirs.ops[0].magnitude_std) == (2, 0.5, 0.5)


def test_draws_are_those_of_the_seed_and_cover_all() -> None:
    assert draw_operations(7, 9.0) == draw_operations(7, 9.0)
    drawn = [draw_operations(seed, 9.0) for seed in range(3000)]
    counts = Counter(map(len, drawn))
    assert [counts[n] / 3000 for n in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names = Counter(operation.name for operations in drawn for operation in operations)
    assert min(names[name] for name in OPERATIONS) > 130  # 200 are expected
    turns = [op.argument for ops in drawn for op in ops if op.name == "Rotate" and op.argument is not None]
    assert np.mean(np.abs(turns)) == pytest.approx(27, abs=0.3)
    assert np.std(np.abs(turns)) == pytest.approx(1.4, abs=0.4)  # half a magnitude, cut off at 10
    assert np.mean(np.sign(turns)) == pytest.approx(0, abs=0.2)
    for operations in drawn:  # magnitude 10 too, which timm's own posterize would not survive
        whole(RandAugmented(open_image(PIXELS[:4, :4]), operations))


def test_windows_are_parts_of_the_whole_and_changed_once() -> None:
    operations = (Operation("Rotate", 20.0), Operation("Equalize", None))
    view = RandAugmented(open_image(PIXELS), operations)
    full = whole(view)
    assert (full != PIXELS).any()
    np.testing.assert_array_equal(view.read(5, 7, 20, 11), full[7:18, 5:25])
    np.testing.assert_array_equal(whole(pickle.loads(pickle.dumps(view))), full)
    assert view.name != view.base.name
    view.read(0, 0, 1, 1)[:] = 0
    np.testing.assert_array_equal(whole(view), full)


def test_sizes_are_changed_below() -> None:
    operations = (Operation("Rotate", 20.0),)
    view = RandAugmented(dihedral(open_image(PIXELS), 5), operations)
    small = resize_below(view, 20, 30)
    assert isinstance(small, RandAugmented)
    expected = RandAugmented(dihedral(resize(open_image(PIXELS), 30, 20), 5), operations)
    np.testing.assert_array_equal(whole(small), whole(expected))
    assert isinstance(resample_below(view, 2, 2), RandAugmented)


def test_other_images_are_refused() -> None:
    for pixels in (PIXELS[..., 0], PIXELS.astype(np.uint16), np.dstack([PIXELS, PIXELS])):
        with pytest.raises(DataError, match="RandAugment is for RGB of 8 bits without nodata"):
            RandAugmented(open_image(pixels), ())
    with pytest.raises(DataError, match="without nodata"):
        RandAugmented(open_image(PIXELS, nodata=0), ())
    large = open_image(np.broadcast_to(np.zeros(3, np.uint8), (4097, 4097, 3)))
    with pytest.raises(DataError, match="expected at most 16777216 px, got 4097 x 4097"):
        RandAugmented(large, ()).read(0, 0, 1, 1)
    for seed, magnitude in ((-1, 9.0), (0, 10.1), (0, -1.0), (0, float("nan"))):
        with pytest.raises(ConfigError, match="RandAugment: expected a seed from 0 and a magnitude from 0 to 10"):
            draw_operations(seed, magnitude)
