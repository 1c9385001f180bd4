"""Makes OpenMP threads sleep instead of spin while other processes need the cores.

llama.cpp's threads synchronise some thousand times for each token, and the first to arrive spins
until the last has arrived. With a core for each thread that is fastest. When another process needs
the same cores, spinning takes the time of the thread that is waited for: two models on one machine
fall to a tenth of their speed. So this measures ten times a second how long the process's threads
wait for a core; while that is long, they spin briefly and then sleep.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from headrace import machine

_TASKS = Path("/proc/self/task")
_LIBRARY = "libgomp.so.1"
_PERIOD_S = 0.1
_BUSY, _CROWDED, _FREE = 0.2, 0.2, 0.1


class Ticks(NamedTuple):
    """Seconds that the threads of this process ran, and waited for a core, since they began."""

    ran: float
    waited: float


def is_crowded(before: Ticks, now: Ticks, period_s: float, *, was: bool) -> bool:
    """Whether other processes need our cores; `was` is the last result, kept while nothing runs."""
    ran, waited = now.ran - before.ran, now.waited - before.waited
    if ran < _BUSY * period_s or waited < 0:
        return was
    return waited > (_FREE if was else _CROWDED) * (ran + waited)


class SpinGuard:
    """Watches this process on a thread of its own, from `start` to `close`."""

    def __init__(self, threads: int, *, tasks: Path = _TASKS, period_s: float = _PERIOD_S) -> None:
        self._tasks = tasks
        self._period_s = period_s
        # GNU's OpenMP spins briefly once it has more threads than there are cores. A team of
        # threads that only sleep makes it so, at run time; its settings are read only once.
        self._team = max(2, machine.allowed_cpus() - threads + 2)
        self._over = threading.Event()
        self._end_team: threading.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def crowded(self) -> bool:
        """Whether the threads spin only briefly now."""
        return self._end_team is not None

    def start(self) -> None:
        """Start watching, where the process uses GNU's OpenMP and the system counts waiting."""
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            threads = _Threads(self._tasks)
            start = threads.ticks()
            self._thread = threading.Thread(
                target=self._watch, args=(library, threads, start), daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, library: ctypes.CDLL, threads: _Threads, before: Ticks) -> None:
        began = time.monotonic()
        while not self._over.wait(self._period_s):
            now, ended = threads.ticks(), time.monotonic()
            self._set(library, is_crowded(before, now, ended - began, was=self.crowded))
            before, began = now, ended
        self._set(library, crowded=False)
        threads.close()

    def _set(self, library: ctypes.CDLL, crowded: bool) -> None:
        if crowded and self._end_team is None:
            end = self._end_team = threading.Event()
            threading.Thread(
                target=_sleep, args=(library, self._team, end), name="openmp team", daemon=True
            ).start()
        elif not crowded and self._end_team is not None:
            self._end_team.set()
            self._end_team = None


def _sleep(library: ctypes.CDLL, team: int, end: threading.Event) -> None:
    # The team does nothing; its threads stay until the thread that made it ends.
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    library.GOMP_parallel(nothing, None, team, 0)
    end.wait()


def physical_cores() -> int:
    """Return how many physical cores this process may use: a thread that computes needs one."""
    return min(machine.usable_cpus(), psutil.cpu_count(logical=False) or 1)


class _Threads:
    """The times of all threads of a process. Files stay open: opening costs more than reading."""

    def __init__(self, tasks: Path) -> None:
        self._tasks = tasks
        self._files: dict[str, int] = {}

    def ticks(self) -> Ticks:
        """Return the sums."""
        ran = waited = 0
        names = [task.name for task in self._tasks.iterdir()]
        for ended in self._files.keys() - set(names):
            os.close(self._files.pop(ended))
        for name in names:
            # A thread may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if name not in self._files:
                    self._files[name] = os.open(self._tasks / name / "schedstat", os.O_RDONLY)
                thread_ran, thread_waited, _slices = os.pread(self._files[name], 100, 0).split()
                ran += int(thread_ran)
                waited += int(thread_waited)
        return Ticks(ran / 1e9, waited / 1e9)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])
