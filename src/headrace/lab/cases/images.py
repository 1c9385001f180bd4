"""Images: seen and counted, refused where damaged, or refused by the place of the first one."""

from __future__ import annotations

import asyncio
import random
import struct
import zlib
from contextlib import aclosing
from typing import Any

from headrace.core.errors import ContextOverflow, InvalidRequest
from headrace.core.media import Pictures
from headrace.core.request import GenerateRequest
from headrace.lab.cases.answers import sound
from headrace.lab.cases.case import case
from headrace.lab.cases.media import media_request, prompt_tokens, require
from headrace.lab.cases.subject import (
    TOKENS,
    Declared,
    Reply,
    Subject,
    check,
    first_prefill,
    read,
    refusal,
)

_WIDTH, _HEIGHT = 64, 48
_SEEDS = (1, 2, 3, 4)
_AT_ONCE = 4
_PATIENCE_S = 60.0


def _png(seed: int, data: bytes | None = None) -> bytes:
    """Return a PNG of random colours; `data` replaces its compressed pixels."""
    noise = random.Random(seed)  # noqa: S311 - the same pixels each time
    rows = (b"\0" + noise.randbytes(3 * _WIDTH) for _ in range(_HEIGHT))
    head = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(rows)) if data is None else data
    chunks = ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def _request(subject: Subject, *parts: bytes | str, **fields: Any) -> GenerateRequest:
    return media_request(subject, Pictures.add, *parts, **fields)


async def _answer(subject: Subject, *parts: bytes | str, **fields: Any) -> Reply:
    return await read(subject.backend.ask(_request(subject, *parts, **fields)))


async def _require_vision(subject: Subject) -> None:
    request = _request(subject, "What is ", _png(_SEEDS[0]), "it?")
    await require(subject, request, "images", able=subject.capabilities.vision)


@case("W31 W2")
async def images(subject: Subject) -> None:
    """An image is part of the prompt: it is counted, and the answer depends on it alone."""
    await _require_vision(subject)
    text = await _answer(subject, "What is it?")
    longer = {"max_tokens": 4 * TOKENS}
    replies = [
        await _answer(subject, _png(seed), "What is it?", sampling=longer) for seed in _SEEDS
    ]
    for reply in replies:
        sound(subject, reply, held=3)
    again = await _answer(subject, _png(_SEEDS[0]), "What is it?", sampling=longer)
    check(again.text == replies[0].text, "The same image is answered in two ways.")
    shown = {reply.text for reply in replies}
    check(len(shown) > 1, f"{len(_SEEDS)} images are all answered by {again.text!r}.")
    if subject.is_remote:
        return
    counts = {prompt_tokens(reply) for reply in (*replies, again)}
    check(len(counts) == 1, f"Images of one size have {sorted(counts)} tokens.")
    each = prompt_tokens(again) - prompt_tokens(text)
    check(
        each > 0,
        f"The prompt has {prompt_tokens(text)} tokens, and {prompt_tokens(again)} with an image.",
    )
    several = await _answer(subject, *map(_png, _SEEDS[:3]), "What is it?")
    further = prompt_tokens(several) - prompt_tokens(again)
    check(abs(further - 2 * each) <= 4, f"One image adds {each} tokens, two more {further}.")


@case("W31 W14")
async def images_damaged(subject: Subject) -> None:
    """An image that cannot be decoded is an error of the request, and the model goes on."""
    await _require_vision(subject)
    if subject.is_remote:
        raise Declared("The upstream decodes them.")
    sound_image = _png(_SEEDS[1])
    before = await _answer(subject, sound_image, "What is it?")
    for data in (b"", b"no pixels", zlib.compress(bytes(9))):
        request = _request(subject, _png(_SEEDS[1], data), "What is it?")
        error = await refusal(subject.backend.ask(request), InvalidRequest)
        check((error.param or "").startswith("messages"), f"The error names {error.param}.")
    after = await _answer(subject, sound_image, "What is it?")
    check(after.text == before.text, "After damaged images it answers otherwise.")


@case("W31 W7")
async def images_cancelled(subject: Subject) -> None:
    """Closed while an image is computed or after, a request leaves its slot free."""
    await _require_vision(subject)
    slots = min(subject.info.max_running or _AT_ONCE, _AT_ONCE)
    free = {"max_tokens": 64, "ignore_eos": True}
    parts = (*map(_png, _SEEDS), "What is it?")
    for _ in range(slots + 1):
        stream = subject.backend.ask(_request(subject, *parts, sampling=free))
        async with asyncio.timeout(_PATIENCE_S), aclosing(stream):
            await first_prefill(stream)
    async with asyncio.timeout(_PATIENCE_S):
        await asyncio.gather(*(_answer(subject, *parts) for _ in range(slots)))


@case("W31 W4")
async def images_fill_the_context(subject: Subject) -> None:
    """A prompt that only its image makes too long is refused; else the rest is for the answer."""
    await _require_vision(subject)
    if subject.is_remote:
        raise Declared("Its context is that of the upstream.")
    parts = ("What is ", _png(_SEEDS[2]), "it?")
    prompt = prompt_tokens(await _answer(subject, *parts))
    free = {"max_tokens": None, "ignore_eos": True}
    long = _request(subject, *parts, sampling=free, context_length=prompt - 1)
    await refusal(subject.backend.ask(long), ContextOverflow)
    reply = await _answer(subject, *parts, sampling=free, context_length=prompt + 3)
    check(reply.reason == "length", f"A full context ends with {reply.reason!r}.")
    made = reply.finish.usage.completion_tokens
    check(made == 3, f"Of 3 tokens that the context has left, {made} are made.")


CASES = (images, images_damaged, images_cancelled, images_fill_the_context)
