"""The host and its GPUs: memory, utilization, and the memory budgets of models.

GPUs are read with the library of the driver; without it there are none.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace.core.errors import ConfigError

HOST = "cpu"
"""The key of the host's memory; GPUs have `cuda:0` and so on."""

_SHARES = {"cpu": 80, "cuda": 90}
_AMOUNT = re.compile(r"(?:(?P<device>[^=]+)=)?(?P<number>\d+(?:\.\d+)?) ?(?P<unit>%|[a-z]+)", re.I)
_UNITS = {
    "%": 0.01,
    "b": 1,
    **{f"{c}{end}": 1 << 10 * n for n, c in enumerate("kmgt", 1) for end in ("", "i", "ib")},
    **{f"{c}b": 1000**n for n, c in enumerate("kmgt", 1)},
}
_MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")
_CPU_FILES = ("cpu.max", "cpu.cfs_quota_us")
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the host or of one GPU, in bytes. `worker_used` is what one process holds.

    A limit of a control group replaces the host's total memory. `busy` is from 0 to 1: of a GPU by
    all processes, of the host by one worker. `joules` counts since the driver was loaded, `watts`
    is the current power; None is not metered.
    """

    name: str
    kind: str
    total: int
    used: int
    worker_used: int = 0
    busy: float | None = None
    joules: float | None = None
    watts: float | None = None

    @property
    def key(self) -> str:
        """The name without the product: `cpu`, `cuda:0`."""
        return self.name.partition(" ")[0]

    @property
    def energy(self) -> str:
        """The source of its energy: `counter`, `power` (integrated over time), or `none`."""
        if self.joules is not None:
            return "counter"
        return "none" if self.watts is None else "power"


def devices(pid: int | None = None) -> tuple[Device, ...]:
    """Return the host and every GPU, with the memory that process `pid` holds of each."""
    process = psutil.Process(pid or os.getpid())
    return (host(process.memory_info().rss), *gpus({process.pid}))


def host(worker_used: int, busy: float | None = None) -> Device:
    """Return the host, with the memory that is available to this process."""
    total, free = _host()
    used = total - free
    return Device(name=HOST, kind="cpu", total=total, used=used, worker_used=worker_used, busy=busy)


def host_memory() -> int:
    """Return how many bytes of the host's memory are available to this process at most."""
    return _host()[0]


def _host() -> tuple[int, int]:
    """Return the total and the free memory that are available to this process."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for folder in _cgroups(_OWN_CGROUP, "memory", _MEMORY_FILES):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is not None and limit < memory.total:
            used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
            total, free = min(total, limit), min(free, max(0, limit - used + _cached(folder)))
    return total, free


def usable_cpus() -> int:
    """Return how many processors this process may use: by its affinity and its quota of time.

    A quota is of the control group or of one above it; half a processor counts as one.
    """
    shares = [_quota(folder) for folder in _cgroups(_OWN_CGROUP, "cpu", _CPU_FILES)]
    share = min((share for share in shares if share is not None), default=math.inf)
    return max(1, min(allowed_cpus(), int(share + 0.5) if math.isfinite(share) else 1 << 30))


def allowed_cpus() -> int:
    """Return how many processors the affinity of this process allows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(folder: Path) -> float | None:
    """Return the processors that a control group may use, None without a limit."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    quota, period = _number(folder, "cpu.cfs_quota_us"), _number(folder, "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


@cache
def _cgroups(own: Path, controller: str, files: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the folders of this process's control groups and their parents that have `files`."""
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                inner = Path(group.lstrip("/"))
                names = (controllers, controller) if controllers else ("", "unified")
                roots = [_CGROUPS / name for name in dict.fromkeys(names)]
                folders += [root / part for root in roots for part in (inner, *inner.parents)]
    # In a container the path can be the host's, of which only the top is visible.
    return tuple(
        folder
        for folder in dict.fromkeys(folders)
        if any((folder / file).exists() for file in files)
    )


def _number(folder: Path, *files: str) -> int | None:
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number: no limit
            return int((folder / file).read_text(encoding="ascii"))
    return None


def _cached(folder: Path) -> int:
    """Return how much memory of a control group is page cache that can be freed at once."""
    stat: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split(maxsplit=1) for line in lines)
    return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)


def gpus(pids: Set[int], *, metered: bool = False) -> Iterator[Device]:
    """Yield each GPU with the memory that the processes hold; with its meters if `metered`.

    CUDA_VISIBLE_DEVICES selects and numbers them, as in CUDA programs.
    """
    if nvml := _nvml():
        # An error of the driver must not affect anything else.
        with contextlib.suppress(nvml.NVMLError):
            yield from _read(nvml, pids, metered=metered)


def driver() -> tuple[str, str]:
    """Return the versions of the driver and of the CUDA that it supports; empty without one."""
    nvml = _nvml()
    if nvml is None:
        return "", ""
    cuda = _or_none(nvml, lambda: nvml.nvmlSystemGetCudaDriverVersion_v2())
    version = str(_or_none(nvml, lambda: nvml.nvmlSystemGetDriverVersion()) or "")
    return version, f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""


def visibility(placed: Sequence[str]) -> dict[str, str]:
    """Return the variables that let a process see only the GPUs in `placed`, in this order.

    They are empty without a placement. Where CUDA_VISIBLE_DEVICES is set, they are entries of it.
    """
    if not placed:
        return {}
    numbers = [name.partition(":")[2] for name in placed if name != HOST]
    if (setting := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        entries = [*map(str.strip, setting.split(","))]
        numbers = [entries[int(number)] for number in numbers]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(numbers)}


def _visible(nvml: Any) -> list[tuple[str, Any]]:
    """Return name and handle of each GPU that CUDA programs of this process may use.

    As CUDA does, it reads CUDA_VISIBLE_DEVICES up to the first entry that is no GPU; numbers are
    those of the driver, in the order of the PCI bus.
    """
    count = nvml.nvmlDeviceGetCount()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = map(str, range(count)) if setting is None else setting.split(",")
    gpus: list[tuple[str, Any]] = []
    seen: set[str] = set()
    for entry in map(str.strip, entries):
        handle = _or_none(nvml, lambda entry=entry: _handle(nvml, entry, count))
        if handle is None:
            break
        # One has several names, and its memory is there once.
        uuid = str(_or_none(nvml, lambda handle=handle: nvml.nvmlDeviceGetUUID(handle)) or entry)
        if uuid in seen:
            break
        seen.add(uuid)
        gpus.append((entry, handle))
    return gpus


def _handle(nvml: Any, entry: str, count: int) -> Any:
    """Return the handle of a GPU by its number, or by its UUID or the beginning of it."""
    if entry.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(entry)) if int(entry) < count else None
    if entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    every = range(count if entry.startswith("GPU-") else 0)
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in every]
    meant = [each for each in handles if str(nvml.nvmlDeviceGetUUID(each)).startswith(entry)]
    return meant[0] if len(meant) == 1 else None


def _read(nvml: Any, pids: Set[int], *, metered: bool) -> Iterator[Device]:
    for index, (_, handle) in enumerate(_visible(nvml)):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        held = (
            process.usedGpuMemory or 0
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid in pids
        )
        yield Device(
            name=f"cuda:{index} {nvml.nvmlDeviceGetName(handle)}",
            kind="cuda",
            total=int(memory.total),
            used=int(memory.used),
            worker_used=sum(held),
            **(_meters(nvml, handle) if metered else {}),
        )


def _meters(nvml: Any, handle: Any) -> dict[str, float | None]:
    percent = _or_none(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    # Volta and later count energy; older GPUs report their power only.
    millijoules = _or_none(nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    milliwatts = _or_none(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return {
        "busy": None if percent is None else percent / 100,
        "joules": None if millijoules is None else millijoules / 1000,
        "watts": None if milliwatts is None else milliwatts / 1000,
    }


def _or_none(nvml: Any, query: Callable[[], Any]) -> Any:
    with contextlib.suppress(nvml.NVMLError):
        return query()
    return None


def _nvml() -> Any:
    return _opened(os.getpid())


@cache
def _opened(pid: int) -> Any:
    """Open the library of the driver, once per process: searching for it is expensive."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def budgets(setting: Sequence[str], devices: Sequence[Device]) -> dict[str, int]:
    """Return how many bytes models may take of each device, by its key.

    `setting` are amounts like `16GiB` or `80%`, of the host, and `cuda:0=50%` or `cpu=16GiB`.
    Without any it is 80 % of the host and 90 % of a GPU.

    Raises:
        ConfigError: an amount is invalid or too large, or there is no such device.
    """
    totals = {device.key: device.total for device in devices}
    amounts = {device.key: device.total * _SHARES[device.kind] // 100 for device in devices}
    for word in setting:
        key, amount = _amount(word, totals)
        amounts[key] = amount
    return amounts


def _amount(word: str, totals: dict[str, int]) -> tuple[str, int]:
    match = _AMOUNT.fullmatch(word.strip())
    factor = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"Memory {word!r}: it is like 16GiB, 80%, cpu=16GiB or cuda:0=90%.")
    key = (match["device"] or HOST).strip().lower()
    if key not in totals:
        raise ConfigError(f"Memory {word!r}: there is no device {key}, but {', '.join(totals)}.")
    share = totals[key] if match["unit"] == "%" else 1
    amount = int(float(match["number"]) * factor * share)
    if not 0 < amount <= totals[key]:
        raise ConfigError(f"Memory {word!r}: {key} has {totals[key]} bytes; give some of them.")
    return key, amount
