"""Writes the winner into the user's configuration, and keeps its comments and order."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from headrace.core.errors import ConfigError
from headrace.core.private import FILE_MODE, private_folder, write_atomically

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = re.compile(r"\s*\[")


def edited(text: str, model: str, settings: Mapping[str, Any], remark: str) -> str:
    """Return a configuration in which `[models.MODEL]` has these settings.

    A setting that is None is removed; `options` is a table of its own, and replaced as a whole.
    `remark` becomes a comment beside the engine. All other lines stay as they are.

    Raises:
        ConfigError: the file has the model in a form that cannot be edited.
    """
    wanted = _applied(tomllib.loads(text), model, settings)
    options: dict[str, Any] = settings.get("options") or {}
    plain = {key: value for key, value in settings.items() if key != "options"}
    head = f"models.{_key(model)}"
    lines = _without_table(text.splitlines(), f"{head}.options")
    lines = _with_table(lines, head, plain, remark)
    if options:
        place = _end_of_table(lines, head)
        lines[place:place] = ["", f"[{head}.options]", *_pairs(options)]
    result = "\n".join(lines).strip("\n") + "\n"
    if not _means(result, wanted):
        table = "\n".join([f"[{head}]", *_pairs(plain), f"[{head}.options]", *_pairs(options)])
        raise ConfigError(f"The file has {model} in a form that cannot be edited; write:\n{table}")
    return result


def save(path: Path, text: str) -> None:
    """Replace the file atomically; its folder is created if necessary.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        private_folder(path.parent)
        # A symbolic link is kept, and its target replaced.
        target = path.resolve()
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else FILE_MODE
        write_atomically(target, text.encode(), mode)
    except OSError as error:
        raise ConfigError(f"file {path}: {error.strerror or error}") from error


def _applied(tree: dict[str, Any], model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content that the file should have afterwards."""
    models: dict[str, Any] = tree.get("models") or {}
    table: dict[str, Any] = {**models.get(model, {}), **settings}
    table = {key: value for key, value in table.items() if value not in (None, {})}
    return {**tree, "models": {**models, model: table}}


def _means(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        return False


def _with_table(lines: list[str], head: str, settings: Mapping[str, Any], remark: str) -> list[str]:
    start = _find(lines, head)
    if start is None:
        lines = [*lines, *([""] if lines and lines[-1].strip() else []), f"[{head}]"]
        start = len(lines) - 1
    end = _end_of_table(lines, head)
    kept = [line for line in lines[start + 1 : end] if _name(line) not in settings]
    new = list(_pairs({key: value for key, value in settings.items() if value is not None}))
    beside = [f"{line}  # {remark}" if line.startswith("engine =") else line for line in new]
    return [*lines[: start + 1], *beside, *kept, *lines[end:]]


def _without_table(lines: list[str], head: str) -> list[str]:
    start = _find(lines, head)
    if start is None:
        return lines
    end = _end_of_table(lines, head)
    while start and not lines[start - 1].strip():
        start -= 1
    return [*lines[:start], *lines[end:]]


def _end_of_table(lines: list[str], head: str) -> int:
    """Return the line after the last pair of a table; comments before the next are the next's."""
    start = _find(lines, head)
    assert start is not None, "the table is there"
    following = range(start + 1, len(lines))
    end = next((i for i in following if _HEADER.match(lines[i])), len(lines))
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    return end


def _find(lines: list[str], head: str) -> int | None:
    wanted = _keys(head)
    return next((i for i, line in enumerate(lines) if _header(line) == wanted), None)


def _header(line: str) -> tuple[str, ...] | None:
    """Return the keys of a line that begins a table."""
    match = re.match(r"\s*\[([^\[].*)\]\s*(#.*)?$", line)
    return _keys(match[1]) if match else None


def _keys(dotted: str) -> tuple[str, ...]:
    try:
        inner: dict[str, Any] | int = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    keys: list[str] = []
    while isinstance(inner, dict):
        ((key, inner),) = inner.items()
        keys.append(key)
    return tuple(keys)


def _name(line: str) -> str:
    """Return the key of a line that is one pair; of `options.threads` it is `options`."""
    return line.partition("=")[0].partition(".")[0].strip() if "=" in line else ""


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if value is not None:
            yield f"{_key(key)} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = _pairs(cast("dict[str, Any]", value))
        return f"{{ {', '.join(pairs)} }}"
    # Strings, numbers, lists and booleans are written in TOML as in JSON.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)
