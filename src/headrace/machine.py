"""What the machine is and how full it is: system information, devices, and a background sampler."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
from collections.abc import Iterator, Sequence, Set
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace import __version__
from headrace.core.errors import ConfigError
from headrace.core.metrics import DeviceUse

HOST = "cpu"
"""The key of the host's memory, beside `cuda:0` and its like."""

_CPUINFO = Path("/proc/cpuinfo")
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_SHARES = {"cpu": 80, "cuda": 90}
_AMOUNT = re.compile(r"(?:(?P<device>[^=]+)=)?(?P<number>\d+(?:\.\d+)?) ?(?P<unit>%|[a-z]+)", re.I)
_UNITS = {
    "%": 0.01,
    "b": 1,
    **{f"{c}{end}": 1 << 10 * n for n, c in enumerate("kmgt", 1) for end in ("", "i", "ib")},
    **{f"{c}b": 1000**n for n, c in enumerate("kmgt", 1)},
}
_LIBRARIES = ("xllamacpp", "pydantic", "msgspec", "starlette", "uvicorn")
_INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "amx_tile", "asimd")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the host or of one GPU, in bytes. `worker_used` is what one process holds.

    The host's is that of the control group, where one has a limit: more cannot be had.
    """

    name: str
    kind: str
    total: int
    used: int
    worker_used: int = 0

    @property
    def key(self) -> str:
        """The name without the product: `cpu`, `cuda:0`."""
        return self.name.partition(" ")[0]


class SystemInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The machine as it is logged when a worker starts, and as `doctor` shows it."""

    os: str
    python: str
    cpu: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    libraries: dict[str, str]
    devices: tuple[Device, ...]


def system() -> SystemInfo:
    """Read the facts of this machine. Takes some milliseconds."""
    name, flags = _cpu()
    return SystemInfo(
        os=platform.platform(),
        python=platform.python_version(),
        cpu=name,
        cores=psutil.cpu_count(logical=False) or 1,
        threads=psutil.cpu_count() or 1,
        instruction_sets=tuple(flag for flag in _INSTRUCTION_SETS if flag in flags),
        libraries={"headrace": __version__, **dict(_versions())},
        devices=devices(),
    )


def devices(pid: int | None = None) -> tuple[Device, ...]:
    """Return the host memory and then every GPU, with what process `pid` holds of each."""
    process = psutil.Process(pid or os.getpid())
    total, free = _host()
    host = Device(
        name=HOST,
        kind="cpu",
        total=total,
        used=total - free,
        worker_used=process.memory_info().rss,
    )
    return (host, *_gpus({process.pid}))


def host_memory() -> int:
    """Return how many bytes of the host's memory this process could have at most."""
    return _host()[0]


def process_memory(pid: int) -> dict[str, int]:
    """Return what a process and those it started hold now; nothing when it has gone.

    In bytes by device. Of the host it is the resident memory. Pages of a model's file are counted
    in full, also when another process shares them: what is counted so does not change with who
    else is loaded.
    """
    family = _family(pid)
    held = {HOST: _resident(family)}
    held |= {gpu.key: gpu.worker_used for gpu in _gpus({pid, *(one.pid for one in family)})}
    return {key: amount for key, amount in held.items() if amount}


def budgets(setting: Sequence[str], devices: Sequence[Device]) -> dict[str, int]:
    """Return how many bytes models may take of each device, by its key.

    `setting` are amounts like `16GiB` or `80%`, of the host, and `cuda:0=50%` or `cpu=16GiB`.
    Without one it is 80 % of the host and 90 % of a GPU.

    Raises:
        ConfigError: an amount is not understood, or there is no such device, or not so much of it.
    """
    totals = {device.key: device.total for device in devices}
    found = {device.key: device.total * _SHARES[device.kind] // 100 for device in devices}
    for word in setting:
        key, amount = _amount(word, totals)
        found[key] = amount
    return found


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
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers in ("", "memory"):
                inner = Path(place.lstrip("/"))
                tops = (_CGROUPS / "memory",) if controllers else (_CGROUPS, _CGROUPS / "unified")
                found += [top / part for top in tops for part in (inner, *inner.parents)]
    # In a container the path can be the host's, of which only the top is to be seen.
    files = ("memory.max", "memory.limit_in_bytes")
    return tuple(
        one for one in dict.fromkeys(found) if any((one / file).exists() for file in files)
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


def _cpu() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    with contextlib.suppress(OSError), _CPUINFO.open(encoding="utf-8") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in {"flags", "Features"}:
                return name, frozenset(value.split())
    return name, flags


def _versions() -> Iterator[tuple[str, str]]:
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield library, metadata.version(library)


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started; some engines have processes of their own."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _resident(family: Sequence[psutil.Process]) -> int:
    total = 0
    for process in family:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _gpus(pids: Set[int]) -> Iterator[Device]:
    nvml = _nvml()
    if nvml is None:
        return
    # A driver that fails to answer takes nothing else with it.
    with contextlib.suppress(nvml.NVMLError):
        yield from _seen(nvml, pids)


def _seen(nvml: Any, pids: Set[int]) -> Iterator[Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        ours = (
            process.usedGpuMemory or 0
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid in pids
        )
        yield Device(
            name=f"cuda:{index} {nvml.nvmlDeviceGetName(handle)}",
            kind="cuda",
            total=int(memory.total),
            used=int(memory.used),
            worker_used=sum(ours),
        )


def _nvml() -> Any:
    import pynvml  # loads the driver's library where there is one

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


class Watch:
    """Memory use of each device while one request runs."""

    def __init__(self, start: Sequence[Device]) -> None:
        self._last = self._peak = {device.name: device for device in start}
        self._sum = {device.name: device.worker_used for device in start}
        self._count = 1

    def add(self, devices: Sequence[Device]) -> None:
        """Take one more sample."""
        self._count += 1
        self._last = {device.name: device for device in devices}
        self._peak = {
            name: max(device, self._peak.get(name, device), key=lambda one: one.worker_used)
            for name, device in self._last.items()
        }
        for name, device in self._last.items():
            self._sum[name] = self._sum.get(name, 0) + device.worker_used

    def result(self) -> tuple[DeviceUse, ...]:
        """Return mean and peak over the samples."""
        return tuple(
            DeviceUse(
                name=name,
                total=device.total,
                used=device.used,
                worker_used=device.worker_used,
                worker_mean=self._sum[name] // self._count,
                worker_peak=self._peak[name].worker_used,
            )
            for name, device in self._last.items()
        )


class Sampler:
    """Samples the devices twice a second on its own thread, for all requests that run."""

    def __init__(self, period_s: float = 0.5) -> None:
        self._period_s = period_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()
        self.latest: tuple[Device, ...] = devices()
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)
        self._thread.start()

    def watch(self) -> Watch:
        """Begin to follow one request; costs no system call."""
        watch = Watch(self.latest)
        with self._lock:
            self._watches.add(watch)
        return watch

    def release(self, watch: Watch) -> tuple[DeviceUse, ...]:
        """Stop following, and return the use."""
        with self._lock:
            self._watches.discard(watch)
            return watch.result()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            sample = devices()
            with self._lock:
                self.latest = sample
                for watch in self._watches:
                    watch.add(sample)
