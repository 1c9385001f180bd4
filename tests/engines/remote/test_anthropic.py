"""The library of Anthropic on a fake upstream."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from tests.engines.remote.rig import KEY, QUICK, ask, started
from tests.fakes.upstream import Play, Seen, answered, eventually, refused, upstream
from tests.pictures_made import asked as picture_request
from tests.pictures_made import png

from headrace.core.constraint import Constraint
from headrace.core.errors import CapacityError, InvalidRequest, Unsupported, UpstreamError
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.stream import collect, collect_count

pytestmark = pytest.mark.engines

START = {
    "type": "message_start",
    "message": {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "gpt-x",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 2,
            "output_tokens": 1,
        },
    },
}
STOP = {"type": "message_stop"}


def event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def text(said: str) -> dict[str, Any]:
    return {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": said},
    }


def thought(said: str) -> dict[str, Any]:
    return text("") | {"delta": {"type": "thinking_delta", "thinking": said}}


def end(reason: str, tokens: int = 4) -> dict[str, Any]:
    return {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": None},
        "usage": {
            "output_tokens": tokens,
            "output_tokens_details": {"thinking_tokens": 1},
        },
    }


def play(*events: dict[str, Any] | float) -> Play:
    return Play([event(one) if isinstance(one, dict) else one for one in events])


def good(seen: Seen | None = None) -> Play:
    return play(START, thought("Hm."), text('{"a": "Grüß '), text('Gott"}'), end("end_turn"), STOP)


async def test_images_are_passed_on() -> None:
    """Issue 13, pictures."""
    async with upstream(script=good) as server, started(server.url, "anthropic") as worker:
        await collect(worker.ask(picture_request("a", png())))
        (sent,) = server.requests
    text, image = sent.body["messages"][0]["content"]
    assert text == {"type": "text", "text": "a"}
    assert (image["type"], image["source"]["type"]) == ("image", "base64")
    assert image["source"]["media_type"] == "image/png"
    assert base64.b64decode(image["source"]["data"]) == png()


async def test_an_answer_comes_with_its_account() -> None:
    """W9, W14, W15: cached tokens are part of the prompt's."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    asked = ask(max_tokens=9, stop=("X", "\n"), constraint=Constraint(json_schema=schema))
    async with upstream(script=good) as server, started(server.url, "anthropic") as worker:
        result = await collect(worker.ask(asked))
        await collect(
            worker.ask(
                GenerateRequest(
                    messages=(
                        Message("system", "one"),
                        Message("user", "hi"),
                        Message("developer", "two"),
                    )
                )
            )
        )
        first, second = server.requests
    assert (result.choices[0].reasoning, result.text) == ("Hm.", '{"a": "Grüß Gott"}')
    assert result.finish_reason == "stop"
    account = result.usage
    assert (account.prompt_tokens, account.cached_tokens) == (10, 3)
    assert (account.completion_tokens, account.reasoning_tokens) == (4, 1)
    assert first.path == "/v1/messages"
    assert first.headers["authorization"] == f"Bearer {KEY}"
    assert first.body == {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 9,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        "stop_sequences": ["X"],
        "stream": True,
    }
    assert (second.body["system"], second.body["max_tokens"]) == ("one\n\ntwo", 4096)


@pytest.mark.parametrize(
    ("reason", "ours"),
    [("max_tokens", "length"), ("stop_sequence", "stop"), ("refusal", "content_filter")],
)
async def test_reasons(reason: str, ours: str) -> None:
    async with (
        upstream(play(START, end(reason), STOP)) as server,
        started(server.url, "anthropic") as worker,
    ):
        assert (await collect(worker.ask(ask()))).finish_reason == ours


BROKEN: dict[str, tuple[Play, str]] = {
    "truncated": (play(START, text("a"), end("end_turn")), "truncated"),
    "no reason": (play(START, text("a"), STOP), "truncated"),
    "strange reason": (play(START, end("odd"), STOP), "odd"),
    "malformed": (Play([event(START), b"event: content_block_delta\ndata: {x\n\n"]), "malformed"),
    "stall": (play(START, text("a"), 5.0), "silent"),
    "slow": (play(START, 5.0), "no token"),
    "dropped": (Play([event(START), event(text("a")), 0.02, "drop"]), "broke off"),
    "wrong key": (refused(401, {"type": "authentication_error", "message": KEY}), "key"),
    "redirect": (Play([], 307, None, {"location": "http://x.invalid"}, "length"), "redirects"),
    "error": (Play([event(START), event({"type": "error", "error": {"message": "no"}})]), "error"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_upstream_is_an_error_and_no_answer(name: str) -> None:
    """W17: typed, without the key, and the slot is free for the next."""
    broken, match = BROKEN[name]
    async with (
        upstream(broken, script=good) as server,
        started(server.url, "anthropic", max_retries=0, **QUICK) as worker,
    ):
        with pytest.raises(UpstreamError, match=match) as raised:
            await collect(worker.ask(ask()))
        assert KEY not in f"{raised.value!r} {raised.value.detail}"
        assert (await collect(worker.ask(ask()))).text == '{"a": "Grüß Gott"}'
        assert worker.load == (0, 0)


async def test_it_is_tried_again_before_the_first_byte() -> None:
    busy = refused(529, {"type": "overloaded_error", "message": "busy"}, retry_after="0")
    async with (
        upstream(busy, script=good) as server,
        started(server.url, "anthropic") as worker,
    ):
        assert (await collect(worker.ask(ask()))).text == '{"a": "Grüß Gott"}'
        assert len(server.requests) == 2
        server.will(Play([event({"type": "error", "error": {"type": "overloaded_error"}})]))
        with pytest.raises(CapacityError):
            await collect(worker.ask(ask()))


async def test_what_it_cannot_do_is_refused_by_name() -> None:
    """W11: none is dropped silently."""
    cases = [
        (GenerateRequest(prompt="p"), "prompt"),
        (GenerateRequest(prompt=(1,)), "prompt"),
        (ask(n=2), "n"),
        (ask(seed=1), "seed"),
        (ask(temperature=0), "temperature"),
        (ask(top_k=1), "top_k"),
        (ask(presence_penalty=1.0), "presence_penalty"),
        (ask(logprobs=1), "logprobs"),
        (ask(constraint=Constraint(json_schema={})), "response_format"),
        (GenerateRequest(messages=(Message("user", "x", "Ann"),)), "messages"),
    ]
    async with upstream() as server, started(server.url, "anthropic") as worker:
        for request, param in cases:
            with pytest.raises(Unsupported) as refusal:
                await collect(worker.ask(request))
            assert refusal.value.param == param
        with pytest.raises(InvalidRequest):
            await collect(worker.ask(GenerateRequest(messages=(Message("system", "x"),))))
        assert server.requests == []


async def test_the_older_version_takes_what_the_later_refuses() -> None:
    """W11: honoured where it can be."""
    async with upstream(script=good) as server:
        async with started(server.url, "anthropic", api_version="2023-06-01") as worker:
            await collect(worker.ask(ask(temperature=0.5, top_p=0.9, top_k=3)))
        [seen] = server.requests
    assert seen.headers["anthropic-version"] == "2023-06-01"
    assert [seen.body[name] for name in ("temperature", "top_p", "top_k")] == [0.5, 0.9, 3]


async def test_leaving_cuts_the_upstream() -> None:
    """W18: within a second."""
    async with (
        upstream(play(START, text("a"), 30.0)) as server,
        started(server.url, "anthropic") as worker,
    ):
        reading = asyncio.create_task(collect(worker.ask(ask())))
        await eventually(lambda: len(server.requests) == 1)
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.wait({reading})
        await eventually(lambda: server.requests[0].left is not None, 1.0)


async def test_counting_asks_the_upstream() -> None:
    """W21: its own count, which it calls an estimate."""
    async with upstream(script=lambda seen: answered({"input_tokens": 11})) as server:
        async with started(server.url, "anthropic") as worker:
            count = await collect_count(worker.ask(CountRequest(messages=(Message("user", "x"),))))
            words = await collect_count(worker.ask(CountRequest(text="x")))
        assert server.requests[0].path == "/v1/messages/count_tokens"
    assert (count.count, count.estimated, words.count) == (11, True, 11)
