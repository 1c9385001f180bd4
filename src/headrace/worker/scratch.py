"""The private directories for temporary files of children, and the end of those left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from headrace.machine import kill_marked

TMPDIR = "TMPDIR"
"""The variable that names the directory to a child."""

_SCRATCH, _LOCK = "headrace-", ".lock"
_SETTLED_S = 60.0


class Scratch:
    """A private directory for temporary files of a child; locked while its parent lives."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the directory with its content."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def mark_of(scratch: Path) -> str:
    """Return what marks the processes that use a scratch directory: a variable of theirs."""
    return f"{TMPDIR}={scratch}"


def sweep(folder: Path) -> None:
    """Remove scratch directories in `folder` that no process locks: their parents were killed.

    Processes that still use one are killed.
    """
    for path in folder.glob(f"{_SCRATCH}*"):
        try:
            status = path.lstat()
            young = time.time() - status.st_mtime < _SETTLED_S
            if status.st_uid != os.geteuid() or young:
                continue
            with (path / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Not a scratch directory, removed already, or in use.
            continue
        kill_marked(mark_of(path))
        shutil.rmtree(path, ignore_errors=True)
