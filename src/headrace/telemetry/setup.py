"""Switches OpenTelemetry on, where its standard variables or the host program say so."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from headrace.telemetry.span import Exporter, Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_log = logging.getLogger("headrace.telemetry")
_theirs = logging.getLogger("opentelemetry.exporter")
_NAME = "headrace"
_EXTRA = "pip install 'headrace[otlp]'"
_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_SAYS_CONTENT = frozenset({"true", "span_only", "span_and_event"})
_LAST_S = 2.0


def configure(version: str, environment: Mapping[str, str] = os.environ) -> Tracing:
    """Return the tracing of this process.

    Spans are exported where OTEL_TRACES_EXPORTER or an OTLP endpoint asks for it, and to the
    provider of the host program where it has set one. Otherwise nothing is imported and nothing
    runs. It never raises: what cannot be exported is told in the log.
    """
    tells = environment.get(_CONTENT, "").strip().lower() in _SAYS_CONTENT
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Tracing()
    if (host := _of_the_host(version)) is not None:
        return Tracing(host, tells_content=tells)
    if switched_on_by(environment) is None:
        return Tracing()
    try:
        provider = _provider(version, environment)
    except ImportError:
        _log.warning("OpenTelemetry is asked for and not installed: %s", _EXTRA)
        return Tracing()
    except Exception as error:  # noqa: BLE001  # each library has complaints of its own
        _log.warning("OpenTelemetry could not be set up: %s", error)
        return Tracing()
    return Tracing(
        _tracer(provider, version), tells_content=tells, close=lambda: _shut_down(provider)
    )


def _of_the_host(version: str) -> Exporter | None:
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    unset = isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
    return None if unset else _tracer(provider, version)


def _tracer(provider: Any, version: str) -> Exporter:
    from headrace.telemetry.otel import OpenTelemetry

    return OpenTelemetry(provider.get_tracer(_NAME, version))


def switched_on_by(environment: Mapping[str, str]) -> str | None:
    """Return the variable that asks for spans to be exported; None where none does."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get(_EXPORTER, "").strip():
        return _EXPORTER if any(_exporters(environment)) else None
    return next((name for name in _ENDPOINTS if environment.get(name, "").strip()), None)


def _exporters(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the entry points of the exporters; OTLP's where none is named."""
    protocol = (
        environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    ).strip()
    for name in (environment.get(_EXPORTER, "").strip() or "otlp").split(","):
        if (known := name.strip().lower()) == "otlp":
            yield _PROTOCOLS.get(protocol, protocol)
        elif known not in ("", "none"):
            yield name.strip()


def _provider(version: str, environment: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Each retry would be a line in our log; why a batch is lost is enough.
    _theirs.setLevel(logging.ERROR)
    known = {"service.version": version}
    if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        known["service.name"] = _NAME
    # Its own shutdown at exit has no limit; ours has. The sampler, the limits and the queue are
    # those of the variables.
    provider = TracerProvider(resource=Resource.create(known), shutdown_on_exit=False)
    for name in _exporters(environment):
        where = next((at for one in _ENDPOINTS if (at := environment.get(one))), name)
        exporter: Any = _Exporter(where, _load(name)())
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class _Exporter:
    """Another exporter; that it loses spans is said once, and so is that it does no longer."""

    def __init__(self, where: str, inner: Any) -> None:
        self._where, self._inner, self._lost = where, inner, 0
        self.shutdown = inner.shutdown

    def export(self, spans: list[Any]) -> Any:
        count, result = len(spans), self._inner.export(spans)
        # The traceback of what failed within leads here: by it the batch would stay until the
        # garbage collector comes, which then takes all the longer.
        spans.clear()
        if result.value:
            if not self._lost:
                _log.warning("%s takes no spans: they are lost. This is said once.", self._where)
            self._lost += count
        elif self._lost:
            _log.warning("%s takes spans again; %d were lost.", self._where, self._lost)
            self._lost = 0
        _theirs.setLevel(logging.CRITICAL if self._lost else logging.ERROR)
        return result


def _load(name: str) -> Any:
    found = metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        if name in (*_PROTOCOLS.values(), "console"):
            raise ImportError(name)
        raise ValueError(f"there is no exporter of the name {name!r}")
    return next(iter(found)).load()


def _shut_down(provider: TracerProvider) -> None:
    """Send the rest. A collector that does not answer is left behind: the thread is a daemon."""
    thread = threading.Thread(target=provider.shutdown, name="headrace-otel-end", daemon=True)
    thread.start()
    thread.join(_LAST_S)
