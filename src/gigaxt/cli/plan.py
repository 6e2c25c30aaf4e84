"""`gigaxt plan`: memory, disk and time of a run, before it starts; `--fit` writes settings that fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gigaxt.cli.flags import parse
from gigaxt.cli.progress import clock_text
from gigaxt.errors import ConfigError

if TYPE_CHECKING:
    from gigaxt.streaming.rows import Streaming
    from gigaxt.training.config import RunConfig
    from gigaxt.training.plan import Plan
    from gigaxt.training.rehearsal import Found


WORTH_BFLOAT16 = 0.8
"""Share of the time from which on bfloat16 is recommended: less is not worth its rounding."""


@dataclass(kw_only=True)
class PlanArguments:
    """What a run will need: memory, disk, time. Trains two real steps on the images of most regions, and keeps nothing.

    $ gigaxt plan run.yaml                  the images of the config's CSV
    $ gigaxt plan run.yaml larger.tif       images to come
    $ gigaxt plan run.yaml --fit            also writes the chunk and the budget that are best here into run.yaml
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A run's YAML file."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = ()
    """Images in place of those of the config's CSV; the largest counts."""
    fit: bool = False
    """Rehearse the settings that would be chosen, too, and write them into CONFIG."""
    out: Path = Path("runs")
    """Where the run's folder will be: its disk must have room."""
    cache: Path | None = None
    """In place of the config's `data.cache`: a folder on a fast disk for local copies of what is read of the images."""
    cache_gib: float | None = None
    """In place of the config's `data.cache_gib`."""


def main(args: Sequence[str]) -> int:
    """Print the table; exit status 0, or 1 where the run does not fit."""
    arguments = parse(PlanArguments, args, verb="plan", switches=True)

    from gigaxt.cli.train import run_config_from
    from gigaxt.machine import free_disk_gib, what_closes
    from gigaxt.training.config_edit import check_writable, write_streaming
    from gigaxt.training.plan import make_plan

    if not os.path.isfile(arguments.config):  # noqa: PTH113  # Path.is_file raises where its folder is closed
        raise ConfigError(f"{arguments.config}: expected a run's YAML file (gigaxt check data.csv --write run.yaml)")
    for image in arguments.images:
        if not os.path.exists(image):  # noqa: PTH110  # Path.exists raises where its folder is closed
            raise ConfigError(f"{image}: there is no such image, or its folder is closed to this user")
    if arguments.fit:
        check_writable(arguments.config)  # now, not after what may take hours
    given = {"--cache": arguments.cache, "--cache-gib": arguments.cache_gib}
    flags = [f"--data.{name[2:]}={value}" for name, value in given.items() if value is not None]
    config = run_config_from(flags, None, str(arguments.config), arguments.out)
    written = {"--out": arguments.out, "train.token_cache": config.train.token_cache}
    for name, folder in written.items():
        if folder is not None and (closed := what_closes(Path(folder))):
            raise ConfigError(f"{name}: {folder}: expected a folder that can be written, {closed}; name another one")
    if sys.stderr.isatty():  # with large scenes it takes long
        print("rehearsing the heaviest step and evaluation, in a process of its own", file=sys.stderr, flush=True)
    plan = make_plan(config, arguments.images)
    free = free_disk_gib(arguments.out)
    print("\n".join(table(plan, config, free)))
    if plan.choice is not None and arguments.fit and plan.found is not None:
        if not worth_changing(plan):
            print(f"- {arguments.config} has the best settings already")
        else:
            fitted = replace(config, train=replace(config.train, streaming=plan.choice))
            again = make_plan(fitted, arguments.images, probe=False)
            print("\n".join(["", *table(again, fitted, free)]))
            if again.fits:
                write_streaming(arguments.config, plan.choice)
                print(f"- written into {arguments.config}: {spelled(plan.choice)}")
            plan = again
    if plan.found is None or plan.found.disk_gib > free:
        return 1
    return 0


def table(plan: Plan, config: RunConfig, free_disk: float) -> list[str]:
    """The lines that are printed."""
    found, room = plan.found, plan.room
    if found is None:
        return [
            f"does not fit: stopped at {plan.stopped_gib:.1f} GiB, with {room.host_free:.1f} of {room.host_total:.1f} "
            f"GiB free, {spelled(plan.streaming)}",
            *advice(plan, config, free_disk),
        ]
    height, width = found.size_px
    parts = config.train.accumulate
    whole = f"; a step has {parts} of them (train.accumulate)" if parts > 1 else ""
    what = "part of a step" if whole else "step"
    size = f"{width:,} x {height:,} px, {found.regions:,} regions in all"
    head = f"heaviest {what}: {and_more(found.images)}, {size}"
    rows = [
        (
            "device memory",
            f"{found.device_gib:.2f} GiB of {room.device_total:.1f}" if room.apart else "none of its own",
        ),
        ("host memory", f"{found.host_gib:.2f} GiB, {room.host_free:.1f} free of {room.host_total:.1f}"),
        ("disk", f"{found.disk_gib:.2f} GiB, {free_disk:.1f} free"),
        (
            "time of that part" if whole else "time of that step",
            f"{clock_text(plan.computing_s)}, {short_time(plan.computing_s / found.regions)} a region{whole}",
        ),
        (
            "time of an epoch",
            f"{clock_text(plan.epoch_s)}, {found.steps:,} steps, {found.mean_regions:,.0f} regions a sample",
        ),
        *token_cache_row(plan, config),
        ("evaluation", f"{clock_text(found.evaluate_s)} for {and_more(found.evaluated)}"),
        ("passes", passes_text(found, config)),
        ("settings", spelled_found(found, plan.streaming)),
        *reading_row(plan),
        *choice_row(plan),
    ]
    wide = max(len(name) for name, _ in rows)
    return [head, *(f"  {name:<{wide}}  {value}" for name, value in rows), *advice(plan, config, free_disk)]


def short_time(seconds: float) -> str:
    """Such as "35.8 ms" and "1.15 s"."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def and_more(names: Sequence[str]) -> str:
    """The first of some names, and how many follow."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def token_cache_row(plan: Plan, config: RunConfig) -> list[tuple[str, str]]:
    """What a cache of tokens takes and brings."""
    found, most = plan.found, config.train.token_cache_gib
    if found is None or not found.first_step_s:
        return []
    turned = ", as often as they are turned" if config.train.augment.dihedral or config.train.augment.mirror else ""
    more = "" if found.token_cache_gib <= most else f": more than train.token_cache_gib, {most:g}, so not all are kept"
    times = f"{clock_text(plan.later_epoch_s)} an epoch once all are there"
    return [("token cache", f"{times}; {found.token_cache_gib:.2g} GiB for the training images{turned}{more}")]


def passes_text(found: Found, config: RunConfig) -> str:
    """How often the region encoder runs in a step."""
    if found.first_step_s:
        return "1 forward of the region encoder, which is frozen, then none: tokens are in the cache"
    backward = "no" if config.train.encoder == "frozen" else f"{config.train.grad_share:g}"
    return f"{found.passes:.2f} forward + {backward} backward of the region encoder"


def reading_row(plan: Plan) -> list[tuple[str, str]]:
    """How fast pixels come from the disk."""
    found = plan.found
    if found is None or not found.cold_read_s:
        return []
    share = f"{plan.reading_s / plan.computing_s:.0%} of that step"
    limit = f"the limit: {share}" if plan.reads_too_slowly else f"behind the computation, {share}"
    speed = f" ({found.cold_bytes / found.cold_read_s / 1e6:.3g} MB/s)" if found.cold_bytes else ""
    rows = [f"{short_time(found.cold_read_s)} a region cold{speed}, {short_time(found.read_s)} again; {limit}"]
    if found.still_cached:
        rows.append(f"not cold: the system would not forget {and_more(found.still_cached)}; a first read may be slower")
    return [("reading" if i == 0 else "", row) for i, row in enumerate(rows)]


def choice_row(plan: Plan) -> list[tuple[str, str]]:
    """The settings that would be chosen."""
    from gigaxt.training.plan import predicted_gib

    if plan.choice is None or plan.found is None:
        return []
    memory = predicted_gib(plan.found, plan.streaming, plan.choice)
    return [
        ("choice", f"{spelled(plan.choice)}: at most {memory:.2f} GiB" if worth_changing(plan) else "the same settings")
    ]


def worth_changing(plan: Plan) -> bool:
    """Whether the choice keeps more, or encodes in other chunks, or needs less than what was measured."""
    found, choice, now = plan.found, plan.choice, plan.streaming
    if found is None or choice is None:
        return False
    everything = found.regions * found.graph_gib
    keeps_all = now.budget_gib is None or min(now.budget_gib, choice.budget_gib or 0.0) >= everything
    same = (choice.budget_gib, choice.host_gib) == (now.budget_gib, now.host_gib)
    return choice.chunk_regions != now.chunk_regions or not (keeps_all or same)


def advice(plan: Plan, config: RunConfig, free_disk: float) -> list[str]:
    """What to change, a line each."""
    import torch

    from gigaxt.training.device import precision_advice

    found, streaming = plan.found, plan.streaming
    lines = []
    if found is None:
        if streaming.budget_gib or streaming.budget_gib is None or streaming.host_gib:
            lines.append("- keep less: train.streaming.budget_gib: 0")
        if streaming.chunk_regions > 1:
            lines.append(f"- smaller chunks: train.streaming.chunk_regions: {streaming.chunk_regions // 2}")
        if config.train.batch > 1:
            images = config.train.batch * config.train.accumulate
            lines.append(f"- fewer images at once: train.batch: 1, train.accumulate: {images}")
        lines.append("- a narrower context (model.context.dim), or coarser images (model.input.mpp, gsd_m, resize_px)")
        return lines
    if found.streaming["chunk_regions"] < streaming.chunk_regions:
        lines.append(f"- memory ran out with {streaming.chunk_regions} regions a chunk; it went on with fewer")
    if found.disk_gib > free_disk:
        lines.append(f"- the disk of the run folder is too small: {found.disk_gib:.2f} GiB, {free_disk:.2f} free")
    fits = not lines
    if slow := precision_advice(torch.device(found.device), config.train.amp):
        lines.append(f"- {slow}")
    if 0.0 < found.bf16_s < WORTH_BFLOAT16 * (least := min(found.chunk_s.values())):
        lines.append(
            f"- train.amp: bf16 takes {found.bf16_s / least:.0%} of the region encoder's time here: "
            f"{short_time(found.bf16_s)} instead of {short_time(least)} a region"
        )
    if plan.reads_too_slowly:
        lines += ["- reading is the limit", *slow_reading(plan, config)]
    lines.append("fits" if fits else "see above")
    return lines


def slow_reading(plan: Plan, config: RunConfig) -> list[str]:
    """What helps where reading is the limit, a line each."""
    readers, storage = plan.streaming.readers, plan.found.storage if plan.found is not None else ""
    strips = f"- the images lie in {storage}, of which a region needs a part: make tiled ones (gigaxt convert)"
    tiles = [strips] if storage.startswith("strips") else []
    more = f"more reading threads: train.streaming.readers: {4 * readers}"
    if plan.decodes_too_slowly:
        return [f"- decoding is what takes long, not the disk: {more}, up to the cores", *tiles]
    kept = (
        "- from the second time on the images come from data.cache, if they fit into data.cache_gib"
        if config.data.cache is not None
        else "- --cache DIR (data.cache) keeps what is read of TIFF, PNG and JPEG on a faster disk"
    )
    return [kept, f"- {more}, where the storage answers slowly", *tiles]


def spelled(streaming: Streaming) -> str:
    """Such as "8 regions a chunk, budget 2 GiB"."""
    budget = "all kept" if streaming.budget_gib is None else f"budget {streaming.budget_gib:g} GiB"
    host = f" and {streaming.host_gib:g} GiB on the host" if streaming.host_gib else ""
    return f"{streaming.chunk_regions} regions a chunk, {budget}{host}"


def spelled_found(found: Found, streaming: Streaming) -> str:
    """The settings that a rehearsal ended with, and what would keep everything."""
    shown = replace(streaming, chunk_regions=int(found.streaming["chunk_regions"]))
    return f"{spelled(shown)}; {found.regions * found.graph_gib:.2f} GiB would keep all"
