"""A loaded model under test, and helpers for requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
)
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import msgspec

from headrace.config import Settings
from headrace.core.backend import Backend
from headrace.core.constraint import ANY_FORM, constraint_of
from headrace.core.errors import HeadraceError
from headrace.core.events import Delta, Event, Finish, Progress, TokenLogprob
from headrace.core.model import Capabilities, ModelInfo, ModelSpec
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect_count
from headrace.lab import drive
from headrace.lab.drive import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of Backend: in this process, in a process of its own, and behind the pool."""

POEM = "Write a short poem about rivers."
TOKENS = 8
TEMPLATE = """\
{%- if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}\x1e{% endif -%}
{%- for message in messages -%}
{%- if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt and enable_thinking %}<think>
{% endif -%}
"""
"""A chat template with tools and thinking, in which the last message ends the prompt."""
_TALK = 512
_SAMPLING = set(Sampling.__struct_fields__)
_PATIENCE_S = 120.0


class Broken(Exception):
    """The engine does not fulfil the contract."""


class Declared(Exception):
    """The engine declares that it cannot do this, and refuses it properly."""


def check(condition: object, message: str) -> None:
    """Raise Broken with the message, unless the condition holds."""
    if not condition:
        raise Broken(message)


@dataclass(frozen=True)
class Reply:
    """One whole stream."""

    events: tuple[Event, ...]
    finish: Finish

    @property
    def deltas(self) -> list[Delta]:
        """The deltas of the first choice."""
        return [event for event in self.events if isinstance(event, Delta) and event.index == 0]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choice(0)

    def choice(self, index: int) -> str:
        """Return the text of a choice."""
        deltas = (event for event in self.events if isinstance(event, Delta))
        return "".join(delta.text for delta in deltas if delta.index == index)

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids of the first choice."""
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The log probabilities of the tokens of the first choice, if they were requested."""
        return [token for delta in self.deltas for token in delta.logprobs]

    @property
    def reason(self) -> str:
        """The finish reason."""
        return self.finish.finish_reason


@dataclass
class Subject:
    """A model on an engine behind a Backend.

    `reopen` loads the same model again, beside it, with other settings. What is in `held` is closed
    with it. `adapters` are those that it was loaded with.
    """

    engine: str
    kind: Kind
    backend: Backend
    reopen: Callable[..., AbstractAsyncContextManager[Backend]]
    held: AsyncExitStack
    adapters: tuple[str, ...] = ()
    known: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def info(self) -> ModelInfo:
        """The model's metadata."""
        return self.backend.models()[0]

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities that the engine declares for this model."""
        return self.info.capabilities

    @property
    def is_remote(self) -> bool:
        """Whether another service runs the model: there are no token ids then."""
        return self.info.format == "remote"

    async def talking(self) -> Subject:
        """Return the model with a chat template that has tools and thinking, loaded once.

        A remote model is returned as it is: its template is that of the upstream.
        """
        if self.is_remote:
            return self
        if "talking" not in self.known:
            length = max(self.info.context_length or 0, _TALK)
            again = self.reopen(chat_template=TEMPLATE, context_length=length)
            backend = await self.held.enter_async_context(again)
            self.known["talking"] = replace(self, backend=backend, known={})
        return self.known["talking"]

    def able(self, **sampling: Any) -> dict[str, Any]:
        """Return the sampling fields that the engine declares."""
        return {
            name: value
            for name, value in sampling.items()
            if name == "stop" or name in self.capabilities.sampling
        }

    def request(self, prompt: str | Sequence[int] = POEM, **given: Any) -> GenerateRequest:
        """Return a request: a text becomes a message if the model can chat, else a prompt.

        Fields of Sampling are passed there. With `raw`, no chat template is applied. `json_schema`,
        `regex`, `choice` and `grammar` are what the answer has to be.
        """
        raw = given.pop("raw", False)
        for form in ANY_FORM:
            if form in given:
                given["constraint"] = constraint_of(form, given.pop(form))
        sampling = {name: value for name, value in given.items() if name in _SAMPLING}
        fields = {name: value for name, value in given.items() if name not in _SAMPLING}
        fields["sampling"] = Sampling(**sampling)
        if isinstance(prompt, str) and self.capabilities.chat and (not raw or self.is_remote):
            return GenerateRequest(messages=(Message("user", prompt),), **fields)
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        return GenerateRequest(prompt=prompt, **fields)

    async def ask(self, prompt: str | Sequence[int] = POEM, **given: Any) -> Reply:
        """Send a request, and read the whole answer."""
        return await read(self.backend.ask(self.request(prompt, **given)))

    async def short(self, prompt: str | Sequence[int] = POEM, **given: Any) -> Reply:
        """Send a request for a few greedy tokens; given fields override that."""
        fixed = self.able(max_tokens=TOKENS, temperature=0.0)
        return await self.ask(prompt, **(fixed | given))

    async def greedy(self) -> Reply:
        """Return the greedy answer to the default prompt; it is requested once."""
        if "greedy" not in self.known:
            self.known["greedy"] = await self.short()
        return self.known["greedy"]

    async def certain(self) -> bool:
        """Return whether each token is the only candidate, so that no sampling can change it."""
        if "logprobs" not in self.capabilities.sampling:
            return False
        if "certain" not in self.known:
            reply = await self.short(logprobs=0)
            self.known["certain"] = all(token.logprob > -1e-6 for token in reply.logprobs)
        return self.known["certain"]

    async def tokens(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Return the token ids of a text.

        Raises:
            Declared: the engine does not report them.
        """
        request = CountRequest(model="", text=text, add_special=special)
        counted = await collect_count(self.backend.ask(request))
        if counted.token_ids is None:
            raise Declared("It reports no token ids.")
        return counted.token_ids

    async def noise(self, length: int, seed: int = 0) -> tuple[int, ...]:
        """Return `length` tokens with another beginning for each seed, unknown to any cache."""
        if not self.capabilities.token_prompts:
            raise Declared("It accepts no token ids.")
        words = " ".join(f"{seed} {number} river" for number in range(length // 3 + 1))
        ids = await self.tokens(words)
        return (ids * (length // len(ids) + 1))[:length]

    def long(self, prompt: str | Sequence[int] = POEM) -> GenerateRequest:
        """Return a request for a long answer."""
        return self.request(prompt, **self.able(ignore_eos=True, temperature=1.0))


async def read(stream: AsyncGenerator[Event, None]) -> Reply:
    """Read a stream to its end, and check its shape.

    Raises:
        Broken: it has no Finish, or not as its last event.
    """
    async with asyncio.timeout(_PATIENCE_S), aclosing(stream):
        events = [event async for event in stream]
    ends = [event for event in events if isinstance(event, Finish)]
    check(len(ends) == 1, f"A stream has one Finish; this one had {len(ends)}.")
    check(events[-1] is ends[0], "The Finish is not the last event.")
    return Reply(tuple(events), ends[0])


async def first_delta(stream: AsyncGenerator[Event, None]) -> Delta:
    """Read up to the first delta."""
    async for event in stream:
        if isinstance(event, Delta):
            return event
    raise Broken("The stream ended without a delta.")


async def first_prefill(stream: AsyncGenerator[Event, None]) -> Progress | None:
    """Read until the engine starts on the prompt; None if a token comes before that."""
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
        Broken: it was answered, or failed with another kind of error.
    """
    try:
        await read(stream)
    except HeadraceError as error:
        names = " or ".join(kind.__name__ for kind in kinds)
        check(isinstance(error, kinds), f"{type(error).__name__} ({error.message}), not {names}.")
        return error
    raise Broken(f"It was answered, and not refused by {kinds[0].__name__}.")


@asynccontextmanager
async def opened(
    engine: str, spec: ModelSpec, settings: Settings, kind: Kind = "process"
) -> AsyncGenerator[Subject]:
    """Load a model on an engine behind a Backend, and close it at the end.

    Raises:
        HeadraceError: it cannot be loaded.
    """

    def again(**changes: Any) -> AbstractAsyncContextManager[Backend]:
        return drive.model(msgspec.structs.replace(spec, **changes), settings, kind)

    async with AsyncExitStack() as held:
        backend = await held.enter_async_context(again())
        yield Subject(engine, kind, backend, again, held, tuple(spec.adapters))
