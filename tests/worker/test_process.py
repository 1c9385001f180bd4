"""A worker in a process of its own, on echo: the same shape, a life, and an end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.worker.rig import (
    ask,
    children,
    echo,
    finish,
    first_delta,
    listed,
    process,
    resolve,
    text,
    until,
)

from headrace.core.errors import (
    Draining,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    LoadFailed,
    Loading,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.events import Event, Progress
from headrace.core.request import CountRequest, DetokenizeRequest
from headrace.core.stream import collect, collect_count, collect_text
from headrace.log import LogSettings
from headrace.worker.process import WorkerProcess
from headrace.worker.scratch import Scratch, sweep


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of its own, to see what stays in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_it_answers_as_a_worker_in_this_process_does() -> None:
    """W9, W15, W16, W21, W22: the same events, figures, counts and metadata."""
    async with process(slots=3) as one:
        events = await listed(one.ask(ask("né🌍")))
        end = finish(events)
        assert isinstance(events[0], Progress)
        assert text(events) == "né🌍"
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (7, 8)
        assert end.metrics.queue_ms is not None
        assert 0 <= end.metrics.queue_ms < 5000, "the clock is one for both processes"
        assert (await collect_count(one.ask(CountRequest(text="né")))).token_ids == (110, 195, 169)
        assert await collect_text(one.ask(DetokenizeRequest(token_ids=(104, 105)))) == "hi"
        info = one.models()[0]
        assert (info.state, info.max_running, info.engine) == ("ready", 3, "echo")
        assert info.memory
        assert end.metrics.devices[0].worker_used != psutil.Process().memory_info().rss


async def test_errors_cross_over_as_they_are() -> None:
    """W17: type, field, figures."""
    async with process(fail_after=2, context_length=50) as one:
        with pytest.raises(GenerationFailed, match="fails as configured") as caught:
            await collect(one.ask(ask()))
        assert caught.value.metrics is not None
        assert caught.value.metrics.usage.completion_tokens == 2
        with pytest.raises(HeadraceError) as refused:
            await collect(one.ask(ask("a" * 99)))
        assert (type(refused.value).__name__, refused.value.param) == (
            "ContextOverflow",
            "prompt",
        )
        with pytest.raises(HeadraceError, match="vocabulary"):
            await collect_text(one.ask(DetokenizeRequest(token_ids=(999,))))
        assert one.state == "ready"
    async with process(oom_after=1) as one:
        with pytest.raises(OutOfMemory):
            await collect(one.ask(ask()))
        assert one.state == "ready"


async def test_fifty_streams_at_once() -> None:
    """W20: each its own answer."""
    async with process(slots=8, tokens_per_second=400) as one:
        asked = [asyncio.ensure_future(collect(one.ask(ask(f"number {n}")))) for n in range(50)]
        said = [result.text for result in await asyncio.gather(*asked)]
        assert said == [f"number {n}" for n in range(50)]


async def test_nothing_is_left_of_it(scratch: Path) -> None:
    """W8: no process, no file descriptor, no task, no directory; and so after each restart."""
    async with process() as warm:
        await collect(warm.ask(ask()))
    gc.collect()
    fds, tasks = psutil.Process().num_fds(), asyncio.all_tasks()
    one = WorkerProcess(echo(), resolve)
    for _ in range(2):
        await one.start()
        pid = one.pid
        assert pid is not None
        assert alive(pid)
        assert list(scratch.iterdir())
        assert (await collect(one.ask(ask("ok")))).text == "ok"
        await one.aclose()
        assert not alive(pid)
        assert (one.state, one.pid) == ("stopped", None)
    gc.collect()
    # Fewer, where an earlier test's ended meanwhile.
    await until(lambda: psutil.Process().num_fds() <= fds and asyncio.all_tasks() == tasks)
    assert not list(scratch.iterdir())


async def test_states_and_use_at_the_wrong_time() -> None:
    """W7: created, loading, ready, stopped; start and stop are idempotent."""
    one = WorkerProcess(echo(load_s=0.2), resolve)
    assert one.state == "created"
    assert "created" in repr(one)
    with pytest.raises(Loading):
        await collect(one.ask(ask()))
    starts = [asyncio.ensure_future(one.start()) for _ in range(5)]
    await until(lambda: one.state == "loading")
    await asyncio.gather(*starts)
    pid = one.pid
    await one.start()
    assert one.pid == pid, "five starts and one more made one process"
    assert f"pid {pid}" in repr(one)
    await one.aclose()
    await one.aclose()
    with pytest.raises(Draining):
        await collect(one.ask(ask()))
    with pytest.raises(Draining):
        await collect_count(one.ask(CountRequest(text="a")))
    assert one.models()[0].state == "stopped"


async def test_a_restart_keeps_the_spec() -> None:
    """W7: what it was bound to is what it is again."""
    one = WorkerProcess(echo(context_length=77, text="same"), resolve)
    for _ in range(2):
        await one.start()
        assert one.models()[0].context_length == 77
        assert (await collect(one.ask(ask()))).text == "same"
        await one.aclose()


async def test_a_stop_drains_and_then_ends_the_rest() -> None:
    """W8: what can end in time does; the rest gets an error, never a normal end."""
    one = WorkerProcess(echo(tokens_per_second=40), resolve)
    await one.start()
    short = asyncio.ensure_future(collect(one.ask(ask("abc"))))
    long = asyncio.ensure_future(collect(one.ask(ask("a" * 500))))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    closing = asyncio.ensure_future(one.aclose(drain_s=0.5))
    await asyncio.sleep(0)
    assert one.state == "draining"
    with pytest.raises(Draining):
        await collect(one.ask(ask()))
    assert (await short).text == "abc"
    with pytest.raises(Draining) as caught:
        await long
    assert caught.value.metrics is not None
    await closing
    assert time.monotonic() - began < 3


async def test_a_load_that_fails_is_typed_and_frees_the_process(scratch: Path) -> None:
    """W5: the reason is kept, the child is gone, a new start tries again."""
    one = WorkerProcess(echo(fail_load="broken weights"), resolve)
    for _ in range(2):
        with pytest.raises(LoadFailed, match="broken weights"):
            await one.start()
        assert (one.state, one.pid) == ("failed", None)
        assert one.models()[0].reason == "broken weights"
    await until(lambda: not children())
    assert not list(scratch.iterdir())
    await one.aclose()


async def test_a_load_that_takes_too_long_is_ended() -> None:
    """W5: load_timeout_s."""
    one = WorkerProcess(echo(load_s=30, load_timeout_s=0.5), resolve)
    with pytest.raises(LoadFailed, match=r"within 0\.5 s"):
        await one.start()
    assert one.state == "failed"
    await until(lambda: not children())


async def test_a_stop_while_loading_ends_the_child() -> None:
    """W8, W18: nothing goes on for nobody."""
    one = WorkerProcess(echo(load_s=30), resolve)
    task = asyncio.ensure_future(one.start())
    await until(lambda: children())
    await one.aclose()
    with pytest.raises(Draining):
        await task
    assert one.state == "stopped"
    assert not children()


CRASHES: list[tuple[int, str]] = [
    (signal.SIGKILL, "killed by SIGKILL"),
    (signal.SIGABRT, "killed by SIGABRT"),
    (signal.SIGSEGV, "killed by SIGSEGV"),
    (0, "ended"),
]


@pytest.mark.parametrize(("number", "cause"), CRASHES)
async def test_a_crash_mid_stream_ends_every_stream_with_an_error(
    number: int, cause: str, scratch: Path
) -> None:
    """W17, W19: within a second, with the cause; and a start makes it well again."""
    async with process(crash_after=3, crash_signal=int(number)) as one:
        got: list[Event] = []
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=cause):
            async for event in one.ask(ask()):
                got.append(event)
        assert time.monotonic() - began < 1
        assert text(got) in {"", "a", "ab", "abc"}
        await until(lambda: one.died.is_set())
        assert one.state == "failed"
        assert cause in (one.models()[0].reason or "")
        with pytest.raises(LoadFailed, match=cause):
            await collect(one.ask(ask()))
        assert not list(scratch.iterdir())
        await one.start()
        assert (one.state, one.died.is_set()) == ("ready", False)
        assert (await collect(one.ask(ask(max_tokens=2)))).text == "ab"


async def test_a_kill_from_outside_is_seen_at_once_by_all() -> None:
    """W17: streams in decode and in the queue, and counts, within a second."""
    async with process(tokens_per_second=10, max_running=1) as one:
        running, waiting = one.ask(ask("a" * 99)), one.ask(ask("b"))
        await first_delta(running)
        queued = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0.05)
        assert one.pid is not None
        os.kill(one.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await listed(running)
        with pytest.raises(WorkerDied):
            await queued
        assert time.monotonic() - began < 1
        await until(lambda: one.state == "failed")
        assert one.pid is None


async def test_the_last_words_of_the_child_are_in_the_detail() -> None:
    """W17: what it wrote to stderr is for the log and never in the message."""

    async with process(crash_after=1, crash_signal=int(signal.SIGABRT), slots=1) as one:
        child = one._child
        assert child is not None
        child._tail.append("native assertion failed")
        with pytest.raises(WorkerDied) as caught:
            await collect(one.ask(ask()))
        assert "native assertion failed" in (caught.value.detail or "")
        assert "native" not in caught.value.message


async def test_the_stderr_of_the_child_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    """W27: its log goes where ours goes, line by line."""
    one = WorkerProcess(echo(), resolve, log_settings=LogSettings(level="info", style="json"))
    await one.start()
    await collect(one.ask(ask("the secret prompt")))
    await one.aclose()
    logged = capfd.readouterr().err
    records = [msgspec.json.decode(line) for line in logged.splitlines()]
    assert [record["message"] for record in records] == [
        "headrace.worker.start",
        "headrace.worker.ready",
        "headrace.request",
    ]
    assert "secret" not in logged


async def test_a_worker_that_hangs_is_killed() -> None:
    """W19: no sign of life for hang_s while a request runs; the loop itself is blocked here."""
    async with process(hang_after=2, hang_s=0.5) as one:
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="hung and was killed"):
            await collect(one.ask(ask()))
        assert time.monotonic() - began < 4
        await until(lambda: one.state == "failed")
        await one.start()
        assert one.state == "ready"


async def test_an_idle_worker_and_a_slow_queue_do_not_hang() -> None:
    """W19: silence without work is no hang, nor is a wait behind others."""
    async with process(hang_s=1.5, tokens_per_second=8, max_running=1) as one:
        await asyncio.sleep(0.2)
        results = await asyncio.gather(*(collect(one.ask(ask("a" * 12))) for _ in range(2)))
        assert [len(result.text) for result in results] == [12, 12]


@pytest.mark.parametrize("phase", ["untouched", "queued", "prefill", "decode"])
async def test_closing_a_stream_in_any_phase_frees_all(phase: str) -> None:
    """W18: the slot is free for the next one when aclose returns; no listener is left."""
    speeds: dict[str, Any] = {"tokens_per_second": 20, "prefill_tokens_per_second": 1000}
    async with process(max_running=1, **speeds) as one:
        before = asyncio.all_tasks()
        holder = one.ask(ask("holds"))
        if phase == "queued":
            await first_delta(holder)
        stream = one.ask(ask("a" * 256))
        if phase == "queued":
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait({task})
        elif phase == "prefill":
            assert isinstance(await anext(stream), Progress)
        elif phase == "decode":
            await first_delta(stream)
        async with asyncio.timeout(0.5):
            await stream.aclose()
            await holder.aclose()
        child = one._child
        assert child is not None
        assert child.open_streams == 0
        assert asyncio.all_tasks() == before
        async with asyncio.timeout(1):
            assert isinstance(await anext(again := one.ask(ask())), Progress)
        await again.aclose()


PARENT = """
import asyncio, sys
from headrace.worker.process import WorkerProcess
from headrace.worker.scratch import Scratch, sweep
from tests.worker.rig import ask, children, echo, listed, resolve, until
async def main():
    one = WorkerProcess(echo(**{options}), resolve)
    await one.start()
    task = asyncio.ensure_future(listed(one.ask(ask())))
    await asyncio.sleep(0.3)
    print(one.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("options", [{"tokens_per_second": 1}, {"hang_after": 1}])
def test_a_killed_parent_takes_its_child_along(
    options: dict[str, Any], scratch: Path, wait_for: Callable[[Callable[[], object], float], None]
) -> None:
    """W8: within two seconds, also when the child hangs with its loop blocked."""
    program = PARENT.replace("{options}", repr(options))
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    wait_for(lambda: not alive(pid), 2)


async def test_requests_are_never_changed() -> None:
    """W9: not on their way to the child either."""
    async with process() as one:
        request = ask(stop=("y",), n=2, seed=3)
        before = msgspec.msgpack.encode(request)
        await collect(one.ask(request))
        assert msgspec.msgpack.encode(request) == before


def test_what_killed_parents_left_is_swept(tmp_path: Path, monkeypatch: Any) -> None:
    """W8: what nobody locks goes when the next child starts; what is in use or not ours stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    used, left = Scratch(), Scratch()
    left.close()
    young = Scratch()
    young.close()
    others = tmp_path / "headrace-2025-results"
    others.mkdir()
    for folder in (used.path, left.path, others):
        os.utime(folder, (0, 0))
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([used.path, young.path, others])
    used.remove()
    assert not used.path.exists()


def test_a_child_removes_only_its_own_directory(tmp_path: Path) -> None:
    """W8: where the private directory is gone, Python's choice of another one is not touched."""
    victim, scratch = tmp_path / "victim", tmp_path / "gone"
    victim.mkdir()
    (victim / "thesis").write_text("years of work")
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "headrace.worker.child", str(theirs.fileno()), str(scratch)]
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(victim)}
    child = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment)
    theirs.close()
    ours.close()
    assert child.wait(10) == 0
    assert (victim / "thesis").exists()


async def test_nothing_is_imported_from_the_directory_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W5: a msgspec.py beside a download is not run."""
    (tmp_path / "msgspec.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    async with process() as one:
        assert (await collect(one.ask(ask("ok")))).text == "ok"


async def test_what_cannot_be_sent_is_refused_and_harms_nobody() -> None:
    """W17: a number that msgpack does not know is the sender's error alone."""
    async with process() as one:
        good = asyncio.ensure_future(collect(one.ask(ask("ok"))))
        bad = one.ask(ask("x", template_options={"a": 1 << 70}))
        with pytest.raises(InvalidRequest):
            await collect(bad)
        assert (await good).text == "ok"


async def test_a_stream_that_is_cancelled_before_the_child_began_it_ends_at_once() -> None:
    """W18: both messages in one frame; the child answers all the same."""
    async with process(tokens_per_second=5) as one:
        began = time.monotonic()
        for _ in range(10):
            stream = one.ask(ask("abcdef"))
            task = asyncio.ensure_future(anext(stream, None))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            await stream.aclose()
        assert time.monotonic() - began < 2


async def test_a_reader_that_pauses_is_not_a_hung_worker() -> None:
    """W19: what has ended in the child is not watched, however slowly it is read."""
    async with process(hang_s=0.5) as one:
        stream = one.ask(ask("abc"))
        await anext(stream)
        await asyncio.sleep(2)
        assert one.state == "ready"
        assert text([event async for event in stream]) == "abc"


async def test_an_echoed_prompt_may_wait_longer_than_hang_s() -> None:
    """W19: only what holds a slot can hang."""
    async with process(hang_s=0.6, max_running=1, tokens_per_second=10, text="x" * 15) as one:
        first = asyncio.ensure_future(collect(one.ask(ask("a"))))
        await asyncio.sleep(0.1)
        second = await collect(one.ask(ask("b", echo=True)))
        assert second.text == "b" + "x" * 15
        assert (await first).finish_reason == "stop"
