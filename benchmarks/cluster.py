"""A front with nodes beside plain `headrace serve`: first token, speed, CPU for each event.

Services run side by side, all with the engine `echo` in step, 200 tokens/s for each stream:

- plain: `headrace serve echo`;
- front: `headrace cluster front` with one node, all on loopback, with a shared token;
- with `--serve`, two ways of Ray Serve (cluster_serve.py): `proxy`, where Headrace's HTTP
  application is a deployment behind Serve's own proxy, and `handle`, where it gets each event from
  a deployment by a handle. They have no telemetry, which the others have. It needs the environment
  of scripts/test-ray, Linux and root, as Ray listens in a network namespace of its own.

They are measured in turn, round after round, at 1, 8 and 32 streams; a ratio is that of the same
round, and the table shows the median. CPU is user and system time of the processes of the API: of
plain the service, of a cluster the front and its nodes together, of Serve the proxy or the front,
and the replica. Engines run in processes of their own, and do not count. The first token is the
median of all streams that were opened.

With `--unpaced`, the engine writes as fast as it can: it shows what the processes can pass on.

At last, how much more two and three nodes answer than one, by engines with 8 slots, and by nodes
with a tenth of a core each (cluster_scale.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import cluster_scale
import report
from cluster_service import Service, cluster
from faults_cluster import leave_network
from front import body_of
from headrace.lab import drive, figures, load
from headrace.lab.drive import Program

GOALS = {"first": 5.0, "speed": 0.98, "cpu": 1.5, "cpu of one": 2.1, "nodes": 0.95}
STREAMS = (1, 8, 32)
SERVICES = ("plain", "front", "proxy", "handle")
SPEED = 200.0
_SETTLE_S = 0.4
_FASTEST = 30_000.0


class Cell(NamedTuple):
    """One service, one round."""

    service: str
    streams: int
    events: int
    seconds: float
    cpu: float
    first_ms: float
    load_average: float

    @property
    def each(self) -> float:
        """Microseconds of CPU for each event."""
        return self.cpu / self.events * 1e6

    @property
    def speed(self) -> float:
        """Events each second."""
        return self.events / self.seconds


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("A front and its nodes beside plain serve.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=4.0, help="seconds of one measurement")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--unpaced", action="store_true", help="as fast as they can")
    parser.add_argument("--serve", action="store_true", help="beside the ways of Ray Serve")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.window, options.streams = 1, 0.5, (1,)
    return options


@contextlib.asynccontextmanager
async def ray_serve(folder: Path, engine: dict[str, Any]) -> AsyncGenerator[dict[str, Service]]:
    """Start Ray, and yield the ways of Serve."""
    command = report.script("cluster_serve.py", str(folder), json.dumps(engine))
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "log").open("w") as log:
        async with drive.program(command, quiet, errors=log) as program:
            ways = await program.ask()
            yield {
                name: Service(way["url"], tuple(map(psutil.Process, way["pids"])))
                for name, way in ways.items()
            }


async def measure(
    name: str, service: Service, client: Program, options: argparse.Namespace, streams: int
) -> Cell:
    """Open the streams, count over a window, and close them."""
    speed = _FASTEST if options.unpaced else SPEED
    body = body_of(speed, options.window + 20)
    await client.ask({"do": "open", "url": service.url, "bodies": [body] * streams})
    await asyncio.sleep(_SETTLE_S)
    cpu, before = service.cpu(), await client.ask({"do": "count"})
    await asyncio.sleep(options.window)
    after = await client.ask({"do": "count"})
    cpu = service.cpu() - cpu
    if after["running"] < streams:
        raise SystemExit(f"{name}: {streams - after['running']} streams ended too early.")
    await client.ask({"do": "close"})
    first_ms = await first_token(service, client, streams)
    return Cell(
        service=name,
        streams=streams,
        events=after["events"] - before["events"],
        seconds=after["at"] - before["at"],
        cpu=cpu,
        first_ms=first_ms,
        load_average=report.load_average(),
    )


async def first_token(service: Service, client: Program, streams: int) -> float:
    """Return the median time to a first token, in milliseconds."""
    body = {"prompt": "abcdefgh", "max_tokens": 2, "stream": True}
    firsts: list[float] = []
    while len(firsts) < 16:
        await client.ask({"do": "open", "url": service.url, "bodies": [body] * streams})
        answer = await client.ask({"do": "drain", "times": True})
        firsts += [1000 * stream["first"] for stream in answer["streams"]]
    return statistics.median(firsts)


async def compare(options: argparse.Namespace) -> list[Cell]:
    """Measure the services in turn."""
    engine = {} if options.unpaced else {"tokens_per_second": SPEED, "in_step": True}
    cells: list[Cell] = []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = await stack.enter_async_context(drive.program(load.command()))
        home = {"HEADRACE_HOME": str(folder / "plain")}
        command = drive.serve("echo", "--fronts", "1", options=engine)
        plain = await stack.enter_async_context(drive.server(command, home, ready="/health/ready"))
        services = {
            "plain": Service(plain.url, (plain.program.process(),)),
            "front": await stack.enter_async_context(cluster(folder, 1, engine)),
        }
        if options.serve:
            (folder / "serve").mkdir()
            services |= await stack.enter_async_context(ray_serve(folder / "serve", engine))
        for number in range(options.rounds):
            for streams in options.streams:
                for name in [*services][:: 1 if number % 2 else -1]:
                    cell = await measure(name, services[name], client, options, streams)
                    cells.append(cell)
                    print(
                        f"  {streams:3} streams  {name:6} {cell.each:7.1f} us/event"
                        f"  {cell.speed:8.0f} events/s  first {cell.first_ms:6.1f} ms",
                        flush=True,
                    )
    return cells


def of(cells: Sequence[Cell], service: str, streams: int, field: str) -> list[float]:
    """Return a figure of one service, round by round."""
    return [
        getattr(cell, field) for cell in cells if (cell.service, cell.streams) == (service, streams)
    ]


def compared(cells: Sequence[Cell], service: str, streams: int) -> dict[str, list[float]]:
    """Return the comparison of a service with plain, round by round."""
    plain = {name: of(cells, "plain", streams, name) for name in ("first_ms", "speed", "each")}
    other = {name: of(cells, service, streams, name) for name in plain}
    firsts = zip(other["first_ms"], plain["first_ms"], strict=True)
    return {
        "first": [mine - theirs for mine, theirs in firsts],
        "speed": figures.ratios(other["speed"], plain["speed"]),
        "cpu": figures.ratios(other["each"], plain["each"]),
    }


def rows(cells: Sequence[Cell]) -> list[tuple[str, int]]:
    """Return the services and numbers of streams that were measured."""
    return [*dict.fromkeys((cell.service, cell.streams) for cell in sorted(cells, key=_place))]


def _place(cell: Cell) -> tuple[int, int]:
    return SERVICES.index(cell.service), cell.streams


def table(
    cells: Sequence[Cell], scaled: Mapping[str, Sequence[float]], facts: dict[str, Any]
) -> list[str]:
    """Return the figures as lines of text."""
    lines = [
        "A front with one node beside plain `headrace serve`, in one interleaved run",
        report.describe(facts),
        "",
        "         streams  first token, ms later (least-most)  events/s, ratio"
        "          CPU/event, ratio       us/event",
    ]
    for service, streams in rows(cells):
        parts = compared(cells, service, streams)
        each = statistics.median(of(cells, service, streams, "each"))
        lines.append(
            f"{service:7}  {streams:7}  {figures.spread(parts['first']):34}"
            f"  {figures.spread(parts['speed']):23}  {figures.spread(parts['cpu']):21}  {each:.1f}"
        )
    lines += [f"{name}: {figures.spread(list(ratios))}" for name, ratios in scaled.items()]
    return lines


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    if options.serve:
        leave_network()
    cells, facts = asyncio.run(compare(options)), report.machine()
    scaled = asyncio.run(cluster_scale.scale(options))
    goal = ", ".join(f"{name} {value}" for name, value in GOALS.items())
    text = "\n".join([*table(cells, scaled, facts), f"Goals: {goal}.{conditions}"])
    print(f"\n{text}")
    record = {
        "machine": facts,
        "goals": GOALS,
        "compared": {f"{name} {n}": compared(cells, name, n) for name, n in rows(cells)},
        "nodes": scaled,
        "cells": [cell._asdict() for cell in cells],
    }
    name = "cluster-unpaced" if options.unpaced else "cluster"
    report.write(f"{name}-serve" if options.serve else name, text, record, options)


if __name__ == "__main__":
    main()
