"""What this machine has: memory of the host and of devices, space on disks. Respects the limits of a container."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import torch

from gigaxt.rows import GIB

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of a container's limit and use, in version 2 and 1 of control groups."""


def host_memory_gib() -> tuple[float, float]:
    """All memory that this process may use, and what is free of it now."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    for line in _lines(Path("/proc/meminfo")):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            free = int(rest.split()[0]) * 1024
    for limit_file, used_file in _LIMITS:
        limit, used = (_number(_CGROUP / name) for name in (limit_file, used_file))
        if limit is not None and limit < total:
            files = _cached_files((_CGROUP / used_file).parent / "memory.stat")
            total, free = limit, min(free, limit - (used or 0) + files)
    return total / GIB, max(free, 0) / GIB


def device_memory_gib(device: torch.device) -> tuple[float, float]:
    """All memory of a device and what is free of it now; the host's where the device is the CPU."""
    if device.type != "cuda":
        return host_memory_gib()
    free, total = torch.cuda.mem_get_info(device)
    return total / GIB, free / GIB


def free_disk_gib(path: Path) -> float:
    """Free space where `path` lies or will lie."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free / GIB


def resident_gib(pid: int) -> float:
    """Memory that another process holds now; 0 where it has ended, or the system does not tell."""
    fields = " ".join(_lines(Path(f"/proc/{pid}/statm"))).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / GIB if len(fields) > 1 else 0.0


def peak_resident_gib() -> float:
    """The most that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (GIB if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def drop_from_cache(path: Path) -> None:
    """Have the system forget what it holds of a file, so that the next read comes from the disk. A hint, no promise."""
    if not path.is_file() or not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _cached_files(stat: Path) -> int:
    """Bytes that count as used but are given up when memory is short: file contents that nobody needs now."""
    for line in _lines(stat):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
