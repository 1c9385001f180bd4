"""The streaming answer: its bytes, its failures, its waiting."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from tests.api.fakes import (
    CHAT,
    METRICS,
    TEXT,
    FakeBackend,
    chat,
    client,
    events,
    finish,
    text,
)

from headrace.api import limits
from headrace.api.chat import ChatChunk
from headrace.api.completions import CompletionChunk
from headrace.core.errors import (
    GenerationFailed,
    Loading,
    QueueFull,
    QueueTimeout,
    WorkerDied,
)
from headrace.core.events import Delta, Progress, TokenLogprob, TopLogprob


async def stream(script: Any, body: dict[str, Any], path: str = CHAT, **settings: Any) -> Any:
    async with client(FakeBackend(script), **settings) as http:
        return await http.post(path, json={**body, "stream": True})


def one_word(_request: Any) -> Iterable[Any]:
    yield Progress("queued")
    yield Delta("Hi", (1,))
    yield Delta("", (2,))
    yield finish("length")


async def test_chat_chunks() -> None:
    """A: role first, then content, then the reason with the figures, then [DONE]."""
    answer = await stream(one_word, chat())
    *chunks, done = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hi"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, "length"], "W14: the engine's own reason"
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{answer.headers['x-request-id']}"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "ttft;dur=" in answer.headers["server-timing"]


async def test_metrics_are_on_the_last_chunk() -> None:
    """W16: the figures come once, with the usage among them."""
    answer = await stream(one_word, chat())
    *chunks, _ = events(answer.text)
    assert ["metrics" in chunk for chunk in chunks] == [False, False, True]
    assert msgspec.convert(chunks[-1]["metrics"], type(METRICS)) == METRICS
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_chunk() -> None:
    """W15: include_usage adds a last chunk without choices; the others say null."""
    answer = await stream(one_word, chat(stream_options={"include_usage": True}))
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert "metrics" in last


async def test_completion_chunks() -> None:
    """A: text_completion objects, no role."""
    answer = await stream(one_word, text(), TEXT)
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hi", ""]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[0]["id"] == f"cmpl-{answer.headers['x-request-id']}"


NASTY = ['"', "\\", "\n\n", "data: [DONE]\n\n", "\u2028", "\x00", "é🙂", "</script>"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_any_text_survives(path: str) -> None:
    """W13: what the deltas say is what the client reads, byte for byte."""

    def script(_request: Any) -> Iterable[Any]:
        yield from (Delta(part, (1,)) for part in NASTY)
        yield finish()

    answer = await stream(script, chat() if path == CHAT else text(), path)
    kind = ChatChunk if path == CHAT else CompletionChunk
    payloads = [json.dumps(one) for one in events(answer.text)[:-1]]
    chunks = [msgspec.json.decode(one, type=kind) for one in payloads]
    choices = [chunk.choices[0] for chunk in chunks]
    texts = [getattr(one, "delta", one) for one in choices]
    said = [getattr(one, "content", None) or getattr(one, "text", "") for one in texts]
    assert "".join(said) == "".join(NASTY)


async def test_choices_and_reasoning() -> None:
    """W11, W24: n choices side by side, thinking apart from the answer."""

    def script(_request: Any) -> Iterable[Any]:
        yield Delta("a", (1,), 1, reasoning="hm")
        yield Delta("b", (1,), 0)
        yield finish("stop", "length")

    answer = await stream(script, chat(n=2))
    *chunks, _ = events(answer.text)
    parts = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks]
    assert [index for index, delta in parts if "role" in delta] == [0, 1]
    assert parts[2:] == [
        (1, {"reasoning_content": "hm"}),
        (1, {"content": "a"}),
        (0, {"content": "b"}),
        (0, {}),
        (1, {}),
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:]] == ["stop", "length"]
    assert ["metrics" in chunk for chunk in chunks[-2:]] == [False, True]


def with_logprobs(_request: Any) -> Iterable[Any]:
    half = "é".encode()
    yield Delta("a", (1,), 0, "", (TokenLogprob(1, b"a", -0.5, (TopLogprob(2, b"b", -1.0),)),))
    yield Delta("", (3,), 0, "", (TokenLogprob(3, half[:1], -0.1),))
    yield Delta("é", (4,), 0, "", (TokenLogprob(4, half[1:], -0.2),))
    yield finish()


async def test_chat_logprobs_in_a_stream() -> None:
    """W11: logprobs ride on the deltas, also on those without text."""
    answer = await stream(with_logprobs, chat(logprobs=True, top_logprobs=1))
    *chunks, _ = events(answer.text)
    said = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert said[1] == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [{"token": "b", "logprob": -1.0, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }
    assert [one["content"][0]["bytes"] for one in said[2:4]] == [[0xC3], [0xA9]]


async def test_completion_logprobs_in_a_stream() -> None:
    """W11: offsets count the characters of the whole text, over all chunks."""
    answer = await stream(with_logprobs, text(logprobs=1), TEXT)
    *chunks, _ = events(answer.text)
    said = [chunk["choices"][0]["logprobs"] for chunk in chunks[:3]]
    assert said[0] == {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"b": -1.0}],
        "text_offset": [0],
    }
    assert [one["tokens"] for one in said[1:]] == [["bytes:\\xc3"], ["bytes:\\xa9"]]
    assert [one["text_offset"] for one in said[1:]] == [[1], [1]]


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (
            QueueFull("Full.", retry_after_s=1.2),
            429,
            {"retry-after": "2", "retry-after-ms": "1200"},
        ),
        (QueueTimeout("Waited."), 408, {}),
        (Loading("Not yet.", retry_after_s=0.1), 503, {"retry-after": "1"}),
    ],
)
async def test_failures_before_the_first_delta_have_their_status(
    error: Exception, status: int, headers: dict[str, str]
) -> None:
    """W17: nothing is promised before something is there."""
    answer = await stream(lambda _: [Progress("queued"), error], chat())
    assert answer.status_code == status
    assert headers.items() <= dict(answer.headers).items()
    assert answer.json()["error"]["message"] == str(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [(WorkerDied("Gone.", metrics=METRICS), "worker_died"), (KeyError("secret"), "internal_error")],
)
async def test_failures_in_the_stream_end_it_without_done(error: Exception, code: str) -> None:
    """W17: an error is an event of its own, never text and never a normal end."""
    answer = await stream(lambda _: [Delta("Hi", (1,)), error], chat())
    assert answer.status_code == 200
    last = events(answer.text)[-1]
    assert last["error"]["code"] == code
    assert ("metrics" in last) == (code == "worker_died"), "W16: figures of what failed"
    assert "[DONE]" not in answer.text
    assert "secret" not in answer.text


@pytest.mark.parametrize("steps", [[], [Delta("a", (1,))], [Progress("prefill")]])
@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_a_stream_without_finish_is_a_failure(steps: list[Any], fields: Any) -> None:
    """W14: an end is never invented."""
    async with client(FakeBackend(lambda _: steps)) as http:
        answer = await http.post(CHAT, json=chat(**fields))
    assert "[DONE]" not in answer.text
    assert GenerationFailed.__name__ not in answer.text
    assert "generation_failed" in answer.text


async def test_waiting_comments_keep_the_line_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A: headers go out after a while, and comments until the first delta."""

    def script(_request: Any) -> Iterable[Any]:
        yield lambda: asyncio.sleep(0.2)
        yield from one_word(_request)

    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.03)
    answer = await stream(script, chat(), headers_after_s=0.02)
    assert answer.text.startswith(": waiting\n\n: waiting\n\n")
    assert events(answer.text)[-1] == "[DONE]"
    assert "waiting;dur=" in answer.headers["server-timing"]


async def test_comments_tell_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """M4: the stage, and how far it is; the first comes right after the headers."""
    steps = [Progress("queued", 0, 3), Progress("loading", 2, 5), Progress("prefill", 9, 8)]

    def script(_request: Any) -> Iterable[Any]:
        for step in steps:
            yield step
            yield lambda: asyncio.sleep(0.1)
        yield from one_word(_request)

    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.06)
    answer = await stream(script, chat(), headers_after_s=0.01)
    told = list(dict.fromkeys(re.findall("^: .*", answer.text, re.MULTILINE)))
    assert told == [": queued", ": loading 40%", ": prefill 100%"]
    assert events(answer.text)[-1] == "[DONE]"


async def test_the_first_comment_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A: nobody sits before a line that says nothing."""

    def script(_request: Any) -> Iterable[Any]:
        yield lambda: asyncio.sleep(0.1)
        yield from one_word(_request)

    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 60)
    answer = await stream(script, chat(), headers_after_s=0.01)
    assert answer.text.startswith(": waiting\n\ndata: ")


async def test_a_pause_within_an_answer_is_told() -> None:
    """M9: while a worker is replaced in mid-stream, the line does not look dead."""
    script = [Delta("Hel", (1,)), Progress("loading", 1, 2), Delta("lo", (2,)), finish()]
    answer = await stream(lambda _: script, chat())
    assert answer.text.count("\n\n: loading 50%\n\ndata: ") == 1
    chunks = [one for one in events(answer.text) if one != "[DONE]"]
    assert "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks) == "Hello"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_lines_end_where_everybody_thinks_they_do(path: str) -> None:
    """W13: who splits by Python's rules, or by JavaScript's old ones, loses nothing."""
    ends = "a\x85b\u2028c\u2029dé"
    token = TokenLogprob(1, ends.encode(), -0.5)
    script = [Delta(ends, (1,)), Delta(ends, (2,), 0, ends, (token,)), finish()]
    body = chat(model=ends) if path == CHAT else text(model=ends)
    answer = await stream(lambda _: script, body, path)
    lines = [one for one in answer.text.splitlines() if one]
    assert all(one.startswith("data: ") for one in lines)
    chunks = [json.loads(one[6:]) for one in lines[:-1]]
    assert {one["model"] for one in chunks} == {ends}
    said = [one["choices"][0].get("delta", one["choices"][0]) for one in chunks]
    texts = [one.get("content") or one.get("text") or "" for one in said]
    assert "".join(texts).count(ends) == (2 if path == CHAT else 3)


async def test_failure_after_waiting_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """W17: once the headers are out, the status can no longer tell."""

    def script(_request: Any) -> Iterable[Any]:
        yield lambda: asyncio.sleep(0.05)
        yield Loading("Too slow.", retry_after_s=3)

    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.02)
    answer = await stream(script, chat(), headers_after_s=0.01)
    assert answer.status_code == 200
    assert events(answer.text)[-1]["error"]["code"] == "model_loading"
    assert "[DONE]" not in answer.text


async def test_everything_is_given_back_before_the_last_byte() -> None:
    """W18: who has read [DONE] finds the slot free."""
    backend = FakeBackend(one_word)
    async with client(backend) as http:
        await http.post(CHAT, json=chat(stream=True))
        assert (backend.running, len(backend.ended)) == (0, 1)


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("reasoning_content", ["reasoning_content"]),
        ("reasoning", ["reasoning"]),
        ("both", ["reasoning_content", "reasoning"]),
    ],
)
async def test_the_field_of_the_thinking_is_a_setting(field: str, names: list[str]) -> None:
    """Issue 13, thinking: streamed and whole."""

    def script(_request: Any) -> Iterable[Any]:
        yield Delta("", (1,), reasoning="hm")
        yield Delta("Hi", (2,))
        yield finish()

    answer = await stream(script, chat(), reasoning_field=field)
    delta = events(answer.text)[1]["choices"][0]["delta"]
    assert delta == dict.fromkeys(names, "hm")
    async with client(FakeBackend(script), reasoning_field=field) as http:
        message = (await http.post(CHAT, json=chat())).json()["choices"][0]["message"]
    assert [name for name in message if name.startswith("reasoning")] == names
    assert {message[name] for name in names} == {"hm"}


@pytest.mark.parametrize(
    ("fields", "is_sent"),
    [
        ({"include_reasoning": False}, False),
        ({"reasoning": {"exclude": True}}, False),
        ({"reasoning": {"effort": "high", "exclude": True}}, False),
        ({"include_reasoning": True, "reasoning": {"exclude": True}}, False),
        ({"include_reasoning": True}, True),
        ({"include_reasoning": None, "reasoning": {"exclude": False}}, True),
    ],
)
async def test_thinking_can_be_left_out(fields: dict[str, Any], *, is_sent: bool) -> None:
    """Issue 13, thinking: it is counted and not sent, nor its log probabilities."""

    def script(_request: Any) -> Iterable[Any]:
        yield Delta("", (1,), reasoning="hm", logprobs=(TokenLogprob(1, b"hm", -0.5),))
        yield Delta("Hi", (2,), reasoning="m")
        yield finish()

    body = chat(logprobs=True, **fields)
    answer = await stream(script, body)
    async with client(FakeBackend(script)) as http:
        whole = (await http.post(CHAT, json=body)).text
    for sent in (answer.text, whole):
        assert "Hi" in sent
        assert ("reasoning_content" in sent, "hm" in sent) == (is_sent, is_sent)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_other_routes_refuse_the_fields_of_hidden_thinking(path: str) -> None:
    """Issue 13, thinking: a field that a dialect has not is refused by name."""
    more = {"include_reasoning": False, "max_tokens": 8} if "messages" in path else {"input": "Hi"}
    body = {**chat(), **more} if "messages" in path else {**more, "include_reasoning": False}
    async with client(FakeBackend(one_word)) as http:
        answer = await http.post(path, json=body)
    assert (answer.status_code, "include_reasoning" in answer.text) == (400, True)
