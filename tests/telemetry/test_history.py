"""The samples that charts begin with."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from tests.api.fakes import DEVICES, FakeAdmin

from headrace.core.record import Activity, Rates, RunningRequest
from headrace.core.status import ModelStatus, PoolStatus
from headrace.telemetry.history import HistoryRecorder, sample

ACTIVITY = Activity(
    running=(
        RunningRequest(id="r", model="m", operation="chat", client="", since=1, phase="decode"),
    ),
    rates=(
        Rates(
            model="a",
            window_s=60,
            completion_tokens_per_second=2,
            prompt_tokens_per_second=1,
            time_to_first_token_p50_ms=30,
        ),
        Rates(
            model="b",
            window_s=60,
            completion_tokens_per_second=3,
            time_to_first_token_p50_ms=70,
        ),
        Rates(model="c", window_s=60),
    ),
)


def test_a_sample_sums_over_models() -> None:
    """Issue 16.1: tokens/s, time to first token, queue and memory."""
    models = tuple(ModelStatus(id=name, source="s", state="ready", queued=2) for name in "ab")
    taken = sample(PoolStatus(models=models, devices=DEVICES), ACTIVITY, 9.0)
    assert (taken.time, taken.running, taken.queued) == (9.0, 1, 4)
    assert (taken.completion_tokens_per_second, taken.prompt_tokens_per_second) == (5, 1)
    assert taken.time_to_first_token_p50_ms == 70
    assert taken.memory == {"cpu": 30}
    assert sample(PoolStatus(models=(), devices=()), Activity(), 1).memory == {}


async def test_samples_are_taken_and_bounded() -> None:
    """Issue 16, must show 2: a quarter of an hour, however long the service runs."""
    recorder = HistoryRecorder(FakeAdmin().status, lambda: ACTIVITY)
    running = asyncio.ensure_future(recorder.run())
    await asyncio.sleep(0)
    assert len(recorder.history().samples) == 1
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    for _ in range(500):
        recorder.take()
    kept = recorder.history()
    assert len(kept.samples) * kept.every_s == 900
