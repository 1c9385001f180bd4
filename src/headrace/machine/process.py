"""Processes: the memory of a process and its children, its end, and settings of its interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from headrace.machine.hardware import HOST, gpus

_PR_SET_PDEATHSIG = 1


def process_memory(pid: int) -> dict[str, int]:
    """Return the memory of a process and its descendants, in bytes by device.

    It is empty when the process has ended. On the host it is the resident memory. Pages of a
    model's file are counted in full even if another process shares them, so that the figure does
    not depend on what else is loaded.
    """
    processes = family(pid)
    held = {HOST: resident(processes)}
    held |= {
        gpu.key: gpu.worker_used for gpu in gpus({pid, *(process.pid for process in processes)})
    }
    return {key: amount for key, amount in held.items() if amount}


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants: some engines start processes of their own."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def resident(processes: Sequence[psutil.Process]) -> int:
    """Return the resident memory of processes, some of which may have ended."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def users_of(place: Path) -> list[psutil.Process]:
    """Return the processes of this user that have a file, or one in a folder, open or mapped."""
    files = [place, *place.rglob("*")] if place.is_dir() else [place]
    wanted = {str(file.resolve()) for file in files}
    return [process for process in psutil.process_iter() if _uses(process, wanted)]


def _uses(process: psutil.Process, paths: set[str]) -> bool:
    used: set[str] = set()
    with contextlib.suppress(psutil.Error, OSError):
        used.update(file.path for file in process.open_files())
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        # Not on every system.
        used.update(part.path for part in process.memory_maps(grouped=True))
    return not paths.isdisjoint(used)


def die_with_parent() -> None:
    """Make the kernel kill this process as soon as its parent has ended (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tune_garbage_collection() -> None:
    """Exclude all present objects from garbage collection, and collect less often.

    A full collection visits everything that was imported, and stops all streams while it runs:
    for 145 ms at 512 streams.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def shorten_switch_interval() -> None:
    """Make threads that run Python code switch after 0.5 ms.

    With CPython's default of 5 ms, the event loop stopped for up to 30 ms while another thread
    packed spans for a collector. Not for the process of an engine: openvino lost 3 % by it.
    """
    sys.setswitchinterval(0.0005)
