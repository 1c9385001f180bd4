"""One frozen settings tree: default < file < environment < flag < argument.

`load` reads the sources; `Settings` has the values, each with its origin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from pydantic import BaseModel

from headrace.config import check, sources
from headrace.config.sources import File, Keys, Layer, Value, environment_name, short_name
from headrace.config.tree import (
    TABLES,
    Config,
    DbgptSettings,
    ModelSettings,
    ServerSettings,
    TelemetrySettings,
    fixed_keys,
    hash_key,
)
from headrace.core.errors import ConfigError
from headrace.core.model import PRESET_SETTINGS, SETTINGS, ModelSpec, Preset
from headrace.core.values import masked

__all__ = [
    "Config",
    "DbgptSettings",
    "Row",
    "ServerSettings",
    "Settings",
    "TelemetrySettings",
    "environment_name",
    "hash_key",
    "load",
    "short_name",
]


ImportOptions = Callable[[str], type[BaseModel]]
"""Returns the Options of an engine that is given by its import path."""

Verify = Callable[[ModelSpec], None]
"""Raises a ConfigError, whose `param` is the setting, for settings that do not go together."""


class Row(NamedTuple):
    """A line of `headrace config show`; `value` is plain data, masked if it is a secret."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class _Sources:
    """All layers, before they are merged."""

    file: File
    environment: Mapping[str, Layer]
    flags: Layer
    keys: Keys
    engines: Mapping[str, type[BaseModel]]
    import_options: ImportOptions | None
    verify: Verify | None
    cwd: Path
    upstreams: Collection[str] | None = None

    def with_engine(self, name: object) -> _Sources:
        """Return the sources with the options of an engine given by its import path."""
        engines = _with_imported(self.engines, [name], self.import_options)
        return replace(self, engines=engines, keys=Keys.of(engines))

    def everywhere(self, default: Layer) -> Layer:
        """Merge the layers of the program's settings."""
        layer = default | self.file.shared
        for source in (self.environment[""], self.flags):
            layer |= {key: value for key, value in source.items() if not key.startswith("*.")}
        return layer

    def of_model(self, name: str, reference: str, given: Layer) -> Layer:
        """Merge the layers of one model, without options of other engines."""
        layer = {"model": Value(reference, "default", self.cwd)} | self.file.models.get(name, {})
        # A name without ASCII letters and digits has no variables of its own.
        own = environment_name(name)
        variables = self.environment.get(own, {}) if own else {}
        shared = _for_all(self.environment[""])
        merged = layer | shared | variables | _for_all(self.flags) | given
        able = {key for kind in self.able(merged) for key in kind.model_fields}
        for key in shared:
            option = key.removeprefix("options.")
            # A variable for all models applies to those whose engine has the option.
            if key != option and option not in able and merged[key] is shared[key]:
                del merged[key]
        return merged

    def able(self, layer: Layer) -> list[type[BaseModel]]:
        """Return the Options of the model's engine, or of all engines if none is chosen.

        Raises:
            ConfigError: the engine is unknown.
        """
        named = layer.get("engine")
        if named and named.value == "auto":
            named = None
        engine = named.value if named else str(layer["model"].value).removeprefix("builtin:")
        if engine in self.engines:
            return [self.engines[engine]]
        if named and self.engines and ":" not in str(engine):
            raise sources.unknown_key(named.origin, str(engine), self.engines, "engine")
        return [] if named else list(self.engines.values())


def _for_all(layer: Layer) -> Layer:
    return {key[2:]: value for key, value in layer.items() if key.startswith("*.")}


@dataclass(frozen=True)
class Settings:
    """The configuration, and the origin of each value.

    `file` is the one that was read, `searched` the paths that were tried.
    """

    config: Config
    file: Path | None
    searched: tuple[Path, ...]
    # With secrets in plain text.
    _sources: _Sources = field(repr=False)

    def origin(self, key: str) -> str:
        """Return the origin of a value: `default`, `file ...`, `environment ...`, `flag ...`.

        `key` is as in `show`: `server.port`, `models.NAME.options.KEY`.
        """
        return next((row.origin for row in self.show() if row.key == key), "default")

    def with_upstreams(self, schemes: Collection[str]) -> Settings:
        """Return the settings with the only schemes that references to upstreams have."""
        return replace(self, _sources=replace(self._sources, upstreams=schemes))

    def resolve(self, name: str) -> tuple[str, str]:
        """Return name and reference of a configured model, an alias, or a bare reference."""
        for key, model in self.config.models.items():
            if name in model.names:
                return key, key
        return short_name(name, self._sources.upstreams), name

    def model_spec(self, name: str, arguments: Mapping[str, Any] | None = None) -> ModelSpec:
        """Return the specification of a model.

        `name` is a configured name, an alias, or a reference that no file names. `arguments`
        override everything; an option may be among them or under `options`.

        Raises:
            ConfigError: a key is unknown or a value is not accepted.
        """
        return self._spec(*self.resolve(name), arguments or {})

    def changed(
        self, name: str, changes: Mapping[str, Any], served: Sequence[ModelSpec] = ()
    ) -> ModelSpec:
        """Return the specification of a model with changes made at run time.

        `name` is that of a model in `served`, or what `model_spec` takes. `changes` are its
        `arguments`; None is one that is not given. They are sent over the network, so settings that
        read files or run other code are refused.

        Raises:
            ConfigError: a key is unknown or a value is not accepted.
        """
        options: Mapping[str, Any] = changes.get("options") or {}
        for key, value in (*changes.items(), *options.items()):
            if value is not None and check.is_local_only(key, value):
                raise ConfigError(f"argument: {key} is set in the configuration only.", param=key)
        references = {spec.name: spec.model for spec in served}
        known, reference = (name, references[name]) if name in references else self.resolve(name)
        return self._spec(known, reference, changes)

    def needs_restart(self, later: Settings) -> tuple[str, ...]:
        """Return the keys that differ in a later configuration and need a restart."""
        pairs = ((key, attrgetter(key)) for key in fixed_keys())
        return tuple(key for key, get in pairs if get(self.config) != get(later.config))

    def show(self, names: Sequence[str] = ()) -> Iterator[Row]:
        """Yield each value with its origin, for the configured models and those in `names`."""
        layer = self._sources.everywhere({})
        config = self.config
        for key in sources.top_keys():
            yield _row(key, getattr(config, key), layer.get(key))
        for table, kind in TABLES.items():
            for name in kind.model_fields:
                key = f"{table}.{name}"
                yield _row(key, getattr(getattr(config, table), name), layer.get(key))
        for name in dict.fromkeys([*config.models, *names]):
            known, reference = self.resolve(name)
            spec, layer = _model(self._sources, known, reference, {})
            yield from _model_rows(spec, layer)
            for other in spec.presets:
                yield from _preset_rows(other, self._sources.file.models[other])

    def _spec(self, name: str, reference: str, arguments: Mapping[str, Any]) -> ModelSpec:
        read = self._sources.with_engine(arguments.get("engine"))
        given = sources.arguments(arguments, read.keys, read.cwd)
        return _model(read, name, reference, given)[0]


def _row(key: str, value: Any, source: Value | None) -> Row:
    return Row(key, masked(key, value), source.origin if source else "default")


def _model_rows(spec: ModelSpec, layer: Layer) -> Iterator[Row]:
    prefix = f"models.{spec.name}."
    for key in [key for key in SETTINGS if key != "options"]:
        yield _row(prefix + key, getattr(spec, key), layer.get(key))
    for key, value in spec.options.items():
        yield _row(f"{prefix}options.{key}", value, layer.get(f"options.{key}"))


def _preset_rows(name: str, layer: Layer) -> Iterator[Row]:
    for key, value in layer.items():
        yield _row(f"models.{name}.{key}", value.value, value)


def _model(read: _Sources, name: str, reference: str, given: Layer) -> tuple[ModelSpec, Layer]:
    layer = check.with_adapters(read.of_model(name, reference, given))
    prefix = f"models.{name}."
    kinds = read.able(layer)
    errors: list[ConfigError] = []
    checked: BaseModel | None = None
    for key, value in layer.items():
        with sources.kept(errors):
            if key.startswith("options."):
                layer[key] = value._replace(value=check.option(kinds, key, value, prefix))
    with sources.kept(errors):
        checked = check.build(ModelSettings, layer, prefix)
    sources.raise_all(errors)
    assert checked is not None, "or its error was raised"
    spec = ModelSpec(name=name, **{key: getattr(checked, key) for key in SETTINGS})
    if spec.base is not None:
        origin = layer["base"].origin
        raise ConfigError(f"{origin}: base is the key of a table of a file.", param="base")
    presets = _presets(read, spec)
    if presets:
        spec = msgspec.structs.replace(spec, presets=presets)
    if read.verify is not None:
        try:
            read.verify(spec)
        except ConfigError as error:
            source = layer.get(error.param or "") or layer["model"]
            message = f"{source.origin}: {prefix}{error.param}: {error.message}"
            raise ConfigError(message, param=error.param) from None
    return spec, layer


def _base_of(layer: Layer) -> str | None:
    return str(layer["base"].value) if "base" in layer else None


def _presets(read: _Sources, base: ModelSpec) -> dict[str, Preset]:
    """Return the presets of the tables with this base."""
    tables = read.file.models.items()
    return {
        name: _preset(read, name).over(base)
        for name, layer in tables
        if _base_of(layer) == base.name
    }


def _preset(read: _Sources, name: str) -> Preset:
    """Return the preset of a table with a base.

    Raises:
        ConfigError: the table has another key, or its base is no table with a model.
    """
    table, base = read.file.models[name], _base_of(read.file.models[name])
    prefix = f"models.{name}."
    others = [key for key in table if key not in (*PRESET_SETTINGS, "base")]
    if others:
        origin = sources.with_line(table[others[0]].origin, prefix + others[0])
        raise ConfigError(
            f"{origin}: {prefix}{others[0]}: a table with a base has only "
            f"{', '.join(PRESET_SETTINGS)}; the rest is that of {base}.",
            param=others[0],
        )
    if base not in read.file.models or _base_of(read.file.models[base]) is not None:
        origin = sources.with_line(table["base"].origin, f"{prefix}base")
        raise ConfigError(
            f"{origin}: {prefix}base: {base} is no table of a model, [models.{base}].", param="base"
        )
    layer = read.of_model(name, name, {})
    kept = {key: value for key, value in layer.items() if key in (*PRESET_SETTINGS, "model")}
    checked = check.build(ModelSettings, kept, prefix)
    return Preset(**{key: getattr(checked, key) for key in PRESET_SETTINGS})


def _with_imported(
    known: Mapping[str, type[BaseModel]],
    names: Iterable[object],
    import_options: ImportOptions | None,
) -> Mapping[str, type[BaseModel]]:
    paths = {name for name in names if isinstance(name, str) and ":" in name} - known.keys()
    return {**known, **{name: import_options(name) for name in paths}} if import_options else known


def load(
    *,
    file: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    known_options: Mapping[str, type[BaseModel]] | None = None,
    import_options: ImportOptions | None = None,
    verify: Verify | None = None,
) -> Settings:
    """Read and check all sources.

    `flags` are flat keys (`port`, `context_length`); None is one that is not given, and `options`
    holds engine options. `known_options` are the Options of the engines, by engine;
    `import_options` returns those of an engine given by its import path, and `verify` raises a
    ConfigError for settings of a model that do not go together. The arguments of the host program
    are never read.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value is not accepted.
    """
    variables = os.environ if environ is None else environ
    here = cwd or Path.cwd()
    path, searched = sources.find_file(file, variables, here)
    errors: list[ConfigError] = []
    parsed = sources.parse(path, errors)
    named = [*parsed.engines(), *sources.engines(variables), (flags or {}).get("engine")]
    engines = _with_imported(known_options or {}, named, import_options)
    keys = Keys.of(engines)
    read = _Sources(
        file=parsed,
        environment=sources.environment(variables, keys, here),
        flags=sources.flags(flags or {}, keys, here),
        keys=keys,
        engines=engines,
        import_options=import_options,
        verify=verify,
        cwd=here,
    )
    home = Value(str(sources.xdg(variables, "XDG_DATA_HOME", ".local/share")), "default", here)
    return Settings(_config(read, home, errors), path, searched, read)


def _config(read: _Sources, home: Value, errors: list[ConfigError]) -> Config:
    """Build the tree; `errors` are those of the sources."""
    models: dict[str, ModelSpec] = {}
    whole: Config | None = None
    with sources.kept(errors):
        whole = check.build(Config, read.everywhere({"home": home}))
    for name, layer in read.file.models.items():
        with sources.kept(errors):
            if "base" in layer:
                _preset(read, name)
            else:
                models[name] = _model(read, name, name, {})[0]
    sources.raise_all(errors)
    assert whole is not None, "or its error was raised"
    _distinct(models, read.file.path)
    return whole.model_copy(update={"models": models})


def _distinct(models: Mapping[str, ModelSpec], path: Path | None) -> None:
    seen = dict.fromkeys(models, "a model")
    for name, model in models.items():
        for alias in model.names[1:]:
            key = "adapters" if alias in model.adapter_names else "aliases"
            if not sources.is_name(alias):
                raise ConfigError(
                    f"file {path}: models.{name}.{key}: {alias!r}: {sources.NAMES}.", param=key
                )
            if alias in seen:
                raise ConfigError(
                    f"file {path}: models.{name}.{key}: {alias} is the name of {seen[alias]}.",
                    param=key,
                )
            seen[alias] = f"an alias or adapter of {name}"
