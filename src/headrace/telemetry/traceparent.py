"""The W3C's way to say in a header to which trace a request belongs."""

from __future__ import annotations

import re
from typing import NamedTuple

# Later versions may add fields; the first has none but these four.
_HEADER = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LONGEST_STATE = 512
SAMPLED = 1


class Parent(NamedTuple):
    """The caller's span. Ids are lower-case hex; `state` goes on as it came."""

    trace_id: str
    span_id: str
    flags: int = SAMPLED
    state: str = ""


def parse(traceparent: str, tracestate: str = "") -> Parent | None:
    """Read the two headers; None for what is none, as if nothing had been sent."""
    found = _HEADER.fullmatch(traceparent.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) * int(span_id, 16):
        return None
    # What is too long may be dropped as a whole, and never cut.
    state = tracestate.strip()
    state = state if len(state) <= _LONGEST_STATE and state.isascii() else ""
    return Parent(trace_id, span_id, int(flags, 16), state if state.isprintable() else "")


def written(trace_id: str, span_id: str, flags: int) -> str:
    """Return a traceparent header."""
    return f"00-{trace_id}-{span_id}-{flags:02x}"
