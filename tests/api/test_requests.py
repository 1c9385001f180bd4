"""What is honoured, refused or ignored in a request."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from typing import Any

import pytest
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, client, text

from headrace.api import chat as chat_route
from headrace.api import completions as text_route
from headrace.api.chat import ChatRequest
from headrace.api.completions import CompletionRequest
from headrace.api.exchange import Call
from headrace.api.limits import ApiSettings, check_depth
from headrace.api.messages import ChatMessage
from headrace.core.constraint import Constraint
from headrace.core.errors import InvalidRequest
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling, SamplingFields, described


async def asked(path: str, body: Any) -> GenerateRequest:
    backend = FakeBackend()
    async with client(backend) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    request = backend.requests[0]
    assert isinstance(request, GenerateRequest)
    return request


async def refused(path: str, body: Any, **settings: Any) -> dict[str, Any]:
    backend = FakeBackend()
    async with client(backend, **settings) as http:
        raw: dict[str, Any] = {"content" if isinstance(body, bytes) else "json": body}
        answer = await http.post(path, **raw)
    assert (answer.status_code, backend.requests) == (400, [])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


SAMPLING = [
    ("max_tokens", 7, {"max_tokens": 7}),
    ("temperature", 0, {"temperature": 0.0}),
    ("temperature", 2, {"temperature": 2.0}),
    ("min_tokens", 3, {"min_tokens": 3}),
    ("top_p", 0.5, {"top_p": 0.5}),
    ("top_k", 40, {"top_k": 40}),
    ("top_k", -1, {"top_k": 0}),
    ("min_p", 0.1, {"min_p": 0.1}),
    ("presence_penalty", -2, {"presence_penalty": -2.0}),
    ("frequency_penalty", 1.5, {"frequency_penalty": 1.5}),
    ("repetition_penalty", 1.1, {"repetition_penalty": 1.1}),
    ("seed", 2**63 - 1, {"seed": 2**63 - 1}),
    ("seed", -1, {"seed": -1}),
    ("stop", "x", {"stop": ("x",)}),
    ("stop", ["x", "y"], {"stop": ("x", "y")}),
    ("stop_token_ids", [1, 2], {"stop_token_ids": (1, 2)}),
    ("ignore_eos", True, {"ignore_eos": True}),
    ("logit_bias", {"50256": -100}, {"logit_bias": {50256: -100.0}}),
]


@pytest.mark.parametrize(("name", "value", "expected"), SAMPLING)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_sampling_is_honoured(
    path: str, name: str, value: Any, expected: dict[str, Any]
) -> None:
    """W11: each field reaches the backend as it was given; A: temperature 0 is 0."""
    body = chat() if path == CHAT else text()
    request = await asked(path, {**body, name: value})
    defaults = {} if path == CHAT or name == "max_tokens" else {"max_tokens": 16}
    assert request.sampling == Sampling(**{**defaults, **expected})


@pytest.mark.parametrize("name", SamplingFields.__struct_fields__)
def test_every_scalar_parameter_of_the_core_is_on_the_wire(name: str) -> None:
    """W11: a parameter that the core declares is a field of both routes, and is copied."""
    kind, meta = described(SamplingFields)[name]
    value = kind((meta.extra or {})["range"].high)
    messages = [ChatMessage("user", "hi")]
    of_chat = ChatRequest(messages=messages, **{name: value})
    # Completions have 16 tokens where none are given, of which none can be the least.
    room = {"max_tokens": value} if name == "min_tokens" else {}
    of_text = CompletionRequest(prompt="hi", **{name: value, **room})
    request = chat_route.to_request(of_chat, ApiSettings(), Call())
    assert getattr(request.sampling, name) == value
    (request,) = text_route.to_requests(of_text, ApiSettings(), Call())
    assert getattr(request.sampling, name) == value


async def test_fields_of_chat() -> None:
    """W9, W11: messages, n, template options, logprobs, context length."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = await asked(
        CHAT,
        chat(
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "content": parts, "name": "ann"},
            ],
            n=2,
            max_completion_tokens=9,
            logprobs=True,
            top_logprobs=3,
            chat_template_kwargs={"thinking": False},
            context_length=512,
        ),
    )
    assert request.messages == (Message("system", "s"), Message("user", "ab", "ann"))
    assert (request.model, request.n, request.context_length) == ("m", 2, 512)
    assert request.sampling == Sampling(max_tokens=9, logprobs=3)
    assert request.template_options == {"thinking": False}


async def test_fields_of_completions() -> None:
    """W11: echo, logprobs, best_of where it equals n."""
    request = await asked(TEXT, text("p", echo=True, logprobs=0, n=2, best_of=2))
    assert (request.prompt, request.echo, request.n) == ("p", True, 2)
    assert request.sampling.logprobs == 0


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}},
         {"type": "null"}),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, {}),
        ({"type": "json_schema", "schema": {"type": "null"}}, {"type": "null"}),
        ({"type": "json_object", "schema": {"type": "array"}}, {"type": "array"}),
    ],
)  # fmt: skip
async def test_response_format(wanted: Any, schema: Any) -> None:
    """A: the three forms of OpenAI, and the two of llama.cpp, whose schema counts too."""
    assert (await asked(CHAT, chat(response_format=wanted))).constraint == (
        None if schema is None else Constraint(json_schema=schema)
    )


async def test_null_means_absent() -> None:
    """A: every optional field may be null."""
    names = [name for name, *_ in SAMPLING]
    nulls = dict.fromkeys([*names, "n", "tools", "response_format", "stream", "logprobs"])
    request = await asked(CHAT, chat(**nulls))
    assert (request.sampling, request.n) == (Sampling(), 1)


async def test_unknown_and_ignorable_fields_are_ignored() -> None:
    """A: an unknown field is ignored, and so is what cannot change the answer."""
    ignorable = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "parallel_tool_calls": True, "no_such_field": [1],
    }  # fmt: skip
    assert (await asked(CHAT, chat(**ignorable))).sampling == Sampling()


HARMLESS = {
    "tools": [], "functions": [], "tool_choice": "none", "function_call": "none",
    "modalities": ["text"], "min_tokens": 0,
}  # fmt: skip


async def test_unsupported_fields_may_say_what_changes_nothing() -> None:
    """A: an empty list of tools is not a request for tools."""
    assert (await asked(CHAT, chat(**HARMLESS))).sampling == Sampling()
    assert (await asked(TEXT, text(suffix=""))).prompt == "hi"


UNSUPPORTED = {
    "functions": [{}],
    "function_call": "auto", "modalities": ["audio"], "audio": {"voice": "x"},
    "prediction": {"type": "content"}, "web_search_options": {},
    "guided_whitespace_pattern": " ", "structural_tag": {},
    "allowed_token_ids": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_unsupported_fields_are_refused_by_name(name: str) -> None:
    """A, W11: what would change the answer and cannot be done is a 400 that names it."""
    error = await refused(CHAT, chat(**{name: UNSUPPORTED[name]}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"n": 2, "best_of": 3}])
async def test_unsupported_fields_of_completions(fields: Any) -> None:
    """A: best_of that is not n."""
    error = await refused(TEXT, text(**fields))
    assert error["param"] == [*fields][-1]
    assert error["code"] == "unsupported_parameter"


WRONG = [
    ("temperature", 2.1), ("temperature", -0.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("presence_penalty", 3),
    ("frequency_penalty", -3), ("repetition_penalty", 0), ("n", 0), ("n", 129), ("n", 1.5),
    ("n", 10**30), ("seed", 2**63), ("seed", -(2**63) - 1), ("max_tokens", 0),
    ("max_tokens", 2**31), ("stop", [""]), ("stop", 3), ("stop", ["x"] * 17),
    ("stop_token_ids", [-1]), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": 101}), ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stream", "yes"), ("model", 3), ("logprobs", "x"), ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}), ("context_length", 0),
    ("response_format", {"type": "text", "schema": {}}),
    ("response_format", {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}),
    ("response_format", {"type": "json_object", "schema": {"minItems": 10**9}}),
    ("stream_options", {"include_usage": True}), ("ignore_eos", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_wrong_values_are_refused_by_name(path: str, name: str, value: Any) -> None:
    """A: wrong types and numbers out of range are a 400 that names the field."""
    error = await refused(path, {**(chat() if path == CHAT else text()), name: value})
    assert error["param"].startswith(name)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
         "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "user", "content": "x"}] * 3000}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    ],
)  # fmt: skip
async def test_wrong_chats(fields: Any, param: str) -> None:
    """A: the parameter is named with its place."""
    assert (await refused(CHAT, chat(**fields)))["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"), ([], "prompt"), ([[]], "prompt"), ([1, "a"], "prompt"),
        ([[1], "a"], "prompt"), ([[1], 2], "prompt"), ([True], "prompt[0]"), ([-1], "prompt[0]"),
        ([[-1]], "prompt[0][0]"), ([2**31], "prompt[0]"), (["a"] * 129, "prompt"), ({}, "prompt"),
    ],
)  # fmt: skip
async def test_wrong_prompts(prompt: Any, param: str) -> None:
    """A: lists of prompts are of one kind, not empty and not too long."""
    assert (await refused(TEXT, text(prompt)))["param"] == param


async def test_choices_are_limited() -> None:
    """A: prompts times n is bounded."""
    assert (await refused(TEXT, text(["a"] * 3, n=86)))["param"] == "n"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"null", b'{"temperature": NaN}', b'{"seed": Infinity}',
        b'{"temperature": 1e999}', b'{"messages": "\xff"}', b'{"messages": "\\ud800"}',
        b'{"x":' * 65 + b"1" + b"}" * 65, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 200_000, b'"' * 200_001, b'{"a":"' + b"\\" * 99_999,
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
async def test_what_is_not_json_is_refused(body: bytes) -> None:
    """A: NaN, infinities, bad UTF-8, deep nesting and broken JSON are a 400, at once."""
    assert (await refused(CHAT, body))["code"] == "invalid_value"


SENTENCES = {
    b"": "The body is empty; it must be JSON.",
    b" \n": "The body is empty; it must be JSON.",
    b"{": "The body is not valid JSON: it ends too early.",
    b'{"model": "m",}': "The body is not valid JSON: trailing comma in object (byte 14).",
    b"{'model': 1}": "The body is not valid JSON: object keys must be strings (byte 1).",
    b'{"model": "\\x"}': "The body is not valid JSON: invalid escape character",
    b'{"model": "\\u12"}': "The body is not valid JSON: ",
    b'{"model": "\xff"}': "The body is not UTF-8: invalid start byte (byte 11).",
    b'{"model": "\xed\xa0\x80"}': "The body is not UTF-8: invalid continuation byte (byte 11).",
    b"\xef\xbb\xbf{}": "The body begins with a byte order mark; send UTF-8 without one.",
    "{}".encode("utf-16"): "The body begins with a byte order mark; send UTF-8 without one.",
}
LONE = [
    b'{"model": "\\ud800"}', b'{"model": "\\udc00"}', b'{"model": "\\uD83Dabcdefghi"}',
    b'{"model": "\\ud83d\\ud83d and more"}', b'{"nobody": "\\ud800", "knows": "this"}',
    b'{"\\ud800": 1}', b'{"messages": [{"role": "user", "content": "a\\udfff"}]}',
]  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), SENTENCES.items())
async def test_each_fault_of_a_body_has_a_sentence(body: bytes, sentence: str) -> None:
    """Issue 12.3: what is wrong, and where."""
    assert (await refused(CHAT, body))["message"].startswith(sentence)


@pytest.mark.parametrize("body", LONE)
async def test_lone_surrogates(body: bytes) -> None:
    """Issue 12.3: with a sentence of their own; a pair is a character."""
    assert "half of a surrogate pair" in (await refused(CHAT, body))["message"]
    pair = await asked(CHAT, chat(messages=[{"role": "user", "content": "\U0001f600"}]))
    assert pair.messages == (Message("user", "\U0001f600"),)


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "GZIP", "gzip, identity"])
async def test_codings_of_a_body(coding: str) -> None:
    """Issue 12.3: 415 names the coding, whatever the body is; none, or identity, is read."""
    body = gzip.compress(json.dumps(chat()).encode())
    async with client() as http:
        headers = {"content-encoding": coding}
        answer = await http.post(CHAT, content=body, headers=headers)
        unsaid = await http.post(CHAT, content=body)
        plain = await http.post(CHAT, json=chat(), headers={"content-encoding": "identity"})
    assert [answer.status_code, unsaid.status_code, plain.status_code] == [415, 415, 200]
    assert f"encoded with {coding.lower()};" in answer.json()["error"]["message"]
    assert "encoded with gzip;" in unsaid.json()["error"]["message"]
    assert answer.headers["accept-encoding"] == "identity"


async def test_brackets_in_strings_are_no_depth() -> None:
    """A: only structure counts, and the limit itself is allowed."""
    request = await asked(CHAT, chat(messages=[{"role": "user", "content": '[{"\\' * 99}]))
    assert request.messages == (Message("user", '[{"\\' * 99),)
    inner: Any = 1
    for _ in range(63):
        inner = [inner]
    assert (await asked(CHAT, chat(deep=inner))).n == 1
    await refused(CHAT, chat(deep=[inner]))


def test_depth_is_found_soon() -> None:
    """Issue 11.7: 8 MB of brackets took 1.4 s, in which all streams stood still; now 0.02 s."""
    began = time.process_time()
    with pytest.raises(InvalidRequest, match="deeper than 64 levels"):
        check_depth(b"[" * 4_000_000 + b"]" * 4_000_000)
    assert time.process_time() - began < 0.5
    check_depth((b"[" * 64 + b"]" * 64 + b",") * 2000)
    with pytest.raises(InvalidRequest, match="deeper than 64 levels"):
        check_depth((b"[" * 64 + b"]" * 64 + b",") * 2000 + b"{" * 65)


@pytest.mark.parametrize("depth", [65, 900, 100_000])
async def test_json_in_strings_has_the_same_depth(depth: int) -> None:
    """Issue 11.5: arguments of a call and schemas as text; decoders failed, which was a 500."""
    deep = '{"a":' * depth + "1" + "}" * depth
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
    turns = [{"role": "assistant", "tool_calls": [called]}]
    error = await refused(CHAT, chat(messages=turns))
    assert "nested deeper than 64 levels" in error["message"]
    assert error["param"] == "messages[0].tool_calls[0].function.arguments"
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": deep}
    error = await refused("/v1/responses", {"model": "m", "input": [item]})
    assert error["param"] == "input[0].arguments"
    assert (await refused(TEXT, text(guided_json=deep)))["param"] == "guided_json"


async def test_large_bodies_are_decoded_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A: over 64 KiB, a thread decodes."""
    seen: list[int] = []
    inner = asyncio.to_thread

    async def spy(function: Any, body: bytes, *rest: Any) -> Any:
        seen.append(len(body))
        return await inner(function, body, *rest)

    monkeypatch.setattr("headrace.api.exchange.asyncio.to_thread", spy)
    await asked(CHAT, chat(messages=[{"role": "user", "content": "x" * 65_000}]))
    assert seen == []
    request = await asked(CHAT, chat(messages=[{"role": "user", "content": "x" * 70_000}]))
    assert len(seen) == 1
    assert request.messages == (Message("user", "x" * 70_000),)


async def test_the_default_of_completions_fits() -> None:
    """Issue 12.6: 16 tokens, or more if `min_tokens` wants them, or what the context has left."""
    request = await asked(TEXT, text())
    assert (request.sampling.max_tokens, request.fit_max_tokens) == (16, True)
    request = await asked(TEXT, text(min_tokens=20))
    assert (request.sampling.max_tokens, request.fit_max_tokens) == (20, True)
    request = await asked(TEXT, text(max_tokens=16))
    assert (request.sampling.max_tokens, request.fit_max_tokens) == (16, False)
    assert (await asked(CHAT, chat())).sampling.max_tokens is None
