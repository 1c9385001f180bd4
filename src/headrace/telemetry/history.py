"""Samples of the service over the last quarter of an hour, for charts."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from headrace.core.record import Activity, History, Sample
from headrace.core.status import PoolStatus

_EVERY_S = 5.0
_SAMPLES = 180


class HistoryRecorder:
    """Takes a sample every 5 s, and keeps the last 180 of them."""

    def __init__(self, status: Callable[[], PoolStatus], activity: Callable[[], Activity]) -> None:
        self._status = status
        self._activity = activity
        self._samples = deque[Sample](maxlen=_SAMPLES)

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            self.take()
            await asyncio.sleep(_EVERY_S)

    def take(self) -> None:
        """Take a sample now."""
        self._samples.append(sample(self._status(), self._activity(), time.time()))

    def history(self) -> History:
        """Return the samples, oldest first."""
        return History(every_s=_EVERY_S, samples=tuple(self._samples))


def sample(status: PoolStatus, activity: Activity, now: float) -> Sample:
    """Return the sums over all models; of times to the first token, the largest median."""
    rates = activity.rates
    first = [r.time_to_first_token_p50_ms for r in rates if r.time_to_first_token_p50_ms]
    return Sample(
        time=now,
        running=len(activity.running),
        queued=sum(model.queued for model in status.models),
        prompt_tokens_per_second=sum(r.prompt_tokens_per_second for r in rates),
        completion_tokens_per_second=sum(r.completion_tokens_per_second for r in rates),
        time_to_first_token_p50_ms=max(first, default=None),
        memory={device.name: device.booked for device in status.devices},
    )
