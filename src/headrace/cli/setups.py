"""The set-up of a client: what it is for, and its files, variables and steps."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from headrace.cli.client import Card
from headrace.core.errors import ConfigError

KEY = "HEADRACE_API_KEY"
"""The variable with the key, for programs that can be given its name."""
MARK = "Written by `headrace connect`."
"""In the first line of a file that is wholly ours, where its format has comments."""
_BEGIN, _END = "# headrace connect: begin", "# headrace connect: end"

Kind = Literal["own", "json", "block"]


@dataclass(frozen=True)
class Target:
    """A service and the models that a client is set up for; `needs_key` is whether it has keys."""

    url: str
    models: Sequence[Card]
    needs_key: bool = False

    @property
    def v1(self) -> str:
        """The address for clients of OpenAI's API."""
        return f"{self.url}/v1"

    @property
    def main(self) -> Card:
        """The model that is used unless the client chooses another."""
        return self.models[0]

    @property
    def secret(self) -> str:
        """The key as a shell expands it; any text where none is needed, as clients want one."""
        return f"${KEY}" if self.needs_key else "none"

    def secret_as(self, form: str) -> str:
        """Return the key as a client's file refers to a variable; `{}` is its name."""
        return form.format(KEY) if self.needs_key else "none"


class File(NamedTuple):
    """A file of a set-up.

    `own` is wholly ours, the content of a `json` file is merged into what is there, and a `block`
    is added to a file of lines, or replaces the one that was added before.
    """

    path: Path
    text: str
    kind: Kind = "own"


@dataclass(frozen=True)
class Setup:
    """What a client needs: files, variables, the command that starts it, and what is left to do."""

    files: Sequence[File] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    command: Sequence[str] = ()
    steps: Sequence[str] = ()


def as_lines(lines: Sequence[str]) -> str:
    """Return lines as one text."""
    return "".join(f"{line}\n" for line in lines)


def as_json(value: object) -> str:
    """Return a file of JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def as_toml(values: Mapping[str, Any]) -> list[str]:
    """Return lines of TOML; its basic strings are JSON's."""
    return [f"{key} = {_quoted(value)}" for key, value in values.items()]


def as_yaml(value: Mapping[str, Any]) -> str:
    """Return a file of YAML that is wholly ours."""
    return as_lines([f"# {MARK}", *yaml_lines(value)])


def yaml_lines(value: Any) -> list[str]:
    """Return a block of YAML; what is within it and not a mapping or a list of them is JSON."""
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _yaml_item(f"{key}:", item)]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    blocks = [yaml_lines(item) for item in value]
    return [f"{'  ' if n else '- '}{line}" for block in blocks for n, line in enumerate(block)]


def _quoted(value: object) -> str:
    # A string of JSON is one of TOML and YAML too, unless it has pairs of surrogates.
    return json.dumps(value, ensure_ascii=False)


def _yaml_item(key: str, value: Any) -> list[str]:
    if not _is_block(value):
        return [f"{key} {_quoted(value)}"]
    return [key, *(f"  {line}" for line in yaml_lines(value))]


def _is_block(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    return any(isinstance(item, Mapping) and len(cast("Sequence[Any]", item)) for item in items)


class Change(NamedTuple):
    """A file that a set-up changes: what it has and will have. `is_ours` is whether we wrote it."""

    path: Path
    before: str | None
    after: str
    is_ours: bool

    def diff(self) -> Iterator[str]:
        """Yield the lines that change."""
        texts = (self.before or "").splitlines(), self.after.splitlines()
        name = str(self.path)
        return difflib.unified_diff(*texts, name, name, lineterm="", n=2)

    def backup(self) -> Path | None:
        """Copy what was there, unless it is ours; return the copy.

        Raises:
            ConfigError: it cannot be copied.
        """
        if self.before is None or self.is_ours:
            return None
        names = (f"{self.path.name}.before-headrace{n}" for n in ("", *range(1, 10_000)))
        copy = next(p for name in names if not (p := self.path.with_name(name)).exists())
        try:
            shutil.copy2(self.path, copy)
        except OSError as error:
            raise ConfigError(f"file {copy}: {error.strerror or error}") from error
        return copy


def change_of(file: File) -> Change | None:
    """Return how a file changes; None if it has all of it.

    Raises:
        ConfigError: it cannot be read, or nothing can be added to what it has.
    """
    try:
        before = file.path.read_text(encoding="utf-8") if file.path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {file.path}: {error}") from error
    after, is_ours = file.text, (before or "").startswith(f"# {MARK}")
    if file.kind == "json":
        after = _merged_json(file, before)
    elif file.kind == "block":
        after, is_ours = _with_block(file, before or ""), _BEGIN in (before or "")
    return None if after == before else Change(file.path, before, after, is_ours)


def _merged_json(file: File, before: str | None) -> str:
    if not (before or "").strip():
        return file.text
    try:
        return as_json(merged(json.loads(before or ""), json.loads(file.text)))
    except ValueError as error:
        raise ConfigError(
            f"file {file.path}: it is not plain JSON ({error}); --print shows what to add."
        ) from None


def merged(old: Any, new: Any) -> Any:
    """Return `old` with what is in `new`: keys of objects, and items of lists by their name.

    What is named `headrace` is replaced as a whole.

    Raises:
        ValueError: one is an object and the other a list.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return _merged_objects(cast("dict[str, Any]", old), cast("dict[str, Any]", new))
    if isinstance(old, list) and isinstance(new, list):
        added = cast("list[dict[str, Any]]", new)
        names = {item["name"] for item in added}
        return [*(item for item in cast("list[Any]", old) if _name(item) not in names), *added]
    if old is not None and (isinstance(old, dict | list) or isinstance(new, dict | list)):
        raise ValueError("an object is where a list or a text is expected")
    return new


def _merged_objects(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    known = {key: merged(old[key], new[key]) for key in new if key in old and key != "headrace"}
    return {**old, **new, **known}


def _name(item: object) -> object:
    return cast("dict[str, Any]", item).get("name") if isinstance(item, dict) else None


def _with_block(file: File, before: str) -> str:
    """Return a file of YAML that is a list, with our block of items."""
    block = f"{_BEGIN}\n{file.text}{_END}\n"
    start, has_block, rest = before.partition(f"{_BEGIN}\n")
    _, has_end, after = rest.partition(f"{_END}\n")
    if has_block and has_end:
        return f"{start}{block}{after}"
    if has_block or any(line and line[0] not in "- #" for line in before.splitlines()):
        raise ConfigError(f"file {file.path}: it is no plain list; --print shows what to add.")
    return f"{before}{'' if before.endswith(chr(10)) or not before else chr(10)}{block}"
