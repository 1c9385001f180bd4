"""A batch beside live requests: killed and resumed twice, each line answered once.

python benchmarks/batches.py [--lines 10000] [--rate 20] [--rounds 12] [--through cli|service]

Live requests come at a steady rate. Each round has three slices, so that what else the machine does
is in all of them: live requests alone, beside a program that takes the CPU time that the batch took
in the round before (the machine's part of what follows), and beside the batch. Through the service
each slice has a batch of its own; the command is stopped between its slices. The command, or the
service, is killed with SIGKILL in the batch's slices of two rounds. What comes while the service is
not there is left out, as is the first second of a service, whose first requests are slow in any
case. The model is the echo engine, at a real engine's speed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import psutil

CHAT = "/v1/chat/completions"
HEADRACE = (sys.executable, "-P", "-m", "headrace")
# As a batching engine: all streams get a token in each step.
SPEED = ("-o", "tokens_per_second=100", "-o", "in_step=true", "-o", "slots=64")
SLICE_S = 5.0
WARM_S = 1.0
LIVE: Any = {"model": "echo", "messages": [{"role": "user", "content": "How long does this take?"}]}
# Takes a share of a core, in parts of 10 ms.
BURN = """
import sys, time
share = min(1.0, float(sys.argv[1]))
while True:
    end = time.process_time() + 0.01 * share
    while time.process_time() < end: pass
    time.sleep(0.01 * (1 - share))
"""
BESIDE = ("nothing", "CPU", "batch")


class Setup(NamedTuple):
    """What is measured; `rate` is live requests a second."""

    lines: int
    rate: float
    rounds: int
    through: str


class Used(NamedTuple):
    """CPU seconds of the service's process, and of its models'."""

    api: float = 0.0
    models: float = 0.0


class Slice(NamedTuple):
    """What a slice has shown; latencies in seconds. `used` is None if the service was killed."""

    latencies: list[float]
    seconds: float
    used: Used | None


class Result(NamedTuple):
    """Slices by what was beside the live requests; lines of answers by custom id."""

    slices: dict[str, list[Slice]]
    answers: Counter[str]
    kills: int


def quantile(values: list[float], share: float) -> float:
    """Return a quantile: the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def write_requests(path: Path, numbers: range) -> None:
    """Write requests of a batch."""
    chance = random.Random(numbers.start)  # answers of different lengths, as real ones
    with path.open("w") as file:
        for number in numbers:
            text = f"Line {number} ".ljust(chance.randint(12, 36), "x")
            body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(line) + "\n")


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """A service on one port and one home, which can be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.kills = 0
        self._home = home

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        log = self._home / "log"
        command = [*HEADRACE, "serve", "echo", *SPEED, "--port", str(self.port)]
        environment = os.environ | {"HEADRACE_HOME": str(self._home)}
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise SystemExit(f"The service is not ready.\n{log.read_text()}")

    def kill(self) -> None:
        """End it as the kernel does for lack of memory."""
        self._process.kill()
        self._process.wait()

    def used(self) -> Used:
        """Return the CPU time until now."""
        api = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in api.children(recursive=True)]
        own = api.cpu_times()
        return Used(own.user + own.system, sum(time.user + time.system for time in times))


@contextmanager
def service(home: Path) -> Iterator[Service]:
    """Yield a running service."""
    running = Service(home)
    running.start()
    try:
        yield running
    finally:
        running.kill()


class Live:
    """Sends live requests at random times, and notes their latencies while it is `up`."""

    def __init__(self, url: str, rate: float) -> None:
        self.latencies: list[float] = []
        self._up = True
        self._url = url
        self._rate = rate
        self._changes = 0

    def change(self, *, up: bool = True) -> None:
        """Begin a list of latencies; those of requests that have begun are left out."""
        self.latencies, self._up = [], up
        self._changes += 1

    async def run(self) -> None:
        """Send requests until this is cancelled."""
        chance = random.Random(1)  # the same arrivals in each run
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=60) as client,
            asyncio.TaskGroup() as group,
        ):
            while True:
                if self._up:
                    group.create_task(self._send(client))
                await asyncio.sleep(chance.expovariate(self._rate))

    async def _send(self, client: httpx.AsyncClient) -> None:
        started, changes = time.perf_counter(), self._changes
        with contextlib.suppress(httpx.HTTPError):
            response = await client.post(CHAT, json=LIVE)
            if response.status_code == 200 and changes == self._changes:
                self.latencies.append(time.perf_counter() - started)


class Command:
    """The batch by `headrace batch` on the service; it is stopped between slices."""

    def __init__(self, running: Service, folder: Path, live: Live, setup: Setup) -> None:
        self._out = folder / "answers.jsonl"
        write_requests(folder / "in.jsonl", range(setup.lines))
        command = [*HEADRACE, "batch", str(folder / "in.jsonl"), "-o", str(self._out)]
        self._command = [*command, "--url", running.url]
        self._process: subprocess.Popen[bytes] | None = None

    def _begin(self) -> None:
        if self._process is None:
            self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        self._process.send_signal(signal.SIGCONT)

    async def slice(self, number: int, *, kill: bool) -> None:
        """Run for a slice; kill it in the middle, and begin again."""
        self._begin()
        for _ in range(2):
            await asyncio.sleep(SLICE_S / 2)
            if kill and self._process is not None:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
                kill, self._process = False, None
                self._begin()
        assert self._process is not None, "it has begun"
        self._process.send_signal(signal.SIGSTOP)

    async def answers(self) -> bytes:
        """Return all answers."""
        self._begin()
        assert self._process is not None, "it has begun"
        await asyncio.to_thread(self._process.wait)
        return self._out.read_bytes()


class Kept:
    """The batch by /v1/batches, one for each slice; the service is killed."""

    def __init__(self, running: Service, folder: Path, live: Live, setup: Setup) -> None:
        self._service = running
        self._folder = folder
        self._live = live
        self._setup = setup
        self._answers: list[bytes] = []

    def _ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        return httpx.request(method, f"{self._service.url}{path}", timeout=60, **given)

    def _create(self, number: int) -> str:
        lines, rounds, path = self._setup.lines, self._setup.rounds, self._folder / "in.jsonl"
        write_requests(path, range(number * lines // rounds, (number + 1) * lines // rounds))
        files = {"file": ("in.jsonl", path.read_bytes())}
        file = self._ask("POST", "/v1/files", files=files, data={"purpose": "batch"}).json()
        fields = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        return self._ask("POST", "/v1/batches", json=fields).json()["id"]

    async def slice(self, number: int, *, kill: bool) -> None:
        """Run a batch to its end."""
        id = await asyncio.to_thread(self._create, number)
        while True:
            await asyncio.sleep(0.1)
            batch = (await asyncio.to_thread(self._ask, "GET", f"/v1/batches/{id}")).json()
            counts = batch["request_counts"]
            if kill and counts["completed"] > counts["total"] // 2:
                kill = False
                await self._kill()
            if batch["status"] == "completed":
                break
        path = f"/v1/files/{batch['output_file_id']}/content"
        self._answers.append((await asyncio.to_thread(self._ask, "GET", path)).content)

    async def _kill(self) -> None:
        """Kill the service, and start it again."""
        self._live.change(up=False)
        await asyncio.to_thread(self._service.kill)
        await asyncio.to_thread(self._service.start)
        self._live.change()
        await asyncio.sleep(WARM_S)
        self._live.change()

    async def answers(self) -> bytes:
        """Return all answers."""
        return b"".join(self._answers)


@contextmanager
def burning(cores: float) -> Iterator[None]:
    """Take so many cores."""
    shares = [min(1.0, cores - taken) for taken in range(int(cores) + 1)]
    burners = [subprocess.Popen([sys.executable, "-c", BURN, str(share)]) for share in shares]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


class Rounds:
    """The slices, in turn."""

    def __init__(self, running: Service, live: Live, batch: Command | Kept) -> None:
        self.slices: dict[str, list[Slice]] = {name: [] for name in BESIDE}
        self._service = running
        self._live = live
        self._batch = batch
        self._cores = 0.0

    async def run(self, number: int, *, kill: bool) -> None:
        """Run the slices of a round."""
        alone = await self._slice("nothing", asyncio.sleep(SLICE_S))
        with burning(self._cores):
            await self._slice("CPU", asyncio.sleep(SLICE_S))
        beside = await self._slice("batch", self._batch.slice(number, kill=kill), killed=kill)
        if alone.used and beside.used:
            rates = [sum(used) / each.seconds for each in (beside, alone) if (used := each.used)]
            self._cores = max(0.0, rates[0] - rates[1])

    async def _slice(self, name: str, work: Any, *, killed: bool = False) -> Slice:
        # Requests of the slice before end, and are not noted.
        self._live.change()
        await asyncio.sleep(0.5)
        self._live.change()
        started, before = time.monotonic(), self._service.used()
        await work
        seconds, after = time.monotonic() - started, self._service.used()
        used = Used(after.api - before.api, after.models - before.models)
        result = Slice(self._live.latencies, seconds, None if killed else used)
        self.slices[name].append(result)
        return result


async def measure(setup: Setup, folder: Path) -> Result:
    """Run the rounds."""
    with service(folder) as running:
        live = Live(running.url, setup.rate)
        sending = asyncio.create_task(live.run())
        await asyncio.sleep(2 * WARM_S)
        batch = (Command if setup.through == "cli" else Kept)(running, folder, live, setup)
        rounds = Rounds(running, live, batch)
        killed = {setup.rounds // 3, 2 * setup.rounds // 3}
        for number in range(setup.rounds):
            await rounds.run(number, kill=number in killed)
        answers = await batch.answers()
        sending.cancel()
        await asyncio.wait([sending])
    ids = Counter(json.loads(line)["custom_id"] for line in answers.splitlines())
    return Result(rounds.slices, ids, len(killed))


def report(setup: Setup, result: Result) -> Iterator[str]:
    """Yield what has been measured, as text."""
    twice = sum(count > 1 for count in result.answers.values())
    yield (
        f"{setup.lines} lines through the {setup.through}, killed {result.kills} times: "
        f"{len(result.answers)} answered, {twice} twice"
    )
    yield "live beside   requests     p50 ms           p99 ms        ms of CPU/request: API, model"
    alone = [value for each in result.slices["nothing"] for value in each.latencies]
    for name, slices in result.slices.items():
        values = [value for each in slices for value in each.latencies]
        cells = [f"{name:12}", f"{len(values):9}"]
        for share in (0.5, 0.99):
            here, there = quantile(values, share), quantile(alone, share)
            cells.append(f"{here * 1000:7.0f} {100 * (here / there - 1):+6.1f} %")
        used = [each for each in slices if each.used]
        requests = sum(len(each.latencies) for each in used) or 1
        for place in range(2):
            seconds = sum(each.used[place] for each in used if each.used)
            cells.append(f"{1000 * seconds / requests:7.1f}")
        yield "  ".join(cells)


def main() -> None:
    """Measure as the flags say, and print the report."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--lines", type=int, default=10_000)
    flags.add_argument("--rate", type=float, default=20.0)
    flags.add_argument("--rounds", type=int, default=12)
    flags.add_argument("--through", choices=("cli", "service"), default="service")
    setup = Setup(**vars(flags.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(setup, Path(folder)))
    print("\n".join(report(setup, result)))


if __name__ == "__main__":
    main()
