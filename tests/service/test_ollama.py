"""Ollama's own Python client against the real server (issue 14.3)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from tests.api.published import OLLAMA, hold
from tests.pictures_made import png
from tests.service.serving import Service, served

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = (
    'Let me see. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
)
CONFIGURATION = '''
[models.smollm2]
model = "smollm2"
context_length = 1024
aliases = ["small:135m"]

[models.echo]
model = "builtin:echo"

[models.seer]
model = "builtin:echo"
options = {images = true}

[models.thinker]
model = "builtin:echo"
chat_template = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}
{%- endif %}
{{- m.content }}
{%- endfor %}"""

# Never loaded.
[models.asleep]
model = "smollm2"
preload = false
[models.dreamer]
model = "smollm2"
preload = false
context_length = 300
chat_template = """
{%- for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: <think>
{% endif %}"""

[models.vectors]
model = "builtin:echo"
task = "embed"
options = {dimensions = 16}
'''


@pytest.fixture(scope="module")
def service(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("ollama") / "headrace.toml"
    file.write_text(CONFIGURATION)
    with served("--config", str(file)) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[ollama.Client]:
    client = ollama.Client(host=service.url)
    yield client
    client.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_of_the_real_model(client: ollama.Client) -> None:
    """Issue 14.3: streamed and not, with figures in nanoseconds, and names with a tag."""
    options = {"temperature": 0, "num_predict": 12, "num_ctx": 8192}
    whole = client.chat("smollm2:latest", user("Name a river."), options=options)
    assert whole.model == "smollm2:latest"
    assert whole.done
    assert whole.done_reason == "length"
    assert whole.eval_count == 12
    assert whole.prompt_eval_count
    assert whole.total_duration
    assert whole.eval_duration
    assert whole.total_duration > whole.eval_duration > 0
    lines = list(client.chat("small:135m", user("Name a river."), options=options, stream=True))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == 12
    answer = client.generate("smollm2", "Name a river.", options=options)
    assert answer.response == whole.message.content
    raw = client.generate("smollm2", "The capital of France is", raw=True, options=options)
    assert "Paris" in (raw.response or "")


def test_a_call_its_result_and_the_answer(client: ollama.Client) -> None:
    """Issue 14.3: calls come whole, with their arguments as an object; done_reason is stop."""
    messages: list[Any] = user(CALL)
    first = client.chat("echo", messages, tools=[WEATHER])
    assert first.done_reason == "stop"
    assert first.message.content == "Let me see. "
    (call,) = list(first.message.tool_calls or ())
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    lines = list(client.chat("echo", messages, tools=[WEATHER], stream=True))
    calls = [call for line in lines for call in line.message.tool_calls or ()]
    assert [call.function.arguments for call in calls] == [{"city": "Paris"}]
    assert "".join(line.message.content or "" for line in lines) == "Let me see. "
    result = {"role": "tool", "tool_name": "get_weather", "content": "22 degrees"}
    second = client.chat("echo", [*messages, first.message, result], tools=[WEATHER])
    assert "22 degrees" in (second.message.content or "")


def test_a_result_whose_call_is_not_there(client: ollama.Client) -> None:
    """Issue 14.3: Home Assistant keeps the last turns, which may begin with a tool's."""
    call = {"function": {"name": "get_weather", "arguments": {}}}
    result = {"role": "tool", "tool_name": "get_weather", "content": "22 degrees"}
    asked: list[Any] = [*user("Hello"), {"role": "assistant", "tool_calls": [call]}]
    for messages in ([result], [*asked, result, result], [*asked, {**result, "tool_name": "x"}]):
        answer = client.chat("echo", messages, tools=[WEATHER])
        assert "22 degrees" in (answer.message.content or "")


def test_a_cut_call_is_none(service: Service, client: ollama.Client) -> None:
    lines = client.chat(
        "echo", user(CALL), tools=[WEATHER], stream=True, options={"num_predict": 60}
    )
    found = list(lines)
    assert not any(line.message.tool_calls for line in found)
    assert found[-1].done_reason == "length"


def test_thinking_has_a_field(client: ollama.Client) -> None:
    """Issue 14.3: `think`, on a model whose answers begin with thinking."""
    text = "<think>\nRivers flow.\n</think>\n\nThe Rhine."
    answer = client.chat("thinker", user(text), think=True)
    assert answer.message.content == "The Rhine."
    assert answer.message.thinking == "Rivers flow."


def test_images(client: ollama.Client, service: Service) -> None:
    """Issue 14.3: in base64, in a message or beside a prompt; what is none is refused."""
    picture = png()
    images = [base64.b64encode(picture).decode()]
    message = {"role": "user", "content": "What is it? ", "images": images}
    answer = client.chat("seer", [message])
    assert hashlib.sha256(picture).hexdigest()[:8] in (answer.message.content or "")
    generated = client.generate("seer", "What is it? ", images=images)
    assert generated.response == answer.message.content
    assert "vision" in (client.show("seer").capabilities or ())
    for body in (
        {"model": "seer", "messages": [{**message, "images": ["AAAA"]}]},
        {"model": "seer", "messages": [{**message, "images": ["x!"]}]},
        {"model": "seer", "messages": [{**message, "role": "system"}]},
        {"model": "echo", "messages": [message]},
    ):
        refused = httpx.post(f"{service.url}/api/chat", json=body)
        assert refused.status_code == 400, body
        assert "image" in refused.json()["error"]


def test_a_form_is_enforced(client: ollama.Client) -> None:
    """Issue 14.3: `format` is a schema or `json`."""
    schema = {
        "type": "object",
        "properties": {"river": {"enum": ["Rhine", "Danube"]}},
        "required": ["river"],
        "additionalProperties": False,
    }
    answer = client.chat("smollm2", user("A river, as JSON."), format=schema)
    assert json.loads(answer.message.content or "")["river"] in {"Rhine", "Danube"}


def test_models_are_listed_and_shown(client: ollama.Client, service: Service) -> None:
    """Issue 14.3: tags, show, ps and version."""
    client.chat("smollm2", user("Hi"), options={"num_predict": 1})
    names = [model.model for model in client.list().models]
    assert names == [
        "smollm2:latest",
        "small:135m",
        "echo:latest",
        "seer:latest",
        "thinker:latest",
        "asleep:latest",
        "dreamer:latest",
        "vectors:latest",
    ]
    shown = client.show("smollm2")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 1024
    assert shown.details is not None
    assert shown.details.parameter_size == "134.5M"
    assert client.show("vectors").capabilities == ["embedding"]
    running = {model.name: model for model in client.ps().models}
    assert (running["smollm2:latest"].size or 0) > 50_000_000
    assert running["smollm2:latest"].context_length == 1024
    assert httpx.get(f"{service.url}/api/version").json()["version"].count(".") == 2
    assert httpx.get(service.url).text == "Ollama is running"
    assert httpx.head(service.url).status_code == 200


def test_models_that_are_not_loaded_are_shown(client: ollama.Client, service: Service) -> None:
    """Issue 14.3: what the header of the file says, and nothing is loaded for it."""
    shown = client.show("asleep")
    assert shown.details is not None
    assert (shown.details.format, shown.details.family) == ("gguf", "llama")
    assert (shown.details.parameter_size, shown.details.quantization_level) == ("134.5M", "Q4_1")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.capabilities == ["completion", "tools"]
    thinking = client.show("dreamer")
    assert thinking.capabilities == ["completion", "tools", "thinking"]
    assert thinking.modelinfo is not None
    assert thinking.modelinfo["llama.context_length"] == 300
    assert client.show("thinker").capabilities == ["completion", "tools", "thinking"]
    listed = {model.model: model.details for model in client.list().models}
    details = listed["asleep:latest"]
    assert details is not None
    assert details.quantization_level == "Q4_1"
    assert not {"asleep:latest", "dreamer:latest"} & {model.name for model in client.ps().models}
    for name in ("show", "tags", "ps", "version"):
        method = "POST" if name == "show" else "GET"
        body = {"model": "asleep"} if name == "show" else None
        answer = httpx.request(method, f"{service.url}/api/{name}", json=body).json()
        hold(OLLAMA, name, answer)


def test_vectors(client: ollama.Client) -> None:
    """Issue 14.3: both routes for embeddings; the vectors have length 1."""
    several = client.embed("vectors", ["one", "two"])
    assert len(several.embeddings) == 2
    assert math.isclose(sum(x * x for x in several.embeddings[0]), 1, rel_tol=1e-5)
    assert several.prompt_eval_count == 6
    single = client.embeddings("vectors", "one")
    assert list(single.embedding) == list(several.embeddings[0])
    assert client.embed("vectors", "one").embeddings == several.embeddings[:1]


def test_a_model_is_loaded_and_unloaded(client: ollama.Client) -> None:
    """Issue 14.3: requests without a prompt, as `ollama run` and `ollama stop` send them."""
    assert client.chat("echo", keep_alive="5m").done_reason == "load"
    assert "echo:latest" in [model.name for model in client.ps().models]
    assert client.generate("echo", keep_alive=0).done_reason == "unload"
    assert "echo:latest" not in [model.name for model in client.ps().models]


def test_errors_have_ollamas_form(client: ollama.Client, service: Service) -> None:
    """Issue 14.3: one text under `error`, with the status that clients go by."""
    with pytest.raises(ollama.ResponseError) as missing:
        client.chat("llama99", user("Hi"))
    assert missing.value.status_code == 404
    assert "not found" in missing.value.error
    for path, body in (
        ("/api/chat", {"model": "echo", "messages": user("x"), "options": {"top_p": 9}}),
        ("/api/chat", {"messages": user("x")}),
        ("/api/chat", {"model": "echo", "messages": [{"role": "tools", "content": "x"}]}),
        ("/api/generate", {"model": "echo", "prompt": "x", "template": "{{ .Prompt }}"}),
        ("/api/create", {"model": "x"}),
        ("/api/nothing", {}),
    ):
        answer = httpx.post(f"{service.url}{path}", json=body)
        assert answer.status_code in {400, 404}, path
        assert list(answer.json()) == ["error"], path
        assert isinstance(answer.json()["error"], str)
    with pytest.raises(ollama.ResponseError) as refused:
        client.delete("echo")
    assert "headrace pull" in refused.value.error


def test_any_content_type(service: Service) -> None:
    """Issue 14.3: `curl -d` sends a form's type; a stream is the default."""
    body = json.dumps({"model": "echo", "messages": user("one two")})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{service.url}/api/chat", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "one two"
    assert lines[-1]["metrics"]["usage"]["completion_tokens"] == 8


def test_unknown_options_are_named(service: Service) -> None:
    """Issue 12.5 in this dialect."""
    body = {"model": "echo", "prompt": "x", "options": {"num_thread": 2, "temprature": 1}}
    answer = httpx.post(f"{service.url}/api/generate", json=body)
    assert "options.temprature" in answer.headers["x-headrace-warning"]
    assert "num_thread" not in answer.headers["x-headrace-warning"]


async def test_a_second_port(free_port: Callable[[], int]) -> None:
    """Issue 14.3: the same service on the port where clients look for Ollama."""
    port = free_port()
    with served("builtin:echo", "--ollama-port", str(port)) as running:
        assert f"http://127.0.0.1:{port}" in running.log
        text, chunks = "one two three", []
        async with ollama.AsyncClient(host=f"http://127.0.0.1:{port}") as client:
            async for line in await client.chat("echo", user(text), stream=True):
                chunks.append(line.message.content or "")
        assert "".join(chunks) == text
        await asyncio.to_thread(running.process.terminate)
        assert await asyncio.to_thread(running.process.wait, 10) == 0
