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


@pytest.mark.parametrize(
    "path", ["/v1/rerank", "/v2/rerank", "/rerank", "/v1/reranking", "/reranking"]
)
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


async def test_teis_form() -> None:
    """Issue 14.4: `texts` in place of documents gets a list of scores."""
    backend = FakeBackend()
    body = {"query": "q", "texts": ["a", "b"], "truncate": True, "raw_scores": False}
    async with client(backend, unknown_fields="refuse") as http:
        plain = await http.post("/rerank", json=body)
        assert plain.json() == [{"index": 1, "score": 0.125}, {"index": 0, "score": 0.0}]
        assert "server-timing" in plain.headers
        whole = await http.post("/rerank", json=body | {"return_text": True, "top_n": 1})
        assert whole.json() == [{"index": 1, "score": 0.125, "text": "b"}]
        raw = await http.post("/rerank", json=body | {"raw_scores": True})
        assert raw.json()["error"]["param"] == "raw_scores"
        for wrong in ({"documents": ["a"]}, {"texts": None}, {"texts": []}):
            refused = await http.post("/rerank", json=body | wrong)
            assert refused.status_code == 400
    request = backend.requests[0]
    assert isinstance(request, RerankRequest)
    assert (request.documents, request.truncate) == (("a", "b"), True)


async def test_relevance() -> None:
    """Issue 14.4: DB-GPT's form: a score for each document, in the order of the request."""
    body = {"model": "m", "query": "q", "documents": ["a", "b", "c"]}
    async with client(FakeBackend(), unknown_fields="refuse") as http:
        answer = (await http.post("/v1/beta/relevance", json=body)).json()
        refused = await http.post("/v1/beta/relevance", json=body | {"documents": []})
    assert answer["data"] == [0.0, 0.125, 0.25]
    assert (answer["object"], answer["model"]) == ("list", "m")
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert refused.status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/rerank", {"query": "q", "documents": ["a"]}), ("/v1/embeddings", {"input": "a"}),
     ("/v1/score", {"text_1": "a", "text_2": "b"})],
)  # fmt: skip
async def test_vllms_truncation(path: str, body: dict[str, Any]) -> None:
    """Issue 14.4: -1 cuts to the context, which the core has; a number of tokens is refused."""
    for given, truncates in (({}, "rerank" in path), ({"truncate_prompt_tokens": -1}, True)):
        backend = FakeBackend()
        async with client(backend, unknown_fields="refuse") as http:
            assert (await http.post(path, json=body | given)).status_code == 200
        request: Any = backend.requests[0]
        assert request.truncate == truncates
    async with client(FakeBackend()) as http:
        few = await http.post(path, json=body | {"truncate_prompt_tokens": 9})
        both = {"truncate_prompt_tokens": -1, "truncate": False}
        differ = await http.post(path, json=body | both)
    assert (few.status_code, few.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert (differ.status_code, differ.json()["error"]["param"]) == (400, "truncate")


async def test_documents_come_back_on_request() -> None:
    body = (await post(FakeBackend(), return_documents=True, truncate=False)).json()
    assert [one["document"]["text"] for one in body["results"]] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"query": ""}, "query", "invalid_value"),
        ({"documents": []}, "documents", "invalid_value"),
        ({"documents": ["a"] * 2049}, "documents", "invalid_value"),
        ({"query": "a" * 100_000, "documents": ["b"] * 400}, "query", "invalid_value"),
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
