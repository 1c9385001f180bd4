"""Counts of tokens at a local engine."""

from __future__ import annotations

import asyncio

from headrace.core.events import Text, TokenCount
from headrace.core.media import images_of
from headrace.core.request import CountRequest
from headrace.worker.prompt import Prompter
from headrace.worker.turn import until_left


async def counted(prompter: Prompter, request: CountRequest) -> TokenCount | Text:
    """Return the tokens of a text or of messages, or what the template makes of these."""
    # Off the event loop, and beside any generation.
    if request.as_text:
        return Text(await asyncio.to_thread(prompter.rendered, request))
    with until_left() as gone:
        token_ids = await asyncio.to_thread(prompter.count, request, gone)
    seen = sum(image.tokens for turn in request.messages or () for image in images_of(turn.content))
    if seen:
        # The tokens of an image are known to the engine that has computed them.
        return TokenCount(count=len(token_ids) + seen, estimated=True)
    return TokenCount(count=len(token_ids), token_ids=token_ids)
