"""The commands that speak to a running service, against one that answers as it is told."""

from __future__ import annotations

import json
import ssl
from typing import Any

import msgspec
import pytest
from tests.cli.stub import Stub, stub

from headrace.cli.app import run
from headrace.cli.client import Client
from headrace.cli.pool import status_text
from headrace.core.status import (
    DeviceStatus,
    Footprint,
    ModelStatus,
    Plan,
    PoolEvent,
    PoolStatus,
    Reloaded,
    ReplicaStatus,
)

MB = 1_000_000
NOW = 1_700_000_000.0
READY = ModelStatus(
    id="small",
    source="smollm2",
    state="ready",
    engine="llamacpp",
    memory={"cpu": 150 * MB},
    running=2,
    max_running=8,
    queued=3,
    max_queued=64,
    until=NOW + 200,
    restarts=1,
    last_error="The worker died: SIGSEGV\n" + "x" * 99,
)
CPU = DeviceStatus(name="cpu", total=16000 * MB, budget=8000 * MB, booked=150 * MB, free=9000 * MB)
PLAN = Plan(
    model="big",
    engine="llamacpp",
    need=Footprint(devices={"cpu": 4000 * MB}, parts={"weights": 3900 * MB}, load_s=62.4),
    fits=True,
    evict=("small",),
    largest_context=8192,
    reason="It fits when small has gone.",
    devices=(CPU,),
)


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.chdir(tmp_path)


def ask(service: Stub, *arguments: str) -> int:
    return run([*arguments, "--url", service.url])


def test_ps_shows_models_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """M2: how everything stands, in two tables or as JSON."""
    loading = ModelStatus(
        id="big", source="x", state="loading", progress="downloading", done=30, total=120
    )
    status = PoolStatus(models=(READY, loading), devices=(CPU,))
    with stub({"/admin/models": (200, status)}) as service:
        assert ask(service, "ps") == 0
        first, second = capsys.readouterr().out.split("\n\n")
        assert ask(service, "ps", "--json") == 0
        assert json.loads(capsys.readouterr().out)["models"][0]["id"] == "small"
    heads, small, big = first.splitlines()
    assert (
        " ".join(heads.split()) == "NAME STATE ENGINE MEMORY RUNNING QUEUED UNLOADS RESTARTS ERROR"
    )
    assert "small  ready" in small
    assert "llamacpp  150.0 MB  2/8      3/64" in small
    assert "The worker died: SIGSEGV xxx" in small
    assert "loading (downloading 25%)" in big
    assert " ".join(second.split()) == "DEVICE BUDGET BOOKED FREE cpu 8.0 GB 150.0 MB 9.0 GB"


@pytest.mark.parametrize(
    ("fields", "cells"),
    [
        ({}, ["ready", "150.0 MB", "in 3m20s"]),
        ({"until": None}, ["never"]),
        ({"until": NOW + 7500}, ["in 2h05m"]),
        ({"until": NOW - 1}, ["in 0s"]),
        ({"pinned": True}, ["pinned"]),
        ({"enabled": False}, ["disabled"]),
        ({"state": "failed", "retry_at": NOW + 25.2}, ["failed", "retry in 25s"]),
        ({"state": "failed"}, ["failed", "next request"]),
        ({"state": "stopped", "memory": {}, "max_running": None}, ["not loaded", "2/-", "3/64"]),
        (
            {"memory": {}, "estimated": Footprint(devices={"cpu": MB, "cuda:0": 2 * MB})},
            ["~1.0 MB cpu + 2.0 MB cuda:0"],
        ),
        ({"memory": {"cuda:0": MB}}, ["1.0 MB cuda:0"]),
        ({"id": "\x1b[2Jevil"}, ["[2Jevil"]),
        (
            {"replicas": (ReplicaStatus(number=0, state="ready", drafting=False),)},
            ["ready (drafts off)"],
        ),
        (
            {
                "replicas": (
                    ReplicaStatus(number=0, state="ready", running=2),
                    ReplicaStatus(number=1, state="failed", reason="it crashed"),
                )
            },
            ["  #0", "  #1", "failed", "it crashed"],
        ),
    ],
    ids=str,
)
def test_how_a_model_is_shown(fields: dict[str, Any], cells: list[str]) -> None:
    model = ModelStatus(
        **{field: getattr(READY, field) for field in READY.__struct_fields__} | fields
    )
    shown = status_text(PoolStatus(models=(model,), devices=()), NOW)
    assert [cell for cell in cells if cell not in shown] == []
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "path", "body"),
    [
        (["start", "small"], "load", {"settings": None}),
        (
            ["start", "small", "-o", "threads=2", "--set", "keep-alive=5m"],
            "load",
            {"settings": {"options.threads": "2", "keep_alive": "5m"}},
        ),
        (["stop", "small"], "unload", {}),
        (["restart", "small"], "restart", {}),
        (["pin", "small"], "pin", {"pinned": True}),
        (["pin", "small", "--off"], "pin", {"pinned": False}),
        (
            ["update", "small", "enabled=false", "options.threads="],
            "update",
            {"settings": {"enabled": "false", "options.threads": None}},
        ),
    ],
    ids=str,
)
def test_what_each_command_orders(
    arguments: list[str], path: str, body: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """M2: start, stop, restart and changes, by a command."""
    path = f"/admin/models/{path}"
    with stub({path: (200, READY)}) as service:
        assert ask(service, *arguments) == 0
        assert capsys.readouterr().out == "small is ready, 150.0 MB\n"
        assert ask(service, *arguments, "--json") == 0
        assert json.loads(capsys.readouterr().out)["state"] == "ready"
        assert service.asked == [("POST", path, {"model": "small", **body}, None)] * 2


def test_reload_says_what_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    done = Reloaded(added=("a", "b"), needs_restart=("server.port",))
    with stub({"/admin/reload": (200, done)}) as service:
        assert ask(service, "reload") == 0
        assert capsys.readouterr().out.split() == [
            "added",
            "a,",
            "b",
            "needs",
            "restart",
            "server.port",
        ]
        service.answers["/admin/reload"] = (200, Reloaded())
        assert ask(service, "reload") == 0
        assert capsys.readouterr().out == "nothing has changed\n"


def test_events_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """M5, M8, Issue 12.32: what happens can be followed, in the sentences of the log."""
    loaded = {"ms": 1230, "memory": {"cpu": 564_000_000}, "engine": "llamacpp"}
    events = [
        PoolEvent(time=NOW, kind="died", model="small", replica=2, data={"reason": "a\x1b b"}),
        PoolEvent(time=NOW, kind="ready", model="small", replica=1, data=loaded),
        PoolEvent(time=NOW, kind="ready", model="of another version"),
    ]
    lines = [b"event: x\ndata: " + msgspec.json.encode(event) + b"\n\n" for event in events]
    body = b": hello\n\n" + b"".join(lines)
    with stub({"/admin/events": (200, body)}) as service:
        assert ask(service, "events") == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.partition(" ")[2] for line in shown] == [
            "small #2 died: a b",
            "small ready (llamacpp, 564.0 MB, 1.2 s)",
            "of another version ready",
        ]
        assert ask(service, "events", "--json") == 0
        assert [json.loads(one)["kind"] for one in capsys.readouterr().out.splitlines()] == [
            "died",
            "ready",
            "ready",
        ]


def test_plan_of_a_running_service(capsys: pytest.CaptureFixture[str]) -> None:
    """M6: what a load would need and do; exit code 1 when there is no room for it."""
    with stub({"/admin/plan": (200, PLAN)}) as service:
        assert ask(service, "plan", "hub:org/big:Q4") == 0
        shown = capsys.readouterr().out
        for part in ("4.0 GB", "weights 3.9 GB", "estimated", "1m02s", "yes, when these go: small"):
            assert part in shown
        assert service.asked[0][1] == "/admin/plan?model=hub%3Aorg%2Fbig%3AQ4"
        never = Plan(model="big", engine="", need=PLAN.need, fits=False, reason="Too large.")
        service.answers["/admin/plan"] = (200, never)
        assert ask(service, "plan", "big") == 1
        assert "Too large." in capsys.readouterr().out
        assert ask(service, "plan", "big", "--json") == 1
        assert json.loads(capsys.readouterr().out)["fits"] is False


def error(message: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": "model", "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "code", "kind", "part"),
    [
        (404, error("No such model.", "model_not_found"), 2, "UnknownModel", "No such model."),
        (400, error("Bad.", "unknown_to_us"), 2, "RequestError", "Bad."),
        (401, error("Who?", "invalid_api_key"), 2, "Unauthorized", "HEADRACE_ADMIN_KEY"),
        (503, error("Too big.", "model_does_not_fit"), 1, "DoesNotFit", "Too big."),
        (503, error("Boo.", "model_load_failed"), 1, "LoadFailed", "Boo."),
        (500, error("Oh.", None), 1, "HeadraceError", "Oh."),
        (404, b"<html>nothing", 1, "UpstreamError", "is no Headrace: 404 <html>nothing"),
        (200, b"{}", 1, "UpstreamError", "or another version of it"),
    ],
)
def test_errors_of_the_service_are_one_line(
    status: int, body: Any, code: int, kind: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """L: errors are one line, with an exit code that means something."""
    with stub({"/admin/models/unload": (status, body)}) as service:
        assert ask(service, "stop", "x") == code
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert part in said
        assert ask(service, "stop", "x", "--json") == code
        assert json.loads(capsys.readouterr().err)["error"]["type"] == kind


def test_without_a_service(
    free_port: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for arguments in (["ps"], ["start", "echo"], ["plan", "echo"], ["events"]):
        assert run([*arguments, "--url", url]) == 1
        assert f"No service at {url}; start one with `headrace serve`" in capsys.readouterr().err
    assert run(["ps", "--url", "http://"]) == 2
    assert run(["ps", "--url", "ftp://x"]) == 2
    monkeypatch.setenv("HEADRACE_PORT", "0")
    assert run(["ps"]) == 2
    assert "name it with --url" in capsys.readouterr().err


def test_where_the_service_is_and_which_key_it_gets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """W3: a key is never a flag; the admin's key goes first."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with stub({"/admin/models": (200, PoolStatus(models=(), devices=()))}) as service:
        port = service.url.rpartition(":")[2]
        monkeypatch.setenv("HEADRACE_PORT", port)
        monkeypatch.setenv("HEADRACE_API_KEY", "mine")
        assert run(["ps"]) == 0
        monkeypatch.setenv("HEADRACE_HOST", "0.0.0.0")
        monkeypatch.setenv("HEADRACE_ADMIN_KEY", "admin")
        assert run(["ps"]) == 0
        monkeypatch.setenv("HEADRACE_PORT", "1")
        monkeypatch.setenv("HEADRACE_URL", f"127.0.0.1:{port}/v1/")
        assert run(["ps"]) == 0
        assert [asked[1:] for asked in service.asked] == [
            ("/admin/models", None, "Bearer mine"),
            ("/admin/models", None, "Bearer admin"),
            ("/admin/models", None, "Bearer admin"),
        ]
    assert "mine" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "is_checked"), [("http://a:1", False), ("https://a", True), ("HTTPS://a", True)]
)
def test_that_certificates_are_read_for_https_alone(
    monkeypatch: pytest.MonkeyPatch, url: str, is_checked: bool
) -> None:
    """Issue 10: a command starts 50 ms earlier, and each host of HTTPS is checked."""
    given: list[Any] = []

    def note(verify: Any, **_: Any) -> ssl.SSLContext:
        given.append(verify)
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    monkeypatch.setattr("httpx2._transports.default.create_ssl_context", note)
    Client(url)
    assert given[0] is is_checked
