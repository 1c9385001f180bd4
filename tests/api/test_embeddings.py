"""/v1/embeddings as OpenAI has it."""

from __future__ import annotations

import asyncio
import base64
from array import array
from typing import Any

import httpx
import openai
import pytest
from tests.api.fakes import FakeBackend, client

from headrace.api import limits
from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.core.request import EmbedRequest
from headrace.testing import Barrier


async def post(backend: FakeBackend, settings: dict[str, Any] | None = None, **body: Any) -> Any:
    async with client(backend, **settings or {}) as http:
        return await http.post("/v1/embeddings", json={"model": "m", "input": "hi", **body})


async def test_a_text_becomes_a_vector() -> None:
    """A: OpenAI's body, with the figures."""
    answer = await post(FakeBackend())
    body = answer.json()
    assert answer.status_code == 200
    assert (body["object"], body["model"]) == ("list", "m")
    third = array("f", [1 / 3])[0]
    expected = {"object": "embedding", "index": 0, "embedding": [0.0, third, third, third]}
    assert body["data"] == [expected]
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert body["metrics"]["total_ms"] == 9.0
    assert "total;dur=9.000" in answer.headers["server-timing"]


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("hi", ("hi",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
async def test_all_forms_of_input(given: Any, inputs: Any) -> None:
    backend = FakeBackend()
    assert (await post(backend, input=given, dimensions=2, user="u")).status_code == 200
    request = backend.requests[0]
    assert isinstance(request, EmbedRequest)
    assert (request.inputs, request.dimensions, request.model) == (inputs, 2, "m")
    assert (request.normalize, request.truncate) == (True, False)
    assert request.load_wait_s == 30.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompt_name": "query"}, ("query", None)),
        ({"input_type": "search_document"}, (None, "document")),
        ({"input_type": "QUERY"}, (None, "query")),
        ({"task": "retrieval.passage"}, (None, "document")),
        ({"task": "text-matching"}, (None, "similarity")),
        ({}, (None, None)),
    ],
)
async def test_what_the_texts_are_for(given: dict[str, Any], expected: Any) -> None:
    """Issue 17.6: in the words of sentence-transformers, Cohere, Voyage and Jina."""
    backend = FakeBackend()
    assert (await post(backend, **given)).status_code == 200
    request = backend.requests[0]
    assert isinstance(request, EmbedRequest)
    assert (request.prompt_name, request.input_type) == expected


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"input_type": "image"}, "input_type", "known are query,"),
        ({"task": "retrieval.query", "prompt_name": "q"}, "task", "both given"),
        ({"prompt_name": 1}, "prompt_name", "string"),
    ],
)
async def test_what_they_are_for_is_clear(given: Any, param: str, words: str) -> None:
    answer = await post(FakeBackend(), **given)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


async def test_extensions() -> None:
    backend = FakeBackend()
    await post(
        backend, truncate=True, normalized=False, keep_alive="5m", settings={"deadline_s": 9}
    )
    request = backend.requests[0]
    assert isinstance(request, EmbedRequest)
    assert (request.truncate, request.normalize, request.keep_alive) == (True, False, 300)
    assert request.deadline_s == 9


async def test_base64() -> None:
    body = (await post(FakeBackend(), encoding_format="base64", input=["a", "b"])).json()
    vectors = [array("f", base64.b64decode(one["embedding"])) for one in body["data"]]
    assert [vector[0] for vector in vectors] == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [-1]}, "input[0]"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"keep_alive": "soon"}, "keep_alive"),
    ],
)
async def test_what_is_wrong_is_named(wrong: dict[str, Any], param: str) -> None:
    """A: a 400 in OpenAI's shape."""
    answer = await post(FakeBackend(), **wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert (await post(FakeBackend(), model="none")).status_code == 404


async def test_a_large_answer_is_written_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_INPUTS", 5000)
    body = (await post(FakeBackend(), input=["x"] * 5000)).json()
    assert [one["index"] for one in body["data"]] == list(range(5000))


async def test_a_client_that_goes_stops_the_work() -> None:
    """W9: what nobody waits for is not computed."""
    backend = FakeBackend(lambda _: [Barrier()])
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not backend.received.is_set():
            return {"type": "http.request", "body": b'{"input": "a"}'}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    scope = {
        "type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings",
        "query_string": b"", "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    task = asyncio.ensure_future(create_app(backend, ApiSettings())(scope, receive, send))  # pyright: ignore[reportArgumentType]
    await backend.received.wait()
    assert backend.running == 1
    gone.set()
    await task
    assert (backend.running, len(backend.ended)) == (0, 1)


async def test_the_openai_client() -> None:
    """A: it asks for base64 by itself, and gets lists of numbers."""
    app = create_app(FakeBackend(), ApiSettings())
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    async with openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="-", http_client=http
    ) as ai:
        answer = await ai.embeddings.create(model="m", input=["a", "b"], dimensions=3)
        assert [len(one.embedding) for one in answer.data] == [3, 3]
        assert answer.data[1].embedding[0] == 1.0
        assert answer.usage.total_tokens == 7
        whole = await ai.embeddings.create(model="m", input="a", encoding_format="float")
        assert len(whole.data[0].embedding) == 4
        with pytest.raises(openai.BadRequestError, match="4 dimensions"):
            await ai.embeddings.create(model="m", input="a", dimensions=5)


async def test_what_a_model_is_for_is_told() -> None:
    async with client() as http:
        cards = (await http.get("/v1/models")).json()["data"]
    assert cards[0]["tasks"] == ["generate"]
