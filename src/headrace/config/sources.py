"""The sources of settings: a file, the environment, flags, arguments.

Each source is read into flat layers of `Value`s. Their keys are `home`, `server.port`, and
`*.context_length` for all models; in the layer of one model `context_length`, `options.threads`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
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
_FEW, _NEAR = 12, 5
_LINE = re.compile(r"^file .*?, line (\d+): ")
_HEADER = re.compile(r"\s*\[([^\[].*)\]\s*(?:#.*)?")
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
            shared |= {kind.prefix + key: f"{table}.{key}" for key in kind.model_fields}
        return cls(options, model, shared | {key: key for key in top_keys()})


def top_keys() -> list[str]:
    """Return the settings outside of all tables."""
    return [key for key in Config.model_fields if key not in (*TABLES, "models")]


def unknown_key(origin: str, key: str, known: Iterable[str], kind: str = "setting") -> ConfigError:
    """Return the error for an unknown key, with the nearest known one, and all if they are few."""
    names = sorted(known)
    # What all have in common would make any two of them similar.
    start = len(os.path.commonprefix([key, *names]))  # noqa: RUF071
    rests = {name[start:]: name for name in names}
    near = [rests[rest] for rest in difflib.get_close_matches(key[start:], rests, n=_NEAR)]
    hint = f" Did you mean {near[0]}?" if near else ""
    listed = names if len(names) <= _FEW else near[1:]
    if listed or not names:
        known_as = "Known" if len(names) <= _FEW else "Similar"
        hint += f" {known_as}: {', '.join(listed) or 'none'}."
    return ConfigError(f"{with_line(origin, key)}: {key} is no {kind}.{hint}", param=key)


def with_line(origin: str, key: str) -> str:
    """Return the origin of a value, with the line of a key if it is a file that has it."""
    path = Path(origin.removeprefix("file "))
    if not origin.startswith("file ") or not path.is_file():
        return origin
    table: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if (header := _HEADER.fullmatch(line)) is not None:
            table = _parts(header[1])
        pair, equals, _ = line.partition("=")
        full = ".".join((*table, *_parts(pair))) if equals and not header else ".".join(table)
        if full == key or (equals and key.startswith(f"{full}.") and not header):
            return f"{origin}, line {number}"
    return origin


def _parts(dotted: str) -> tuple[str, ...]:
    """Return the keys of a dotted key in TOML; none if it is something else."""
    try:
        inner: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    keys: list[str] = []
    while isinstance(inner, dict) and inner:
        key, inner = next(iter(cast("dict[str, Any]", inner).items()))
        keys.append(key)
    return tuple(keys)


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise one error of several, a line each, in the order of the file."""
    faults = [(line, error.param) for error in errors for line in error.message.splitlines()]
    faults.sort(key=lambda fault: int(match[1]) if (match := _LINE.search(fault[0])) else 0)
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(dict(faults))), param=faults[0][1])


def environment_name(model: str) -> str:
    """Return the name of a model as used in variables: `Qwen2.5-7B` is `QWEN2_5_7B`."""
    return re.sub(r"[^A-Za-z0-9]+", "_", model).strip("_").upper()


def is_name(name: str) -> bool:
    """Whether a model may have this name: requests, logs and tables have to show it."""
    return bool(name.strip()) and len(name) <= _MAX_NAME and is_text(name)


def short_name(reference: str, upstreams: Collection[str] | None = None) -> str:
    """Return a name for a model that is not configured: of the catalogue, file or upstream.

    `upstreams` are the schemes of upstreams; by default any word may be one.
    """
    scheme, colon, rest = reference.partition(":")
    if colon and scheme == "hub":
        return re.split("[:@]", rest, maxsplit=1)[0].rpartition("/")[2]
    if colon and scheme in ("index", "builtin"):
        return re.split("[=<>!~@]", rest, maxsplit=1)[0]
    is_upstream = _UPSTREAM.fullmatch(scheme) if upstreams is None else scheme in upstreams
    if is_upstream and rest and rest[0] not in "/\\":
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

    An option may be in `options`, as `options.KEY`, or beside the settings. `adapters.NAME` is one
    adapter among those that are configured, or False for none.
    """
    layer: Layer = {}
    for key, value in given.items():
        if key == "options" or value is None:
            continue
        place = key if key.startswith(("options.", "adapters.")) else keys.model.get(key)
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
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {path}: not TOML: {error}") from error


def _table(value: object, key: str, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: {key} is a table, [{key}].", param=key)
    return cast("dict[str, Any]", value)


def _known(
    table: Mapping[str, Any],
    known: Collection[str],
    prefix: str,
    source: Value,
    errors: list[ConfigError],
) -> Layer:
    """Return the keys of a table that are known; the others become errors."""
    names = [prefix + name for name in known]
    unknown = [prefix + key for key in table if key not in known]
    errors.extend(unknown_key(source.origin, key, names) for key in unknown)
    return {key: source._replace(value=value) for key, value in table.items() if key in known}


def parse(path: Path | None, errors: list[ConfigError]) -> File:
    """Read a file and append an error for each key that is unknown; values are not checked yet.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    if path is None:
        return File(None, {}, {})
    source = Value(None, f"file {path}", path.parent)
    top, models = dict[str, Any](_read(path)), dict[str, Layer]()
    shared: Layer = {}
    with kept(errors):
        for name, value in _table(top.pop("models", {}), "models", source.origin).items():
            with kept(errors):
                models[name] = _model_table(name, value, source, errors)
    for name, kind in TABLES.items():
        with kept(errors):
            table = _table(top.pop(name, {}), name, source.origin)
            checked = _known(table, kind.model_fields, f"{name}.", source, errors)
            shared |= {f"{name}.{key}": value for key, value in checked.items()}
    shared |= _known(top, Config.model_fields, "", source, errors)
    return File(path, shared, models)


@contextlib.contextmanager
def kept(errors: list[ConfigError]) -> Generator[None]:
    """Append a ConfigError to a list, so that all of a file are reported at once."""
    try:
        yield
    except ConfigError as error:
        errors.append(error)


def _model_table(name: str, value: object, source: Value, errors: list[ConfigError]) -> Layer:
    prefix = f"models.{name}"
    if not is_name(name):
        raise ConfigError(f"{source.origin}: [models.{name!r}]: {NAMES}.", param="models")
    layer = _known(_table(value, prefix, source.origin), SETTINGS, f"{prefix}.", source, errors)
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
