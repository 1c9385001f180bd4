"""Contention between processes: noticed, answered, and over when it is over."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from tests.worker.rig import until

from headrace import machine
from headrace.engines import openmp
from headrace.engines.openmp import SpinGuard, Ticks, is_crowded

START = Ticks(10.0, 5.0)


def crowded(ran: float, waited: float, *, was: bool) -> bool:
    return is_crowded(START, Ticks(10.0 + ran, 5.0 + waited), 0.1, was=was)


def test_threads_that_wait_long_for_a_core_are_crowded() -> None:
    """The shares are those of the time in which there was something to run."""
    assert crowded(0.10, 0.09, was=False)
    assert not crowded(0.19, 0.01, was=False)


@pytest.mark.parametrize("was", [True, False])
def test_the_answer_stays_between_the_bounds_and_where_nothing_runs(was: bool) -> None:
    """So that it does not flutter, nor end with each answer."""
    assert crowded(0.17, 0.03, was=was) is was
    assert crowded(0.001, 0.001, was=was) is was
    assert crowded(0.1, -1.0, was=was) is was, "a thread that had waited long has ended"


class Crowd:
    """Stands for the system's account of the threads, and says how crowded it is."""

    def __init__(self, folder: Path) -> None:
        self.share, self._ran, self._waited = 0.0, 0, 0
        self._task = folder / "1"
        self._task.mkdir(parents=True)
        self.pass_time()

    def pass_time(self) -> None:
        self._ran += 10**9
        self._waited += int(self.share * 10**9)
        # At once, and in place: the guard may be reading, and keeps the file open.
        with (self._task / "schedstat").open("r+b" if self._ran > 10**9 else "wb") as file:
            os.pwrite(file.fileno(), f"{self._ran:20} {self._waited:20} 7\n".encode(), 0)


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


async def test_a_guard_adds_sleeping_threads_while_it_is_crowded(tmp_path: Path) -> None:
    """They come from the real library, which spins briefly then; they go with the crowd."""
    ctypes.CDLL("libgomp.so.1")
    crowd = Crowd(tmp_path / "task")

    def passing(wanted: bool) -> bool:
        crowd.pass_time()
        return guard.crowded is wanted

    # Many, so that other threads of the tests do not count.
    team = 40
    guard = SpinGuard(machine.allowed_cpus() + 2 - team, tasks=tmp_path / "task", period_s=0.01)
    before = native_threads()
    guard.start()
    crowd.share = 0.5
    await until(lambda: passing(True))
    await until(lambda: native_threads() >= before + team / 2)
    crowd.share = 0.0
    await until(lambda: passing(False))
    await until(lambda: native_threads() < before + team / 2)
    crowd.share = 0.5
    await until(lambda: passing(True))
    await until(lambda: native_threads() >= before + team / 2)
    guard.close()
    guard.close()
    assert not guard.crowded
    await until(lambda: native_threads() < before + team / 2)


def test_without_the_library_or_the_account_nothing_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other systems have neither."""
    with monkeypatch.context() as patch:
        patch.setattr(openmp, "_LIBRARY", "libnothing.so.1")
        unlinked = SpinGuard(2)
        unlinked.start()
    ctypes.CDLL("libgomp.so.1")
    uncounted = SpinGuard(2, tasks=tmp_path / "nothing")
    uncounted.start()
    for guard in (unlinked, uncounted):
        assert guard._thread is None
        guard.close()
