"""How much more two and three nodes answer than one, for cluster.py.

- by slots: engines with 8 slots and 200 tokens/s for each; 48 answers of 50 tokens at a time, by
  the time until all have ended;
- by CPU: engines that write as fast as they can, and nodes that have a tenth of a core each with
  their engines, by a quota of control groups; 24 streams, by the events in a window. The front and
  the client have what is left of the machine. It needs root and Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster_service import Service, cluster
from headrace.lab import drive, load
from headrace.lab.drive import Program

SPEED, SLOTS, ANSWERS, TOKENS = 200.0, 8, 48, 50
NODES = (1, 2, 3)
CORES, STREAMS, LONGEST = 0.1, 24, 500_000
_PERIOD_US = 20_000
_SETTLE_S = 2.0
_GROUPS = Path("/sys/fs/cgroup")

Measure = Callable[[Service, Program], Awaitable[float]]
"""Returns how much a service has answered in a second."""


async def scale(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return how many times as much as one several nodes answer, round by round."""

    async def by_cpu(service: Service, client: Program) -> float:
        return await events(service, client, options.window)

    engine = {"tokens_per_second": SPEED, "slots": SLOTS}
    ratios = await compare("slots", options.rounds, engine, finished)
    if problem := no_quota():
        print(f"  Not by CPU: {problem}")
        return ratios
    engine = {"slots": STREAMS}
    return ratios | await compare("CPU", options.rounds, engine, by_cpu, cores=CORES)


async def compare(
    name: str, rounds: int, engine: dict[str, Any], measure: Measure, *, cores: float = 0.0
) -> dict[str, list[float]]:
    """Measure clusters of one, two and three nodes in turn; each node may have so many cores."""
    ratios: dict[str, list[float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = await stack.enter_async_context(drive.program(load.command()))
        services: dict[int, Service] = {}
        for nodes in NODES:
            (folder / str(nodes)).mkdir()
            opened = cluster(folder / str(nodes), nodes, engine)
            service = services[nodes] = await stack.enter_async_context(opened)
            for process in service.processes[:-1] if cores else ():
                stack.enter_context(quota(process, cores))
        for _ in range(rounds):
            done = {nodes: await measure(service, client) for nodes, service in services.items()}
            for nodes in NODES[1:]:
                ratio = done[nodes] / done[1]
                ratios.setdefault(f"{nodes} nodes over one, by {name}", []).append(ratio)
                print(f"  {nodes} nodes by {name}: {ratio:.2f} times one", flush=True)
    return ratios


async def finished(service: Service, client: Program) -> float:
    """Return how many answers end in a second, of those that begin at a time."""
    # Prompts of their own: equal ones would go to one node.
    body = {"max_tokens": TOKENS, "stream": True, "ignore_eos": True}
    bodies = [{**body, "prompt": f"{number} x"} for number in range(ANSWERS)]
    await client.ask({"do": "open", "url": service.url, "bodies": bodies})
    return ANSWERS / (await client.ask({"do": "drain"}))["seconds"]


async def events(service: Service, client: Program, window: float) -> float:
    """Return the events of a second, over a window in which all streams run."""
    body = {"max_tokens": LONGEST, "stream": True, "ignore_eos": True}
    bodies = [{**body, "prompt": f"{number} abcdefgh"} for number in range(STREAMS)]
    await client.ask({"do": "open", "url": service.url, "bodies": bodies})
    await asyncio.sleep(_SETTLE_S)
    before = await client.ask({"do": "count"})
    await asyncio.sleep(window)
    after = await client.ask({"do": "count"})
    await client.ask({"do": "close"})
    return (after["events"] - before["events"]) / (after["at"] - before["at"])


def no_quota() -> str:
    """Return why processes cannot be limited to a part of a core here; empty if they can be."""
    root = _GROUPS / "cpu"
    return "" if os.access(root / "cgroup.procs", os.W_OK) else f"{root} cannot be written"


@contextlib.contextmanager
def quota(process: psutil.Process, cores: float) -> Iterator[None]:
    """Limit a process and its descendants to a part of a core."""
    group = _GROUPS / "cpu" / f"headrace-{process.pid}"
    group.mkdir()
    (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(int(_PERIOD_US * cores)))
    try:
        for each in (process, *process.children(recursive=True)):
            (group / "cgroup.procs").write_text(str(each.pid))
        yield
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()
