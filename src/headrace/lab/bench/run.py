"""One run: the service, its prompts, the loads, and the record."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from headrace import __version__, machine, roofline, runtime
from headrace.config import Settings as Configuration
from headrace.core.errors import ConfigError
from headrace.lab import drive
from headrace.lab.bench import prompts, record
from headrace.lab.bench.prompts import PromptRequest, Vocabulary
from headrace.lab.bench.record import Level, Limit, Run
from headrace.lab.bench.runner import Bench, served_models
from headrace.lab.bench.settings import Load, Settings
from headrace.lab.http import Http, place
from headrace.models.inspect import inspect
from headrace.models.reference import parse

OnProgress = Callable[[str, int, int], None]
_BUSY = 0.8
_CACHED = 0.25


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """The service to measure. `limit` is called once the service is ready, and may block."""

    url: str
    key: str | None = None
    own: bool = False
    file: Path | None = None
    machine: dict[str, Any] = {}
    limit: Callable[[], Limit | None] = lambda: None


@contextlib.asynccontextmanager
async def own_server(arguments: Sequence[str]) -> AsyncGenerator[drive.Server]:
    """Run `headrace serve` with these arguments; yield it when its model is loaded.

    It counts no usage, and has a key of its own.

    Raises:
        LoadFailed: it ended before that.
    """
    key = secrets.token_hex(16)
    environment = {"HEADRACE_API_KEYS": key, "HEADRACE_USAGE": "false"}
    command = drive.serve(*arguments)
    async with drive.server(command, environment, ready="/health/ready", key=key) as server:
        yield server


def memory_limit(
    configured: Configuration, model: str | None, url: str | None, weights: int, rate: float | None
) -> Limit | None:
    """Return the limit of a service at `url`, or of our own server; None if unknown. Blocking.

    `weights` are in bytes, by default those of our `model`; `rate` is the bandwidth of the memory
    in bytes/s, which can only be measured for the processors of this machine.
    """
    cache = None
    if model is not None and not weights:
        reference = parse(configured.model_spec(model).model)
        if (stored := runtime.store(configured.config).find(reference)) is not None:
            file = inspect(Path(stored.path))
            weights, cache = file.size, file.kv_bytes_per_token
    if not weights:
        return None
    if rate is None:
        here = url is None or place(url).is_loopback
        if not here or any(device.key != "cpu" for device in machine.devices()):
            return None
        rate = roofline.bandwidth(configured.config.home)
    return Limit(weights=weights, cache_per_token=cache, bandwidth=rate)


async def measure(
    source: Source, settings: Settings, report: OnProgress, stop: asyncio.Event
) -> Run:
    """Put every load on the service. When `stop` is set, the loads so far are returned.

    Raises:
        ConfigError: the settings contradict each other.
        UpstreamError: there is no answer, or not one of OpenAI's API.
        RequestError: the service refuses the requests.
    """
    listed = None if source.file is None else prompts.read(source.file, settings)
    http = Http(place(source.url), source.key)
    try:
        settings = await _named(http, settings)
        words = None if listed else await _vocabulary(http, settings)
        aside = _requests(settings, words, listed, f"{settings.seed}/aside")
        bench = Bench(http, settings, map(prompts.reordered, aside) if listed else aside)
        bench.stop = stop
        await bench.probe()
        limit = await asyncio.to_thread(source.limit)
        levels: list[Level] = []
        for load in settings.loads:
            if stop.is_set():
                break
            requests = _requests(settings, words, listed, f"{settings.seed}/{load}")
            level = await bench.run(load, requests, _progress(report, load))
            levels.append(record.of_limit(level, limit) if limit else level)
    finally:
        http.close()
    return Run(
        headrace=__version__,
        began=datetime.now(UTC).isoformat(timespec="seconds"),
        url=http.place.name,
        own_server=source.own,
        settings=settings,
        prompts=_described(words, source.file),
        machine=source.machine,
        notes=tuple(_notes(bench, words, levels)),
        interrupted=stop.is_set(),
        limit=limit,
        levels=tuple(levels),
    )


async def _named(http: Http, settings: Settings) -> Settings:
    if settings.model:
        return settings
    models = await served_models(http)
    if len(models) != 1:
        raise ConfigError(f"flag --model: {http.place.name} serves {', '.join(models)}.")
    return msgspec.structs.replace(settings, model=models[0])


async def _vocabulary(http: Http, settings: Settings) -> Vocabulary:
    if settings.prompt is None or settings.shared_prefix >= settings.prompt.least:
        raise ConfigError("flag --shared-prefix: it leaves nothing of the prompt.")
    return await prompts.vocabulary(prompts.counter(http, settings.model))


def _requests(
    settings: Settings, words: Vocabulary | None, listed: Sequence[PromptRequest] | None, seed: str
) -> Iterator[PromptRequest]:
    if listed:
        return itertools.cycle(listed)
    assert words is not None
    return prompts.synthetic(settings, words, seed)


def _progress(report: OnProgress, load: Load) -> Callable[[float], None]:
    label = f"{load} requests at once" if load.loop == "closed" else f"{load.value:g} requests/s"
    return lambda share: report(label, min(100, int(share * 100)), 100)


def _described(words: Vocabulary | None, file: Path | None) -> str:
    if words is None:
        return f"from {file.name if file else 'nowhere'}"
    return "synthetic, counted by the server" if words.exact else "synthetic, length estimated"


def _notes(bench: Bench, words: Vocabulary | None, levels: Sequence[Level]) -> Iterator[str]:
    if words is not None and not words.exact:
        yield "The service has no /tokenize: a word counts as a token; PROMPT is the actual length."
    if not bench.dialect.ignore_eos:
        yield "The service does not accept ignore_eos: answers may be shorter than requested."
    if any(level.short for level in levels):
        yield f"{sum(level.short for level in levels)} answers were shorter than requested."
    if any(level.ok and level.counted_by != "usage" for level in levels):
        yield "The service reports no usage: chunks with text are counted as tokens."
    cached = max(
        (level.cached_tokens / (level.prompt_tokens or 1) for level in levels), default=0.0
    )
    if cached > _CACHED:
        yield f"{cached:.0%} of the prompts came from the service's cache of prefixes."
    busy = max((level.client_busy for level in levels), default=0.0)
    if busy > _BUSY:
        yield f"The client itself was busy {busy:.0%} of the time: the service may be faster."
