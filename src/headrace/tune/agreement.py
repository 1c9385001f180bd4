"""Whether an engine says what the reference says, over fixed prompts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from statistics import fmean
from typing import TypeVar

import msgspec

from headrace.core.backend import Backend
from headrace.core.errors import Unsupported
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect, collect_count

Asked = TypeVar("Asked")
Told = TypeVar("Told")

LEAST_FORCED = 0.95
"""Share of the tokens that must be the reference's, each after the reference's own text."""
MOST_DISTANCE = 0.15
"""How far the logarithm of the probability of the reference's token may be off, on average."""
CLEAR = 0.5
"""Only tokens count that the reference prefers by so much (in the logarithm) to all others.

What is nearer is decided by how sums are rounded, and differs between two runs of one engine.
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
_ANSWER = 32
_STEP = 4
_CANDIDATES = 5


class Guess(msgspec.Struct, frozen=True):
    """The next token that an engine would take (-1: none), and what it thinks of the best few."""

    token: int
    logprobs: dict[int, float] = {}

    def is_clear(self) -> bool:
        """Tell whether it prefers its token to all others; yes where that is not known."""
        others = [value for token, value in self.logprobs.items() if token != self.token]
        mine = self.logprobs.get(self.token)
        return mine is None or mine - max(others, default=-99.0) >= CLEAR


class Said(msgspec.Struct, frozen=True):
    """What an engine sees of one prompt, and says to it, greedily."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How near the answers of an engine are to those of the reference.

    `prompts` is the share of prompts that became the same tokens. `greedy` is the share of an
    answer up to its first other token, on average; `forced` the share of next tokens that are the
    same, each after the reference's text, of those that are clear; `compared` counts these.
    `distance` is the mean difference of log-probabilities of the reference's tokens, None where the
    engine gives none.
    """

    prompts: float
    greedy: float
    forced: float
    distance: float | None
    compared: int

    def fault(self) -> str | None:
        """Return what is wrong, as a sentence without an end; None if it agrees."""
        if self.prompts < 1:
            return f"only {self.prompts:.0%} of the prompts become the same tokens"
        if self.forced < LEAST_FORCED:
            return f"only {self.forced:.0%} of its tokens are the reference's"
        if self.distance is not None and self.distance > MOST_DISTANCE:
            return f"its log-probabilities are off by {self.distance:.2f}"
        return None


class Reference:
    """The answers that the others are compared with. Ask an engine for them once."""

    def __init__(self, said: Sequence[Said], guesses: Sequence[Guess]) -> None:
        self._said = said
        self._guesses = guesses

    @classmethod
    async def ask(cls, backend: Backend) -> Reference:
        """Let the reference engine answer.

        Raises:
            HeadraceError: it could not.
        """
        said = await _all_said(backend)
        return cls(said, await _all_guessed(backend, said))

    async def compare(self, backend: Backend) -> Agreement:
        """Let another engine answer, alone and after the reference's own words.

        Raises:
            HeadraceError: it could not.
        """
        said = await _all_said(backend)
        return agreement(self._said, said, self._guesses, await _all_guessed(backend, self._said))


def agreement(
    reference: Sequence[Said],
    said: Sequence[Said],
    expected: Sequence[Guess],
    guesses: Sequence[Guess],
) -> Agreement:
    """Compare two engines; the lists go in pairs."""
    pairs = list(zip(reference, said, strict=True))
    steps = list(zip(expected, guesses, strict=True))
    clear = [pair for pair in steps if pair[0].is_clear()] or steps
    distances = [found for pair in steps if (found := _distance(*pair)) is not None]
    return Agreement(
        prompts=fmean(one.prompt == other.prompt for one, other in pairs),
        greedy=fmean(_common(one.answer, other.answer) for one, other in pairs),
        forced=fmean(one.token == other.token for one, other in clear),
        distance=fmean(distances) if distances else None,
        compared=len(clear),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> float:
    longest = max(len(one), len(other))
    same = (index for index, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1)
    return next(same, min(len(one), len(other))) / longest if longest else 1.0


def _distance(expected: Guess, guess: Guess) -> float | None:
    there = expected.logprobs.get(expected.token)
    if there is None or not guess.logprobs:
        return None
    # A token that is not among the best is at most as likely as the last of them.
    here = guess.logprobs.get(expected.token, min(guess.logprobs.values()))
    return abs(there - here)


async def _all_said(backend: Backend) -> list[Said]:
    return await _several(backend, PROMPTS, _say)


async def _several(
    backend: Backend, inputs: Sequence[Asked], ask: Callable[[Backend, Asked], Awaitable[Told]]
) -> list[Told]:
    """Ask as much at once as runs at once."""
    turns = asyncio.Semaphore(backend.models()[0].max_running or 1)

    async def one(given: Asked) -> Told:
        async with turns:
            return await ask(backend, given)

    return list(await asyncio.gather(*map(one, inputs)))


async def _say(backend: Backend, prompt: str) -> Said:
    ask = CountRequest(text=prompt, add_special=True)
    if backend.models()[0].capabilities.chat:
        ask = CountRequest(messages=(Message("user", prompt),))
    token_ids = (await collect_count(backend.ask(ask))).token_ids or ()
    sampling = Sampling(max_tokens=_ANSWER, temperature=0)
    result = await collect(backend.ask(GenerateRequest(prompt=token_ids, sampling=sampling)))
    return Said(token_ids, result.choices[0].token_ids)


async def _all_guessed(backend: Backend, said: Sequence[Said]) -> list[Guess]:
    texts = [
        (*one.prompt, *one.answer[:length])
        for one in said
        for length in range(0, len(one.answer), _STEP)
    ]
    most = await _most_logprobs(backend, texts[0])
    return await _several(backend, texts, lambda asked, text: _guess(asked, text, most))


async def _most_logprobs(backend: Backend, token_ids: tuple[int, ...]) -> int | None:
    """Return how many candidates an engine tells, 0 for the chosen one alone."""
    for count in (_CANDIDATES, 0):
        with contextlib.suppress(Unsupported):
            await _guess(backend, token_ids, count)
            return count
    return None


async def _guess(backend: Backend, token_ids: tuple[int, ...], logprobs: int | None) -> Guess:
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=logprobs)
    asked = GenerateRequest(prompt=token_ids, sampling=sampling)
    choice = (await collect(backend.ask(asked))).choices[0]
    found: dict[int, float] = {}
    for token in choice.logprobs[:1]:
        found = {one.token_id: one.logprob for one in token.top}
        found[token.token_id] = token.logprob
    return Guess(choice.token_ids[0] if choice.token_ids else -1, found)
