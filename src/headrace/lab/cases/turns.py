"""Concurrency: many at once, cancellation in each phase, and closing."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing

import psutil

from headrace.core.errors import CapacityError, Unsupported
from headrace.core.events import Delta, Event, Finish
from headrace.core.request import CountRequest
from headrace.core.stream import collect_count
from headrace.lab.cases.answers import sound
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import (
    Declared,
    Reply,
    Subject,
    check,
    first_delta,
    first_prefill,
    read,
    refusal,
)

PROMPTS = (
    "Name three rivers.",
    "What is the capital of France?",
    "Count: one, two,",
    "Why is the sky blue? Answer in a sentence, for a child of six years.",
)
MANY = 16
FREED_S = 20.0
_MAX_SLOTS = 64
_LEAST_LEAK = 64 << 20
_STEPS, _MORE_STEPS, _LOOK_S = 8, 2, 0.01

Streams = list[AsyncGenerator[Event, None]]


def _slots(subject: Subject) -> int:
    slots = subject.info.max_running
    if slots is None or slots > _MAX_SLOTS:
        raise Declared(f"It runs {slots or 'any number of'} requests at once; none waits.")
    return slots


async def _begin(streams: Streams) -> None:
    """Wait for the first delta of each; then all stay open and unread."""
    async with asyncio.timeout(FREED_S * 3):
        await asyncio.gather(*(first_delta(stream) for stream in streams))


async def _end(streams: Streams) -> None:
    async with asyncio.timeout(FREED_S):
        await asyncio.gather(*(stream.aclose() for stream in streams))


async def _go_on(subject: Subject, streams: Streams, turn: asyncio.Future[Delta]) -> bool:
    """Read on in all until each had some steps, or `turn` is done; return whether one has ended."""
    events = [list[Event]() for _ in streams]
    readers = {asyncio.ensure_future(reading) for reading in map(_read_into, streams, events)}
    try:
        async with asyncio.timeout(FREED_S * 3):
            while min(map(len, events)) < _STEPS and not turn.done():
                await asyncio.wait({turn, *readers}, timeout=_LOOK_S, return_when="FIRST_COMPLETED")
                if any(reader.done() for reader in readers):
                    break
            # Its answer comes after all that was sent before.
            await collect_count(subject.backend.ask(CountRequest(text="Hello world")))
            if turn.done():
                await _end_or_go_on(readers, events)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
    for reader in readers:
        if not reader.cancelled():
            # One that has failed has left its slot.
            reader.result()
    return any(isinstance(event, Finish) for seen in events for event in seen)


async def _end_or_go_on(
    readers: Collection[asyncio.Future[None]], events: Sequence[Sequence[Event]]
) -> None:
    """Wait until one has ended, or all take further steps: the end may still be on its way."""
    wanted = [len(seen) + _MORE_STEPS for seen in events]
    while any(len(seen) < number for seen, number in zip(events, wanted, strict=True)):
        done, _ = await asyncio.wait(readers, timeout=_LOOK_S, return_when="FIRST_COMPLETED")
        if done:
            return


async def _read_into(stream: AsyncGenerator[Event, None], seen: list[Event]) -> None:
    async for event in stream:
        seen.append(event)


def _busy(subject: Subject, count: int) -> Streams:
    return [subject.backend.ask(subject.long(prompt)) for prompt in _prompts(count)]


def _prompts(count: int) -> list[str]:
    return [PROMPTS[number % len(PROMPTS)] for number in range(count)]


async def _all_slots_are_free(subject: Subject) -> None:
    """Check that as many requests run as there are slots, and that another is answered then."""
    streams = _busy(subject, _slots(subject))
    try:
        await _begin(streams)
    finally:
        await _end(streams)
    sound(subject, await subject.short())


@case("W13 W15 W20")
async def alone_and_among_sixteen(subject: Subject) -> str | None:
    """Sixteen at once are all answered soundly, with the same text as alone."""
    alone = {prompt: await subject.short(prompt) for prompt in PROMPTS}
    prompts = _prompts(MANY)
    crowd = await asyncio.gather(*(subject.short(prompt) for prompt in prompts))
    for prompt, reply in zip(prompts, crowd, strict=True):
        sound(subject, reply, alone[prompt].finish.usage.prompt_tokens)
        check(reply.text, f"The answer to {prompt!r} is empty.")
    return _same(subject, [alone[prompt] for prompt in prompts], crowd)


def _same(subject: Subject, alone: Sequence[Reply], crowd: Sequence[Reply]) -> str | None:
    pairs = list(zip(alone, crowd, strict=True))
    differing = [(own.text, among.text) for own, among in pairs if own.text != among.text]
    if not differing:
        return None
    message = f"{len(differing)} of {len(pairs)} differ among others, as {differing[0]}."
    check(not subject.capabilities.batch_invariant, message)
    return f"{message} It does not declare batch_invariant."


@case("W18 W20")
async def cancelled_in_the_queue(subject: Subject) -> None:
    """A request that waits for a slot runs only when one is free; closed, it leaves the queue."""
    running = _busy(subject, _slots(subject))
    waiting = subject.backend.ask(subject.long())
    try:
        await _begin(running)
        turn = asyncio.ensure_future(first_delta(waiting))
        ended = await _go_on(subject, running, turn)
        ran = turn.done() and not ended
        check(not ran, f"{len(running)} requests can run, and one more ran.")
        began = time.monotonic()
        turn.cancel()
        await asyncio.wait({turn})
        await waiting.aclose()
        took = time.monotonic() - began
        check(took < FREED_S / 4, f"Leaving the queue took {took:.1f} s.")
    finally:
        await _end([*running, waiting])
    await _all_slots_are_free(subject)


@case("W18")
async def cancelled_in_prefill(subject: Subject) -> None:
    """A request that is closed while its prompt is computed frees its slot."""
    slots = _slots(subject)
    length = min(subject.info.context_length or 512, 2048) - 64
    for number in range(slots):
        stream = subject.backend.ask(subject.long(await subject.noise(length, number + 1)))
        async with aclosing(stream), asyncio.timeout(FREED_S * 3):
            begun = await first_prefill(stream)
            check(begun or subject.is_remote, "It does not report when it starts on a prompt.")
    await _all_slots_are_free(subject)


@case("W18")
async def cancelled_in_decode(subject: Subject) -> None:
    """A request that is closed while it is answered frees its slot, in all ways of closing."""
    slots = _slots(subject)
    for _ in range(2):
        streams = _busy(subject, slots)
        try:
            await _begin(streams)
        finally:
            await _end(streams)
    reading = asyncio.ensure_future(read(subject.backend.ask(subject.long())))
    await asyncio.sleep(0.2)
    reading.cancel()
    done, _ = await asyncio.wait({reading}, timeout=FREED_S)
    check(done, f"A reader that is cancelled does not end within {FREED_S:g} s.")
    await _all_slots_are_free(subject)


@case("W21 M9 W22")
async def counting_does_not_wait(subject: Subject) -> None:
    """While all slots are busy, counting and metadata answer."""
    streams = _busy(subject, _slots(subject))
    try:
        await _begin(streams)
        async with asyncio.timeout(FREED_S):
            counted = await collect_count(subject.backend.ask(CountRequest(text="Hello world")))
        check(counted.count > 0, "It counts no tokens.")
        check(subject.info.state == "ready", f"The state is {subject.info.state}.")
    finally:
        await _end(streams)


@case("W8", task=None)
async def close_gives_everything_back(subject: Subject) -> None:
    """Closing ends its processes and frees its memory; it is idempotent, and refuses requests."""
    before = _children()
    rounds = [await _round(subject) for _ in range(2)]
    left = {child for child in _children() - before if child.is_running()}
    check(not left, f"Processes are left: {sorted(child.pid for child in left)}.")
    (_, first), (loaded, second) = rounds
    grown, limit = second - first, max(_LEAST_LEAK, (loaded - first) // 2)
    check(grown < limit, f"Each load and close leaves {grown >> 20} MiB behind.")


async def _round(subject: Subject) -> tuple[int, int]:
    """Open and close it again; return the resident memory while loaded and afterwards."""
    async with subject.reopen() as backend:
        info = backend.models()[0]
        check(info.state == "ready", f"Opened again, its state is {info.state}.")
        loaded = psutil.Process().memory_info().rss
        await backend.aclose()
        stream = backend.ask(subject.request())
        await refusal(stream, CapacityError, Unsupported)
    gc.collect()
    return loaded, psutil.Process().memory_info().rss


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


CASES = (
    alone_and_among_sixteen,
    cancelled_in_the_queue,
    cancelled_in_prefill,
    cancelled_in_decode,
    counting_does_not_wait,
    close_gives_everything_back,
)
