"""OpenAI's client and its batches, against a service that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from benchmarks.batches import Setup, measure, report
from tests.ports import free_port
from tests.service.serving import Service, served

CHAT = "/v1/chat/completions"
FLAGS = ("echo", "-o", "tokens_per_second=100", "-o", "slots=8")


def jsonl(lines: int) -> bytes:
    def body(number: int) -> dict[str, Any]:
        return {"model": "echo", "messages": [{"role": "user", "content": f"line {number}"}]}

    requests = (
        {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body(number)}
        for number in range(lines)
    )
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def openai_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def until(client: openai.OpenAI, id: str, completed: int) -> Any:
    """Return a batch when so many of its requests are answered."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        batch = client.batches.retrieve(id)
        assert batch.request_counts is not None
        counts, is_over = batch.request_counts, batch.status == "completed"
        if counts.completed >= completed and (is_over or counts.completed < counts.total):
            return batch
        time.sleep(0.02)
    raise AssertionError("it does not get that far")


def test_a_batch_of_a_service_that_is_killed_and_stopped(tmp_path: Path) -> None:
    """Issue 14.6: it goes on with the next service, and each line is answered once."""
    home, port = {"HOME": str(tmp_path)}, free_port()
    with served(*FLAGS, environment=home, port=port) as service, openai_of(service) as client:
        file = client.files.create(file=("in.jsonl", jsonl(120)), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            metadata={"of": "a test"},
        )
        until(client, batch.id, 20)
        os.kill(service.process.pid, signal.SIGKILL)
    with served(*FLAGS, environment=home, port=port) as service, openai_of(service) as client:
        until(client, batch.id, 60)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(20) == 0, "it waits for its batch"
    with served(*FLAGS, environment=home, port=port) as service, openai_of(service) as client:
        ended = until(client, batch.id, 120)
        assert (ended.status, ended.metadata) == ("completed", {"of": "a test"})
        text = client.files.content(ended.output_file_id).text
        assert [each.id for each in client.batches.list(limit=1)] == [batch.id]
        assert len([*client.files.list(limit=1)]) == 2
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        metrics = httpx.get(f"{service.url}/metrics", timeout=20).text
        name = "headrace_batch_request_duration_seconds_count"
        (count,) = (line for line in metrics.splitlines() if line.startswith(name))
        assert float(count.split()[-1]) > 0
        (record, *_) = httpx.get(f"{service.url}/admin/traces", timeout=20).json()["data"]
        assert record["batch"] is True
    ids = Counter(json.loads(line)["custom_id"] for line in text.splitlines())
    assert ids == dict.fromkeys(map(str, range(120)), 1)


def test_cancelling_with_the_client(tmp_path: Path) -> None:
    with (
        served(*FLAGS, environment={"HOME": str(tmp_path)}) as service,
        openai_of(service) as client,
    ):
        file = client.files.create(file=("in.jsonl", jsonl(500)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        until(client, batch.id, 5)
        # A live request goes first.
        started = time.monotonic()
        client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
        assert time.monotonic() - started < 5
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        end = time.monotonic() + 30
        while (ended := client.batches.retrieve(batch.id)).status != "cancelled":
            assert time.monotonic() < end
            time.sleep(0.02)
        counts = ended.request_counts
        assert counts is not None
        assert counts.completed + counts.failed == counts.total == 500
        assert ended.output_file_id
        assert client.files.content(ended.output_file_id).text.count("\n") == counts.completed


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("through", ["cli", "service"])
def test_ten_thousand_lines_beside_live_requests(tmp_path: Path, through: str) -> None:
    """Issue 14, what it must show 6: killed and resumed twice, each line answered once.

    The live requests' p99 is for a quiet machine: `benchmarks/batches.py` prints it.
    """
    setup = Setup(lines=10_000, rate=20.0, rounds=6, through=through)
    result = asyncio.run(measure(setup, tmp_path))
    assert result.kills == 2, "\n".join(report(setup, result))
    assert len(result.answers) == 10_000
    assert {*result.answers.values()} == {1}
