"""LiteLLM's proxy in front of a service, used with OpenAI's package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.cli.programs import headrace
from tests.programs.conftest import PREFIX, running
from tests.programs.test_programs import PROMPT, Noted, run

pytestmark = [pytest.mark.programs, pytest.mark.timeout(400)]

# It does not start without a key for its own clients.
KEY = "sk-of-the-proxy"
SETTINGS = {
    "LITELLM_MASTER_KEY": KEY,
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
}
READ: Any = {
    "type": "function",
    "function": {
        "name": "read_file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}


@pytest.fixture
def proxy(environ: dict[str, str], folder: Path) -> Iterator[openai.OpenAI]:
    """The proxy as `headrace connect` sets it up, and a client of it."""
    done = headrace(environ, "connect", "litellm", "--model", "echo", "--yes", "--json")
    made = json.loads(done.stdout)
    variables = {**environ, **SETTINGS, **made["env"]}
    with (
        running(made["command"], variables, folder, "/health/liveliness") as client,
        openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=KEY, max_retries=0) as their,
    ):
        yield their


def test_litellms_proxy(
    proxy: openai.OpenAI, environ: dict[str, str], folder: Path, record_property: Noted
) -> None:
    """Issue 14, shown 2: models, an answer, a stream, a loop with a tool, an error."""
    python = PREFIX / "litellm" / "bin" / "python"
    version = "from importlib.metadata import version; print(version('litellm'))"
    record_property("client", "litellm-proxy")
    record_property("version", run((python, "-c", version), environ, folder).strip())
    record_property("tried", "answer, tools")
    assert {"echo", "smollm2"} <= {model.id for model in proxy.models.list()}
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    answer = proxy.chat.completions.create(model="echo", messages=messages, top_p=1)
    assert answer.choices[0].message.content == PROMPT
    with proxy.chat.completions.create(model="echo", messages=messages, stream=True) as stream:
        parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(parts) == PROMPT
    arguments = json.dumps({"path": str(folder / "notes.txt")})
    call = f'<tool_call>{{"name": "read_file", "arguments": {arguments}}}</tool_call>'
    messages = [{"role": "user", "content": call}]
    first = proxy.chat.completions.create(model="echo", messages=messages, tools=[READ])
    calls = first.choices[0].message.tool_calls
    assert calls, first
    made: Any = calls[0]
    assert json.loads(made.function.arguments) == json.loads(arguments)
    text = (folder / "notes.txt").read_text()
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": made.id, "content": text},
    ]
    last = proxy.chat.completions.create(model="echo", messages=messages, tools=[READ])
    assert "The secret word is heron." in (last.choices[0].message.content or "")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        proxy.chat.completions.create(model="echo", messages=messages, top_p=0.5)


def test_anthropics_api_of_the_proxy(proxy: openai.OpenAI) -> None:
    """Claude Code can use the service through the proxy."""
    body = {"model": "echo", "max_tokens": 64, "messages": [{"role": "user", "content": PROMPT}]}
    url = str(proxy.base_url).rstrip("/") + "/messages"
    answer = httpx.post(url, json=body, headers={"x-api-key": KEY}, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"][0]["text"] == PROMPT
