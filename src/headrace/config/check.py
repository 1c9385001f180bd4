"""From layers to checked settings; each fault names its origin, its key and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError

from headrace.config.sources import Layer, Value, unknown_key
from headrace.config.tree import words
from headrace.core.errors import ConfigError
from headrace.core.paths import expanded

_COLLECTIONS = (list, tuple, set, frozenset, dict, Sequence, Mapping)
_PLAIN = (str, int, float, bool, list, dict, type(None))


Model = TypeVar("Model", bound=BaseModel)


def build(kind: type[Model], layer: Layer, prefix: str = "") -> Model:
    """Check a layer as one of the settings' classes.

    Raises:
        ConfigError: a value is not accepted.
    """
    found = located(layer)
    try:
        return kind.model_validate(_nest(found))
    except ValidationError as error:
        raise _refuse(error, found, prefix) from None


def _refuse(error: ValidationError, layer: Layer, prefix: str = "") -> ConfigError:
    """Name the origin and the key of the first fault; pydantic says what is accepted."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    # A rule over several fields has no place of its own.
    near = next((key for key in layer if place == key or place.startswith(f"{key}.")), None)
    origin = layer[near].origin if near else "configuration"
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{origin}: {(prefix + place).rstrip('.')}: {message}.", param=place)


def _nest(layer: Layer) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in layer.items():
        outer, _, inner = key.rpartition(".")
        (tree.setdefault(outer, {}) if outer else tree)[inner] = value.value
    return tree


def _is_collection(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return kind in _COLLECTIONS or any(_is_collection(part) for part in get_args(annotation))


def option(kinds: Sequence[type[BaseModel]], key: str, value: Value, prefix: str) -> Any:
    """Check one option with the engines that may take it, and return it as plain data.

    Raises:
        ConfigError: no engine knows it, or none accepts the value.
    """
    name = key.removeprefix("options.")
    able = [kind for kind in kinds if name in kind.model_fields]
    if kinds and not able:
        known = {field for kind in kinds for field in kind.model_fields}
        raise unknown_key(value.origin, name, known, f"option of {prefix.rstrip('.')}")
    fault: ValueError | None = None
    for kind in able:
        try:
            return _validated(kind, name, value.value)
        except ValueError as error:
            fault = error
    if fault:
        raise ConfigError(f"{value.origin}: {prefix}{key}: {fault}.", param=key)
    return value.value


def _validated(kind: type[BaseModel], name: str, given: Any) -> Any:
    raw = words(given) if _is_collection(kind.model_fields[name].annotation) else given
    try:
        checked: Any = getattr(kind.model_validate({name: raw}), name)
    except ValidationError as error:
        # Faults of other fields, and between fields, are found when the engine opens.
        mine = [fault["msg"] for fault in error.errors() if fault["loc"][:1] == (name,)]
        if mine:
            raise ValueError(mine[0]) from None
        return raw
    # What is no plain data (a path) would not cross to the worker's process. A secret stays sealed
    # wherever it goes: nobody tells it by accident.
    return checked if type(checked) in _PLAIN or isinstance(checked, SecretStr) else raw


def is_out_of_reach(key: str, value: object) -> bool:
    """Tell whether a change from afar would read a file of this machine or run other code."""
    text = str(value)
    reads = key == "chat_template" and text.startswith("@")
    runs = key == "engine" and ":" in text
    return key in ("model", "trust_remote_code") or reads or runs or _leads_out(key)


def _leads_out(key: str) -> bool:
    """Tell whether an option decides which secret goes to which address."""
    return key.removeprefix("options.") in ("api_key", "api_key_env", "base_url")


def located(layer: Layer) -> Layer:
    """Follow what is relative: to the folder of the file, or to where the program runs."""
    found = dict(layer)
    for key, value in layer.items():
        if not isinstance(value.value, str | Path):
            continue
        text = str(value.value)
        if key in ("home", "server.state") or (
            key == "model" and text.startswith(("./", "../", "~"))
        ):
            found[key] = value._replace(value=str(value.base / expanded(text, ConfigError)))
        elif key == "chat_template" and text.startswith("@"):
            found[key] = value._replace(value=_template(value, text[1:]))
    return found


def _template(value: Value, name: str) -> str:
    path = value.base / expanded(name, ConfigError)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{value.origin}: chat_template: cannot read {path}: {error}") from error
