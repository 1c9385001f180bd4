"""One service for an hour: chat, embeddings, disconnects, kills, loads, bad input, in turn.

`headrace serve` has a chat model, an embedding model and two echo models. One task after another
sends each kind of request; which kind comes next is random, always the same series. Samples
of the API process (resident memory, threads, open files, children) are taken between them. At
the end the models are unloaded, then the service is stopped.

Read the slope: least squares over the samples of the second half, in MB an hour; the goal is below
1. What is left after the stop (processes, files in its TMPDIR) has to be nothing. An answer that is
neither complete nor one of the errors expected of its kind is `wrong`, and printed.

`--keep FOLDER` keeps the service's home there, with the records of its requests for `headrace
trace`, and its log. What ran when an answer did not come is in the results, with the time.

`--echo` has no real model, so that a minute has more requests. `--diagnose` counts the objects of
the API process and what malloc holds, at the beginning of the second half and at the end: what has
grown is either in use or free and not given back to the system.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import report
from headrace.lab import drive
from headrace.lab.drive import Server
from headrace.lab.http import Broken

GOAL_MB_PER_H = 1.0
MINUTES, SAMPLE_S = 60.0, 10.0
# Longer than the service lets a request wait for a load.
WITHIN_S = 120.0
_MB = 1 << 20
_BOMB = {"type": "array", "minItems": 10**9}
_CONFIG = """
[server]
spare = true
[models.chat]
model = "{chat}"
context_length = 1024
[models.vectors]
model = "{vectors}"
task = "embed"
[models.echo]
model = "echo"
options = {{ tokens_per_second = 200 }}
[models.other]
model = "echo"
preload = false
"""


class Sample(NamedTuple):
    """The API process at `at` seconds; memory in bytes."""

    at: float
    resident: int
    threads: int
    files: int
    children: int
    requests: int


class Soak:
    """The requests of the run, and the counts of their outcomes."""

    def __init__(self, server: Server, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.scenes: list[dict[str, Any]] = []
        self._server = server
        self._http = server.http()
        self._random = random.Random(seed)
        self._kinds: list[Callable[[], Awaitable[None]]] = [
            *([self.chat] * 4),
            *([self.embed] * 4),
            *([self.disconnect] * 4),
            *([self.bad] * 4),
            *([self.swap] * 2),
            self.kill,
        ]

    async def step(self) -> None:
        """Send the requests of one kind."""
        kind = self._random.choice(self._kinds)
        try:
            await kind()
        except Broken as error:
            self._count(kind.__name__, 0, (), str(error))
            self.scenes.append(await self._scene())

    async def chat(self) -> None:
        """Four chats at once, two of them streamed."""
        bodies = [
            {
                "model": self._random.choice(("chat", "echo")),
                "messages": [{"role": "user", "content": f"Tell me about {self._random.random()}"}],
                "max_tokens": 24,
                "stream": number % 2 == 0,
            }
            for number in range(4)
        ]
        await asyncio.gather(*(self._post("chat", "/v1/chat/completions", body) for body in bodies))

    async def embed(self) -> None:
        """A list of texts of different lengths."""
        texts = ["word " * self._random.randint(1, 120) for _ in range(self._random.randint(1, 24))]
        await self._post("embed", "/v1/embeddings", {"model": "vectors", "input": texts})

    async def disconnect(self) -> None:
        """A stream whose client leaves after its first bytes."""
        body = {"model": "echo", "prompt": "x" * 500, "stream": True, "max_tokens": 400}
        reader, writer = await self._open("/v1/completions", json.dumps(body).encode())
        await asyncio.wait_for(reader.read(600), WITHIN_S)
        writer.transport.abort()
        self.counts["disconnect 200"] += 1

    async def bad(self) -> None:
        """Input of each kind that is refused."""
        cases: Sequence[tuple[str, object, tuple[int, ...]]] = (
            ("/v1/chat/completions", {"model": "nobody", "messages": []}, (400, 404)),
            ("/v1/completions", {"model": "echo", "prompt": 3}, (400,)),
            ("/v1/completions", {"model": "chat", "prompt": "a " * 4000}, (400,)),
            ("/v1/embeddings", {"model": "echo", "input": "a"}, (400,)),
            ("/v1/unknown", {"a": 1}, (404,)),
            (
                "/v1/completions",
                {
                    "model": "chat",
                    "prompt": "a",
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {
                            "name": "n",
                            "schema": {"type": "array", "minItems": 10**9},
                        },
                    },
                },
                (400,),
            ),
        )
        path, body, expected = self._random.choice(cases)
        await self._post("bad", path, body, expected)
        raw = self._random.choice(
            (b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n")
        )
        host, port = self._http.place.host, self._http.place.port
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(raw + b"X: y\r\n" * self._random.randint(1, 20_000))
        with contextlib.suppress(OSError):
            await writer.drain()
            await asyncio.wait_for(reader.read(200), 30)
        writer.transport.abort()
        self.counts["raw closed"] += 1

    async def swap(self) -> None:
        """A load and an unload by an administrator."""
        await self._post("load", "/admin/models/load", {"model": "other"})
        await self._post("other", "/v1/completions", {"model": "other", "prompt": "a"})
        await self._post("unload", "/admin/models/unload", {"model": "other"})

    async def kill(self) -> None:
        """SIGKILL for a model's process while it answers; answers go on elsewhere."""
        name = self._random.choice(("chat", "vectors", "echo"))
        _, data = await self._http.fetch("/admin/models", within_s=WITHIN_S)
        models = {model["id"]: model for model in json.loads(data)["models"]}
        pids = [replica["pid"] for replica in models[name]["replicas"] if replica.get("pid")]
        # Another prompt each time: what was in two crashes is taken for their cause, and refused.
        prompt = f"{self._random.random()} {'y' * 100}"
        body = {"model": "echo", "prompt": prompt, "max_tokens": 100}
        answers = asyncio.gather(*(self._post("killed", "/v1/completions", body) for _ in range(3)))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await answers
        self.counts[f"kill {name}"] += len(pids)

    async def _scene(self) -> dict[str, Any]:
        """Return what runs and waits now, for an answer that did not come."""
        try:
            _, data = await self._http.fetch("/admin/models", within_s=WITHIN_S)
            models = json.loads(data)["models"]
        except (Broken, ValueError) as error:
            models = str(error)
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(),
            "load": os.getloadavg(),
            "models": models,
            "processes": described(self._server.program.process()),
        }

    async def _open(
        self, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        place = self._http.place
        reader, writer = await asyncio.open_connection(place.host, place.port)
        host, size = place.authority, len(body)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n"
        writer.write(head.encode() + body)
        return reader, writer

    async def _post(
        self, kind: str, path: str, body: object, expected: Sequence[int] = (200,)
    ) -> None:
        status, data = await self._http.fetch(path, body, within_s=WITHIN_S)
        self._count(kind, status, expected, data[-300:].decode(errors="replace"))

    def _count(self, kind: str, status: int, expected: Sequence[int], text: str) -> None:
        self.counts[f"{kind} {status}"] += 1
        # A request that waits for a model which a kill has ended may be refused for a while.
        if status not in {*expected, 429, 503} or (status == 200 and '"error"' in text):
            self.wrong.append(f"{kind}: {status} {text}")


def sample(process: psutil.Process, began: float, requests: int) -> Sample:
    """Read the API process."""
    return Sample(
        round(time.monotonic() - began, 1),
        process.memory_info().rss,
        process.num_threads(),
        process.num_fds(),
        len(process.children(recursive=True)),
        requests,
    )


def described(process: psutil.Process) -> list[dict[str, Any]]:
    """Return what the process and its descendants do now."""
    facts: list[dict[str, Any]] = []
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            facts.append(member.as_dict(["pid", "ppid", "status", "cpu_times", "num_threads"]))
    return facts


def slope(samples: Sequence[Sample], unit: str) -> float:
    """Return bytes for each second (`at`) or request, by least squares, over the second half."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    xs = [float(getattr(point, unit)) for point in half]
    return statistics.linear_regression(xs, [point.resident for point in half]).slope


def prepared(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """Write the configuration; return its path and that of an empty folder for TMPDIR."""
    config, scratch = folder / "headrace.toml", folder / "tmp"
    scratch.mkdir()
    names = ("echo", "echo") if options.echo else (options.chat, options.vectors)
    config.write_text(_CONFIG.format(chat=names[0], vectors=names[1]))
    return config, scratch


def environment(scratch: Path, keep: Path | None) -> dict[str, str]:
    """Return the variables of the service."""
    if keep is None:
        return {"TMPDIR": str(scratch)}
    keep.mkdir(parents=True, exist_ok=True)
    return {
        "TMPDIR": str(scratch),
        "HEADRACE_HOME": str(keep / "home"),
        "HEADRACE_LOG_LEVEL": "info",
        "HEADRACE_LOG_FORMAT": "json",
    }


def command(config: Path, *, diagnose: bool) -> list[str]:
    """Return the command of the service."""
    serve = drive.serve("--config", str(config))
    return report.script("soak_serve.py", *serve[serve.index("serve") :]) if diagnose else serve


class Watch:
    """The samples of the API process, and its `facts` at half of the time and at the end."""

    def __init__(self, server: Server, soak: Soak, options: argparse.Namespace) -> None:
        self.samples: list[Sample] = []
        self.facts: list[dict[str, Any]] = []
        self.seconds = (0.5 if options.quick else options.minutes) * 60
        self._server = server
        self._soak = soak
        self._diagnoses = options.diagnose
        self._process, self._began = server.program.process(), time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the time is over, or the service has ended."""
        return time.monotonic() - self._began > self.seconds or not self._server.program.running

    async def look(self) -> None:
        """Take a sample if one is due."""
        now = time.monotonic() - self._began
        if self.samples and now - self.samples[-1].at < SAMPLE_S:
            return
        requests = sum(self._soak.counts.values())
        self.samples.append(sample(self._process, self._began, requests))
        if now > self.seconds / 2 and not self.facts:
            await self.diagnose()

    async def diagnose(self) -> None:
        """Add the facts of the API process, if they are wanted."""
        if self._diagnoses:
            self.facts.append(await self._server.program.ask({}))


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the service under its load; return the record."""
    with tempfile.TemporaryDirectory(prefix="headrace-soak-") as folder:
        config, scratch = prepared(Path(folder), options)
        async with drive.server(
            command(config, diagnose=options.diagnose),
            environment(scratch, options.keep),
            ready="/health",
            start_s=300,
            log=options.keep and options.keep / "log.jsonl",
        ) as server:
            soak = Soak(server, 1)
            watch, process = Watch(server, soak, options), server.program.process()
            while not watch.is_over:
                await watch.look()
                await soak.step()
            await watch.diagnose()
            family = [process, *process.children(recursive=True)]
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(server.program.wait(), 60)
        _, alive = psutil.wait_procs(family, 10)
        left = await asyncio.to_thread(lambda: [str(path) for path in scratch.rglob("*")])
    return {
        "samples": watch.samples,
        "facts": watch.facts,
        "counts": dict(sorted(soak.counts.items())),
        "wrong": soak.wrong,
        "scenes": soak.scenes,
        "strays": [str(stray) for stray in alive],
        "files": left,
        "slope": slope(watch.samples, "at") * 3600 / _MB,
        "bytes_per_request": slope(watch.samples, "requests"),
    }


def growth(facts: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the API process had more of at the end than at half, as lines."""
    if len(facts) < 2:
        return []
    first, last = facts[0], facts[-1]
    types = Counter(last["types"])
    types.subtract(first["types"])
    garbage = Counter(last["garbage"])
    return [
        "",
        f"objects     {sum(types.values()):+} in Python's collector,"
        f" and {sum(garbage.values())} in cycles; blocks {last['blocks'] - first['blocks']:+}",
        f"malloc      {(last['used'] - first['used']) / _MB:+.2f} MB in use,"
        f" {(last['free'] - first['free']) / _MB:+.2f} MB free",
        *(f"  alive   {name:<42} {count:+}" for name, count in types.most_common(12) if count > 0),
        *(f"  cycles  {name:<42} {count}" for name, count in garbage.most_common(20)),
    ]


def table(record: dict[str, Any]) -> str:
    """Return the figures as text."""
    samples: list[Sample] = record["samples"]
    first, last = samples[len(samples) // 2], samples[-1]
    peak = max(point.resident for point in samples)
    lines = [
        f"{last.at / 60:.0f} minutes, {sum(record['counts'].values())} requests",
        f"resident    {samples[0].resident / _MB:.1f} MB at the start,"
        f" {first.resident / _MB:.1f} at half, {last.resident / _MB:.1f} at the end,"
        f" {peak / _MB:.1f} at most",
        f"slope       {record['slope']:+.2f} MB/h over the second half"
        f" (goal: below {GOAL_MB_PER_H:g}), {record['bytes_per_request'] * 1000 / 1024:+.1f} kB"
        f" for 1,000 requests",
        f"threads     {first.threads} at half, {last.threads} at the end",
        f"open files  {first.files} at half, {last.files} at the end",
        f"children    {first.children} at half, {last.children} at the end",
        f"left        {len(record['strays'])} processes, {len(record['files'])} files",
        f"wrong       {len(record['wrong'])}",
        *(f"  {text}" for text in record["wrong"][:10]),
        "",
        *(f"{kind:<24} {count}" for kind, count in record["counts"].items()),
        *growth(record["facts"]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Run and report."""
    parser = report.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--chat", default="smollm2", help="a GGUF file or a catalogue's name")
    parser.add_argument("--vectors", default="all-minilm-l6-v2", help="a model to embed with")
    parser.add_argument("--echo", action="store_true", help="echo models in place of these two")
    parser.add_argument("--diagnose", action="store_true", help="count objects and malloc's bytes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the home and the log")
    options = parser.parse_args()
    conditions = report.Conditions()
    record = asyncio.run(run(options))
    facts = report.machine()
    text = f"{report.describe(facts)}\n\n{table(record)}\n\n{conditions}"
    print(text)
    report.write("soak", text, {"machine": facts, **record}, options)


if __name__ == "__main__":
    main()
