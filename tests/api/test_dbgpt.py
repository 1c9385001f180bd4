"""The API of a DB-GPT worker, without a process: bodies as its parts were recorded to send them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from tests.api.fakes import METRICS, MODELS, USAGE, FakeAdmin, FakeBackend, finish, hello
from tests.api.test_disconnect import Wire
from tests.pictures_made import png

from headrace.api.app import Application, create_app
from headrace.api.dbgpt.cluster import Cluster, ClusterSettings, WithoutKey
from headrace.api.dbgpt.controller import Address
from headrace.api.dbgpt.generate import Answer
from headrace.api.edge import dbgpt_traceparent
from headrace.api.limits import ApiSettings
from headrace.core.errors import (
    ContextOverflow,
    HeadraceError,
    OutOfMemory,
    QueueFull,
    UnknownModel,
    WorkerDied,
)
from headrace.core.events import Delta, Finish
from headrace.core.model import Capabilities, ModelInfo
from headrace.core.request import AnyRequest, CountRequest, EmbedRequest, GenerateRequest
from headrace.core.status import ModelStatus, PoolStatus
from headrace.testing import Barrier, Script, Step

STREAM, WHOLE = "/api/worker/generate_stream", "/api/worker/generate"
SPAN = "0123456789abcdef0123456789abcdef:0123456789abcdef"


def model(name: str, task: Any = "generate", **more: Any) -> ModelInfo:
    able = Capabilities(tasks=frozenset({task}), chat=True)
    return ModelInfo(id=name, source=name, engine="fake", capabilities=able, **more)


def application(
    script: Script = hello,
    admin: FakeAdmin | None = None,
    *,
    without_key: WithoutKey = "refuse",
    models: tuple[ModelInfo, ...] = MODELS,
    **settings: Any,
) -> tuple[FakeBackend, Application]:
    backend, admin = FakeBackend(script, models), admin or FakeAdmin()
    address = Address("127.0.0.1", 8001)
    settings_ = ClusterSettings(controllers=(), address=address, without_key=without_key)
    made = ApiSettings(**settings)
    app = create_app(backend, made, admin=admin)
    return backend, app.dbgpt_worker(Cluster(backend, admin, settings_), made)


def worker(
    *arguments: Any, peer: str = "127.0.0.1", **more: Any
) -> tuple[FakeBackend, httpx.AsyncClient]:
    backend, app = application(*arguments, **more)
    transport = httpx.ASGITransport(app, client=(peer, 1))
    return backend, httpx.AsyncClient(transport=transport, base_url="http://localhost")


def prompt(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": text, "round_index": 0} for role, text in turns]
    return {
        "model": "m", "messages": messages, "prompt": "", "temperature": None, "top_p": None,
        "top_k": -1, "max_new_tokens": None, "stop": None, "stop_token_ids": [],
        "context_len": None, "echo": False, "span_id": SPAN, "metrics": False, "version": "v2",
        "context": {"stream": True, "cache_enable": False, "user_name": None},
        "presence_penalty": None, "frequency_penalty": None, "chat_model": True, "user": "u",
        **more,
    }  # fmt: skip


def frames(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200
    *parts, rest = response.content.split(b"\0")
    assert rest == b""
    return [json.loads(part) for part in parts]


def text_of(output: dict[str, Any]) -> str:
    content = output["content"]
    part = content[-1] if isinstance(content, list) else content
    assert part["type"] == "text"
    assert part["object"]["format"] == "text"
    return part["object"]["data"]


async def test_frames_have_all_of_the_text() -> None:
    """Issue 14.5: cumulative, the last with the reason, the usage and every figure."""
    backend, client = worker()
    turns = (("system", "Be short."), ("human", "a"), ("view", "*a*"), ("ai", "b"), ("user", "c"))
    async with client:
        got = frames(await client.post(STREAM, json=prompt(*turns, max_new_tokens=9, stop="x")))
    texts = [text_of(frame) for frame in got]
    assert texts[-1] == 'Hello\n"ü'
    assert all(after.startswith(before) for before, after in pairwise(texts))
    for frame in got[:-1]:
        assert (frame["finish_reason"], frame["usage"], frame["metrics"]) == (None, None, None)
    last = got[-1]
    assert last["error_code"] == 0
    assert last["model_context"]["prompt_echo_len_char"] == -1
    assert last["finish_reason"] == "stop"
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert last["metrics"]["first_token_time_ms"] == 1004
    assert last["metrics"]["speed_per_second"] == pytest.approx(8 / 0.009)
    (request,) = backend.requests
    assert isinstance(request, GenerateRequest)
    assert [turn.role for turn in request.messages or ()] == ["system", "user", "assistant", "user"]
    assert request.fit_max_tokens
    assert request.load_wait_s is None
    assert request.sampling.max_tokens == 9
    assert request.sampling.top_k is None
    assert request.sampling.stop == ("x",)
    assert request.traceparent == f"00-{SPAN.replace(':', '-')}-01"


async def test_one_output_and_a_text_to_go_on_with() -> None:
    backend, client = worker()
    async with client:
        body = prompt(prompt="Once", chat_model=False, echo=True, temperature=0.0, stop=["", "y"])
        output = (await client.post(WHOLE, json=body)).json()
        assert text_of(output) == 'Hello\n"ü'
        assert output["finish_reason"] == "stop"
        await client.post(WHOLE, json={"model": "m", "prompt": "Once", "messages": None})
    first, second = backend.requests
    assert isinstance(first, GenerateRequest)
    assert isinstance(second, GenerateRequest)
    assert (first.prompt, first.echo, second.echo) == ("Once", True, False)
    assert (first.sampling.temperature, first.sampling.stop) == (0.0, ("y",))


async def test_values_without_effect_are_left_to_the_model() -> None:
    """DB-GPT's API server sends top_p 1 and penalties of 0 with every request."""
    backend, client = worker()
    neutral = {"top_p": 1.0, "top_k": -1, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    given = {"top_p": 0.5, "top_k": 7, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    async with client:
        for values in (neutral, given):
            await client.post(WHOLE, json=prompt(("human", "a"), **values))
    first, second = (request.settings() for request in backend.requests)
    assert not neutral.keys() & first.keys()
    assert given.items() <= second.items()


async def test_thinking_goes_with_a_text_always() -> None:
    def think(request: AnyRequest) -> Iterator[Step]:
        yield Delta(reasoning="hm", token_ids=(1,))
        yield Delta(text="\0yes", token_ids=(2,))
        yield Finish(("length",), USAGE, METRICS)

    _, client = worker(think)
    async with client:
        got = frames(await client.post(STREAM, json=prompt(("human", "a"))))
        whole = (await client.post(WHOLE, json=prompt(("human", "a")))).json()
    for frame in (*got, whole):
        thinking, text = frame["content"]
        assert (thinking["type"], text["type"]) == ("thinking", "text")
        assert thinking["object"]["data"] == "hm"
    assert text_of(got[-1]) == text_of(whole) == "\0yes"
    assert whole["finish_reason"] == "length"


async def test_parts_and_images() -> None:
    import base64

    backend, client = worker(models=(model("m"),))
    image = base64.b64encode(png()).decode()

    def part(kind: str, data: str, form: str) -> dict[str, Any]:
        return {"type": kind, "object": {"data": data, "format": form}}

    async with client:
        texts = [part("text", "a", "text"), part("text", "b", "text")]
        for form, data in (("base64@image/png", image), ("url", f"data:image/png;base64,{image}")):
            content = [*texts, part("image", data, form)]
            assert text_of((await client.post(WHOLE, json=prompt(("human", content)))).json())
        audio = [part("audio", "x", "base64")]
        output = (await client.post(WHOLE, json=prompt(("human", audio)))).json()
        remote = [part("image", "http://10.0.0.1/x.png", "url")]
        refused = (await client.post(WHOLE, json=prompt(("human", remote)))).json()
        await client.post(WHOLE, json=prompt(("human", texts)))
    assert output["error_code"] == 40001
    assert "audio" in text_of(output)
    assert refused["error_code"] == 40001
    assert [
        len(request.media) for request in backend.requests if isinstance(request, GenerateRequest)
    ] == [1, 1, 0]
    last = backend.requests[-1]
    assert isinstance(last, GenerateRequest)
    assert last.messages
    assert last.messages[0].content == "ab"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownModel("No such model."), 40301),
        (ContextOverflow("Too long."), 40303),
        (QueueFull("Full."), 42901),
        (OutOfMemory("No memory."), 50002),
        (WorkerDied("It died."), 50001),
        (RuntimeError("secret"), 50001),
    ],
)
async def test_a_failure_is_an_output(error: Exception, code: int) -> None:
    """Issue 14.5: with the status 200, before the first text and after it."""

    def late(request: AnyRequest) -> Iterator[Step]:
        yield Delta("Hel", (1,))
        yield error

    for script in (late, lambda _: iter([error])):
        _, client = worker(script)
        async with client:
            got = frames(await client.post(STREAM, json=prompt(("human", "a"))))
            whole = (await client.post(WHOLE, json=prompt(("human", "a")))).json()
        for output in (got[-1], whole):
            assert output["error_code"] == code
            known = isinstance(error, HeadraceError)
            assert ("secret" in text_of(output)) is False
            assert (text_of(output) == str(error)) is known


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (prompt(("human", "a"), temperature=9), 40302),
        (prompt(("human", "a"), max_new_tokens=-5), 40302),
        (prompt(("human", "a"), temperature="hot"), 40302),
        (prompt(("robot", "a")), 40001),
        (prompt(("view", "a")), 40001),
        (prompt(), 40001),
        ({}, 40001),
    ],
)
async def test_a_wrong_request_is_an_output(body: dict[str, Any], code: int) -> None:
    _, client = worker()
    async with client:
        response = await client.post(STREAM, json=body)
        (frame,) = frames(response)
        assert frame["error_code"] == code
        assert text_of(frame)
        assert (await client.post(WHOLE, json=body)).json()["error_code"] == code
        (broken,) = frames(await client.post(STREAM, content=b"{"))
    assert broken["error_code"] == 40001


async def test_vectors_scores_and_counts() -> None:
    """Issue 14.5: as the API server sends them; a count comes without a model."""
    models = (model("e", "embed"), model("m"), model("r", "rerank"))
    backend, client = worker(models=models)
    async with client:
        sent = {"model": "e", "input": ["a", "b"], "span_id": None, "query": None}
        vectors = (await client.post("/api/worker/embeddings", json=sent)).json()
        sent = {"model": "r", "input": ["a", "b", "c"], "query": "q", "worker_type": "reranker"}
        scores = (await client.post("/api/worker/embeddings", json=sent)).json()
        count = await client.post("/api/worker/count_token", json={"prompt": "a b"})
        missing = await client.post("/api/worker/embeddings", json={**sent, "query": None})
    assert [len(vector) for vector in vectors] == [4, 4]
    assert scores == [[0.0, 0.125, 0.25]]
    assert count.text == "3"
    assert missing.status_code == 400
    assert "query" in missing.json()["detail"]
    embed, _, counted = backend.requests
    assert isinstance(embed, EmbedRequest)
    assert embed.truncate
    assert isinstance(counted, CountRequest)
    assert counted.model == "m"


async def test_what_a_model_is_and_can_be_started_with() -> None:
    """Issue 14.5: exactly the fields that DB-GPT's classes have; more are a TypeError there."""
    models = (model("m", context_length=99), model("e", "embed"), model("a@b"))
    _, client = worker(models=models)
    async with client:
        about = (await client.post("/api/worker/model_metadata", json={"model": "m"})).json()
        place = "/api/worker/parameter/descriptions"
        params = (await client.get(place, params={"model": "m", "worker_type": "llm"})).json()
        (supported,) = (await client.get("/api/worker/models/supports")).json()
        unknown = await client.post("/api/worker/model_metadata", json={"model": "x"})
    assert about.keys() == {
        "model", "label", "context_length", "max_output_length", "description", "link",
        "chat_model", "function_calling", "metadata", "ext_metadata",
    }  # fmt: skip
    assert about["context_length"] == 99
    assert about["ext_metadata"]["prompt_roles"] == ["human", "ai", "system"]
    assert {param["param_name"] for param in params} >= {"context_length", "keep_alive"}
    assert len({param["param_class"] for param in params}) == 1
    assert all(len(param) == 12 for param in params)
    assert (supported["host"], supported["port"]) == ("127.0.0.1", 8001)
    kinds = [(entry["model"], entry["worker_type"]) for entry in supported["models"]]
    assert kinds == [("m", "llm"), ("e", "text2vec")]
    assert unknown.status_code == 404
    assert "No model" in unknown.json()["detail"]


START = {
    "host": "127.0.0.1", "port": 8001, "model": "m", "worker_type": "llm", "delete_after": False,
    "params": {"model_name": "m", "model_path": None, "context_length": 64, "max_running": None},
    "worker_name": None, "sys_code": None, "user_name": None,
}  # fmt: skip


async def test_start_stop_and_restart() -> None:
    """Issue 14.5: they are load, unload and restart of the pool."""
    admin = FakeAdmin()
    _, client = worker(admin=admin)
    async with client:
        started = await client.post("/api/worker/models/startup", json=START)
        stopped = await client.post("/api/worker/models/shutdown", json=START | {"params": {}})
        order = {"model": "m", "worker_type": "llm", "params": {}, "apply_user": None}
        applied = [
            (await client.post("/api/worker/apply", json=order | {"apply_type": kind})).json()
            for kind in ("stop", "start", "restart")
        ]
        change = order | {"apply_type": "update_params", "params": {"max_queued": 3, "x": 1}}
        applied.append((await client.post("/api/worker/apply", json=change)).json())
        unknown = await client.post("/api/worker/models/startup", json=START | {"model": "hub:a/b"})
        failed = (
            await client.post(
                "/api/worker/apply", json=order | {"model": "x", "apply_type": "stop"}
            )
        ).json()
    assert (started.text, stopped.text) == ("null", "null")
    assert [output["success"] for output in applied] == [True] * 4
    assert admin.calls == [
        ("load", "m", {"context_length": 64}),
        ("unload", "m"),
        ("unload", "m"),
        ("load", "m", {}),
        ("restart", "m"),
        ("update", "m", {"max_queued": 3}),
    ]
    assert unknown.status_code == 404
    assert failed["success"] is False
    assert "No model" in failed["message"]


@pytest.mark.parametrize(
    ("without_key", "peer", "keys", "answer", "managed"),
    [
        ("refuse", "127.0.0.1", (), 200, 200),
        ("refuse", "10.0.0.9", (), 200, 403),
        ("refuse", "127.0.0.1", (f"sha256:{'0' * 64}",), 401, 401),
        ("use", "127.0.0.1", (), 200, 403),
        ("manage", "10.0.0.9", (), 200, 200),
    ],
)
async def test_what_needs_no_key(
    without_key: WithoutKey, peer: str, keys: tuple[str, ...], answer: int, managed: int
) -> None:
    """Issue 14.5: DB-GPT sends no key, and its routes are no way around the keys."""
    _, client = worker(without_key=without_key, peer=peer, api_keys=keys)
    async with client:
        whole = await client.post(WHOLE, json=prompt(("human", "a")))
        stop = await client.post("/api/worker/models/shutdown", json=START)
        stream = await client.post(STREAM, json=prompt(("human", "a")))
    assert (whole.status_code, stop.status_code) == (answer, managed)
    if answer == 401:
        # Its client reads no status: the reason is a frame.
        assert stream.content.endswith(b"\0")
        assert json.loads(stream.content[:-1])["error_code"] == 40102


async def test_the_routes_are_not_on_the_usual_port() -> None:
    backend = FakeBackend()
    app = create_app(backend, ApiSettings(), admin=FakeAdmin())
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.post(WHOLE, json=prompt(("human", "a")))).status_code == 404


async def test_the_first_text_is_sent_at_once() -> None:
    """Issue 14, what it must show 3: a frame does not wait for the next text, nor the end for it.

    A client that leaves closes the stream.
    """
    first, last = Barrier(), Barrier()
    backend, app = application(
        lambda _: [Delta("a", (1,)), first, Delta("b", (2,)), last, Delta("c"), finish()]
    )
    wire = Wire(backend, STREAM, prompt(("human", "a")), app=app)
    async with asyncio.timeout(10):
        await wire.sending.wait()
        assert texts_of(wire) == ["a"]
        wire.sending.clear()
        first.open()
        await wire.sending.wait()
    assert texts_of(wire) == ["a", "ab"]
    assert backend.running == 1
    await wire.leave()
    assert backend.running == 0


def texts_of(wire: Wire) -> list[str]:
    bodies = [message["body"] for message in wire.sent if message.get("body")]
    return [text_of(json.loads(body.removesuffix(b"\0"))) for body in bodies]


def test_long_answers_have_fewer_frames() -> None:
    answer = Answer()
    answer.add(Delta("a", (1,)))
    assert answer.pause_s == pytest.approx(0.025, rel=0.01)
    answer.add(Delta("a" * 100_000, (1,)))
    assert answer.pause_s == 0.1


@pytest.mark.parametrize("span", ["", "x", SPAN.upper(), f"{SPAN}0", SPAN.replace(":", "-")])
def test_other_spans_are_ignored(span: str) -> None:
    assert dbgpt_traceparent(span) == ""


@pytest.mark.parametrize(("left_s", "offered"), [(30.0, False), (None, True), (-1.0, True)])
def test_a_model_that_has_failed_is_offered_again_when_a_request_may_try_it(
    monkeypatch: pytest.MonkeyPatch, left_s: float | None, offered: bool
) -> None:
    """Issue 11.6: no request came from the cluster any more, so that nothing tried it."""
    retry_at = None if left_s is None else time.time() + left_s
    failed = ModelStatus(id="m", source="m", state="failed", retry_at=retry_at)
    admin = FakeAdmin()
    monkeypatch.setattr(admin, "status", lambda: PoolStatus(models=(failed,), devices=()))
    settings = ClusterSettings(controllers=(), address=Address("127.0.0.1", 1), without_key="use")
    rows = Cluster(FakeBackend(hello, (model("m"),)), admin, settings).rows()
    assert ("m@llm" in rows) is offered
