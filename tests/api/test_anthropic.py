"""POST /v1/messages: its translation, its answers and its events, with a scripted backend."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from anthropic.types import Message as TheirMessage
from anthropic.types import ModelInfo as TheirModel
from anthropic.types import RawMessageStreamEvent
from msgspec.structs import replace
from pydantic import TypeAdapter
from tests.api.fakes import (
    MODELS,
    FakeBackend,
    accepted,
    client,
    finish,
    sent,
    thinking_text_and_calls,
    typed_events,
)

from headrace.api import limits
from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ContextOverflow,
    DeadlineExceeded,
    GenerationFailed,
    Loading,
    QueueFull,
    UnknownModel,
)
from headrace.core.events import Delta, ToolCall, ToolCallDelta
from headrace.core.request import CountRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.tools import Thinking, ToolChoice

PATH = "/v1/messages"
COUNT = f"{PATH}/count_tokens"
TOOL: Any = {"name": "f", "description": "F.", "input_schema": {"type": "object"}}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def body(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}]
    return {"model": "m", "max_tokens": 9, "messages": turns, **fields}


def everything(_request: Any) -> Iterator[Any]:
    """Thinking, text and two calls, in pieces."""
    return thinking_text_and_calls(ToolCallDelta(1, "call_2", "f", "{}"))


post, core = partial(sent, f"{PATH}?beta=true"), partial(accepted, f"{PATH}?beta=true")


def read(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream without pings."""
    events = [event for event in typed_events(text) if event["type"] != "ping"]
    for event in events:
        if event["type"] != "error":
            EVENTS.validate_json(json.dumps(event), strict=True)
    return events


async def test_an_answer_has_blocks() -> None:
    """Issue 14.2: Anthropic's own types accept it; what is left out is in a header."""
    answer, _ = await post(body(tools=[TOOL, SEARCH], thinking=THINKING), everything)
    TheirMessage.model_validate_json(answer.text, strict=True)
    given = answer.json()
    identity = answer.headers["x-request-id"]
    assert (given["id"], answer.headers["request-id"]) == (f"msg_{identity}", identity)
    assert answer.headers["x-headrace-warning"].endswith("left out: tool web_search_20250305")
    assert given["content"] == [
        {"type": "thinking", "thinking": "Let me think.", "signature": "headrace"},
        {"type": "text", "text": "Hello\u2028"},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_2", "name": "f", "input": {}},
    ]
    assert (given["stop_reason"], given["stop_sequence"]) == ("tool_use", None)
    assert given["usage"] == {
        "input_tokens": 3, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 0,
        "output_tokens": 3,
    }  # fmt: skip
    assert given["metrics"]["usage"]["prompt_tokens"] == 5
    assert "ttft;dur=" in answer.headers["server-timing"]


async def test_events_come_in_order() -> None:
    """Issue 14.2: one block open at a time; the prompt's tokens come at the beginning."""
    given = body(tools=[TOOL], thinking=THINKING, stream=True)
    answer, _ = await post(given, everything)
    events = read(answer.text)
    start, delta, stop = ("content_block_start", "content_block_delta", "content_block_stop")
    assert [event["type"] for event in events] == [
        "message_start", start, delta, delta, delta, stop, start, delta, delta, stop,
        start, delta, delta, stop, start, delta, stop, "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["usage"]["input_tokens"] == 5
    kinds = [event["delta"]["type"] for event in events if event["type"] == delta]
    assert kinds == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta",
        *["input_json_delta"] * 3,
    ]  # fmt: skip
    indices = [event["index"] for event in events if "index" in event]
    assert indices == sorted(indices)
    last = events[-2]
    assert last["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 3
    assert last["metrics"]["usage"]["prompt_tokens"] == 5
    assert "\u2028" not in answer.text


@pytest.mark.parametrize(
    "thinking", [None, {"type": "disabled"}, {"type": "enabled", "display": "omitted"}]
)
async def test_thinking_is_sent_only_if_it_is_requested(thinking: Any) -> None:
    """Issue 14.2: whole and streamed."""
    more = {} if thinking is None else {"thinking": thinking}
    answer, backend = await post(body(**more), everything)
    assert next(block["type"] for block in answer.json()["content"]) == "text"
    shown = thinking is not None and thinking["type"] == "enabled"
    hidden = thinking is not None and "display" in thinking
    assert backend.requests[0].thinking == Thinking(enabled=shown, hidden=hidden)
    answer, _ = await post(body(**more, stream=True), everything)
    assert "thinking" not in answer.text


async def test_hidden_thinking_is_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 14.2: pings keep a stream alive that sends nothing else."""
    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.001)

    def script(_request: Any) -> Iterator[Any]:
        yield Delta("a", (1,))
        for _ in range(3):
            yield Delta(reasoning="hm", token_ids=(1,))
            yield lambda: asyncio.sleep(0.005)
        yield finish()

    answer, _ = await post(body(stream=True), script)
    assert "event: ping" in answer.text
    assert read(answer.text)[-1]["type"] == "message_stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [("stop", None, ("end_turn", None)), ("length", None, ("max_tokens", None)),
     ("stop", "x", ("stop_sequence", "x")), ("stop", "of the model", ("end_turn", None)),
     ("content_filter", None, ("refusal", None)), ("tool_calls", "x", ("tool_use", None))],
)  # fmt: skip
async def test_ends(stream: bool, reason: Any, stop: str | None, expected: Any) -> None:
    """Issue 14.2: which stop sequence ended it; an answer without text has an empty block."""
    end = replace(finish(reason), stops=(stop,))
    given = body(stream=stream, stop_sequences=["w", "x"])
    answer, backend = await post(given, lambda _: [end])
    assert backend.requests[0].sampling.stop == ("w", "x")
    if stream:
        events = read(answer.text)
        assert [e["type"] for e in events][1:3] == ["content_block_start", "content_block_stop"]
        last = events[-2]["delta"]
    else:
        last = answer.json()
        assert last["content"] == [{"type": "text", "text": ""}]
    assert (last["stop_reason"], last["stop_sequence"]) == expected


async def test_blocks_become_turns() -> None:
    """Issue 14.2: results of tools before the text of their turn; one answer is one turn."""
    cached = {"cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [
        {"type": "text", "text": "2"}, {"type": "text", "text": "2"}]}  # fmt: skip
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a", **cached}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "ok"},
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "f", "input": {}}]},
        {"role": "user", "content": [
            {"type": "text", "text": "later"}, result,
            {"type": "tool_result", "tool_use_id": "c2", "content": "no", "is_error": True}]},
        {"role": "user", "content": [
            {"type": "search_result", "source": "s", "title": "T",
             "content": [{"type": "text", "text": "found"}]},
            {"type": "text", "text": "!"}]},
    ]  # fmt: skip
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=ab;"},
        {"type": "text", "text": "You are "}, {"type": "text", "text": "terse.", **cached},
    ]  # fmt: skip
    request = await core(body(messages=turns, system=system, tools=[TOOL]))
    assert request.messages == (
        Message("system", "You are terse."),
        Message("user", "a"),
        Message(
            "assistant",
            "ok",
            tool_calls=(ToolCall("c1", "f", '{"a":1}'), ToolCall("c2", "f", "{}")),
            reasoning="hm",
        ),
        Message("tool", "22", "f", tool_call_id="c1"),
        Message("tool", "Error: no", "f", tool_call_id="c2"),
        Message("user", "later"),
        Message("user", "T\nfound\n!"),
    )


async def test_system_turns_before_the_first_answer_belong_to_the_system_message() -> None:
    """Issue 14.7: Claude Code describes the machine in one, after the prompt."""
    turns = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": "On Linux."}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "system", "content": "d"},
    ]
    request = await core(body(messages=turns, system="Be terse."))
    assert request.messages == (
        Message("system", "Be terse.\n\nOn Linux."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("system", "d"),
    )


@pytest.mark.parametrize(
    ("content", "continued"),
    [("Sure:", True), ([{"type": "text", "text": "Su"}, {"type": "text", "text": "re:"}], True),
     ("", False), ([{"type": "tool_use", "id": "c", "name": "f", "input": {}}], False)],
)  # fmt: skip
async def test_a_begun_answer_is_continued(content: Any, continued: bool) -> None:
    """Issue 14.2: prefill; the count is that of the same prompt."""
    given = body(tools=[TOOL])
    given["messages"].append({"role": "assistant", "content": content})
    request = await core(given)
    assert request.continue_final == continued
    assert request.messages is not None
    assert request.messages[-1].content == ("Sure:" if continued else "")
    _, backend = await sent(COUNT, given)
    assert backend.requests[0].continue_final == continued


async def test_fields_of_the_request() -> None:
    """Issue 14.2: each reaches the core; what changes no text is ignored without a warning."""
    schema = {"type": "object"}
    answer, backend = await post(
        body(
            temperature=1, top_p=0.9, top_k=5, max_tokens=32000, thinking={"type": "adaptive"},
            output_config={"effort": "high", "format": {"type": "json_schema", "schema": schema},
                           "task_budget": {"type": "tokens", "total": 9}},
            metadata={"user_id": "u"}, service_tier="auto", container="c", betas=["x"],
            context_management={"edits": []}, inference_geo="eu", mcp_servers=[],
            cache_control={"type": "ephemeral"}, system="s",
        )
    )  # fmt: skip
    request = backend.requests[0]
    assert request.sampling == Sampling(temperature=1, top_p=0.9, top_k=5, max_tokens=32000)
    assert request.fit_max_tokens, "Claude Code wants 32,000 tokens of any model"
    assert request.thinking == Thinking(enabled=True, effort="high")
    assert request.constraint == Constraint(json_schema=schema)
    assert "x-headrace-warning" not in answer.headers
    answer, _ = await post(body(max_token=1))
    assert "did you mean max_tokens?" in answer.headers["x-headrace-warning"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [({"type": "auto"}, ToolChoice()), ({"type": "none"}, ToolChoice("none")),
     ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required", parallel=False)),
     ({"type": "tool", "name": "f"}, ToolChoice("required", ("f",)))],
)  # fmt: skip
async def test_choices(choice: Any, expected: ToolChoice) -> None:
    assert (await core(body(tools=[TOOL], tool_choice=choice))).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"tools": [SEARCH]}, "tools: The tool web_search_20250305"),
        ({"tools": [SEARCH, TOOL], "tool_choice": {"type": "any"}}, "web_search_20250305"),
        ({"tools": [{"type": "custmo", "name": "f"}]}, "tools[0].type: 'custmo' is unknown"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name is missing"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "There is no tool 'g'"),
        ({"messages": []}, "messages: expected an array of at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages[0].content[0].source is base64 with its data"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
         "messages[0].content[0]: 'document' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c"}]}]},
         "messages[0].content[0].name is missing"),
        ({"max_tokens": 0}, "max_tokens must be between"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop": "x"}, "Use stop_sequences"), ({"n": 2}, "n is not supported"),
        ({"response_format": {"type": "text"}}, "Use output_config.format"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
    ],
)  # fmt: skip
async def test_wrong_requests_are_refused_by_name(fields: Any, part: str) -> None:
    """Issue 14.2: in Anthropic's form, with the place in the client's own request."""
    answer, backend = await post(body() | fields)
    assert (answer.status_code, backend.requests) == (400, [])
    error = answer.json()
    assert set(error) == {"type", "error", "request_id"}
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert part in error["error"]["message"]
    assert error["request_id"] == answer.headers["request-id"]


LONG = "The prompt has 70000 tokens and the context length is 512; at least one must be left."


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [(UnknownModel("No."), 404, "not_found_error", "model: No."),
     (QueueFull("Full.", retry_after_s=1), 429, "rate_limit_error", "Full."),
     (Loading("Not yet."), 503, "overloaded_error", "Not yet."),
     (DeadlineExceeded("Late."), 504, "timeout_error", "Late."),
     (GenerationFailed("Broken."), 500, "api_error", "Broken."),
     (ContextOverflow(LONG, param="messages"), 400, "invalid_request_error",
      "prompt is too long: 70000 tokens > 512 maximum"),
     (ContextOverflow("Too long.", param="messages"), 400, "invalid_request_error",
      "prompt is too long: Too long.")],
)  # fmt: skip
async def test_errors(error: Exception, status: int, kind: str, message: str) -> None:
    """Issue 14.2: Anthropic's kinds; in a stream that has begun, an event."""
    answer, _ = await post(body(), lambda _: [error])
    assert (answer.status_code, answer.json()["error"]) == (
        status, {"type": kind, "message": message},
    )  # fmt: skip
    assert ("retry-after" in answer.headers) == isinstance(error, QueueFull)
    answer, _ = await post(body(stream=True), lambda _: [Delta("a", (1,)), error])
    last = read(answer.text)[-1]
    assert (last["type"], last["error"]["message"]) == ("error", message)
    assert "message_stop" not in answer.text


async def test_errors_before_the_route() -> None:
    """Issue 14.2: keys, hosts, methods and paths below it answer in the same form."""
    key = "sha256:" + "0" * 64
    async with client(api_keys=(key,)) as http:
        answer = await http.post(PATH, json=body())
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    async with client() as http:
        for method, path, kind in (
            ("GET", PATH, "invalid_request_error"), ("POST", f"{PATH}/batches", "not_found_error"),
        ):  # fmt: skip
            answer = await http.request(method, path)
            assert answer.json()["error"]["type"] == kind
            assert answer.headers["request-id"] == answer.json()["request_id"]
        other = await http.post("/v1/messages2", json={})
        assert other.json()["error"]["code"] == "unknown_url"
        long = await http.post(PATH, content=b"x" * (9 << 20))
    assert (long.status_code, long.json()["error"]["type"]) == (413, "request_too_large")


async def test_a_key_is_taken_from_either_header() -> None:
    import hashlib

    key = f"sha256:{hashlib.sha256(b'secret').hexdigest()}"
    async with client(api_keys=(key,)) as http:
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            given = headers | {"anthropic-version": "1", "anthropic-beta": "x,y"}
            answer = await http.post(PATH, json=body(), headers=given)
            assert answer.status_code == 200


async def test_tokens_are_counted() -> None:
    """Issue 14.2: the same conversation as for an answer."""
    given = body(system="s", tools=[TOOL, SEARCH], thinking=THINKING)
    answer, backend = await sent(COUNT, given)
    assert answer.json() == {"input_tokens": 3}
    request = backend.requests[0]
    assert isinstance(request, CountRequest)
    assert request.messages == (await core(given)).messages
    assert [tool.name for tool in request.tools] == ["f"]
    assert request.thinking == Thinking(enabled=True, budget=1024)


async def test_models_are_listed_for_both_apis() -> None:
    """Issue 14.2: aliases as models of their own, where that is set."""
    async with client() as http:
        plain = (await http.get("/v1/models?limit=1000")).json()
        theirs = (await http.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).text
        one = await http.get("/v1/models/m", headers={"anthropic-version": "2023-06-01"})
    assert [card["id"] for card in plain["data"]] == ["m", "org/big"]
    assert (plain["has_more"], plain["first_id"], plain["last_id"]) == (False, "m", "org/big")
    TheirModel.model_validate_json(one.text, strict=True)
    for card, their in zip(plain["data"], json.loads(theirs)["data"], strict=True):
        # OpenAI's clients get a list of names, Anthropic's an object with all of its keys.
        TheirModel.model_validate_json(json.dumps(their), strict=True)
        assert card == their | {"capabilities": card["capabilities"]}
        assert isinstance(card["capabilities"], list)
        assert (card["type"], card["object"], card["display_name"]) == ("model",) * 2 + (
            card["id"],
        )
    models = (replace(MODELS[0], aliases=("claude-x", "gpt-x")), MODELS[1])
    backend = FakeBackend(models=models)
    async with client(backend, list_aliases=True) as http:
        listed = (await http.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["m", "claude-x", "gpt-x", "org/big"]


async def test_a_count_checks_the_sampling_too() -> None:
    """Issue 14.2: the body is that of an answer, and is refused alike."""
    given = {"model": "m", "messages": [{"role": "user", "content": "x"}], "top_p": 9}
    answer, backend = await sent(COUNT, given)
    assert answer.status_code == 400
    assert "top_p" in answer.json()["error"]["message"]
    assert backend.requests == []
