"""What a run will need, before it starts: its heaviest steps rehearsed in a child process, and settings that fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, floor
from pathlib import Path

from gigaxt import errors
from gigaxt.config import from_dict
from gigaxt.errors import CheckpointError, TrainingError
from gigaxt.machine import device_memory_gib, host_memory_gib, resident_gib
from gigaxt.streaming.rows import Streaming
from gigaxt.training.config import RunConfig
from gigaxt.training.device import check_budgets, pick_device
from gigaxt.training.rehearsal import Found, job_of

WATCH_S = 0.1
"""Time between looks at the child's memory."""
DECODING = 0.9
"""Share of a step beyond which decoding is what it waits for."""
WORK = 0.5
"""CPU time as a share of reading again, from which on it is work that reading threads do."""
SPARE = 0.9
"""Share of the free memory that is spent: the rest is for the system, and for what differs from step to step."""


@dataclass(kw_only=True)
class Room:
    """What the machine has. GiB."""

    device: str
    host_total: float
    host_free: float
    device_total: float
    device_free: float

    @property
    def apart(self) -> bool:
        """Whether the device has memory of its own."""
        return self.device != "cpu"


@dataclass(kw_only=True)
class Plan:
    """What was measured, and what would be chosen."""

    streaming: Streaming
    """The settings that were rehearsed."""
    room: Room
    found: Found | None
    """None where the run does not fit at all."""
    stopped_gib: float = 0.0
    """Host memory at which a run that does not fit was stopped."""
    choice: Streaming | None = None
    """Settings that fit and are fast."""

    @property
    def fits(self) -> bool:
        """Whether the run fits with the settings that were rehearsed."""
        return self.found is not None

    @property
    def reading_s(self) -> float:
        """Time that the reading threads need for the heaviest step where nothing of it was read before."""
        found = self.found
        if found is None:
            return 0.0
        return found.regions * (found.cold_read_s + max(found.passes - 1, 0) * found.read_s)

    @property
    def reads_too_slowly(self) -> bool:
        """Whether a first step waits for the disk: reading takes longer than all the rest."""
        return self.found is not None and self.reading_s > self.computing_s

    @property
    def computing_s(self) -> float:
        """Time of the heaviest step where nothing of it was computed before."""
        found = self.found
        return 0.0 if found is None else found.first_step_s or found.step_s

    @property
    def decodes_too_slowly(self) -> bool:
        """Whether most of a step is reading even where it was read before, and most of that is work, not waiting."""
        found = self.found
        if found is None or found.decode_s < WORK * found.read_s:
            return False
        return found.regions * found.passes * found.read_s > DECODING * found.step_s

    @property
    def epoch_s(self) -> float:
        """Time of the first epoch's steps: as the heaviest one, by the number of regions."""
        return self._of_all(max(self.computing_s, self.reading_s))

    @property
    def later_epoch_s(self) -> float:
        """The same of an epoch in which all tokens are in `train.token_cache`."""
        return self._of_all(0.0 if self.found is None else self.found.step_s)

    def _of_all(self, step_s: float) -> float:
        found = self.found
        if found is None or not found.regions:
            return 0.0
        return step_s * found.mean_regions * found.samples / found.regions


def make_plan(config: RunConfig, images: Sequence[Path] = (), *, probe: bool = True) -> Plan:
    """Rehearse a run's heaviest steps and choose settings.

    Args:
        config: of the run.
        images: in place of those of the config's CSV, such as larger ones to come.
        probe: also time chunks of other sizes and the disk, and choose; False: only measure.

    Raises:
        ConfigError, DataError, ImageError: what the run itself would refuse.
        TrainingError: the rehearsal failed for another reason than memory.
    """
    streaming = config.train.streaming
    # Here too: without waiting for a process to start.
    check_budgets(streaming, pick_device(config.train.device), config.model.context)
    room = look_at_machine(config)
    found, stopped = rehearse_apart(config, images, streaming, room, probe=probe)
    plan = Plan(streaming=streaming, room=room, found=found, stopped_gib=stopped)
    if found is not None and probe:
        plan.choice = choose(found, streaming, room)
    return plan


def look_at_machine(config: RunConfig) -> Room:
    """What there is for a run.

    Raises:
        ConfigError: there is no such device.
    """
    device = pick_device(config.train.device)
    host, own = host_memory_gib(), device_memory_gib(device)
    return Room(device=str(device), host_total=host[0], host_free=host[1], device_total=own[0], device_free=own[1])


def choose(found: Found, streaming: Streaming, room: Room) -> Streaming:
    """The fastest chunk, and as much kept for the backward pass as there is room for, feature maps first.

    Args:
        found: measured with `streaming`.
        streaming: what was measured.
        room: what there is.
    """
    dense = found.maps_gib > 0
    graphs, maps = found.regions * found.graph_gib, found.regions * found.maps_gib if dense else 0.0
    spent = min(streaming.budget_gib, graphs) if streaming.budget_gib is not None else graphs
    on_host = max(found.hosted_gib / found.graph_gib, 1.0) if found.graph_gib else 1.0  # what a GiB of graphs takes
    spent_host = min(streaming.host_gib, maps if dense else on_host * (graphs - spent))
    chunk = min(found.chunk_s, key=lambda size: found.chunk_s[size]) if found.chunk_s else str(streaming.chunk_regions)
    grown = (int(chunk) - int(found.streaming["chunk_regions"])) * found.graph_gib
    if room.apart:
        left = SPARE * room.device_free - (found.device_gib - spent) - grown
        left_host = SPARE * room.host_free - (found.host_gib - spent_host)
    else:
        left = left_host = SPARE * room.host_free - (found.host_gib - spent - spent_host) - grown
    left, left_host = max(left, 0.0), max(left_host, 0.0)
    if graphs <= left:
        return replace(streaming, budget_gib=_up(graphs), host_gib=0.0, chunk_regions=int(chunk))
    host = _up(maps if dense else on_host * (graphs - left)) if room.apart or dense else 0.0
    if host > left_host:  # half of the maps would save half of a pass, but graphs save more
        host = 0.0 if dense else _down(left_host)
    budget = _down(left if room.apart else left - host)
    return replace(streaming, budget_gib=max(budget, 0.0), host_gib=host, chunk_regions=int(chunk))


def predicted_gib(found: Found, streaming: Streaming, other: Streaming) -> float:
    """At most what other budgets need, of the device, or of the host where there is no other.

    A little less is kept in fact: the chunk at work is in what was measured already.
    """

    def kept(s: Streaming) -> float:
        most = found.regions * found.graph_gib
        return most if s.budget_gib is None else min(s.budget_gib, most)

    maps = found.regions * found.maps_gib
    base = found.device_gib or found.host_gib
    hosted = 0.0 if found.device_gib else min(other.host_gib, maps) - min(streaming.host_gib, maps)
    grown = (other.chunk_regions - int(found.streaming["chunk_regions"])) * found.graph_gib
    return base + kept(other) - kept(streaming) + hosted + max(grown, 0.0)


def rehearse_apart(
    config: RunConfig, images: Sequence[Path], streaming: Streaming, room: Room, *, probe: bool
) -> tuple[Found | None, float]:
    """`rehearse` in a child process, which is stopped before the machine runs out of memory.

    Returns:
        What it found, or None and the host memory at which it was stopped.

    Raises:
        GigaxtError: what the child raised.
    """
    with tempfile.TemporaryDirectory(prefix="gigaxt-plan-") as name:
        folder = Path(name)
        job = job_of(config, images, streaming, probe=probe)
        (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        with (folder / "errors.txt").open("w") as told:
            command = [sys.executable, "-m", "gigaxt.training.rehearsal", name, str(os.getpid())]
            child = subprocess.Popen(command, stdout=told, stderr=told, start_new_session=True)
            stopped = _watch(child, SPARE * room.host_free)
        if stopped or child.returncode == -signal.SIGKILL:
            return None, stopped or room.host_free
        try:
            answer = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = (folder / "errors.txt").read_text(errors="replace").strip().splitlines() or ["no reason given"]
            raise TrainingError(f"the rehearsal ended with status {child.returncode}: {last[-1]}") from None
    if "error" in answer:
        if not answer["error"]:
            return None, room.device_total if room.apart else room.host_free
        if answer["kind"] == CheckpointError.__name__ and name in answer["error"][0]:
            answer["error"][0] += f"; gigaxt plan works in {folder.parent}, the variable TMPDIR names another folder"
        raise getattr(errors, answer["kind"])(*answer["error"])
    return from_dict(Found, answer), 0.0


def _watch(child: subprocess.Popen[bytes], most_gib: float) -> float:
    """Wait for the child; returns the memory at which it was stopped, or 0."""
    try:
        while True:
            try:
                child.wait(WATCH_S)
                return 0.0
            except subprocess.TimeoutExpired:
                held = resident_gib(child.pid)
            if held > most_gib:
                return held
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _up(gib: float) -> float:
    """Rounded up to hundredths, plus a margin: what the first chunk shares with the others is counted with it."""
    return ceil(102 * gib + 1) / 100


def _down(gib: float) -> float:
    return floor(100 * gib) / 100
