"""The settings of a run, and the parsers of loads and lengths."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from headrace.core import values
from headrace.core.errors import ConfigError

Api = Literal["chat", "completions"]
Arrival = Literal["poisson", "constant"]
Loop = Literal["closed", "open"]

MOST_CLIENTS = 4096
_FIGURES = {"ttft": "ttft_ms", "itl": "inter_token_ms", "total": "total_ms"}
_UNITS = {
    **{unit: 1000**power for power, unit in enumerate(("", *"kmgt"))},
    **{f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)},
}


class Span(msgspec.Struct, frozen=True):
    """A length in tokens, drawn uniformly from `least` to `most`, both included."""

    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        """Return a length."""
        return source.randint(self.least, self.most)

    def __str__(self) -> str:
        """Format it as it is parsed."""
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


class Load(msgspec.Struct, frozen=True):
    """A number of clients, each with one request after another (closed), or requests/s (open)."""

    loop: Loop
    value: float

    def __str__(self) -> str:
        """Format it as `4` clients or `4/s`."""
        return f"{self.value:g}" if self.loop == "closed" else f"{self.value:g}/s"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One run: the same requests at each load.

    A load ends after `requests`, or starts new ones for `duration_s`. Lengths are in tokens;
    `prompt` is None if the prompts come from a file. `slo` are limits in milliseconds by the
    name of the figure. `timeout_s` is how long one request may take.
    """

    model: str
    loads: tuple[Load, ...]
    api: Api = "chat"
    requests: int | None = None
    duration_s: float | None = 10.0
    warm_up: int = 1
    prompt: Span | None = Span(128, 128)
    output: Span = Span(64, 64)
    shared_prefix: int = 0
    arrival: Arrival = "poisson"
    seed: int = 0
    temperature: float = 0.0
    timeout_s: float = 600.0
    slo: dict[str, float] = {}
    body: dict[str, Any] = {}


def loads(loop: Loop, text: str) -> tuple[Load, ...]:
    """Parse `1,2,4` clients or `0.5,1,2` requests/s.

    Raises:
        ConfigError: it is malformed, or out of bounds.
    """
    flag = "--concurrency" if loop == "closed" else "--rate"
    parsed = tuple(Load(loop, _number(flag, word)) for word in text.split(","))
    for load in parsed:
        whole = load.value.is_integer() and load.value <= MOST_CLIENTS
        if not 0 < load.value <= 1e6 or (loop == "closed" and not whole):
            raise ConfigError(f"flag {flag}: {text} is not like 1,2,4, up to {MOST_CLIENTS}.")
    return parsed


def span(flag: str, text: str) -> Span:
    """Parse `128` or `64-256` tokens.

    Raises:
        ConfigError: it is malformed.
    """
    match = re.fullmatch(r"\s*(\d{1,7})(?:-(\d{1,7}))?\s*", text)
    if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]):
        raise ConfigError(f"flag {flag}: {text} is not like 128 or 64-256.")
    return Span(int(match[1]), int(match[2] or match[1]))


def slo(text: str) -> dict[str, float]:
    """Parse `ttft=500ms,itl=50ms,total=5s` as milliseconds by the name of the figure.

    Raises:
        ConfigError: a name or a duration is not known.
    """
    limits: dict[str, float] = {}
    for pair in text.split(",") if text else []:
        name, _, value = (part.strip() for part in pair.partition("="))
        limit = seconds("--slo", value)
        if name not in _FIGURES:
            raise ConfigError(f"flag --slo: {pair} is not like ttft=500ms,itl=50ms,total=5s.")
        limits[_FIGURES[name]] = limit * 1000
    return limits


def seconds(flag: str, text: str) -> float:
    """Parse `10s`, `1m30s` or a number of seconds, above 0.

    Raises:
        ConfigError: it is malformed.
    """
    try:
        value = values.seconds(text)
    except ValueError as error:
        raise ConfigError(f"flag {flag}: {error}.") from None
    if value <= 0:
        raise ConfigError(f"flag {flag}: {text} is not above 0.")
    return value


def amount(flag: str, text: str) -> float:
    """Parse bytes, or bytes/s: `98362432`, `98MB`, `1.2GiB`, `3.3TB/s`.

    Raises:
        ConfigError: it is malformed.
    """
    match = re.fullmatch(r"([\d.]+)\s*([kmgt]?i?)b?(/s)?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"flag {flag}: {text} is not like 98MB or 1.2GiB.")
    return _number(flag, match[1]) * _UNITS[match[2]]


def extra_body(text: str) -> dict[str, Any]:
    """Parse further fields of the requests, a JSON object.

    Raises:
        ConfigError: it is malformed.
    """
    try:
        return dict(msgspec.json.decode(text, type=Mapping[str, Any])) if text else {}
    except msgspec.MsgspecError as error:
        raise ConfigError(f"flag --body: {text} is no JSON object: {error}.") from None


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"flag {flag}: {text or 'nothing'} is no number.") from None
