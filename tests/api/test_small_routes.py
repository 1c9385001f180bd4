"""Models, tokens and health."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.fakes import FakeBackend, client

from headrace.core.model import ModelInfo
from headrace.core.request import CountRequest, Message


async def test_models() -> None:
    """A: the list, and one by id or alias; paths and options stay inside."""
    async with client() as http:
        listed = (await http.get("/v1/models")).json()
        one = (await http.get("/v1/models/best")).json()
        slashed = (await http.get("/v1/models/org/big")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["m", "org/big"]
    assert (one["id"], one["object"], one["owned_by"]) == ("m", "model", "headrace")
    assert slashed == listed["data"][1]
    assert "secret" not in str(listed)


async def test_unknown_model() -> None:
    """A: OpenAI's 404."""
    async with client() as http:
        answer = await http.get("/v1/models/none")
    assert answer.status_code == 404
    assert answer.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("body", "special"),
    [
        ({"content": "x"}, False),
        ({"content": "x", "add_special": True}, True),
        ({"prompt": "x"}, True),
        ({"prompt": "x", "add_special_tokens": False}, False),
    ],
)
async def test_tokenize_text(body: Any, special: bool) -> None:
    """A, W21: the forms of llama-server and vLLM, each with its own default."""
    backend = FakeBackend()
    async with client(backend) as http:
        answer = await http.post("/tokenize", json={"model": "m", **body})
    assert answer.json() == {"tokens": [7, 8, 9], "count": 3, "estimated": False}
    request = backend.requests[0]
    assert isinstance(request, CountRequest)
    assert (request.text, request.messages, request.add_special) == ("x", None, special)


async def test_tokenize_messages() -> None:
    """W21: a conversation goes through the template."""
    backend = FakeBackend()
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": 1}}
    async with client(backend) as http:
        assert (await http.post("/tokenize", json=body)).status_code == 200
    request = backend.requests[0]
    assert isinstance(request, CountRequest)
    assert request.messages == (Message("user", "x"),)
    assert request.template_options == {"a": 1}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"content": "a", "prompt": "b"}, 400),
        ("/tokenize", {"prompt": "a", "tools": [1]}, 400),
        ("/tokenize", {"prompt": "a", "model": "none"}, 404),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {}, 400),
    ],
)
async def test_wrong_token_requests(path: str, body: Any, status: int) -> None:
    """A: refused with OpenAI's body."""
    async with client() as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_detokenize() -> None:
    """A: token ids in, text out."""
    async with client() as http:
        answer = await http.post("/detokenize", json={"tokens": [1, 2]})
    assert answer.json() == {"content": "1 2"}


@pytest.mark.parametrize(
    ("state", "ready", "expected"),
    [
        ("ready", None, (200, "ok")),
        ("loading", None, (503, "loading")),
        ("created", True, (200, "ok")),
        ("draining", False, (503, "draining")),
        ("ready", False, (503, "not ready")),
    ],
)
async def test_readiness(state: Any, ready: bool | None, expected: tuple[int, str]) -> None:
    """A, W7: alive is not ready; 503 tells the state."""
    models = [ModelInfo(id="m", source="s", engine="fake", state=state)]
    check = None if ready is None else lambda: ready
    async with client(FakeBackend(models=models), ready=check) as http:
        assert (await http.get("/health/live")).json() == {"status": "ok"}
        for path in ("/health", "/health/ready"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["status"]) == expected
