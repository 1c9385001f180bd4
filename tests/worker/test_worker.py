"""A worker in this process, on echo."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

import msgspec
import pytest
from tests.pictures_made import asked, png
from tests.sounds_made import wav
from tests.worker.rig import ask, echo, finish, first_delta, listed, resolve, text, until, worker

from headrace import engines
from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ConfigError,
    ContextOverflow,
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    LoadFailed,
    Loading,
    OutOfMemory,
    QueueTimeout,
    Unsupported,
)
from headrace.core.events import Delta, Progress
from headrace.core.media import Pictures
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, Message
from headrace.core.stream import collect, collect_count, collect_text
from headrace.engines import echo as echo_engine
from headrace.engines.base import EngineRequest, Generator, OpenRequest, RawEvent
from headrace.worker.worker import Worker


async def test_an_answer_from_start_to_end() -> None:
    """W9, W14, W15, W16: progress, deltas, and one Finish with usage and figures."""
    async with worker() as one:
        events = await listed(one.ask(ask("né🌍")))
        end = finish(events)
        assert isinstance(events[0], Progress)
        assert text(events) == "né🌍"
        assert end.finish_reasons == ("stop",)
        assert end.usage == end.metrics.usage
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (7, 8)
        assert (end.metrics.engine, end.metrics.model, end.metrics.outcome) == (
            "echo",
            "echo",
            "stop",
        )
        assert end.metrics.time_to_first_token_ms is not None
        assert end.metrics.devices[0].worker_used > 0
        assert one.load == (0, 0)


async def test_an_answer_that_ends_within_a_character_has_all_its_entries() -> None:
    """Issue 12.9: those of half a character too, whose text is left out."""
    async with worker() as one:
        result = await collect(one.ask(ask("é🌍", max_tokens=4, logprobs=0)))
        assert result.text == "é"
        assert [entry.data[0] for entry in result.choices[0].logprobs] == [*"é🌍".encode()[:4]]
        assert result.usage.completion_tokens == 4


async def test_no_delta_shows_half_a_character() -> None:
    """W13: the text of the deltas is the text of the result, and no U+FFFD is in it."""
    async with worker() as one:
        for said in ("né🌍 日本語", "\u0000\ufeffx", "🏳️‍🌈"):
            events = await listed(one.ask(ask(said)))
            assert text(events) == said
            assert (await collect(one.ask(ask(said)))).text == said
            assert "\ufffd" not in text(events)


async def test_a_stop_string_is_never_shown() -> None:
    """W12: not a part of it, in stream and not, the request's and the model's."""
    async with worker(stop=("<end>",), text="one<en two<e🌍>STOP three<end> four") as one:
        for stops, said in (
            (("STOP",), "one<en two<e🌍>"),
            ((), "one<en two<e🌍>STOP three"),
            (("nowhere",), "one<en two<e🌍>STOP three"),
            (("🌍",), "one<en two<e"),
        ):
            events = await listed(one.ask(ask(stop=stops)))
            assert text(events) == said
            assert finish(events).finish_reason == "stop"
            assert (await collect(one.ask(ask(stop=stops)))).text == said


async def test_a_stop_string_stops_the_engine_and_counts_what_was_made() -> None:
    """W12, W15: usage is the tokens up to the stop string."""
    async with worker(text="abSTOP" + "c" * 1000) as one:
        end = finish(await listed(one.ask(ask("xyz", stop=("STOP",)))))
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, 6)
        assert one.load == (0, 0)


async def test_length_is_a_reason_and_held_text_is_shown() -> None:
    """W12, W14: what might have become a stop string is text when the limit comes first."""
    async with worker(text="abST") as one:
        events = await listed(one.ask(ask(max_tokens=4, stop=("STOP",))))
        assert text(events) == "abST"
        assert finish(events).finish_reason == "length"


async def test_several_choices_and_echo() -> None:
    """W11: n and echo."""
    async with worker() as one:
        result = await collect(one.ask(ask("abc", n=3, echo=True, max_tokens=2)))
        assert [choice.text for choice in result.choices] == ["abcab"] * 3
        assert [choice.finish_reason for choice in result.choices] == ["length"] * 3
        assert result.usage.completion_tokens == 6
        assert result.usage.prompt_tokens == 3


async def test_more_choices_than_slots() -> None:
    """W20: choices wait for slots as requests do."""
    async with worker(max_running=1) as one:
        result = await collect(one.ask(ask("ab", n=4)))
        assert [choice.text for choice in result.choices] == ["ab"] * 4


async def test_one_choice_that_cannot_be_admitted_frees_the_others() -> None:
    """W18, W20: a request of which one choice gets no slot in time leaves nothing behind."""
    async with worker(max_running=2, max_queued=1, tokens_per_second=20) as one:
        first = one.ask(ask("abcdef"))
        await anext(first)
        with pytest.raises(DeadlineExceeded):
            await listed(one.ask(ask("abc", n=3, deadline_s=0.05)))
        await first.aclose()
        with pytest.raises(InvalidRequest, match="n is at most 3"):
            await listed(one.ask(ask("abc", n=4)))
        assert one.load == (0, 0)


async def test_messages_go_through_the_template() -> None:
    """W9, W25: the model's template with the system turn merged, or the configured one."""
    messages = (Message("system", "be brief"), Message("user", "hello"))
    async with worker(chat_template="{{ messages[-1].content }}") as one:
        assert (await collect(one.ask(ask(None, messages=messages)))).text == "be brief\n\nhello"
    async with worker() as one:
        assert (await collect(one.ask(ask(None, messages=messages)))).text == "hello"
        assert one.models()[0].roles
    async with worker(chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}") as one:
        assert (await collect(one.ask(ask(None, messages=messages)))).text == ("[be brief][hello]")


async def test_a_prompt_of_token_ids_takes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 17.2: neither template nor tokenizer is called; its errors are the same."""
    threads: list[object] = []
    to_thread = asyncio.to_thread

    async def counted(work: Any, *arguments: Any) -> Any:
        threads.append(work)
        return await to_thread(work, *arguments)

    async with worker(text="abc", context_length=8) as one:
        monkeypatch.setattr(asyncio, "to_thread", counted)
        assert (await collect(one.ask(GenerateRequest(prompt=(97, 98))))).text == "abc"
        with pytest.raises(ContextOverflow):
            await collect(one.ask(GenerateRequest(prompt=(97,) * 9)))
        assert not threads
        assert (await collect(one.ask(GenerateRequest(prompt="ab")))).text == "abc"
        assert len(threads) == 1
        assert one.load == (0, 0)


async def test_requests_are_never_changed() -> None:
    """W9: the caller's request is as it was, and can be sent again."""
    async with worker() as one:
        request = ask(None, messages=(Message("user", "x"),), stop=("y",), n=2, seed=3)
        before = msgspec.msgpack.encode(request)
        first = await collect(one.ask(request))
        assert msgspec.msgpack.encode(request) == before
        assert (await collect(one.ask(request))).text == first.text


async def test_fifty_streams_at_once() -> None:
    """W20: each gets its own answer."""
    async with worker(slots=8, tokens_per_second=500) as one:
        peak: list[int] = []

        async def answer(number: int) -> str:
            events = []
            async for event in one.ask(ask(f"answer {number}")):
                peak.append(one.load[0])
                events.append(event)
            return text(events)

        said = await asyncio.gather(*(answer(number) for number in range(50)))
        assert said == [f"answer {number}" for number in range(50)]
        assert max(peak) == 8
        assert one.load == (0, 0)


async def test_the_deadline_holds_while_it_waits_for_a_slot() -> None:
    """W20: max_running of the model."""
    async with worker(max_running=1, max_queued=1, tokens_per_second=50) as one:
        running = asyncio.ensure_future(collect(one.ask(ask("a" * 20))))
        await until(lambda: one.load == (1, 0))
        waiting = asyncio.ensure_future(collect(one.ask(ask("b", deadline_s=0.05))))
        await until(lambda: one.load == (1, 1))
        with pytest.raises(QueueTimeout) as late:
            await waiting
        assert late.value.metrics is not None
        assert late.value.metrics.queue_ms is None
        assert (await running).usage.completion_tokens == 21
        assert one.load == (0, 0)


async def test_a_deadline_while_running() -> None:
    """W16, W20: an error with the figures up to then; never a normal end."""
    async with worker(tokens_per_second=50) as one:
        with pytest.raises(DeadlineExceeded) as caught:
            await collect(one.ask(ask("a" * 500, deadline_s=0.1)))
        assert not isinstance(caught.value, QueueTimeout)
        assert caught.value.metrics is not None
        assert caught.value.metrics.outcome == "error"
        assert caught.value.metrics.usage.completion_tokens > 0
        assert one.load == (0, 0)


async def test_a_deadline_comes_on_time_while_the_engine_is_silent() -> None:
    """W20: in a prefill that says nothing, and between two tokens; the slot is free then."""
    speeds = {"prefill_tokens_per_second": 10}
    for given in ({**speeds, "text": "x"}, {"tokens_per_second": 0.2}):
        async with worker(max_running=1, **given) as one:
            before = asyncio.all_tasks()
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded) as caught:
                await collect(one.ask(ask("a" * 60, deadline_s=0.2)))
            assert 0.19 < time.monotonic() - began < 1
            assert caught.value.metrics is not None
            assert one.load == (0, 0)
            assert asyncio.all_tasks() == before


async def test_a_timeout_of_the_engine_itself_is_no_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W17: what a library raises is its own failure, whatever limit the request has."""

    def late(engine: object, sent: int) -> None:
        raise TimeoutError

    monkeypatch.setattr("headrace.engines.echo.Engine._misbehave", late)
    async with worker() as one:
        with pytest.raises(GenerationFailed):
            await collect(one.ask(ask(deadline_s=9)))


async def test_a_request_with_time_left_is_not_disturbed() -> None:
    """W20: the limit is for all of it and not for each token."""
    async with worker(tokens_per_second=100) as one:
        assert (await collect(one.ask(ask("a" * 30, deadline_s=9)))).text == "a" * 30
        stream = one.ask(ask("a" * 30, deadline_s=9))
        await first_delta(stream)
        await stream.aclose()
        assert one.load == (0, 0)


@pytest.mark.parametrize("phase", ["untouched", "queued", "prefill", "decode"])
async def test_closing_a_stream_in_any_phase_frees_all(phase: str) -> None:
    """W18: no slot, no place in the queue and no task is left."""
    speeds: dict[str, Any] = {"tokens_per_second": 20, "prefill_tokens_per_second": 1000}
    async with worker(max_running=1, **speeds) as one:
        before = asyncio.all_tasks()
        holder = one.ask(ask("holds"))
        if phase == "queued":
            await first_delta(holder)
        stream = one.ask(ask("a" * 256))
        if phase == "queued":
            task = asyncio.ensure_future(anext(stream))
            await until(lambda: one.load == (1, 1))
            task.cancel()
            await asyncio.wait({task})
        elif phase == "prefill":
            assert isinstance(await anext(stream), Progress)
            assert one.load == (1, 0)
        elif phase == "decode":
            await first_delta(stream)
            assert one.load == (1, 0)
        await stream.aclose()
        await holder.aclose()
        assert one.load == (0, 0)
        assert asyncio.all_tasks() == before


async def test_an_engines_error_carries_the_figures_and_frees_the_slot() -> None:
    """W16, W17, W19: what was generated before is there, and the worker lives on."""
    async with worker(fail_after=3) as one:
        events: list[Any] = []
        with pytest.raises(GenerationFailed) as caught:
            async for event in one.ask(ask("abcdef")):
                events.append(event)
        assert text(events) == "abc"
        metrics = caught.value.metrics
        assert metrics is not None
        assert (metrics.outcome, metrics.usage.completion_tokens) == ("error", 3)
        assert one.load == (0, 0)
        assert one.state == "ready"
        assert (await collect(one.ask(ask("ab", max_tokens=2)))).text == "ab"
    async with worker(oom_after=1) as one:
        with pytest.raises(OutOfMemory):
            await collect(one.ask(ask("ab")))
        assert one.load == (0, 0)


@pytest.mark.parametrize(
    ("raised", "kind"), [(MemoryError(), OutOfMemory), (KeyError("x"), GenerationFailed)]
)
async def test_whatever_a_library_raises_is_typed(
    raised: Exception, kind: type[HeadraceError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W17: and its text is not the client's."""

    def broken(engine: object, sent: int) -> None:
        raise raised

    monkeypatch.setattr("headrace.engines.echo.Engine._misbehave", broken)
    async with worker() as one:
        with pytest.raises(kind) as caught:
            await collect(one.ask(ask("ab")))
        assert "x" not in caught.value.message.split()
        assert one.load == (0, 0)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (ask("a", top_p=0.5), Unsupported),
        (ask("a" * 11), ContextOverflow),
        (ask("a", max_tokens=10), ContextOverflow),
        (ask("a", constraint=Constraint(json_schema={})), Unsupported),
    ],
)
async def test_a_wrong_request_never_reaches_the_engine(
    request_: GenerateRequest, kind: type[HeadraceError]
) -> None:
    """W6, W11: refused with its own error."""
    async with worker(context_length=10) as one:
        with pytest.raises(kind):
            await collect(one.ask(request_))
        assert one.load == (0, 0)


async def test_counting_is_exact_and_beside_generation() -> None:
    """W21: also while every slot is taken."""
    async with worker(max_running=1, tokens_per_second=10) as one:
        stream = one.ask(ask("abc"))
        await first_delta(stream)
        count = await collect_count(one.ask(CountRequest(text="né")))
        assert (count.count, count.token_ids, count.estimated) == (3, (110, 195, 169), False)
        chat = await collect_count(one.ask(CountRequest(messages=(Message("user", "abcd"),))))
        assert chat.count == 4
        assert await collect_text(one.ask(DetokenizeRequest(token_ids=(110, 195, 169)))) == "né"
        await stream.aclose()


async def test_the_metadata_before_and_after_the_load() -> None:
    """W22, W2: known without a load; complete with it; the reason for the engine is there."""
    one = Worker(echo(context_length=100, aliases=("e",), slots=3), resolve)
    before = one.models()[0]
    assert (before.id, before.state, before.memory, before.aliases) == (
        "echo",
        "created",
        None,
        ("e",),
    )
    await one.start()
    after = one.models()[0]
    assert (after.state, after.context_length, after.max_running) == ("ready", 100, 3)
    assert after.engine_reason == "asked for by name"
    assert after.memory
    assert after.load_ms is not None
    assert after.capabilities.chat
    assert "temperature" in after.capabilities.sampling
    await one.aclose()
    assert one.models()[0].state == "stopped"


async def test_use_at_the_wrong_time_is_typed() -> None:
    """W7: before the start and after the stop."""
    one = Worker(echo(), resolve)
    for use in (one.ask(ask()).__anext__, lambda: collect_count(one.ask(CountRequest(text="a")))):
        with pytest.raises(Loading):
            await use()
    await one.start()
    await one.start()
    await one.aclose()
    await one.aclose()
    assert one.state == "stopped"
    with pytest.raises(Draining):
        await collect(one.ask(ask()))
    await one.start()
    assert (await collect(one.ask(ask("again")))).text == "again"
    await one.aclose()


async def test_a_failed_load_frees_everything() -> None:
    """W5: no thread is left; the reason is kept; a new start tries again."""
    one = Worker(echo(fail_load="broken"), resolve)
    for _ in range(3):
        with pytest.raises(LoadFailed, match="broken"):
            await one.start()
        assert (one.state, one.models()[0].reason) == ("failed", "broken")
    samplers = [thread for thread in threading.enumerate() if thread.name == "device-sampler"]
    assert not samplers
    with pytest.raises(ConfigError):
        await Worker(echo(no_such_option=1), resolve).start()


class Opened:
    """Counts engines opened and closed."""

    def __init__(self) -> None:
        self.began = self.opened = self.closed = 0

    def __call__(self, name: str, request: OpenRequest) -> Any:
        self.began += 1
        counter, engine = self, cast("Generator", engines.open_engine(name, request))

        class Engine:
            facts = engine.facts
            tokenize, detokenize, generate = engine.tokenize, engine.detokenize, engine.generate

            def close(self) -> None:
                counter.closed += 1

        self.opened += 1
        return Engine()


async def test_a_stop_while_loading_closes_what_was_opened() -> None:
    """W5, W8: the engine that a thread opened for nobody is closed again."""
    opened = Opened()
    one = Worker(echo(load_s=0.2), resolve, open_engine=opened)
    task = asyncio.ensure_future(one.start())
    await until(lambda: opened.began == 1)
    await one.aclose()
    assert one.state == "stopped"
    with pytest.raises((Draining, asyncio.CancelledError)):
        await task
    await until(lambda: opened.closed == 1)
    assert opened.opened == 1


async def test_a_template_that_does_not_compile_closes_the_engine() -> None:
    """W5: a failure after the engine was opened frees it."""
    opened = Opened()
    with pytest.raises(ConfigError):
        await Worker(echo(chat_template="{% if %}"), resolve, open_engine=opened).start()
    assert (opened.opened, opened.closed) == (1, 1)


async def test_a_start_tells_its_progress() -> None:
    """W5: from the source to the load."""
    seen: list[str] = []
    one = Worker(echo(), resolve, on_progress=lambda what, done, total: seen.append(what))
    await one.start()
    await one.aclose()
    assert seen == ["resolving", "loading"]


async def test_a_stop_drains_what_runs() -> None:
    """W8: within the deadline everything ends well, and nothing new begins."""
    one = Worker(echo(tokens_per_second=50), resolve)
    await one.start()
    running = asyncio.ensure_future(collect(one.ask(ask("abcdef"))))
    await until(lambda: one.load == (1, 0))
    stopping = asyncio.ensure_future(one.aclose(drain_s=5))
    await asyncio.sleep(0)
    assert one.state == "draining"
    with pytest.raises(Draining):
        await collect(one.ask(ask()))
    assert (await running).text == "abcdef"
    await stopping
    assert "stopped" in repr(one)


async def test_a_stop_ends_the_rest_with_an_error() -> None:
    """W8: those that run and those that wait, each with its figures."""
    opened = Opened()
    one = Worker(echo(tokens_per_second=50, max_running=1), resolve, open_engine=opened)
    await one.start()
    running = asyncio.ensure_future(collect(one.ask(ask("a" * 500))))
    waiting = asyncio.ensure_future(collect(one.ask(ask("b"))))
    await until(lambda: one.load == (1, 1))
    began = time.monotonic()
    await one.aclose(drain_s=0.05)
    assert time.monotonic() - began < 2
    for task in (running, waiting):
        with pytest.raises(Draining) as caught:
            await task
        assert caught.value.metrics is not None
    assert opened.closed == 1
    assert one.state == "stopped"


async def test_its_repr_tells_state_and_load() -> None:
    async with worker() as one:
        assert repr(one) == "<Worker <echo ready>, 0 running, 0 waiting>"
        stream = one.ask(ask())
        assert isinstance(await first_delta(stream), Delta)
        assert "1 running" in repr(one)
        await stream.aclose()


async def test_an_engine_that_refuses_in_the_call_itself_keeps_no_slot() -> None:
    """W19: errors may be raised by `generate` or by its first step."""
    async with worker(max_running=1) as one:
        assert one._served is not None
        engine: Any = one._served.engine  # type: ignore[union-attr]
        generate = engine.generate

        def refuse(request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
            raise InvalidRequest("not this one")

        engine.generate = refuse
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await collect(one.ask(ask("abc")))
        engine.generate = generate
        assert one.load == (0, 0)
        assert (await collect(one.ask(ask("abc")))).text == "abc"


async def test_few_texts_are_counted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.7: two, also of clients that have left, as their threads go on."""
    running, most, ended = 0, 0, 0
    places, lock = threading.Semaphore(0), threading.Lock()

    def slow(*_: object, **__: object) -> tuple[int, ...]:
        nonlocal running, most, ended
        with lock:
            running, most = running + 1, max(most, running + 1)
        places.acquire()
        with lock:
            running, ended = running - 1, ended + 1
        return (1,)

    async with worker() as counter:
        monkeypatch.setattr(echo_engine.Engine, "tokenize", slow)
        monkeypatch.setattr(echo_engine.Engine, "detokenize", lambda *_: str(slow()))
        requests = [CountRequest(text="a"), DetokenizeRequest(token_ids=(1,))] * 4
        tasks = [asyncio.create_task(listed(counter.ask(request))) for request in requests]
        await until(lambda: running >= 2)
        tasks[0].cancel()
        for count in range(len(tasks) - 1):
            places.release()
            await until(lambda count=count: ended > count)
        places.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 2
    assert sum(isinstance(result, BaseException) for result in results) == 1


async def test_a_sound_beside_an_image_is_the_marker() -> None:
    """Issue 13, audio input: templates that write images know no sounds."""
    pictures = Pictures()
    content = (pictures.add_audio(wav(0.2), ""), " and ", pictures.add(png(), ""))
    request = GenerateRequest(messages=(Message("user", content),), media=pictures.data)
    written = "{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %}"
    for template in (None, written):
        async with worker(images=True, audio=True, chat_template=template) as echo:
            result = await collect(echo.ask(request))
        assert re.fullmatch(r"\[wav 0\.2s \w+\] and \[png 64x48 \w+\]", result.text)


async def test_an_image_alone_is_a_message() -> None:
    """Issue 13, pictures: beside it a message needs no text."""
    async with worker(images=True) as echo:
        result = await collect(echo.ask(asked(png())))
    assert result.text.startswith("[png")
