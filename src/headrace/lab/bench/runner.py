"""Puts loads on a service: a number of clients, or of requests per second."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from headrace.core.errors import InvalidRequest, Unauthorized, UnknownModel, UpstreamError
from headrace.lab.bench import record
from headrace.lab.bench.answer import Answer, Row, message_of
from headrace.lab.bench.prompts import PromptRequest
from headrace.lab.bench.record import Level
from headrace.lab.bench.settings import Load, Settings
from headrace.lab.http import Broken, Http

Progress = Callable[[float], None]
"""Receives the share of a load that is done."""

_AFTER_FAULT_S = 0.05
"""A pause, so that a closed loop does not become a flood if every request is refused at once."""


class Dialect(msgspec.Struct, frozen=True):
    """The optional fields that a server accepts; the first one of `_DIALECTS` is preferred."""

    ignore_eos: bool = True
    usage: bool = True
    length: str = "max_tokens"
    temperature: bool = True


_DIALECTS = (
    Dialect(),
    Dialect(ignore_eos=False),
    Dialect(ignore_eos=False, length="max_completion_tokens"),
    Dialect(ignore_eos=False, length="max_completion_tokens", temperature=False),
    Dialect(ignore_eos=False, usage=False),
)


class Bench:
    """One service under one set of settings. `stop` cuts running requests and ends the load.

    Requests that are not counted are taken from `aside`, so that they put no counted prompt into a
    cache.
    """

    def __init__(self, http: Http, settings: Settings, aside: Iterator[PromptRequest]) -> None:
        self.dialect = _DIALECTS[0]
        self.stop = asyncio.Event()
        self._http, self._settings, self._aside = http, settings, aside
        route = "chat/completions" if settings.api == "chat" else "completions"
        self._path = f"{http.place.base}/{route}"

    async def probe(self) -> None:
        """Send requests until one is accepted, to find the dialect of the server.

        Raises:
            UpstreamError: there is no answer, or not one of OpenAI's API.
            RequestError: the key, the model or the request is refused.
        """
        refusal, request = Row(at_s=0, total_ms=0), next(self._aside)
        for dialect in _DIALECTS:
            self.dialect = dialect
            row, status = await self._send(request, 0.0)
            if not row.fault:
                return
            refusal = refusal if refusal.fault else row
            if status not in (400, 422):
                raise _error(status, row, self._http.place.name, self._settings.model)
        raise InvalidRequest(f"The service refuses the requests: {refusal.detail}")

    async def run(self, load: Load, requests: Iterator[PromptRequest], progress: Progress) -> Level:
        """Put a load on the service and return its figures."""
        progress(0.0)
        warming = asyncio.create_task(self._warm_up(load))
        await self._watch(warming, set(), lambda: None)
        rows: list[Row] = []
        gc.collect()
        gc.freeze()
        zero, busy = time.perf_counter(), time.process_time()
        each = self._clients if load.loop == "closed" else self._arrivals
        tasks: set[asyncio.Task[None]] = set()
        main = asyncio.create_task(each(load, requests, zero, rows, tasks))

        def show() -> None:
            progress(self._share(len(rows), time.perf_counter() - zero))

        cut = await self._watch(main, tasks, show)
        gc.unfreeze()
        busy, passed = time.process_time() - busy, time.perf_counter() - zero
        last = max((row.at_s + row.total_ms / 1e3 for row in rows), default=0.0)
        seconds = passed if cut or not rows else last
        return record.level(
            load,
            sorted(rows, key=lambda row: row.at_s),
            seconds,
            slo=self._settings.slo,
            cut=cut,
            client_busy=busy / passed,
        )

    async def _warm_up(self, load: Load) -> None:
        count = self._settings.warm_up
        width = int(load.value) if load.loop == "closed" else 1
        for done in range(0, count, width):
            requests = itertools.islice(self._aside, min(width, count - done))
            await asyncio.gather(*(self._send(request, 0.0) for request in requests))

    async def _watch(
        self,
        main: asyncio.Task[None],
        tasks: set[asyncio.Task[None]],
        show: Callable[[], None],
    ) -> int:
        """Wait until the load ends or is stopped; return the number of requests that were cut."""
        stopped = asyncio.create_task(self.stop.wait())
        try:
            while not main.done() and not stopped.done():
                await asyncio.wait(
                    {main, stopped}, timeout=0.25, return_when=asyncio.FIRST_COMPLETED
                )
                show()
            if main.done():
                await main
            return sum(not task.done() for task in tasks)
        finally:
            for task in (stopped, main, *tasks):
                task.cancel()
            await asyncio.gather(stopped, main, *tasks, return_exceptions=True)

    def _share(self, done: int, seconds: float) -> float:
        settings = self._settings
        if settings.requests is not None:
            return done / settings.requests
        return min(1.0, seconds / settings.duration_s) if settings.duration_s else 1.0

    async def _clients(
        self,
        load: Load,
        requests: Iterator[PromptRequest],
        zero: float,
        rows: list[Row],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        left = itertools.count() if self._settings.requests is None else None
        turns = left or iter(range(self._settings.requests or 0))

        async def client() -> None:
            for turn in turns:
                late = time.perf_counter() - zero >= (self._settings.duration_s or 0)
                # Each client sends at least one request, even in a short time.
                if left is not None and late and turn >= load.value:
                    return
                row, _ = await self._send(next(requests), zero)
                rows.append(row)
                if row.fault:
                    await asyncio.sleep(_AFTER_FAULT_S)

        tasks.update(asyncio.create_task(client()) for _ in range(int(load.value)))
        await asyncio.gather(*tasks)

    async def _arrivals(
        self,
        load: Load,
        requests: Iterator[PromptRequest],
        zero: float,
        rows: list[Row],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        async def send(request: PromptRequest, due: float) -> None:
            rows.append((await self._send(request, zero, due))[0])

        for offset in schedule(self._settings, load.value):
            request = next(requests)
            if (wait := zero + offset - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(send(request, zero + offset))
            tasks.add(task)
        await asyncio.gather(*tasks)

    async def _send(
        self, request: PromptRequest, zero: float, due: float | None = None
    ) -> tuple[Row, int]:
        body = self._body(request)
        answer = Answer(time.perf_counter(), request.max_tokens, due)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._http.send(self._path, body, answer)
        except TimeoutError:
            answer.fail("timeout", f"no end within {self._settings.timeout_s:g} s")
        except Broken as error:
            answer.fail(error.kind, str(error))
        return answer.row(zero), answer.status

    def _body(self, request: PromptRequest) -> bytes:
        settings, dialect = self._settings, self.dialect
        content = request.content
        fields: dict[str, Any] = {"model": settings.model, "stream": True}
        if settings.api == "completions":
            fields["prompt"] = content
        else:
            alone = [{"role": "user", "content": content}]
            fields["messages"] = alone if isinstance(content, str) else content
        fields[dialect.length] = request.max_tokens
        if dialect.temperature:
            fields["temperature"] = settings.temperature
        if dialect.ignore_eos:
            fields["ignore_eos"] = True
        if dialect.usage:
            fields["stream_options"] = {"include_usage": True}
        return msgspec.json.encode({**fields, **settings.body})


def schedule(settings: Settings, rate: float) -> Iterator[float]:
    """Yield the due times of requests in seconds from the start; the same for the same seed."""
    source = random.Random(f"{settings.seed}/{rate}")  # noqa: S311 - reproducible
    at = 0.0
    for count in itertools.count():
        # A sum of equal steps would drift.
        at = at if settings.arrival == "poisson" else count / rate
        if settings.requests is not None and count >= settings.requests:
            return
        if settings.requests is None and at >= (settings.duration_s or 0):
            return
        yield at
        at += source.expovariate(rate)


async def served_models(http: Http) -> list[str]:
    """Return the names of the service's models.

    Raises:
        UpstreamError: there is no answer, or not one of OpenAI's API.
        Unauthorized: the key is not accepted.
    """
    service = http.place.name
    try:
        status, body = await http.fetch(f"{http.place.base}/models")
    except Broken as error:
        if error.kind == "connect":
            raise UpstreamError(f"No service at {service}: {error}.", param="url") from None
        raise UpstreamError(f"{service}/models has no answer ({error}); name a model.") from None
    if status != 200:
        row = Row(at_s=0, total_ms=0, fault=f"http {status}", detail=message_of(body))
        raise _error(status, row, service, "")
    try:
        data = msgspec.json.decode(body, type=dict[str, Any])["data"]
        return [str(model["id"]) for model in data]
    except (msgspec.MsgspecError, KeyError, TypeError):
        raise UpstreamError(f"{service}/models has no list of models; name one.") from None


def _error(status: int, row: Row, service: str, model: str) -> Exception:
    if row.fault == "connect":
        return UpstreamError(f"No service at {service}: {row.detail}.", param="url")
    if status in (401, 403):
        return Unauthorized(f"{service}: {row.detail} Set HEADRACE_API_KEY or OPENAI_API_KEY.")
    if status == 404:
        return UnknownModel(f"{service} has no {model or 'models'}: {row.detail}")
    return UpstreamError(f"{service} answers with {row.fault}: {row.detail}")
