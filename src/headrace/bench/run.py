"""One run: the service, its prompts, every load, and the record of it all."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from headrace import __version__
from headrace.bench import figures, prompts
from headrace.bench.figures import Level, Limit, Run
from headrace.bench.http import Http, place
from headrace.bench.load import Bench, served_models
from headrace.bench.prompts import Ask, Vocabulary
from headrace.bench.settings import Load, Settings
from headrace.core.errors import ConfigError

OnProgress = Callable[[str, int, int], None]
_BUSY = 0.8
_CACHED = 0.25


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where to measure. `limit` is told after the service is there; it may block."""

    url: str
    key: str | None = None
    own: bool = False
    file: Path | None = None
    machine: dict[str, Any] = {}
    limit: Callable[[], Limit | None] = lambda: None


async def measure(
    source: Source, settings: Settings, report: OnProgress, stop: asyncio.Event
) -> Run:
    """Put every load on the service. When `stop` is set, what has been measured is returned.

    Raises:
        ConfigError: the settings contradict themselves.
        UpstreamError: nobody answers, or not as OpenAI's API does.
        RequestError: the service refuses the requests.
    """
    asked = None if source.file is None else prompts.read(source.file, settings)
    http = Http(place(source.url), source.key)
    try:
        settings = await _named(http, settings)
        words = None if asked else await _vocabulary(http, settings)
        aside = _asks(settings, words, asked, f"{settings.seed}/aside")
        bench = Bench(http, settings, map(prompts.reordered, aside) if asked else aside)
        bench.stop = stop
        await bench.probe()
        limit = await asyncio.to_thread(source.limit)
        levels: list[Level] = []
        for load in settings.loads:
            if stop.is_set():
                break
            asks = _asks(settings, words, asked, f"{settings.seed}/{load}")
            one = await bench.run(load, asks, _progress(report, load))
            levels.append(figures.of_limit(one, limit) if limit else one)
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


def without_rows(run: Run) -> Run:
    """Leave single requests out, as a record of many would be large."""
    return msgspec.structs.replace(
        run, levels=tuple(msgspec.structs.replace(one, rows=None) for one in run.levels)
    )


def read(path: Path) -> Run:
    """Read the record of a run.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no record of `headrace bench`: {error}.") from None
    if found.schema != figures.SCHEMA:
        raise ConfigError(f"{path} has schema {found.schema}; this is {figures.SCHEMA}.")
    return found


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


def _asks(
    settings: Settings, words: Vocabulary | None, asked: Sequence[Ask] | None, seed: str
) -> Iterator[Ask]:
    if asked:
        return itertools.cycle(asked)
    assert words is not None
    return prompts.synthetic(settings, words, seed)


def _progress(report: OnProgress, load: Load) -> Callable[[float], None]:
    what = f"{load} requests at once" if load.loop == "closed" else f"{load.value:g} requests/s"
    return lambda share: report(what, min(100, int(share * 100)), 100)


def _described(words: Vocabulary | None, file: Path | None) -> str:
    if words is None:
        return f"from {file.name if file else 'nowhere'}"
    return "synthetic, counted by the server" if words.exact else "synthetic, length estimated"


def _notes(bench: Bench, words: Vocabulary | None, levels: Sequence[Level]) -> Iterator[str]:
    if words is not None and not words.exact:
        yield "The service has no /tokenize: a word is taken for a token; PROMPT has what it was."
    if not bench.dialect.ignore_eos:
        yield "The service does not take ignore_eos: answers may be shorter than asked for."
    if any(one.short for one in levels):
        yield f"{sum(one.short for one in levels)} answers were shorter than asked for."
    if any(one.ok and one.counted_by != "usage" for one in levels):
        yield "The service tells no usage: chunks with text are counted as tokens."
    cached = max((one.cached_tokens / (one.prompt_tokens or 1) for one in levels), default=0.0)
    if cached > _CACHED:
        yield f"{cached:.0%} of the prompts came from the service's cache of prefixes."
    busy = max((one.client_busy for one in levels), default=0.0)
    if busy > _BUSY:
        yield f"The client itself was busy {busy:.0%} of the time: the service may be faster."
