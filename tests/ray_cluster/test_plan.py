"""What the manager and the agents decide, without Ray: its answers are put in here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.rig import member, until

from headrace import __version__
from headrace.cluster.detached import Folder, Record, digest_of
from headrace.cluster.listing import fetch
from headrace.cluster.wire import Address, Placed
from headrace.core.errors import ConfigError
from headrace.ray_cluster import agent as agents
from headrace.ray_cluster import manager as managers
from headrace.ray_cluster import up as commands
from headrace.ray_cluster.agent import Agent, Plan, RayFailure, Report
from headrace.ray_cluster.manager import Manager

CONFIG = """
[cluster]
ray = "127.0.0.1:6379"
ray_port = {port}
node_name = "n"
[models.m]
model = "echo"
"""


class Ray:
    """What Ray reports of its machines, and what Serve was to run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machines: dict[str, str] = {}
        self.fails = False
        self.calls = 0
        self.deployed: list[tuple[str, int]] = []
        monkeypatch.setattr(managers, "_machines", self.list)
        monkeypatch.setattr(managers, "_deploy", self.deploy)
        monkeypatch.setattr(managers, "_EVERY_S", 0.01)
        monkeypatch.setattr(agents, "_EVERY_S", 0.01)
        monkeypatch.setattr(agents, "_whereabouts", lambda: ("m1", "127.0.0.1"))

    def list(self) -> dict[str, str]:
        self.calls += 1
        if self.fails:
            raise RayFailure("the head is gone")
        return self.machines

    def deploy(self, plan: Plan, count: int) -> None:
        self.deployed.append((plan.digest, count))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


@pytest.fixture
def plan(tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    file = tmp_path / "headrace.toml"
    file.write_text(CONFIG.format(port=unused_port))
    return Plan(str(file), digest_of(file), __version__)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.asynccontextmanager
async def running(kind: type[Any], plan: Plan) -> AsyncGenerator[Any]:
    """A manager, or an agent that is not ready yet."""
    made = object.__new__(kind)
    beginning = asyncio.ensure_future(made.__init__(plan))
    await until(lambda: "_tasks" in vars(made))
    try:
        yield made
    finally:
        tasks = [beginning, *made._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_as_many_agents_as_machines(ray: Ray, plan: Plan) -> None:
    """Issue 15.3: machines come and go; while Ray's head is gone, nothing is changed."""
    async with running(Manager, plan):
        await until(lambda: ray.deployed == [(plan.digest, 1)])
        ray.machines = {"m1": "10.0.0.1", "m2": "10.0.0.2"}
        await until(lambda: ray.deployed[-1:] == [(plan.digest, 2)])
        ray.fails = True
        calls = ray.calls
        await until(lambda: ray.calls > calls + 2)
        ray.fails = False
        ray.machines = {"m2": "10.0.0.2"}
        calls = ray.calls
        await until(lambda: ray.calls > calls + 2)
        assert len(ray.deployed) == 2
        ray.machines = {f"m{number}": f"10.0.0.{number}" for number in range(3)}
        await until(lambda: ray.deployed[-1:] == [(plan.digest, 3)])


async def test_what_a_manager_lists(
    ray: Ray, plan: Plan, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 15.3: machines without an agent, old configurations, and agents that are silent."""
    ray.machines = {"m1": "10.0.0.1", "m2": "10.0.0.2", "m3": "10.0.0.3"}
    async with running(Manager, plan) as manager:
        await until(lambda: ray.deployed)
        place = Address("127.0.0.1", unused_port)
        report = Report("m1", plan.digest, Placed("a", "10.0.0.1:11512", "running"))
        assert await manager.report(report)
        assert await manager.report(Report("m2", "old", Placed("b", "10.0.0.2:11512", "running")))
        await until(lambda: ray.deployed)
        nodes = {node.address: node for node in await fetch(place, member("front", b""))}
        assert nodes["10.0.0.1:11512"].state == "running"
        assert nodes["10.0.0.2:11512"].state == "waiting"
        assert nodes["10.0.0.3:11512"] == Placed("10.0.0.3", "10.0.0.3:11512", "no agent yet")
        del ray.machines["m1"]
        await until(lambda: manager.placed()[0].reason == "Ray has lost its machine")
        monkeypatch.setattr(managers, "_SILENT_S", -1.0)
        assert "no report" in manager.placed()[1].reason
        await manager.end()
        assert not await manager.report(report)


async def test_a_manager_that_begins_anew(ray: Ray, plan: Plan) -> None:
    """It lists nothing before Ray has listed its machines: fewer would look like all."""
    ray.fails = True
    async with running(Manager, plan) as manager:
        await manager.report(Report("m1", plan.digest, Placed("a", "10.0.0.1:11512", "running")))
        assert await manager.nodes() == ()
        ray.fails, ray.machines = False, {"m1": "10.0.0.1"}
        await until(lambda: len(manager.placed()) == 1)


async def test_an_agent_adopts_what_runs(
    ray: Ray, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 15.3: and leaves it running where the new file, or version, is not there yet."""
    monkeypatch.setattr(agents, "_reported", lambda _report: None)
    folder = Folder(tmp_path / "home" / "nodes" / "n")
    folder.begin()
    record = Record(1, plan.digest, __version__, "http://x", "127.0.0.1:7")
    folder.publish(record)
    async with running(Agent, plan) as agent:
        await asyncio.wait_for(agent._ready.wait(), 20)
        assert agent._placed == Placed("n", "127.0.0.1:7", "running", "")
        agent.check_health()
    other = plan._replace(digest="other")
    async with running(Agent, other) as agent:
        await until(lambda: "is another here" in agent._placed.reason)
        assert not agent._ready.is_set()
    async with running(Agent, plan._replace(version="9")) as agent:
        await until(lambda: agent._placed.reason.startswith("Headrace 9 is wanted"))
    Path(plan.file).write_text("[cluster]\nray = 5")
    async with running(Agent, plan) as agent:
        await until(lambda: agent._placed.state == "failed")
        assert "ray" in agent._placed.reason
    assert folder.record() == record


def test_what_up_refuses(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 15.3: a Ray cluster without authentication, a token that is wrong, no Ray, no token."""
    from headrace import runtime

    config = runtime.load_settings(file=plan.file).config
    call: dict[str, Any] = {"insecure": False, "within_s": 0.0, "show": lambda _nodes: None}
    accepted = {"": True, "mine": False}
    monkeypatch.setattr(commands, "_is_accepted", lambda _address, token: accepted[token])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with pytest.raises(ConfigError, match="lets anyone who reaches it run programs"):
        commands.up(config, Path(plan.file), **call)
    accepted[""] = False
    with pytest.raises(ConfigError, match="does not accept the token"):
        commands.up(config, Path(plan.file), **call)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/none")
    with pytest.raises(ConfigError, match="/none: No such file"):
        commands.up(config, Path(plan.file), **call)
    beyond = config.cluster.model_copy(update={"ray": "10.0.0.1:6379"})
    with pytest.raises(ConfigError, match="reachable from other machines"):
        commands.up(config.model_copy(update={"cluster": beyond}), Path(plan.file), **call)
