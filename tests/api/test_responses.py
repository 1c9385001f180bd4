"""POST /v1/responses: its translation, its answers and its events, with a scripted backend."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.api.fakes import (
    accepted,
    client,
    finish,
    sent,
    thinking_text_and_calls,
    typed_events,
)

from headrace.api import limits
from headrace.api.custom_tools import FreeText
from headrace.api.responses_answer import seal, unseal
from headrace.core.constraint import Constraint
from headrace.core.errors import ContextOverflow, GenerationFailed, QueueFull
from headrace.core.events import Delta, Progress, TokenLogprob, ToolCall, ToolCallDelta
from headrace.core.request import CountRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.tools import Thinking, ToolChoice

PATH = "/v1/responses"
FUNCTION: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
CUSTOM: Any = {"type": "custom", "name": "patch", "description": "Edits.", "format": GRAMMAR}
SEARCH: Any = {"type": "web_search", "search_context_size": "low"}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def body(given: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **fields}


def everything(_request: Any) -> Iterator[Any]:
    """Thinking, text, a call of a function and one of a custom tool, in pieces."""
    return thinking_text_and_calls(
        ToolCallDelta(1, "call_2", "patch", '{"input": "x\\n'),
        ToolCallDelta(1, arguments='y\\u00e9"}'),
    )


post, core = partial(sent, PATH), partial(accepted, PATH)


def read(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, each with its number."""
    events = [*typed_events(text)]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    for event in events:
        error = (event.get("response") or {}).get("error")
        # Codex acts on this code, which OpenAI's types do not list.
        if not error or error["code"] != "context_length_exceeded":
            EVENTS.validate_json(json.dumps(event), strict=True)
    return events


ALL: Any = body(tools=[FUNCTION, CUSTOM, SEARCH], include=["reasoning.encrypted_content"])


async def test_an_answer_has_all_keys_and_items() -> None:
    """Issue 14.1: OpenAI's own types accept it; what is left out is in a header."""
    answer, _ = await post(ALL, everything)
    Response.model_validate_json(answer.text, strict=True)
    given = answer.json()
    assert given["id"] == f"resp_{answer.headers['x-request-id']}"
    assert answer.headers["x-headrace-warning"].endswith("left out: tool web_search")
    assert (given["status"], given["store"], given["previous_response_id"]) == (
        "completed", False, None,
    )  # fmt: skip
    reasoning, message, call, custom = given["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me think."}]
    assert unseal(reasoning["encrypted_content"]) == "Let me think."
    assert message["content"][0]["text"] == "Hello\u2028"
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "f", '{"a": 1}')
    assert (custom["type"], custom["input"]) == ("custom_tool_call", "x\nyé")
    assert given["tools"] == [FUNCTION, CUSTOM]
    assert given["usage"]["input_tokens_details"]["cached_tokens"] == 2
    missing = set(Response.model_fields) - set(given)
    assert missing == {
        "access_programs", "image", "input_transformations", "moderation", "tool_usage",
        "prompt_cache_diagnostics", "prompt_cache_options", "prompt_cache_retention",
    }  # fmt: skip


async def test_events_come_in_order_with_stable_ids() -> None:
    """Issue 14.1: each event by OpenAI's types; items as they are in the last event."""
    answer, _ = await post(ALL | {"stream": True}, everything)
    events = read(answer.text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    part = ["output_item.added", "content_part.added"]
    end = ["content_part.done", "output_item.done"]
    assert kinds == [
        "created", "in_progress",
        *part, "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", *end,
        *part, "output_text.delta", "output_text.delta", "output_text.done", *end,
        "output_item.added", *["function_call_arguments.delta"] * 2,
        "function_call_arguments.done", "output_item.done",
        "output_item.added", *["custom_tool_call_input.delta"] * 2,
        "custom_tool_call_input.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    last = events[-1]["response"]
    assert {event["response"]["id"] for event in events if "response" in event} == {last["id"]}
    assert [e["item"] for e in events if e["type"].endswith("item.done")] == last["output"]
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
        text = "".join(event["delta"] for event in own if "delta" in event)
        assert text in json.dumps(item, ensure_ascii=False).replace('\\"', '"').replace("\\n", "\n")
    assert "\u2028" not in answer.text
    assert events[0]["response"]["status"] == "in_progress"
    assert last["metrics"]["usage"]["prompt_tokens"] == last["usage"]["input_tokens"] == 5


async def test_whole_and_streamed_answers_are_the_same() -> None:
    """Issue 14.1: one translation of one stream of events."""
    whole, _ = await post(ALL, everything)
    streamed, _ = await post(ALL | {"stream": True}, everything)

    def plain(response: dict[str, Any]) -> Any:
        own = response["id"].removeprefix("resp_")
        text = json.dumps(response, sort_keys=True).replace(own, "")
        return {
            k: v for k, v in json.loads(text).items() if k not in ("created_at", "completed_at")
        }

    assert plain(whole.json()) == plain(read(streamed.text)[-1]["response"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [("length", "incomplete", {"reason": "max_output_tokens"}), ("stop", "completed", None),
     ("content_filter", "incomplete", {"reason": "content_filter"})],
)  # fmt: skip
async def test_ends(stream: bool, reason: Any, status: str, details: Any) -> None:
    """Issue 14.1: an answer without text has an empty message, so that clients find one."""
    answer, _ = await post(body(stream=stream), lambda _: [finish(reason)])
    given = read(answer.text)[-1]["response"] if stream else answer.json()
    assert (given["status"], given["incomplete_details"]) == (status, details)
    assert [item["type"] for item in given["output"]] == ["message"]
    if stream:
        assert read(answer.text)[-1]["type"] == f"response.{status}"


async def test_a_cut_call_is_incomplete_in_a_stream_and_left_out_of_a_whole_answer() -> None:
    """Issue 14.1: as in chat completions."""
    steps = [Delta("a", (1,)), ToolCallDelta(0, "c", "f", '{"a'), finish("length")]
    answer, _ = await post(body(tools=[FUNCTION], stream=True), lambda _: steps)
    last = read(answer.text)[-1]["response"]
    assert [(i["type"], i["status"]) for i in last["output"]] == [
        ("message", "completed"), ("function_call", "incomplete"),
    ]  # fmt: skip
    answer, _ = await post(body(tools=[FUNCTION]), lambda _: steps)
    assert [item["type"] for item in answer.json()["output"]] == ["message"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(GenerationFailed("Broken."), "server_error"), (QueueFull("Full."), "rate_limit_exceeded"),
     (KeyError("secret"), "server_error")],
)  # fmt: skip
@pytest.mark.parametrize("before", [[], [Delta("Hi", (1,))]])
async def test_a_stream_that_fails_ends_with_its_error(
    error: Exception, code: str, before: list[Any]
) -> None:
    """Issue 14.1: before the first token it has its status, or its event once headers are sent."""
    answer, _ = await post(body(stream=True), lambda _: [*before, error])
    if not before:
        assert answer.status_code >= 400
        assert answer.json()["error"]["message"]
        return
    events = read(answer.text)
    assert [events[0]["type"], events[-1]["type"]] == ["response.created", "response.failed"]
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", code)
    assert failed["output"][0]["status"] == "incomplete"
    assert "secret" not in answer.text


async def test_late_failures_begin_the_response_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 14.1: Codex shortens the conversation at this code; comments bridge the wait."""
    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.001)
    steps = [Progress("loading", 1, 2), lambda: asyncio.sleep(0.1), ContextOverflow("Too long.")]
    answer, _ = await post(body(stream=True), lambda _: steps, headers_after_s=0.001)
    assert ": loading 50%" in answer.text
    events = read(answer.text)
    assert [e["type"] for e in events] == [
        "response.created", "response.in_progress", "response.failed",
    ]  # fmt: skip
    assert events[-1]["response"]["error"]["code"] == "context_length_exceeded"


async def test_logprobs() -> None:
    """Issue 14.1: on the deltas and on the text; those without text wait for it."""
    probs = (TokenLogprob(1, b"a", -0.5),), (TokenLogprob(2, b"b", -0.25),)
    steps = [Delta("", (1,), 0, "", probs[0]), Delta("ab", (2,), 0, "", probs[1]), finish()]
    given = body(include=["message.output_text.logprobs"], top_logprobs=2)
    answer, backend = await post(given, lambda _: steps)
    assert backend.requests[0].sampling.logprobs == 2
    text = answer.json()["output"][0]["content"][0]
    assert [token["logprob"] for token in text["logprobs"]] == [-0.5, -0.25]
    answer, _ = await post(given | {"stream": True}, lambda _: steps)
    events = read(answer.text)
    (delta,) = [event for event in events if event["type"].endswith("text.delta")]
    assert delta["logprobs"] == text["logprobs"]
    assert events[-1]["response"]["output"][0]["content"][0] == text


async def test_items_become_turns() -> None:
    """Issue 14.1: what belongs to one answer is one turn; instructions come first."""
    text: Any = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    request = await core(
        body(
            [
                {"type": "message", "role": "developer", "content": "dev"},
                {"role": "user", "content": text},
                {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": seal("hm")},
                {"type": "message", "id": "msg", "role": "assistant", "status": "completed",
                 "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
                {"type": "function_call", "id": "fc", "call_id": "c1", "name": "f",
                 "arguments": '{"a": 1}'},
                {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": 'x"y'},
                {"type": "function_call_output", "call_id": "c1", "output": "22"},
                {"type": "custom_tool_call_output", "call_id": "c2", "output": text},
                {"type": "web_search_call", "id": "ws", "status": "completed", "action": {}},
                {"type": "reasoning", "summary": [], "content": [
                    {"type": "reasoning_text", "text": "again"}]},
                {"role": "assistant", "content": "done"},
                {"role": "user", "content": "next"},
            ],
            instructions="sys",
            tools=[FUNCTION, CUSTOM],
        )
    )  # fmt: skip
    calls = (ToolCall("c1", "f", '{"a": 1}'), ToolCall("c2", "patch", '{"input":"x\\"y"}'))
    assert request.messages == (
        Message("system", "sys\n\ndev"),
        Message("user", "ab"),
        Message("assistant", "ok", tool_calls=calls, reasoning="hm"),
        Message("tool", "22", "f", tool_call_id="c1"),
        Message("tool", "ab", "patch", tool_call_id="c2"),
        Message("assistant", "done", reasoning="again"),
        Message("user", "next"),
    )
    assert request.tools[1].parameters is not None
    assert "lark" in (request.tools[1].description or "")


async def test_fields_of_the_request() -> None:
    """Issue 14.1: Codex's request; each field reaches the core or is repeated."""
    schema = {"type": "object"}
    answer, backend = await post(
        body(
            temperature=0.5, top_p=0.9, seed=3, max_output_tokens=7, parallel_tool_calls=False,
            reasoning={"effort": "low", "summary": "auto"}, store=True, truncation="auto",
            text={"format": {"type": "json_schema", "name": "n", "schema": schema},
                  "verbosity": "low"},
            include=[], prompt_cache_key="k", metadata={"a": "b"}, user="u", service_tier="auto",
            stream_options={"include_obfuscation": False}, safety_identifier="s",
        )
    )  # fmt: skip
    request = backend.requests[0]
    assert request.sampling == Sampling(temperature=0.5, top_p=0.9, seed=3, max_tokens=7)
    assert request.fit_max_tokens
    assert request.thinking == Thinking(enabled=True, effort="low")
    assert request.constraint == Constraint(json_schema=schema)
    assert request.tool_choice == ToolChoice(parallel=False)
    given = answer.json()
    Response.model_validate_json(answer.text, strict=True)
    assert (given["metadata"], given["user"], given["truncation"]) == ({"a": "b"}, "u", "disabled")
    assert given["text"]["format"]["name"] == "n"
    assert given["reasoning"] == {"effort": "low", "summary": "auto"}
    assert "x-headrace-warning" not in answer.headers


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("none", ToolChoice("none")), ("required", ToolChoice("required")), (None, ToolChoice()),
     ({"type": "function", "name": "f"}, ToolChoice("required", ("f",), parallel=False)),
     ({"type": "custom", "name": "patch"}, ToolChoice("required", ("patch",), parallel=False)),
     ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
      ToolChoice("auto", ("f",)))],
)  # fmt: skip
async def test_choices(choice: Any, expected: ToolChoice) -> None:
    answer, backend = await post(body(tools=[FUNCTION, CUSTOM], tool_choice=choice))
    assert backend.requests[0].tool_choice == expected
    Response.model_validate_json(answer.text, strict=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [SEARCH]}, "tools"),
        ({"tools": [SEARCH, FUNCTION], "tool_choice": "required"}, "tools"),
        ({"tools": [SEARCH, FUNCTION], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{"type": "functoin", "name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "mesage", "role": "user"}]}, "input[0].type"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "x"}]},
         "input[0].arguments"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"max_tokens": 1, "max_output_tokens": 2}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [PATH, f"{PATH}/input_tokens"])
async def test_wrong_requests_are_refused_by_name(fields: Any, param: str, path: str) -> None:
    """Issue 14.1: with the place in the client's own request."""
    if path != PATH and not (fields.keys() & {"input"} or "tools" in param):
        return
    answer, backend = await sent(path, body() | fields)
    assert (answer.status_code, backend.requests) == (400, [])
    assert answer.json()["error"]["param"] == param


async def test_errors_of_the_core_have_the_clients_names() -> None:
    answer, _ = await post(body(), lambda _: [ContextOverflow("messages: long", param="messages")])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "input")
    assert error["code"] == "context_length_exceeded"


async def test_tokens_are_counted() -> None:
    """Issue 14.1: the same conversation as for an answer."""
    given = body(instructions="sys", tools=[FUNCTION, SEARCH])
    answer, backend = await sent(f"{PATH}/input_tokens", given)
    assert answer.json() == {"object": "response.input_tokens", "input_tokens": 3}
    request = backend.requests[0]
    assert isinstance(request, CountRequest)
    assert request.messages == (await core(given)).messages
    assert [tool.name for tool in request.tools] == ["f"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_no_response_is_kept(method: str) -> None:
    async with client() as http:
        answer = await http.request(method, f"{PATH}/resp_1")
        assert answer.status_code == 404
        assert (await http.post(f"{PATH}/compact", json={})).status_code == 404


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=20), st.lists(st.integers(0, 99), max_size=5), st.booleans())
def test_free_text_is_read_from_any_pieces(text: str, cuts: list[int], plain: bool) -> None:
    """Issue 14.1: JSON's escapes may be cut anywhere."""
    whole = json.dumps({"input": text}, ensure_ascii=not plain)
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    reader = FreeText()
    parts = [reader.feed(whole[a:b]) for a, b in itertools.pairwise(places)]
    assert "".join(parts) + reader.flush() == text


def test_what_is_no_such_object_is_not_lost() -> None:
    reader = FreeText()
    assert reader.feed('{"patch": "x"}') + reader.flush() == '{"patch": "x"}'
    reader = FreeText()
    assert reader.feed('{"input": "a\nb"}') + reader.flush() == "a\nb"
    assert unseal("gAAAA of another server") == ""


async def test_a_count_checks_the_sampling_too() -> None:
    """Issue 14.1: the body is that of an answer, and is refused alike."""
    given = {"model": "m", "input": "x", "temperature": 9}
    answer, backend = await sent(f"{PATH}/input_tokens", given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")
    assert backend.requests == []
