"""Telemetry: recorder, metrics and files of one service, by its settings."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from headrace.config import TelemetrySettings
from headrace.core.model import ModelInfo
from headrace.core.record import (
    Activity,
    Call,
    History,
    RequestRecord,
    Sink,
    TraceFilter,
    UsageFilter,
    UsageGroup,
    UsageRow,
)
from headrace.core.status import PoolEvent, PoolStatus
from headrace.keys.database import is_postgres
from headrace.pool.observer import Observer
from headrace.telemetry import trace_file, trace_read, usage
from headrace.telemetry.content import Redactor
from headrace.telemetry.history import HistoryRecorder
from headrace.telemetry.prometheus import Instruments
from headrace.telemetry.recent import Recent
from headrace.telemetry.recorder import Recorder
from headrace.telemetry.spans import Tracing
from headrace.telemetry.trace_file import TraceFile
from headrace.telemetry.usage import Usage
from headrace.telemetry.usage_shared import SharedUsage, read_usage


class ObservedPool(Protocol):
    """A pool of this machine, or the front of a cluster."""

    @property
    def entries(self) -> Container[str]:
        """The names of the served models."""
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Return the metadata of the served models."""
        ...

    def attach_observer(self, observer: Observer) -> None:
        """Attach an observer."""
        ...


class _Labels(NamedTuple):
    """The names that figures are counted by: those of the models, and of their adapters."""

    pool: ObservedPool

    def __contains__(self, name: Any) -> bool:
        return name in self.pool.entries or any(
            info.adapter is not None and info.id == name for info in self.pool.models()
        )


class ObservedAdmin(Protocol):
    """The Admin of such a pool."""

    @property
    def pool(self) -> ObservedPool:
        """The pool."""
        ...

    def status(self) -> PoolStatus:
        """Return the status of all models and devices."""
        ...


class Telemetry:
    """A Monitor. If everything is switched off, the pool has no observer."""

    def __init__(
        self,
        admin: ObservedAdmin,
        tracing: Tracing,
        settings: TelemetrySettings,
        home: Path,
        database: str = "",
    ) -> None:
        pool = admin.pool
        self._tracing = tracing
        self._instruments = Instruments(
            admin.status, lambda: _Labels(pool), lambda: recorder.running()
        )
        self._recent = Recent(lambda: recorder.running())
        self._history = HistoryRecorder(admin.status, self.activity)
        self._home, self._database = home, database
        self._files: list[TraceFile | Usage] = []
        if settings.traces:
            self._files.append(TraceFile(home / trace_file.FOLDER, settings.trace_bytes))
        if settings.usage:
            is_shared = is_postgres(database)
            self._files.append(
                SharedUsage(database, home) if is_shared else Usage(home / usage.FILE)
            )
        sinks: list[Sink] = [self._recent, *self._files]
        if settings.metrics:
            sinks.append(self._instruments)
        capture = Redactor(settings.redact) if settings.trace_content else None
        self._pool = pool
        self._recorder = recorder = Recorder(
            pool.models, tracing=tracing, sinks=sinks, capture=capture
        )
        if settings.is_on or tracing.exporter is not None:
            pool.attach_observer(recorder)

    def add(self, sink: Sink) -> None:
        """Pass the records of requests to one more sink. Call before the first request."""
        self._recorder.add(sink)
        self._pool.attach_observer(self._recorder)

    def activity(self) -> Activity:
        """Return running requests and rates, without waiting."""
        return self._recent.activity()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in a format of Prometheus, and its content type. May block."""
        return self._instruments.exposition(accept)

    def called(self, call: Call) -> None:
        """Count an HTTP request that has ended."""
        self._instruments.called(call)

    def lagged(self, seconds: float) -> None:
        """Count how late the event loop of a front was."""
        self._instruments.lag.observe(seconds)

    def happened(self, event: PoolEvent) -> None:
        """Count an event of the pool."""
        self._instruments.happened(event)

    def history(self) -> History:
        """Return the samples of the last minutes, without waiting."""
        return self._history.history()

    def traces(self, wanted: TraceFilter, skip: int, limit: int) -> list[RequestRecord]:
        """Return kept records, newest first, without the first `skip`. Blocking."""
        records = trace_read.records(self._home / trace_file.FOLDER, wanted)
        with contextlib.closing(records):
            return list(itertools.islice(records, skip, skip + limit))

    def trace(self, name: str) -> RequestRecord:
        """Return the kept record with an id, or a prefix of one. Blocking."""
        return trace_read.find(self._home / trace_file.FOLDER, name)

    def usage(self, by: Sequence[UsageGroup], wanted: UsageFilter) -> Sequence[UsageRow]:
        """Return the usage of each group, in order. Blocking."""
        return read_usage(self._database, self._home, by, wanted)

    def watch_controller(self, url: str, count: Callable[[], float]) -> None:
        """Show the rows that a DB-GPT controller has of this worker."""
        self._instruments.watch_controller(url, count)

    async def watch(self) -> None:
        """Measure the lag of the event loop and take samples, until cancelled."""
        await asyncio.gather(self._instruments.watch_loop(), self._history.run())

    async def aclose(self) -> None:
        """Write and export the rest; takes some seconds at most."""
        await asyncio.gather(
            self._tracing.aclose(), *(asyncio.to_thread(file.close) for file in self._files)
        )
