"""The speed of a loaded model with a number of clients in a closed loop."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

import msgspec

from headrace.core.backend import Backend
from headrace.core.events import Delta, Finish
from headrace.core.request import GenerateRequest
from headrace.core.sampling import Sampling
from headrace.lab import load

_PATIENCE_S = 60.0
"""A turn is cut this long after the last request could start; the tokens until then count."""
_LOOK_S = 0.25
"""How often a turn's rate is compared with the least that is wanted."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The loads of a measurement. `seconds` is how long clients start new requests in a turn.

    `budget_s` is the time that a whole run may take.
    """

    streams: tuple[int, ...] = (1, 8, 32)
    seconds: float = 5.0
    rounds: int = 3
    tokens: int = 128
    budget_s: float = 300.0


class Bound(msgspec.Struct, frozen=True):
    """When a turn is cut: after `seconds`, or as soon as it is clearly slower than `least`."""

    seconds: float = math.inf
    least: float = 0.0

    def is_slow(self, tokens: int, seconds: float, whole: int) -> bool:
        """Whether it is too slow and had the time for its first answers, of `whole` tokens."""
        return seconds * self.least > max(tokens, whole)


UNBOUND = Bound()


class Turn(msgspec.Struct):
    """The figures of one turn. `first_s` are the times to the first token of each request.

    One that was `cut` ended before its requests did: it was too slow, or too late.
    """

    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    first_s: list[float] = []
    memory: dict[str, int] = {}
    cut: Literal["", "slow", "late"] = ""

    @property
    def rate(self) -> float:
        """Output tokens/s of all streams together."""
        return self.tokens / self.seconds if self.seconds else 0.0


async def turn(
    backend: Backend,
    streams: int,
    shape: Shape,
    seed: str,
    bound: Bound = UNBOUND,
    done: Turn | None = None,
) -> Turn:
    """Run `streams` clients; all prompts differ, so that no cache of prefixes helps.

    The figures are written into `done`, which has those of a turn that was cut before its requests
    have ended.

    Raises:
        HeadraceError: a request failed.
    """
    done, source = done or Turn(), random.Random(seed)  # noqa: S311 - the same prompts in every run
    began = time.monotonic()

    async def client() -> None:
        while True:
            await _ask(backend, load.prompt(source), shape.tokens, done)
            if time.monotonic() - began >= shape.seconds:
                return

    clients = [asyncio.ensure_future(client()) for _ in range(streams)]
    most = min(bound.seconds, shape.seconds + _PATIENCE_S)
    bound = Bound(most, bound.least)
    try:
        await _until(clients, bound, done, began, streams * shape.tokens)
    except asyncio.CancelledError:
        # Not waited for: the model is unloaded next, which ends requests of one that hangs, too.
        for each in clients:
            each.cancel()
        raise
    await _end(clients)
    return done


async def _until(
    clients: Sequence[asyncio.Future[None]], bound: Bound, done: Turn, began: float, whole: int
) -> None:
    """Wait for the end of all clients, for an error, or until the turn is cut."""
    look_s = _LOOK_S if bound.least else bound.seconds
    while True:
        left = bound.seconds - (time.monotonic() - began)
        timeout = max(0.0, min(look_s, left))
        ended, running = await asyncio.wait(
            clients, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION
        )
        done.seconds = time.monotonic() - began
        if not running or any(each.exception() for each in ended):
            return
        if bound.is_slow(done.tokens, done.seconds, whole):
            done.cut = "slow"
            return
        if done.seconds >= bound.seconds:
            done.cut = "late"
            return


async def _end(clients: Sequence[asyncio.Future[None]]) -> None:
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    for client in clients:
        if not client.cancelled():
            client.result()


async def _ask(backend: Backend, prompt: str, tokens: int, done: Turn) -> None:
    capabilities = backend.models()[0].capabilities
    able = "ignore_eos" in capabilities.sampling
    # A greedy answer past its end repeats itself, which drafts would gain from.
    temperature = 1.0 if capabilities.speculation else 0.0
    sampling = Sampling(max_tokens=tokens, temperature=temperature, ignore_eos=able)
    began, streamed = time.monotonic(), 0
    async with aclosing(backend.ask(GenerateRequest(prompt=prompt, sampling=sampling))) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                if not streamed and event.token_ids:
                    done.first_s.append(time.monotonic() - began)
                streamed += len(event.token_ids)
                done.tokens += len(event.token_ids)
            elif isinstance(event, Finish):
                done.tokens += event.usage.completion_tokens - streamed
                done.prompt_tokens += event.usage.prompt_tokens
                for device in event.metrics.devices:
                    key = device.name.partition(" ")[0]
                    done.memory[key] = max(done.memory.get(key, 0), device.worker_peak)
