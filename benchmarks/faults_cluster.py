"""Two nodes, each in a network namespace of its own, and two fronts, for faults.py."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.lab import drive
from headrace.lab.drive import Server
from headrace.lab.http import Broken

SILENCE_S, SPEED = 2.0, 40
NAMES = ("node1", "node2")
MODELS = ("fast", "exact")
NET, PORT = "10.78.0", 11512
CONFIG = f"""
[server]
drain_s = 1
[cluster]
token_file = "token"
silence_s = {SILENCE_S}
[models.fast]
model = "echo"
replicas = 2
continuation = "fast"
options = {{ tokens_per_second = {SPEED} }}
[models.exact]
model = "echo"
replicas = 2
continuation = "exact"
options = {{ tokens_per_second = {SPEED} }}
"""
_CLONE_NEWNET = 0x40000000
_STEP_S = 0.02
_WITHIN_S = 60.0


def ip(*words: str) -> str:
    """Run the command `ip`, and return what it prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def leave_network() -> None:
    """Move this process to a network namespace of its own, which has loopback alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise SystemExit(f"No network namespaces here: {os.strerror(ctypes.get_errno())}.")
    ip("link", "set", "lo", "up")


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Move this process to a network namespace of its own, and make one for each node."""
    leave_network()
    for words in ("link add br0 type bridge", "link set br0 up"):
        ip(*words.split())
    ip("addr", "add", f"{NET}.254/24", "dev", "br0")
    try:
        for number, node in enumerate(NAMES, 2):
            name = namespace(node)
            ip("netns", "add", name)
            ip("link", "add", node, "type", "veth", "peer", "name", "eth", "netns", name)
            ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth")
            for device in ("eth", "lo"):
                ip("-n", name, "link", "set", device, "up")
            ip("link", "set", node, "master", "br0", "up")
        yield
    finally:
        for node in NAMES:
            subprocess.run(["ip", "netns", "del", namespace(node)], check=False)


def first(pid: int) -> None:
    """Let a process and its session run before others."""
    # Nice values count among the processes of a session alone, where sessions are grouped.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("-20")


def namespace(node: str) -> str:
    """Return the name of the network namespace of a node."""
    return f"faults{os.getpid()}-{node}"


class Service:
    """A node or a front, which can be started again."""

    def __init__(self, folder: Path, name: str, command: Sequence[str], before: Sequence[str] = ()):
        self.name = name
        self.server: Server
        self._command = [*before, *command]
        self._settings = {
            "HEADRACE_CONFIG": str(folder / "headrace.toml"),
            "HEADRACE_HOME": str(folder / name),
            "HEADRACE_NODE_NAME": name,
        }
        self._held = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        self.server = await self._held.enter_async_context(
            drive.server(self._command, self._settings)
        )
        if os.nice(0) < 0:
            first(self.server.program.pid)

    async def close(self) -> None:
        """End it, if it still runs."""
        await self._held.aclose()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its process alone."""
        os.kill(self.server.program.pid, number)


class Cluster:
    """The nodes, the fronts and their file of hosts."""

    def __init__(self, folder: Path) -> None:
        self.hosts = folder / "hosts"
        self.known = "".join(f"{NET}.{number} nodes\n" for number, _ in enumerate(NAMES, 2))
        self.hosts.write_text(self.known)
        (folder / "headrace.toml").write_text(CONFIG)
        (folder / "token").write_text("a token of this benchmark")
        bind = (
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount --bind {self.hosts} /etc/hosts; exec "$@"',
        )
        fronts = {
            "front": (("--dns", f"nodes:{PORT}"), (*bind, "front")),
            "other": (("--nodes", ",".join(f"{NET}.{n}:{PORT}" for n in (2, 3))), ()),
        }
        self.nodes = {
            name: Service(
                folder,
                name,
                drive.serve("--wire-host", f"{NET}.{number}", command=("cluster", "node")),
                ("ip", "netns", "exec", namespace(name)),
            )
            for number, name in enumerate(NAMES, 2)
        }
        self.fronts = {
            name: Service(folder, name, drive.serve(*words, command=("cluster", "front")), before)
            for name, (words, before) in fronts.items()
        }

    async def __aenter__(self) -> Cluster:
        """Start all."""
        await asyncio.gather(*(service.start() for service in self.services))
        await self.until(self.ready)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all."""
        await asyncio.gather(*(service.close() for service in self.services))

    @property
    def services(self) -> list[Service]:
        """Nodes and fronts."""
        return [*self.nodes.values(), *self.fronts.values()]

    async def states(self, front: str = "front") -> list[dict[str, Any]]:
        """Return the nodes as a front has them; nothing if there is no front."""
        http = self.fronts[front].server.http()
        try:
            _, data = await http.fetch("/admin/models")
        except Broken:
            return []
        finally:
            http.close()
        return json.loads(data)["nodes"]

    async def ready(self) -> bool:
        """Whether both fronts have both nodes, with both models."""
        for front in self.fronts:
            nodes = [node for node in await self.states(front) if node["state"] == "connected"]
            if [sorted(node["models"]) for node in nodes] != [sorted(MODELS)] * len(NAMES):
                return False
        return True

    async def is_idle(self) -> bool:
        """Whether nothing runs at any node."""
        return not any(node["running"] for node in await self.states())

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Wait until a condition holds."""
        try:
            async with asyncio.timeout(_WITHIN_S):
                while not await condition():  # noqa: ASYNC110 - of other processes
                    await asyncio.sleep(_STEP_S)
        except TimeoutError:
            states = {name: await self.states(name) for name in self.fronts}
            raise SystemExit(f"It did not come within {_WITHIN_S:g} s: {states}") from None

    async def drain(self, node: str, *, on: bool) -> None:
        """Drain a node, or end that."""
        http = self.fronts["front"].server.http()
        status, data = await http.fetch("/admin/nodes/drain", {"node": node, "on": on})
        http.close()
        if status != 200:
            raise SystemExit(f"{node} is not drained: {data.decode()}")

    async def restart(self, service: Service) -> None:
        """Start a service again that has ended."""
        await service.server.program.wait()
        await service.close()
        await service.start()
