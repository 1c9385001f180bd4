"""The end of a service, and what changes while it runs (issue 3, must show 6)."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.service.serving import Service, served
from tests.service.streams import (
    Got,
    client,
    events,
    post,
    status,
    stream,
    tell,
    until,
    until_ready,
)

SHORT, ENDLESS, TOKENS = 30, 20, 60
DRAIN_S = 4.0
SERVICE = f"""
[server]
drain_s = {DRAIN_S}

[models.talker]
model = "builtin:echo"
options = {{tokens_per_second = 30, slots = 64}}

[models.sleeper]
model = "builtin:echo"
preload = false
options = {{load_s = 20}}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


async def begun(gots: list[Got]) -> None:
    async def all_have() -> bool:
        return all(got.times for got in gots)

    await until(all_have, 30)


def endless(http: httpx.AsyncClient, got: Got, model: str = "talker") -> asyncio.Task[Got]:
    more = {"ignore_eos": True, "max_tokens": 1_000_000}
    return asyncio.create_task(stream(http, model, "x", got, **more))


async def unready(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health/ready")).status_code == 503


async def ended(service: Service, within_s: float) -> int:
    return await asyncio.to_thread(service.process.wait, within_s)


async def test_sigterm_lets_answers_end_and_ends_with_0(tmp_path: Path) -> None:
    """W8: 30 answers are completed, 20 get an error event; new ones 503 at once; exit code 0."""
    path = write(tmp_path / "headrace.toml", SERVICE)
    with served("--config", str(path)) as service:
        async with client(service.url) as http:
            short, long = [Got() for _ in range(SHORT)], [Got() for _ in range(ENDLESS)]
            tasks = [endless(http, got) for got in long]
            tasks += [
                asyncio.create_task(stream(http, "talker", "y" * TOKENS, got, max_tokens=TOKENS))
                for got in short
            ]
            ordered = asyncio.create_task(
                http.post("/admin/models/load", json={"model": "sleeper"})
            )
            asked = asyncio.create_task(stream(http, "sleeper", "hello"))
            await begun([*short, *long])
            # The talker, and the sleeper that loads.
            await until(partial(left, service, 2))
            children = service.children()
            service.process.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
            await until(partial(unready, http), 2)
            refused = await stream(http, "talker", "hello")
            assert (await http.get("/health/live")).status_code == 200
            refused_s = time.monotonic() - stopped
            load, waited = await asyncio.gather(ordered, asked)
            waited_s = time.monotonic() - stopped
            await asyncio.gather(*tasks)
        code = await ended(service, 10)
        took_s = time.monotonic() - stopped
        _, alive = psutil.wait_procs(children, timeout=1)
    tell(f"refused after {refused_s:.2f} s, ended after {took_s:.2f} s")
    assert (refused.status, refused.error and refused.error["code"]) == (503, "draining")
    assert refused_s < 2
    # Who waits for a model that loads does not wait for what cannot be.
    assert load.status_code == 503
    assert waited.error is not None
    assert waited.error["code"] == "draining"
    assert waited_s < 3
    assert [got.text for got in short] == ["y" * TOKENS] * SHORT
    assert all(got.done and got.error is None for got in short)
    assert all(got.error is not None and got.error["code"] == "draining" for got in long)
    assert not any(got.done for got in long)
    assert code == 0, service.log
    assert DRAIN_S - 0.5 < took_s < DRAIN_S + 4
    assert len(children) > 2, "the workers, and what renders for the talker"
    assert not alive


async def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """W8: who is in a hurry does not wait for running answers; they get the error event."""
    text = SERVICE.replace(f"drain_s = {DRAIN_S}", "drain_s = 60")
    with served("--config", str(write(tmp_path / "headrace.toml", text))) as service:
        async with client(service.url) as http:
            gots = [Got() for _ in range(10)]
            tasks = [endless(http, got) for got in gots]
            await begun(gots)
            children = service.children()
            service.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in tasks)
            service.process.send_signal(signal.SIGTERM)
            again = time.monotonic()
            await asyncio.gather(*tasks)
            code = await ended(service, 10)
        assert time.monotonic() - again < 5
        _, alive = psutil.wait_procs(children, timeout=1)
    assert code == 0, service.log
    assert not alive
    assert all(got.error is not None for got in gots)


def speakers(**texts: str | None) -> str:
    """A configuration in which each model says its text."""
    return "\n".join(
        f'[models.{name}]\nmodel = "builtin:echo"\n[models.{name}.options]\n'
        f'tokens_per_second = 200\ntext = "{text}"\n'
        for name, text in texts.items()
    )


async def keep_asking(
    http: httpx.AsyncClient, model: str, said: list[str], enough: asyncio.Event
) -> list[Got]:
    """Ask without a pause; return what was no success."""
    failed: list[Got] = []
    while not enough.is_set():
        got = await stream(http, model, "x", max_tokens=200)
        if got.status == 200 and got.done:
            said.append(got.text)
        else:
            failed.append(got)
    return failed


async def heard(said: list[str], text: str) -> bool:
    return text in said


async def left(service: Service, count: int) -> bool:
    return len(service.workers()) == count


async def until_told(told: list[dict[str, Any]], kind: str, times: int) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            found = [event for event in told if event["kind"] == kind]
            if len(found) >= times:
                return found[times - 1]
            await asyncio.sleep(0.02)


async def test_a_reload_fails_no_request(tmp_path: Path) -> None:
    """M2: SIGHUP and POST /admin/reload under load: one changed, one added, one removed."""
    before = speakers(changing="old " * 20, staying="same " * 20, going="gone " * 60)
    path = write(tmp_path / "headrace.toml", before)
    with served("--config", str(path)) as service:
        async with client(service.url) as http, events(http) as told:
            enough = asyncio.Event()
            said: dict[str, list[str]] = {"changing": [], "staying": []}
            asking = [
                asyncio.create_task(keep_asking(http, name, said[name], enough))
                for name in ("changing", "staying", "changing", "staying")
            ]
            # A running answer of a model that is served no more is ended, and not cut off.
            last = Got()
            leaving = asyncio.create_task(stream(http, "going", "x", last, max_tokens=400))
            await begun([last])
            pid = (await until_ready(http, "staying"))["replicas"][0]["pid"]
            write(path, speakers(changing="new " * 20, staying="same " * 20, coming="here"))
            service.process.send_signal(signal.SIGHUP)
            data = (await until_told(told, "reloaded", 1))["data"]
            assert data == {"added": ["coming"], "changed": ["changing"], "removed": ["going"]}
            assert (await stream(http, "coming", "x")).text == "here"
            assert (await stream(http, "going", "x")).status == 404
            await leaving
            await until(partial(heard, said["changing"], "new " * 20))
            write(path, speakers(changing="newer " * 20, staying="same " * 20))
            reloaded = await post(http, "reload")
            assert reloaded["removed"] == ["coming"]
            await until(partial(heard, said["changing"], "newer " * 20))
            # A file that is wrong changes nothing.
            write(path, "[models.changing]\nmodle = 1\n")
            wrong = await http.post("/admin/reload")
            assert wrong.status_code >= 400
            assert "modle" in wrong.text
            service.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.3)
            enough.set()
            failed = [got for each in await asyncio.gather(*asking) for got in each]
            same = (await status(http, "staying"))["replicas"][0]["pid"]
        # Those of changing and staying.
        await until(partial(left, service, 2))
    assert failed == []
    assert (last.text, last.done) == ("gone " * 60, True)
    assert set(said["changing"]) == {f"{word} " * 20 for word in ("old", "new", "newer")}
    assert set(said["staying"]) == {"same " * 20}
    assert same == pid


async def test_what_was_done_by_hand_survives(tmp_path: Path) -> None:
    """M8: pinned, switched off, started, stopped and added by hand: so again after a restart."""
    text = f'[server]\nstate = "{tmp_path / "state.json"}"\n' + "".join(
        f'[models.{name}]\nmodel = "builtin:echo"\npreload = {preload}\n'
        for name, preload in {
            "pinned": "true",
            "off": "true",
            "started": "false",
            "stopped": "true",
            "idle": "false",
        }.items()
    )
    path = write(tmp_path / "headrace.toml", text)
    expected = {
        "pinned": (True, True, True),
        "off": (False, False, False),
        "started": (True, False, True),
        "stopped": (False, False, True),
        "idle": (False, False, True),
        "echo": (True, False, True),
    }

    async def as_expected(http: httpx.AsyncClient) -> bool:
        found = (await http.get("/admin/models")).json()["models"]
        return expected == {
            one["id"]: (one["state"] == "ready", one["pinned"], one["enabled"]) for one in found
        }

    with served("--config", str(path)) as service:
        async with client(service.url) as http:
            await post(http, "models/pin", model="pinned", pinned=True)
            await post(http, "models/update", model="off", settings={"enabled": False})
            await post(http, "models/load", model="started")
            await post(http, "models/unload", model="stopped")
            await post(http, "models/load", model="builtin:echo")
            await until(partial(as_expected, http))
        # Not even a chance to write anything at the end.
        service.process.kill()
        service.process.wait()
    with served("--config", str(path)) as service:
        async with client(service.url) as http:
            await until(partial(as_expected, http))
            refused = await stream(http, "off", "hello")
            served_again = await stream(http, "stopped", "hello")
    assert (refused.status, refused.error and refused.error["code"]) == (503, "model_disabled")
    assert served_again.text == "hello"


async def test_two_services_of_one_home_keep_apart(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """M8, W8: what is done in one, or to it, is nothing to the other."""
    home = tmp_path / "home"
    path = write(
        tmp_path / "headrace.toml",
        "".join(f'[models.{name}]\nmodel = "builtin:echo"\n' for name in ("river", "lake")),
    )
    ports = free_port(), free_port()
    at_home = {"HOME": str(home)}
    with (
        served("--config", str(path), port=ports[0], environment=at_home) as first,
        served("--config", str(path), port=ports[1], environment=at_home) as second,
    ):
        async with client(first.url) as one, client(second.url) as other:

            async def churn(http: httpx.AsyncClient) -> None:
                for name in ("river", "lake"):
                    await post(http, "models/unload", model=name)
                    assert (await stream(http, name, "hello")).text == "hello"

            await asyncio.gather(churn(one), churn(other))
            await post(one, "models/pin", model="river", pinned=True)
            assert (await status(one, "river"))["pinned"]
            assert not (await status(other, "river"))["pinned"]
            answer = Got()
            running = endless(other, answer, "lake")
            await begun([answer])
            first.process.kill()
            first.process.wait()
            answer.times.clear()
            assert (await stream(other, "river", "hello")).text == "hello"
            await begun([answer])
            running.cancel()
            await asyncio.wait({running})
            second.process.send_signal(signal.SIGTERM)
            assert await ended(second, 10) == 0
    states = sorted((home / "services").glob("*.json"))
    assert [state.name for state in states] == [f"{port}.json" for port in sorted(ports)]
    measured = json.loads((home / "measured.json").read_bytes())
    assert all(need["devices"]["cpu"] > 1 << 20 for need in measured.values())
    assert measured
