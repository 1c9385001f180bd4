"""A loaded model under examination, and how it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from headrace import runtime
from headrace.config import Settings
from headrace.core.backend import Backend
from headrace.core.errors import HeadraceError
from headrace.core.events import Delta, Event, Finish, Progress, TokenLogprob
from headrace.core.model import Capabilities, ModelInfo, ModelSpec
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect_count

Kind = Literal["worker", "process", "pool"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The Backends: in this process, in one of its own, and the pool in front of that."""

POEM = "Write a short poem about rivers."
TOKENS = 8
_SAMPLING = set(Sampling.__struct_fields__)
_PATIENCE_S = 120.0


class Broken(Exception):
    """The engine does not do what the contract says."""


class Declared(Exception):
    """The engine declares that it cannot do this, and refuses it as it should."""


def check(condition: object, message: str) -> None:
    """Raise Broken with the message, unless the condition holds."""
    if not condition:
        raise Broken(message)


@dataclass(frozen=True)
class Heard:
    """One whole stream."""

    events: tuple[Event, ...]
    finish: Finish

    @property
    def deltas(self) -> list[Delta]:
        """The deltas of the first choice."""
        return [one for one in self.events if isinstance(one, Delta) and one.index == 0]

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(delta.text for delta in self.deltas)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that were said."""
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each token, where they were asked for."""
        return [one for delta in self.deltas for one in delta.logprobs]

    @property
    def reason(self) -> str:
        """Why it ended."""
        return self.finish.finish_reason


@dataclass
class Subject:
    """A model on an engine behind a Backend. `reopen` opens the same once more, beside it."""

    engine: str
    kind: Kind
    backend: Backend
    reopen: Callable[[], AbstractAsyncContextManager[Backend]]
    known: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def info(self) -> ModelInfo:
        """What the model tells of itself."""
        return self.backend.models()[0]

    @property
    def capabilities(self) -> Capabilities:
        """What the engine declares for this model."""
        return self.info.capabilities

    @property
    def is_remote(self) -> bool:
        """Whether somebody else runs the model: there are no token ids then."""
        return self.info.format == "remote"

    def able(self, **sampling: Any) -> dict[str, Any]:
        """Return those of the sampling fields that the engine declares."""
        return {
            name: value
            for name, value in sampling.items()
            if name == "stop" or name in self.capabilities.sampling
        }

    def request(self, prompt: str | Sequence[int] = POEM, **given: Any) -> GenerateRequest:
        """Return a request: a text as a message where the model can chat, else as a prompt.

        What is a field of Sampling goes there. `raw` gives a text without the chat template.
        """
        raw = given.pop("raw", False)
        sampling = {name: value for name, value in given.items() if name in _SAMPLING}
        fields = {name: value for name, value in given.items() if name not in _SAMPLING}
        fields["sampling"] = Sampling(**sampling)
        if isinstance(prompt, str) and self.capabilities.chat and (not raw or self.is_remote):
            return GenerateRequest(messages=(Message("user", prompt),), **fields)
        said = prompt if isinstance(prompt, str) else tuple(prompt)
        return GenerateRequest(prompt=said, **fields)

    async def ask(self, prompt: str | Sequence[int] = POEM, **given: Any) -> Heard:
        """Ask, and hear the whole answer."""
        return await hear(self.backend.ask(self.request(prompt, **given)))

    async def say(self, prompt: str | Sequence[int] = POEM, **given: Any) -> Heard:
        """Ask for a few greedy tokens; fields that are given win."""
        fixed = self.able(max_tokens=TOKENS, temperature=0.0)
        return await self.ask(prompt, **(fixed | given))

    async def greedy(self) -> Heard:
        """Return the greedy answer to the same prompt as ever; it is asked for once."""
        if "greedy" not in self.known:
            self.known["greedy"] = await self.say()
        return self.known["greedy"]

    async def certain(self) -> bool:
        """Tell whether each token is the only candidate, so that no sampling can change it."""
        if "logprobs" not in self.capabilities.sampling:
            return False
        if "certain" not in self.known:
            heard = await self.say(logprobs=0)
            self.known["certain"] = all(one.logprob > -1e-6 for one in heard.logprobs)
        return self.known["certain"]

    async def tokens(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Return the token ids of a text.

        Raises:
            Declared: the engine does not know them.
        """
        ask = CountRequest(model="", text=text, add_special=special)
        counted = await collect_count(self.backend.ask(ask))
        if counted.token_ids is None:
            raise Declared("It tells no token ids.")
        return counted.token_ids

    async def noise(self, length: int, seed: int = 0) -> tuple[int, ...]:
        """Return so many tokens that have not been asked for before with another seed."""
        if not self.capabilities.token_prompts:
            raise Declared("It takes no token ids.")
        words = " ".join(f"{seed} {number} river" for number in range(length // 3 + 1))
        found = await self.tokens(words)
        return (found * (length // len(found) + 1))[:length]

    def long(self, prompt: str | Sequence[int] = POEM) -> GenerateRequest:
        """Return a request for an answer that goes on for long."""
        return self.request(prompt, **self.able(ignore_eos=True, temperature=1.0))


async def hear(stream: AsyncGenerator[Event, None]) -> Heard:
    """Read a stream to its end, and check its shape.

    Raises:
        Broken: it has no Finish, or not as its last event.
    """
    async with asyncio.timeout(_PATIENCE_S), aclosing(stream):
        events = [event async for event in stream]
    ends = [event for event in events if isinstance(event, Finish)]
    check(len(ends) == 1, f"A stream has one Finish; this one had {len(ends)}.")
    check(events[-1] is ends[0], "Something came after the Finish.")
    return Heard(tuple(events), ends[0])


async def first_delta(stream: AsyncGenerator[Event, None]) -> Delta:
    """Read up to the first delta."""
    async for event in stream:
        if isinstance(event, Delta):
            return event
    raise Broken("The stream ended without a delta.")


async def first_prefill(stream: AsyncGenerator[Event, None]) -> Progress | None:
    """Read until the engine has begun with the prompt; None if a token came without a word."""
    async for event in stream:
        if isinstance(event, Progress) and event.stage == "prefill":
            return event
        if not isinstance(event, Progress):
            return None
    return None


async def refusal(
    stream: AsyncGenerator[Event, None], *kinds: type[HeadraceError]
) -> HeadraceError:
    """Return the error with which a stream ends.

    Raises:
        Broken: it was answered, or refused by another kind of error.
    """
    try:
        await hear(stream)
    except HeadraceError as error:
        names = " or ".join(kind.__name__ for kind in kinds)
        check(isinstance(error, kinds), f"{type(error).__name__} ({error.message}), not {names}.")
        return error
    raise Broken(f"It was answered, and not refused by {kinds[0].__name__}.")


@asynccontextmanager
async def opened(
    engine: str, spec: ModelSpec, settings: Settings, kind: Kind = "process"
) -> AsyncGenerator[Subject]:
    """Load a model on an engine behind a Backend, and close it in the end.

    Raises:
        HeadraceError: it cannot be loaded.
    """
    again = partial(_backend, spec, settings, kind)
    async with again() as backend:
        yield Subject(engine, kind, backend, again)


@asynccontextmanager
async def _backend(spec: ModelSpec, settings: Settings, kind: Kind) -> AsyncGenerator[Backend]:
    if kind == "pool":
        backend = runtime.open_pool(settings, [spec])
    else:
        backend = runtime.open_worker(spec, settings.config, isolate=kind == "process")
    try:
        await backend.start()
        yield backend
    finally:
        await backend.aclose()
