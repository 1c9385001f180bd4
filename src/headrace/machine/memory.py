"""Memory of the host, as its control groups limit it, and of the GPUs."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path

import psutil

from headrace.machine.device import HOST, Device
from headrace.machine.gpu import gpus

_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def devices(pid: int | None = None) -> tuple[Device, ...]:
    """Return the host memory and then every GPU, with what process `pid` holds of each."""
    process = psutil.Process(pid or os.getpid())
    return (host(process.memory_info().rss), *gpus({process.pid}))


def host(worker_used: int, busy: float | None = None) -> Device:
    """Return the host's memory, as far as this process could have it."""
    total, free = _host()
    used = total - free
    return Device(name=HOST, kind="cpu", total=total, used=used, worker_used=worker_used, busy=busy)


def host_memory() -> int:
    """Return how many bytes of the host's memory this process could have at most."""
    return _host()[0]


def _host() -> tuple[int, int]:
    """Return the memory that this process could have at most, and what is free of it."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for folder in _cgroups(_OWN_CGROUP):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is not None and limit < memory.total:
            used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
            total, free = min(total, limit), min(free, max(0, limit - used + _cached(folder)))
    return total, free


@cache
def _cgroups(own: Path) -> tuple[Path, ...]:
    """Return the folders of the control groups that this process is in, and of all above."""
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers in ("", "memory"):
                inner = Path(place.lstrip("/"))
                tops = (_CGROUPS / "memory",) if controllers else (_CGROUPS, _CGROUPS / "unified")
                folders += [top / part for top in tops for part in (inner, *inner.parents)]
    # In a container the path can be the host's, of which only the top is to be seen.
    files = ("memory.max", "memory.limit_in_bytes")
    return tuple(
        folder
        for folder in dict.fromkeys(folders)
        if any((folder / file).exists() for file in files)
    )


def _number(folder: Path, *files: str) -> int | None:
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            return int((folder / file).read_text(encoding="ascii"))
    return None


def _cached(folder: Path) -> int:
    """Return how much of what a control group uses is pages of files that can go at once."""
    stat: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split(maxsplit=1) for line in lines)
    return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
