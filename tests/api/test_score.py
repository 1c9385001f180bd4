"""/v1/score as vLLM has it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.fakes import FakeBackend, client

from headrace.core.request import ScoreRequest


async def post(backend: FakeBackend, path: str = "/v1/score", **body: Any) -> Any:
    async with client(backend) as http:
        return await http.post(path, json={"model": "m", **body})


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("a", "b", [("a", "b")]),
        ("a", ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a"], ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a", "b"], ["c", "d"], [("a", "c"), ("b", "d")]),
    ],
)
async def test_texts_are_scored_in_pairs(path: str, first: Any, second: Any, pairs: Any) -> None:
    """A: one score for each pair, in order, with the usage and the figures."""
    backend = FakeBackend()
    answer = await post(backend, path, text_1=first, text_2=second)
    body = answer.json()
    assert answer.status_code == 200
    assert body["data"] == [
        {"index": place, "object": "score", "score": place / 8} for place in range(len(pairs))
    ]
    assert (body["object"], body["model"]) == ("list", "m")
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert body["metrics"]["engine"] == "fake"
    assert "server-timing" in answer.headers
    (request,) = backend.requests
    assert isinstance(request, ScoreRequest)
    assert (request.pairs, request.truncate) == (tuple(pairs), False)


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"text_1": ""}, "text_1", "invalid_value"),
        ({"text_2": []}, "text_2", "invalid_value"),
        ({"text_1": ["a", "b"]}, "text_2", "invalid_value"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2", "invalid_value"),
        ({"text_2": ["a"] * 2049}, "text_2", "invalid_value"),
        ({"text_1": "a" * 100_000, "text_2": ["b"] * 400}, "text_1", "invalid_value"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "unsupported_parameter"),
    ],
)
async def test_what_is_wrong_is_named(wrong: dict[str, Any], param: str, code: str) -> None:
    """A: a 400 in OpenAI's shape.

    Issue 11.5: a text of 1 MB with 2048 others took 4 GB, as each pair has it.
    """
    answer = await post(FakeBackend(), **{"text_1": "a", "text_2": "b", **wrong})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
