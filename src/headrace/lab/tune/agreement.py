"""The agreement of an engine's answers to fixed prompts with those of the reference."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import fmean
from typing import TypeVar

import msgspec

from headrace.core.backend import Backend
from headrace.core.errors import Unsupported
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect, collect_count
from headrace.engines.measured import Agreement

Input = TypeVar("Input")
Output = TypeVar("Output")

CLEAR = 0.5
"""The least margin in log probability of the reference's tokens that are compared.

Closer ones depend on the rounding of sums, and differ between two runs of one engine.
"""

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about a river in winter.",
    "Explain to a child why the sky is blue.",
    "List five animals that live in the sea, one on each line.",
    "Translate into French: The bread is on the table.",
    "How do I boil an egg?",
    "Tell me what 17 plus 25 is, and how you know.",
    "Name three reasons to learn to play an instrument.",
)
_LEAST_PROMPTS = 2
_ANSWER = 32
_STEP = 4
_CANDIDATES = 5


class Guess(msgspec.Struct, frozen=True):
    """The next token of an engine (-1: none), and the log probabilities of the best few."""

    token: int
    logprobs: dict[int, float] = {}

    def is_clear(self) -> bool:
        """Whether the token is clearly preferred to all others; true if that is unknown."""
        others = [value for token, value in self.logprobs.items() if token != self.token]
        own = self.logprobs.get(self.token)
        return own is None or own - max(others, default=-99.0) >= CLEAR


class Reply(msgspec.Struct, frozen=True):
    """The tokens of one prompt, and of an engine's greedy answer to it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Reference:
    """The answers of the reference engine, which the others are compared with."""

    def __init__(self, replies: Sequence[Reply], guesses: Sequence[Guess]) -> None:
        self._replies = replies
        self._guesses = guesses

    @classmethod
    async def ask(cls, backend: Backend, limit_s: float = math.inf) -> Reference:
        """Get the answers of the reference engine: to fewer prompts if all take too long.

        Raises:
            HeadraceError: a request failed.
        """
        began = time.monotonic()
        first = [await _reply(backend, PROMPTS[0])]
        await _guesses(backend, first)
        took = max(time.monotonic() - began, 1e-3)
        prompts = PROMPTS[: max(_LEAST_PROMPTS, int(min(len(PROMPTS), limit_s / took)))]
        replies = await _replies(backend, prompts)
        return cls(replies, await _guesses(backend, replies))

    async def compare(self, backend: Backend) -> Agreement:
        """Compare another engine: its own answers, and its next tokens after the reference's.

        Raises:
            HeadraceError: a request failed.
        """
        replies = await _replies(backend, PROMPTS[: len(self._replies)])
        guesses = await _guesses(backend, self._replies)
        return agreement(self._replies, replies, self._guesses, guesses)


def agreement(
    reference: Sequence[Reply],
    replies: Sequence[Reply],
    expected: Sequence[Guess],
    guesses: Sequence[Guess],
) -> Agreement:
    """Compare two engines; the lists are paired."""
    pairs = list(zip(reference, replies, strict=True))
    steps = list(zip(expected, guesses, strict=True))
    clear = [step for step in steps if step[0].is_clear()] or steps
    distances = [value for step in steps if (value := _distance(*step)) is not None]
    return Agreement(
        prompts=fmean(right.prompt == reply.prompt for right, reply in pairs),
        greedy=fmean(_common(right.answer, reply.answer) for right, reply in pairs),
        forced=fmean(right.token == guess.token for right, guess in clear),
        distance=fmean(distances) if distances else None,
        compared=len(clear),
    )


def _common(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the share of two answers up to their first difference."""
    shorter, longer = sorted((len(first), len(second)))
    same = (place for place in range(shorter) if first[place] != second[place])
    return next(same, shorter) / longer if longer else 1.0


def _distance(expected: Guess, guess: Guess) -> float | None:
    right = expected.logprobs.get(expected.token)
    if right is None or not guess.logprobs:
        return None
    # A token that is not among the best is at most as likely as the last of those.
    return abs(right - guess.logprobs.get(expected.token, min(guess.logprobs.values())))


async def _replies(backend: Backend, prompts: Sequence[str]) -> list[Reply]:
    return await _several(backend, prompts, _reply)


async def _several(
    backend: Backend,
    inputs: Sequence[Input],
    ask: Callable[[Backend, Input], Awaitable[Output]],
) -> list[Output]:
    """Send as many requests at once as can run at once."""
    slots = asyncio.Semaphore(backend.models()[0].max_running or 1)

    async def limited(item: Input) -> Output:
        async with slots:
            return await ask(backend, item)

    return list(await asyncio.gather(*map(limited, inputs)))


async def _reply(backend: Backend, prompt: str) -> Reply:
    count = CountRequest(text=prompt, add_special=True)
    if backend.models()[0].capabilities.chat:
        count = CountRequest(messages=(Message("user", prompt),))
    token_ids = (await collect_count(backend.ask(count))).token_ids or ()
    sampling = Sampling(max_tokens=_ANSWER, temperature=0)
    result = await collect(backend.ask(GenerateRequest(prompt=token_ids, sampling=sampling)))
    return Reply(token_ids, result.choices[0].token_ids)


async def _guesses(backend: Backend, replies: Sequence[Reply]) -> list[Guess]:
    prefixes = [
        (*reply.prompt, *reply.answer[:length])
        for reply in replies
        for length in range(0, len(reply.answer), _STEP)
    ]
    count = await _most_logprobs(backend, prefixes[0])
    return await _several(backend, prefixes, lambda backend, ids: _guess(backend, ids, count))


async def _most_logprobs(backend: Backend, token_ids: tuple[int, ...]) -> int | None:
    """Return how many candidates an engine reports, 0 for the chosen one alone, None for none."""
    for count in (_CANDIDATES, 0):
        with contextlib.suppress(Unsupported):
            await _guess(backend, token_ids, count)
            return count
    return None


async def _guess(backend: Backend, token_ids: tuple[int, ...], logprobs: int | None) -> Guess:
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=logprobs)
    request = GenerateRequest(prompt=token_ids, sampling=sampling)
    choice = (await collect(backend.ask(request))).choices[0]
    known: dict[int, float] = {}
    for token in choice.logprobs[:1]:
        known = {top.token_id: top.logprob for top in token.top}
        known[token.token_id] = token.logprob
    return Guess(choice.token_ids[0] if choice.token_ids else -1, known)
