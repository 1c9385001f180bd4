"""The reader of OpenAI's chunks, and that the measuring tools read as the engine does."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.upstream import Play, chunk, event, upstream

from headrace.core.metrics import Usage
from headrace.lab.bench import prompts
from headrace.lab.bench.answer import Answer, message_of
from headrace.lab.http import Http, place
from headrace.text.chunks import Chunk, Malformed, is_end, loads, read, usage_of


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, Usage(prompt_tokens=5, completion_tokens=2)),
        ({"prompt_tokens": 5.0}, Usage(prompt_tokens=5)),
        ({"prompt_tokens": "5"}, Usage(prompt_tokens=5)),
        ({"total_tokens": 5}, Usage(prompt_tokens=5)),
        ({"prompt_tokens": 3, "total_tokens": None}, Usage(prompt_tokens=3)),
        ({"prompt_tokens": 3, "cached_tokens": 2.0}, Usage(prompt_tokens=3, cached_tokens=2)),
        ({"prompt_tokens": 3, "prompt_tokens_details": 7}, Usage(prompt_tokens=3)),
        ({"completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 1.0}},
         Usage(completion_tokens=2, reasoning_tokens=1)),
        ({"prompt_tokens": -1, "completion_tokens": math.inf}, None),
        ({"prompt_tokens": True}, None), ({"prompt_tokens": "many"}, None),
        ({}, None), ([], None), (None, None), ("x", None), (5, None),
    ],
)  # fmt: skip
def test_usage(usage: Any, expected: Usage | None) -> None:
    """Issue 12.19: counts in whatever form; what is none is no count."""
    assert usage_of(usage) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'"\ud800"', "\ufffd"), (r'"\udc00a"', "\ufffda"), (r'"\ud83d\ude00"', "😀"),
        (r'"\ud800\ud83d\ude00"', "\ufffd😀"), (r'"\\ud800"', "\\ud800"),
        (r'"\ud800\u0041"', "\ufffdA"),
        (r'{"\udfff": ["\ud800"]}', {"\ufffd": ["\ufffd"]}),
    ],
)  # fmt: skip
def test_half_characters(text: str, expected: Any) -> None:
    """Issue 12.19: half of a surrogate pair costs one character, not the answer."""
    assert loads(text.encode()) == expected


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_json_is_read_as_by_the_standard_library(value: Any) -> None:
    assert loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"nonsense", b'{"choices": 5}', b"\xff", b"[" * 10**5]
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        read(data)


def test_marks_of_the_end() -> None:
    assert is_end(b"[DONE]")
    assert is_end(b" [DONE] ")
    assert not is_end(b"[]")
    assert read(b"{}") == Chunk()


A = event(chunk(content="a"))


@pytest.mark.parametrize(
    "last",
    [
        event({"usage": {"prompt_tokens": 5.0, "completion_tokens": "7"}}),
        event({"choices": None, "usage": {"prompt_tokens": 5, "completion_tokens": 7.0}}),
        event({"usage": {"prompt_tokens": 5, "completion_tokens": 7}}, end=b""),
        event(
            {"choices": [{"delta": None, "usage": {"prompt_tokens": 5, "completion_tokens": 7}}]}
        ),
    ],
)
def test_bench_reads_as_the_engine_does(last: bytes) -> None:
    """Issue 12.20: one reader, so that what one accepts the other does."""
    answer = Answer(0.0, 7)
    answer.head(200, {})
    half = b'data: {"choices": [{"delta": {"content": "\\udc00"}}]}\n\n'
    for data in (
        A,
        half,
        event(chunk(content=["x", {"text": "a"}])),
        event(chunk(reason="stop")),
        last,
    ):
        answer.body(data, 1.0)
    row = answer.row(0.0)
    assert (row.fault, row.detail) == ("", "")
    assert (row.prompt_tokens, row.completion_tokens, row.usage) == (5, 7, True)
    assert row.finish_reason == "stop"
    assert len(row.gaps_ms) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no"}}', "no"), (b'{"error": "no"}', "no"),
        (b'{"detail": "no"}', "no"), (b'{"detail": {"message": "no"}}', "no"),
        (b'{"message": "no"}', "no"), (b"no", "no"), (b"\xff", "\ufffd"), (b"", ""),
    ],
)  # fmt: skip
def test_messages_of_errors(body: bytes, message: str) -> None:
    """Issue 12.20: in the forms of OpenAI, FastAPI and gateways, as the engine reads them."""
    assert message_of(body) == message


async def test_a_service_that_drops_an_unknown_path() -> None:
    """Issue 12.20: it has no /tokenize, and that is all."""
    async with upstream(*[Play(["drop"])] * 2) as server:
        http = Http(place(server.url))
        assert not (await prompts.vocabulary(prompts.counter(http, "m"))).exact
        assert {request.path for request in server.requests} == {"/tokenize"}
        http.close()
