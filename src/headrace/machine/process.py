"""Processes: the memory of a process and its children, and their end."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Sequence

import psutil

from headrace.machine.hardware import HOST, gpus

_PR_SET_PDEATHSIG = 1


def process_memory(pid: int) -> dict[str, int]:
    """Return what a process and those it started hold now; nothing when it has gone.

    In bytes by device. Of the host it is the resident memory. Pages of a model's file are counted
    in full, also when another process shares them: so the figure does not change with what else
    is loaded.
    """
    processes = family(pid)
    held = {HOST: resident(processes)}
    held |= {
        gpu.key: gpu.worker_used for gpu in gpus({pid, *(process.pid for process in processes)})
    }
    return {key: amount for key, amount in held.items() if amount}


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started; some engines have processes of their own."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def resident(processes: Sequence[psutil.Process]) -> int:
    """Return the resident memory of processes, some of which may have gone."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def die_with_parent() -> None:
    """Have the kernel end this process as soon as its parent has ended (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
