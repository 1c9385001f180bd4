"""Remote models through `headrace serve`: a fake upstream, and Headrace behind Headrace."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.fakes.upstream import (
    DONE,
    Play,
    Seen,
    Upstream,
    answered,
    chunk,
    event,
    eventually,
    refused,
    said,
    upstream,
    upstream_aside,
)
from tests.service.serving import Service, served
from tests.service.streams import Got, client, status, stream, tell

KEY = "sk-never-to-be-seen-4242"
OTHER = "sk-of-the-variable-4343"
MESSAGES: Any = [{"role": "user", "content": "Say it again."}]
TEXT = "word and another one, " * 20


@pytest.fixture(autouse=True)
def _variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", OTHER)


def configured(folder: Path, url: str) -> str:
    lines = [
        "[models.far]",
        'model = "openai:gpt-x"',
        'aliases = ["gpt"]',
        f'options = {{ base_url = "{url}/v1", api_key = "{KEY}", max_retries = 1, stall_s = 1.5 }}',
        "[models.variable]",
        'model = "deepseek:deepseek-chat"',
        f'options = {{ base_url = "{url}/v1", api_key_env = "FAR_KEY" }}',
        "[models.vectors]",
        'model = "vllm:e5"',
        'task = "embed"',
        f'options = {{ base_url = "{url}/v1" }}',
        "[models.order]",
        'model = "siliconflow:ranker"',
        'task = "rerank"',
        f'options = {{ base_url = "{url}/v1", api_key_env = "FAR_KEY" }}',
        "[models.echo]",
        'model = "echo"',
    ]
    path = folder / "headrace.toml"
    path.write_text("\n".join(lines))
    return str(path)


Pair = tuple[Upstream, Service]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """An upstream, and a service that knows it."""
    with upstream_aside() as far, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_KEY", OTHER)
        config = configured(tmp_path_factory.mktemp("far"), far.url)
        with served("--config", config) as service:
            yield far, service


@pytest.fixture
def far(both: Pair) -> Upstream:
    """Forgets what was, and says hello."""
    both[0].requests.clear()
    both[0].script = lambda seen: said("Hel", "lo ", "there")
    return both[0]


@pytest.fixture
def service(both: Pair) -> Service:
    return both[1]


async def test_a_remote_model_is_like_any_other(far: Upstream, service: Service) -> None:
    """W9, W10, W15, M1: the official client cannot tell; the operator can."""
    base = f"{service.url}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as ours:
        whole = await ours.chat.completions.create(model="far", messages=MESSAGES)
        streamed = await ours.chat.completions.create(
            model="gpt",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [one async for one in streamed]
        with pytest.raises(openai.BadRequestError) as refusal:
            await ours.chat.completions.create(model="variable", messages=MESSAGES, seed=1)
        models = [one.id async for one in ours.models.list()]
    async with client(service.url) as http:
        found = await status(http, "far")
        plan = (await http.get("/admin/plan", params={"model": "far"})).json()
    assert whole.choices[0].message.content == "Hello there"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 3)
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == "Hello there"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert refusal.value.param == "seed"
    assert set(models) == {"far", "variable", "echo", "vectors", "order"}
    assert (found["state"], found["device"], found["engine"]) == ("ready", "remote", "openai")
    assert (found["memory"], found["max_running"], found["options"]["api_key"]) == ({}, 64, "…")
    assert (plan["fits"], plan["need"]["devices"], plan["evict"]) == (True, {}, [])


async def test_vectors_and_orders_through_the_service(far: Upstream, service: Service) -> None:
    """W23: /v1/embeddings and /v1/rerank of models that others serve."""
    made = answered(
        {"data": [{"index": 0, "embedding": [3.0, 4.0]}], "usage": {"prompt_tokens": 2}}
    )
    put = answered({"results": [{"index": 1, "relevance_score": 0.75}], "meta": {}})
    far.will(made, put)
    base = f"{service.url}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as ours:
        vectors = await ours.embeddings.create(model="vectors", input="text")
    async with client(service.url) as http:
        body = {"model": "order", "query": "q", "documents": ["a", "b"], "top_n": 1}
        order = (await http.post("/v1/rerank", json=body)).json()
        talk = {"model": "vectors", "messages": MESSAGES}
        refusal = await http.post("/v1/chat/completions", json=talk)
    paths = [seen.path for seen in far.requests]
    assert paths == ["/v1/embeddings", "/v1/rerank"]
    assert vectors.data[0].embedding == pytest.approx([0.6, 0.8])
    assert vectors.usage.prompt_tokens == 2
    [best] = order["results"]
    assert (best["index"], best["relevance_score"]) == (1, 0.75)
    assert refusal.status_code == 400


async def test_a_key_appears_nowhere(tmp_path: Path) -> None:
    """W3, W27: not in an answer, an error, the log, the state, nor what an operator is shown."""
    seen: list[str] = []
    far_keys: set[str] = set()
    plays = leaks() + leaks()

    def script(request: Seen) -> Play:
        far_keys.add(request.headers["authorization"])
        return repeating(plays.pop(0), request) if plays else said("ok")

    environment = {"LOG_LEVEL": "debug", "LOG_FORMAT": "json", "HOME": str(tmp_path)}
    async with upstream(script=script) as far:
        config = configured(tmp_path, far.url)
        with served("--config", config, environment=environment) as service:
            async with client(service.url) as http:
                for model in ("far", "variable"):
                    await _provoke(http, model, seen)
                assert not plays
                await _administer(http, seen)
            shown = ["config", "show"], ["show", "far"]
            seen += [_command(*one, "--config", config, **environment) for one in shown]
            seen.append(_command("ps", "--json", **environment, URL=service.url))
        seen.append(service.log)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "headrace.toml":
            seen.append(path.read_bytes().decode(errors="replace"))
    assert far_keys == {f"Bearer {KEY}", f"Bearer {OTHER}"}
    told = "\n".join(seen)
    assert told.count("gpt-x") > 3
    assert told.count("deepseek-chat") > 3
    assert "headrace.request" in told
    assert KEY[3:] not in told
    assert OTHER[3:] not in told


def leaks() -> list[Play]:
    """An upstream that repeats the key that it was given, in each way of failing."""
    error = {"message": "Incorrect API key provided: $KEY", "code": "invalid_api_key"}
    return [
        refused(401, error),
        refused(400, error),
        *[refused(500, error, retry_after="0")] * 3,
        Play([event({"error": error}), DONE]),
        Play([b"data: $KEY\n\n"]),
        Play([b'{"error": "$KEY"}'], 200, "application/json"),
        Play([event(chunk(reason="$KEY")), DONE]),
        Play([b"x"], kind="text/$KEY"),
    ]


def repeating(play: Play, request: Seen) -> Play:
    key = request.headers["authorization"].removeprefix("Bearer ")
    steps = [
        one.replace(b"$KEY", key.encode()) if isinstance(one, bytes) else one for one in play.steps
    ]
    return replace(play, steps=steps, kind=(play.kind or "").replace("$KEY", key))


async def _provoke(http: Any, model: str, seen: list[str]) -> None:
    for number in range(12):
        body = {"model": model, "messages": MESSAGES, "stream": number % 2 == 0}
        seen.append((await http.post("/v1/chat/completions", json=body)).text)
    seen.append((await http.get("/admin/plan", params={"model": model})).text)
    seen.append((await http.get(f"/admin/models/{model}")).text)


async def _administer(http: Any, seen: list[str]) -> None:
    """Look at all that can be seen; where a key goes cannot be changed from afar."""
    for path in ("/v1/models", "/admin/models"):
        seen.append((await http.get(path)).text)
    for key in ("api_key", "api_key_env", "base_url"):
        for change in ({f"options.{key}": "x"}, {"options": {key: "x"}}, {key: "x"}):
            order = {"model": "far", "settings": change}
            answer = await http.post("/admin/models/update", json=order)
            assert answer.status_code == 400, (change, answer.text)
            assert "in the configuration only" in answer.text
    order = {"model": "far", "settings": {"stall_s": 9}}
    answer = await http.post("/admin/models/update", json=order)
    assert answer.status_code == 200, answer.text
    seen.append(answer.text)
    seen.append((await http.post("/admin/models/restart", json={"model": "far"})).text)


def _command(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {f"HEADRACE_{key}": value for key, value in environment.items()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


async def test_faults_and_leaving(far: Upstream, service: Service) -> None:
    """W14, W17, W18: a stream that breaks ends with an error event, never as if it were whole.

    One that is left is cut at the upstream within a second.
    """
    a = event(chunk(content="a"))
    async with client(service.url) as http:
        for play, code in (
            (Play([a, "drop"]), "upstream_error"),
            (Play([a, 5.0]), "upstream_error"),
        ):
            far.will(play)
            got = await _chat(http, "far")
            assert got.error is not None
            assert (got.text, got.done, got.error["code"]) == ("a", False, code)
        # Issue 12.19: what comes after the finish reason is incidental.
        far.will(Play([a, event(chunk(reason="stop"))]))
        whole = await _chat(http, "far")
        assert (whole.text, whole.done, whole.error) == ("a", True, None)
        far.will(refused(429, {"message": "x"}, retry_after="77"))
        body = {"model": "far", "messages": MESSAGES}
        full = await http.post("/v1/chat/completions", json=body)
        far.will(refused(401, {"message": "x"}))
        locked = await http.post("/v1/chat/completions", json=body)
        assert (await _chat(http, "far")).text == "Hello there"
        far.will(Play([a, *[0.05, a] * 400]))
        got = Got()
        asking = asyncio.create_task(_chat(http, "far", got))
        await eventually(lambda: len(got.text) > 2, 5)
        asking.cancel()
        await asyncio.wait({asking})
        await eventually(lambda: far.requests[-1].left is not None, 1.0)
        assert (await status(http, "far"))["running"] == 0
    assert (full.status_code, full.headers["retry-after"]) == (503, "77")
    assert (locked.status_code, locked.json()["error"]["code"]) == (502, "upstream_error")


async def _chat(http: Any, model: str, got: Got | None = None) -> Got:
    got = got or Got()
    body = {"model": model, "messages": MESSAGES, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        got.status = response.status_code
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                got.done = True
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                got.error = data.get("error", got.error)
                for choice in data.get("choices", ()):
                    got.text += choice["delta"].get("content") or ""
    return got


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Headrace, and in front of it another one that knows it as an upstream."""
    with served("echo") as behind:
        path = tmp_path_factory.mktemp("chain") / "headrace.toml"
        path.write_text(
            '[models.echo]\nmodel = "headrace:echo"\nmax_running = 512\n'
            f'options = {{ base_url = "{behind.url}/v1" }}\n'
        )
        with served("--config", str(path)) as front:
            yield behind, front


async def test_headrace_behind_headrace_says_the_same(chain: tuple[Service, Service]) -> None:
    """W10, W12, W15: text, reasons, usage, token ids and stops are those of the model itself."""
    answers: list[list[Any]] = []
    for service in chain:
        async with client(service.url) as http:
            asked = [
                {"prompt": TEXT, "max_tokens": 2000},
                {"prompt": TEXT, "max_tokens": 7},
                {"prompt": TEXT, "max_tokens": 2000, "stop": ["one, "], "n": 2},
                {"prompt": list(b"tokens"), "max_tokens": 99},
                {"prompt": "Grüß 👋 Gott", "max_tokens": 99, "logprobs": 1, "echo": False},
                {"prompt": TEXT, "top_k": 1},
                {"prompt": "x", "max_tokens": 1 << 30},
            ]
            got: list[Any] = []
            for body in asked:
                answer = await http.post("/v1/completions", json={"model": "echo", **body})
                said = answer.json()
                choices = [(c["text"], c["finish_reason"]) for c in said.get("choices", ())]
                tokens = (said.get("usage") or {}).get("completion_tokens")
                error = said.get("error") or {}
                got.append((answer.status_code, choices, tokens, error.get("param")))
            streamed = await stream(http, "echo", TEXT, max_tokens=2000)
            got.append((streamed.text, streamed.reason, streamed.usage))
            counted = await http.post("/tokenize", json={"model": "echo", "prompt": TEXT})
            got.append(counted.json())
            answers.append(got)
    direct, remote = answers
    # A stop string is found here and there; how much of it was generated is not the same.
    assert direct[2][:2] == remote[2][:2]
    assert direct[:2] + direct[3:] == remote[:2] + remote[3:]
    assert [row[0] for row in direct[:7]] == [200, 200, 200, 200, 200, 400, 400]


async def test_64_streams_and_what_the_way_costs(chain: tuple[Service, Service]) -> None:
    """W20: all at once; the figure is shown, the bound is a wide one."""
    figures: list[tuple[float, float]] = []
    for service in chain:
        async with client(service.url) as http:
            await asyncio.gather(*[stream(http, "echo", "warm", max_tokens=9) for _ in range(64)])
            began = time.monotonic()
            one = await stream(http, "echo", TEXT[:200], max_tokens=300)
            alone = time.monotonic() - began
            began = time.monotonic()
            got = await asyncio.gather(
                *[stream(http, "echo", f"{n} {TEXT[:200]}", max_tokens=300) for n in range(64)]
            )
            figures.append((alone, time.monotonic() - began))
            assert one.text == TEXT[:200]
            assert [row.text for row in got] == [f"{n} {TEXT[:200]}" for n in range(64)]
            assert all(row.done and row.reason == "stop" for row in got)
    (direct_1, direct_64), (remote_1, remote_64) = figures
    tell(f"1 stream of 200 tokens: direct {direct_1:.3f} s, remote {remote_1:.3f} s")
    tell(f"64 streams: direct {direct_64:.2f} s, remote {remote_64:.2f} s")
    assert remote_64 < 10 * direct_64 + 5
