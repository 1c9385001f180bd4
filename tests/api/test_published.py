"""Ollama's answers and lines by its schemas, with a scripted backend."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.api.fakes import FakeBackend, client
from tests.api.published import OLLAMA, hold
from tests.api.test_anthropic import everything

from headrace.core.errors import GenerationFailed
from headrace.core.events import Delta

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
GENERATE: dict[str, Any] = {"model": "m", "prompt": "a"}


@pytest.mark.parametrize(("name", "body"), [("chat", CHAT), ("generate", GENERATE)])
async def test_each_line_of_ollamas_answers(name: str, body: dict[str, Any]) -> None:
    """Issue 14.4: thinking, text, calls and the figures; whole, in lines, and of a load."""
    path = f"/api/{name}"
    async with client(FakeBackend(everything)) as http:
        lines = (await http.post(path, json=body)).text.splitlines()
        whole = (await http.post(path, json=body | {"stream": False})).json()
        errors = [(await http.post(path, json={"model": ""})).json()]
    assert len(lines) > 4
    for line in lines:
        hold(OLLAMA, name, json.loads(line))
    hold(OLLAMA, name, whole)
    async with client() as http:
        loaded = (await http.post(path, json={"model": "m"})).json()
        missing = await http.post(path, json=body | {"model": "none", "stream": False})
    hold(OLLAMA, name, loaded)
    errors.append(missing.json())
    script: Any = [Delta("a", (1,)), GenerationFailed("Broken.")]
    async with client(FakeBackend(lambda _: script)) as http:
        errors.append(json.loads((await http.post(path, json=body)).text.splitlines()[-1]))
    for error in errors:
        hold(OLLAMA, "error", error)
    assert "not found" in errors[1]["error"]


@pytest.mark.parametrize(
    ("name", "body"), [("embed", {"input": ["a", "b"]}), ("embeddings", {"prompt": "a"})]
)
async def test_ollamas_vectors(name: str, body: dict[str, Any]) -> None:
    """Issue 14.4: both routes."""
    async with client() as http:
        answer = await http.post(f"/api/{name}", json={"model": "m", **body})
    hold(OLLAMA, name, answer.json())


@pytest.mark.parametrize("name", ["tags", "ps", "version"])
async def test_ollamas_lists(name: str) -> None:
    async with client() as http:
        hold(OLLAMA, name, (await http.get(f"/api/{name}")).json())
        hold(OLLAMA, "show", (await http.post("/api/show", json={"model": "m"})).json())
