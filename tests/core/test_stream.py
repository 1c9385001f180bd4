from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from headrace.core.errors import GenerationFailed, HeadraceError, QueueFull
from headrace.core.events import Delta, Event, Finish, FinishReason, Progress, TokenLogprob
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.stream import Mailbox, Stream, collect, merge, prime, within


def finish(*reasons: FinishReason) -> Finish:
    return Finish(reasons or ("stop",), Usage(completion_tokens=2), InferenceMetrics(started_at=1))


class Script:
    """A stream that plays events, waits for an asyncio.Event, or raises; it notes its close."""

    def __init__(self, *steps: Event | HeadraceError | asyncio.Event) -> None:
        self.steps: Sequence[Event | HeadraceError | asyncio.Event] = steps
        self.closed = False

    async def play(self) -> Stream:
        try:
            for step in self.steps:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, HeadraceError):
                    raise step
                else:
                    yield step
        finally:
            self.closed = True


async def listed(stream: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in stream]


async def test_a_mailbox_keeps_the_order_and_waits_only_when_empty() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.put(2)
    assert len(box) == 2
    assert [await box.get(), await box.get()] == [1, 2]
    reader = asyncio.ensure_future(box.get())
    await asyncio.sleep(0)
    assert not reader.done()
    box.put(3)
    box.put(4)
    assert await reader == 3
    assert await box.get() == 4


async def test_a_mailbox_outlives_a_reader_that_gave_up() -> None:
    box: Mailbox[int] = Mailbox()
    reader = asyncio.ensure_future(box.get())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    box.put(1)
    assert await box.get() == 1


async def test_prime_passes_progress_and_waits_for_the_first_delta() -> None:
    script = Script(Progress("queued"), Progress("prefill", 1, 2), Delta("a"), finish())
    primed = await prime(script.play())
    assert primed.first.result() == Delta("a")
    assert await listed(primed.stream) == [finish()]
    await primed.aclose()
    assert script.closed


async def test_prime_raises_what_comes_before_anything_is_promised() -> None:
    script = Script(Progress("queued"), QueueFull("full", retry_after_s=2))
    with pytest.raises(QueueFull, match="full"):
        await prime(script.play())
    assert script.closed
    with pytest.raises(GenerationFailed):
        await prime(Script(Progress("queued")).play())


async def test_prime_goes_on_without_an_event_that_takes_long() -> None:
    gate = asyncio.Event()
    primed = await prime(Script(gate, Delta("late"), finish()).play(), wait_s=0.01)
    assert not primed.first.done()
    gate.set()
    assert await primed.first == Delta("late")
    await primed.aclose()


@pytest.mark.parametrize("step", [asyncio.Event(), QueueFull("full"), Delta("x")])
async def test_closing_a_primed_stream_in_any_phase(
    step: Event | HeadraceError | asyncio.Event,
) -> None:
    """W18: whatever the first event is doing, closing frees the stream."""
    script = Script(Progress("queued"), step, asyncio.Event())
    try:
        primed = await prime(script.play(), wait_s=0.01)
    except QueueFull:
        assert script.closed
        return
    await primed.aclose()
    await primed.aclose()
    assert script.closed


async def test_a_cancelled_prime_closes_the_stream() -> None:
    script = Script(Progress("queued"), asyncio.Event())
    task = asyncio.ensure_future(prime(script.play()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert script.closed


async def test_collect_folds_the_choices_in_order() -> None:
    """W10: one complete result, each choice with its own text, tokens and reason."""
    logprob = TokenLogprob(7, b"b", -0.5)
    script = Script(
        Progress("prefill"),
        Delta("b", (7,), 1, "", (logprob,)),
        Delta("a", (1,), 0, "why"),
        Delta("c", (2, 3), 1),
        finish("stop", "length", "stop"),
    )
    result = await collect(script.play())
    assert [choice.text for choice in result.choices] == ["a", "bc", ""]
    assert result.choices[1].token_ids == (7, 2, 3)
    assert result.choices[1].logprobs == (logprob,)
    assert result.choices[0].reasoning == "why"
    assert [choice.finish_reason for choice in result.choices] == ["stop", "length", "stop"]
    assert (result.text, result.finish_reason) == ("a", "stop")
    assert result.usage.completion_tokens == 2
    assert script.closed


async def test_collect_never_takes_a_broken_stream_for_an_answer() -> None:
    """W14: without a Finish there is no result."""
    script = Script(Delta("half"))
    with pytest.raises(GenerationFailed, match="without a Finish"):
        await collect(script.play())
    broken = Script(Delta("half"), QueueFull("no"))
    with pytest.raises(QueueFull):
        await collect(broken.play())
    assert broken.closed


async def test_merge_yields_each_event_when_it_comes() -> None:
    gate = asyncio.Event()
    slow, fast = Script(gate, Delta("s")), Script(Delta("f1"), Delta("f2"))
    merged = merge([slow.play(), fast.play()])
    assert [await anext(merged), await anext(merged)] == [Delta("f1"), Delta("f2")]
    gate.set()
    assert await listed(merged) == [Delta("s")]
    assert slow.closed
    assert fast.closed


async def test_the_first_failure_ends_all_merged_streams() -> None:
    """W17: one choice that fails fails the request, and frees the others."""
    waits, fails = Script(Delta("a"), asyncio.Event()), Script(Delta("b"), QueueFull("no"))
    merged = merge([waits.play(), fails.play()])
    with pytest.raises(QueueFull):
        await listed(merged)
    assert waits.closed
    assert fails.closed


async def test_closing_a_merge_closes_every_stream() -> None:
    """W18: also those that wait for their first event."""
    before = asyncio.all_tasks()
    scripts = [Script(asyncio.Event()), Script(Delta("a"), asyncio.Event()), Script(Delta("b"))]
    merged = merge([script.play() for script in scripts])
    await anext(merged)
    await merged.aclose()
    assert all(script.closed for script in scripts)
    assert asyncio.all_tasks() == before


async def test_what_a_cancelled_task_cleans_up_has_its_time() -> None:
    """Python before 3.11.4: `asyncio.timeout` raises CancelledError there."""
    began, results = asyncio.Event(), list[bool]()

    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            results.append(await within(0.01, asyncio.Event().wait()))
            results.append(await within(5.0, asyncio.sleep(0)))

    task = asyncio.create_task(work())
    await began.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert results == [False, True]
