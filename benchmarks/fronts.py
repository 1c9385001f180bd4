"""Fronts of one service: events a second with 1, 2 and 4, and what streams that are held cost.

`headrace serve` runs the engine `echo` in `--replicas` processes for each front. Each client
process holds the streams of one front's worth. Two parts:

- speed: every front is offered `--offered` events a second, more than it can write, and the events
  that arrive are counted over a window. The last column is the speed over that of one front, for
  each front: 1 is linear. CPU is of each process for each event: `models` is the process with the
  pool, which with one front has the connections too. `busy` is the share of all cores' time that
  was spent: near 1 the machine is full, and not the fronts.
- held: so many streams at 2 events a second; the memory of the service's processes without the
  engines, above that with no stream, for each stream; and how much longer than half a second the
  time between two events of a stream is.

Clients, engines and fronts need a core each, so the figures are of a machine with 16 or more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

import report
from headrace.core.metrics import percentile
from headrace.lab import drive, load
from headrace.lab.drive import Program, Server
from headrace.machine import raise_open_files

FRONTS = (1, 2, 4)
HELD = (1000, 5000)
STREAMS = 64
GOAL = 0.9
HELD_SPEED, HELD_TOKENS = 2.0, 24
_SETTLE_S = 1.0
_CONFIG = """
[server]
max_idle_connections = 65536

[models.echo]
model = "builtin:echo"
replicas = {replicas}
max_queued = 65536
options = {{ tokens_per_second = {speed}, in_step = true, slots = 8192 }}
"""


class Processes(NamedTuple):
    """The processes of a service."""

    models: psutil.Process
    fronts: list[psutil.Process]
    engines: list[psutil.Process]

    @classmethod
    def of(cls, server: Server) -> Processes:
        """Find them."""
        models = server.program.process()
        children = models.children()
        fronts = [each for each in children if "headrace.fronts.front" in each.cmdline()]
        return cls(models, fronts, [each for each in children if each not in fronts])

    def cpu(self) -> tuple[float, float, float]:
        """Return seconds of CPU so far: of the models' process, all fronts, all engines."""
        fronts, engines = (sum(map(drive.cpu_of, each)) for each in (self.fronts, self.engines))
        return drive.cpu_of(self.models), fronts, engines

    def memory(self) -> int:
        """Return the resident bytes without the engines."""
        return sum(each.memory_info().rss for each in (self.models, *self.fronts))


class Speed(NamedTuple):
    """One measurement of the speed; the four CPUs are microseconds for each event."""

    fronts: int
    offered: float
    events: int
    seconds: float
    models: float
    front: float
    engines: float
    clients: float
    busy: float
    load_average: float

    @property
    def each_s(self) -> float:
        """Events a second."""
        return self.events / self.seconds


class Held(NamedTuple):
    """One measurement of held streams; memory in bytes, gaps in milliseconds above the pace."""

    fronts: int
    streams: int
    memory: int
    before: int
    gap_p50: float
    gap_p99: float
    gap_max: float
    first_p99: float
    failed: int

    @property
    def each(self) -> float:
        """KiB for each stream."""
        return (self.memory - self.before) / self.streams / 1024


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser(__doc__)
    parser.add_argument("--fronts", type=int, nargs="+", default=FRONTS)
    parser.add_argument("--replicas", type=int, default=2, help="processes of engines, a front")
    parser.add_argument("--clients", type=int, default=4, help="processes of clients")
    parser.add_argument("--offered", type=float, default=70_000, help="events a second and front")
    parser.add_argument("--window", type=float, default=5.0, help="seconds of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held", type=int, nargs="*", default=HELD)
    options = parser.parse_args(argv)
    if options.quick:
        options.fronts, options.replicas, options.clients, options.held = (1, 2), 1, 1, (8,)
        options.offered, options.window, options.rounds = 2000.0, 0.5, 1
    return options


@contextlib.asynccontextmanager
async def service(fronts: int, replicas: int, speed: float) -> AsyncGenerator[Server]:
    """Start a service, and wait until all replicas are loaded."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "headrace.toml"
        config.write_text(_CONFIG.format(replicas=replicas, speed=speed))
        command = drive.serve("--fronts", str(fronts), "--config", str(config))
        home = {"HEADRACE_HOME": folder}
        async with drive.server(command, home, ready="/health/ready") as server:
            await ready_replicas(server, "echo", replicas)
            yield server


async def ready_replicas(server: Server, model: str, number: int) -> None:
    """Wait until so many replicas of a model are loaded."""
    while True:
        http = server.http()
        try:
            status = msgspec.json.decode((await http.fetch(f"/admin/models/{model}"))[1])
        finally:
            http.close()
        if sum(each["state"] == "ready" for each in status["replicas"]) == number:
            return
        await asyncio.sleep(0.1)


async def at_each(clients: Sequence[Program], url: str, bodies: Sequence[dict[str, Any]]) -> None:
    """Open streams, as many at each client."""
    orders = (
        {"do": "open", "url": url, "bodies": bodies[place :: len(clients)]}
        for place in range(len(clients))
    )
    await asyncio.gather(*(each.ask(order) for each, order in zip(clients, orders, strict=True)))


async def counted(clients: Sequence[Program]) -> list[dict[str, Any]]:
    """Return what the clients have received so far."""
    return list(await asyncio.gather(*(each.ask({"do": "count"}) for each in clients)))


async def measure(clients: Sequence[Program], options: argparse.Namespace, fronts: int) -> Speed:
    """Offer events to a service, and count those that arrive."""
    streams = STREAMS * fronts
    speed = options.offered / STREAMS
    tokens = int(speed * (options.window + 30))
    body = {"prompt": "abcdefgh" * 8, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    async with service(fronts, fronts * options.replicas, speed) as server:
        await at_each(clients, server.url, [body] * streams)
        await asyncio.sleep(_SETTLE_S)
        processes = Processes.of(server)
        cpu, clock = [*processes.cpu(), _cpu(clients)], psutil.cpu_times()
        before = await counted(clients)
        await asyncio.sleep(options.window)
        after = await counted(clients)
        spent, busy = [*processes.cpu(), _cpu(clients)], _busy(clock)
        if sum(each["running"] for each in after) < streams:
            raise SystemExit("Streams ended too early.")
        average = report.load_average()
        # Ended first: what an overloaded service still has to write would only take time.
        processes.models.kill()
        await asyncio.gather(*(each.ask({"do": "close"}) for each in clients))
    events = sum(each["events"] for each in after) - sum(each["events"] for each in before)
    times = [late["at"] - early["at"] for late, early in zip(after, before, strict=True)]
    models, front, engines, load = (
        (late - early) / events * 1e6 for late, early in zip(spent, cpu, strict=True)
    )
    seconds, offered = sum(times) / len(times), options.offered * fronts
    return Speed(fronts, offered, events, seconds, models, front, engines, load, busy, average)


def _cpu(clients: Sequence[Program]) -> float:
    return sum(drive.cpu_of(each.process()) for each in clients)


def _busy(before: Any) -> float:
    """Return the share of all cores' time that was spent since then."""
    spent = [late - early for late, early in zip(psutil.cpu_times(), before, strict=True)]
    idle = sum(psutil.cpu_times()[3:5]) - sum(before[3:5])
    return 1 - idle / sum(spent)


async def hold(
    clients: Sequence[Program], options: argparse.Namespace, fronts: int, streams: int
) -> Held:
    """Hold streams from their beginning to their end."""
    body = {"prompt": "abcdefgh", "max_tokens": HELD_TOKENS, "stream": True, "ignore_eos": True}
    async with service(fronts, fronts * options.replicas, HELD_SPEED) as server:
        # What is made at the first answers is no memory of a stream.
        await at_each(clients, server.url, [{**body, "max_tokens": 1}] * 8)
        await asyncio.gather(*(each.ask({"do": "drain"}) for each in clients))
        processes = Processes.of(server)
        before = processes.memory()
        await at_each(clients, server.url, [body] * streams)
        memory = processes.memory()
        drains = [each.ask({"do": "drain", "times": True}) for each in clients]
        timed = [stream for drain in await asyncio.gather(*drains) for stream in drain["streams"]]
    gaps = sorted(gap * 1000 - 1000 / HELD_SPEED for stream in timed for gap in stream["gaps"][:-1])
    firsts = sorted(1000 * (stream["first"] or 0.0) for stream in timed)
    return Held(
        fronts=fronts,
        streams=streams,
        memory=memory,
        before=before,
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
        gap_max=gaps[-1],
        first_p99=percentile(firsts, 99),
        failed=sum(stream["events"] < HELD_TOKENS for stream in timed),
    )


async def run(options: argparse.Namespace) -> tuple[list[Speed], list[Held]]:
    """Measure everything."""
    speeds, holds = list[Speed](), list[Held]()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(drive.program(load.command()))
            for _ in range(options.clients)
        ]
        for _ in range(options.rounds):
            for fronts in options.fronts:
                speeds.append(speed := await measure(clients, options, fronts))
                print(
                    f"  {fronts} fronts  {speed.each_s:8.0f} events/s of {speed.offered:.0f}"
                    f"  us/event: models {speed.models:.2f}, fronts {speed.front:.2f},"
                    f" engines {speed.engines:.2f}, clients {speed.clients:.2f}"
                    f"  busy {speed.busy:.2f}",
                    flush=True,
                )
        for streams in options.held:
            for fronts in options.fronts:
                holds.append(held := await hold(clients, options, fronts, streams))
                print(f"  {fronts} fronts  {streams} streams  {held.each:.1f} KiB each", flush=True)
    return speeds, holds


def table(speeds: Sequence[Speed], holds: Sequence[Held], facts: dict[str, Any]) -> list[str]:
    """Return the figures as lines of text; speeds are the best of the rounds."""
    lines = ["Fronts of one service", report.describe(facts), ""]
    lines.append("                      CPU, microseconds for each event")
    lines.append("fronts  events/s    models    fronts   engines   clients    busy  of linear")
    best = {
        count: max((s for s in speeds if s.fronts == count), key=lambda speed: speed.each_s)
        for count in sorted({speed.fronts for speed in speeds})
    }
    first = next(iter(best.values()))
    for count, speed in best.items():
        linear = speed.each_s / first.each_s / count * first.fronts
        lines.append(
            f"{count:6}  {speed.each_s:8.0f}  {speed.models:8.2f}  {speed.front:8.2f}"
            f"  {speed.engines:8.2f}  {speed.clients:8.2f}  {speed.busy:6.2f}  {linear:9.2f}"
        )
    lines += ["", "fronts  streams  MiB before  KiB a stream  gap +ms p50/p99/most  first p99 ms"]
    lines += [
        f"{held.fronts:6}  {held.streams:7}  {held.before / 2**20:10.0f}  {held.each:12.1f}"
        f"  {held.gap_p50:.1f} / {held.gap_p99:.1f} / {held.gap_max:.1f}  {held.first_p99:.0f}"
        + (f"  {held.failed} failed" if held.failed else "")
        for held in holds
    ]
    return lines


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    raise_open_files()
    (speeds, holds), facts = asyncio.run(run(options)), report.machine()
    goal = f"Goal: at least {GOAL} of linear on 16 or more cores."
    text = "\n".join([*table(speeds, holds, facts), f"{goal}{conditions}"])
    print(f"\n{text}")
    record = {
        "machine": facts,
        "speeds": [speed._asdict() for speed in speeds],
        "held": [held._asdict() for held in holds],
    }
    report.write("fronts", text, record, options)


if __name__ == "__main__":
    main()
