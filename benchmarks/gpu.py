"""Headrace over HTTP against the engine's own rate and its own server, on one machine with a GPU.

    python benchmarks/gpu.py --shape Qwen3-0.6B --engines vllm,transformers
    python benchmarks/gpu.py --shape Qwen3-8B

The model has random weights and is generated here; nothing is downloaded. Each request has 100 to
1,024 tokens of prompt and of answer, drawn from a fixed seed. Prompts are token ids, so that no
tokenizer is measured. First the engine runs alone; then the servers are started and measured in
turn, A B, B A, by client processes that only record when bytes arrive. Each has its share of the
GPU. Servers are `vllm`, `vllm-rust` (its front end in Rust), `headrace`, and `headrace:2` with two
fronts. With `--replicas`, `headrace` loads the model that often, each replica on a GPU of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import gpu_model
import report
from fronts import ready_replicas
from headrace.lab import drive, load
from headrace.lab.drive import Server
from headrace.lab.figures import percentile

_START_S, _ROUND_S, _WARM = 400.0, 400.0, 16
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_CPU = "front_cpu_per_1000"
_CORES = ("EngineCore", "VLLM::Worker", "spawn_main")


class Side(NamedTuple):
    """A running server."""

    name: str
    server: Server
    model: str

    def front_cpu(self) -> float:
        """Return CPU seconds of all its processes but the engine's core and its children."""
        fronts = _fronts(self.server.program.process())
        return sum(drive.cpu_of(process) for process in fronts)


class Bench(NamedTuple):
    """The parameters of all rounds."""

    options: argparse.Namespace
    engine: str
    folder: Path
    requests: list[tuple[list[int], int]]


def main() -> None:
    """Measure, print the table and keep the raw figures."""
    asyncio.run(_main(_options()))


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, quick=False)
    parser.add_argument("--shape", choices=list(gpu_model.SHAPES), default="Qwen3-0.6B")
    parser.add_argument("--engines", default="vllm", help="vllm, transformers, or both")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--few", type=int, default=64, help="requests for transformers")
    parser.add_argument("--least", type=int, default=100, help="tokens in and out, at least")
    parser.add_argument("--most", type=int, default=1024, help="tokens in and out, at most")
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.45, help="of the GPU, for each server")
    parser.add_argument("--replicas", type=int, default=1, help="of the model, for headrace")
    parser.add_argument("--servers", default="vllm,headrace", help="what is measured, in turn")
    parser.add_argument("--cpu", action="store_true", help="use no GPU, to test this program")
    return parser.parse_args()


async def _main(options: argparse.Namespace) -> None:
    record: dict[str, Any] = {"shape": options.shape, "machine": report.machine(), "engines": {}}
    lines: list[str] = [f"{options.shape}, {options.least}-{options.most} tokens in and out"]
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        for engine in options.engines.split(","):
            bench = _bench(options, engine, Path(folder) / engine)
            result = await _measure(bench)
            record["engines"][engine] = result
            lines += ["", f"{engine}, {len(bench.requests)} requests", *_table(result)]
            # Written at once: a later engine may fail or run out of time.
            text = "\n".join(lines)
            name = f"gpu-{options.shape}-{'-'.join(record['engines'])}"
            path = report.write(name, text, record, options)
            print(f"{text}\n{path}", flush=True)


def _bench(options: argparse.Namespace, engine: str, folder: Path) -> Bench:
    path = gpu_model.made(
        options.shape, folder, context=2 * options.most + 64, filled=engine == "transformers"
    )
    vocabulary = gpu_model.SHAPES[options.shape].vocabulary - len(gpu_model.ENDS)
    source = random.Random(7)
    requests = [
        (
            [
                source.randrange(vocabulary)
                for _ in range(source.randint(options.least, options.most))
            ],
            source.randint(options.least, options.most),
        )
        for _ in range(options.requests)
    ]
    if engine == "transformers":
        # `generate_batch` has one length for all answers.
        most = (options.least + options.most) // 2
        requests = [(ids, most) for ids, _ in requests[: options.few]]
    return Bench(options, engine, path, requests)


async def _measure(bench: Bench) -> dict[str, Any]:
    result: dict[str, Any] = {"offline": await _offline(bench), "turns": []}
    async with AsyncExitStack() as stack:
        sides: list[Side] = []
        for name in bench.options.servers.split(","):
            kind, _, fronts = name.partition(":")
            if kind == "headrace":
                run = _headrace(bench, name, int(fronts or 1))
            elif bench.engine == "vllm":
                run = _vllm_serve(bench, name, rust=kind == "vllm-rust")
            else:
                continue
            sides.append(await stack.enter_async_context(run))
        for side in sides:
            await _turn(bench, side, again(bench.requests[:_WARM], 0))
        for number in range(bench.options.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                turn = await _turn(bench, side, again(bench.requests, number + 1))
                result["turns"].append({"side": side.name, "round": number, **turn})
                print({"side": side.name, "round": number, **_brief(turn)}, flush=True)
    return result


def again(requests: Sequence[tuple[list[int], int]], number: int) -> list[tuple[list[int], int]]:
    """Return the requests with other beginnings, so that no cache knows the prompts."""
    return [([number, *ids[1:]], most) for ids, most in requests]


async def _offline(bench: Bench) -> list[dict[str, Any]]:
    job = {
        "engine": bench.engine,
        "model": str(bench.folder),
        "rounds": [again(bench.requests, number) for number in range(3)],
        "options": _vllm_options(bench),
    }
    async with drive.program(report.script("gpu_offline.py"), _OFFLINE) as engine:
        rounds: list[dict[str, Any]] = []
        async with asyncio.timeout(_START_S + 3 * _ROUND_S):
            await engine.send(job)
            while line := await engine.line():
                if line.startswith(b'{"seconds"'):
                    rounds.append(json.loads(line))
    if len(rounds) != 3:
        raise SystemExit(f"{bench.engine} alone failed.")
    print({"offline": rounds}, flush=True)
    # The first is for warming up.
    return rounds[1:]


def _vllm_options(bench: Bench) -> dict[str, Any]:
    if bench.engine != "vllm":
        return {}
    common = {"max_model_len": 2 * bench.options.most + 64}
    if bench.options.cpu:
        return common | {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
    return common | {"gpu_memory_utilization": bench.options.share}


@asynccontextmanager
async def _vllm_serve(bench: Bench, name: str, *, rust: bool) -> AsyncGenerator[Side]:
    # The modules behind `vllm serve`, which some builds have no command for.
    module = "vllm.entrypoints.cli.main" if rust else "vllm.entrypoints.openai.api_server"
    port, words = str(drive.free_port()), [sys.executable, "-m", module]
    # The one in Rust demands the model in the first place.
    words += ["serve", str(bench.folder)] if rust else ["--model", str(bench.folder)]
    for key, value in _vllm_options(bench).items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    words += ["--load-format", "dummy", "--served-model-name", "m"]
    words += ["--host", "127.0.0.1", "--port", port]
    url = f"http://127.0.0.1:{port}"
    environment = {**_OFFLINE, "VLLM_USE_RUST_FRONTEND": "1"} if rust else _OFFLINE
    run = drive.server(words, environment, url=url, ready="/v1/models", start_s=_START_S)
    async with run as server:
        yield Side(name, server, "m")


@asynccontextmanager
async def _headrace(bench: Bench, side: str, fronts: int) -> AsyncGenerator[Side]:
    given = bench.options
    settings: dict[str, Any] = {}
    if bench.engine == "vllm":
        settings = {"load_format": "dummy", "gpu_memory": given.share}
        if given.cpu:
            settings = {"load_format": "dummy", "eager": True, "kv_cache_bytes": 256 << 20}
    options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    file = bench.folder / "headrace.toml"
    file.write_text(
        f"[models.m]\nmodel = {json.dumps(str(bench.folder))}\n"
        f"engine = {json.dumps(bench.engine)}\nreplicas = {given.replicas}\n"
        f"max_queued = {2 * given.requests}\n"
        f"context_length = {2 * given.most + 64}\noptions = {{ {options} }}\n"
    )
    command = drive.serve("--config", str(file), "--fronts", str(fronts))
    run = drive.server(command, _OFFLINE, ready="/health/ready", start_s=_START_S)
    async with run as server:
        await ready_replicas(server, "m", given.replicas)
        yield Side(side, server, "m")


async def _turn(
    bench: Bench, side: Side, requests: Sequence[tuple[list[int], int]]
) -> dict[str, Any]:
    bodies = [
        {
            "model": side.model,
            "prompt": ids,
            "max_tokens": most,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for ids, most in requests
    ]
    clients = bench.options.clients
    cpu = side.front_cpu()
    answers = await asyncio.gather(
        *(_client(side.server.url, bodies[number::clients]) for number in range(clients))
    )
    cpu = side.front_cpu() - cpu
    streams = [stream for answer in answers for stream in answer["streams"]]
    tokens = sum(_tokens(tail) for answer in answers for tail in answer.get("tails", ()))
    wanted = sum(most for _, most in requests)
    if tokens != wanted:
        raise SystemExit(f"{side.name} made {tokens} tokens, not {wanted}.")
    seconds = max(stream["last"] for stream in streams) - min(answer["began"] for answer in answers)
    firsts = sorted(stream["first"] for stream in streams)
    gaps = [gap for stream in streams for gap in stream["gaps"]]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "rate": tokens / seconds,
        "first_p50": percentile(firsts, 50),
        "first_p99": percentile(firsts, 99),
        "gap_p50": percentile(gaps, 50),
        "gap_p99": percentile(gaps, 99),
        "events": sum(stream["events"] for stream in streams),
        "front_cpu": cpu,
        "front_cpu_per_1000": cpu / tokens * 1000,
        "firsts": [round(first, 4) for first in firsts],
    }


async def _client(url: str, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not bodies:
        return {"began": float("inf"), "streams": []}
    async with asyncio.timeout(_ROUND_S), drive.program(load.command()) as client:
        await client.ask({"do": "open", "url": url, "bodies": bodies})
        return await client.ask({"do": "drain", "times": True})


def _tokens(tail: str) -> int:
    counts = re.findall(r'"completion_tokens": ?(\d+)', tail)
    if not counts or "[DONE]" not in tail:
        raise SystemExit(f"A stream did not end well: {tail}")
    return int(counts[-1])


def _table(result: dict[str, Any]) -> list[str]:
    offline = statistics.median(turn["tokens"] / turn["seconds"] for turn in result["offline"])
    lines = [
        f"{'':16}{'tok/s':>9}{'of own':>8}{'TTFT p50':>10}{'p99':>8}{'gap p50':>9}{'p99':>8}"
        f"{'front CPU s/1000':>18}",
        f"{'the engine':16}{offline:9.0f}{1:8.3f}",
    ]
    names = dict.fromkeys(turn["side"] for turn in result["turns"])
    middle = {name: _middle(result["turns"], name) for name in names}
    for name, figures in middle.items():
        lines.append(
            f"{name:16}{figures['rate']:9.0f}{figures['rate'] / offline:8.3f}"
            f"{figures['first_p50']:10.3f}{figures['first_p99']:8.3f}"
            f"{figures['gap_p50'] * 1000:7.1f}ms{figures['gap_p99'] * 1000:6.0f}ms"
            f"{figures['front_cpu_per_1000']:18.4f}"
        )
    keys = ("rate", "first_p50", "first_p99", "gap_p99", _CPU)
    ours = [name for name in names if name.startswith("headrace")]
    for mine, name in itertools.product(ours, (name for name in names if name not in ours)):
        ratios = (f"{key} {middle[mine][key] / middle[name][key]:.3f}" for key in keys)
        lines.append(f"{mine} / {name}: {', '.join(ratios)}")
    return lines


def _middle(turns: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    mine = [turn for turn in turns if turn["side"] == name]
    keys = [key for key, value in mine[0].items() if isinstance(value, float)]
    return {key: statistics.median(turn[key] for turn in mine) for key in keys}


def _brief(turn: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) for key, value in turn.items() if key != "firsts"}


def _fronts(process: psutil.Process) -> list[psutil.Process]:
    if _is_core(process):
        return []
    below = [front for child in process.children() for front in _fronts(child)]
    return [process, *below]


def _is_core(process: psutil.Process) -> bool:
    try:
        command = f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return True
    return any(sign in command for sign in _CORES)


if __name__ == "__main__":
    main()
