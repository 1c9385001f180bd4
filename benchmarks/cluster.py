"""A front with nodes beside plain `headrace serve`: first token, speed, CPU for each event.

Services run side by side, all with the engine `echo` in step, 200 tokens/s for each stream:

- plain: `headrace serve echo`;
- front: `headrace cluster front` with one node, all on loopback, with a shared token;

They are measured in turn, round after round, at 1, 8 and 32 streams; a ratio is that of the same
round, and the table shows the median. CPU is user and system time of the processes of the API: of
plain the service, of a cluster the front and its nodes together; engines run in processes of their
own, and do not count. The first token is the median of all streams that were opened.

With `--unpaced`, the engine writes as fast as it can: it shows what the processes can pass on.

At last, how much more engines with 8 slots answer on two and on three nodes than on one: 48 answers
of 50 tokens at a time, by the time until all have ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
from front import body_of
from headrace.lab import drive, figures, load
from headrace.lab.drive import Program, Server

GOALS = {"first": 5.0, "speed": 0.98, "cpu": 1.5, "cpu of one": 2.1, "nodes": 0.95}
STREAMS = (1, 8, 32)
NAMES = ("plain", "front")
SPEED = 200.0
SLOTS, ANSWERS, TOKENS = 8, 48, 50
NODES = (1, 2, 3)
_SETTLE_S = 0.4
_FASTEST = 30_000.0


class Service(NamedTuple):
    """Something that serves, and the processes of its API."""

    url: str
    programs: tuple[Program, ...]

    def cpu(self) -> float:
        """Return user and system seconds so far."""
        return sum(program.cpu() for program in self.programs)


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
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.window, options.streams = 1, 0.5, (1,)
    return options


@contextlib.asynccontextmanager
async def cluster(folder: Path, nodes: int, engine: dict[str, Any]) -> AsyncGenerator[Service]:
    """Start nodes and a front."""
    token = folder / "token"
    token.write_text("a token of this benchmark")
    shared = ("--token-file", str(token))
    async with contextlib.AsyncExitStack() as stack:
        ports = [drive.free_port() for _ in range(nodes)]
        programs: list[Program] = []
        for number, port in enumerate(ports):
            place = ("--wire-port", str(port), "--node-name", f"n{number}")
            command = drive.serve(
                "echo", *place, *shared, options=engine, command=("cluster", "node")
            )
            home = {"HEADRACE_HOME": str(folder / f"n{number}")}
            node = await stack.enter_async_context(drive.server(command, home))
            programs.append(node.program)
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        home = {"HEADRACE_HOME": str(folder / "front")}
        command = drive.serve("--nodes", addresses, *shared, command=("cluster", "front"))
        front = await stack.enter_async_context(drive.server(command, home, ready="/health/ready"))
        programs.append(front.program)
        await _load(front, nodes)
        yield Service(front.url, tuple(programs))


async def _load(front: Server, nodes: int) -> None:
    """Load the model at each node."""
    http = front.http()
    try:
        for number in range(nodes):
            body = {"model": f"n{number}:echo"}
            # Not every node is connected yet.
            while (await http.fetch("/admin/models/load", body))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(_SETTLE_S)
    finally:
        http.close()


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
    """Measure plain and front in turn."""
    engine = {} if options.unpaced else {"tokens_per_second": SPEED, "in_step": True}
    cells: list[Cell] = []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = await stack.enter_async_context(drive.program(load.command()))
        home = {"HEADRACE_HOME": str(folder / "plain")}
        command = drive.serve("echo", options=engine)
        plain = await stack.enter_async_context(drive.server(command, home, ready="/health/ready"))
        services = {
            "plain": Service(plain.url, (plain.program,)),
            "front": await stack.enter_async_context(cluster(folder, 1, engine)),
        }
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


async def scale(options: argparse.Namespace) -> dict[int, list[float]]:
    """Return how many times faster several nodes are than one, in each round."""
    engine = {"tokens_per_second": SPEED, "slots": SLOTS}
    body = {"prompt": "x", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
    ratios: dict[int, list[float]] = {nodes: [] for nodes in NODES[1:]}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = await stack.enter_async_context(drive.program(load.command()))
        services: dict[int, Service] = {}
        for nodes in NODES:
            (folder / str(nodes)).mkdir()
            opened = cluster(folder / str(nodes), nodes, engine)
            services[nodes] = await stack.enter_async_context(opened)
        for _ in range(options.rounds):
            seconds: dict[int, float] = {}
            for nodes, service in services.items():
                # Prompts of their own: equal ones would go to one node.
                bodies = [{**body, "prompt": f"{number} x"} for number in range(ANSWERS)]
                await client.ask({"do": "open", "url": service.url, "bodies": bodies})
                seconds[nodes] = (await client.ask({"do": "drain"}))["seconds"]
            for nodes, each in ratios.items():
                each.append(seconds[1] / seconds[nodes])
                print(f"  {nodes} nodes: {each[-1]:.2f} times one", flush=True)
    return ratios


def of(cells: Sequence[Cell], service: str, streams: int, field: str) -> list[float]:
    """Return a figure of one service, round by round."""
    return [
        getattr(cell, field) for cell in cells if (cell.service, cell.streams) == (service, streams)
    ]


def compared(cells: Sequence[Cell], streams: int) -> dict[str, list[float]]:
    """Return the comparison of front with plain, round by round."""
    plain = {name: of(cells, "plain", streams, name) for name in ("first_ms", "speed", "each")}
    front = {name: of(cells, "front", streams, name) for name in plain}
    firsts = zip(front["first_ms"], plain["first_ms"], strict=True)
    return {
        "first": [mine - theirs for mine, theirs in firsts],
        "speed": figures.ratios(front["speed"], plain["speed"]),
        "cpu": figures.ratios(front["each"], plain["each"]),
    }


def table(
    cells: Sequence[Cell], scaled: Mapping[int, Sequence[float]], facts: dict[str, Any]
) -> list[str]:
    """Return the figures as lines of text."""
    lines = [
        "A front with one node beside plain `headrace serve`, in one interleaved run",
        report.describe(facts),
        "",
        "streams  first token, ms later (least-most)  events/s, ratio          CPU/event, ratio",
    ]
    for streams in sorted({cell.streams for cell in cells}):
        parts = compared(cells, streams)
        lines.append(
            f"{streams:7}  {figures.spread(parts['first']):34}  {figures.spread(parts['speed']):23}"
            f"  {figures.spread(parts['cpu'])}"
        )
    for streams in sorted({cell.streams for cell in cells}):
        each = {name: statistics.median(of(cells, name, streams, "each")) for name in NAMES}
        lines.append(
            f"{streams:7}  plain {each['plain']:.1f} us/event, front and node {each['front']:.1f}"
        )
    for nodes, ratios in scaled.items():
        lines += ["", f"{nodes} nodes over one, of {nodes}: {figures.spread(list(ratios))}"]
    return lines


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    cells, facts = asyncio.run(compare(options)), report.machine()
    scaled = asyncio.run(scale(options))
    goal = ", ".join(f"{name} {value}" for name, value in GOALS.items())
    text = "\n".join([*table(cells, scaled, facts), f"Goals: {goal}.{conditions}"])
    print(f"\n{text}")
    record = {
        "machine": facts,
        "goals": GOALS,
        "compared": {str(n): compared(cells, n) for n in options.streams},
        "nodes": scaled,
        "cells": [cell._asdict() for cell in cells],
    }
    report.write("cluster-unpaced" if options.unpaced else "cluster", text, record, options)


if __name__ == "__main__":
    main()
