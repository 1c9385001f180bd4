"""Embeddings over HTTP against SentenceTransformer.encode, and many clients against a single one.

    python benchmarks/embeddings.py [--model REFERENCE] [--device cpu] [--rounds 5]

Rounds of both are interleaved, on the same texts. `encode` gets the best of its batch sizes,
which is determined first. The vectors are compared. Then single texts: 64 clients at once, and one
alone. The most that batches can gain is how much faster `encode` is with as many texts in a call as
there are clients than with one in a call, in this process, while no server works.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from sentence_transformers import SentenceTransformer

import report
from headrace import runtime
from headrace.lab import drive
from headrace.lab.figures import percentile, spread
from headrace.lab.http import Http
from headrace.models.reference import parse

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


async def embed(http: Http, texts: Sequence[str]) -> list[bytes]:
    """Return the vectors of some texts."""
    body = {"input": list(texts), "encoding_format": "base64"}
    status, content = await http.fetch("/v1/embeddings", body)
    if status != 200:
        raise RuntimeError(content)
    return [vector.embedding for vector in _decode(content).data]


async def in_lists(http: Http, texts: Sequence[str]) -> tuple[float, list[bytes]]:
    """Return texts each second, and the vectors, of a few long lists at once."""
    size = -(-len(texts) // _PARALLEL)
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    began = time.perf_counter()
    answers = await asyncio.gather(*(embed(http, part) for part in parts))
    took = time.perf_counter() - began
    return len(texts) / took, [vector for answer in answers for vector in answer]


async def one_by_one(http: Http, texts: Sequence[str], clients: int) -> tuple[float, list[float]]:
    """Return texts each second, and the latencies, of clients that send a text at a time."""
    waiting, latencies = iter(texts), list[float]()

    async def work() -> None:
        for text in waiting:
            began = time.perf_counter()
            await embed(http, [text])
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
    async with drive.server(drive.serve(path, *flags, options=options)) as server:
        http = server.http()
        await in_lists(http, texts[:128])
        library, ours, many, alone = [], [], [], []
        calls_of_one, calls_of_many = list[float](), list[float]()
        distance, slow = 0.0, list[float]()
        for _ in range(given.rounds):
            rate, expected = await asyncio.to_thread(encode, model, texts, best)
            library.append(rate)
            rate, raw = await in_lists(http, texts)
            ours.append(rate)
            got = np.frombuffer(b"".join(raw), "<f4").reshape(len(texts), -1)
            distance = max(distance, float(np.abs(got - expected).max()))
            few = singles[: given.singles // 4]
            calls_of_one.append(await asyncio.to_thread(called, model, few, 1))
            calls_of_many.append(await asyncio.to_thread(called, model, singles, given.clients))
            alone.append((await one_by_one(http, few, 1))[0])
            rate, latencies = await one_by_one(http, singles, given.clients)
            many.append(rate)
            slow += latencies
        http.close()
    return {
        "best_batch": best, "encode": library, "http": ours, "distance": distance,
        "calls_of_one": calls_of_one, "calls_of_many": calls_of_many,
        "one_client": alone, "clients": given.clients, "many_clients": many,
        "latency_p50_ms": statistics.median(slow) * 1000,
        "latency_p99_ms": percentile(slow, 99) * 1000,
    }  # fmt: skip


def sentences(count: int, least: int, most: int) -> list[str]:
    """Return texts of so many words, always the same."""
    draw = random.Random(7)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(least, most))) for _ in range(count)]


def table(figures: dict[str, Any]) -> str:
    """Return the table of the figures."""
    ratio = statistics.median(figures["http"]) / statistics.median(figures["encode"])
    gain = statistics.median(figures["many_clients"]) / statistics.median(figures["one_client"])
    itself = statistics.median(figures["calls_of_many"]) / statistics.median(
        figures["calls_of_one"]
    )
    rows: list[tuple[str, str]] = [
        (f"encode, batch size {figures['best_batch']}, texts/s", spread(figures["encode"])),
        ("over HTTP, in lists, texts/s", spread(figures["http"])),
        ("ratio (goal: at least 0.9)", f"{ratio:.2f}"),
        ("largest difference of a number (goal: 1e-5)", f"{figures['distance']:.1e}"),
        ("single texts, one client, texts/s", spread(figures["one_client"])),
        (
            f"single texts, {figures['clients']} clients, texts/s",
            spread(figures["many_clients"]),
        ),
        ("gain (goal: at least 5)", f"{gain:.1f}"),
        ("latency then, p50 and p99, ms",
         f"{figures['latency_p50_ms']:.0f} and {figures['latency_p99_ms']:.0f}"),
        ("encode itself, one text in a call, texts/s", spread(figures["calls_of_one"])),
        (f"encode itself, {figures['clients']} texts in a call, texts/s",
         spread(figures["calls_of_many"])),
        ("gain of encode itself, without any server", f"{itself:.1f}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<46} {value}" for name, value in rows)


def main() -> None:
    """Read the arguments, measure, and write."""
    parser = report.parser(__doc__, quick=False)
    add: Callable[..., Any] = parser.add_argument
    add("--model", default="all-minilm-l6-v2")
    add("--device", default="cpu")
    add("--rounds", type=int, default=5)
    add("--texts", type=int, default=1024)
    add("--singles", type=int, default=1024)
    add("--clients", type=int, default=64)
    add("--batch-items", type=int, help="by default what the engine takes by itself")
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
    report.write("embeddings", text, record, given)


if __name__ == "__main__":
    main()
