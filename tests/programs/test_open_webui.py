"""Open WebUI's server, used through its own API."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cli.programs import headrace
from tests.programs.conftest import running, until
from tests.programs.test_programs import PROMPT, Noted

pytestmark = [pytest.mark.programs, pytest.mark.timeout(400)]

# Without a login, and without models of its own for the search in documents.
SETTINGS = {
    "WEBUI_AUTH": "False",
    "OFFLINE_MODE": "true",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "RAG_EMBEDDING_ENGINE": "openai",
    "BYPASS_EMBEDDING_AND_RETRIEVAL": "true",
}
TOOL = '''
class Tools:
    def read_file(self, path: str) -> str:
        """
        Return the text of a file.
        :param path: the file
        """
        return open(path).read()
'''


@pytest.fixture
def webui(environ: dict[str, str], folder: Path, record_property: Noted) -> Iterator[httpx.Client]:
    """A server as `headrace connect` sets it up, and a client that has logged in."""
    done = headrace(environ, "connect", "open-webui", "--model", "echo", "--yes", "--json")
    made = json.loads(done.stdout)
    variables = {**environ, **SETTINGS, **made["env"], "DATA_DIR": str(folder / "data")}
    with running(made["command"], variables, folder, "/health") as client:
        empty = {"email": "", "password": ""}
        token = client.post("/api/v1/auths/signin", json=empty).raise_for_status().json()
        client.headers["Authorization"] = f"Bearer {token['token']}"
        record_property("client", "open-webui")
        record_property("version", client.get("/api/version").json()["version"])
        yield client


def answer_to(webui: httpx.Client, prompt: str, log: Path, **fields: Any) -> str:
    """Send a prompt as its page does, in a chat that it keeps; return the answer's text."""
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    turn = {"id": first, "parentId": None, "childrenIds": [second], "models": ["echo"]}
    turn |= {"role": "user", "content": prompt, "timestamp": 1}
    reply = {"id": second, "parentId": first, "childrenIds": [], "model": "echo"}
    reply |= {"role": "assistant", "content": "", "timestamp": 2}
    history = {"currentId": second, "messages": {first: turn, second: reply}}
    chat = {"title": "t", "models": ["echo"], "messages": [turn, reply], "history": history}
    made = webui.post("/api/v1/chats/new", json={"chat": chat}).raise_for_status().json()
    body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    place = {"chat_id": made["id"], "id": second, "session_id": str(uuid.uuid4())}
    request = {**body, **place, "background_tasks": {}, **fields}
    webui.post("/api/chat/completions", json=request).raise_for_status()
    answers: list[Any] = []

    def is_done() -> bool:
        kept = webui.get(f"/api/v1/chats/{made['id']}").raise_for_status().json()
        answers.append(kept["chat"]["history"]["messages"][second])
        return bool(answers[-1].get("done"))

    until(is_done, log, 60)
    return answers[-1]["content"]


def test_a_chat(webui: httpx.Client, folder: Path, record_property: Noted) -> None:
    """Issue 14, shown 2: models, a chat of its own API, and a tool that it runs."""
    record_property("tried", "answer, tools")
    models = webui.get("/api/models").raise_for_status().json()["data"]
    assert {"echo", "smollm2"} <= {model["id"] for model in models}
    assert answer_to(webui, PROMPT, folder / "log") == PROMPT
    tool = {"id": "files", "name": "files", "content": TOOL, "meta": {"description": "files"}}
    webui.post("/api/v1/tools/create", json=tool).raise_for_status()
    arguments = json.dumps({"path": str(folder / "notes.txt")})
    call = f'<tool_call>{{"name": "read_file", "arguments": {arguments}}}</tool_call>'
    native = {"tool_ids": ["files"], "params": {"function_calling": "native"}}
    answer = answer_to(webui, call, folder / "log", **native)
    assert "The secret word is heron." in answer
