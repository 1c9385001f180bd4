"""ModelWorker and AsyncModelWorker, as a program uses them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.conftest import MODEL_HOME
from tests.worker.rig import children

from headrace import AsyncModelWorker, Delta, Finish, Message, ModelSpec, ModelWorker
from headrace.core.errors import (
    ConfigError,
    Draining,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    NotStarted,
    QueueFull,
    RequestError,
    Unsupported,
    WorkerDied,
    kinds,
)
from headrace.sync import _Loop


@pytest.fixture
def echo(home: Path) -> Iterator[ModelWorker]:
    with ModelWorker("echo", tokens_per_second=200) as worker:
        yield worker


@pytest.mark.usefixtures("smollm2_path")
def test_the_first_page_of_the_manual(monkeypatch: pytest.MonkeyPatch) -> None:
    """W9, W10, W15, W16, W21, W22: on the real model, found by its short name."""
    monkeypatch.setenv("HEADRACE_HOME", str(MODEL_HOME))
    with ModelWorker("smollm2", slots=2, threads=1, context_length=1024) as worker:
        events = list(worker.generate_stream("Name three rivers.", max_tokens=12, temperature=0))
        deltas = [event for event in events if isinstance(event, Delta)]
        assert isinstance(events[-1], Finish)
        assert events[-1].usage.completion_tokens == 12
        said = worker.generate("Name three rivers.", max_tokens=12, temperature=0)
        assert said.text == "".join(delta.text for delta in deltas)
        messages: list[Any] = [{"role": "user", "content": "Say hi."}]
        result = worker.generate(messages=messages, max_tokens=8, temperature=0)
        assert result.text
        assert messages == [{"role": "user", "content": "Say hi."}]
        same = worker.generate(messages=[Message("user", "Say hi.")], max_tokens=8, temperature=0)
        assert same.text == result.text
        assert result.metrics.engine == "llamacpp"
        count = worker.count_tokens("Name three rivers.")
        assert count.count == events[-1].usage.prompt_tokens
        assert worker.count_tokens(messages=messages).count == result.usage.prompt_tokens
        assert worker.detokenize(count.token_ids or ()) == "Name three rivers."
        info = worker.metadata
        assert (info.engine, info.format, info.context_length) == ("llamacpp", "gguf", 1024)
        # After `headrace tune` there is more to tell.
        assert info.engine_reason.startswith("gguf on cpu: llamacpp")
        assert {"system", "user", "assistant"} <= set(info.roles)
        assert (info.quantization, info.state, info.device) == ("Q4_1", "ready", "cpu")
    assert worker.state == "stopped"


def test_binding_loads_nothing_and_starts_nothing(home: Path) -> None:
    """W1: no weights, no process, no engine library."""
    program = """
import sys, threading
from headrace import ModelWorker
worker = ModelWorker("smollm2")
assert worker.state == "created", worker
assert worker.metadata.id == "smollm2"
assert not {"xllamacpp", "torch", "fastapi", "llguidance"} & sys.modules.keys()
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not home.exists()


@pytest.mark.usefixtures("home")
def test_a_wrong_argument_is_an_error_with_a_hint() -> None:
    """W2, W3: of the model, of the engine, of the request."""
    with pytest.raises(ConfigError, match="slots"):
        ModelWorker("echo", slotz=3).start()  # pyright: ignore[reportCallIssue]
    with pytest.raises(HeadraceError, match="smollm2"):
        ModelWorker("smolm2").start()
    with pytest.raises(HeadraceError, match="llamacpp"):
        ModelWorker("echo", engine="lamacpp").start()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"temprature": 0}, "did you mean temperature"),
        ({"nonsense_at_all": 0}, "no option 'nonsense_at_all'"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ],
)
def test_a_wrong_option_is_refused_by_name(
    options: dict[str, Any], hint: str, echo: ModelWorker
) -> None:
    """W11: nothing is dropped in silence; the worker lives on."""
    prompt = None if "messages" in options else "a"
    with pytest.raises(InvalidRequest, match=hint):
        echo.generate(prompt, **options)
    with pytest.raises(InvalidRequest):
        echo.generate("a", messages=[{"role": "user", "content": "both"}])
    with pytest.raises(Unsupported, match="top_p"):
        echo.generate("a", top_p=0.5)
    assert echo.generate("ok", stop="x").text == "ok"


def test_closing_the_iterator_early_frees_the_slot(home: Path) -> None:
    """W18: with one slot and no queue, the next answer is not refused."""
    with ModelWorker("echo", max_running=1, max_queued=0, tokens_per_second=20) as worker:
        for ends in ("close", "break", "raise"):
            stream = worker.generate_stream("a" * 200)
            seen = 0
            try:
                for event in stream:
                    seen += isinstance(event, Delta)
                    if seen == 2 and ends == "raise":
                        raise LookupError
                    if seen == 2:
                        break
            except LookupError:
                pass
            if ends == "close":
                stream.close()  # pyright: ignore[reportAttributeAccessIssue]
            del stream
            began = time.monotonic()
            assert worker.generate("b", max_tokens=1).text == "b"
            assert time.monotonic() - began < 1


def test_a_stop_answers_the_threads_that_wait(home: Path) -> None:
    """W8: with an error, and none of them waits for ever."""
    with ModelWorker("echo", tokens_per_second=20) as worker, ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(worker.generate, "a" * 500) for _ in range(4)]
        time.sleep(0.3)
        worker.stop()
        for one in waiting:
            with pytest.raises(Draining):
                one.result(timeout=5)


def test_closing_the_bridge_lets_what_others_wait_for_end() -> None:
    """W8: a thread in a call gets its answer though the loop is being closed."""
    bridge = _Loop()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: bridge.run(asyncio.sleep(0.3, "answered")))
        time.sleep(0.1)
        bridge.close()
        assert waiting.result(timeout=5) == "answered"


def threads_left(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return threads that are here since, of which somebody has to think.

    Those that wait for a child's end are asyncio's own, and end a moment after it. An engine of
    other tests in this process may make a team of OpenMP's, when the machine is crowded.
    """
    others = ("asyncio", "waitpid", "openmp")
    return [one for one in {*threading.enumerate()} - before if not one.name.startswith(others)]


def test_a_stream_that_outlives_its_worker_is_closed_with_it(home: Path) -> None:
    """W8, W18: and closing it later starts nothing."""
    before = set(threading.enumerate())
    with ModelWorker("echo", tokens_per_second=50) as worker:
        stream = worker.generate_stream("a" * 100)
        next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not children()
    assert not threads_left(before)


def test_many_threads_share_one_worker(echo: ModelWorker) -> None:
    """W9, W20: each thread gets its own answer."""

    def answer(number: int) -> str:
        events = echo.generate_stream(f"thread {number}")
        return "".join(event.text for event in events if isinstance(event, Delta))

    with ThreadPoolExecutor(12) as threads:
        said = list(threads.map(answer, range(36)))
    assert said == [f"thread {number}" for number in range(36)]


def test_restart_keeps_the_spec_and_makes_a_new_process(home: Path) -> None:
    """W7: also the arguments it was made with; stop and start are idempotent."""
    with ModelWorker("echo", text="same", context_length=99) as worker:
        first = {child.pid for child in children()}
        worker.start()
        assert {child.pid for child in children()} == first
        worker.restart()
        assert first.isdisjoint(child.pid for child in children())
        assert worker.generate("x").text == "same"
        assert worker.metadata.context_length == 99
    worker.stop()
    assert worker.state == "stopped"
    assert not children()


def test_a_spec_is_a_worker(home: Path) -> None:
    """W1: from_spec."""
    spec = ModelSpec(name="mine", model="builtin:echo", options={"text": "from a spec"})
    with ModelWorker.from_spec(spec) as worker:
        assert worker.metadata.id == "mine"
        assert worker.generate("x").text == "from a spec"
    assert "mine stopped" in repr(worker)
    with pytest.raises(ConfigError):
        ModelWorker(ModelSpec(name="bad", model="builtin:echo", options={"texxt": "x"})).start()


def test_without_a_process_it_is_the_same(home: Path) -> None:
    """W9: isolate=False answers alike, and leaves no thread behind."""
    before = set(threading.enumerate())
    with ModelWorker("echo", isolate=False) as worker:
        assert not children()
        assert worker.generate("né🌍").text == "né🌍"
        assert worker.count_tokens("né").count == 3
    assert not threads_left(before)


def test_a_failed_start_leaves_nothing(home: Path) -> None:
    """W5: no thread, no process."""
    before = set(threading.enumerate())
    with pytest.raises(HeadraceError, match="no luck"), ModelWorker("echo", fail_load="no luck"):
        pass
    assert not threads_left(before)
    assert not children()


def test_an_interrupt_stops_the_answer_and_not_the_worker(home: Path) -> None:
    """W18: Ctrl-C in a blocking call ends that call, frees its slot, and the worker answers on."""
    program = """
import signal, threading, os, time
from headrace import ModelWorker
with ModelWorker("echo", max_running=1, tokens_per_second=20) as worker:
    for call in (lambda: worker.generate("a" * 500),
                 lambda: list(worker.generate_stream("a" * 500))):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            call()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        began = time.monotonic()
        assert worker.generate("b", max_tokens=1).text == "b"
        assert time.monotonic() - began < 1
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stdout) == (0, "interrupted\ninterrupted\n"), ended.stderr


def test_an_interrupt_while_loading_ends_the_load(home: Path) -> None:
    """W5, W8: the child goes with it."""
    program = """
from headrace import ModelWorker
with ModelWorker("echo", load_s=60):
    pass
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as parent:
        process = psutil.Process(parent.pid)
        end = time.monotonic() + 10
        while not process.children():
            assert time.monotonic() < end
            time.sleep(0.02)
        (child,) = process.children()
        time.sleep(0.3)
        parent.send_signal(signal.SIGINT)
        parent.wait(10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_the_asynchronous_face(home: Path) -> None:
    """W9, W10: the same words, awaited."""
    async with AsyncModelWorker("echo") as worker:
        stream = worker.generate_stream("né🌍")
        events = [event async for event in stream]
        assert isinstance(events[-1], Finish)
        assert (await worker.generate([104, 105])).text == "hi"
        assert (await worker.count_tokens("abc")).count == 3
        assert await worker.detokenize([104]) == "h"
        assert worker.state == "ready"
        results = await asyncio.gather(*(worker.generate(str(n)) for n in range(20)))
        assert [result.text for result in results] == [str(n) for n in range(20)]
        await worker.restart()
        assert "ready" in repr(worker)
    assert worker.state == "stopped"
    with pytest.raises(NotStarted, match=r"echo is stopped: call start\(\)"):
        await worker.generate("x")


@pytest.mark.usefixtures("home")
def test_the_hosts_arguments_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """W3: argv belongs to the host program."""
    monkeypatch.setattr(sys, "argv", ["host", "--engine", "nonsense", "--text=argv"])
    with ModelWorker("echo", isolate=False) as worker:
        assert worker.generate("mine").text == "mine"


def test_nothing_enables_code_of_a_repository(home: Path) -> None:
    """W28: off unless the configuration says so for a pinned revision."""
    assert ModelSpec(name="m", model="m").trust_remote_code is False
    assert ModelWorker("echo")._worker.spec.trust_remote_code is False
    with pytest.raises(ConfigError, match="revision"):
        ModelWorker("hub:org/model", trust_remote_code=True)
    pinned = ModelWorker("hub:org/model", trust_remote_code=True, revision="a" * 40)
    assert pinned._worker.spec.trust_remote_code


async def test_the_queue_is_bounded(home: Path) -> None:
    """W20: a request beyond `max_queued` is refused, with a time to come back."""
    worker = AsyncModelWorker(
        "echo", max_running=1, max_queued=1, tokens_per_second=100, isolate=False
    )
    async with worker:
        tasks = [asyncio.ensure_future(worker.generate("a" * 20)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught:
            await worker.generate("too many")
        assert caught.value.retry_after_s is not None
        assert [(await task).text for task in tasks] == ["a" * 20] * 2


def test_restart_after_a_stop_and_a_second_stop(home: Path) -> None:
    """W7: stop is idempotent, and restart keeps the specification."""
    worker = ModelWorker("echo")
    worker.start()
    worker.stop()
    worker.stop()
    assert worker.state == "stopped"
    worker.restart()
    assert worker.generate("again").text == "again"
    worker.stop()


# A loop that ends with a process open leaves its transports to the garbage collector.
def test_it_can_be_used_in_one_event_loop_after_another(home: Path) -> None:
    """W7, W8: what an event loop took with it is gone, and a new start works."""
    # In a process of its own: the garbage of a loop that just ends is nobody else's.
    program = """
import asyncio, time
import psutil
from headrace import AsyncModelWorker
from headrace.core.errors import NotStarted

worker = AsyncModelWorker("echo")

async def first():
    await worker.start()
    assert (await worker.generate("one")).text == "one"

async def second():
    try:
        await worker.generate("not started here")
    except NotStarted:
        await worker.start()
        assert (await worker.generate("two")).text == "two"
        await worker.stop()

asyncio.run(first())
(child,) = psutil.Process().children()
asyncio.run(second())
assert worker.state == "stopped"
asyncio.run(worker.stop())
end = time.monotonic() + 10
while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
    assert time.monotonic() < end, "the first loop's process goes on"
    time.sleep(0.02)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_another_event_loop_is_told_where_the_model_is(home: Path) -> None:
    with ModelWorker("echo") as worker, pytest.raises(InvalidRequest, match="another event loop"):
        asyncio.run(worker._worker.generate("x"))


def worker_pid(worker: AsyncModelWorker) -> int | None:
    assert worker._pool is not None
    (entry,) = worker._pool.entries.values()
    live = entry.replicas[0].worker
    return live.pid if live else None


async def test_an_answer_outlives_its_process(home: Path) -> None:
    """M5, W19: the worker is started again, and the stream goes on where it was cut."""
    async with AsyncModelWorker("echo", tokens_per_second=100) as worker:
        text, killed = "", False
        async for event in worker.generate_stream("abcdefghijklmnopqrstuvwxyz"):
            if isinstance(event, Delta):
                text += event.text
            if len(text) > 5 and not killed:
                killed, pid = True, worker_pid(worker)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
            if isinstance(event, Finish):
                assert event.metrics.continuations == 1
        assert text == "abcdefghijklmnopqrstuvwxyz"
        assert (await worker.generate("and on")).text == "and on"


async def test_a_blocking_stream_can_be_read_where_another_loop_runs(home: Path) -> None:
    """A notebook cell runs inside of a loop."""
    with ModelWorker("echo", isolate=False) as worker:
        events = list(worker.generate_stream("hi"))
        assert "".join(event.text for event in events if isinstance(event, Delta)) == "hi"


def test_a_stop_in_the_wrong_loop_changes_nothing(home: Path) -> None:
    with ModelWorker("echo", isolate=False) as worker:
        with pytest.raises(InvalidRequest):
            asyncio.run(worker._worker.stop())
        assert worker.state == "ready"
        assert worker.generate("still there").text == "still there"


def test_threads_share_one_loop(home: Path) -> None:
    worker = ModelWorker("echo", isolate=False)
    with ThreadPoolExecutor(4) as threads:
        loops = set(threads.map(lambda _: worker._own_loop(), range(8)))
    assert len(loops) == 1
    worker.stop()


@pytest.mark.parametrize("folder", ["x\u3000y", "🙂\u200d e\u0301"])
def test_a_model_in_a_folder_of_any_name(home: Path, smollm2_path: Path, folder: str) -> None:
    """Issue 12.13: what exists is loaded."""
    path = home.parent / folder / "日本 model.gguf"
    path.parent.mkdir()
    path.symlink_to(smollm2_path)
    with ModelWorker(str(path), slots=1, threads=1, context_length=256) as worker:
        assert worker.metadata.id == "日本 model"
        assert worker.generate("Hello", max_tokens=2).usage.completion_tokens == 2


def test_a_worker_that_is_not_started_says_what_to_do(home: Path) -> None:
    """Issue 12.22, 12.23: it is no error to try again."""
    worker = ModelWorker("echo")
    with pytest.raises(NotStarted, match=r"echo has not been started: call start\(\)") as caught:
        worker.generate("x")
    assert isinstance(caught.value, RequestError)
    worker.start()
    worker.stop()
    with pytest.raises(NotStarted, match="echo is stopped"):
        list(worker.generate_stream("x"))
    worker.stop()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_is_not_the_process_of_the_model(echo: ModelWorker) -> None:
    """Issue 12.22: it says so, and does not wait for a thread that it does not have."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            echo.generate("x")
        except InvalidRequest as error:
            os.write(writer, error.message.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        assert "echo was started in another process" in told.read()
    os.waitpid(pid, 0)
    assert echo.generate("here").text == "here"


@pytest.mark.parametrize(
    "options",
    [
        {"stop": None}, {"stop": None, "temperature": None, "n": None, "deadline_s": None},
        {"logit_bias": None, "stop_token_ids": None, "ignore_eos": None, "json_schema": None},
    ],
)  # fmt: skip
def test_none_is_an_argument_that_is_not_given(options: Any, echo: ModelWorker) -> None:
    """Issue 12.23: wrappers pass their own defaults on."""
    assert echo.generate("text", **options).text == "text"


def test_messages_take_parts(echo: ModelWorker) -> None:
    """Issue 12.23: content as over HTTP, refused as over HTTP."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    assert "abcd" in echo.generate(messages=[{"role": "user", "content": parts}]).text
    turn = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": []}
    assert echo.count_tokens(messages=[Message("user", "a"), turn]).count
    wrong: list[tuple[Any, str]] = [
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([Message("user", "a"), {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": "a", "nmae": "b"}], "messages[].nmae"),
        (
            [{"role": "user", "content": "a", "tool_calls": [{}]}],
            "messages[0].tool_calls[0].function",
        ),
        ([3], "messages[0]"), ("text", "messages"), ({"role": "user"}, "messages"),
        ([], "messages"),
    ]  # fmt: skip
    for messages, place in wrong:
        with pytest.raises(RequestError) as caught:
            echo.generate(messages=messages)
        assert caught.value.param == place
        assert "`" not in caught.value.message


def test_an_error_has_the_text_so_far(home: Path) -> None:
    """Issue 12.23: of one choice and of several, and its figures."""
    with ModelWorker("echo", fail_after=4, continuation="off") as worker:
        with pytest.raises(GenerationFailed) as caught:
            worker.generate("abcdefgh")
        assert caught.value.text == "abcd"
        assert caught.value.metrics is not None
        with pytest.raises(GenerationFailed) as caught:
            worker.generate("abcdefgh", n=2)
        assert [choice.finish_reason for choice in caught.value.choices] == ["error"] * 2
        assert all("abcd".startswith(choice.text) for choice in caught.value.choices)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_dies_has_figures(home: Path) -> None:
    """Issue 12.23: counted where the answer arrived, as the process can report nothing."""
    options: Any = {"crash_after": 3, "continuation": "off", "tokens_per_second": 100}
    with ModelWorker("echo", **options) as worker, pytest.raises(WorkerDied) as caught:
        worker.generate("abcdefgh")
    error = caught.value
    assert error.text == "abc"
    assert error.metrics is not None
    assert (error.metrics.outcome, error.metrics.engine) == ("error", "echo")
    assert error.metrics.usage.completion_tokens == 3
    assert error.metrics.time_to_first_token_ms
    assert error.metrics.total_ms > error.metrics.time_to_first_token_ms


def test_parameters_are_described(home: Path) -> None:
    """W3; issue 12.23: type, choices, bounds, and whether they can change while it runs."""
    worker = ModelWorker("echo", slots=3, max_queued=5)
    described = {parameter.name: parameter for parameter in worker.parameters()}
    slots, queued = described["slots"], described["max_queued"]
    assert (slots.kind, slots.type, slots.value, slots.minimum) == ("option", "integer", 3, 1)
    assert (queued.kind, queued.live, queued.value, queued.minimum) == ("setting", True, 5, 0)
    assert described["continuation"].choices == ("exact", "fast", "off")
    assert described["fault"].choices == ("raise", "oom", "exit", "crash", "hang")
    assert (described["hang_s"].above, described["replicas"].maximum) == (0, 64)
    assert not described["engine"].live
    assert all(parameter.help and parameter.type for parameter in described.values())
    assert described.keys() >= {"context_length", "keep_alive", "tokens_per_second"}


def test_the_documented_names_are_importable() -> None:
    """Issue 12.23: errors and results, as the manual names them."""
    import headrace

    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    for kind in kinds():
        assert getattr(headrace, kind.__name__) is kind
