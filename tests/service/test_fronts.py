"""Fronts of one service: connections in several processes, the models behind one (issue 17.5)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.service.serving import Service, served
from tests.service.streams import Got, client, events, post, status, stream, until

FRONTS = 2
ANN, BOB, BOSS = "the-key-of-ann", "the-key-of-bob", "the-key-of-the-boss"
CONFIG = """
[server]
fronts = 2
max_body_bytes = 4096
max_idle_connections = 40
admin_keys = ["{boss}"]
api_keys = ["{ann}", "{bob}"]

[models.talker]
model = "builtin:echo"
options = {{tokens_per_second = 100, slots = 32}}

[models.mortal]
model = "builtin:echo"
preload = false
options = {{tokens_per_second = 100}}

[models.narrow]
model = "builtin:echo"
preload = false
max_queued = 3
options = {{tokens_per_second = 100, slots = 1}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fronts") / "headrace.toml"
    path.write_text(CONFIG.format(ann=ANN, bob=BOB, boss=BOSS))
    return path


@pytest.fixture(scope="module")
def service(config: Path) -> Iterator[Service]:
    # Traces and files of its own, which no other service writes.
    home = {"HOME": str(config.parent / "home")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "a-secret")
        with served("--config", str(config), environment=home) as service:
            yield service


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    await until(partial(all_serve, service))
    async with keyed(service, BOSS) as http:
        yield http


def test_a_front_gets_no_secret(service: Service) -> None:
    """Issue 11.12: it reads what clients send, and needs no key of the service's environment."""
    for process in psutil.Process(service.process.pid).children():
        if "headrace.fronts.front" in process.cmdline():
            assert "OPENAI_API_KEY" not in process.environ()
            assert "HOME" in process.environ()


async def all_serve(service: Service) -> bool:
    """Whether each front has one of two connections: the first request needs only one of them."""
    async with client(service.url) as first, client(service.url) as second:
        for each in (first, second):
            await each.get("/health/live")
        return all(connections(front, service) for front in fronts(service))


def keyed(service: Service, key: str) -> httpx.AsyncClient:
    return client(service.url, headers={"authorization": f"Bearer {key}"})


def fronts(service: Service) -> list[psutil.Process]:
    return [each for each in service.workers() if "headrace.fronts.front" in each.cmdline()]


def connections(front: psutil.Process, service: Service) -> int:
    port = int(service.url.rpartition(":")[2])
    return sum(
        each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED
        for each in front.net_connections("tcp")
    )


async def running(http: httpx.AsyncClient, model: str, count: int) -> bool:
    return (await status(http, model))["running"] == count


async def begun(gots: list[Got]) -> None:
    async def all_have() -> bool:
        return all(got.times for got in gots)

    await until(all_have)


async def queued(http: httpx.AsyncClient, count: int) -> bool:
    return (await status(http, "narrow"))["queued"] == count


def endless(http: httpx.AsyncClient, got: Got, model: str = "talker") -> asyncio.Task[Got]:
    return asyncio.create_task(stream(http, model, "abc", got, ignore_eos=True, max_tokens=100_000))


def value(exposition: str, name: str, **labels: str) -> float:
    lines = [line for line in exposition.splitlines() if line.startswith(name + "{")]
    wanted = [f'{key}="{label}"' for key, label in labels.items()]
    return sum(float(line.split()[-1]) for line in lines if all(part in line for part in wanted))


async def test_streams_are_shared_between_the_fronts(
    service: Service, http: httpx.AsyncClient
) -> None:
    """Issue 17.5: each front has its part of the connections; texts and figures are as with one."""
    assert len(fronts(service)) == FRONTS
    gots = [Got() for _ in range(10)]
    tasks = [
        asyncio.create_task(stream(http, "talker", "abcdefgh" * 4, got, max_tokens=40))
        for got in gots
    ]
    await begun(gots)
    counts = [connections(front, service) for front in fronts(service)]
    await asyncio.gather(*tasks)
    assert [got.text for got in gots] == ["abcdefgh" * 4] * 10
    assert all(got.done and got.usage["completion_tokens"] == 33 for got in gots)
    assert all(got.metrics["worker"] == "talker" for got in gots)
    assert sum(counts) >= 10
    assert min(counts) >= 4, counts


async def test_metrics_are_those_of_all_fronts(http: httpx.AsyncClient) -> None:
    """Issue 17.5: one answer at /metrics, whichever front is asked; usage and traces too."""
    expected = (
        ("headrace_http_requests_total", {"route": "/v1/completions", "status": "2xx"}, 8),
        ("headrace_completion_tokens_total", {"model": "talker"}, 24),
        ("gen_ai_server_request_duration_seconds_count", {"gen_ai_request_model": "talker"}, 8),
    )

    async def counts() -> list[float]:
        text = (await http.get("/metrics")).text
        return [value(text, name, **labels) for name, labels, _ in expected]

    async def traced() -> list[str]:
        answer = await http.get("/admin/traces", params={"limit": 8})
        return [trace["model"] for trace in answer.json()["data"]]

    async def have_come() -> bool:
        # A front counts an answer when its last byte is sent, and that may be read before.
        return await counts() == after and await traced() == ["talker"] * 8

    before = await counts()
    after = [count + more for count, (_, _, more) in zip(before, expected, strict=True)]
    await asyncio.gather(*(stream(http, "talker", "abc", max_tokens=3) for _ in range(8)))
    await until(have_come)


async def test_a_client_that_leaves_frees_its_slot(http: httpx.AsyncClient) -> None:
    """Issue 17.5: a cancellation goes through to the engine."""
    gots = [Got() for _ in range(4)]
    tasks = [endless(http, got) for got in gots]
    await begun(gots)
    assert await running(http, "talker", 4)
    activity = (await http.get("/admin/activity")).json()
    assert [each["model"] for each in activity["running"]] == ["talker"] * 4
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await until(partial(running, http, "talker", 0))


async def test_keys_and_limits_hold_at_each_front(service: Service) -> None:
    """Issue 17.5: no key, a client's, an admin's; a body that is too large; a malformed request."""
    body = {"model": "talker", "prompt": "x", "max_tokens": 1}
    for _ in range(FRONTS):  # each connection is at the next front
        async with client(service.url) as nobody, keyed(service, ANN) as ann:
            assert (await nobody.post("/v1/completions", json=body)).status_code == 401
            assert (await nobody.get("/v1/models")).status_code == 401
            assert (await ann.post("/v1/completions", json=body)).status_code == 200
            assert (await ann.get("/v1/models")).json()["data"][0]["id"] == "talker"
            assert (await ann.get("/admin/models")).status_code == 403
            large = await ann.post("/v1/completions", json={**body, "prompt": "x" * 5000})
            assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
            unknown = await ann.post("/v1/chat/completions", json={"model": "none", "messages": []})
            assert unknown.status_code in {400, 404}
            assert (await ann.get("/nowhere")).status_code == 404
            assert (await nobody.get("/health/live")).status_code == 200


async def test_idle_connections_are_bounded_in_all(service: Service) -> None:
    """Issue 17.5: `max_idle_connections` is of the service, not of each front."""
    port = int(service.url.rpartition(":")[2])
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(44)]

    async def closed() -> bool:
        return sum(reader.at_eof() for reader, _ in opened) >= 4

    async def follow(reader: asyncio.StreamReader) -> None:
        await reader.read()

    reading = [asyncio.create_task(follow(reader)) for reader, _ in opened]
    await until(closed)
    assert sum(reader.at_eof() for reader, _ in opened) == 4
    for _, writer in opened:
        writer.close()
    await asyncio.gather(*reading)


async def test_clients_take_turns_across_fronts(service: Service, http: httpx.AsyncClient) -> None:
    """Issue 17.5: one queue for all fronts; a client's own requests wait for others'."""
    order: list[str] = []

    async def request(key: str) -> None:
        async with keyed(service, key) as own:
            got = await stream(own, "narrow", "abcdefgh", max_tokens=8)
            assert got.done
            order.append(key)

    got = Got()
    first = endless(http, got, "narrow")
    await begun([got])
    tasks: list[asyncio.Task[None]] = []
    for number, key in enumerate((ANN, ANN, BOB), 1):
        tasks.append(asyncio.create_task(request(key)))
        await until(partial(queued, http, number))
    async with keyed(service, ANN) as ann:
        full = await stream(ann, "narrow", "x")
    assert (full.status, full.error and full.error["code"]) == (429, "queue_full")
    first.cancel()
    await asyncio.gather(*tasks)
    assert order.index(BOB) < 2, order


async def test_requests_that_a_front_passes_on(http: httpx.AsyncClient) -> None:
    """Issue 17.5: uploads, files, events, other methods and errors of the process behind."""
    line = b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {}}\n'
    data = line * 20_000
    upload = await http.post(
        "/v1/files", files={"file": ("a.jsonl", data)}, data={"purpose": "batch"}
    )
    assert upload.status_code == 200, upload.text
    file = upload.json()
    assert file["bytes"] == len(data)
    assert (await http.get(f"/v1/files/{file['id']}/content")).content == data
    assert (await http.delete(f"/v1/files/{file['id']}")).json()["deleted"]
    async with events(http) as happened:
        await post(http, "models/update", model="talker", settings={"keep_alive": "15m"})

        async def updated() -> bool:
            return any(event["kind"] == "updated" for event in happened)

        await until(updated)
    assert (await http.head("/v1/models")).status_code in {200, 405}
    assert (await http.post("/admin/plan")).status_code == 405


async def test_a_model_that_is_added_is_known_to_all_fronts(service: Service) -> None:
    """Issue 17.5: what an operator has changed holds for the next request at any front."""
    body: dict[str, Any] = {"model": "echo", "messages": [], "keep_alive": 0}
    async with keyed(service, BOSS) as boss:
        await post(boss, "models/load", model="builtin:echo")
        for _ in range(FRONTS):
            async with keyed(service, ANN) as ann:
                loaded = await ann.post("/api/generate", json={"model": "echo", "prompt": ""})
                assert loaded.json()["done_reason"] == "load"
                assert (await ann.post("/api/chat", json=body)).status_code == 403
        assert (await boss.post("/api/chat", json=body)).json()["done_reason"] == "unload"
        assert (await status(boss, "echo"))["state"] == "stopped"


async def test_an_answer_goes_on_after_its_worker_was_killed(
    service: Service, http: httpx.AsyncClient
) -> None:
    """Issue 17.5: continuation is the pool's, and so it is with fronts."""
    got = Got()
    more = {"ignore_eos": True, "max_tokens": 100}
    task = asyncio.create_task(stream(http, "mortal", "abcdefgh", got, **more))
    await begun([got])
    pid = (await status(http, "mortal"))["replicas"][0]["pid"]
    psutil.Process(pid).kill()
    await task
    assert got.done
    assert got.text == ("abcdefgh" * 13)[:100]
    assert got.metrics["continuations"] == 1


async def test_a_front_that_is_killed_takes_only_its_own_streams(
    service: Service, http: httpx.AsyncClient
) -> None:
    """Issue 17.5: kill -9: the others go on, its slots are free, and another takes its place."""
    gots = [Got() for _ in range(6)]
    tasks = [asyncio.create_task(_ended(endless(http, got))) for got in gots]
    await begun(gots)
    killed, kept = fronts(service)
    own = connections(killed, service)
    killed.kill()

    async def lost() -> bool:
        return sum(task.done() for task in tasks) >= own - 1

    await until(lost)
    left = [got for got, task in zip(gots, tasks, strict=True) if not task.done()]
    assert left
    assert kept.is_running()
    seen = [len(got.times) for got in left]

    async def go_on() -> bool:
        return all(len(got.times) > count + 10 for got, count in zip(left, seen, strict=True))

    async def restarted() -> bool:
        return len(fronts(service)) == FRONTS

    await until(go_on)
    async with keyed(service, BOSS) as again:
        await until(partial(running, again, "talker", len(left)))
        await until(restarted)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        answers = await asyncio.gather(
            *(stream(again, "talker", "abc", max_tokens=3) for _ in range(6))
        )
    assert all(got.done for got in answers)
    assert "was ended by SIGKILL" in service.log


async def _ended(task: asyncio.Task[Got]) -> None:
    try:
        await task
    except httpx.HTTPError:
        pass
    finally:
        task.cancel()


async def test_a_reload_holds_at_each_front(config: Path, service: Service) -> None:
    """Issue 17.5: keys and limits of a reload are those of all fronts."""
    carol = "the-key-of-carol"
    text = CONFIG.format(ann=carol, bob=BOB, boss=BOSS).replace("4096", "9000")
    config.write_text(text.replace("fronts = 2", "fronts = 3"))
    async with keyed(service, BOSS) as boss:
        reloaded = (await boss.post("/admin/reload")).json()
    assert reloaded["needs_restart"] == ["server.fronts"]
    body = {"model": "talker", "prompt": "x" * 5000, "max_tokens": 1}
    for _ in range(FRONTS):
        async with keyed(service, ANN) as ann, keyed(service, carol) as new:
            assert (await ann.post("/v1/completions", json=body)).status_code == 401
            assert (await new.post("/v1/completions", json=body)).status_code == 200


async def test_sigterm_lets_the_answers_of_all_fronts_end(tmp_path: Path) -> None:
    """Issue 17.5: new requests are refused, answers end, then all processes; exit code 0."""
    path = tmp_path / "headrace.toml"
    path.write_text(CONFIG.format(ann=ANN, bob=BOB, boss=BOSS))
    home = {"HOME": str(tmp_path / "home")}
    with served("--config", str(path), environment=home) as service:
        async with keyed(service, ANN) as http:
            gots = [Got() for _ in range(6)]
            tasks = [
                asyncio.create_task(stream(http, "talker", "x" * 80, got, max_tokens=80))
                for got in gots
            ]
            await begun(gots)
            children = service.children()
            # To the fronts too, as systemd does.
            for process in (service.process, *fronts(service)):
                process.send_signal(signal.SIGTERM)

            async def unready() -> bool:
                return (await http.get("/health/ready")).status_code == 503

            await until(unready)
            refused = await stream(http, "talker", "hello")
            await asyncio.gather(*tasks)
        code = await asyncio.to_thread(service.process.wait, 20)
        _, alive = psutil.wait_procs(children, timeout=3)
    assert (refused.status, refused.error and refused.error["code"]) == (503, "draining")
    assert [got.text for got in gots] == ["x" * 80] * 6
    assert all(got.done for got in gots)
    assert code == 0, service.log
    assert not alive
