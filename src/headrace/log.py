"""Logging to stderr: a line of text or of JSON for each record."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Literal

import msgspec

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
    """Level, logger, message, and the data of the record as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, followed by the traceback if any."""
        pairs = "".join(
            f" {key}={msgspec.json.encode(value, enc_hook=str).decode()}"
            for key, value in _data(record).items()
        )
        line = f"{record.levelname.lower():7} {record.name}: {record.getMessage()}{pairs}"
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return line + trace


def configure(level: str, style: Format) -> None:
    """Log to stderr; a record that cannot be written (a closed terminal) is dropped."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("headrace").setLevel(level.upper())


def _data(record: logging.LogRecord) -> dict[str, Any]:
    data: dict[str, Any] = getattr(record, "data", {})
    return data
