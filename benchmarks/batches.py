"""A batch beside live requests: killed and resumed twice, each line answered once.

python benchmarks/batches.py [--lines 10000] [--rate 20] [--through cli|service]

Live requests come at a steady rate, and the latencies of those beside the batch are compared with
those of the others. Through the command, which is stopped every second slice of 5 s, both are of
the same minutes, so that what else the machine does is in both; through the service, which cannot
be stopped, the others come before. The command, or the service, is killed with SIGKILL at a third
and at two thirds of the lines; what comes while the service is not there is left out. The model is
the echo engine, at a real engine's speed.
"""

from __future__ import annotations

import argparse
import asyncio
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

CHAT = "/v1/chat/completions"
HEADRACE = (sys.executable, "-P", "-m", "headrace")
# As a batching engine: all streams get a token in each step.
SPEED = ("-o", "tokens_per_second=100", "-o", "in_step=true", "-o", "slots=64")
SLICE_S = 5.0
ALONE_S = 30.0
LIVE: Any = {"model": "echo", "messages": [{"role": "user", "content": "How long does this take?"}]}


class Setup(NamedTuple):
    """What is measured; `rate` is live requests a second."""

    lines: int
    rate: float
    through: str


class Result(NamedTuple):
    """Latencies in seconds, alone and beside the batch; lines of answers by custom id."""

    alone: list[float]
    beside: list[float]
    answers: Counter[str]
    kills: int
    batch_s: float


def quantile(values: list[float], share: float) -> float:
    """Return a quantile: the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def write_requests(path: Path, lines: int) -> None:
    """Write the requests of the batch."""
    chance = random.Random(2)  # answers of different lengths, as real ones
    with path.open("w") as file:
        for number in range(lines):
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
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        log = (self._home / "log").open("ab")
        command = [*HEADRACE, "serve", "echo", *SPEED, "--port", str(self.port)]
        environment = os.environ | {"HEADRACE_HOME": str(self._home)}
        self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise SystemExit("The service is not ready after 60 s.")

    def kill(self) -> None:
        """End it as the kernel does for lack of memory."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


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
    """Sends live requests at random times, and notes their latencies.

    Those that are sent while it is not `up` are left out, as are those that see a change of
    `beside`: whether the batch runs.
    """

    def __init__(self, url: str, rate: float) -> None:
        self.beside = False
        self.up = True
        self.latencies: dict[bool, list[float]] = {False: [], True: []}
        self._url = url
        self._rate = rate
        self._changes = 0

    def change(self, *, beside: bool, up: bool = True) -> None:
        """Note that the batch, or the service, runs from now on or not."""
        self.beside, self.up = beside, up
        self._changes += 1

    async def run(self) -> None:
        """Send requests until this is cancelled."""
        chance = random.Random(1)  # the same arrivals in each run
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=60) as client,
            asyncio.TaskGroup() as group,
        ):
            while True:
                if self.up:
                    group.create_task(self._send(client))
                await asyncio.sleep(chance.expovariate(self._rate))

    async def _send(self, client: httpx.AsyncClient) -> None:
        started, beside, changes = time.perf_counter(), self.beside, self._changes
        try:
            response = await client.post(CHAT, json=LIVE)
        except httpx.HTTPError:
            return
        if response.status_code == 200 and changes == self._changes:
            self.latencies[beside].append(time.perf_counter() - started)


class Command:
    """The batch by `headrace batch` on the service; the command is stopped, and killed."""

    def __init__(self, running: Service, folder: Path, live: Live) -> None:
        self._live = live
        self._out = folder / "answers.jsonl"
        command = [*HEADRACE, "batch", str(folder / "in.jsonl"), "-o", str(self._out)]
        self._command = [*command, "--url", running.url]
        self._begin()

    def _begin(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        self._until = time.monotonic() + SLICE_S
        self._live.change(beside=True)

    async def done(self) -> int:
        """Return how many lines are answered; stop or continue the command when it is time."""
        if time.monotonic() > self._until:
            stops = self._live.beside
            self._process.send_signal(signal.SIGSTOP if stops else signal.SIGCONT)
            self._until = time.monotonic() + SLICE_S
            self._live.change(beside=not stops)
        return self._out.read_bytes().count(b"\n") if self._out.exists() else 0

    async def kill(self) -> None:
        """Kill it, and begin again."""
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._begin()

    async def answers(self) -> bytes:
        """Return all answers."""
        while self._process.poll() is None:
            await self.done()
            await asyncio.sleep(0.1)
        return self._out.read_bytes()


class Kept:
    """The batch by /v1/batches; the service is killed."""

    def __init__(self, running: Service, folder: Path, live: Live) -> None:
        self._service = running
        self._live = live
        files = {"file": ("in.jsonl", (folder / "in.jsonl").read_bytes())}
        form = {"purpose": "batch"}
        file = self._ask("POST", "/v1/files", files=files, data=form)
        fields = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        self._id = self._ask("POST", "/v1/batches", json=fields)["id"]
        live.change(beside=True)

    def _ask(self, method: str, path: str, **given: Any) -> Any:
        return httpx.request(method, f"{self._service.url}{path}", timeout=60, **given).json()

    async def done(self) -> int:
        """Return how many lines are answered."""
        batch = await asyncio.to_thread(self._ask, "GET", f"/v1/batches/{self._id}")
        return batch["request_counts"]["completed"]

    async def kill(self) -> None:
        """Kill the service, and start it again."""
        self._live.change(beside=True, up=False)
        await asyncio.to_thread(self._service.kill)
        await asyncio.to_thread(self._service.start)
        self._live.change(beside=True)

    async def answers(self) -> bytes:
        """Return all answers."""
        while True:
            batch = await asyncio.to_thread(self._ask, "GET", f"/v1/batches/{self._id}")
            if batch["status"] == "completed":
                break
            await asyncio.sleep(0.1)
        url = f"{self._service.url}/v1/files/{batch['output_file_id']}/content"
        return (await asyncio.to_thread(httpx.get, url, timeout=60)).content


async def measure(setup: Setup, folder: Path) -> Result:
    """Run the batch beside live requests."""
    write_requests(folder / "in.jsonl", setup.lines)
    with service(folder) as running:
        live = Live(running.url, setup.rate)
        sending = asyncio.create_task(live.run())
        if setup.through == "service":
            await asyncio.sleep(ALONE_S)
        started, kills = time.monotonic(), 0
        batch = (Command if setup.through == "cli" else Kept)(running, folder, live)
        while kills < 2:
            await asyncio.sleep(0.1)
            if await batch.done() > (kills + 1) * setup.lines // 3:
                await batch.kill()
                kills += 1
        answers = await batch.answers()
        batch_s = time.monotonic() - started
        sending.cancel()
        await asyncio.wait([sending])
    ids = Counter(json.loads(line)["custom_id"] for line in answers.splitlines())
    return Result(live.latencies[False], live.latencies[True], ids, kills, batch_s)


def report(setup: Setup, result: Result) -> Iterator[str]:
    """Yield what has been measured, as text."""
    twice = sum(count > 1 for count in result.answers.values())
    yield (
        f"{setup.lines} lines through the {setup.through}, killed {result.kills} times: "
        f"{len(result.answers)} answered, {twice} twice, in {result.batch_s:.1f} s "
        f"({setup.lines / result.batch_s:.0f}/s)"
    )
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        before, after = quantile(result.alone, share), quantile(result.beside, share)
        yield (
            f"live {name}: {before * 1000:.0f} ms alone ({len(result.alone)} requests), "
            f"{after * 1000:.0f} ms beside the batch ({len(result.beside)}): "
            f"{100 * (after / before - 1):+.1f} %"
        )


def main() -> None:
    """Measure as the flags say, and print the report."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--lines", type=int, default=10_000)
    flags.add_argument("--rate", type=float, default=20.0)
    flags.add_argument("--through", choices=("cli", "service"), default="service")
    setup = Setup(**vars(flags.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(setup, Path(folder)))
    print("\n".join(report(setup, result)))


if __name__ == "__main__":
    main()
