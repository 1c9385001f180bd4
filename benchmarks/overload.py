"""Goodput under overload: at three times the load that can be served, against that load.

`headrace serve` with 4 slots and a bounded queue answers short requests without streaming. First
its capacity is measured in a closed loop of eight clients. Then requests arrive at random (Poisson,
always the same series), at the capacity and at three times the capacity, for equal times; at three
times once with clients that give up on a 429, and once with clients that retry after Retry-After
until the deadline.

Goodput is output tokens/s of the answers that were complete within the deadline, which counts from
the client's first attempt. A client disconnects at its deadline. A turn has a warm-up, in which
requests arrive and nothing is counted; what ends after the turn is not counted either. The order
of the turns is reversed in every other round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import report
from headrace.lab import drive, load
from headrace.lab.figures import percentile
from headrace.lab.http import Http, Whole

GOAL = 0.9
ROUNDS = 2
_CLIENTS, _SLOTS, _QUEUED, _CONTEXT = 8, 4, 16, 256
_TURNS = ((1.0, False), (3.0, False), (3.0, True))


class Outcome(NamedTuple):
    """The outcome of one request: when it began and ended, and how often it was refused.

    `status` is 0 if the client gave up at its deadline. Times are seconds since the turn began.
    """

    came: float
    over: float
    status: int
    tokens: int
    refusals: int
    waits: tuple[float, ...] = ()


class Turn(NamedTuple):
    """One load for a fixed time; `offered` is requests/s relative to the capacity."""

    offered: float
    obeys: bool
    seconds: float
    warm_s: float
    outcomes: list[Outcome]

    @property
    def counted(self) -> list[Outcome]:
        """The requests that ended within the turn, after its warm-up."""
        return [
            outcome
            for outcome in self.outcomes
            if self.warm_s <= outcome.over < self.warm_s + self.seconds
        ]

    @property
    def answered(self) -> list[Outcome]:
        """Those of them that were answered."""
        return [outcome for outcome in self.counted if outcome.status == 200]

    @property
    def goodput(self) -> float:
        """Output tokens/s of the answers."""
        return sum(outcome.tokens for outcome in self.answered) / self.seconds


class Bench(NamedTuple):
    """The service, the length of an answer, and its deadline."""

    http: Http
    max_tokens: int
    deadline_s: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = report.parser("Goodput at three times the capacity.")
    parser.add_argument("--model", default="smollm2", help="a model, or echo")
    parser.add_argument("--seconds", type=float, default=25, help="of a turn")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--deadline", type=float, default=10, help="seconds for an answer")
    options = parser.parse_args(argv)
    if options.quick:
        options.seconds, options.rounds = 4, 1
    return options


async def post(bench: Bench, number: int) -> tuple[int, int, float]:
    """Send one request; return the status, the tokens, and the seconds of a Retry-After."""
    source, answer = random.Random(number), Whole()
    body = {
        "prompt": load.prompt(source, 12),
        "max_tokens": bench.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    await bench.http.send(load.PATH, json.dumps(body).encode(), answer)
    tokens = json.loads(answer.data)["usage"]["completion_tokens"] if answer.status == 200 else 0
    return answer.status, tokens, float(answer.headers.get("retry-after-ms", 0)) / 1000


async def client(bench: Bench, number: int, start: float, *, obeys: bool) -> Outcome:
    """Send a request and, if the client `obeys` Retry-After, retry it until the deadline."""
    came, refusals, waits = time.monotonic(), 0, []
    status = tokens = 0
    try:
        async with asyncio.timeout(bench.deadline_s):
            while True:
                status, tokens, wait_s = await post(bench, number)
                if status != 429:
                    break
                refusals += 1
                waits.append(wait_s)
                if not obeys:
                    break
                status = 0
                # A client that would retry after its deadline gives up at once.
                if time.monotonic() - came + wait_s > bench.deadline_s:
                    status = 429
                    break
                await asyncio.sleep(wait_s)
    except TimeoutError:
        status = 0
    return Outcome(came - start, time.monotonic() - start, status, tokens, refusals, tuple(waits))


async def capacity(bench: Bench, seconds: float) -> Turn:
    """Keep all slots busy with clients in a closed loop."""
    start, warm_s = time.monotonic(), seconds / 4
    outcomes: list[Outcome] = []

    async def ask(index: int) -> None:
        number = 0
        while time.monotonic() - start < warm_s + seconds:
            number += 1
            outcomes.append(await client(bench, index * 10**6 + number, start, obeys=False))

    await asyncio.gather(*(ask(index) for index in range(_CLIENTS)))
    return Turn(0.0, False, seconds, warm_s, outcomes)


async def arrivals(
    bench: Bench, rate: float, offered: float, seconds: float, seed: int, *, obeys: bool
) -> Turn:
    """Let requests arrive at random, `rate` times `offered` of them a second."""
    source, start = random.Random(seed), time.monotonic()
    # Until the queue is full and the waits are steady.
    warm_s = seconds / 4
    tasks: list[asyncio.Task[Outcome]] = []
    at = 0.0
    while (at := at + source.expovariate(rate * offered)) < warm_s + seconds:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        number = seed * 10**6 + len(tasks)
        tasks.append(asyncio.create_task(client(bench, number, start, obeys=obeys)))
    return Turn(offered, obeys, seconds, warm_s, [await task for task in tasks])


async def run(options: argparse.Namespace) -> list[Turn]:
    """Measure everything."""
    shape: dict[str, object] = {"slots": _SLOTS}
    if options.model == "echo":
        shape["tokens_per_second"] = 50
    flags = ("--context-length", str(_CONTEXT), "--max-queued", str(_QUEUED))
    turns: list[Turn] = []
    async with drive.server(drive.serve(options.model, *flags, options=shape)) as server:
        bench = Bench(server.http(), options.max_tokens, options.deadline)
        for number in range(options.rounds):
            # Measured in each round, as it depends on other programs on this machine.
            turns.append(await capacity(bench, options.seconds))
            print(_line(turns[-1]), flush=True)
            rate = len(turns[-1].answered) / options.seconds
            order = _TURNS if number % 2 == 0 else _TURNS[::-1]
            for offered, obeys in order:
                turns.append(
                    await arrivals(bench, rate, offered, options.seconds, number, obeys=obeys)
                )
                print(_line(turns[-1]), flush=True)
    return turns


def named(turns: Sequence[Turn], offered: float, *, obeys: bool = False) -> list[Turn]:
    """Return the turns of one kind, in the order of the rounds."""
    return [turn for turn in turns if (turn.offered, turn.obeys) == (offered, obeys)]


def ratio(turns: Sequence[Turn], offered: float, *, obeys: bool, over: float = 1.0) -> list[float]:
    """Return for each round the goodput of one kind over that of another."""
    pairs = zip(named(turns, offered, obeys=obeys), named(turns, over), strict=True)
    return [turn.goodput / base.goodput for turn, base in pairs]


def table(turns: Sequence[Turn], facts: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the table of the figures."""
    lines = [
        f"Goodput (tokens/s of answers within {options.deadline:g} s) by offered load",
        report.describe(facts),
        f"{options.model}, {_SLOTS} slots, {_QUEUED} places, {options.max_tokens} tokens out, "
        f"{options.rounds} rounds of {options.seconds:g} s",
        "",
        "load                 goodput  of x1    of capacity  answered  429    late   "
        "s to an answer: p50  p95  p99",
    ]
    for offered, obeys in ((0.0, False), *_TURNS):
        those = named(turns, offered, obeys=obeys)
        counted = [outcome for turn in those for outcome in turn.counted]
        statuses = Counter(outcome.status for outcome in counted)
        goodput = statistics.median(turn.goodput for turn in those)
        of_one = statistics.median(ratio(turns, offered, obeys=obeys))
        of_all = statistics.median(ratio(turns, offered, obeys=obeys, over=0.0))
        took = [outcome.over - outcome.came for turn in those for outcome in turn.answered]
        at = [percentile(took, percent) for percent in (50, 95, 99)]
        share = [statuses[status] / max(1, len(counted)) for status in (200, 429, 0)]
        lines.append(
            f"{_name(offered, obeys):19}  {goodput:7.1f}  {of_one:5.2f}  {of_all:13.2f}"
            f"  {share[0]:8.0%}  {share[1]:4.0%}  {share[2]:5.0%}"
            f"  {at[0]:19.2f} {at[1]:4.1f} {at[2]:4.1f}"
        )
    refused = [
        outcome
        for turn in turns
        for outcome in turn.outcomes
        if outcome.refusals and not turn.obeys
    ]
    slow = percentile((outcome.over - outcome.came for outcome in refused), 99)
    lines += ["", f"Goal: at least {GOAL} of x1 at x3. 99 % of the 429 came within {slow:.3f} s."]
    return "\n".join(lines)


def _line(turn: Turn) -> str:
    statuses = Counter(outcome.status for outcome in turn.counted)
    kinds = ", ".join(f"{status or 'late'}: {count}" for status, count in sorted(statuses.items()))
    return f"  {_name(turn.offered, turn.obeys):19}  {turn.goodput:6.1f} tok/s  {kinds}"


def _name(offered: float, obeys: bool) -> str:
    kind = "comes again" if obeys else ("arrivals" if offered else "closed loop")
    return f"x{offered:g} {kind}" if offered else f"capacity, {kind}"


def main() -> None:
    """Measure, print and keep the figures."""
    options, conditions = arguments(), report.Conditions()
    turns, facts = asyncio.run(run(options)), report.machine()
    text = f"{table(turns, facts, options)}{conditions}"
    print(f"\n{text}")
    record = {
        "machine": facts,
        "model": options.model,
        "deadline_s": options.deadline,
        "load_average": conditions.load,
        "goal": GOAL,
        "ratios": {_name(n, o): ratio(turns, n, obeys=o) for n, o in _TURNS[1:]},
        "turns": [
            {**turn._asdict(), "goodput": turn.goodput, "outcomes": [*map(list, turn.outcomes)]}
            for turn in turns
        ],
    }
    report.write("overload", text, record, options)


if __name__ == "__main__":
    main()
