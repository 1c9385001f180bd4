"""What the child does that its parent cannot bring about at will."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from headrace.core.errors import ErrorRecord
from headrace.worker.child import Child
from headrace.worker.wire import Ended


class Queue:
    """Notes what is said, in order."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, message: Any) -> None:
        self.said.append(message)

    def flush(self) -> None:
        self.said.append("flushed")


async def over(error: ErrorRecord | None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let a stream end with an error, and return what was said and done."""
    child, line = Child(Path()), Queue()
    monkeypatch.setattr(child, "_link", line)
    monkeypatch.setattr(os, "_exit", line.said.append)
    task = asyncio.ensure_future(asyncio.sleep(0, error))
    await task
    child._streams[7] = task
    child._end(7, task)
    return line.said


async def test_a_child_whose_engine_lost_its_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """W17, M5: it is of no more use; the stream hears of it first, and the pool restarts it."""
    died = ErrorRecord(kind="WorkerDied", message="The engine core has gone.")
    assert await over(died, monkeypatch) == [Ended(7, died), "flushed", 1]


async def test_any_other_error_leaves_it_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """W19: one request's failure is nobody else's."""
    failed = ErrorRecord(kind="GenerationFailed", message="The engine failed.")
    assert await over(failed, monkeypatch) == [Ended(7, failed)]
    assert await over(None, monkeypatch) == [Ended(7)]
