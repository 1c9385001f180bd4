"""Counts and texts of tokens at a local engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from headrace.core.events import MAX_TOKEN_IDS, Text, TokenCount
from headrace.core.media import media_of
from headrace.core.request import CountRequest, DetokenizeRequest, Request
from headrace.worker.generate import Loaded
from headrace.worker.turn import Answers, unmeasured, until_left

T = TypeVar("T")


async def _count(loaded: Loaded, request: CountRequest) -> TokenCount | Text:
    prompter = loaded.prompter
    if request.as_text:
        return Text(await _in_few_threads(loaded, request, partial(prompter.rendered, request)))
    with until_left() as gone:
        count = partial(prompter.count, request, gone)
        token_ids = await _in_few_threads(loaded, request, count)
    seen = sum(part.tokens for turn in request.messages or () for part in media_of(turn.content))
    if seen:
        # The tokens of an image or a sound are known to the engine that has computed them.
        return TokenCount(count=len(token_ids) + seen, estimated=True)
    ids = token_ids if len(token_ids) <= MAX_TOKEN_IDS else None
    return TokenCount(count=len(token_ids), token_ids=ids)


async def _text(loaded: Loaded, request: DetokenizeRequest) -> Text:
    detokenize = partial(loaded.engine.detokenize, request.token_ids)
    return Text(await _in_few_threads(loaded, request, detokenize))


async def _in_few_threads(loaded: Loaded, request: Request, work: Callable[[], T]) -> T:
    """Run off the event loop and beside any generation; its place is free when it has ended.

    A thread goes on when nothing waits for it any more.
    """
    give_back = await loaded.turns.counting.take(request.client)
    running = asyncio.get_running_loop().run_in_executor(None, work)

    def ended(future: asyncio.Future[T]) -> None:
        give_back()
        if not future.cancelled():
            future.exception()

    running.add_done_callback(ended)
    return await asyncio.shield(running)


ANSWERS: Answers = {
    CountRequest: lambda loaded, request: unmeasured(request, _count(loaded, request)),
    DetokenizeRequest: lambda loaded, request: unmeasured(request, _text(loaded, request)),
}
