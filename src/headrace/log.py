"""Logging to stderr: a line for people, or one of JSON, for each record."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from headrace.core.values import amounts, as_text, flat, span

Format = Literal["text", "json"]


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Logging options, of the service and its child processes.

    Prompts and answers are logged only with `content`.
    """

    level: str = "warning"
    style: Format = "text"
    content: bool = False


class JsonLines(logging.Formatter):
    """A JSON object for each record; `extra={"data": {...}}` are keys of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line."""
        body: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_data(record),
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(body, enc_hook=str).decode()

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time in UTC, ISO 8601, with milliseconds."""
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.msecs):03d}Z"


class TextLines(logging.Formatter):
    """A line for people: the time, and what happened as a sentence.

    A record of the service that has a sentence (`sentence`) is written as that; another as its
    message and data as key=value. `colour` marks levels and failures for a terminal. With `full`,
    records for machines are written too: `filter` leaves them out otherwise.
    """

    def __init__(self, *, colour: bool = False, full: bool = False) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._colour = colour
        self._full = full

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether people want to see a record."""
        return self._full or not (record.msg in _FOR_MACHINES or _is_poll(_data(record)))

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, followed by the traceback if any."""
        name, data = record.getMessage(), _data(record) | _figures(record)
        text = sentence(name, data) or _pairs(record, name, data)
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = self._coloured(self.formatTime(record, self.datefmt), "dim")
        line += " " + self._coloured(flat(level + text), _style(record.levelno, data))
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")

    def _coloured(self, text: str, style: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._colour and style else text


_STYLES = {"dim": 2, "red": 31, "yellow": 33}
# A model's start, and the figures of a request, are in the lines `ready` and POST as well.
_FOR_MACHINES = frozenset(
    f"headrace.{name}"
    for name in ("worker.start", "worker.ready", "worker.died", "request", "pool.reloaded")
)


def _is_poll(data: Mapping[str, Any]) -> bool:
    """Whether it is a request that programs repeat every second; a probe may be refused too."""
    route, went_well = str(data.get("route")), data.get("status", 0) < 400
    polls = data.get("method") == "GET" and went_well and route.startswith(("/metrics", "/admin/"))
    return polls or route.startswith("/health")


def _style(level: int, data: Mapping[str, Any]) -> str:
    status: int = data.get("status", 0)
    if level >= logging.ERROR or status >= 500 or data.get("outcome") == "error":
        return "red"
    return "yellow" if level == logging.WARNING or status >= 400 else ""


def _pairs(record: logging.LogRecord, message: str, data: Mapping[str, Any]) -> str:
    ours = record.name.startswith("headrace")
    encode = msgspec.json.encode
    pairs = [f"{key}={encode(value, enc_hook=str).decode()}" for key, value in data.items()]
    return " ".join([message if ours else f"{record.name}: {message}", *pairs])


def sentence(name: str, data: Mapping[str, Any]) -> str:
    """Return a record of the service, by its name and data, as a sentence.

    It is empty without one, or for other data: an event may come from another version.
    """
    written = _SENTENCES.get(name.removeprefix("headrace."))
    with contextlib.suppress(KeyError, TypeError):
        return written(data) if written else ""
    return ""


def _ready(data: Mapping[str, Any]) -> str:
    took = f"{data['ms'] / 1000:.1f} s" if data["ms"] < 60_000 else span(data["ms"] / 1000)
    facts = (data.get("engine"), amounts(data["memory"]), took)
    return f"{data['model']} ready ({', '.join(filter(None, facts))})"


def _loading(data: Mapping[str, Any]) -> str:
    about = "about " if data.get("how") == "estimated" else ""
    need = amounts(data["need"])
    return f"{data['model']} loading" + (f" ({about}{need})" if need else "")


def _not_loaded(data: Mapping[str, Any]) -> str:
    detail = f" ({data['detail']})" if data.get("detail") else ""
    return f"{data['model']} could not be loaded: {data['error']}{detail}"


def _draining(data: Mapping[str, Any]) -> str:
    if not data.get("running"):
        return "Stopping"
    answers = "1 answer" if data["running"] == 1 else f"{data['running']} answers"
    return f"Stopping: {answers}, up to {data['drain_s']:g} s; Ctrl-C again to cut"


def _request(data: Mapping[str, Any]) -> str:
    """Return `POST /v1/chat/completions 200 smollm2 31+8 tokens 0.33 s 53 tok/s`."""
    read, written, speed = (data.get(key) for key in ("prompt", "completion", "speed"))
    parts = (
        data["method"],
        data["route"] if data["route"] != "-" else data.get("path") or "-",
        str(data["status"] or "left"),
        data.get("model"),
        None if read is None else f"{read}+{written} tokens" if written else f"{read} tokens",
        f"{data['ms'] / 1000:.2f} s" if data["ms"] < 60_000 else span(data["ms"] / 1000),
        f"{speed:.0f} tok/s" if speed else None,
        "cancelled" if data["outcome"] == "cancelled" and data["status"] else None,
        data.get("problem"),
    )
    return " ".join(filter(None, parts))


def _reloaded(data: Mapping[str, Any]) -> str:
    parts = [f"{key} {', '.join(names)}" for key, names in data.items() if names and key != "model"]
    return f"The configuration was read again: {'; '.join(parts) or 'nothing has changed'}"


_SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "access": _request,
    "service.ready": lambda data: "Ready",
    "service.waiting": lambda data: "Waiting for the nodes of the cluster",
    "service.cut": lambda data: "Stopping now",
    "service.stopped": lambda data: "Stopped",
    "pool.loading": _loading,
    "pool.ready": _ready,
    "pool.load_failed": _not_loaded,
    "pool.not_loaded": "{0[model]} waits to be loaded: {0[reason]}".format,
    "pool.unloaded": "{0[model]} unloaded".format,
    "pool.expired": "{0[model]} unloaded: idle for its keep-alive".format,
    "pool.evicted": "{0[model]} unloaded to free memory for {0[by]}".format,
    "pool.died": "{0[model]} died: {0[reason]}".format,
    "pool.restarted": "{0[model]} restarted".format,
    "pool.failed": "{0[model]} is not loaded again until it is started: {0[error]}".format,
    "pool.continued": "{0[model]} continues an answer ({0[way]}): {0[why]}".format,
    "pool.updated": lambda data: f"{data['model']} changed: {_settings(data['changes'])}",
    "pool.added": "{0[model]} added ({0[reference]})".format,
    "pool.removed": "{0[model]} removed".format,
    "pool.draining": _draining,
    "pool.reloaded": _reloaded,
    "pool.node_joined": "The node {0[node]} has joined ({0[address]})".format,
    "pool.node_left": "The node {0[node]} has gone: {0[why]}".format,
    "fronts.died": "Front {0[number]} {0[why]}; another is started".format,
    "fronts.not_accepted": "Connections cannot be accepted now: {0[error]}".format,
    "fronts.cancel_slow": lambda data: "An answer is slow to be cancelled",
    "cluster.front_joined": "The front {0[front]} has joined".format,
    "cluster.front_left": "The front {0[front]} has gone: {0[reason]}".format,
    "cluster.refused": "A front was refused: {0[error]}".format,
    "cluster.not_accepted": "A front does not accept this node: {0[error]}".format,
    "cluster.node_refused": "There is no connection to the node at {0[address]}: {0[error]}".format,
    "cluster.lookup_failed": "The addresses of {0[name]} are not known: {0[error]}".format,
    "cluster.not_reconciled": "The number of agents is not changed: {0[error]}".format,
    "cluster.not_placed": "{0[model]} is not loaded at {0[node]}: {0[error]}".format,
    "cluster.cancel_slow": "The node {0[node]} is slow to cancel an answer".format,
    "cluster.task": "A task of the front failed: {0[task]}".format,
    "pool.task": lambda data: "A task of the pool failed",
    "worker.bug": lambda data: "A worker failed unexpectedly",
    "worker.not_confined": "The process of a model is not confined: {0[error]}".format,
    "worker.cancel_slow": "{0[model]} is slow to cancel an answer".format,
    "engine.drafts_lose": "{0[model]} drafts nothing for now: speed with drafts {0[gain]}".format,
    "engine.drafts_tried": "{0[model]} tries drafts again".format,
    "engine.failed": "The engine failed in request {0[id]}".format,
    "sizing.damaged": "{0[path]} is damaged ({0[error]}); sizes are measured again".format,
    "lab.tune.damaged": "{0[path]} is damaged ({0[error]}); its measurements are ignored".format,
    "lab.bench.damaged": "{0[path]} is damaged ({0[error]}); its runs are ignored".format,
    "usage.not_written": "Usage is not written to {0[path]}: {0[reason]}".format,
    "usage.writes_again": "Usage is written to {0[path]} again; {0[lost]} counts were lost".format,
    "keys.created": "The key {0[name]} ({0[key]}) was created by {0[by]}".format,
    "keys.changed": "The key {0[name]} ({0[key]}) was changed by {0[by]}".format,
    "keys.revoked": "The key {0[name]} ({0[key]}) was revoked by {0[by]}".format,
    "keys.down": "The database of the keys does not answer ({0[way]}): {0[reason]}".format,
    "keys.back": "The database of the keys answers again; {0[unsettled]} counts are written".format,
    "usage.not_sent": "Usage waits in {0[path]} for the database: {0[reason]}".format,
    "usage.sent": "Usage that waited in {0[path]} is in the database".format,
    "sizing.not_kept": "Measured sizes are not kept: {0[error]}".format,
}


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={'default' if value is None else as_text(value)}" for key, value in changes.items()
    )


def configure(level: str, style: Format) -> None:
    """Log to stderr; a record that cannot be written (a closed terminal) is dropped."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonLines())
    else:
        lines = TextLines(colour=colourful(), full=level == "debug")
        handler.setFormatter(lines)
        handler.addFilter(lines.filter)
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("headrace").setLevel(level.upper())


def colourful() -> bool:
    """Whether stderr is a terminal that may be coloured."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("HEADRACE_NO_COLOR")
    return sys.stderr is not None and sys.stderr.isatty() and not plain


def _figures(record: logging.LogRecord) -> dict[str, Any]:
    """Return the data that only the line for people has."""
    more: dict[str, Any] = getattr(record, "more", {})
    return more


def _data(record: logging.LogRecord) -> dict[str, Any]:
    data: dict[str, Any] = getattr(record, "data", {})
    return data
