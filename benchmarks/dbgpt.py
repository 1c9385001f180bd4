"""DB-GPT's API server in front of Headrace, against the same before DB-GPT's own worker.

One model, SmolLM2, is served once, by a Headrace service. DB-GPT's own API server reaches it in
two ways, in turn: Headrace as the worker of the cluster, and DB-GPT's own worker, whose model is
that of the service (`proxy/openai`). A request streams 128 tokens. Its times are those of a client
of the API server: until the first text, and until the end. Answers that ended sooner are repeated.
`scripts/install dbgpt` makes the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dbgpt_parts as parts
import report
from headrace.lab.figures import ratios, spread

OURS, THEIRS = "smollm2", "proxied"
TOKENS = 128
ROUNDS = 15
_CONFIGURATION = """
[models.smollm2]
model = "smollm2"
context_length = 1024
aliases = ["proxied"]

[dbgpt]
controller = "{controller}"
port = 0
heartbeat_s = 1
"""


class Times(NamedTuple):
    """One request: seconds until the first text and until the end, and what was received."""

    first_s: float
    total_s: float
    chunks: int
    size: int


def ask(api: str, service: str, model: str, number: int) -> Times:
    """Stream one answer of the API server, which has to be of all tokens."""
    while True:
        before = _tokens(service)
        times = _stream(api, model, number)
        # Of the service: DB-GPT's own worker reports none.
        if _tokens(service) - before == TOKENS:
            return times


def _tokens(service: str) -> float:
    """Return the tokens that the service has written since it started."""
    with urllib.request.urlopen(f"{service}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    counts = re.findall(r"^headrace_completion_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, counts))


def _stream(api: str, model: str, number: int) -> Times:
    messages = [{"role": "user", "content": f"Story {number}: tell me of a long river."}]
    body = {"model": model, "stream": True, "max_tokens": TOKENS, "messages": messages}
    request = urllib.request.Request(
        f"{api}/api/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began, first, chunks, size = time.perf_counter(), 0.0, 0, 0
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            size += len(line)
            if not line.startswith(b"data: {"):
                continue
            delta: dict[str, Any] = json.loads(line[6:])["choices"][0]["delta"]
            if delta.get("content"):
                first = first or time.perf_counter() - began
                chunks += 1
    return Times(first, time.perf_counter() - began, chunks, size)


@contextlib.contextmanager
def headrace(folder: Path, controller: str) -> Iterator[str]:
    """Serve the model as a worker of the cluster; yield the URL of the service."""
    file, port = folder / "headrace.toml", parts.free_port()
    file.write_text(_CONFIGURATION.format(controller=controller))
    log = (folder / "headrace.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", "--config", file, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=os.environ,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        parts.wait_for(parts.Part(url, process, Path(log.name)), "/health/ready")
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, rounds: int) -> dict[str, list[Times]]:
    """Return the requests of both ways, by the name of the model; each round has one of each."""
    with (
        parts.controller(folder) as controller,
        parts.api_server(folder, controller.url) as api,
        headrace(folder, controller.url) as url,
        parts.own_worker(folder, controller.url, THEIRS, "proxy/openai", f"{url}/v1"),
    ):
        taken: dict[str, list[Times]] = {OURS: [], THEIRS: []}
        for name in taken:
            _until_known(api.url, name)
            ask(api.url, url, name, 0)
        for number in range(1, rounds + 1):
            # Whoever is second finds the prompt in the cache: they take turns.
            for name in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
                taken[name].append(ask(api.url, url, name, 2 * number + (name == OURS)))
        return taken


def _until_known(api: str, name: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{api}/api/v1/models", timeout=10) as answer:
            if name in {model["id"] for model in json.load(answer)["data"]}:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{name} is not registered.")


def table(taken: dict[str, list[Times]]) -> str:
    """Return the medians of both ways, and the quotients of each round."""
    lines = [f"{'worker':<28} {'first text, ms':>15} {'total, ms':>12} {'chunks':>7} {'bytes':>8}"]
    for name, title in ((OURS, "Headrace"), (THEIRS, "DB-GPT's own, proxy/openai")):
        times = taken[name]
        lines.append(
            f"{title:<28} {_ms([one.first_s for one in times]):>15.0f} "
            f"{_ms([one.total_s for one in times]):>12.0f} "
            f"{statistics.median(one.chunks for one in times):>7.0f} "
            f"{statistics.median(one.size for one in times):>8.0f}"
        )
    for field in ("first_s", "total_s"):
        pair = [[getattr(one, field) for one in taken[name]] for name in (OURS, THEIRS)]
        lines.append(f"{field.removesuffix('_s')}, Headrace / own: {spread(ratios(*pair))}")
    return "\n".join(lines)


def _ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1000


def main() -> None:
    """Measure, print and write the table."""
    flags = report.parser(__doc__)
    flags.add_argument("--rounds", type=int, default=ROUNDS)
    options: argparse.Namespace = flags.parse_args()
    conditions, facts = report.Conditions(), report.machine()
    with tempfile.TemporaryDirectory() as folder:
        taken = measure(Path(folder), 2 if options.quick else options.rounds)
    lines = [report.describe(facts), "", table(taken), "", f"{TOKENS} tokens.{conditions}"]
    print("\n".join(lines))
    record = {
        "machine": facts,
        "requests": {name: [one._asdict() for one in times] for name, times in taken.items()},
    }
    report.write("dbgpt", "\n".join(lines), record, options)


if __name__ == "__main__":
    main()
