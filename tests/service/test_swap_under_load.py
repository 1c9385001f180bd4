"""Five models in a budget for two, hammered (issue 3, must show 2).

The short form is a part of every run; `-m slow` lasts minutes, or HEADRACE_TEST_SECONDS.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from tests.service.serving import Service, served
from tests.service.streams import Got, client, events, stream, tell

MIB = 1 << 20
BUDGET = 480 * MIB
# The process that is kept for the next load is outside of the budget.
WARM = 50_000_000
NAMES = ("narrow", "wide", "small", "first", "second")
CLIENTS, MAX_QUEUED = 8, 4
# Seconds for which a load keeps others waiting, however short it was expected to be.
PLACE_S = 1.2
# Loads of models while a request waits: two turns of each.
MOST_LOADS = 10
PAGE = os.sysconf("SC_PAGE_SIZE")
SECONDS = os.environ.get("HEADRACE_TEST_SECONDS")


def configuration(model: Path) -> str:
    """Three of one file that differ in their caches, and two of memory alone."""
    real = {
        "narrow": "context_length = 256\noptions = {slots = 1}",
        "wide": "context_length = 512\noptions = {slots = 2}",
        "small": 'context_length = 512\noptions = {slots = 1, kv_type = "q8_0"}',
    }
    echo = 'model = "builtin:echo"\noptions = {tokens_per_second = 50, slots = 2, memory = %d}'
    models = {name: f'model = "{model}"\n{more}' for name, more in real.items()}
    models |= {"first": echo % (150 * MIB), "second": echo % (190 * MIB)}
    return "\n".join(
        f"[models.{name}]\n{lines}\npreload = false\nmax_queued = {MAX_QUEUED}\n"
        for name, lines in models.items()
    )


def held(service: Service) -> int:
    """Bytes that all workers and their helpers hold; a mapped file counts in each of them."""
    total = 0
    for process in service.children():
        try:
            total += int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


class Asked(NamedTuple):
    """A request: its model, when it was sent and was over, and what came of it."""

    name: str
    began: float
    ended: float
    got: Got

    def loads(self, told: Sequence[dict[str, Any]]) -> int:
        """How many models were loaded while it waited."""
        ready = [event["time"] for event in told if event["kind"] == "ready"]
        return sum(self.began < moment < self.ended for moment in ready)


async def hammer(http: httpx.AsyncClient, number: int, until: float) -> list[Asked]:
    """Ask two models, of which each is one of some client, and further ones until then."""
    done: list[Asked] = []
    dice = random.Random(number)
    names = [NAMES[number % 5], NAMES[(number + 2) % 5]]
    while names:
        # A burst on one model, as people do it.
        for _ in range(dice.randrange(1, 4)):
            began = time.time()
            got = await stream(http, names[0], "The river runs to the sea.", max_tokens=12)
            done.append(Asked(names[0], began, time.time(), got))
            if got.status == 429:
                await asyncio.sleep(int(got.headers["retry-after-ms"]) / 1000)
        names = names[1:] or [dice.choice(NAMES)] * (time.time() < until)
    return done


async def watch(
    http: httpx.AsyncClient, service: Service, peaks: list[int], queues: Counter[str]
) -> None:
    while True:
        peaks.append(held(service))
        if len(peaks) % 10 == 0:
            found = (await http.get("/admin/models")).json()
            for model in found["models"]:
                queues[model["id"]] = max(queues[model["id"]], model["queued"])
        await asyncio.sleep(0.05)


def check_loads(told: list[dict[str, Any]]) -> Counter[str]:
    """Check that no model is loaded twice at once, and one at a time, unless a load is overdue.

    Return how often each was loaded.
    """
    loading: dict[str, float] = {}
    up: set[str] = set()
    counts: Counter[str] = Counter()
    for event in told:
        kind, model = event["kind"], event["model"]
        assert kind in {"loading", "ready", "evicted", "unloaded"}, event
        if kind == "loading":
            assert all(event["time"] - began > PLACE_S for began in loading.values()), event
            assert model not in loading, event
            assert model not in up, event
            loading[model] = event["time"]
            counts[model] += 1
        elif kind == "ready":
            del loading[model]
            up.add(model)
        elif kind == "unloaded":
            up.remove(model)
    return counts


async def run_it(smollm2: Path, folder: Path, seconds: float) -> None:
    (folder / "headrace.toml").write_text(configuration(smollm2))
    peaks: list[int] = []
    queues: Counter[str] = Counter()
    with served(
        *("--config", str(folder / "headrace.toml"), "--memory", f"{BUDGET // MIB}MiB"),
        environment={
            "HOME": str(folder / "home"),
            "LOAD_WAIT_S": "300",
            "LONGEST_WAIT_S": "3",
        },
    ) as service:
        async with client(service.url) as http, events(http) as told:
            watching = asyncio.create_task(watch(http, service, peaks, queues))
            until = time.time() + seconds
            lists = await asyncio.gather(
                *(hammer(http, number, until) for number in range(CLIENTS))
            )
            watching.cancel()
            await asyncio.wait({watching})
    done = [each for asked in lists for each in asked]
    served_to = Counter(each.name for each in done if each.got.status == 200)
    refused = sum(each.got.status == 429 for each in done)
    waits = max(each.ended - each.began for each in done)
    turns = max(each.loads(told) for each in done)
    loads = check_loads(told)
    figures = (
        f"served {dict(served_to)}, refused {refused}, loads {dict(loads)}, "
        f"longest {waits:.1f} s and {turns} loads, queues {dict(queues)}, "
        f"peak {max(peaks) / BUDGET:.3f} of the budget"
    )
    tell(figures)
    assert {each.got.status for each in done} <= {200, 429}, figures
    assert [each for each in done if each.got.status == 200 and not each.got.done] == [], figures
    assert set(served_to) == set(NAMES), figures
    # Many requests share a load.
    assert sum(loads.values()) < sum(served_to.values()), figures
    # Those who wait for a load are those of the queue and of the slots to come.
    assert max(queues.values()) <= MAX_QUEUED + 2, figures
    assert max(peaks) <= BUDGET * 1.02 + WARM, figures
    # In loads, as a machine that is busy with other things takes longer for each.
    assert turns <= MOST_LOADS, figures


async def test_five_models_share_the_memory_of_two(smollm2_path: Path, tmp_path: Path) -> None:
    """M4, M6, M7: no errors, every model is served, and the memory stays within the budget."""
    await run_it(smollm2_path, tmp_path, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_they_do_so_for_minutes(smollm2_path: Path, tmp_path: Path) -> None:
    """M4, M6, M7: the same for longer; nobody waits longer than a few turns of the others."""
    await run_it(smollm2_path, tmp_path, float(SECONDS or 240))
