"""Two nodes and a front, each a process: kill -9, SIGSTOP, drain, and the openai package."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.ports import free_port
from tests.service.serving import Service, served

from headrace.cli.app import run
from headrace.cluster.detached import Folder, digest_of
from headrace.core.errors import ConfigError

WORDS = 60
_numbers = itertools.count()
CONFIG = """
[cluster]
nodes = {nodes}
token_file = "token"
heartbeat_s = 0.3
silence_s = 1.5
[models.m]
model = "echo"
replicas = 2
options = {{ tokens_per_second = 40 }}
[models.elsewhere]
model = "echo"
nodes = ["b"]
preload = false
[models.nowhere]
model = "echo"
nodes = ["gpu"]
"""


class Node:
    """A node that can be started anew at its address."""

    def __init__(self, name: str, port: int, folder: Path) -> None:
        self.name = name
        self.port = port
        self.folder = folder
        self.service: Service
        self._running: AbstractContextManager[Service] | None = None

    def start(self) -> None:
        home = {"HOME": str(self.folder / self.name), "CONFIG": str(self.folder / "headrace.toml")}
        arguments = ("--node-name", self.name, "--wire-port", str(self.port))
        self._running = served(*arguments, environment=home, command=("cluster", "node"))
        self.service = self._running.__enter__()

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.service.process.pid, number)

    def close(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None


class Cluster:
    def __init__(self, front: Service, nodes: dict[str, Node], folder: Path) -> None:
        self.front = front
        self.nodes = nodes
        self.folder = folder
        self.client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)

    def states(self) -> dict[str, str]:
        nodes = httpx.get(f"{self.front.url}/admin/models").json()["nodes"]
        return {node["name"]: node["state"] for node in nodes}

    def running(self) -> dict[str, int]:
        nodes = httpx.get(f"{self.front.url}/admin/models").json()["nodes"]
        return {node["name"]: node["running"] for node in nodes}

    def ready(self) -> bool:
        """Whether both nodes are there, and have loaded the model."""
        nodes = httpx.get(f"{self.front.url}/admin/models").json()["nodes"]
        return [node["models"][:1] for node in nodes if node["state"] == "connected"] == [["m"]] * 2

    def command(self, *words: str) -> str:
        """Run a command in this process, and return what it prints."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert run([*words, "--url", self.front.url]) == 0
        return output.getvalue()


def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    ports = [free_port() for _ in range(2)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    (folder / "headrace.toml").write_text(CONFIG.format(nodes=addresses))
    (folder / "token").write_text("a token of this test\n")
    nodes = {name: Node(name, port, folder) for name, port in zip("ab", ports, strict=True)}
    with ExitStack() as held:
        for node in nodes.values():
            held.callback(node.close)
            node.start()
        home = {"HOME": str(folder / "front"), "CONFIG": str(folder / "headrace.toml")}
        front = held.enter_context(served(environment=home, command=("cluster", "front")))
        opened = Cluster(front, nodes, folder)
        until(opened.ready)
        yield opened


class Stream(threading.Thread):
    """A streamed answer, and the longest time without a part of it."""

    def __init__(self, cluster: Cluster, words: int = WORDS) -> None:
        super().__init__(daemon=True)
        self.client = cluster.client
        # A prompt that a node had before would go there again.
        number = next(_numbers)
        self.prompt = " ".join(f"{number}.{word}" for word in range(words))
        self.text, self.gap_s = "", 0.0
        self.begun = threading.Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except openai.APIError as error:
            self.error = error
        self.begun.set()

    def _read(self) -> None:
        messages: Any = [{"role": "user", "content": self.prompt}]
        last = 0.0
        for chunk in self.client.chat.completions.create(
            model="m", messages=messages, stream=True, temperature=0
        ):
            if chunk.choices and chunk.choices[0].delta.content:
                now = time.monotonic()
                self.gap_s, last = max(self.gap_s, now - (last or now)), now
                self.text += chunk.choices[0].delta.content
                if len(self.text) > 20:
                    self.begun.set()


def streams(cluster: Cluster, count: int = 4) -> list[Stream]:
    """Answers that run at both nodes."""
    until(cluster.ready)
    begun: list[Stream] = []

    def run_at_both() -> bool:
        # On a busy machine the first ones may have ended before the last has begun.
        check_whole(begun, gap_s=60.0)
        begun[:] = [Stream(cluster) for _ in range(count)]
        for stream in begun:
            assert stream.begun.wait(30)
        return all(cluster.running().values())

    until(run_at_both)
    return begun


def check_whole(begun: list[Stream], gap_s: float) -> None:
    for stream in begun:
        stream.join(60)
        assert stream.error is None
        assert stream.text == stream.prompt
    assert max((stream.gap_s for stream in begun), default=0.0) < gap_s


class Batch:
    """A batch over HTTP at the front."""

    def __init__(self, cluster: Cluster, count: int = 12) -> None:
        self.files = cluster.client.files
        self.batches = cluster.client.batches
        self.prompts = {f"r{number}": f"{number} one two" for number in range(count)}
        lines = [json.dumps(self._line(*item)) for item in self.prompts.items()]
        file = self.files.create(file=("r.jsonl", "\n".join(lines).encode()), purpose="batch")
        self.id = self.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        ).id

    def _line(self, name: str, prompt: str) -> dict[str, object]:
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}

    def completed(self) -> int:
        counts = self.batches.retrieve(self.id).request_counts
        return counts.completed if counts else 0

    def check(self) -> None:
        """Check that it ends, with each answer once."""
        until(lambda: self.batches.retrieve(self.id).status == "completed")
        output = self.batches.retrieve(self.id).output_file_id
        assert output is not None
        answers = [json.loads(line) for line in self.files.content(output).text.splitlines()]
        texts = {
            each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"]
            for each in answers
        }
        assert texts == self.prompts
        assert len(answers) == len(texts)


def test_the_openai_package(cluster: Cluster) -> None:
    """Issue 15, shown 1: a front is a server as any other; labels decide where a model is."""
    assert {model.id for model in cluster.client.models.list()} == {"m", "elsewhere"}
    messages: Any = [{"role": "user", "content": "one two three"}]
    for model in ("m", "elsewhere"):
        reply = cluster.client.chat.completions.create(model=model, messages=messages)
        assert reply.choices[0].message.content == "one two three"
        assert reply.usage is not None
        assert reply.usage.completion_tokens
    with pytest.raises(openai.NotFoundError):
        cluster.client.chat.completions.create(model="other", messages=messages)
    rows = cluster.command("ps").splitlines()
    assert [row.split()[0] for row in rows if "#0" in row].count("b") == 2
    assert "127.0.0.1" in cluster.command("cluster", "status")
    until(lambda: "Ready" in cluster.front.log)
    before, _, _ = cluster.front.log.partition("Ready")
    assert "Waiting for the nodes of the cluster" in before
    assert "has joined" in before
    assert "At b: It is loaded." in cluster.command("plan", "elsewhere")
    traces = cluster.folder / "front" / "traces"
    until(lambda: any(b'"elsewhere"' in path.read_bytes() for path in traces.glob("*")))


def test_labels_that_no_node_has(cluster: Cluster) -> None:
    """Issue 15.2: an operator's order does not load a model where it may not run."""
    response = httpx.post(f"{cluster.front.url}/admin/models/load", json={"model": "nowhere"})
    assert response.status_code == 400
    message = (
        "nowhere may run on nodes with the name or label gpu alone; the labels of {} are none."
    )
    assert response.json()["error"]["message"] in {message.format("a"), message.format("b")}
    assert run(["plan", "nowhere", "--url", cluster.front.url]) == 2
    assert cluster.states() == {"a": "connected", "b": "connected"}


def test_drain(cluster: Cluster) -> None:
    """Issue 15.2: what runs there ends there, and nothing new comes."""
    begun = streams(cluster)
    assert "a is draining" in cluster.command("cluster", "drain", "a")
    check_whole(begun, gap_s=5.0)
    until(lambda: cluster.running()["a"] == 0)
    later = [Stream(cluster, words=15) for _ in range(2)]
    for stream in later:
        assert stream.begun.wait(30)
    assert cluster.running()["a"] == 0
    check_whole(later, gap_s=5.0)
    assert "takes requests" in cluster.command("cluster", "drain", "a", "--off")
    until(lambda: cluster.states()["a"] == "connected")


def test_a_stopped_node(cluster: Cluster) -> None:
    """Issue 15, shown 3: silence; and the node comes back by itself."""
    begun = streams(cluster)
    cluster.nodes["b"].send(signal.SIGSTOP)
    try:
        check_whole(begun, gap_s=12.0)
        assert cluster.states() == {"a": "connected", "b": "gone"}
    finally:
        cluster.nodes["b"].send(signal.SIGCONT)
    until(cluster.ready)


def test_a_killed_node(cluster: Cluster) -> None:
    """Issue 15, shown 3: no answer fails, and each is as from one node alone; a batch neither."""
    for node in cluster.nodes.values():
        if not node.is_running:
            # They were killed by a first try of this test.
            node.start()
    begun, batch = streams(cluster), Batch(cluster)
    until(batch.completed)
    cluster.nodes["a"].send(signal.SIGKILL)
    check_whole(begun, gap_s=10.0)
    batch.check()
    cluster.nodes["a"].close()
    cluster.nodes["b"].send(signal.SIGKILL)
    until(lambda: "gone" in cluster.states().get("b", "gone"))
    response = httpx.post(
        f"{cluster.front.url}/v1/chat/completions",
        json={"model": "m", "messages": [{"role": "user", "content": "x"}]},
    )
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "no_node"
    cluster.nodes["b"].close()


def test_a_node_of_ray(tmp_path: Path) -> None:
    """Issue 15.3: its record for the next agent; no second one; without an agent it ends itself."""
    (tmp_path / "headrace.toml").write_text('[models.m]\nmodel = "echo"\n[cluster]\norphan_s = 3\n')
    home = {"HOME": str(tmp_path / "home"), "CONFIG": str(tmp_path / "headrace.toml")}
    place = ("--wire-port", "0", "--record", str(tmp_path / "record"))
    with served(*place, environment=home, command=("cluster", "node"), ready=False) as service:
        folder = Folder(tmp_path / "record")
        until(folder.record)
        record = folder.record()
        assert record is not None
        assert (record.pid, record.url) == (service.process.pid, service.url)
        assert record.wire in service.log
        assert record.digest == digest_of(tmp_path / "headrace.toml")
        with pytest.raises(ConfigError, match=f"already, process {record.pid}"):
            folder.begin()
        assert service.process.wait(60) == 0
        assert "this node ends" in service.log
        assert not folder.is_locked()
