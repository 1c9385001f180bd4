"""The process that is kept ahead of the next load."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
from tests.worker.rig import ask, children, echo, resolve, until

from headrace.core.stream import collect
from headrace.worker.process import WarmProcess, WorkerProcess


async def come(spare: WarmProcess) -> int:
    """Wait until the spare process is there, and return its pid."""
    spare.keep(True)
    await until(lambda: len(children()) == 1)
    await asyncio.sleep(0.3)
    return children()[0].pid


async def test_a_load_takes_the_process_that_waits() -> None:
    """M4: it answers as any other, under its own name, and a second load starts one itself."""
    spare = WarmProcess()
    pid = await come(spare)
    one, two = (WorkerProcess(echo(), resolve, spawn=spare.take) for _ in range(2))
    await one.start()
    assert one.pid == pid
    assert (await collect(one.ask(ask("hello")))).text == "hello"
    await two.start()
    assert two.pid != pid
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(one.died.wait(), 5)
    assert "echo was killed by SIGKILL" in (one.models()[0].reason or "")
    for worker in (one, two):
        await worker.aclose()
    assert children() == []


async def test_what_waited_and_died_is_not_used() -> None:
    """M5: a load starts a process of its own then, and a new spare can be had."""
    spare = WarmProcess()
    pid = await come(spare)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not psutil.pid_exists(pid))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        one = WorkerProcess(echo(), resolve, spawn=spare.take)
        await one.start()
        assert one.pid not in {None, pid}
        await one.aclose()
        assert await come(spare) != pid
    await spare.aclose()
    assert children() == []


async def test_a_load_that_is_given_up_leaves_no_process() -> None:
    """W8: cancelled while the process is still coming."""
    spare = WarmProcess()
    spare.keep(True)
    taking = asyncio.ensure_future(spare.take("nobody", lambda _: None))
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait({taking})
    await spare.aclose()
    assert children() == []


async def test_it_is_kept_and_let_go_as_one_is_told() -> None:
    """W8: twice the same changes nothing; nothing is left at the end."""
    spare = WarmProcess()
    pid = await come(spare)
    spare.keep(True)
    assert [child.pid for child in children()] == [pid]
    assert repr(spare) == "<WarmProcess kept>"
    spare.keep(False)
    spare.keep(False)
    assert repr(spare) == "<WarmProcess none>"
    await spare.aclose()
    assert children() == []
    await spare.aclose()
