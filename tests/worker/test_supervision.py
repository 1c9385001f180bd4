"""A worker's process under watch: stopped, hung, measured, counted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.worker.rig import ask, children, echo, first_delta, listed, process, resolve, until

from headrace.core.errors import Draining, GenerationFailed, LoadFailed, OutOfMemory, WorkerDied
from headrace.core.stream import collect
from headrace.worker.child import Child
from headrace.worker.process import WorkerProcess
from headrace.worker.wire import Alive, Close, Link


async def test_a_stopped_child_is_killed_at_once() -> None:
    """W19: SIGSTOP, in the middle of a stream and with nothing to do; long before hang_s."""
    async with process(tokens_per_second=20) as one:
        for busy in (True, False):
            stream = one.ask(ask("a" * 99))
            if busy:
                await first_delta(stream)
            assert one.pid is not None
            os.kill(one.pid, signal.SIGSTOP)
            began = time.monotonic()
            if busy:
                with pytest.raises(WorkerDied, match="was stopped from outside and killed"):
                    await listed(stream)
            async with asyncio.timeout(3):
                await one.died.wait()
            assert time.monotonic() - began < 1.5
            assert one.state == "failed"
            assert "stopped from outside" in (one.models()[0].reason or "")
            assert not children()
            await one.start()
        assert (await collect(one.ask(ask("ok")))).text == "ok"


async def test_a_child_stopped_for_a_moment_lives_on() -> None:
    """W19: one look is not enough, and neither is one each of two stops."""
    async with process(tokens_per_second=50) as one:
        running = asyncio.ensure_future(collect(one.ask(ask("a" * 60))))
        child = one._child
        assert child is not None
        assert child.pid is not None
        for _ in range(2):
            os.kill(child.pid, signal.SIGSTOP)
            await until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
            child._stopped = False
            assert not child.is_stopped()
            os.kill(child.pid, signal.SIGCONT)
            await until(lambda: psutil.Process(child.pid).status() != psutil.STATUS_STOPPED)
            assert not child.is_stopped()
        assert (await running).text == "a" * 60


async def test_a_child_stopped_while_it_loads_fails_the_load() -> None:
    """W5, W19: the load does not wait for its whole time limit."""
    one = WorkerProcess(echo(load_s=20), resolve)
    task = asyncio.ensure_future(one.start())
    await until(lambda: children())
    os.kill(children()[0].pid, signal.SIGSTOP)
    with pytest.raises(LoadFailed, match="was stopped from outside and killed while loading"):
        async with asyncio.timeout(5):
            await task
    assert one.state == "failed"
    assert not children()
    await one.aclose()


async def test_a_child_that_is_stopped_while_it_drains_does_not_hold_up_the_stop() -> None:
    """W8, W19: it is watched to the end."""
    one = WorkerProcess(echo(tokens_per_second=5), resolve)
    await one.start()
    stream = one.ask(ask("a" * 99))
    await first_delta(stream)
    rest = asyncio.ensure_future(listed(stream))
    began = time.monotonic()
    closing = asyncio.ensure_future(one.aclose(drain_s=20))
    await asyncio.sleep(0.05)
    assert one.pid is not None
    os.kill(one.pid, signal.SIGSTOP)
    with pytest.raises((WorkerDied, Draining)):
        await rest
    await closing
    assert time.monotonic() - began < 3
    assert (one.state, one.pid) == ("stopped", None)


async def test_nothing_watches_what_has_ended() -> None:
    """W8: no task is left of a worker that was closed, has died or could not be loaded."""
    before = asyncio.all_tasks()
    async with process() as one:
        await collect(one.ask(ask()))
    assert asyncio.all_tasks() == before
    failing = WorkerProcess(echo(fail_load="broken"), resolve)
    with pytest.raises(LoadFailed):
        await failing.start()
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before
    async with process() as other:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        await other.died.wait()
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() == before


async def test_its_memory_is_measured_and_its_streams_are_counted() -> None:
    """M2: of the child and not of us; nothing while there is no child."""
    one = WorkerProcess(echo(text="x" * 50, tokens_per_second=20), resolve)
    assert await one.memory() == {}
    await one.start()
    assert one.pid is not None
    held = await one.memory()
    assert held["cpu"] > 1 << 20
    assert held["cpu"] <= 2 * psutil.Process(one.pid).memory_info().rss
    stream = one.ask(ask())
    assert one.open_streams == 0
    await first_delta(stream)
    assert one.open_streams == 1
    await stream.aclose()
    assert one.open_streams == 0
    await one.aclose()
    assert await one.memory() == {}


async def test_a_stop_waits_until_the_device_has_its_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """M2: the driver still counts it for a moment after the process; not for ever."""
    asked: list[int] = []

    def held(pid: int) -> dict[str, int]:
        asked.append(pid)
        return {"cuda:0": 1} if len(asked) < 4 else {}

    monkeypatch.setattr("headrace.worker.process.process_memory", held)
    one = WorkerProcess(echo(), resolve)
    await one.start()
    pid = one.pid
    await one.aclose()
    assert asked == [pid] * 4
    monkeypatch.setattr("headrace.worker.process._FREED_LOOKS", 4)
    asked.clear()
    monkeypatch.setattr("headrace.worker.process.process_memory", lambda pid: {"cuda:0": 1})
    await one.start()
    began = time.monotonic()
    await one.aclose()
    assert time.monotonic() - began < 3
    assert one.state == "stopped"


@pytest.mark.parametrize(
    ("fault", "error", "lives"),
    [
        ("raise", GenerationFailed, True),
        ("oom", OutOfMemory, True),
        ("exit", WorkerDied, False),
        ("crash", WorkerDied, False),
        ("hang", WorkerDied, False),
    ],
)
async def test_a_fault_on_demand_is_seen_for_what_it_is(
    fault: str, error: type[Exception], lives: bool, tmp_path: Path
) -> None:
    """W17, W19: one stream fails where the worker lives, all where it does not."""
    trigger = tmp_path / "now"
    options: dict[str, Any] = {"trigger": str(trigger), "fault": fault, "tokens_per_second": 40}
    async with process(hang_s=0.5, **options) as one:
        streams = [one.ask(ask("a" * 30)) for _ in range(4)]
        for stream in streams:
            await first_delta(stream)
        running = [asyncio.ensure_future(listed(stream)) for stream in streams]
        trigger.touch()
        ended = await asyncio.gather(*running, return_exceptions=True)
        failed = [one for one in ended if isinstance(one, BaseException)]
        assert {type(one) for one in failed} == {error}
        assert len(failed) == (1 if lives else 4)
        assert one.state == ("ready" if lives else "failed")
        assert not trigger.exists()


async def test_the_child_beats_without_gathering_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W8, W19: many beats of its heart leave nothing behind, and Close ends it."""
    monkeypatch.setattr("headrace.worker.child._HEARTBEAT_S", 0.005)
    exits: list[int] = []
    monkeypatch.setattr("headrace.worker.child.os._exit", exits.append)
    before = asyncio.all_tasks()
    beats: list[Alive] = []
    decoder = msgspec.msgpack.Decoder(list[Alive])
    link = Link(decoder, receive=beats.extend, closed=lambda why: None)
    ours, theirs = socket.socketpair()
    serving = asyncio.ensure_future(Child(tmp_path / "scratch").serve(theirs))
    await asyncio.get_running_loop().create_connection(lambda: link, sock=ours)
    await until(lambda: len(beats) > 5)
    few = len(asyncio.all_tasks())
    await until(lambda: len(beats) > 60)
    assert len(asyncio.all_tasks()) == few
    link.send(Close(0.0))
    async with asyncio.timeout(5):
        await serving
    await until(lambda: exits)
    link.close()
    await until(lambda: asyncio.all_tasks() == before)
