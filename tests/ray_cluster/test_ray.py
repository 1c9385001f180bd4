"""A Ray cluster of a head and two machines, in network namespaces; see scripts/test-ray."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from headrace.cluster import secure
from headrace.cluster.listing import fetch
from headrace.cluster.wire import Address
from headrace.config.cluster import ClusterSettings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HEAD, NET = "10.77.0.1", "10.77.0"
HERE = "10.77.0.254"
MACHINES = (2, 3)
SILENCE_S = 1.5
KEY = "a-key-of-this-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CONFIG = """
[server]
drain_s = 10
[cluster]
ray = "10.77.0.1:6379"
token_file = "cluster.token"
heartbeat_s = 0.3
silence_s = 1.5
[models.m]
model = "echo"
replicas = 2
options = { tokens_per_second = 40 }
"""
# Parts of a head that Headrace does not use.
WITHOUT = ("--include-dashboard=false", "--no-monitor")
# As systemd does with Restart=always. On a busy machine Ray may not be up by its own deadline.
AGAIN = 'until "$@"; do sleep 1; done'
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def until(condition: Callable[[], object], within_s: float = 150.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


class Network:
    """A bridge in a network namespace of this process, and one more for each machine."""

    def __init__(self) -> None:
        self.prefix = f"hr{os.getpid()}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET):
            pytest.skip(f"no network namespaces here: {os.strerror(ctypes.get_errno())}")
        ip("link", "set", "lo", "up")
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", f"{HERE}/24", "dev", "br0")
        ip("link", "set", "br0", "up")
        for number in (1, *MACHINES):
            name = self.name(number)
            ip("netns", "add", name)
            ip("link", "add", f"p{number}", "type", "veth", "peer", "name", "eth", "netns", name)
            ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth")
            for device in ("eth", "lo"):
                ip("-n", name, "link", "set", device, "up")
            ip("link", "set", f"p{number}", "master", "br0", "up")

    def name(self, number: int) -> str:
        return f"{self.prefix}-{number}"

    def processes(self, number: int) -> list[psutil.Process]:
        pids = ip("netns", "pids", self.name(number)).split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def kill(self, number: int, *words: str) -> None:
        """End the processes of a machine whose command has one of the words; all without any."""
        for process in self.processes(number):
            try:
                command = " ".join(process.cmdline())
                if not words or any(word in command for word in words):
                    process.kill()
            except psutil.NoSuchProcess:
                continue

    def link(self, number: int, state: str) -> None:
        ip("link", "set", f"p{number}", state)

    def close(self) -> None:
        for number in (1, *MACHINES):
            self.kill(number)
            ip("netns", "del", self.name(number))


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Cluster:
    def __init__(self, folder: Path, network: Network) -> None:
        self.folder = folder
        self.network = network
        self.file = folder / "headrace.toml"
        self.url = ""
        self.started: list[subprocess.Popen[bytes]] = []
        self.file.write_text(CONFIG)
        (folder / "cluster.token").write_text("a token of this test")
        ray_token = folder / "ray.token"
        ray_token.write_text(os.urandom(32).hex())
        ray_token.chmod(0o600)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(ray_token),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "gcs"),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_timeout_ms": "2000",
        }

    def start(self, number: int, *words: str, **variables: str) -> None:
        """Start a command on a machine; its output goes to a file."""
        log = (self.folder / f"{number}.log").open("ab")
        enter = ["ip", "netns", "exec", self.network.name(number)]
        if words[0] == "ray":
            enter += ["sh", "-c", AGAIN, "ray start"]
        if number == 1 and words[0] == "ray":
            # Else the head finds the other machines by their command lines.
            enter += ["unshare", "--pid", "--fork", "--mount-proc"]
        command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
        with log:
            started = subprocess.Popen(
                [*enter, *command],
                env=self.environment | {f"HEADRACE_{key}": text for key, text in variables.items()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(started)

    def start_ray(self, number: int) -> None:
        place = (f"--address={HEAD}:6379", '--resources={"headrace_node": 1}')
        if number == 1:
            place = ("--head", "--port=6379", *WITHOUT)
        given = (
            *place,
            *(f"--node-ip-address={NET}.{number}", f"--temp-dir={self.folder}/ray{number}"),
            *("--num-cpus=4", "--object-store-memory=80000000", "--disable-usage-stats", "--block"),
            "--include-log-monitor=false",
        )
        home = str(self.folder / f"home{number}")
        self.start(number, "ray", "start", *given, HOME=home, NODE_NAME=f"n{number}")

    def wait_for_ray(self, number: int) -> None:
        log = self.folder / f"{number}.log"
        try:
            until(lambda: "Ray runtime started" in log.read_text())
        except AssertionError:
            pytest.fail(f"Ray has not started on machine {number}: {log.read_text()[-2000:]}")

    def start_front(self) -> None:
        home = str(self.folder / "front")
        words = ("headrace", "--config", str(self.file), "cluster", "front")
        # Not on the machine of the head, whose processes end together in one of the tests.
        self.start(3, *words, "--host", f"{NET}.3", "--port", "8000", HOME=home, ADMIN_KEYS=KEY)
        self.url = f"http://{NET}.3:8000"

    def command(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `headrace cluster ...` beside the head."""
        enter = ("ip", "netns", "exec", self.network.name(1))
        run = (*enter, str(Path(sys.executable).parent / "headrace"), "--config", str(self.file))
        return subprocess.run(
            [*run, "cluster", *words],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def up(self) -> None:
        done = self.command("up", str(self.file), "--wait-s", "200")
        assert done.returncode == 0, done.stdout + done.stderr

    def nodes(self) -> dict[str, dict[str, Any]]:
        nodes = httpx.get(f"{self.url}/admin/models", headers=HEADERS, timeout=10).json()["nodes"]
        return {node["name"]: node for node in nodes}

    def ready(self) -> bool:
        """Whether both nodes are connected, have loaded the model, and are kept by an agent."""
        try:
            nodes = self.nodes().values()
        except httpx.TransportError:
            return False
        states = [(node["state"], node["models"], node["placed"]) for node in nodes]
        return states == [("connected", ["m"], "running")] * 2

    def listed(self) -> list[str]:
        """The states that the manager lists now."""
        member = secure.member(ClusterSettings(token_file=self.folder / "cluster.token"))
        try:
            return [node.state for node in asyncio.run(fetch(Address(HEAD, 11513), member))]
        except (OSError, secure.Refusal):
            return []

    def record(self, number: int) -> dict[str, Any]:
        folder = self.folder / f"home{number}" / "nodes" / f"n{number}"
        return json.loads((folder / "record.json").read_text())

    def agent(self, number: int) -> str:
        """The agent that has the node of a machine now."""
        return (self.folder / f"home{number}" / "nodes" / f"n{number}" / "agent").read_text()


class Stream(threading.Thread):
    """A streamed answer, and the longest time without a part of it."""

    def __init__(self, cluster: Cluster, words: int) -> None:
        super().__init__(daemon=True)
        number = next(_numbers)
        self.url = cluster.url
        self.prompt = " ".join(f"{number}.{word}" for word in range(words))
        self.text, self.gap_s, self.error = "", 0.0, ""
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": self.prompt}],
            "stream": True,
            "temperature": 0,
        }
        try:
            self._read(body)
        except httpx.HTTPError as error:
            self.error = repr(error)
        self.begun.set()

    def _read(self, body: dict[str, Any]) -> None:
        last = 0.0
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=60) as got:
            if got.status_code != 200:
                self.error = got.read().decode()
            for line in got.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                self.error = self.error or str(chunk.get("error", ""))
                text = "".join(c["delta"].get("content") or "" for c in chunk.get("choices", ()))
                if text:
                    now = time.monotonic()
                    self.gap_s, last = max(self.gap_s, now - (last or now)), now
                    self.text += text
                    self.begun.set()


def begin(cluster: Cluster, words: int = 30, count: int = 6) -> list[Stream]:
    """Answers that have begun at both nodes."""
    until(cluster.ready)
    streams = [Stream(cluster, words) for _ in range(count)]
    for stream in streams:
        assert stream.begun.wait(30)
    until(lambda: all(node["running"] for node in cluster.nodes().values()))
    return streams


def check(streams: Sequence[Stream], gap_s: float) -> None:
    for stream in streams:
        stream.join(90)
        assert stream.error == ""
        assert stream.text == stream.prompt
    longest = max(stream.gap_s for stream in streams)
    sys.stderr.write(f"longest gap {longest:.2f} s\n")
    assert longest < gap_s


def check_until(
    condition: Callable[[], object], cluster: Cluster, streams: Sequence[Stream], gap_s: float
) -> None:
    """Check the answers, and others that follow them until something has come about."""
    end = time.monotonic() + 150
    while check(streams, gap_s) or not condition():
        assert time.monotonic() < end, "it did not come"
        streams = [Stream(cluster, 10) for _ in range(4)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and the command ip")
    network = Network()
    # Sockets of Ray have paths of 107 characters at most.
    folder = Path("/tmp") / network.prefix
    folder.mkdir(mode=0o700)
    made = Cluster(folder, network)
    try:
        made.start_ray(1)
        for number in MACHINES:
            made.start_ray(number)
        yield made
    finally:
        network.close()
        for process in made.started:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_up(cluster: Cluster) -> None:
    """Issue 15.3: one node for each machine; whoever has no token is refused."""
    cluster.wait_for_ray(1)
    (cluster.folder / "wrong").write_text("0" * 64)
    wrong = {"RAY_AUTH_TOKEN_PATH": str(cluster.folder / "wrong")}
    refused = cluster.command("up", str(cluster.file), **wrong)
    assert "does not accept the token of this process" in refused.stderr
    for number in MACHINES:
        cluster.wait_for_ray(number)
    cluster.start_front()
    cluster.up()
    streams = begin(cluster)
    shown = cluster.command("status", "--url", cluster.url, HEADRACE_API_KEY=KEY)
    assert "PLACED BY RAY" in shown.stdout, shown.stderr
    before = [(cluster.record(number), cluster.agent(number)) for number in MACHINES]
    cluster.up()
    assert [(cluster.record(number), cluster.agent(number)) for number in MACHINES] == before
    check(streams, gap_s=5.0)


def test_a_killed_agent(cluster: Cluster) -> None:
    """Issue 15.3: no stream notices; the next agent adopts the node."""
    before, agent = cluster.record(2), cluster.agent(2)
    streams = begin(cluster)
    cluster.network.kill(2, "ray::ServeReplica")
    check_until(lambda: cluster.agent(2) != agent, cluster, streams, gap_s=1.0)
    until(cluster.ready)
    assert cluster.record(2) == before


def test_a_killed_node(cluster: Cluster) -> None:
    """Issue 15.3: its answers go on elsewhere; its agent starts another."""
    before = cluster.record(2)
    streams = begin(cluster)
    os.kill(before["pid"], signal.SIGKILL)
    check(streams, gap_s=3.0)
    until(lambda: cluster.record(2) != before)
    until(cluster.ready)


def test_a_killed_raylet(cluster: Cluster) -> None:
    """Issue 15.3: no stream notices; a raylet that is started again has the node adopted."""
    before, agent = cluster.record(2), cluster.agent(2)
    streams = begin(cluster)
    cluster.network.kill(2, "raylet/raylet")
    check_until(lambda: cluster.agent(2) != agent, cluster, streams, gap_s=1.0)
    assert psutil.pid_exists(before["pid"])
    until(cluster.ready)
    assert cluster.record(2) == before


def test_a_roll(cluster: Cluster) -> None:
    """Issue 15.3: a changed file replaces the nodes, one after the other; no request fails."""
    until(cluster.ready)
    before = [cluster.record(number)["pid"] for number in MACHINES]
    over, ended = threading.Event(), list[Stream]()

    def load() -> None:
        while not over.is_set():
            stream = Stream(cluster, 20)
            stream.join(60)
            ended.append(stream)

    loads = [threading.Thread(target=load) for _ in range(4)]
    for thread in loads:
        thread.start()
    cluster.file.write_text(CONFIG.replace("= 40", "= 41"))
    cluster.up()
    until(cluster.ready)
    over.set()
    for thread in loads:
        thread.join(60)
    sys.stderr.write(f"{len(ended)} requests\n")
    check(ended, gap_s=10.0)
    after = [cluster.record(number)["pid"] for number in MACHINES]
    assert not {*before} & {*after}


def test_a_head_that_begins_anew(cluster: Cluster) -> None:
    """Issue 15.3: requests are answered meanwhile; it finds what it had placed."""
    before = [cluster.record(number) for number in MACHINES]
    streams = begin(cluster)
    cluster.network.kill(1)
    check([*streams, *(Stream(cluster, 20) for _ in range(4))], gap_s=1.0)
    cluster.start_ray(1)
    until(lambda: cluster.listed() == ["running", "running"], 240)
    until(cluster.ready)
    assert [cluster.record(number) for number in MACHINES] == before


@pytest.mark.slow
def test_a_head_that_is_gone_for_a_minute(cluster: Cluster) -> None:
    """Issue 15, shown 3: raylets end by themselves then; nodes and answers go on."""
    before = [cluster.record(number) for number in MACHINES]
    until(cluster.ready)
    gone = time.monotonic()
    cluster.network.kill(1)
    while time.monotonic() - gone < 75:
        check([Stream(cluster, 40) for _ in range(20)], gap_s=2.0)
    assert {node["state"] for node in cluster.nodes().values()} == {"connected"}
    cluster.start_ray(1)
    until(cluster.ready, 200)
    assert [cluster.record(number) for number in MACHINES] == before


def test_a_link_that_is_down(cluster: Cluster) -> None:
    """Issue 15.3: eight seconds; answers go on elsewhere, and the node is the same after it."""
    before = cluster.record(2)
    streams = begin(cluster)
    down = time.monotonic()
    cluster.network.link(2, "down")
    check_until(lambda: time.monotonic() - down > 8, cluster, streams, gap_s=SILENCE_S + 3.0)
    cluster.network.link(2, "up")
    until(lambda: cluster.nodes()["n2"]["state"] == "connected")
    assert cluster.record(2) == before


def test_down(cluster: Cluster) -> None:
    """Issue 15.3: nodes and agents end, after the answers that run."""
    streams = begin(cluster, words=60)
    done = cluster.command("down", "--wait-s", "60")
    assert done.returncode == 0, done.stderr
    check(streams, gap_s=5.0)
    until(lambda: not psutil.pid_exists(cluster.record(3)["pid"]))
    again = cluster.command("down")
    assert "has placed no nodes" in again.stderr
