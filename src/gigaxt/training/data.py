"""Which images a step sees, in which order, with which random changes: pure functions of the run's seed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gigaxt.amounts import amount
from gigaxt.augment import colour_augmented, dihedral, draw_augmentation, draw_crop
from gigaxt.datasets.row import Case, Row
from gigaxt.errors import ConfigError, DataError, ImageError
from gigaxt.image.base import Image
from gigaxt.image.open import open_image
from gigaxt.image.views import Cropped
from gigaxt.randaugment import RandAugmented, draw_operations
from gigaxt.targets.base import SceneTarget
from gigaxt.tasks import Classification, Task
from gigaxt.training.config import AugmentConfig
from gigaxt.training.windows import Windows

Skipped = dict[str, str] | None
"""Images that cannot be read (path -> reason), whose samples are left out; None: such an image is an error."""
OPEN_IMAGES = 32
"""Images whose headers are kept parsed (and files open) between epochs."""


def derive_seed(*parts: int | str) -> int:
    """A seed from 0 to 2**63 - 1 that depends on all parts and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def epoch_order(seed: int, epoch: int, count: int, weights: Sequence[float] | None = None) -> NDArray[np.int64]:
    """Indices of the samples of an epoch in the order in which they are seen, (count,).

    Args:
        seed: of the run.
        epoch: from 0.
        count: samples in the training split.
        weights: chance of each sample; drawn with repetition. None: each sample once.
    """
    random = np.random.default_rng(derive_seed(seed, "order", epoch))
    if weights is None:
        return random.permutation(count)
    chances = np.asarray(weights, dtype=np.float64)
    return random.choice(count, size=count, p=chances / chances.sum())


def balanced_weights(task: Task) -> list[float]:
    """The chance of each training case, such that every class that occurs is drawn equally often.

    Raises:
        ConfigError: the cases do not have one class each.
    """
    if not isinstance(task, Classification):
        raise ConfigError("train.sampling balanced needs a label for each image, and these have masks")
    counts = task.class_counts("train")
    return [1.0 / counts[task.manifest.class_indices(case[0])[0]] for case in task.manifest.cases("train")]


class Sample(NamedTuple):
    """The images of a case with its target, ready for the model."""

    case: Case
    images: tuple[Image, ...]
    target: Any

    @property
    def given(self) -> Image | list[Image]:
        """What the model is given: the image, or the list of several."""
        return self.images[0] if len(self.images) == 1 else list(self.images)


class Samples:
    """The cases of one split, opened when asked.

    Args:
        cases: of the manifest.
        task: makes the targets.
        windows: draws the part of a scene that `augmented` gives; None: all of it.
        verify_sha256: compare files with the manifest's digests when they are first opened.
        rgb: see `InputConfig.rgb`.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        task: Task,
        *,
        verify_sha256: bool = False,
        rgb: bool = False,
        windows: Windows | None = None,
    ) -> None:
        self.cases, self.task, self.verify_sha256, self.rgb = list(cases), task, verify_sha256, rgb
        self.windows = windows
        self._verified: set[int] = set()
        self._open: OrderedDict[int, tuple[Image, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def size(self) -> str:
        """How many, in words."""
        count = sum(map(len, self.cases))
        images = amount(count, "image")
        return images if count == len(self) else f"{amount(len(self), 'case')} of {images}"

    def plain(self, index: int) -> Sample:
        """The sample as it is on disk.

        Raises:
            ImageError: an image cannot be opened, or is not the file that the manifest's digest describes.
            DataError: the target does not fit.
        """
        case = self.cases[index]
        opened = [self._opened(row) for row in case]
        return Sample(case, tuple(image for image, _ in opened), opened[0][1])

    def augmented(self, index: int, seed: int, config: AugmentConfig) -> Sample:
        """The sample with the random changes that `seed` draws, others for each image; raises as `plain`."""
        case, images, target = self.plain(index)
        if self.windows is not None:  # dense: there is one image
            image, target = self.windows.take(index, images[0], target, seed)
            images = (image,)
        if not config.changes:
            return Sample(case, images, target)
        changed = []
        for i, image in enumerate(images):
            own_seed = derive_seed(seed, i) if i else seed
            k, gain, offset = draw_augmentation(
                own_seed, image.channels, dihedral=config.dihedral, mirror=config.mirror, colour=config.colour
            )
            window = (
                None if config.crop_area is None else draw_crop(image.height, image.width, own_seed, config.crop_area)
            )
            image = dihedral(image if window is None else Cropped(image, *window), k)
            if isinstance(target, SceneTarget):  # dense: there is one image
                target = (target if window is None else target.cropped(*window)).turned(k)
            if config.randaugment is not None:
                image = RandAugmented(image, draw_operations(own_seed, config.randaugment))
            changed.append(colour_augmented(image, gain, offset) if config.colour else image)
        return Sample(case, tuple(changed), target)

    def _opened(self, row: Row) -> tuple[Image, Any]:
        """An image and its target; those used last are kept open."""
        if row.line not in self._open:
            if self.verify_sha256 and row.line not in self._verified:
                self._verify(row)
                self._verified.add(row.line)
            image = open_image(row.image, rgb=self.rgb)
            self._open[row.line] = (image, self.task.target(row, image))
            if len(self._open) > OPEN_IMAGES:
                self._open.popitem(last=False)
        self._open.move_to_end(row.line)
        return self._open[row.line]

    def _verify(self, row: Row) -> None:
        try:
            self.task.manifest.verify(row)
        except DataError as error:  # `on_bad_image` decides about damaged files, as about unreadable ones
            raise ImageError(row.image, str(error)) from error


def failed_sample(samples: Sequence[Sample], error: ImageError) -> tuple[int, Row] | None:
    """Whose image or target an error is about: its place in `samples` and its row; None: something else failed."""
    for position, (case, images, target) in enumerate(samples):
        for row, image in zip(case, images, strict=True):
            if error.path in {
                str(row.image),
                image.name,
                str(row.target_path),
                target.name if isinstance(target, SceneTarget) else "",
            }:
                return position, row
    return None


def open_samples(wanted: Iterable[tuple[Case, Callable[[], Sample]]], skipped: Skipped) -> list[Sample]:
    """The samples that can be opened. Where one image of a case cannot be read, the whole case is left out.

    Args:
        wanted: cases, each with what opens it.
        skipped: cases with an image in here (by path) are left out, and images that fail are added; None: failing
            raises.
    """
    opened = []
    for case, open_one in wanted:
        if skipped is not None and any(str(row.image) in skipped for row in case):
            continue
        try:
            opened.append(open_one())
        except ImageError as error:
            if skipped is None:
                raise
            names = [str(row.image) for row in case]
            skipped[error.path if error.path in names else names[0]] = str(error)
    return opened


def without_failed(group: list[Sample], error: ImageError, skipped: Skipped) -> list[Sample]:
    """`group` without the case that `error` is about, whose image is noted in `skipped`.

    Raises:
        ImageError: the error itself, where nothing may be skipped (`skipped` is None) or it is about no case.
    """
    found = failed_sample(group, error)
    if skipped is None or found is None:
        raise error
    position, row = found
    skipped[str(row.image)] = str(error)
    return group[:position] + group[position + 1 :]


def with_names(error: DataError, group: list[Sample]) -> DataError:
    """The error with the images' names ahead of it, where it names none of them."""
    names = [image.name for sample in group for image in sample.images]
    if any(name in str(error) for name in names):
        return error
    return DataError(f"{', '.join(names)}: {error}")
