"""The agent of a machine: a replica of a Serve deployment that keeps the machine's node."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from headrace import __version__, runtime
from headrace.cluster import secure
from headrace.cluster.detached import Folder, Keeper, Kept, Wanted, digest_of
from headrace.cluster.wire import Address, Placed
from headrace.config import Config
from headrace.core.errors import HeadraceError

APPLICATION = NAMESPACE = MANAGER = "headrace"
"""Names of the Serve application, and of the actor that has the list of nodes."""
RESOURCE = "headrace_node"
"""The custom resource of Ray that a machine has where a node is to be."""

_EVERY_S = 1.0
_ENDING_S = 30.0
_SCRIPT = '"$@" </dev/null >>"$0" 2>&1 & echo $!'


class RayFailure(Exception):
    """Ray could not do something; parts of it may be gone for a while."""


@contextmanager
def ray_errors() -> Generator[None]:
    """Raise RayFailure for any error of Ray's."""
    try:
        yield
    except Exception as error:
        # Ray's errors have no base class of their own.
        raise RayFailure(str(error)) from error


class Plan(NamedTuple):
    """What `cluster up` wants on each machine. The file is the same on all, at the same path."""

    file: str
    digest: str
    version: str


class Report(NamedTuple):
    """What an agent reports of its machine; `digest` is that of its plan."""

    machine: str
    digest: str
    placed: Placed


class Agent:
    """Keeps the node of its machine as the plan wants it. It is made once that node runs.

    The node is no child of this process, and outlives it; the next agent adopts it.
    """

    async def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._machine, self._host = await asyncio.to_thread(_whereabouts)
        self._keeper: Keeper | None = None
        self._placed = Placed(self._host, "", "starting")
        self._is_wanted = True
        self._ready = asyncio.Event()
        self._tasks = [asyncio.create_task(self._keep()), asyncio.create_task(self._tell())]
        await self._ready.wait()

    def check_health(self) -> None:
        """Fail if the node is not kept any more; called by Serve, which replaces this agent then.

        Raises:
            RuntimeError: a task has ended.
        """
        if any(task.done() for task in self._tasks):
            raise RuntimeError("The agent does not keep its node any more.")

    async def _keep(self) -> None:
        while True:
            try:
                self._placed = await asyncio.to_thread(self._step)
            except (HeadraceError, OSError, subprocess.SubprocessError) as error:
                self._placed = Placed(self._placed.node, self._placed.address, "failed", str(error))
            if self._placed.state == "running":
                self._ready.set()
            await asyncio.sleep(_EVERY_S)

    async def _tell(self) -> None:
        """Report to the manager. The node is kept whether or not there is one."""
        while True:
            report = Report(self._machine, self._plan.digest, self._placed)
            is_wanted = await asyncio.to_thread(_reported, report)
            self._is_wanted = self._is_wanted if is_wanted is None else is_wanted
            await asyncio.sleep(_EVERY_S)

    def _step(self) -> Placed:
        config = runtime.load_settings(file=self._plan.file).config
        name = secure.name_of(config.cluster)
        address = Address(self._host, config.cluster.wire_port)
        self._placed = Placed(name, str(address), self._placed.state, self._placed.reason)
        if self._keeper is None:
            folder = Folder(config.home / "nodes" / name)
            ending_s = config.server.drain_s + _ENDING_S
            self._keeper = Keeper(
                folder, secrets.token_hex(8), lambda: self._start(folder, config), ending_s
            )
        kept = self._kept(self._keeper)
        where = kept.record.wire if kept.record else str(address)
        return Placed(name, where, kept.state, kept.reason)

    def _kept(self, keeper: Keeper) -> Kept:
        plan = self._plan
        if not self._is_wanted:
            return keeper.step(None)
        if plan.version != __version__:
            return keeper.hold(f"Headrace {plan.version} is wanted, and {__version__} is here")
        if digest_of(Path(plan.file)) != plan.digest:
            return keeper.hold(f"{plan.file} is another here than where `cluster up` was run")
        return keeper.step(Wanted(plan.digest, plan.version))

    def _start(self, folder: Folder, config: Config) -> int:
        """Start the node as no child of this process; return its process id."""
        node = ("--node-name", secure.name_of(config.cluster), "--wire-host", self._host)
        command = (
            sys.executable,
            "-P",
            "-m",
            "headrace",
            "--config",
            self._plan.file,
            "cluster",
            "node",
        )
        record = ("--record", str(folder.path))
        started = subprocess.run(  # noqa: S603 - our own command
            ["/bin/sh", "-c", _SCRIPT, str(folder.log), *command, *node, *record],
            env=_environment(),
            cwd=Path(self._plan.file).parent,
            start_new_session=True,
            stdout=subprocess.PIPE,
            check=True,
        )
        return int(started.stdout)


def _whereabouts() -> tuple[str, str]:
    """Return the id and the address of this machine in the Ray cluster."""
    import ray

    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def _reported(report: Report) -> bool | None:
    """Report to the manager; return whether a node is wanted, None if there is no manager now."""
    import ray

    try:
        with ray_errors():
            # An actor that was started anew has another handle.
            manager: Any = ray.get_actor(MANAGER, namespace=NAMESPACE)
            return bool(ray.get(manager.report.remote(report), timeout=10 * _EVERY_S))
    except RayFailure:
        return None


def _environment() -> dict[str, str]:
    """Return the variables of `ray start` for a node: those of a worker of Ray are changed."""
    parent = psutil.Process(os.getppid())
    variables = parent.environ() if "raylet" in parent.name() else dict(os.environ)
    return {name: value for name, value in variables.items() if not name.startswith("RAY_")}
