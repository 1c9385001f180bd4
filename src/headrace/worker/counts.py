"""Counts of tokens, and their texts, at a local engine; `places` bounds the threads of all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from headrace.core.events import Text, TokenCount
from headrace.core.media import images_of
from headrace.core.request import CountRequest, DetokenizeRequest
from headrace.engines.base import Engine
from headrace.worker.prompt import Prompter
from headrace.worker.turn import until_left

T = TypeVar("T")


async def counted(
    prompter: Prompter, places: asyncio.Semaphore, request: CountRequest
) -> TokenCount | Text:
    """Return the tokens of a text or of messages, or what the template makes of these."""
    if request.as_text:
        return Text(await _in_few_threads(places, partial(prompter.rendered, request)))
    with until_left() as gone:
        token_ids = await _in_few_threads(places, partial(prompter.count, request, gone))
    seen = sum(image.tokens for turn in request.messages or () for image in images_of(turn.content))
    if seen:
        # The tokens of an image are known to the engine that has computed them.
        return TokenCount(count=len(token_ids) + seen, estimated=True)
    return TokenCount(count=len(token_ids), token_ids=token_ids)


async def text_of(engine: Engine, places: asyncio.Semaphore, request: DetokenizeRequest) -> Text:
    """Return the text of tokens."""
    return Text(await _in_few_threads(places, partial(engine.detokenize, request.token_ids)))


async def _in_few_threads(places: asyncio.Semaphore, work: Callable[[], T]) -> T:
    """Run off the event loop and beside any generation; its place is free when it has ended.

    A thread goes on when nothing waits for it any more.
    """
    await places.acquire()
    running = asyncio.get_running_loop().run_in_executor(None, work)

    def ended(future: asyncio.Future[T]) -> None:
        places.release()
        if not future.cancelled():
            future.exception()

    running.add_done_callback(ended)
    return await asyncio.shield(running)
