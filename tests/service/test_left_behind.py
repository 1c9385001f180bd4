"""A client that goes away leaves nothing behind (issue: must show 4); see test_cancellation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.service.leaving import leave, wait_for_the_slot
from tests.service.serving import Service, served


@pytest.fixture(scope="module")
def service(smollm2_path: Path) -> Iterator[Service]:
    # One thread: other tests run beside these.
    flags = ("-o", "slots=1", "-o", "threads=1", "--context-length", "1024")
    with served("smollm2", *flags) as running:
        yield running


def opened(pid: int) -> int:
    """Count file descriptors, without those of threads that are watched.

    Of these there are more while the machine is crowded (`engines/openmp.py`).
    """
    count = 0
    for one in Path(f"/proc/{pid}/fd").iterdir():
        # It may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            count += not str(one.readlink()).endswith("/schedstat")
    return count


def settled(service: Service) -> list[int]:
    """Return file descriptors and children, of the service and its child, when they stay so."""
    end, found = time.monotonic() + 10, list[int]()
    while time.monotonic() < end:
        child, *others = service.children()
        now = [opened(service.process.pid), opened(child.pid), len(others)]
        if now == found:
            return now
        found = now
        time.sleep(1)
    raise AssertionError(found)


def test_nothing_is_left_behind(service: Service) -> None:
    """W18: file descriptors and children are what they were."""
    # The first request opens the trace file.
    leave(service, True, 5, 0.2)
    wait_for_the_slot(service)
    before = settled(service)
    for _ in range(5):
        leave(service, True, 5, 0.2)
    wait_for_the_slot(service)
    after = settled(service)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def test_a_client_that_leaves_while_the_model_loads() -> None:
    """W18: the load goes on for the others, the request is gone."""
    with served("builtin:echo", "-o", "load_s=3", ready=False) as service:
        asked = {"model": "echo", "prompt": "hello"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/completions", json=asked, timeout=0.5)
        service.wait_until_ready()
        answer = httpx.post(f"{service.url}/v1/completions", json=asked, timeout=10)
        assert answer.json()["choices"][0]["text"] == "hello"
        # A request is logged when its answer has been sent.
        service.process.terminate()
        assert service.process.wait(10) == 0
        service.close()
    left, answered = [line for line in service.lines if "POST /v1/completions" in line]
    assert " left " in left
    assert " 200 echo " in answered
