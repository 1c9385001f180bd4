"""/v1/files and /v1/batches over a scripted backend: who sees what, bounds, states, restarts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.fakes import FakeBackend, hello
from tests.api.sockets import wait_until

from headrace.api import openapi
from headrace.api.app import Application, create_app
from headrace.api.batch import run, store, upload
from headrace.api.batch.journal import Journal, NotAnswers
from headrace.api.batch.lines import Answer, Item, Response
from headrace.api.batch.routes import BatchRoutes
from headrace.api.batch.store import Store
from headrace.api.batch.work import Reply, Work
from headrace.api.limits import ApiSettings
from headrace.core.errors import Draining, QueueFull, WorkerDied
from headrace.testing import Step

CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}
KEYS = {name: f"sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in ("a", "b", "root")}
KEYED: dict[str, Any] = {"api_keys": (KEYS["a"], KEYS["b"]), "admin_keys": (KEYS["root"],)}


def line(id: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": id}]}
    return {"custom_id": id, "method": "POST", "url": CHAT, "body": body, **fields}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


class Held:
    """A script whose answers wait until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.asked: list[str] = []

    def __call__(self, request: Any) -> Iterator[Step]:
        self.asked.append(request.messages[-1].content)
        yield self.open.wait
        yield from hello(request)


class Client:
    """Calls an application; `key` is sent with all that follows."""

    def __init__(self, http: httpx.AsyncClient, app: Application) -> None:
        self.http = http
        self.app = app
        self.key = "none"

    async def call(self, method: str, path: str, **given: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return await self.http.request(method, path, headers=headers, **given)

    async def upload(self, data: bytes, **fields: str) -> httpx.Response:
        files = {"file": ("in.jsonl", data)}
        return await self.call(
            "POST", "/v1/files", files=files, data={"purpose": "batch", **fields}
        )

    async def begin(self, data: bytes, **fields: Any) -> dict[str, Any]:
        id = (await self.upload(data)).json()["id"]
        body = {"input_file_id": id, "endpoint": CHAT, "completion_window": "24h", **fields}
        answer = await self.call("POST", "/v1/batches", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def until(self, id: str, *states: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while True:
                batch = (await self.call("GET", f"/v1/batches/{id}")).json()
                if batch["status"] in (states or ENDED):
                    return batch
                await asyncio.sleep(0.01)

    async def until_completed(self, id: str, count: int) -> None:
        completed = 0
        async with asyncio.timeout(20):
            while completed < count:
                batch = await self.until(id, "validating", "in_progress")
                completed = batch["request_counts"]["completed"]
                await asyncio.sleep(0.01)

    async def lines(self, file_id: str) -> list[Any]:
        content = await self.call("GET", f"/v1/files/{file_id}/content")
        return [json.loads(each) for each in content.text.splitlines()]


@asynccontextmanager
async def kept(folder: Path, script: Any = hello, **settings: Any) -> AsyncGenerator[Client]:
    """Serve the batches in a folder, as a process does from its start to its end."""
    files = Store(folder)
    app = create_app(FakeBackend(script), ApiSettings(**settings), batches=files)
    assert app.batches is not None
    running = asyncio.create_task(app.batches.run())
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield Client(http, app)
    finally:
        running.cancel()
        await asyncio.wait([running])
        files.close()


async def test_a_batch(tmp_path: Path) -> None:
    """Issue 14.6: each line is answered as its route does, errors in a file of their own."""
    async with kept(tmp_path) as client:
        bad = line("bad")
        bad["body"]["temperature"] = 9
        batch = await client.begin(jsonl(line("x"), bad, line("y")), metadata={"for": "tests"})
        assert (batch["status"], batch["object"]) == ("validating", "batch")
        batch = await client.until(batch["id"])
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
        assert (batch["usage"]["input_tokens"], batch["usage"]["total_tokens"]) == (10, 16)
        assert (batch["metadata"], batch["model"]) == ({"for": "tests"}, "m")
        answers = await client.lines(batch["output_file_id"])
        assert sorted(each["custom_id"] for each in answers) == ["x", "y"]
        response = answers[0]["response"]
        assert response["body"]["choices"][0]["message"]["content"] == 'Hello\n"ü'
        assert response["body"]["id"] == f"chatcmpl-{response['request_id']}"
        (error,) = await client.lines(batch["error_file_id"])
        assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
        assert error["response"]["body"]["error"]["param"] == "temperature"
        names = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}
        assert set(names.values()) == {0o600}


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "x"}),
        ("/v1/embeddings", {"model": "m", "input": "x"}),
        ("/v1/responses", {"model": "m", "input": "x"}),
        ("/v1/rerank", {"model": "m", "query": "x", "documents": ["y"]}),
        ("/v1/score", {"model": "m", "text_1": "x", "text_2": "y"}),
    ],
)
async def test_the_other_endpoints(tmp_path: Path, url: str, body: Any) -> None:
    async with kept(tmp_path) as client:
        batch = await client.begin(jsonl(line("x", url=url, body=body)), endpoint=url)
        batch = await client.until(batch["id"])
        assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
        (answer,) = await client.lines(batch["output_file_id"])
        live = (await client.call("POST", url, json=body)).json()
        assert answer["response"]["body"].keys() == live.keys()
        assert batch["usage"]["input_tokens"] > 0 or url in ("/v1/rerank", "/v1/score")


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"\n\n", "empty_file", None),
        (b"nonsense\n", "invalid_json_line", 1),
        (b"[" * 100_000, "invalid_json_line", 1),
        (jsonl([1]), "invalid_json_line", 1),
        (jsonl(line("x", body=[])), "invalid_json_line", 1),
        (jsonl(line("x"), line("x")), "duplicate_custom_id", 2),
        (jsonl(line("x"), {**line("x"), "custom_id": 7}), "invalid_custom_id", 2),
        (jsonl(line("")), "invalid_custom_id", 1),
        (jsonl(line("x" * 513)), "invalid_custom_id", 1),
        (jsonl(line("x", method="GET")), "invalid_method", 1),
        (jsonl(line("x", url="/v1/embeddings")), "mismatched_endpoint", 1),
        (jsonl({"custom_id": "x", "method": "POST", "url": CHAT}), "missing_required_parameter", 1),
        (jsonl(line("x", body={"stream": True})), "unsupported_parameter", 1),
    ],
)
async def test_what_is_no_batch(tmp_path: Path, data: bytes, code: str, number: int | None) -> None:
    async with kept(tmp_path) as client:
        batch = await client.until((await client.begin(data))["id"])
        assert batch["status"] == "failed"
        (fault,) = batch["errors"]["data"]
        assert (fault["code"], fault["line"]) == (code, number)
        assert batch["output_file_id"] is None


async def test_too_many_and_too_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_LINES", 3)
    monkeypatch.setattr("headrace.api.batch.lines.MAX_LINE", 1000)
    async with kept(tmp_path) as client:
        many = await client.until((await client.begin(jsonl(*map(line, "abcd"))))["id"])
        assert many["errors"]["data"][0]["code"] == "too_many_requests"
        long = await client.begin(jsonl(line("a"), {"x": "y" * 3000}, line("b", method="")))
        faults = (await client.until(long["id"]))["errors"]["data"]
        assert [(fault["code"], fault["line"]) for fault in faults] == [
            ("line_too_long", 2),
            ("invalid_method", 3),
        ]


async def test_only_the_owner_and_an_admin_see_a_batch(tmp_path: Path) -> None:
    """Issue 14.6: what another key has made is not there."""
    async with kept(tmp_path, **KEYED) as client:
        client.key = "a"
        batch = await client.until((await client.begin(jsonl(line("x"))))["id"])
        file = batch["input_file_id"]
        own = [f"/v1/batches/{batch['id']}", f"/v1/files/{file}", f"/v1/files/{file}/content"]
        for key, status in (("a", 200), ("b", 404), ("root", 200), ("?", 401)):
            client.key = key
            for path in own:
                assert (await client.call("GET", path)).status_code == status, (key, path)
        client.key = "b"
        for path in ("/v1/files", "/v1/batches"):
            assert (await client.call("GET", path)).json()["data"] == []
        assert (await client.call("DELETE", f"/v1/files/{file}")).status_code == 404
        assert (await client.call("POST", f"{own[0]}/cancel")).status_code == 404
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        refusal = await client.call("POST", "/v1/batches", json=body)
        assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "input_file_id")


async def test_a_key_that_is_not_known_any_more(tmp_path: Path) -> None:
    async with kept(tmp_path, **KEYED) as client:
        client.key = "a"
        client.app.replace_settings(ApiSettings(**KEYED))
        id = (await client.upload(jsonl(line("x")))).json()["id"]
        body = {"input_file_id": id, "endpoint": CHAT, "completion_window": "24h"}
        batch = (await client.call("POST", "/v1/batches", json=body)).json()
        client.app.replace_settings(ApiSettings(**{**KEYED, "api_keys": (KEYS["b"],)}))
        client.key = "root"
        ended = await client.until(batch["id"])
        assert (ended["status"], ended["errors"]["data"][0]["code"]) == (
            "failed",
            "invalid_api_key",
        )


async def test_requests_have_the_client_and_give_way(tmp_path: Path) -> None:
    requests: list[Any] = []

    def script(request: Any) -> Iterator[Step]:
        requests.append(request)
        return hello(request)

    async with kept(tmp_path, script, deadline_s=5.0, **KEYED) as client:
        client.key = "a"
        await client.until((await client.begin(jsonl(line("x"))))["id"])
        headers = {"Authorization": "Bearer b", "X-Headrace-Priority": "batch"}
        body = line("y")["body"]
        await client.http.post(CHAT, json=body, headers=headers)
        await client.call("POST", CHAT, json=body)
    seen = [(each.batch, each.deadline_s, each.load_wait_s) for each in requests]
    assert seen == [(True, None, 1e9), (True, 5.0, 30.0), (False, 5.0, 30.0)]
    assert [f"sha256:{each.client}" for each in requests] == [
        KEYS[name][: 7 + 16] for name in "aba"
    ]


async def test_pages(tmp_path: Path) -> None:
    async with kept(tmp_path) as client:
        ids = [(await client.upload(jsonl(line("x")))).json()["id"] for _ in range(5)]
        page = (await client.call("GET", "/v1/files?limit=2")).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (ids[:2:-1], True)
        page = (await client.call("GET", f"/v1/files?limit=9&after={page['last_id']}")).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (ids[2::-1], False)
        page = (await client.call("GET", "/v1/files?order=asc&purpose=batch")).json()
        assert [each["id"] for each in page["data"]] == ids
        assert (await client.call("GET", "/v1/files?purpose=vision")).json()["data"] == []
        for query in ("limit=0", "limit=x", "limit=99999999", "order=up", "after=file-x"):
            answer = await client.call("GET", f"/v1/files?{query}")
            assert answer.status_code == 400, query


async def test_cancelling_keeps_what_is_answered(tmp_path: Path) -> None:
    """Issue 14.6: a batch that waits for another is cancelled too, and its file can go then."""
    held = Held()
    async with kept(tmp_path, held) as client:
        first = await client.begin(jsonl(*(line(str(n)) for n in range(20))))
        second = await client.begin(jsonl(line("z")))
        faulty = await client.begin(b"nonsense")
        await client.until(first["id"], "in_progress")
        path = f"/v1/files/{first['input_file_id']}"
        refusal = await client.call("DELETE", path)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "file_in_use")
        for batch in (second, faulty, first):
            answer = await client.call("POST", f"/v1/batches/{batch['id']}/cancel")
            assert answer.json()["status"] in ("cancelling", "cancelled", "failed")
        ended = await client.until(first["id"])
        assert (ended["status"], ended["request_counts"]["failed"]) == ("cancelled", 20)
        errors = await client.lines(ended["error_file_id"])
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        assert sorted(int(each["custom_id"]) for each in errors) == [*range(20)]
        waiting = await client.until(second["id"])
        assert (waiting["status"], waiting["request_counts"]["total"]) == ("cancelled", 1)
        assert (await client.until(faulty["id"]))["status"] == "failed"
        again = await client.call("POST", f"/v1/batches/{first['id']}/cancel")
        assert again.status_code == 409
        assert (await client.call("DELETE", path)).json()["deleted"]
        assert (await client.call("GET", path)).status_code == 404


async def test_a_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    """Issue 14.6: a line that was answered is not sent again, and a torn one is."""
    asked: list[str] = []
    gate = asyncio.Event()

    def script(request: Any) -> Iterator[Step]:
        asked.append(request.messages[-1].content)
        if len(asked) > 4:
            yield gate.wait
        yield from hello(request)

    async with kept(tmp_path, script) as client:
        id = (await client.begin(jsonl(*(line(str(n)) for n in range(12)))))["id"]
        await client.until_completed(id, 4)
    (answers,) = [p for p in tmp_path.glob("file-*.jsonl") if b"batch_req_" in p.read_bytes()]
    # What a process leaves that was killed while it wrote.
    with answers.open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom_id":"11","resp')
    (tmp_path / "file-unfinished.jsonl").write_bytes(b"half of an upload")
    gate.set()
    async with kept(tmp_path, script) as client:
        batch = await client.until(id)
        assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        lines = await client.lines(batch["output_file_id"])
    assert sorted(int(each["custom_id"]) for each in lines) == [*range(12)]
    assert sorted(map(asked.count, map(str, range(4)))) == [1, 1, 1, 1]
    assert not (tmp_path / "file-unfinished.jsonl").exists()


async def test_the_time_of_a_batch_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    async with kept(tmp_path, held) as client:
        id = (await client.begin(jsonl(line("x")), completion_window="1h"))["id"]
        await client.until(id, "in_progress")
    now = run.time.time
    monkeypatch.setattr(run.time, "time", lambda: now() + 3601)
    async with kept(tmp_path, held) as client:
        batch = await client.until(id)
        assert (batch["status"], batch["output_file_id"]) == ("expired", None)
        (error,) = await client.lines(batch["error_file_id"])
        assert (error["response"], error["error"]["code"]) == (None, "batch_expired")
        monkeypatch.setattr(run.time, "time", lambda: now() + 100 * 86400)
        assert client.app.batches is not None
        await client.app.batches.store.sweep()
        assert (await client.call("GET", "/v1/batches")).json()["data"] == []
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


async def test_refusals_for_lack_of_capacity_are_no_answers(tmp_path: Path) -> None:
    """Issue 14.6: a line waits as long as the refusal says, and one that fails is tried again."""
    refusals: list[Exception] = [
        QueueFull("full", retry_after_s=0.01),
        Draining("stopping", retry_after_s=0.01),
        WorkerDied("died"),
    ]

    def script(request: Any) -> Iterator[Step]:
        if refusals:
            yield refusals.pop(0)
        yield from hello(request)

    async with kept(tmp_path, script) as client:
        batch = await client.until((await client.begin(jsonl(line("x"))))["id"])
        assert batch["request_counts"]["completed"] == 1
        assert not refusals


async def test_the_disk_is_bounded(tmp_path: Path) -> None:
    """Issue 14.6: a key has half of what the others leave, also for answers."""
    async with kept(tmp_path, max_batch_bytes=4000, **KEYED) as client:
        client.key = "a"
        assert (await client.upload(b"x" * 1900)).status_code == 200
        refusal = await client.upload(b"x" * 200)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (413, "storage_full")
        client.key = "b"
        assert (await client.upload(b"x" * 1000)).status_code == 200
        assert (await client.upload(b"x" * 100)).status_code == 413
        assert len([*tmp_path.glob("*.jsonl")]) == 2


async def test_answers_that_have_no_room(tmp_path: Path) -> None:
    data = jsonl(*(line(str(n)) for n in range(10)))
    async with kept(tmp_path, max_batch_bytes=len(data) + 100) as client:
        batch = await client.until((await client.begin(data))["id"])
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "storage_full")


async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 14.6: an upload is refused, and a batch fails; no half of a line stays."""
    async with kept(tmp_path) as client:
        id = (await client.upload(jsonl(line("x")))).json()["id"]
        write = os.write

        def full(file: int, data: Any) -> int:
            if b"custom_id" in bytes(data):
                write(file, bytes(data)[:10])
                raise OSError(28, "No space left on device")
            return write(file, data)

        monkeypatch.setattr(os, "write", full)
        refusal = await client.upload(jsonl(line("x")))
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (507, "disk_error")
        assert "No space left" in refusal.json()["error"]["message"]
        body = {"input_file_id": id, "endpoint": CHAT, "completion_window": "24h"}
        batch = (await client.call("POST", "/v1/batches", json=body)).json()
        ended = await client.until(batch["id"])
        assert (ended["status"], ended["errors"]["data"][0]["code"]) == ("failed", "disk_error")
        assert ended["output_file_id"] is None
        await asyncio.to_thread(wait_until, lambda: len([*tmp_path.glob("*.jsonl")]) == 1)


async def test_an_upload_is_bounded_while_it_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 14.6: it is never whole in memory, and nothing of a refused one stays."""
    monkeypatch.setattr(upload, "MAX_FILE", 3 << 20)
    sent = 0

    async def endless() -> AsyncGenerator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="../x"\r\n\r\n'
        while True:
            sent += 1 << 20
            yield b"x" * (1 << 20)

    async with kept(tmp_path) as client:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await client.http.post("/v1/files", content=endless(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert sent < 8 << 20
        assert not [*tmp_path.glob("file-*")]
        declared = headers | {"Content-Length": str(300 << 20)}
        answer = await client.http.post("/v1/files", content=b"", headers=declared)
        assert answer.status_code == 413


HEAD = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
FILE = HEAD.replace(b'"%s"', b'"file"; filename="a"')


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--b\r\n" + b"x" * 100,
        HEAD % (b"purpose", b"batch") + b"--b--\r\n",
        FILE % b"data",
        FILE % b"data" + b"--b--\r\n",
        FILE % b"data" + HEAD % (b"purpose", b"vision") + b"--b--\r\n",
        FILE % b"data" + FILE % b"more" + HEAD % (b"purpose", b"batch") + b"--b--\r\n",
        (HEAD % (b"x", b"y")) * 20 + b"--b--\r\n",
        HEAD % (b"purpose", b"x" * 2000) + b"--b--\r\n",
        b"--b\r\nContent-Disposition: " + b"x" * 100_000,
        b"--b\r\n" + b"A: b\r\n" * 1000,
        FILE % b"data" + HEAD % (b"purpose", b"batch")
        + HEAD % (b"expires_after[seconds]", b"1") + b"--b--\r\n",
    ],
)  # fmt: skip
async def test_what_is_no_form_with_a_file(tmp_path: Path, body: bytes) -> None:
    async with kept(tmp_path) as client:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await client.http.post("/v1/files", content=body, headers=headers)
        assert answer.status_code == 400, answer.text
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


async def test_other_bodies_and_fields(tmp_path: Path) -> None:
    async with kept(tmp_path) as client:
        for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary="):
            answer = await client.http.post(
                "/v1/files", content=b"{}", headers={"Content-Type": kind}
            )
            assert answer.status_code == 400
        file = (await client.upload(jsonl(line("x")), **{"expires_after[seconds]": "3600"})).json()
        assert file["expires_at"] - file["created_at"] == 3600
        right = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        for field, value in (
            ("endpoint", "/v1/messages"),
            ("completion_window", "24"),
            ("completion_window", "31d"),
            ("metadata", {"a": 1}),
            ("metadata", {str(n): "" for n in range(17)}),
            ("input_file_id", "file-x"),
        ):
            answer = await client.call("POST", "/v1/batches", json=right | {field: value})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"].startswith(field)


async def test_the_number_of_files_and_batches_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.api.batch.routes.MAX_FILES", 2)
    monkeypatch.setattr("headrace.api.batch.routes.MAX_ACTIVE", 1)
    monkeypatch.setattr(store, "MAX_BATCHES", 1)
    held = Held()
    async with kept(tmp_path, held) as client:
        id = (await client.begin(jsonl(line("x"))))["id"]
        file = (await client.upload(jsonl(line("x")))).json()["id"]
        assert (await client.upload(b"x")).json()["error"]["code"] == "storage_full"
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        answer = await client.call("POST", "/v1/batches", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_batches")
        held.open.set()
        await client.until(id)
        later = (await client.call("POST", "/v1/batches", json=body)).json()["id"]
        await client.until(later)
        assert client.app.batches is not None
        await client.app.batches.store.sweep()
        listed = (await client.call("GET", "/v1/batches")).json()["data"]
        assert [each["id"] for each in listed] == [later]


async def test_batches_that_are_off(tmp_path: Path) -> None:
    async with kept(tmp_path, max_batch_bytes=0) as client:
        answer = await client.call("GET", "/v1/files")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "batches_off")
    app = create_app(FakeBackend(), ApiSettings(), batches="The folder is in use.")
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        assert "in use" in (await http.get("/v1/batches")).text


def test_a_folder_has_one_service(tmp_path: Path) -> None:
    files = Store(tmp_path)
    with pytest.raises(BlockingIOError):
        Store(tmp_path)
    files.close()
    Store(tmp_path).close()


async def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "file-x.json").write_bytes(b"{")
    (tmp_path / "batch_x.json").write_bytes(b'{"owner": 1}')
    async with kept(tmp_path) as client:
        assert (await client.call("GET", "/v1/files")).json()["data"] == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "lock",
        "damaged-file-x.json",
        "damaged-batch_x.json",
    }


async def test_that_a_batch_begins_slowly() -> None:
    """Issue 14, must show 6: one more is sent with each answer, never many at one moment."""
    running, rounds = list[asyncio.Event](), list[int]()

    async def send(item: Item) -> Reply:
        ended = asyncio.Event()
        running.append(ended)
        await ended.wait()
        return Reply(200, item.custom_id, b"{}")

    async def commit(answers: Sequence[Answer]) -> None:
        rounds.append(len(answers))

    async def items() -> AsyncGenerator[Item]:
        for number in range(23):
            yield Item(number, f"line-{number}", "/v1/chat/completions", b"{}", "")

    work = asyncio.create_task(Work(send, commit, lambda: 8).run(items()))
    started = list[int]()
    while not work.done():
        before = -1
        while before != len(running):
            before = len(running)
            for _ in range(20):
                await asyncio.sleep(0)
        started.append(len(running))
        for ended in running:
            ended.set()
        running.clear()
        await asyncio.sleep(0)
    assert [count for count in started if count] == [1, 2, 4, 8, 8]
    assert sum(rounds) == 23


def answer(id: str) -> Answer:
    import msgspec

    return Answer(custom_id=id, response=Response(200, "r", msgspec.Raw(b"{}")))


def test_a_journal_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Issue 14.6: a user who names the wrong file loses nothing."""
    for text in ("hello", "hello\n", '{"a": 1}\n', '{"id":"batch_req_1"}\n'):
        path = tmp_path / "file"
        path.write_text(text)
        with pytest.raises(NotAnswers):
            Journal(path, lambda _: None, strict=True)
        assert path.read_text() == text
    path.unlink()
    journal = Journal(path, lambda _: None, strict=True)
    journal.commit([answer("a"), answer("b")])
    with pytest.raises(BlockingIOError):
        Journal(path, lambda _: None)
    journal.close()
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 2, len(whole), 9):
        path.write_bytes(whole[:size])
        read: list[Answer] = []
        Journal(path, read.append, strict=True).close()
        assert [each.custom_id for each in read] == ["a"]
        assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


def test_the_document_has_the_routes() -> None:
    document = openapi.document(BatchRoutes(None).routes(), ApiSettings())
    body = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    assert [*body] == ["multipart/form-data"]
    operations = [each for path in document["paths"].values() for each in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids) == 9
