"""Issue 13: the tokens of a prompt with their log probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from tests.api.fakes import client
from tests.evaluating import loglikelihoods
from tests.worker.rig import ask, finish, listed, worker

from headrace.core.errors import (
    ContextOverflow,
    DeadlineExceeded,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    Unsupported,
)
from headrace.core.events import Delta, Event, PromptToken, PromptTokens
from headrace.core.model import Capabilities
from headrace.core.request import GenerateRequest, Message
from headrace.core.stream import collect
from headrace.engines.echo import Engine
from headrace.worker.prompt import check_supported


def scored(events: list[Event]) -> list[PromptTokens]:
    return [event for event in events if isinstance(event, PromptTokens)]


async def test_an_echo_without_new_tokens() -> None:
    """Issue 13: max_tokens 0 takes no token of the engine, and usage counts the prompt."""
    async with worker() as opened:
        events = await listed(opened.ask(ask("né", echo=True, logprobs=1, max_tokens=0)))
        (prompt,) = scored(events)
        assert prompt.text == "né"
        assert [token.data for token in prompt.tokens] == [b"n", b"\xc3", b"\xa9"]
        assert [token.logprob for token in prompt.tokens] == [None, 0.0, 0.0]
        assert not any(isinstance(event, Delta) for event in events)
        end = finish(events)
        assert (end.finish_reason, end.usage.prompt_tokens) == ("length", 3)
        assert end.usage.completion_tokens == 0
        plain = finish(await listed(opened.ask(ask("abc", echo=True, max_tokens=0))))
        assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (3, 0)
        assert opened.load == (0, 0)


async def test_choices_and_messages() -> None:
    """Issue 13: each choice has them; prompt_logprobs goes with messages, and echoes nothing."""
    async with worker() as opened:
        result = await collect(opened.ask(ask("ab", echo=True, logprobs=0, n=2, max_tokens=1)))
        assert [choice.text for choice in result.choices] == ["aba", "aba"]
        assert [len(choice.prompt_tokens) for choice in result.choices] == [2, 2]
        request = GenerateRequest(messages=(Message("user", "ab"),), prompt_logprobs=1)
        result = await collect(opened.ask(request))
        assert (result.text, len(result.choices[0].prompt_tokens)) == ("ab", 2)
        assert result.usage.prompt_tokens == 2


@pytest.mark.parametrize(
    ("data", "kept", "text"),
    [
        ([b"<s>", b"a", b"b"], [b"", b"a", b"b"], "ab"),
        ([b"<s>", b" a", b"b", b"</s>"], [b"", b"a", b"b", b""], "ab"),
        ([b" ", b"ab"], [b"", b"ab"], "ab"),
        ([b"A", b"b"], [b"A", b"b"], "Ab"),
    ],
)
async def test_an_echo_is_the_text_that_was_sent(
    data: list[bytes], kept: list[bytes], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 13: without what a tokenizer puts around it, so that offsets are those of the text."""

    async def tokens(*_: Any) -> AsyncGenerator[Sequence[PromptToken], None]:
        yield [PromptToken(1, part) for part in data]

    monkeypatch.setattr(Engine, "prompt_tokens", tokens)
    ids = [*range(len(data))]
    monkeypatch.setattr(Engine, "tokenize", lambda *_, **__: ids)
    async with worker() as opened:
        request = ask("ab", echo=True, logprobs=0, max_tokens=0)
        (prompt,) = scored(await listed(opened.ask(request)))
        assert (prompt.text, [token.data for token in prompt.tokens]) == (text, kept)
        request = ask((1,) * len(data), echo=True, logprobs=0, max_tokens=0)
        (prompt,) = scored(await listed(opened.ask(request)))
        assert prompt.text.encode() == b"".join(data)


async def test_a_prompt_that_fills_the_context() -> None:
    """Issue 13: nothing has to be left for an answer of no tokens."""
    async with worker(context_length=4) as opened:
        request = ask("abcd", echo=True, logprobs=0, max_tokens=0)
        assert finish(await listed(opened.ask(request))).usage.prompt_tokens == 4
        for wrong, tokens in (("abcd", 1), ("abcde", 0)):
            with pytest.raises(ContextOverflow):
                await listed(opened.ask(ask(wrong, echo=True, logprobs=0, max_tokens=tokens)))


async def test_what_is_too_much_is_refused_before_it_is_computed() -> None:
    """Issue 13: with n, by the field that asked."""
    async with worker() as opened:
        for given, param in (
            ({"echo": True, "logprobs": 1}, "logprobs"),
            ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await listed(opened.ask(ask("a" * 140_000, max_tokens=1, n=2, **given)))
            assert caught.value.param == param


async def test_an_engine_that_reports_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 13: tokens and text would not belong together."""

    async def none(*_: Any) -> AsyncGenerator[Sequence[PromptToken], None]:
        yield []

    monkeypatch.setattr(Engine, "prompt_tokens", none)
    async with worker() as opened:
        with pytest.raises(GenerationFailed, match="0 of 2"):
            await listed(opened.ask(ask("ab", prompt_logprobs=0)))
        assert opened.load == (0, 0)


async def test_a_deadline_and_a_client_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 13: the engine is closed, and the slot is free."""
    closed = asyncio.Event()

    async def hangs(*_: Any) -> AsyncGenerator[Sequence[PromptToken], None]:
        try:
            yield [PromptToken(97, b"a")]
            await asyncio.Event().wait()
        finally:
            closed.set()

    monkeypatch.setattr(Engine, "prompt_tokens", hangs)
    async with worker() as opened:
        with pytest.raises(DeadlineExceeded):
            await listed(opened.ask(ask("ab", prompt_logprobs=0, deadline_s=0.05)))
        assert closed.is_set()
        closed.clear()
        stream = opened.ask(ask("ab", prompt_logprobs=0))
        await anext(stream)
        await stream.aclose()
        assert closed.is_set()
        assert opened.load == (0, 0)


@pytest.mark.parametrize(
    ("given", "able", "param"),
    [
        ({"echo": True, "logprobs": 0}, False, "echo"),
        ({"prompt_logprobs": 0}, False, "prompt_logprobs"),
        ({"echo": True, "logprobs": 0, "suffix": "b"}, True, "echo"),
    ],
)
def test_engines_that_cannot(given: dict[str, Any], able: bool, param: str) -> None:
    """Issue 13: refused by the name of the field."""
    capabilities = Capabilities(sampling=frozenset({"logprobs"}), prompt_logprobs=able)
    with pytest.raises(Unsupported) as caught:
        check_supported(ask("a", **given), capabilities)
    assert isinstance(caught.value, HeadraceError)
    assert caught.value.param == param


async def test_what_an_evaluation_sends() -> None:
    """Issue 13: lm-eval's local-completions: token ids in batches, one token, echo and logprobs."""
    async with worker() as opened:
        backend: Any = opened
        async with client(backend) as http:
            pairs = [([97, 98], [99]), ([97], [98, 99, 100]), ([195], [169])]
            assert await loglikelihoods(http, "echo", pairs) == [(0.0, True)] * 3
