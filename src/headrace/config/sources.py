"""The sources of settings: a file, the environment, flags, arguments.

Each source is read into flat layers of `Value`s. Their keys are `home`, `server.port`, and
`*.context_length` for all models; in the layer of one model `context_length`, `options.threads`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import BaseModel

from headrace.config.tree import TABLES, Config
from headrace.core.errors import ConfigError
from headrace.core.model import SETTINGS, SINGLE_SETTINGS
from headrace.core.values import expanded, is_text

PREFIX = "HEADRACE_"
CLIENT_KEYS = ("HEADRACE_ADMIN_KEY", "HEADRACE_API_KEY")
"""Variables with the API key that a command sends to a service; the first one set is used."""

RESERVED = frozenset(
    {"HEADRACE_CONFIG", "HEADRACE_NO_COLOR", "HEADRACE_DEBUG", "HEADRACE_URL", *CLIENT_KEYS}
)
"""Variables with the prefix that are read elsewhere and are not settings."""

FILE_NAME = "headrace.toml"
NAMES = "a name has 1 to 512 characters, and no control characters"
_MAX_NAME = 512
_UPSTREAM = re.compile(r"[a-z][a-z0-9_-]+")


class Value(NamedTuple):
    """A value, its origin, and the base of its relative paths."""

    value: Any
    origin: str
    base: Path


Layer = dict[str, Value]


@dataclass(frozen=True)
class Keys:
    """The known flat keys, and the place of each: for one model, and for all models."""

    options: frozenset[str]
    model: Mapping[str, str]
    shared: Mapping[str, str]

    @classmethod
    def of(cls, engines: Mapping[str, type[BaseModel]]) -> Keys:
        """Collect the keys of Headrace and of all engines; settings hide options of their names."""
        options = frozenset(name for kind in engines.values() for name in kind.model_fields)
        own = SETTINGS.keys() - {"options"}
        model = {name: f"options.{name}" for name in options} | {name: name for name in own}
        shared = {key: f"*.{place}" for key, place in model.items() if key not in SINGLE_SETTINGS}
        for table, kind in TABLES.items():
            shared |= {key: f"{table}.{key}" for key in kind.model_fields}
        return cls(options, model, shared | {key: key for key in top_keys()})


def top_keys() -> list[str]:
    """Return the settings outside of all tables."""
    return [key for key in Config.model_fields if key not in (*TABLES, "models")]


def unknown_key(origin: str, key: str, known: Iterable[str], kind: str = "setting") -> ConfigError:
    """Return the error for an unknown key, with the nearest known one and all others."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return ConfigError(
        f"{origin}: {key} is no {kind}.{hint} Known: {', '.join(names) or 'none'}.", param=key
    )


def environment_name(model: str) -> str:
    """Return the name of a model as used in variables: `Qwen2.5-7B` is `QWEN2_5_7B`."""
    return re.sub(r"[^A-Za-z0-9]+", "_", model).strip("_").upper()


def is_name(name: str) -> bool:
    """Whether a model may have this name: requests, logs and tables have to show it."""
    return bool(name.strip()) and len(name) <= _MAX_NAME and is_text(name)


def short_name(reference: str) -> str:
    """Return a name for a model that is not configured: of the catalogue, file or upstream."""
    scheme, colon, rest = reference.partition(":")
    if colon and scheme == "hub":
        return re.split("[:@]", rest, maxsplit=1)[0].rpartition("/")[2]
    if colon and scheme in ("index", "builtin"):
        return re.split("[=<>!~@]", rest, maxsplit=1)[0]
    if _UPSTREAM.fullmatch(scheme) and rest and rest[0] not in "/\\":
        return rest.rpartition("/")[2] or reference
    return Path(reference).name.removesuffix(".gguf") or reference


def engines(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the engines that variables name, for all models or for one."""
    for name, text in environ.items():
        if name == f"{PREFIX}ENGINE" or (name.startswith(PREFIX) and name.endswith("__ENGINE")):
            yield text


def environment(environ: Mapping[str, str], keys: Keys, cwd: Path) -> dict[str, Layer]:
    """Return a layer for each sanitised model name; the one of all models has an empty name."""
    layers: dict[str, Layer] = {"": {}}
    for name, text in sorted(environ.items()):
        # An empty variable is ignored, so that it cannot clear the API keys of the file.
        if not name.startswith(PREFIX) or name in RESERVED or not text:
            continue
        model, separator, key = name.removeprefix(PREFIX).rpartition("__")
        places = keys.model if model else keys.shared
        known_form = key.isupper() and bool(model or not separator)
        place = places.get(key.lower()) if known_form else None
        if place is None:
            start = f"{PREFIX}{model}__" if model else PREFIX
            known = [start + other.upper() for other in places]
            raise unknown_key("environment", name, known)
        layers.setdefault(model, {})[place] = Value(text, f"environment {name}", cwd)
    return layers


def _options(given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    options: Mapping[str, Any] = given.get("options") or {}
    return options.items()


def flags(given: Mapping[str, Any], keys: Keys, cwd: Path) -> Layer:
    """Return the layer of the command line; None is not given, options are under `options`."""
    layer: Layer = {}
    for key, value in given.items():
        if key == "options" or value is None:
            continue
        if key not in keys.shared:
            raise unknown_key("flag", key, keys.shared)
        layer[keys.shared[key]] = Value(value, f"flag --{key.replace('_', '-')}", cwd)
    for key, value in _options(given):
        if key not in keys.options:
            raise unknown_key("flag -o", key, keys.options, "engine option")
        layer[f"*.options.{key}"] = Value(value, f"flag -o {key}", cwd)
    return layer


def arguments(given: Mapping[str, Any], keys: Keys, cwd: Path) -> Layer:
    """Return the layer of the arguments for one model.

    An option may be in `options`, as `options.KEY`, or beside the settings.
    """
    layer: Layer = {}
    for key, value in given.items():
        if key == "options" or value is None:
            continue
        place = key if key.startswith("options.") else keys.model.get(key)
        if place is None:
            raise unknown_key("argument", key, keys.model)
        layer[place] = Value(value, f"argument {key}", cwd)
    for key, value in _options(given):
        layer[f"options.{key}"] = Value(value, f"argument {key}", cwd)
    return layer


class File(NamedTuple):
    """The layers of a file: of the whole program, and of each model."""

    path: Path | None
    shared: Layer
    models: dict[str, Layer]

    def engines(self) -> Iterator[object]:
        """Yield the engines that models are configured with."""
        yield from (layer["engine"].value for layer in self.models.values() if "engine" in layer)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {path}: not TOML: {error}") from error


def _table(value: object, key: str, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: {key} is a table, [{key}].", param=key)
    return cast("dict[str, Any]", value)


def _checked(table: Mapping[str, Any], known: Iterable[str], prefix: str, source: Value) -> Layer:
    for key in table:
        if key not in known:
            names = [prefix + name for name in known]
            raise unknown_key(source.origin, prefix + key, names)
    return {key: source._replace(value=value) for key, value in table.items()}


def parse(path: Path | None) -> File:
    """Read a file and check its keys; values are not checked yet.

    Raises:
        ConfigError: it cannot be read, is not TOML, or has an unknown key.
    """
    if path is None:
        return File(None, {}, {})
    source = Value(None, f"file {path}", path.parent)
    top = _checked(_read(path), Config.model_fields, "", source)
    models = _table(top.pop("models", source._replace(value={})).value, "models", source.origin)
    for name, kind in TABLES.items():
        table = _table(top.pop(name, source._replace(value={})).value, name, source.origin)
        checked = _checked(table, kind.model_fields, f"{name}.", source)
        top |= {f"{name}.{key}": value for key, value in checked.items()}
    return File(path, top, {name: _model_table(models, name, source) for name in models})


def _model_table(models: Mapping[str, Any], name: str, source: Value) -> Layer:
    prefix = f"models.{name}"
    if not is_name(name):
        raise ConfigError(f"{source.origin}: [models.{name!r}]: {NAMES}.", param="models")
    table = _table(models[name], prefix, source.origin)
    layer = _checked(table, SETTINGS, f"{prefix}.", source)
    options = layer.pop("options", source._replace(value={})).value
    for key, value in _table(options, f"{prefix}.options", source.origin).items():
        layer[f"options.{key}"] = source._replace(value=value)
    return layer


def _user_home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def xdg(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    """Return Headrace's folder in the user's directory for configuration or data."""
    path = Path(environ.get(variable, ""))
    base = path if path.is_absolute() else _user_home(environ) / fallback
    return base / "headrace"


def find_file(
    file: Path | str | None, environ: Mapping[str, str], cwd: Path
) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the file to read and the paths tried: flag, variable, here, user directory."""
    named = file or environ.get("HEADRACE_CONFIG")
    if named:
        path = cwd / expanded(named, ConfigError)
        return path, (path,)
    places = (cwd / FILE_NAME, xdg(environ, "XDG_CONFIG_HOME", ".config") / FILE_NAME)
    return next((place for place in places if place.exists()), None), places
