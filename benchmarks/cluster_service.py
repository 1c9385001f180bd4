"""Nodes and a front on loopback, for cluster.py and cluster_scale.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from headrace.lab import drive
from headrace.lab.drive import Server

_STEP_S = 0.05


class Service(NamedTuple):
    """Something that serves, and the processes of its API."""

    url: str
    processes: tuple[psutil.Process, ...]

    def cpu(self) -> float:
        """Return user and system seconds so far."""
        return sum(map(drive.cpu_of, self.processes))


@contextlib.asynccontextmanager
async def cluster(folder: Path, nodes: int, engine: dict[str, Any]) -> AsyncGenerator[Service]:
    """Start nodes and a front."""
    token = folder / "token"
    token.write_text("a token of this benchmark")
    shared = ("--token-file", str(token))
    async with contextlib.AsyncExitStack() as stack:
        ports = [drive.free_port() for _ in range(nodes)]
        processes: list[psutil.Process] = []
        for number, port in enumerate(ports):
            place = ("--wire-port", str(port), "--node-name", f"n{number}")
            command = drive.serve(
                "echo", *place, *shared, options=engine, command=("cluster", "node")
            )
            home = {"HEADRACE_HOME": str(folder / f"n{number}")}
            node = await stack.enter_async_context(drive.server(command, home))
            processes.append(node.program.process())
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        home = {"HEADRACE_HOME": str(folder / "front")}
        command = drive.serve("--nodes", addresses, *shared, command=("cluster", "front"))
        front = await stack.enter_async_context(drive.server(command, home, ready="/health/ready"))
        processes.append(front.program.process())
        await _load(front, nodes)
        yield Service(front.url, tuple(processes))


async def _load(front: Server, nodes: int) -> None:
    """Load the model at each node."""
    http = front.http()
    try:
        for number in range(nodes):
            body = {"model": f"n{number}:echo"}
            # Not every node is connected yet.
            while (await http.fetch("/admin/models/load", body))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(_STEP_S)
    finally:
        http.close()
