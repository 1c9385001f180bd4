"""The standard streams and the arguments, whatever their encoding, and when they are closed."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys

from headrace.core.errors import InvalidRequest


def prepare() -> None:
    r"""Open standard streams that are closed, and let all text be written to the others.

    What their encoding does not have is written as JSON escapes it, `\u65e5`: readable as text,
    and the same value in JSON.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number; a file that is opened later must not become a stream.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    codecs.register_error("headrace.escaped", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="headrace.escaped")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def text(argument: str) -> str:
    """Return an argument that is UTF-8, though the locale has another encoding."""
    with contextlib.suppress(UnicodeError):
        return os.fsencode(argument).decode()
    return argument


def is_terminal() -> bool:
    """Whether a person can type an answer."""
    return not sys.stdin.closed and sys.stdin.isatty()


def piped() -> str:
    """Return all of stdin as text, in UTF-8 or else in the encoding of the locale.

    Raises:
        InvalidRequest: it is neither.
    """
    if sys.stdin.closed:
        return ""
    data: bytes | str = getattr(sys.stdin, "buffer", sys.stdin).read()
    if isinstance(data, str):
        return data
    for encoding in ("utf-8-sig", sys.stdin.encoding):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise InvalidRequest("stdin is not text in UTF-8; iconv converts other encodings.")
