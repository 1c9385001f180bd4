"""Faults of a cluster under running answers: none fails, and how long each stands still.

Two nodes and two fronts, each a process and each node in a network namespace of its own, run the
engine `echo`. The first front finds the nodes by a name in /etc/hosts. In each round 20 answers
run at both nodes, half of them with `continuation = "exact"`; then something fails:

- kill: a node gets SIGKILL, and is started again;
- stop: a node gets SIGSTOP, and SIGCONT when all answers have ended;
- partition: the network of a node is cut, and comes back when all answers have ended;
- drain: a node is drained, and takes requests again when all answers have ended;
- end: a node gets SIGTERM with `drain_s` shorter than its answers, and is started again;
- roll: the same with both nodes, one after the other, under new answers all the time;
- front: the other front gets SIGKILL; its answers are lost, and those of the first are not;
- directory: the name is gone, then names another address only.

Each answer has to be whole, byte by byte. The gap is the longest time without a part of one answer;
an exact one begins anew and repeats what was sent before it goes on, so its gap is longer by
that. The goal is 0.3 s, and after `stop` and `partition` that much beyond `silence_s`. With
`--ahead` all processes run before other work of the machine (at the lowest nice value), as on one
that is not busy. It needs Linux, root, and the command `ip`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import report
from faults_cluster import MODELS, NAMES, NET, SILENCE_S, SPEED, Cluster, first, ip, network
from headrace.lab.http import Broken, Headers, Http

GOAL_S = 0.3
STREAMS, TOKENS = 20, 160
_numbers = itertools.count()


class Answer:
    """One streamed answer: its text, and the longest time without a part of it."""

    def __init__(self, model: str, tokens: int) -> None:
        self.model = model
        # A prompt that a node has had before would go there again.
        self.prompt = f"{next(_numbers)} {'abcdefghi ' * tokens}"[:tokens]
        self.status = 0
        self.data = bytearray()
        self.times: list[float] = []
        self.failure = ""

    def head(self, status: int, headers: Headers) -> None:
        """Keep the status."""
        self.status = status

    def body(self, data: bytes, at: float) -> None:
        """Keep a piece."""
        self.data += data
        if b'"content":"' in data:
            self.times.append(at)

    @property
    def gap_s(self) -> float:
        """The longest time between two parts."""
        return max((later - earlier for earlier, later in pairwise(self.times)), default=0.0)

    @property
    def fault(self) -> str:
        """Why it is not whole; empty if it is."""
        if self.failure or self.status != 200:
            return self.failure or f"status {self.status}: {bytes(self.data[:200])!r}"
        parts = re.findall(rb'"content":("(?:[^"\\]|\\.)*")', bytes(self.data))
        text = "".join(map(json.loads, parts))
        if text != self.prompt:
            return f"{text!r} instead of {self.prompt!r}"
        return "" if b"data: [DONE]" in self.data else "it has no end"

    async def run(self, http: Http) -> None:
        """Send the request, and read the answer to its end."""
        message = {"role": "user", "content": self.prompt}
        body = {"model": self.model, "messages": [message], "stream": True, "temperature": 0}
        try:
            await http.send("/v1/chat/completions", json.dumps(body).encode(), self)
        except Broken as error:
            self.failure = f"{error.kind}: {error}"


class Round(NamedTuple):
    """One fault: why answers failed, and the longest gap in seconds by model."""

    failures: tuple[str, ...]
    gaps: Mapping[str, float]
    load_average: float


Fault = Callable[[Cluster, str, "asyncio.Task[None]"], Awaitable[None]]
"""Lets something fail for the node of that name; the task ends with the answers."""


async def kill(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """Kill a node."""
    cluster.nodes[node].send(signal.SIGKILL)
    await answers
    await cluster.restart(cluster.nodes[node])


async def stop(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """Stop a node for a while."""
    cluster.nodes[node].send(signal.SIGSTOP)
    try:
        await answers
    finally:
        cluster.nodes[node].send(signal.SIGCONT)


async def partition(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """Cut the network of a node for a while."""
    ip("link", "set", node, "down")
    try:
        await answers
    finally:
        ip("link", "set", node, "up")


async def drain(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """Drain a node."""
    await cluster.drain(node, on=True)
    await answers
    await cluster.drain(node, on=False)


async def end(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """End a node as an operator does."""
    cluster.nodes[node].send(signal.SIGTERM)
    await answers
    await cluster.restart(cluster.nodes[node])


async def roll(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """End and start one node after the other under answers that begin all the time."""
    rolled = asyncio.create_task(_roll(cluster))
    later: list[Answer] = []
    while not rolled.done():
        later += (begun := [Answer("fast", 20) for _ in range(8)])
        await _ask(cluster, "front", begun)
    await rolled
    await answers
    check(later)


async def _roll(cluster: Cluster) -> None:
    for service in cluster.nodes.values():
        service.send(signal.SIGTERM)
        await cluster.restart(service)
        await cluster.until(cluster.ready)


async def front(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """Kill the other front, with answers of its own."""
    lost = [Answer("fast", TOKENS) for _ in range(10)]
    losing = asyncio.create_task(_ask(cluster, "other", lost))
    await cluster.until(lambda: _begun(lost))
    cluster.fronts["other"].send(signal.SIGKILL)
    await losing
    await answers
    await cluster.until(cluster.is_idle)
    await cluster.restart(cluster.fronts["other"])


async def directory(cluster: Cluster, node: str, answers: asyncio.Task[None]) -> None:
    """Let the name of the nodes be unknown, then wrong."""
    for text in ("", f"{NET}.99 nodes\n"):
        cluster.hosts.write_text(text)
        later = [Answer("fast", 2 * SPEED) for _ in range(4)]
        await _ask(cluster, "front", later)
        check(later)
    await answers
    cluster.hosts.write_text(cluster.known)


FAULTS: dict[str, Fault] = {
    made.__name__: made for made in (kill, stop, partition, drain, end, roll, front, directory)
}


async def _begun(answers: Sequence[Answer]) -> bool:
    return all(answer.times or answer.failure for answer in answers)


def check(answers: Sequence[Answer]) -> None:
    """Raise Failed for answers that are not whole."""
    if faults := tuple(answer.fault for answer in answers if answer.fault):
        raise Failed(faults)


class Failed(Exception):
    """Answers are not whole."""


async def _ask(cluster: Cluster, name: str, answers: Sequence[Answer]) -> None:
    http = cluster.fronts[name].server.http()
    await asyncio.gather(*(answer.run(http) for answer in answers))
    http.close()


async def measure(cluster: Cluster, fault: Fault, node: str) -> Round:
    """Run one round."""
    await cluster.until(cluster.ready)
    answers = [Answer(MODELS[number % 2], TOKENS) for number in range(STREAMS)]
    running = asyncio.create_task(_ask(cluster, "front", answers))
    failures: list[str] = []
    await cluster.until(lambda: _begun(answers))
    try:
        await fault(cluster, node, running)
    except Failed as failed:
        failures += failed.args[0]
    await running
    failures += [answer.fault for answer in answers if answer.fault]
    gaps = {
        model: max(answer.gap_s for answer in answers if answer.model == model) for model in MODELS
    }
    return Round(tuple(failures), gaps, report.load_average())


async def run(options: argparse.Namespace) -> dict[str, list[Round]]:
    """Run all rounds of all faults."""
    rounds: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory() as folder, network():
        async with Cluster(Path(folder)) as cluster:
            for name in options.faults:
                rounds[name] = []
                for number in range(options.rounds):
                    round_ = await measure(cluster, FAULTS[name], NAMES[number % 2])
                    rounds[name].append(round_)
                    gaps = "  ".join(f"{model} {gap:.3f} s" for model, gap in round_.gaps.items())
                    print(f"  {name:10} {gaps}  {' '.join(round_.failures)}", flush=True)
    return rounds


def table(rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    """Return the figures as lines of text."""
    lines = ["fault       rounds  failed  gap s, median (most)   exact, median (most)"]
    for name, each in rounds.items():
        gaps = {model: [round_.gaps[model] for round_ in each] for model in MODELS}
        texts = [f"{statistics.median(gap):.3f} ({max(gap):.3f})" for gap in gaps.values()]
        failed = sum(len(round_.failures) for round_ in each)
        lines.append(f"{name:10}  {len(each):6}  {failed:6}  {texts[0]:21}  {texts[1]}")
    return lines


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS])
    parser.add_argument("--ahead", action="store_true", help="before other work of the machine")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def main() -> None:
    """Run, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    if os.geteuid() or not shutil.which("ip"):
        raise SystemExit("It needs root, and the command ip.")
    if options.ahead:
        os.nice(-40)
        first(os.getpid())
    rounds, facts = asyncio.run(run(options)), report.machine()
    lines = [f"{STREAMS} answers at two nodes, {SPEED} tokens/s each", report.describe(facts), ""]
    goals = f"Goal: none failed; {GOAL_S} s; stop and partition {SILENCE_S + GOAL_S} s.{conditions}"
    text = "\n".join([*lines, *table(rounds), goals])
    print(f"\n{text}")
    record = {name: [round_._asdict() for round_ in each] for name, each in rounds.items()}
    report.write("faults", text, {"machine": facts, "rounds": record}, options)
    if any(round_.failures for each in rounds.values() for round_ in each):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
