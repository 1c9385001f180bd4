"""GPUs as the driver's library reports them; without the library there are none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Set
from functools import cache
from typing import Any

from headrace.machine.device import Device


def gpus(pids: Set[int], *, metered: bool = False) -> Iterator[Device]:
    """Yield each GPU with what these processes hold of it, and how busy it is if `metered`."""
    if nvml := _nvml():
        # A driver that fails to answer takes nothing else with it.
        with contextlib.suppress(nvml.NVMLError):
            yield from _read(nvml, pids, metered=metered)


def driver() -> tuple[str, str]:
    """Return the version of the driver and of the CUDA that it is for; empty without one."""
    nvml = _nvml()
    if nvml is None:
        return "", ""
    cuda = _or_none(nvml, lambda: nvml.nvmlSystemGetCudaDriverVersion_v2())
    version = str(_or_none(nvml, lambda: nvml.nvmlSystemGetDriverVersion()) or "")
    return version, f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""


def _read(nvml: Any, pids: Set[int], *, metered: bool) -> Iterator[Device]:
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
            **(_meters(nvml, handle) if metered else {}),
        )


def _meters(nvml: Any, handle: Any) -> dict[str, float | None]:
    percent = _or_none(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    # Volta and later count energy; older ones report the power they draw.
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
    """Open the driver's library, once in each process; to look for it each time is expensive."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
