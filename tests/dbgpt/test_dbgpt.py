"""DB-GPT 0.8.2's own controller, API server, command line and client, with Headrace as worker.

scripts/test-dbgpt installs them and runs this.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from benchmarks import dbgpt_parts as parts
from tests.conftest import MODEL_HOME, ROOT
from tests.service.serving import Service, served

from headrace import config

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

CONFIGURATION = """
[models.smollm2]
model = "smollm2"
context_length = 1024
aliases = ["openai-model", "headrace-model"]

[models.slow]
model = "builtin:echo"
options = {{tokens_per_second = 40}}

[models.thinker]
model = "builtin:echo"
chat_template = '''
{{%- for m in messages %}}
{{%- if m.reasoning_content %}}<think>
{{{{ m.reasoning_content }}}}
</think>

{{% endif %}}
{{{{- m.content }}}}
{{%- endfor %}}'''

[models.vectors]
model = "builtin:echo"
task = "embed"
options = {{dimensions = 16}}

[models.ranks]
model = "builtin:echo"
task = "rerank"

[dbgpt]
controller = "{controller}"
port = {port}
heartbeat_s = 1
"""


class Cluster(NamedTuple):
    """The URLs of the parts; `host` and `port` are those of the worker."""

    folder: Path
    controller: parts.Part
    api: str
    service: Service
    port: int

    def rows(self) -> dict[str, bool]:
        url = f"{self.controller.url}/api/controller/models"
        found = httpx.get(url, timeout=10).json()
        return {row["model_name"]: row["healthy"] for row in found}

    def model(self, *arguments: str, typed: str = "") -> str:
        return parts.command(self.folder, self.controller.url, *arguments, typed=typed)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.api}/{path}", json=body, timeout=120)


def until(true: Callable[[], object], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def configured(folder: Path, controller: str, port: int) -> str:
    file = folder / "headrace.toml"
    file.write_text(CONFIGURATION.format(controller=controller, port=port))
    return str(file)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    folder, port = tmp_path_factory.mktemp("dbgpt"), parts.free_port()
    with (
        parts.controller(folder) as controller,
        parts.api_server(folder, controller.url) as api,
        served("--config", configured(folder, controller.url, port)) as service,
    ):
        made = Cluster(folder, controller, f"{api.url}/api/v1", service, port)
        until(lambda: all(made.rows().values()) and len(made.rows()) == 6)
        yield made


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.api, api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_the_models_are_listed(cluster: Cluster, client: openai.OpenAI) -> None:
    """Issue 14, what it must show 3: list."""
    names = {"smollm2", "slow", "thinker", "vectors", "ranks"}
    assert {model.id for model in client.models.list()} == names
    table = cluster.model("list")
    for name, kind in (("smollm2", "llm"), ("vectors", "text2vec"), ("ranks", "reranker")):
        assert re.search(rf"{name} +\| +{kind} +\| +127.0.0.1 \| +{cluster.port} +\| +True", table)


def test_chats(client: openai.OpenAI) -> None:
    """Issue 14, what it must show 3: chat, stream, n; usage and reasons are right."""
    given: Any = {"model": "smollm2", "max_tokens": 12, "temperature": 0.01}
    messages = user("Name a river in Africa.")
    whole = client.chat.completions.create(messages=messages, **given)
    assert whole.choices[0].message.content
    assert whole.usage
    assert 0 < whole.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **given))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    several = client.chat.completions.create(messages=messages, n=2, **given)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.usage
    assert several.usage.prompt_tokens == 2 * whole.usage.prompt_tokens
    raw = client.completions.create(prompt="The capital of France is", **given)
    assert "Paris" in raw.choices[0].text
    assert raw.choices[0].finish_reason == "length"


def test_thinking(client: openai.OpenAI) -> None:
    text = "<think>\nhm\n</think>\n\nyes"
    answer: Any = client.chat.completions.create(model="thinker", messages=user(text))
    message = answer.choices[0].message
    assert (message.reasoning_content.strip(), message.content.strip()) == ("hm", "yes")


def test_errors_have_their_code_and_reason(cluster: Cluster) -> None:
    too_long = cluster.post("chat/completions", model="smollm2", messages=user("word " * 3000))
    assert too_long.status_code == 400
    assert too_long.json()["code"] == 40303
    assert "context length is 1024" in too_long.json()["message"]


def test_embeddings_and_rerank(cluster: Cluster) -> None:
    """Issue 14, what it must show 3."""
    texts = ["a", "b", "c", "d", "e"]
    vectors = cluster.post("embeddings", model="vectors", input=texts).json()["data"]
    assert [len(row["embedding"]) for row in vectors] == [16] * 5
    ranked = cluster.post("beta/relevance", model="ranks", query="a b", documents=["x", "a b"])
    first, second = ranked.json()["data"]
    assert second > first


def test_stop_start_and_restart(cluster: Cluster) -> None:
    """Issue 14, what it must show 3: what DB-GPT's own worker cannot."""
    worker = ("--host", "127.0.0.1", "--port", str(cluster.port))
    cluster.model("stop", "--model_name", "slow", *worker)
    assert cluster.rows()["slow@llm"] is False
    refused = cluster.post("chat/completions", model="slow", messages=user("x"))
    assert "slow" in refused.text
    assert refused.status_code >= 400
    cluster.model("start", "--model_name", "slow", *worker)
    assert cluster.rows()["slow@llm"] is True
    answer = cluster.post("chat/completions", model="slow", messages=user("x"))
    assert answer.json()["choices"][0]["message"]["content"] == "x"
    assert "success=True" in cluster.model("restart", "--model_name", "slow")


def test_the_chat_of_the_command_line(cluster: Cluster) -> None:
    printed = cluster.model("chat", "--model_name", "slow", typed="Hello there\n/exit\n")
    assert "Bot: Hello there" in printed


CLIENT = """
import asyncio, json
from dbgpt.core import ModelMessage, ModelRequest
from dbgpt.model.cluster.client import RemoteLLMClient

async def main():
    client = RemoteLLMClient({controller!r})
    request = ModelRequest.build_request(
        "smollm2", messages=[ModelMessage.build_human_message("Name a river.")],
        temperature=0.0, max_new_tokens=9)
    whole = await client.generate(request)
    parts = [output async for output in client.generate_stream(request)]
    models = await client.models()
    print("RESULT", json.dumps({{
        "text": whole.text, "last": parts[-1].text, "reason": parts[-1].finish_reason,
        "grows": all(b.text.startswith(a.text) for a, b in zip(parts, parts[1:])),
        "metrics": whole.metrics, "usage": whole.usage,
        "count": await client.count_token("smollm2", "one two three"),
        "context": {{model.model: model.context_length for model in models}},
    }}))

asyncio.run(main())
"""


def result(printed: str) -> dict[str, Any]:
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_its_client(cluster: Cluster) -> None:
    """Issue 14, what it must show 3: count too, which its own worker refuses."""
    code = CLIENT.format(controller=cluster.controller.url)
    got = result(parts.python(cluster.folder, code))
    assert got["text"] == got["last"]
    assert got["grows"]
    assert got["reason"] == "length"
    assert got["count"] == 3
    assert got["context"]["smollm2"] == 1024
    assert got["usage"]["completion_tokens"] == got["metrics"]["completion_tokens"] == 9
    metrics = got["metrics"]
    assert metrics["start_time_ms"] <= metrics["first_token_time_ms"] <= metrics["end_time_ms"]


def test_its_web_server(cluster: Cluster) -> None:
    """Issue 14.5: its pages list the models, chat with them, and stop and start them."""
    order = {"host": "127.0.0.1", "port": cluster.port, "model": "slow", "worker_type": "llm"}
    asked = {"model": "smollm2", "messages": "Name a river in Africa.", "chat_mode": "chat_normal"}
    with (
        parts.web_server(cluster.folder, cluster.controller.url) as web,
        httpx.Client(base_url=web.url, timeout=120) as page,
    ):

        def is_healthy() -> bool:
            rows = page.get("/api/v2/serve/model/models").json()["data"]
            return next(row["healthy"] for row in rows if row["model_name"] == "slow")

        listed = page.get("/api/v1/model/types").json()["data"]
        assert {"smollm2", "slow", "thinker"} <= {*listed}
        body = {**asked, "stream": True, "max_new_tokens": 12}
        lines = page.post("/api/v2/chat/completions", json=body).text.split("\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks)
        for path, healthy in (("models/stop", False), ("models", True)):
            done = page.post(f"/api/v2/serve/model/{path}", json={**order, "params": {}})
            assert done.json()["success"], done.text
            until(lambda wanted=healthy: is_healthy() is wanted)


def test_a_worker_that_dies_while_it_streams(cluster: Cluster, client: openai.OpenAI) -> None:
    """Issue 14, what it must show 3: the answer goes on at a new process, without a repetition."""
    # 40 characters a second: it runs long enough to be killed on a busy machine too.
    text = "The quick brown fox jumps over the lazy dog. " * 10
    stream = client.chat.completions.create(model="slow", messages=user(text), stream=True)
    got = ""
    killed = False
    for chunk in stream:
        got += chunk.choices[0].delta.content or ""
        if len(got) > 20 and not killed:
            killed = True
            status = httpx.get(f"{cluster.service.url}/admin/models/slow").json()
            for worker in cluster.service.workers():
                if worker.pid == status["replicas"][0]["pid"]:
                    worker.kill()
    assert killed
    assert got == text
    status = httpx.get(f"{cluster.service.url}/admin/models/slow").json()
    assert status["continuations"] == 1


def test_its_traces_go_on_here(cluster: Cluster) -> None:
    """Issue 14.5: the span of DB-GPT is the parent of Headrace's."""
    trace, span = "ab" * 16, "cd" * 8
    url = f"http://127.0.0.1:{cluster.port}/api/worker/generate"
    body = {"model": "slow", "prompt": "x"}
    answer = httpx.post(url, json=body, headers={"DB-GPT-Trace-Span-Id": f"{trace}:{span}"})
    assert answer.json()["error_code"] == 0
    files = list((MODEL_HOME / "traces").glob("*"))
    until(lambda: any(trace.encode() in file.read_bytes() for file in files), 20)


PAGE = (ROOT / "docs" / "coming-from-dbgpt.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def recipe(text: str, cluster: Cluster, name: str) -> str:
    """Return a recipe of the page with the addresses of the test, and a name of its own."""
    text = text.replace("http://127.0.0.1:11511", cluster.service.url)
    text = text.replace("http://127.0.0.1:8000", cluster.controller.url)
    return text.replace('name = "smollm2"', f'name = "{name}"')


def test_the_recipes_of_a_worker_are_settings(tmp_path: Path) -> None:
    """Issue 14.5: the first recipe, which the cluster of these tests follows."""
    joined = [text for text in RECIPES if text.startswith("[dbgpt]")]
    assert len(joined) == 2
    for text in joined:
        file = tmp_path / "headrace.toml"
        file.write_text(text)
        settings = config.load(file=file, environ={"HEADRACE_HOME": str(tmp_path)}).config.dbgpt
        assert settings.controller


@pytest.mark.parametrize("provider", ["proxy/openai", "proxy/headrace"])
def test_its_own_worker_with_a_model_of_a_service(cluster: Cluster, provider: str) -> None:
    """Issue 14.5: the second and the third recipe, as the page has them."""
    name, ours = provider.partition("/")[2] + "-model", provider == "proxy/headrace"
    (text,) = [text for text in RECIPES if f'provider = "{provider}"' in text]
    text = recipe(text, cluster, name)
    port = parts.free_port()
    section = "[service.model.worker]\n"
    place = f'host = "127.0.0.1"\nport = {port}\n'
    if section not in text:
        place += f'worker_type = "llm"\ncontroller_addr = "{cluster.controller.url}"\n'
        text = f"{section}\n{text}"
    text = text.replace(section, section + place)
    with parts.part(cluster.folder, "worker", text, port, "/api/worker/models/supports"):
        until(lambda: cluster.rows().get(f"{name}@llm"))
        body: dict[str, Any] = {"messages": user("Name a river."), "max_tokens": 3}
        answer = cluster.post("chat/completions", model=name, **body).json()
        stream = cluster.post("chat/completions", model=name, stream=True, **body).text
    assert answer["choices"][0]["message"]["content"]
    assert "data: [DONE]" in stream
    if ours:
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3
        assert re.search(r'"completion_tokens": ?3\b', stream)


PROVIDER = """
import asyncio, json
from dbgpt.core import ModelMessage, ModelRequest
from headrace_dbgpt import HeadraceLLMClient

async def main():
    client = HeadraceLLMClient(api_base={base!r}, api_key="none", model="smollm2",
                               model_alias="smollm2", context_length=7)
    request = ModelRequest.build_request(
        "smollm2", messages=[ModelMessage.build_human_message("Name a river.")],
        temperature=0.0, max_new_tokens=4)
    whole = await client.generate(request)
    parts = [output async for output in client.generate_stream(request)]
    bad = ModelRequest.build_request("nothing", messages=request.messages)
    failed = [output async for output in client.generate_stream(bad)]
    print("RESULT", json.dumps({{
        "reasons": [whole.finish_reason, parts[-1].finish_reason],
        "usages": [whole.usage, parts[-1].usage],
        "count": await client.count_token("smollm2", "one two three"),
        "context": (await client.models())[0].context_length,
        "failed": [failed[-1].error_code, failed[-1].text],
    }}))

asyncio.run(main())
"""


def test_the_provider_as_a_client(cluster: Cluster) -> None:
    """Issue 14.5: `headrace-dbgpt` in a program."""
    code = PROVIDER.format(base=f"{cluster.service.url}/v1")
    got = result(parts.python(cluster.folder, code))
    assert got["reasons"] == ["length", "length"]
    assert [usage["completion_tokens"] for usage in got["usages"]] == [4, 4]
    assert got["count"] == 3
    assert got["context"] == 1024
    assert got["failed"][0] == 1
    assert "nothing" in got["failed"][1]


def test_a_controller_that_restarts(cluster: Cluster) -> None:
    """Issue 14, what it must show 3: it has forgotten all, and knows them again by itself."""
    rows, port = cluster.rows(), int(cluster.controller.url.rpartition(":")[2])
    cluster.controller.process.kill()
    cluster.controller.process.wait()
    with parts.controller(cluster.folder, port):
        ours = {name for name in rows if not name.endswith("-model@llm")}
        until(lambda: ours <= {name for name, healthy in cluster.rows().items() if healthy})
        answer = cluster.post("chat/completions", model="slow", messages=user("x"))
        assert answer.json()["choices"][0]["message"]["content"] == "x"
