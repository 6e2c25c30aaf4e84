"""Which samples make a run's heaviest step and its heaviest evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from gigaxt.errors import DataError
from gigaxt.image.open import open_image
from gigaxt.nn.xt import GigaXT, ModelConfig
from gigaxt.regions import RegionGrid
from gigaxt.scenes.inputs import to_pixel_size, to_size
from gigaxt.targets.base import SceneTarget
from gigaxt.training.data import Sample, Samples, derive_seed, open_samples
from gigaxt.training.loop import Run

CANDIDATES = 4
"""Samples of most pixels whose regions are counted exactly, with foreground and nodata, for each sample of a step."""


def count_regions(sample: Sample, config: ModelConfig) -> int:
    """Regions of a sample's images by their sizes alone: as if all had data and were foreground."""
    total = 0
    for image in sample.images:
        seen, _ = to_size(*to_pixel_size(image, config.input), config.input)
        grid = RegionGrid(
            seen.height,
            seen.width,
            config.region_encoder.region,
            halo=config.input.halo,
            overview=tuple(config.input.overview),
            order="raster",
        )
        total += len(grid)
    return total


def training_sizes(run: Run) -> dict[int, int]:
    """Regions of the training samples, by index, without those that cannot be opened and may be skipped.

    Raises:
        DataError: none can be opened. ImageError: one cannot, and `on_bad_image` is `stop`.
    """
    sizes = _sizes(run, run.train_samples)
    if not sizes:
        reason = next(iter(run.state.skipped.values()), "there is none")
        raise DataError(f"{run.task.manifest.path}: none of the training images can be opened; the first: {reason}")
    return sizes


def mean_regions(run: Run, sizes: Mapping[int, int]) -> float:
    """Regions of a training sample; of random windows (`crop_area`) those of the mean area, which is drawn evenly."""
    crop = run.settings.augment.crop_area
    share = 1.0 if crop is None or run.config.model.input.resize_px is not None else (crop + 1) / 2
    return share * sum(sizes.values()) / len(sizes)


def heaviest_step(run: Run, sizes: Mapping[int, int], given: Sequence[Sample]) -> list[Sample]:
    """The samples of most regions that a forward pass may see together, changed as in training but not cropped.

    Args:
        run: whose step it is.
        sizes: of `training_sizes`.
        given: samples of images that take the place of the manifest's; none: those of the manifest.
    """
    samples, settings = run.train_samples, run.settings
    count = min(settings.batch, run.steps.samples_per_epoch)
    if given:
        chosen = [given[i % len(given)] for i in range(count)]
        return [_window(samples, sample, i) for i, sample in enumerate(chosen)]
    candidates = sorted(sizes, key=lambda i: -sizes[i])[: CANDIDATES * count]
    if run.config.model.input.foreground is not None or len(candidates) > count:
        model = cast(GigaXT, run.model)
        exact = {i: len(model.batch([samples.plain(i).given]).places) for i in candidates}
        candidates.sort(key=lambda i: -exact[i])
    drawn = [i for i in candidates for _ in range(settings.windows_per_scene)][:count]
    whole = replace(settings.augment, crop_area=None)
    return [samples.augmented(i, derive_seed(settings.seed, "plan", i, k), whole) for k, i in enumerate(drawn)]


def heaviest_evaluation(run: Run, given: Sequence[Sample]) -> list[Sample]:
    """The samples of most regions that are evaluated together, which are whole; `given` as of `heaviest_step`."""
    samples = run.val_samples if len(run.val_samples) else run.train_samples
    count = min(run.task.images_per_call or run.settings.batch, len(samples))
    if given:
        return [given[i % len(given)] for i in range(count)]
    sizes = _sizes(run, samples)
    return [samples.plain(i) for i in sorted(sizes, key=lambda i: -sizes[i])[:count]]


def given_samples(run: Run, paths: Sequence[str], like: int) -> list[Sample]:
    """Samples of images that are in no manifest yet, the largest first.

    Args:
        run: of the samples.
        paths: of the images.
        like: index of the training sample whose target they get, stretched to their sizes.
    """
    case, _, target = run.train_samples.plain(like)
    opened = [open_image(path, rgb=run.config.model.input.rgb) for path in paths]
    opened.sort(key=lambda image: -image.height * image.width)
    return [
        Sample(
            case[:1],
            (image,),
            target.resized(image.width, image.height) if isinstance(target, SceneTarget) else target,
        )
        for image in opened
    ]


def _window(samples: Samples, sample: Sample, seed: int) -> Sample:
    """A window of a sample, where the run trains on windows."""
    if samples.windows is None:
        return sample
    image, target = samples.windows.take(len(samples) + seed, sample.images[0], sample.target, seed)
    return Sample(sample.case, (image,), target)


def _sizes(run: Run, samples: Samples) -> dict[int, int]:
    return {i: count_regions(sample, run.config.model) for i, sample in _opened(run, samples)}


def _opened(run: Run, samples: Samples) -> Iterator[tuple[int, Sample]]:
    """Those that can be opened, one after the other."""
    for index, case in enumerate(samples.cases):
        for sample in open_samples([(case, partial(samples.plain, index))], run.skipped):
            yield index, sample
