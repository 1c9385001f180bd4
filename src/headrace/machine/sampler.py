"""Sampler: measures the use of the devices by each request, in the background."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import psutil

from headrace.core.metrics import DeviceUse
from headrace.machine.hardware import Device, gpus, host
from headrace.machine.process import family, resident

Look = Callable[[], Sequence[Device]]


class DeviceReader:
    """Reads the devices for this process and its present children.

    Not thread-safe: the processor load is measured since the last call.
    """

    def __init__(self) -> None:
        # Only once, as it costs ten times as much as all the rest: engines start theirs first.
        self._processes = [process for process in family(os.getpid()) if _is_own(process.pid)]
        self._pids = {process.pid for process in self._processes}
        self._before = time.monotonic(), self._cpu_s()

    def __call__(self) -> tuple[Device, ...]:
        """Return the host and then every GPU."""
        (then, before), now = self._before, (time.monotonic(), self._cpu_s())
        self._before = now
        whole = (now[0] - then) * _processors()
        busy = min(1.0, max(0.0, (now[1] - before) / whole)) if whole else 0.0
        return (host(resident(self._processes), busy), *gpus(self._pids, metered=True))

    def _cpu_s(self) -> float:
        total = 0.0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def _is_own(pid: int) -> bool:
    # Worker processes that this process has started have sessions of their own.
    try:
        return os.getsid(pid) == os.getsid(0)
    except OSError:
        return False


def _processors() -> int:
    """Return the number of processors that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class _Reading(NamedTuple):
    """A device at one moment, and its mean power since the last sample, or None."""

    device: Device
    watts: float | None


class _Sample(NamedTuple):
    """All devices at one moment; `share` is the integral of 1 / running requests."""

    time: float
    share: float
    readings: tuple[_Reading, ...] = ()


class _Sums:
    """The use of one device by one request, up to the last sample."""

    __slots__ = ("busy_peak", "busy_s", "joules", "samples", "used", "used_peak")

    def __init__(self) -> None:
        self.samples = self.used = self.used_peak = 0
        self.busy_s = self.busy_peak = self.joules = 0.0


class Measurement:
    """The use of the devices by one request, added up sample by sample."""

    def __init__(self, began: float, share: float, last: _Sample) -> None:
        self.result: tuple[DeviceUse, ...] | None = None
        self._began = self._time = began
        self._share = share
        self._sums: dict[str, _Sums] = {}
        # The memory at the beginning is that of the last sample.
        for reading in last.readings:
            self._memory(reading.device)

    def add(self, sample: _Sample) -> None:
        """Add a sample: power and load are means since the last one."""
        seconds, share = sample.time - self._time, sample.share - self._share
        for device, watts in sample.readings:
            sums, busy = self._memory(device), device.busy or 0.0
            sums.busy_s += busy * seconds
            sums.busy_peak = max(sums.busy_peak, busy)
            sums.joules += (watts or 0.0) * share
        self._time, self._share = sample.time, sample.share

    def finish(self, last: _Sample, now: float, share: float) -> tuple[DeviceUse, ...]:
        """Return the use of the devices in the last sample."""
        self.result = tuple(self._use(*reading, now, share) for reading in last.readings)
        return self.result

    def _memory(self, device: Device) -> _Sums:
        sums = self._sums.get(device.name)
        if sums is None:
            sums = self._sums[device.name] = _Sums()
        sums.samples += 1
        sums.used += device.worker_used
        sums.used_peak = max(sums.used_peak, device.worker_used)
        return sums

    def _use(self, device: Device, watts: float | None, now: float, share: float) -> DeviceUse:
        sums, sampled_s = self._sums[device.name], self._time - self._began
        # Samples of less than half of the duration are not significant.
        knows_busy = device.busy is not None and sampled_s > 0
        knows_busy = knows_busy and sampled_s >= (now - self._began) / 2
        joules = None
        if watts is not None:
            # Since the last sample the power is that of the period before it.
            joules = round(sums.joules + watts * (share - self._share), 3)
        return DeviceUse(
            name=device.name,
            total=device.total,
            used=device.used,
            worker_used=device.worker_used,
            worker_mean=sums.used // sums.samples,
            worker_peak=sums.used_peak,
            busy_mean=round(sums.busy_s / sampled_s, 3) if knows_busy else None,
            busy_peak=round(sums.busy_peak, 3) if knows_busy else None,
            joules=joules,
        )


class Sampler:
    """Samples the devices twice a second while requests run, on a thread.

    While none runs it samples every `idle_s` seconds. The energy of a GPU is divided between the
    running requests if this process holds memory of it, or if it is the engine's `device`.
    `name` returns the names by which GPUs are reported.
    """

    def __init__(
        self,
        look: Look | None = None,
        *,
        device: str = "",
        name: Callable[[str], str] | None = None,
        period_s: float = 0.5,
        idle_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look or DeviceReader()
        self._device = device
        self._name = name
        self._period_s, self._idle_s = period_s, idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._sleeps = False
        self._running: set[Measurement] = set()
        self._share, self._shared_at = 0.0, clock()
        self.latest: tuple[Device, ...] = ()
        self._last = _Sample(self._shared_at, 0.0)
        self.sample()
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)
        self._thread.start()

    def watch(self) -> Measurement:
        """Start to measure a request, without a system call."""
        with self._lock:
            measurement = Measurement(self._advance(), self._share, self._last)
            self._running.add(measurement)
            if self._sleeps:
                self._sleeps = False
                self._wake.set()
        return measurement

    def release(self, measurement: Measurement) -> tuple[DeviceUse, ...]:
        """Stop measuring, and return the use."""
        with self._lock:
            if measurement.result is not None:
                return measurement.result
            now = self._advance()
            self._running.remove(measurement)
            return measurement.finish(self._last, now, self._share)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def sample(self) -> None:
        """Read the devices once."""
        devices = tuple(self._look())
        if (name := self._name) is not None:
            devices = tuple(msgspec.structs.replace(d, name=name(d.name)) for d in devices)
        with self._lock:
            now, before = self._advance(), {device.name: device for device in self.latest}
            seconds = now - self._last.time
            watts = (
                _mean_watts(before.get(device.name), device, seconds)
                if self._is_ours(device, devices)
                else None
                for device in devices
            )
            self._last = _Sample(now, self._share, tuple(map(_Reading, devices, watts)))
            self.latest = devices
            for measurement in self._running:
                measurement.add(self._last)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            with self._lock:
                self._sleeps = not self._running
            if self._sleeps:
                self._wake.wait(self._idle_s)
                self._wake.clear()
            if not self._stop.is_set():
                self.sample()

    def _advance(self) -> float:
        now = self._clock()
        if self._running:
            self._share += (now - self._shared_at) / len(self._running)
        self._shared_at = now
        return now

    def _is_ours(self, device: Device, devices: Sequence[Device]) -> bool:
        """Whether requests here use a GPU; in a container its processes may be unknown."""
        if device.worker_used > 0 or self._device.partition(":")[0] != "cuda":
            return device.worker_used > 0
        gpus = [other for other in devices if other.kind == "cuda"]
        return device.key in self._device.split(",") or gpus == [device]


def _mean_watts(before: Device | None, now: Device, seconds: float) -> float | None:
    """Return the mean power between two samples: by the counter, else by the readings."""
    counted = before and before.joules
    if counted is not None and now.joules is not None and seconds > 0:
        return max(0.0, now.joules - counted) / seconds
    readings = [device.watts for device in (before, now) if device and device.watts is not None]
    return sum(readings) / len(readings) if readings else None
