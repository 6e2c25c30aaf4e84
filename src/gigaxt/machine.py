"""What this machine has: memory of the host and of devices, space on disks. Respects the limits of a container."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import torch

from gigaxt.amounts import GIB

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
    return shutil.disk_usage(_nearest(path)).free / GIB


def what_closes(path: Path) -> str | None:
    """Why nothing can be written into a folder that may not be there yet; None: it can, as far as the system tells."""
    there = _nearest(path)
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is closed to this user"


def _nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    there = path.absolute()
    while not os.path.exists(there):  # noqa: PTH110  # Path.exists raises where a folder above is closed
        there = there.parent
    return there


def resident_gib(pid: int) -> float:
    """Memory that another process holds now; 0 if it has ended, or the system does not report it."""
    fields = " ".join(_lines(Path(f"/proc/{pid}/statm"))).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / GIB if len(fields) > 1 else 0.0


def peak_resident_gib() -> float:
    """The most that this process has held so far."""
    for line in _lines(Path("/proc/self/status")):
        name, _, value = line.partition(":")
        if name == "VmHWM":  # getrusage would count the process that started this one, too
            return int(value.split()[0]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (GIB if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def drop_from_cache(path: Path) -> bool:
    """Make the system drop a file, or the files in a folder, from its page cache, so that the next read is cold.

    Returns:
        Whether it did, as far as the system reports it: False if there is no such file, the system takes no such hints,
        or pages of it are still in memory.
    """
    if path.is_dir():
        forgotten = [drop_from_cache(file) for file in path.rglob("*") if file.is_file()]  # all of them, not up to one
        return all(forgotten)
    if not path.is_file() or not hasattr(os, "posix_fadvise"):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        os.fsync(descriptor)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return not any(_in_memory(descriptor, place) for place in _places(os.fstat(descriptor).st_size))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def read_bytes() -> int | None:
    """Bytes of files that this process has asked the system to read so far; None: the system does not report it."""
    for line in _lines(Path("/proc/self/io")):
        name, _, value = line.partition(":")
        if name == "rchar":
            return int(value)
    return None


def _places(size: int) -> range:
    """Offsets at which a file is probed for pages in memory."""
    return range(0, size, max(size // 32, 1 << 16))


def _in_memory(descriptor: int, place: int) -> bool:
    """Whether a byte of a file is in the page cache; False where the system does not report it, as in tmpfs."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    except OSError:  # EAGAIN: it would have to wait for the disk
        return False


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
