"""What the tests ask an engine, and how they read what it says."""

from __future__ import annotations

from typing import Any

from headrace.core.sampling import Sampling
from headrace.engines.base import EngineRequest, Generator, RawDelta, RawEvent, RawFinish

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def asked(
    engine: Generator, text: str, max_tokens: int = 16, *, temperature: float = 0, **sampling: Any
) -> EngineRequest:
    return EngineRequest(
        token_ids=tuple(engine.tokenize(CHAT.format(text), add_special=False)),
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, **sampling),
    )


async def events(engine: Generator, request: EngineRequest) -> list[RawEvent]:
    return [event async for event in engine.generate(request)]


def deltas(events: list[RawEvent]) -> list[RawDelta]:
    return [event for event in events if isinstance(event, RawDelta)]


def tokens(events: list[RawEvent]) -> tuple[int, ...]:
    return tuple(token for delta in deltas(events) for token in delta.token_ids)


def finish(events: list[RawEvent]) -> RawFinish:
    last = events[-1]
    assert isinstance(last, RawFinish)
    return last


async def answered(engine: Generator, text: str, max_tokens: int = 16, **sampling: Any):
    return tokens(await events(engine, asked(engine, text, max_tokens, **sampling)))
