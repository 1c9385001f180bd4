"""What the machine is and how full it is: system information, devices, and a background sampler."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace import __version__
from headrace.core.metrics import DeviceUse

_CPUINFO = Path("/proc/cpuinfo")
_LIBRARIES = ("xllamacpp", "pydantic", "msgspec", "starlette", "uvicorn")
_INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "amx_tile", "asimd")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the host or of one GPU, in bytes. `worker_used` is what one process holds."""

    name: str
    kind: str
    total: int
    used: int
    worker_used: int = 0


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
    memory = psutil.virtual_memory()
    host = Device(
        name="cpu",
        kind="cpu",
        total=memory.total,
        used=memory.total - memory.available,
        worker_used=process.memory_info().rss,
    )
    return (host, *_gpus(process.pid))


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


def _gpus(pid: int) -> Iterator[Device]:
    nvml = _nvml()
    if nvml is None:
        return
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        ours = (
            process.usedGpuMemory or 0
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid == pid
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
