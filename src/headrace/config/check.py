"""Checks of layers; an error names the origin, the key and the accepted values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, SecretStr, ValidationError

from headrace.config.fields import words
from headrace.config.sources import Layer, Value, unknown_key, with_line
from headrace.config.tree import is_collection
from headrace.core.adapter import checked_adapters
from headrace.core.errors import ConfigError
from headrace.core.values import expanded
from headrace.core.wording import fault_of

_PLAIN = (str, int, float, bool, list, dict, type(None))


Model = TypeVar("Model", bound=BaseModel)


def build(kind: type[Model], layer: Layer, prefix: str = "") -> Model:
    """Validate a layer as a table of the settings.

    Raises:
        ConfigError: a value is not accepted.
    """
    placed = located(layer)
    try:
        return kind.model_validate(_nest(placed))
    except ValidationError as error:
        raise _refuse(error, placed, prefix) from None


def _refuse(error: ValidationError, layer: Layer, prefix: str = "") -> ConfigError:
    """Return the error for all faults, a line each, with the origin and the key of the value."""
    lines: list[str] = []
    params: list[str] = []
    for fault in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in fault["loc"])
        # A rule for several fields has no location.
        near = next((key for key in layer if place == key or place.startswith(f"{key}.")), None)
        key = (prefix + place).rstrip(".")
        origin = with_line(layer[near].origin, prefix + near) if near else "configuration"
        lines.append(f"{origin}: {key}: {fault_of(fault['msg'])}.")
        params.append(place)
    return ConfigError("\n".join(lines), param=params[0])


def _nest(layer: Layer) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in layer.items():
        outer, _, inner = key.rpartition(".")
        (tree.setdefault(outer, {}) if outer else tree)[inner] = value.value
    return tree


def option(kinds: Sequence[type[BaseModel]], key: str, value: Value, prefix: str) -> Any:
    """Return an option as plain data, validated by the engines that have it.

    Raises:
        ConfigError: no engine has it, or none accepts the value.
    """
    name = key.removeprefix("options.")
    able = [kind for kind in kinds if name in kind.model_fields]
    if kinds and not able:
        known = {field for kind in kinds for field in kind.model_fields}
        origin = with_line(value.origin, prefix + key)
        raise unknown_key(origin, name, known, f"option of {prefix.rstrip('.')}")
    fault: ValueError | None = None
    for kind in able:
        try:
            return _validated(kind, name, value.value)
        except ValueError as error:
            fault = error
    if fault:
        origin = with_line(value.origin, prefix + key)
        raise ConfigError(f"{origin}: {prefix}{key}: {fault}.", param=key)
    return value.value


def _validated(kind: type[BaseModel], name: str, given: Any) -> Any:
    raw = words(given) if is_collection(kind.model_fields[name].annotation) else given
    try:
        checked: Any = getattr(kind.model_validate({name: raw}), name)
    except ValidationError as error:
        # Errors of other fields, and between fields, are reported when the engine opens.
        mine = [fault_of(fault["msg"]) for fault in error.errors() if fault["loc"][:1] == (name,)]
        if mine:
            raise ValueError(mine[0]) from None
        return raw
    # Other objects (a path) cannot be sent to the worker's process. A secret stays wrapped, so that
    # it cannot be printed by accident.
    return checked if type(checked) in _PLAIN or isinstance(checked, SecretStr) else raw


_RELATIVE = ("./", "../", "~")
_LOCAL = (
    *("api_key", "api_key_env", "base_url", "mmproj", "draft_model", "executable", "arguments"),
)


def is_local_only(key: str, value: object) -> bool:
    """Whether a change over the network would read a local file or run other code."""
    text = str(value)
    reads = key == "chat_template" and text.startswith("@")
    runs = key == "engine" and ":" in text
    return key in ("model", "trust_remote_code", "env") or reads or runs or _is_local(key)


def _is_local(key: str) -> bool:
    """Whether an option names a file or a program, or which secret is sent to which address."""
    return key.removeprefix("options.") in _LOCAL


def located(layer: Layer) -> Layer:
    """Resolve relative paths against the folder of the file or the working directory."""
    resolved = dict(layer)
    for key, value in layer.items():
        if key == "cluster.tls" and isinstance(value.value, dict):
            resolved[key] = value._replace(value=_files(value))
            continue
        if key == "adapters" and isinstance(value.value, dict):
            resolved[key] = value._replace(value=_sources(value))
            continue
        if not isinstance(value.value, str | Path):
            continue
        text = str(value.value)
        if key in ("home", "server.state", "cluster.token_file") or (
            key in ("model", "options.draft_model") and text.startswith(_RELATIVE)
        ):
            resolved[key] = value._replace(value=str(value.base / expanded(text, ConfigError)))
        elif key == "chat_template" and text.startswith("@"):
            resolved[key] = value._replace(value=_template(value, text[1:]))
    return resolved


def with_adapters(layer: Layer) -> Layer:
    """Return a layer with the adapters that are given one by one in their table.

    Raises:
        ConfigError: the table is not accepted.
    """
    single = {key: value for key, value in layer.items() if key.startswith("adapters.")}
    if not single:
        return layer
    table: dict[str, Any] = {}
    if (whole := layer.get("adapters")) is not None:
        is_text = isinstance(whole.value, str)
        table = dict(_parsed(whole) if is_text else _sources(whole))
    for key, value in single.items():
        table[key.removeprefix("adapters.")] = value.value
    kept = {name: adapter for name, adapter in table.items() if adapter is not False}
    last = next(reversed(single.values()))
    others = {key: value for key, value in layer.items() if key not in single}
    return others | {"adapters": last._replace(value=kept)}


def _parsed(value: Value) -> Mapping[str, Any]:
    try:
        return cast("Mapping[str, Any]", checked_adapters(value.value))
    except ValueError as error:
        raise ConfigError(f"{value.origin}: adapters: {error}", param="adapters") from None


def _sources(value: Value) -> dict[str, object]:
    """Return adapters with the relative paths among their sources resolved."""
    adapters = cast("dict[str, Any]", value.value)
    return {name: _with_source(value.base, adapter) for name, adapter in adapters.items()}


def _with_source(base: Path, adapter: Any) -> Any:
    if isinstance(adapter, dict):
        table = cast("dict[str, Any]", adapter)
        return {**table, "source": _with_source(base, table.get("source"))}
    if isinstance(adapter, str) and adapter.startswith(_RELATIVE):
        return str(base / expanded(adapter, ConfigError))
    return adapter


def _files(value: Value) -> dict[str, str]:
    files = cast("dict[str, object]", value.value)
    return {
        name: str(value.base / expanded(str(file), ConfigError)) for name, file in files.items()
    }


def _template(value: Value, name: str) -> str:
    path = value.base / expanded(name, ConfigError)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{value.origin}: chat_template: cannot read {path}: {error}") from error
