"""Embeddings over HTTP against SentenceTransformer.encode, and many clients against one.

    python benchmarks/embeddings.py [--model REFERENCE] [--device cpu] [--rounds 5]

Rounds of both are interleaved, on the same texts. `encode` gets the best of its batch sizes,
found first. The vectors are compared. Then single texts: 64 clients at once, and one alone. What
batches can gain at all is how much faster `encode` is with as many texts in a call as there are
clients than with one in a call, in this process, while no server works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from sentence_transformers import SentenceTransformer

import report
from headrace import runtime
from headrace.models.reference import parse
from serving import headrace, serving

_WORDS = (
    *("river", "water", "the", "of", "bridge", "in", "winter", "flows", "toward", "under", "old"),
    *("machine", "answers", "question", "model", "reads", "many", "short", "words", "every", "day"),
)
_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_PARALLEL = 4


class _Vector(msgspec.Struct):
    embedding: bytes


class _Answer(msgspec.Struct):
    data: list[_Vector]


_decode = msgspec.json.Decoder(_Answer).decode


class Client:
    """One connection that is kept open; as little work as an HTTP client can do."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def embed(self, texts: Sequence[str]) -> list[bytes]:
        """Return the vectors of some texts."""
        body = json.dumps({"input": list(texts), "encoding_format": "base64"}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
        content = await self._reader.readexactly(length)
        if b" 200 " not in answer.split(b"\r\n")[0]:
            raise RuntimeError(content)
        return [one.embedding for one in _decode(content).data]

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncGenerator[Client]:
        """Connect, and close in the end."""
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, limit=1 << 20
        )
        try:
            yield self
        finally:
            self._writer.close()


async def in_lists(port: int, texts: Sequence[str]) -> tuple[float, list[bytes]]:
    """Return texts each second, and the vectors, of a few long lists at once."""
    size = -(-len(texts) // _PARALLEL)
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(port).open()) for _ in parts]
        began = time.perf_counter()
        pairs = zip(clients, parts, strict=True)
        answers = await asyncio.gather(*(client.embed(part) for client, part in pairs))
        took = time.perf_counter() - began
    return len(texts) / took, [vector for answer in answers for vector in answer]


async def one_by_one(port: int, texts: Sequence[str], clients: int) -> tuple[float, list[float]]:
    """Return texts each second, and the latencies, of clients that send a text at a time."""
    waiting, latencies = iter(texts), list[float]()

    async def work() -> None:
        async with Client(port).open() as client:
            for text in waiting:
                began = time.perf_counter()
                await client.embed([text])
                latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return len(texts) / (time.perf_counter() - began), latencies


def encode(model: SentenceTransformer, texts: list[str], batch: int) -> tuple[float, Any]:
    """Return texts each second, and the vectors, of the library itself."""
    began = time.perf_counter()
    vectors = model.encode(texts, batch_size=batch, normalize_embeddings=True)
    return len(texts) / (time.perf_counter() - began), vectors


def called(model: SentenceTransformer, texts: list[str], size: int) -> float:
    """Return texts each second of the library when each call gets so many."""
    began = time.perf_counter()
    for start in range(0, len(texts), size):
        model.encode(texts[start : start + size], batch_size=size, normalize_embeddings=True)
    return len(texts) / (time.perf_counter() - began)


async def measure(
    given: argparse.Namespace, path: str, model: SentenceTransformer
) -> dict[str, Any]:
    """Run all, and return the raw figures."""
    texts = sentences(given.texts, 4, 60)
    singles = sentences(given.singles, 4, 16)
    await asyncio.to_thread(encode, model, texts[:128], 32)
    best = max(_BATCHES, key=lambda size: encode(model, texts, size)[0])
    options = {"batch_items": given.batch_items} if given.batch_items else {}
    flags = ("--engine", "sentence_transformers", "--device", given.device)
    async with serving(headrace(path, options, *flags)) as server:
        await in_lists(server.port, texts[:128])
        library, ours, many, alone = [], [], [], []
        calls_of_one, calls_of_many = list[float](), list[float]()
        distance, slow = 0.0, list[float]()
        for _ in range(given.rounds):
            rate, expected = await asyncio.to_thread(encode, model, texts, best)
            library.append(rate)
            rate, raw = await in_lists(server.port, texts)
            ours.append(rate)
            got = np.frombuffer(b"".join(raw), "<f4").reshape(len(texts), -1)
            distance = max(distance, float(np.abs(got - expected).max()))
            few = singles[: given.singles // 4]
            calls_of_one.append(await asyncio.to_thread(called, model, few, 1))
            calls_of_many.append(await asyncio.to_thread(called, model, singles, given.clients))
            alone.append((await one_by_one(server.port, few, 1))[0])
            rate, latencies = await one_by_one(server.port, singles, given.clients)
            many.append(rate)
            slow += latencies
    return {
        "best_batch": best, "encode": library, "http": ours, "distance": distance,
        "calls_of_one": calls_of_one, "calls_of_many": calls_of_many,
        "one_client": alone, "clients": given.clients, "many_clients": many,
        "latency_p50_ms": statistics.median(slow) * 1000,
        "latency_p99_ms": sorted(slow)[int(len(slow) * 0.99)] * 1000,
    }  # fmt: skip


def sentences(count: int, least: int, most: int) -> list[str]:
    """Return texts of so many words, always the same."""
    draw = random.Random(7)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(least, most))) for _ in range(count)]


def table(figures: dict[str, Any]) -> str:
    """Return the figures for people."""
    ratio = statistics.median(figures["http"]) / statistics.median(figures["encode"])
    gain = statistics.median(figures["many_clients"]) / statistics.median(figures["one_client"])
    itself = statistics.median(figures["calls_of_many"]) / statistics.median(
        figures["calls_of_one"]
    )
    rows: list[tuple[str, str]] = [
        (f"encode, batch size {figures['best_batch']}, texts/s", report.spread(figures["encode"])),
        ("over HTTP, in lists, texts/s", report.spread(figures["http"])),
        ("ratio (goal: at least 0.9)", f"{ratio:.2f}"),
        ("largest difference of a number (goal: 1e-5)", f"{figures['distance']:.1e}"),
        ("single texts, one client, texts/s", report.spread(figures["one_client"])),
        (
            f"single texts, {figures['clients']} clients, texts/s",
            report.spread(figures["many_clients"]),
        ),
        ("gain (goal: at least 5)", f"{gain:.1f}"),
        ("latency then, p50 and p99, ms",
         f"{figures['latency_p50_ms']:.0f} and {figures['latency_p99_ms']:.0f}"),
        ("encode itself, one text in a call, texts/s", report.spread(figures["calls_of_one"])),
        (f"encode itself, {figures['clients']} texts in a call, texts/s",
         report.spread(figures["calls_of_many"])),
        ("gain of encode itself, without any server", f"{itself:.1f}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<46} {value}" for name, value in rows)


def main() -> None:
    """Read the arguments, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--model", default="all-minilm-l6-v2")
    add("--device", default="cpu")
    add("--rounds", type=int, default=5)
    add("--texts", type=int, default=1024)
    add("--singles", type=int, default=1024)
    add("--clients", type=int, default=64)
    add("--batch-items", type=int, help="by default what the engine takes by itself")
    add("--json", type=Path)
    given = parser.parse_args()
    config = runtime.load_settings().config
    path = str(runtime.store(config).fetch(parse(given.model)))
    model = SentenceTransformer(path, device=given.device, local_files_only=True)
    load = report.load_average()
    figures = asyncio.run(measure(given, path, model))
    facts = report.machine()
    text = f"{report.describe(facts)}\nload before: {load}\n\n{table(figures)}"
    print(text)
    record = {"machine": facts, "load": load, "model": given.model, "figures": figures}
    report.write("embeddings", text, record, given.json)


if __name__ == "__main__":
    main()
