from __future__ import annotations

import asyncio
import email.utils
import time
from typing import Any

import pytest
from tests.engines.remote.rig import KEY, QUICK, ask, started, worker
from tests.fakes.upstream import DONE, Play, chunk, event, refused, said, upstream, usage

from headrace.core.errors import (
    CapacityError,
    ConfigError,
    ContextOverflow,
    HeadraceError,
    InvalidRequest,
    Unsupported,
    UpstreamError,
)
from headrace.core.events import Delta
from headrace.core.stream import collect

A = event(chunk(content="a"))
END = event(chunk(reason="stop"))
HTML = Play([b"<html>Welcome</html>"], 200, "text/html", {}, "length")
JSON = "application/json"

BROKEN: dict[str, tuple[Play, str]] = {
    "slow first token": (Play([5.0, A]), "no token"),
    "headers and no token": (Play([event(chunk(role="assistant")), 5.0]), "no token"),
    "comments for ever": (Play([b": wait\n\n", 0.2] * 20), "no token"),
    "stall": (Play([A, 5.0]), "silent"),
    "no reason": (Play([A, DONE]), "truncated"),
    "cut off": (Play([A, 0.02, "drop"]), "broke off"),
    "cut in an event": (Play([A, A[:9]], framing="close"), "malformed|truncated"),
    "nothing at all": (Play([b": hi\n\n"]), "truncated"),
    "malformed": (Play([A, b"data: {oops\n\n", DONE]), "malformed"),
    "no UTF-8": (
        Play([A, b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n']),
        "malformed",
    ),
    "wrong shape": (Play([b'data: {"choices": [{"delta": 5}]}\n\n']), "malformed"),
    "a choice too many": (Play([event(chunk(3, content="x"))]), "not asked for"),
    "a strange reason": (Play([A, event(chunk(reason="network_error")), DONE]), "network_error"),
    "an error in the stream": (Play([A, event({"error": {"message": "no"}})]), "error"),
    "an error and nothing else": (Play([event({"error": "boom"})]), "error"),
    "an endless line": (Play([A, b"data: " + b"x" * (1 << 21)]), "too long"),
    "a web page": (HTML, "text/html"),
    "JSON and no stream": (Play([b'{"choices": []}'], 200, JSON, {}, "length"), JSON),
    "an error with 200": (Play([b'{"error": "x"}'], 200, JSON, {}, "length"), "error"),
    "no type": (Play([A], kind=None), "nothing"),
    "a redirect": (Play([], 307, None, {"location": "http://x.invalid/"}, "length"), "redirects"),
    "a wrong key": (refused(401, {"message": f"Incorrect key {KEY}"}), "refuses the key"),
    "no rights": (refused(403, {"message": KEY}), "refuses the key"),
    "an unknown model": (refused(404, {"message": "no gpt-x"}), "no such model"),
    "no money": (refused(402, {"message": "pay"}), "402"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_upstream_is_an_error_and_no_answer(name: str) -> None:
    """W14, W17: typed, at once, without the key, and the slot is free for the next."""
    play, match = BROKEN[name]
    async with upstream(play) as server, started(server.url, max_retries=0, **QUICK) as far:
        began = time.monotonic()
        with pytest.raises(UpstreamError, match=match) as broken:
            await collect(far.ask(ask()))
        assert time.monotonic() - began < 2
        assert broken.value.metrics is not None
        assert broken.value.metrics.outcome == "error"
        assert KEY not in f"{broken.value!r} {broken.value.detail} {broken.value.metrics}"
        assert len(server.requests) == 1
        assert (await collect(far.ask(ask()))).text == "Hello there"
        assert far.load == (0, 0)


USAGE = event(usage(7, 1))
LONE = event(r'{"choices": [{"index": 0, "delta": {"content": "\udc00"}}]}')
FLOATS = {"prompt_tokens": 7.0, "completion_tokens": 2.0, "total_tokens": 9.0}
DETAILS = {"prompt_tokens_details": {"cached_tokens": 3.0}}

LENIENT: dict[str, tuple[Play, str, int | None]] = {
    "no mark of the end": (Play([A, END, USAGE]), "a", 1),
    "nor usage": (Play([A, END]), "a", None),
    "cut off after the usage": (Play([A, END, USAGE, "drop"]), "a", 1),
    "cut off after the reason": (Play([A, END, "drop"]), "a", None),
    "kept open": (Play([A, END, USAGE, 5.0]), "a", 1),
    "closed, in an event": (Play([A, END, USAGE, b"data: "], framing="close"), "a", 1),
    "spaces around the mark": (Play([A, END, USAGE, b"data:  [DONE] \n\n"]), "a", 1),
    "no empty line at the end": (Play([A, END, USAGE, b"data: [DONE]"]), "a", 1),
    "floats": (Play([A, END, event({"choices": [], "usage": FLOATS}), DONE]), "a", 2),
    "floats inside": (Play([A, END, event({"usage": FLOATS | DETAILS}), DONE]), "a", 2),
    "counts as text": (Play([A, END, event({"usage": {"completion_tokens": "2"}}), DONE]), "a", 2),
    "usage that is none": (Play([A, END, event({"usage": [5]}), DONE]), "a", None),
    "strange counts": (
        Play([A, END, event({"usage": {"completion_tokens": {}}}), DONE]),
        "a",
        None,
    ),
    "half a character": (Play([A, LONE, END, USAGE, DONE]), "a\ufffd", 1),
    "an index as a float": (Play([event(chunk(0.0, content="a")), END, USAGE, DONE]), "a", 1),  # pyright: ignore[reportArgumentType]
    "no index": (Play([event({"choices": [{"text": "a", "index": None}]}), END, DONE]), "a", None),
    "no choices": (Play([event({"choices": None, "usage": None}), A, END, DONE]), "a", None),
    "fields of other types": (
        Play([event(chunk(content="a", reasoning={"x": 1}, refusal=[], tool_calls=3)), END, DONE]),
        "a",
        None,
    ),
    "parts that are no objects": (
        Play([event(chunk(content=["x", {"text": "a"}])), END, DONE]),
        "a",
        None,
    ),
}


@pytest.mark.parametrize("name", LENIENT)
async def test_what_does_not_bear_on_the_answer_does_not_cost_it(name: str) -> None:
    """Issue 12.19: the answer is whole, and the slot is free at once."""
    play, text, tokens = LENIENT[name]
    async with upstream(play) as server, started(server.url, max_retries=0, **QUICK) as far:
        began = time.monotonic()
        result = await collect(far.ask(ask()))
        assert time.monotonic() - began < 2
        assert (result.text, result.finish_reason) == (text, "stop")
        assert tokens is None or result.usage.completion_tokens == tokens
        assert far.load == (0, 0)


async def test_log_probabilities_without_a_number() -> None:
    """Issue 12.19: Python servers write -Infinity, which is no JSON."""
    first = {"token": "a", "logprob": float("-inf"), "top_logprobs": []}
    body = chunk(content="a")
    body["choices"][0]["logprobs"] = {"content": [first]}
    play = Play([event(body), END, DONE])
    async with upstream(play) as server, started(server.url) as far:
        result = await collect(far.ask(ask(logprobs=0)))
    assert [token.logprob for token in result.choices[0].logprobs] == [-9999.0]


async def test_what_came_before_the_fault_was_shown() -> None:
    """W17: the text already produced is kept."""
    play = Play([A, A, "drop"])
    async with upstream(play) as server, started(server.url) as far:
        texts: list[str] = []
        with pytest.raises(UpstreamError):
            async for one in far.ask(ask()):
                if isinstance(one, Delta):
                    texts.append(one.text)
        # Nothing is tried again once an answer has begun.
        assert (texts, len(server.requests)) == (["a", "a"], 1)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_it_is_tried_again_before_the_first_byte(status: int) -> None:
    plays = [refused(status, {"message": "busy"}, retry_after="0"), said("ok")]
    async with upstream(*plays) as server, started(server.url) as far:
        assert (await collect(far.ask(ask()))).text == "ok"
        assert len(server.requests) == 2


async def test_a_connection_that_is_dropped_before_an_answer_is_tried_again() -> None:
    async with upstream(Play(["drop"]), said("ok")) as server, started(server.url) as far:
        assert (await collect(far.ask(ask()))).text == "ok"
        assert len(server.requests) == 2


@pytest.mark.parametrize("form", ["ms", "seconds", "date"])
async def test_retry_after_is_honoured(form: str) -> None:
    """M7: not before the time that the upstream asks for."""
    later = email.utils.formatdate(time.time() + 2, usegmt=True)
    forms = {"ms": ("retry_after_ms", "300"), "seconds": ("retry_after", "0.3")}
    name, value = forms.get(form, ("retry_after", later))
    plays = [refused(429, {"message": "later"}, **{name: value}), said("ok")]
    async with upstream(*plays) as server, started(server.url) as far:
        began = time.monotonic()
        assert (await collect(far.ask(ask()))).text == "ok"
        assert 0.28 < time.monotonic() - began < 2.5


async def test_tries_are_bounded() -> None:
    refusals = [refused(500, {"message": "oops"}, retry_after="0") for _ in range(9)]
    async with upstream(*refusals) as server, started(server.url, max_retries=3) as far:
        with pytest.raises(UpstreamError, match="status 500") as broken:
            await collect(far.ask(ask()))
        assert len(server.requests) == 4
        assert broken.value.detail == "status 500: oops"


async def test_a_long_wait_is_the_clients_to_take() -> None:
    """M7: the client gets the upstream's Retry-After, and no slot is held for it."""
    async with (
        upstream(refused(429, {"message": "later"}, retry_after="90")) as server,
        started(server.url) as far,
    ):
        with pytest.raises(CapacityError) as full:
            await collect(far.ask(ask()))
        assert (full.value.retry_after_s, len(server.requests)) == (90.0, 1)


@pytest.mark.parametrize(
    ("error", "kind", "param"),
    [
        ({"message": "bad", "param": "top_p"}, InvalidRequest, "top_p"),
        ({"message": "x", "code": "context_length_exceeded"}, ContextOverflow, "messages"),
        ({"message": "x", "code": "unsupported_parameter", "param": "seed"}, Unsupported, "seed"),
        ("plain words", InvalidRequest, None),
    ],
)
async def test_the_clients_own_mistake_is_told(
    error: Any, kind: type[HeadraceError], param: str | None
) -> None:
    """W17: what can be mended by the client says so, in the upstream's words."""
    async with upstream(refused(400, error)) as server, started(server.url) as far:
        with pytest.raises(kind) as wrong:
            await collect(far.ask(ask()))
        assert type(wrong.value) is kind
        assert wrong.value.param == param
        assert "OpenAI: " in wrong.value.message
        assert len(server.requests) == 1


async def test_an_overloaded_stream_is_a_matter_of_capacity() -> None:
    play = Play([A, event({"error": {"message": "x", "code": 429}})])
    async with upstream(play) as server, started(server.url) as far:
        with pytest.raises(CapacityError):
            await collect(far.ask(ask()))


async def test_nobody_there() -> None:
    async with started("http://127.0.0.1:1", max_retries=1) as far:
        with pytest.raises(UpstreamError, match="cannot be reached"):
            await collect(far.ask(ask()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"base_url": "ftp://x/v1"}, "base_url"),
        ({"base_url": "file:///etc/passwd"}, "base_url"),
        ({"base_url": "http://user:pass@host/v1"}, "base_url"),
        ({"base_url": "http://host/v1?key=1"}, "base_url"),
        ({"base_url": "http://[::1/v1"}, "base_url"),
        ({"base_url": "http://host:99999/"}, "base_url"),
        ({"api_key": "two words"}, "characters"),
        ({"api_key": "line\nbreak"}, "characters"),
        ({"api_key": None, "api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        ({"api_key": None, "base_url": None}, "OPENAI_API_KEY"),
        ({"max_retries": 99}, "max_retries"),
        ({"temperature": 1}, "temperature"),
    ],
)
async def test_wrong_options_are_refused(
    options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W3: before anybody is connected to, and without the value of a key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=match) as wrong:
        await worker("http://host/v1", **options).start()
    assert "two words" not in str(wrong.value)


async def test_a_key_goes_to_its_own_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual variable's key is not sent to another server because `base_url` names one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "for-azure")
    monkeypatch.setenv("MINE", "sk-mine")
    async with upstream() as server:
        cases = [("openai", None), ("openai", "MINE"), ("azure", None)]
        for provider, variable in cases:
            more = {"api_key": None, "api_key_env": variable, "api_version": "2026-01"}
            async with started(server.url, provider, **more) as far:
                await collect(far.ask(ask()))
        first, second, third = server.requests
    assert "authorization" not in first.headers, first.headers["authorization"]
    assert second.headers["authorization"] == "Bearer sk-mine"
    assert (third.headers["api-key"], "authorization" in third.headers) == ("for-azure", False)
    assert third.path == "/chat/completions?api-version=2026-01"


async def test_one_that_fails_does_not_disturb_the_others() -> None:
    """M2: 32 streams of which every fourth breaks."""
    plays = [Play([A, "drop"]) if n % 4 == 0 else said("fine") for n in range(32)]
    async with upstream(*plays) as server, started(server.url) as far:
        asked = [collect(far.ask(ask())) for _ in plays]
        got = await asyncio.gather(*asked, return_exceptions=True)
        texts = [one.text for one in got if not isinstance(one, BaseException)]
        assert texts == ["fine"] * 24
        assert sum(isinstance(one, UpstreamError) for one in got) == 8
        assert far.load == (0, 0)
