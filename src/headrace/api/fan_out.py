"""Several prompts in one request: several streams, merged into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence

from msgspec.structs import replace

from headrace.core.backend import Backend
from headrace.core.errors import GenerationFailed
from headrace.core.events import Delta, Event, Finish, FinishReason
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.request import GenerateRequest

_BUFFER = 64

_Item = tuple[int, Event | Exception]


async def fan_out(
    backend: Backend, requests: Sequence[GenerateRequest], parallel: int
) -> AsyncGenerator[Event, None]:
    """Yield the events of all requests, at most `parallel` running at a time.

    Choice `c` of request `r` has index `r * n + c`. The Finish has the reasons of all choices in
    that order, and the sum of their usage. The first failure ends all.
    """
    queue: asyncio.Queue[_Item] = asyncio.Queue(_BUFFER)
    waiting = iter(enumerate(requests))
    tasks = {
        asyncio.create_task(_work(backend, waiting, queue))
        for _ in range(min(parallel, len(requests)))
    }
    finishes: dict[int, Finish] = {}
    try:
        while len(finishes) < len(requests):
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finish):
                finishes[index] = event
            elif isinstance(event, Delta):
                yield replace(event, index=index * requests[index].n + event.index)
            else:
                yield event
        yield _merge([finishes[index] for index in range(len(requests))])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _work(
    backend: Backend,
    waiting: Iterator[tuple[int, GenerateRequest]],
    queue: asyncio.Queue[_Item],
) -> None:
    for index, request in waiting:
        stream = backend.ask(request)
        try:
            event: Event | None = None
            async for event in stream:
                await queue.put((index, event))
            if not isinstance(event, Finish):
                raise GenerationFailed("The stream ended without a Finish.")
        except Exception as error:  # noqa: BLE001 - raised again by whoever reads the queue
            await queue.put((index, error))
            return
        finally:
            await stream.aclose()


def _merge(finishes: Sequence[Finish]) -> Finish:
    usage = Usage(
        prompt_tokens=sum(one.usage.prompt_tokens for one in finishes),
        cached_tokens=sum(one.usage.cached_tokens for one in finishes),
        completion_tokens=sum(one.usage.completion_tokens for one in finishes),
        reasoning_tokens=sum(one.usage.reasoning_tokens for one in finishes),
    )
    reasons: list[FinishReason] = []
    for one in finishes:
        reasons += one.finish_reasons
    return Finish(tuple(reasons), usage, _merge_metrics([one.metrics for one in finishes], usage))


def _merge_metrics(figures: Sequence[InferenceMetrics], usage: Usage) -> InferenceMetrics:
    """Keep what is defined for several prompts: the first token of any, the longest wait."""
    first = figures[0]
    first_tokens = [one.time_to_first_token_ms for one in figures]
    return InferenceMetrics(
        started_at=min(one.started_at for one in figures),
        load_ms=max(one.load_ms for one in figures),
        time_to_first_token_ms=min((ms for ms in first_tokens if ms is not None), default=None),
        total_ms=max(one.total_ms for one in figures),
        chunks=sum(one.chunks for one in figures),
        usage=usage,
        devices=first.devices,
        engine=first.engine,
        worker=first.worker,
        model=first.model,
        outcome=first.outcome,
    )
