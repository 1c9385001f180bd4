"""Durations, sizes and paths as text, and secrets that are not shown."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from headrace.core.errors import HeadraceError, InvalidRequest

_UNITS = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_OWN_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "choose GPUs with `device`",
    "CUDA_DEVICE_ORDER": "GPUs are numbered in the order of the PCI bus",
    "TMPDIR": "each process has a directory of its own",
}
_PART = re.compile(f"({_NUMBER})(h|ms|m|s|us|ns)")
_TEXT = re.compile(f"([+-]?)(?:({_NUMBER})|((?:{_PART.pattern})+))")
# Longer than any machine runs, and short enough for every timer.
_LONGEST_S = 1e9
_YEAR_S = 366 * 86400.0
_ENDLESS = re.compile(r"-1(?:h|ms|m|s|us|ns)?")
_PASSWORD = re.compile(r"(://[^/@:\s]*:)[^@/\s]+(?=@)|([?&]password=)[^&\s]+")
_SECRETS = frozenset({"key", "keys", "token", "secret", "password"})
_SECRET_PARTS = _SECRETS | {
    *("tokens", "secrets", "pass", "passwd", "passphrase", "pwd", "auth", "authorization"),
    *("credential", "credentials", "apikey", "accesskey", "privatekey", "cookie", "dsn"),
}


def seconds(value: str | float) -> float:
    """Return a duration in seconds: a number of them, or numbers with units (`5m`, `1h30m`).

    The syntax is Ollama's. -1 means without end, and so does every negative value.

    Raises:
        ValueError: `value` is not a duration.
    """
    amount = _amount(value)
    return amount if 0 <= amount <= _LONGEST_S else -1.0


def keep_alive_seconds(value: str | float) -> float:
    """Return the seconds of a request's `keep_alive`, at most a year; -1 is without end.

    Raises:
        ValueError: it is not a duration, is longer, or is negative and not -1 (of any unit).
    """
    amount = _amount(value)
    if 0 <= amount <= _YEAR_S:
        return amount
    if amount == -1 or (isinstance(value, str) and _ENDLESS.fullmatch(value.strip())):
        return -1.0
    raise ValueError(f"{value!r} is not from 0 to a year, nor -1 for no limit")


def _amount(value: str | float) -> float:
    if isinstance(value, bool):
        raise ValueError(_refusal(value))
    return _parse(value) if isinstance(value, str) else float(value)


def _parse(text: str) -> float:
    # The sign of micro is two characters of Unicode.
    match = _TEXT.fullmatch(re.sub("[\u00b5\u03bc]", "u", text.strip()))
    if match is None:
        raise ValueError(_refusal(text))
    sign, number, units = match.group(1, 2, 3)
    parts = _PART.findall(units or "")
    amount = sum(float(count) * _UNITS[unit] for count, unit in parts) if parts else float(number)
    return -amount if sign == "-" else amount


def _refusal(value: object) -> str:
    return f"{value!r} is not a duration; write seconds, 5m, 1h30m, 0, or -1 for no limit"


def is_text(text: str) -> bool:
    """Whether a text has no control characters and no lone surrogates: it can be shown and sent."""
    return all(unicodedata.category(character) not in ("Cc", "Cs") for character in text)


def expanded(text: str | Path, error_type: type[HeadraceError] = InvalidRequest) -> Path:
    """Return the path, with `~` or `~name` replaced by the home directory.

    Raises:
        HeadraceError: of class `error_type`, if there is no such home directory.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise error_type(f"{str(text)!r}: there is no such home directory.") from error


def size(count: int | None) -> str | None:
    """Return bytes in the largest fitting unit: `96.5 MB`; None for None."""
    if count is None:
        return None
    amount, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while amount >= 1000 and unit != "TB":
        amount, unit = amount / 1000, next(units)
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def amounts(memory: Mapping[str, int]) -> str | None:
    """Return bytes by device as text; the device is left out if it is only the CPU."""
    if list(memory) == ["cpu"]:
        return size(memory["cpu"])
    return " + ".join(f"{size(count)} {name}" for name, count in memory.items()) or None


def span(seconds: float) -> str:
    """Return a duration in at most two units: `42s`, `3m20s`, `2h05m`."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def as_text(value: object) -> str:
    """Return a value as people read it; true and false as in a configuration file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def flat(text: str) -> str:
    """Return text on one line, without characters that move the cursor or change the direction."""
    indent = len(text) - len(text.lstrip(" "))
    return " " * indent + "".join(filter(str.isprintable, " ".join(text.split())))


def names_secret(variable: str) -> bool:
    """Whether a variable of the environment has the name of a secret, as `HF_TOKEN` has."""
    return not _SECRET_PARTS.isdisjoint(re.split(r"[^a-z]+", variable.lower()))


def variables(value: object) -> object:
    """Return variables of the environment by name; None is the value that the service has.

    `value` is a table, or names and `NAME=value` in a list or separated by commas.

    Raises:
        ValueError: a name is malformed, or set in another way. It never contains a value.
    """
    if isinstance(value, str):
        as_json = value.lstrip().startswith(("[", "{"))
        value = json.loads(value) if as_json else [word.strip() for word in value.split(",")]
    if isinstance(value, list | tuple):
        pairs = [str(item).partition("=") for item in cast("Iterable[object]", value)]
        value = {name: text if equals else None for name, equals, text in pairs}
    if not isinstance(value, Mapping):
        return value
    table = cast("Mapping[str, object]", value)
    for name in table:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable")
        if name in _OWN_VARIABLES:
            raise ValueError(f"{name} is set by Headrace; {_OWN_VARIABLES[name]}")
    return {name: item if item is None else str(item) for name, item in table.items()}


def masked(key: str, value: Any) -> Any:
    """Return a value in a form to be printed as JSON.

    Of a secret that is a hash the first digits are kept; any other secret is hidden.
    """
    if hasattr(value, "get_secret_value"):  # pydantic's
        return "…"
    if key.rpartition(".")[2] == "env" and isinstance(value, Mapping):
        table = cast("Mapping[str, object]", value)
        return {name: text if text is None else "…" for name, text in table.items()}
    if isinstance(value, list | tuple):
        return [masked(key, item) for item in cast("Iterable[Any]", value)]
    if not value or key.rpartition(".")[2].rpartition("_")[2] not in _SECRETS:
        return _without_password(value) if isinstance(value, Path | str) else value
    text = str(value)
    return f"{text[:11]}…" if text.startswith("sha256:") else "…"


def _without_password(value: Path | str) -> str:
    """Return a path as a text, and an address without its password."""
    return _PASSWORD.sub(r"\1\2…", str(value))


def masked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their secrets masked."""
    return {key: masked(key, value) for key, value in options.items()}
