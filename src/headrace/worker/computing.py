"""Whether a silent process hangs or computes, by the processor time that it has used."""

from __future__ import annotations

import time

import psutil

from headrace.worker.spawn import ChildProcess

# Of an embedder or reranker that computes, in `hang_s`.
_LONGEST_BATCH = 15


class Hangs:
    """Watches one child; asked again and again."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._used_s, self._used_at = 0.0, time.monotonic()

    def is_hung(self, limit_s: float, *, encodes: bool) -> bool:
        """Whether it has been silent for `limit_s` seconds.

        One that `encodes` is silent while it computes a batch, however long its texts are.
        """
        if not self._child.is_hung(limit_s):
            return False
        silent = not encodes or self._child.is_hung(_LONGEST_BATCH * limit_s)
        return silent or not self._computes(limit_s)

    def _computes(self, limit_s: float) -> bool:
        """Whether it has used a core for a fiftieth of the last `limit_s` seconds."""
        now = time.monotonic()
        try:
            used_s = sum(psutil.Process(self._child.pid).cpu_times()[:2])
        except psutil.Error:
            return False
        if used_s - self._used_s >= limit_s / 50:
            self._used_s, self._used_at = used_s, now
        return now - self._used_at <= limit_s
