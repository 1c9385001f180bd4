from __future__ import annotations

import asyncio

import pytest

from headrace.core.errors import Draining, LoadFailed, Loading
from headrace.worker.worker import Lifecycle


class Load:
    """A load that waits for its gate and counts its calls."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.gate = asyncio.Event()
        self.calls = 0
        self.error = error

    async def __call__(self) -> None:
        self.calls += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error


async def test_a_start_goes_through_loading_to_ready() -> None:
    """W7: created, loading, ready; a start of what is ready is nothing."""
    life, load = Lifecycle("m"), Load()
    assert life.state == "created"
    task = asyncio.ensure_future(life.start(load))
    await asyncio.sleep(0)
    assert life.state == "loading"
    assert repr(life) == "<m loading>"
    load.gate.set()
    await task
    assert life.state == "ready"
    await life.start(load)
    assert load.calls == 1


async def test_starts_at_the_same_time_share_one_load() -> None:
    """W5: idempotent."""
    life, load = Lifecycle("m"), Load()
    tasks = [asyncio.ensure_future(life.start(load)) for _ in range(10)]
    await asyncio.sleep(0)
    load.gate.set()
    await asyncio.gather(*tasks)
    assert load.calls == 1


async def test_a_caller_that_gives_up_does_not_end_the_load() -> None:
    """W5: the load belongs to all who wait."""
    life, load = Lifecycle("m"), Load()
    one, other = (asyncio.ensure_future(life.start(load)) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    load.gate.set()
    await other
    assert one.cancelled()
    assert life.state == "ready"


async def test_a_failed_load_leaves_failed_with_its_reason() -> None:
    """W5, W7: and another start may try again."""
    life, load = Lifecycle("m"), Load(LoadFailed("no such file"))
    load.gate.set()
    with pytest.raises(LoadFailed):
        await life.start(load)
    assert (life.state, life.reason) == ("failed", "no such file")
    assert repr(life) == "<m failed: no such file>"
    with pytest.raises(LoadFailed, match="no such file"):
        life.require_ready()
    load.error = None
    await life.start(load)
    assert (life.state, life.reason) == ("ready", None)
    life.require_ready()


async def test_any_exception_of_a_load_leaves_failed() -> None:
    """W5: a bug too is a load that failed."""
    life, load = Lifecycle("m"), Load(ZeroDivisionError())
    load.gate.set()
    with pytest.raises(LoadFailed):
        await life.start(load)
    assert life.state == "failed"


async def test_a_start_can_be_abandoned() -> None:
    """W7: a stop while loading ends the load, and everybody who waits for it."""
    life, load = Lifecycle("m"), Load()
    await life.abandon_start()
    task = asyncio.ensure_future(life.start(load))
    await asyncio.sleep(0)
    life.state = "draining"
    await life.abandon_start()
    with pytest.raises(Draining, match="while it was loading"):
        await task
    assert life.state == "draining"
    with pytest.raises(Draining):
        await life.start(load)


def test_use_at_the_wrong_time_is_a_typed_error() -> None:
    """W7: before ready, and after."""
    life = Lifecycle("m")
    for state in ("created", "loading"):
        life.state = state
        with pytest.raises(Loading, match=state):
            life.require_ready()
    for state in ("draining", "stopped"):
        life.state = state
        with pytest.raises(Draining, match=state):
            life.require_ready()


def test_what_is_being_stopped_does_not_fail() -> None:
    """W7: draining and stopped stay what they are."""
    life = Lifecycle("m")
    for state in ("draining", "stopped"):
        life.state = state
        life.fail("died")
        assert (life.state, life.reason) == (state, None)
