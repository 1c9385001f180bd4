"""Follows the devices beside the requests, and tells each request what it used of them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import psutil

from headrace.core.metrics import DeviceUse
from headrace.machine.device import Device
from headrace.machine.gpu import gpus
from headrace.machine.memory import family, host, resident

Look = Callable[[], Sequence[Device]]


class Worker:
    """Looks at the devices for this process and those it has started by now.

    Whoever asks again must do so from one thread at a time: it tells how busy the processors were
    since the last look.
    """

    def __init__(self) -> None:
        # To look for children is ten times as dear as all the rest: engines start theirs first.
        self._processes = [one for one in family(os.getpid()) if _is_own(one.pid)]
        self._pids = {one.pid for one in self._processes}
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
    # Other workers that this process has started, if it is no worker only, lead sessions.
    try:
        return os.getsid(pid) == os.getsid(0)
    except OSError:
        return False


def _processors() -> int:
    """Return how many processors this process may use."""
    can_tell = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1


class _Total(NamedTuple):
    """A device up to one sample: sums over all before, and what the last period was like.

    `joules` is what one request would have that had run all the time.
    """

    device: Device
    samples: int = 0
    used: int = 0
    busy_s: float = 0.0
    joules: float = 0.0
    watts: float | None = None


class _Sample(NamedTuple):
    """What is known at one moment; `share` is the integral of 1 / running requests."""

    number: int
    time: float
    share: float
    totals: Mapping[str, _Total]


class _Period:
    """From one sample to the next, which is not there yet while it lasts."""

    end: _Sample | None = None


class Watch:
    """One request, from when it came."""

    def __init__(self, start: _Sample, period: _Period, began: float, share: float) -> None:
        self.start = start
        self.began = began
        self.use: tuple[DeviceUse, ...] | None = None
        self._period = period
        self._share = share

    def result(
        self, last: _Sample, now: float, share: float, peaks: Mapping[str, _Peaks]
    ) -> tuple[DeviceUse, ...]:
        """Return the use up to now, of the devices that are still there."""
        return tuple(self._use(name, last, now, share, peaks[name]) for name in last.totals)

    def _use(self, name: str, last: _Sample, now: float, share: float, peaks: _Peaks) -> DeviceUse:
        total, start = last.totals[name], self.start.totals.get(name)
        device = total.device
        used, samples = total.used, total.samples
        if start is not None:
            used += start.device.worker_used - start.used
            samples += 1 - start.samples
        is_busy = self._is_seen(last, now) and device.busy is not None
        return DeviceUse(
            name=name,
            total=device.total,
            used=device.used,
            worker_used=device.worker_used,
            worker_mean=used // samples,
            worker_peak=int(peaks.used.since(self.start.number)),
            busy_mean=self._busy(name, last) if is_busy else None,
            busy_peak=round(peaks.busy.since(self.start.number + 1), 3) if is_busy else None,
            joules=self._joules(name, last, share),
        )

    def _is_seen(self, last: _Sample, now: float) -> bool:
        # The samples must tell of most of the time.
        return self._period.end is not None and last.time - self.began >= (now - self.began) / 2

    def _busy(self, name: str, last: _Sample) -> float:
        end = self._period.end or last
        total, first = last.totals[name], end.totals.get(name)
        busy_s = total.busy_s - (first.busy_s if first else 0.0)
        if first and first.device.busy is not None:
            busy_s += first.device.busy * (end.time - self.began)
        return round(busy_s / (last.time - self.began), 3)

    def _joules(self, name: str, last: _Sample, share: float) -> float | None:
        """Return the share of the energy; since the last sample it is that of the period before."""
        total, end = last.totals[name], self._period.end
        if total.watts is None:
            return None
        if end is None:
            return round(total.watts * (share - self._share), 3)
        first = end.totals.get(name)
        joules = total.joules - (first.joules if first else 0.0)
        joules += ((first and first.watts) or 0.0) * (end.share - self._share)
        return round(joules + total.watts * (share - last.share), 3)


class _Maximum:
    """The largest value from any sample on; kept are those that can still be one."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._values: list[float] = []

    def add(self, number: int, value: float, oldest: int) -> None:
        """Take a value; nobody asks for what was before `oldest`."""
        while self._values and self._values[-1] <= value:
            self._numbers.pop()
            self._values.pop()
        self._numbers.append(number)
        self._values.append(value)
        gone = bisect_left(self._numbers, oldest)
        del self._numbers[:gone], self._values[:gone]

    def since(self, number: int) -> float:
        """Return the largest from a sample on."""
        place = bisect_left(self._numbers, number)
        return self._values[place] if place < len(self._values) else 0.0


class _Peaks(NamedTuple):
    used: _Maximum
    busy: _Maximum


class Sampler:
    """Samples the devices twice a second on its own thread while requests run.

    Without any it looks each `idle_s` seconds. A GPU's energy is shared by the requests that run
    here if this process holds memory of it, or if it is the engine's `device`.
    """

    def __init__(
        self,
        look: Look | None = None,
        *,
        device: str = "",
        period_s: float = 0.5,
        idle_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look or Worker()
        self._device = device
        self._period_s, self._idle_s = period_s, idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stop, self._wake = threading.Event(), threading.Event()
        self._sleeps = False
        self._watches: dict[Watch, None] = {}
        self._share, self._shared_at = 0.0, clock()
        self._period = _Period()
        self._peaks: dict[str, _Peaks] = {}
        self._known: dict[str, _Total] = {}
        self.latest: tuple[Device, ...] = ()
        self._last = _Sample(0, self._shared_at, 0.0, {})
        self.sample()
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)
        self._thread.start()

    def watch(self) -> Watch:
        """Begin to follow one request; costs no system call."""
        with self._lock:
            now = self._advance()
            watch = Watch(self._last, self._period, now, self._share)
            self._watches[watch] = None
            if self._sleeps:
                self._sleeps = False
                self._wake.set()
        return watch

    def release(self, watch: Watch) -> tuple[DeviceUse, ...]:
        """Stop following, and return the use."""
        with self._lock:
            if watch.use is None:
                now = self._advance()
                del self._watches[watch]
                watch.use = watch.result(self._last, now, self._share, self._peaks)
            return watch.use

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def sample(self) -> None:
        """Look at the devices once; for the thread, and for tests."""
        seen = tuple(self._look())
        with self._lock:
            now, before = self._advance(), self._last
            oldest = next(iter(self._watches)).start.number if self._watches else before.number + 1
            totals = {one.name: self._total(one, seen, now, oldest) for one in seen}
            self._known |= totals
            self._last = _Sample(before.number + 1, now, self._share, totals)
            self._period.end, self._period = self._last, _Period()
            self.latest = seen

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            with self._lock:
                self._sleeps = not self._watches
            if self._sleeps:
                self._wake.wait(self._idle_s)
                self._wake.clear()
            if not self._stop.is_set():
                self.sample()

    def _advance(self) -> float:
        now = self._clock()
        if self._watches:
            self._share += (now - self._shared_at) / len(self._watches)
        self._shared_at = now
        return now

    def _total(self, device: Device, seen: Sequence[Device], now: float, oldest: int) -> _Total:
        before, last = self._known.get(device.name) or _Total(device), self._last
        number, span = last.number + 1, now - last.time
        peaks = self._peaks.setdefault(device.name, _Peaks(_Maximum(), _Maximum()))
        peaks.used.add(number, device.worker_used, oldest)
        peaks.busy.add(number, device.busy or 0.0, oldest)
        earlier = last.totals.get(device.name)
        is_ours = self._is_ours(device, seen)
        watts = _watts(earlier and earlier.device, device, span) if is_ours else None
        return _Total(
            device=device,
            samples=before.samples + 1,
            used=before.used + device.worker_used,
            busy_s=before.busy_s + (device.busy or 0.0) * span,
            joules=before.joules + (watts or 0.0) * (self._share - last.share),
            watts=watts,
        )

    def _is_ours(self, device: Device, seen: Sequence[Device]) -> bool:
        """Tell whether requests here use a GPU; a container may not see who holds its memory."""
        asked = self._device.partition(":")[0] == "cuda"
        only = sum(one.kind == "cuda" for one in seen) == 1
        named = device.key == self._device or (only and device.kind == "cuda")
        return device.worker_used > 0 or (asked and named)


def _watts(before: Device | None, now: Device, span: float) -> float | None:
    """Return the mean power between two looks: by the counter, else by the readings."""
    counted = before and before.joules
    if counted is not None and now.joules is not None and span > 0:
        return max(0.0, now.joules - counted) / span
    readings = [one.watts for one in (before, now) if one and one.watts is not None]
    return sum(readings) / len(readings) if readings else None
