"""Processes: the memory of a process and its children, their end, settings of its interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Set
from pathlib import Path

import psutil

from headrace.machine.hardware import HOST, gpus

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MOST_OPEN_FILES = 65_536
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_LARGE = 256 << 10
_KILL_ROUNDS, _KILLED_S = 5, 0.2


def process_memory(pid: int) -> dict[str, int]:
    """Return the memory of a process and its descendants, in bytes by device.

    It is empty when the process has ended. On the host it is the resident memory. Pages of a
    model's file are counted in full even if another process shares them, so that the figure does
    not depend on what else is loaded.
    """
    return _held(family(pid), {pid})


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants: some engines start processes of their own."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


class Family:
    """The processes that a process has started, however they try to leave it.

    `leader` leads a session. Its family are its descendants, the members of its session, and the
    processes whose environment has `mark`, a text that no other process has. All of them are
    remembered: a driver can count memory for a process that has ended. Methods block.
    """

    def __init__(self, leader: int, mark: str) -> None:
        self._leader = leader
        self._mark = mark
        self._started = _started(leader)
        self._known: set[psutil.Process] = set()

    def __repr__(self) -> str:
        """Describe the leader and how many processes are known."""
        return f"<Family of {self._leader}, {len(self._known)} known>"

    def find(self) -> set[psutil.Process]:
        """Return all living members but the leader; takes a millisecond for 30 processes."""
        # Its number can be that of another process only after the whole session has ended.
        is_reused = _started(self._leader) not in (None, self._started)
        self._known |= _related(None if is_reused else self._leader, self._mark)
        return set(filter(_lives, self._known))

    def kill(self) -> None:
        """Kill all members, and what they start meanwhile."""
        _kill(self.find)

    def memory(self) -> dict[str, int]:
        """Return the memory that the known members hold, in bytes by device."""
        return _held(self._known)


def kill_marked(mark: str) -> None:
    """Kill the processes whose environment has `mark`, and their descendants."""
    _kill(lambda: set(filter(_lives, _related(None, mark))))


def _kill(find: Callable[[], Collection[psutil.Process]]) -> None:
    for _ in range(_KILL_ROUNDS):
        if not (members := find()):
            return
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.kill()
        # psutil.wait_procs leaves a reference cycle for each process that is no child of this one.
        until = time.monotonic() + _KILLED_S
        while any(map(_lives, members)) and time.monotonic() < until:
            time.sleep(_KILLED_S / 100)
        for process in members:
            # Orphans are children of this process, as a subreaper: no other process collects them.
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, os.WNOHANG)


def _related(leader: int | None, mark: str) -> set[psutil.Process]:
    """Return the family of `leader` without itself, and all processes with `mark`."""
    if sys.platform != "linux":
        return set(family(leader)[1:]) if leader is not None else set()
    parents: dict[int, int] = {}
    members: set[int] = set() if leader is None else {leader}
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            # After the name, which can contain anything: state, parent, group, session.
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            parents[pid] = int(fields[1])
            if int(fields[3]) == leader or _is_marked(pid, mark.encode()):
                members.add(pid)
    size = -1
    while len(members) != size:
        size = len(members)
        members |= {pid for pid, parent in parents.items() if parent in members}
    related: set[psutil.Process] = set()
    for pid in members - {leader, os.getpid()}:
        with contextlib.suppress(psutil.Error):
            related.add(psutil.Process(pid))
    return related


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        # Of another user.
        return False


def _started(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _held(processes: Collection[psutil.Process], more: Set[int] = frozenset()) -> dict[str, int]:
    pids = {process.pid for process in processes} | more
    held = {HOST: resident(processes)}
    if pids:
        held |= {gpu.key: gpu.worker_used for gpu in gpus(pids)}
    return {key: amount for key, amount in held.items() if amount}


def resident(processes: Iterable[psutil.Process]) -> int:
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


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return a factory of uvloop's event loops, or None for asyncio's own."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


def die_with_parent() -> None:
    """Make the kernel kill this process as soon as its parent has ended (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_descendants() -> None:
    """Make this process the parent of descendants whose own parent has ended (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tune_garbage_collection() -> None:
    """Exclude all present objects from garbage collection, and collect less often.

    A full collection visits everything that was imported, and stops all streams while it runs:
    for 145 ms at 512 streams.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def shorten_switch_interval() -> None:
    """Make threads that run Python code switch after 0.5 ms.

    With CPython's default of 5 ms, the event loop stopped for up to 30 ms while another thread
    packed spans for a collector. Not for the process of an engine: openvino lost 3 % by it.
    """
    sys.setswitchinterval(0.0005)


def share_malloc_arena() -> None:
    """Let all threads that are started later allocate from one arena (glibc only).

    Each would have one of its own and keep what it once needed: 10 MB after 20 minutes.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_ARENA_MAX, 1)
        # Fixed, as otherwise each large block that is freed makes the next one a part of the heap.
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def raise_open_files() -> None:
    """Let this process have as many open files as it may: each connection is one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
