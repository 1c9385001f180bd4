"""/v1/rerank as Jina and Cohere have it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.fakes import FakeBackend, client

from headrace.core.request import RerankRequest

DOCUMENTS = ["a", {"text": "b"}, "c"]


async def post(backend: FakeBackend, path: str = "/v1/rerank", **body: Any) -> Any:
    async with client(backend) as http:
        return await http.post(
            path, json={"model": "m", "query": "q", "documents": DOCUMENTS, **body}
        )


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_documents_are_put_in_order(path: str) -> None:
    """A: indices and scores, the best first, with both ways to say what was read."""
    backend = FakeBackend()
    answer = await post(backend, path, top_n=2)
    body = answer.json()
    assert answer.status_code == 200
    assert body["results"] == [
        {"index": 2, "relevance_score": 0.25},
        {"index": 1, "relevance_score": 0.125},
    ]
    assert body["model"] == "m"
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert body["meta"] == {"api_version": {"version": "2"}, "tokens": {"input_tokens": 7}}
    assert body["metrics"]["engine"] == "fake"
    assert "server-timing" in answer.headers
    request = backend.requests[0]
    assert isinstance(request, RerankRequest)
    assert (request.query, request.documents, request.top_n) == ("q", ("a", "b", "c"), 2)
    assert request.truncate


async def test_documents_come_back_on_request() -> None:
    body = (await post(FakeBackend(), return_documents=True, truncate=False)).json()
    assert [one["document"]["text"] for one in body["results"]] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"query": ""}, "query", "invalid_value"),
        ({"documents": []}, "documents", "invalid_value"),
        ({"documents": ["a"] * 2049}, "documents", "invalid_value"),
        ({"documents": [{"title": "a"}]}, "documents[0].text", "invalid_value"),
        ({"top_n": 0}, "top_n", "invalid_value"),
        ({"rank_fields": ["title"]}, "rank_fields", "unsupported_parameter"),
        ({"max_tokens_per_doc": 9}, "max_tokens_per_doc", "unsupported_parameter"),
    ],
)
async def test_what_is_wrong_is_named(wrong: dict[str, Any], param: str, code: str) -> None:
    """A: a 400 in OpenAI's shape."""
    answer = await post(FakeBackend(), **wrong)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
