"""A request that ends the process of its model, with real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from headrace.core.errors import HeadraceError, Quarantined, WorkerDied
from headrace.model_worker import AsyncModelWorker


async def test_poison_ends_two_processes_and_is_refused(home: Path, tmp_path: Path) -> None:
    """Issue 11.6: it is tried again alone, once; then refused, while others are answered."""
    trigger = tmp_path / "poison"
    options: dict[str, Any] = {"trigger": str(trigger), "fault": "crash"}
    async with AsyncModelWorker("builtin:echo", **options) as worker:

        async def poison() -> HeadraceError | None:
            # As long as it runs, the engine finds the file, and ends its process.
            asked = asyncio.ensure_future(worker.generate("poison", max_tokens=4))
            while not asked.done():
                trigger.touch()
                await asyncio.wait({asked}, timeout=0.01)
            trigger.unlink(missing_ok=True)
            error = asked.exception()
            assert error is None or isinstance(error, HeadraceError)
            return error

        assert isinstance(await poison(), WorkerDied)
        for _ in range(3):
            refused = await poison()
            assert isinstance(refused, Quarantined)
            assert refused.retry_after_s == pytest.approx(60, abs=30)
        assert (await worker.generate("good", max_tokens=4)).text == "good"
