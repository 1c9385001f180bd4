"""Processes that die (issue: must show 5)."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from tests.service.serving import Service, served

SLOW = ("builtin:echo", "-o", "tokens_per_second=50", "-o", "text=" + "river " * 500)


def body(**more: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": "hello"}]} | more


def worker(service: Service) -> psutil.Process:
    """The process of the model, once it is loaded: the service is ready before."""
    url = f"{service.url}/v1/chat/completions"
    httpx.post(url, json=body(max_tokens=1), timeout=30).raise_for_status()
    return only_worker(service)


def only_worker(service: Service) -> psutil.Process:
    """The process of the model, when nothing else that the service has started still ends."""
    end = time.monotonic() + 10
    while len(workers := service.workers()) != 1 and time.monotonic() < end:
        time.sleep(0.01)
    [only] = workers
    return only


def family(process: psutil.Process) -> list[psutil.Process]:
    """A worker, and the process that renders its templates."""
    children = process.children(recursive=True)
    assert children
    return [process, *children]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_worker_is_an_error_event_within_a_second(number: signal.Signals) -> None:
    """W17, W19: never a normal end; the API process lives and serves again."""
    with served(*SLOW, "--continuation", "off") as service:
        before = service.process.pid
        with httpx.stream(
            "POST", f"{service.url}/v1/chat/completions", json=body(stream=True), timeout=30
        ) as response:
            lines = response.iter_lines()
            while "content" not in next(lines):
                pass
            child = only_worker(service)
            killed = time.monotonic()
            child.send_signal(number)
            rest = [line for line in lines if line.startswith("data:")]
        assert time.monotonic() - killed < 1
        assert "[DONE]" not in rest[-1]
        error = json.loads(rest[-1].removeprefix("data:"))["error"]
        assert number.name in error["message"]
        assert service.process.poll() is None
        service.wait_until_ready(10)
        again = httpx.post(
            f"{service.url}/v1/chat/completions", json=body(max_tokens=5), timeout=30
        )
        assert again.status_code == 200
        assert service.process.pid == before


def test_a_hung_worker_is_killed_and_comes_back() -> None:
    """W19: silence for hang_s ends the worker, not the service."""
    hanging = ("builtin:echo", "-o", "hang_after=3", "--continuation", "off")
    with served(*hanging, environment={"HANG_S": "1"}) as service:
        started = time.monotonic()
        answer = httpx.post(f"{service.url}/v1/chat/completions", json=body(), timeout=30)
        assert answer.status_code == 502
        assert "hung" in answer.json()["error"]["message"]
        assert time.monotonic() - started < 5
        service.wait_until_ready(10)


@pytest.mark.parametrize("state", ["idle", "decoding", "hung"])
def test_children_go_with_their_parent(state: str) -> None:
    """W8: the API process dies by SIGKILL; within 2 s its children are gone, the port free."""
    options = ("-o", "hang_after=3") if state == "hung" else ()
    with served(*SLOW, *options) as service:
        children = family(worker(service))
        if state != "idle":
            with httpx.stream(
                "POST", f"{service.url}/v1/chat/completions", json=body(stream=True), timeout=30
            ) as response:
                next(response.iter_lines())
                died = kill(service)
        else:
            died = kill(service)
        port = urlsplit(service.url).port
        assert port
        assert last_seen(lambda: any(map(lives, children)) or is_taken(port)) - died < 2


def lives(process: psutil.Process) -> bool:
    """Whether it holds anything: what is only not waited for yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_taken(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def last_seen(true: Callable[[], bool]) -> float:
    """When it was true for the last time; a pause of the test itself does not count."""
    seen = 0.0
    end = time.monotonic() + 10
    while true():
        seen = time.monotonic()
        assert seen < end
        time.sleep(0.01)
    return seen


def kill(service: Service) -> float:
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    return time.monotonic()


def test_sigterm_drains_and_ends_with_0() -> None:
    """W8: a running answer is completed, the children are gone, the exit code is 0."""
    with served(*SLOW, "-o", "tokens_per_second=200") as service:
        children = family(worker(service))
        with httpx.stream(
            "POST",
            f"{service.url}/v1/chat/completions",
            json=body(stream=True, max_tokens=200),
            timeout=30,
        ) as response:
            lines = response.iter_lines()
            next(lines)
            service.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        assert service.process.wait(10) == 0
        assert not any(map(lives, children))
